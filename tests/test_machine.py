"""What the machine computes with, and how many threads it takes beside other processes."""

import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import PROJECT

from qlora import machine


@pytest.fixture
def threads(monkeypatch):
    """Two threads on two cores, on a clock and beside a load that the test sets."""
    seen = {"now": 0.0, "others": 0.0}
    monkeypatch.setattr(machine, "list_cores", lambda: [0, 1])
    monkeypatch.setattr(machine.Threads, "look", lambda self: (seen["now"], seen["others"]))
    before = torch.get_num_threads()
    yield machine.Threads(2), seen
    torch.set_num_threads(before)


def test_other_processes_get_their_cores_and_give_them_back(threads):
    mine, seen = threads
    loads = [(10, 9.0, 1), (20, 18.8, 1), (30, 19.5, 2), (40, 19.6, 2), (50, 39.6, 1)]  # the last: both cores are busy
    for now, others, wanted in loads:
        seen |= {"now": now, "others": others}
        assert mine.adjust() == wanted == torch.get_num_threads()
    seen |= {"now": 51, "others": 39.6}
    assert mine.adjust() == 1  # a second is too short to tell


def test_there_is_never_less_than_one_thread_and_never_more_than_were_begun_with(threads):
    mine, seen = threads
    mine.cores = [0, 1, 2, 3]
    seen |= {"now": 10, "others": 0}
    assert mine.adjust() == 2
    seen |= {"now": 20, "others": 80}
    assert mine.adjust() == 1


@pytest.mark.alone
def test_the_load_of_a_real_neighbour_is_seen():
    if len(machine.list_cores()) < 2:
        pytest.skip("one core")
    mine = machine.Threads()
    start, before = mine.look()
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(2)
    end, after = mine.look()
    neighbour.kill()
    neighbour.wait()
    assert (after - before) / (end - start) > 0.7


@pytest.mark.cpu
def test_a_cpu_that_torch_takes_for_a_smaller_one_computes_in_fp32():
    code = "from qlora import machine; print(machine.compute_dtype(), machine.cpu_features(), machine.describe())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("torch.float32 ['AVX2'] cpu in float32, ") and "no AVX512-BF16" in done.stdout
