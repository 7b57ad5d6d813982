"""`serve` as a process: it prints its address, answers, takes documents meanwhile, and ends in order."""

import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from conftest import PROJECT

from qlora import settings


def start(tiny_adapter, *words) -> tuple[subprocess.Popen, str]:
    """The process, and the address that it printed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    blank = dict.fromkeys(set(settings.KEYS) - {"QLORA_DATA_DIR", "DATABASE_URL", "QLORA_COLLECTION"}, "")
    command = [sys.executable, "rag_qlora.py", "serve", "--adapter", tiny_adapter, "--port", port, *words]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=PROJECT,
        env={**os.environ, **blank, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_server_finishes_its_answers(collection, tiny_adapter, number):
    process, url = start(tiny_adapter)
    try:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url), process.stderr.read()
        assert httpx.get(f"{url}health").json()["status"] == "ok"
        text = b"# Gates\n\nThe mate closes the gate three minutes before the ferry sails."
        added = httpx.post(f"{url}documents", files=[("files", ("gates.md", text))], timeout=60).json()
        assert added["files"] == [{"name": "gates.md", "passages": 1}]
        found = httpx.post(f"{url}search", json={"question": "Who closes the gate?"}, timeout=60).json()
        assert found["passages"][0]["source"] == "gates.md"
        client = openai.OpenAI(base_url=f"{url}v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id

        def ask(n: int) -> bool:
            messages = [{"role": "user", "content": f"Who closes gate {n}?"}]
            chunks = client.chat.completions.create(model=model, messages=messages, stream=True, max_tokens=80)
            return [next(iter(chunks)), *chunks][-1].choices[0].finish_reason == "stop"

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask, n) for n in range(4)]
            assert asked[0].result()
            process.send_signal(number)
            assert all(one.result() for one in asked)
        assert process.wait(60) == 0
        assert "stopped" in process.stderr.read()
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()
