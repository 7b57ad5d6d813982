"""benchmarks/gpu_check.py: its parts on the CPU, what it does when one goes wrong, and GPUs that can't be used."""

import json
import os
import time

import pytest
from conftest import process

from benchmarks import gpu_check
from benchmarks.gpu_bench import TINY, Bench, Measure
from benchmarks.gpu_check import Part
from qlora import console, machine
from qlora.console import UserError


def test_all_parts_run_on_the_cpu(tmp_path):
    done = process("benchmarks/gpu_check.py", "--tiny", "--output", tmp_path)
    assert done.returncode == 0, (tmp_path / "log.txt").read_text()[-3000:]
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["parts"]) == list(gpu_check.PARTS) and {p["result"] for p in found["parts"].values()} == {"pass"}
    measures = {name: {m["name"]: m["value"] for m in part["measures"]} for name, part in found["parts"].items()}
    assert measures["small"]["answers equal to the CPU's"] == "8 of 8"
    assert measures["ours"]["ours: of the tokens shared"] > 0.3
    equal, rows = measures["plain"]["rows with equal tokens"].split(" of ")
    assert equal == rows != "0"
    assert measures["memory"]["out of memory: parts of a batch"] == 8  # two rows of 16 at a time
    assert measures["ingest"]["written to PostgreSQL"] == 64
    assert found["machine"]["versions"]["torch"] and "(--tiny)" in found["machine"]["card"]
    assert {"profile-step.txt", "profile-token.txt"} <= {path.name for path in tmp_path.iterdir()}
    table = (tmp_path / "results.md").read_text()
    assert table.count("| pass |") > 15 and "| fail |" not in table and "| small | pass |" in table


# ------------------------------------------------------------------------------- parts that go wrong


def good(bench) -> list[Measure]:
    return [Measure("process", os.getpid())]


def bad(bench) -> list[Measure]:
    return [Measure("loss off", 0.5, "nats", ok=False, limit="0.1"), Measure("time", 1234.5, "s")]


def breaks(bench) -> list[Measure]:
    raise ValueError("no | kernel\nfor this")


def crashes(bench) -> list[Measure]:
    os._exit(9)


def hangs(bench) -> list[Measure]:
    time.sleep(600)


def make_parts(*names: str, seconds: int = 60) -> dict[str, Part]:
    """Functions of this module; a name may end in a number."""
    return {name: Part("test_gpu_check", name.rstrip("12"), seconds) for name in names}


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path / "work", tmp_path, TINY)


def test_the_other_parts_go_on_after_an_error_a_crash_and_a_timeout(bench, capsys):
    parts = make_parts("good1", "bad", "breaks", "good2", "crashes", "hangs", "good")
    parts["hangs"] = Part("test_gpu_check", "hangs", 1)
    outcomes = gpu_check.run_parts(list(parts), bench, gpu_check.MINUTES, parts)
    results = {name: outcome.result for name, outcome in outcomes.items()}
    told = ["pass", "fail", "error", "pass", "error", "out of time", "pass"]
    assert results == dict(zip(parts, told, strict=True))
    workers = [outcomes[name].measures[0].value for name in ("good1", "good2", "good")]
    assert len({os.getpid(), *workers}) == 4  # a new process after each thing that CUDA does not survive
    assert outcomes["breaks"].said == "ValueError: no | kernel\nfor this" and "exit code 9" in outcomes["crashes"].said
    assert "in breaks" in (bench.output / "log.txt").read_text()
    table = (bench.output / "results.md").read_text()
    assert "| breaks | error | 0 | ValueError: no \\| kernel for this |" in table
    assert "| bad | loss off | 0.5 nats | 0.1 | fail |" in table and "| bad | time | 1,234 s |  |  |" in table
    assert "loss off: 0.5 nats, wanted: 0.1" in capsys.readouterr().err


def test_results_are_written_after_each_part(bench, monkeypatch):
    parts, seen = make_parts("good", "bad"), []
    ordinary = gpu_check.run_part

    def run_part(name, limit, ask):
        path = bench.output / "results.json"
        seen.append(list(json.loads(path.read_text())["parts"]) if path.exists() else [])
        return ordinary(name, limit, ask)

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    gpu_check.run_parts(list(parts), bench, 1, parts)
    assert seen == [[], ["good"]]


@pytest.mark.alone
def test_minutes_are_shared_by_the_parts_and_the_rest_is_not_run(bench, monkeypatch):
    parts, limits = make_parts("good", "hangs1", "hangs2", "bad"), {}
    ordinary = gpu_check.run_part
    monkeypatch.setattr(
        gpu_check, "run_part", lambda name, limit, ask: limits.update({name: limit}) or ordinary(name, limit, ask)
    )
    outcomes = gpu_check.run_parts(list(parts), bench, 1 / 10, parts)  # six seconds; each process needs one or two
    assert 1.5 < limits["good"] < 3 and [outcome.result for outcome in outcomes.values()][-1] == "not run"
    assert sum(outcome.seconds for outcome in outcomes.values()) < 7


def test_wrong_arguments_and_no_gpu_are_told_in_a_sentence_each(capsys, monkeypatch, tmp_path):
    said = []
    for words in (["--only", "foo", "--minutes", "0"], ["--output", str(tmp_path)]):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert console.run(gpu_check.main, words) == 2
        said.append(capsys.readouterr().err)
    assert "there is no part foo - --only - give some of small, prepare" in said[0] and "--minutes" in said[0]
    assert said[1].startswith("\n1 problem:") and "Traceback" not in said[1] and "--tiny" in said[1]


# ------------------------------------------------------------------------------- GPUs that can't be used

DRIVER = "The NVIDIA driver on your system is too old (found version 12020). Please update\nmore"
GONE = "Found no NVIDIA driver on your system."
CASES = {
    "no CUDA build": ({"cuda": None}, ["built without CUDA", "install its CUDA build"]),
    "old driver": ({"said": DRIVER}, ["too old (found version 12020)", "update the driver"]),
    "no card": ({"said": GONE, "listed": []}, ["no CUDA GPU here", "--tiny"]),
    "no build and no card": ({"cuda": None, "said": "not compiled with CUDA", "listed": []}, ["no CUDA GPU here"]),
    "held": ({"free": 30e9}, ["another process holds 50.0 of the 80.0 GB of GPU X", "nvidia-smi"]),
    "too old": ({"capability": (6, 1)}, ["compute capability 6.1, and 7.0 is needed"]),
    "both": ({"capability": (6, 1), "free": 30e9}, ["capability 6.1", "another process holds"]),
}


def fake_gpu(monkeypatch, cuda="13.0", said="", listed=("GPU X, 580.1",), capability=(9, 0), free=79e9):
    import torch

    def start():
        if said:
            raise RuntimeError(said)

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not said)
    monkeypatch.setattr(torch.cuda, "init", start)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU X")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80e9))
    monkeypatch.setattr(machine, "list_gpus", lambda: list(listed))


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_that_cannot_be_used_is_told_with_what_to_do(case, monkeypatch):
    faked, told = CASES[case]
    fake_gpu(monkeypatch, **faked)
    with pytest.raises(UserError) as error:
        machine.check_gpu()
    assert str(error.value).count("\n") == len(error.value.problems) - 1 == (case == "both")
    assert all(part in str(error.value) for part in told)


def test_a_free_gpu_is_used(monkeypatch):
    fake_gpu(monkeypatch)
    machine.check_gpu()
