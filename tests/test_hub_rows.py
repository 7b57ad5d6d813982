"""Datasets of the hub, over HTTP: read whole, or streamed for --max-rows so that little of a large file is sent."""

import io
import json

import pytest
from conftest import process
from hub_server import Hub

COUNT, GROUP = 60_000, 400  # rows of the large file, and of each of its row groups


def make_row(n: int) -> dict:
    return {"question": f"Who {n}?", "reply": f"Ann {n}", "context": f"{n} did. " * 50, "source": f"{n // 10}.md"}


@pytest.fixture(scope="module")
def hub():
    """A dataset of 34 MB in Parquet with a second split, and one of 11 MB in JSON Lines."""
    import pyarrow
    from pyarrow import parquet

    files = {}
    for name, count in (("train", COUNT), ("extra", 40)):
        table, file = pyarrow.Table.from_pylist([make_row(n) for n in range(count)]), io.BytesIO()
        parquet.write_table(table, file, row_group_size=GROUP, compression="none", use_dictionary=False)
        files[f"ann/big/main/{name}-0.parquet"] = file.getvalue()
    files["ann/lines/rows.jsonl"] = b"".join(json.dumps(make_row(n)).encode() + b"\n" for n in range(20_000))
    parts = "".join(f"\n  - split: {name}\n    path: main/{name}-*" for name in ("train", "extra"))
    files["ann/big/README.md"] = f"---\nconfigs:\n- config_name: short\n  data_files:{parts}\n---\n".encode()
    server = Hub(files)
    yield server
    server.shutdown()
    server.server_close()


def from_hub(hub, tmp_path, *words):
    """A process whose hub is ours, and the bytes of each file that it was sent."""
    hub.served.clear()
    done = process(
        *words, HF_ENDPOINT=hub.url, HF_HOME=tmp_path, HF_HUB_OFFLINE="", HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1"
    )
    assert done.returncode == 0, done.stderr
    return done


READ = """
import json, sys
from qlora.training.row_files import Draw, read_records
print(json.dumps([[record.cells["question"] for record in read_records(name, config, split, draw and Draw(*draw))]
    for name, config, split, draw in json.loads(sys.argv[1])]))
"""


def test_max_rows_of_a_large_hub_dataset_needs_little_of_its_file(hub, tiny_base, tmp_path):
    done = from_hub(
        hub,
        tmp_path,
        *("instruct_train_qlora.py", "--base-model", tiny_base, "--dataset", "hf://datasets/ann/big", "--dry-run"),
        *("--config", "short", "--columns", "instruction=question", "response=reply", "--max-length", 1024),
        *("--max-rows", 60, "--distractors", 0, "--output", tmp_path / "out"),
    )
    assert "ann/big: 1000 of its rows are streamed, drawn by --seed; filters and --max-rows 60 choose" in done.stderr
    assert "1000 rows read, 60 usable" in done.stderr
    whole = len(hub.files["ann/big/main/train-0.parquet"])
    assert whole > 20e6 and 0 < hub.served["ann/big/main/train-0.parquet"] < whole / 3


def test_the_draw_depends_on_the_seed_and_comes_from_all_of_the_file(hub, tmp_path):
    asked = [["ann/big", None, "train", [50, seed]] for seed in (0, 0, 1)]
    asked += [
        ["ann/big", None, "extra", [50, 0]],
        ["ann/big", "short", "extra", None],
        ["ann/lines", None, "train", [50, 0]],
    ]
    first, again, other, small, all_of_it, lines = json.loads(
        from_hub(hub, tmp_path, "-c", READ, json.dumps(asked)).stdout
    )
    assert first == again and len(set(first)) == len(first) == len(other) == 1000
    assert len(set(first) & set(other)) < 500
    numbers = [int(question.split()[1][:-1]) for question in first]
    assert min(numbers) < COUNT / 3 and max(numbers) > COUNT * 2 / 3
    assert sorted(small) == sorted(all_of_it) and len(small) == 40  # fewer than are wanted: all of them
    assert len(set(lines)) == 1000 and hub.served["ann/lines/rows.jsonl"] < len(hub.files["ann/lines/rows.jsonl"]) / 3


def test_what_the_hub_lacks_is_told(hub, tmp_path):
    code = READ.replace("print(", "from qlora.console import run\nrun(lambda argv: print(").rstrip() + ", [])"
    done = from_hub(hub, tmp_path, "-c", code, json.dumps([["ann/big", None, "test", [50, 0]]]))
    assert "dataset ann/big cannot be loaded (Bad split: test. Available splits: ['train', 'extra'])" in done.stderr
    assert "Traceback" not in done.stderr
