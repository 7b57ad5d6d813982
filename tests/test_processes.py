"""Training in several processes, with gloo on the CPU: the same as in one, killed, resumed, with other files."""

import re
import signal
import sys

import pytest
import torch
from conftest import PROJECT, losses, start, train
from safetensors.torch import load_file

pytestmark = pytest.mark.alone
LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
WEIGHTS = "adapter_model.safetensors"
SCRIPT = """
import os, sys
import instruct_train_qlora as script
from qlora.training import trainer
trainer.AT_ONCE = 64
if os.environ["RANK"] == "1":
    {in_second}
sys.exit(script.console.run(script.main))
"""
PLACE_IS_FREE = """
    import accelerate.accelerator
    def train(args, model, *others, real=script.train_model):
        assert not accelerate.accelerator.model_has_dtensor(model)  # which it asks on GPUs, before it makes DDP
        return real(args, model, *others)
    script.train_model = train
    script.load_rows = 0
"""
RAISE = "lambda *given: (_ for _ in ()).throw"
DIE_AT_STEP_5 = """
    def step(trainer, *args, real=trainer.ResponseTrainer.training_step):
        return os.kill(os.getpid(), 9) if trainer.state.global_step == 5 else real(trainer, *args)
    trainer.ResponseTrainer.training_step = step
"""


def train_in_two(words, folder, in_second: str = "pass") -> tuple[int, str]:
    """Exit code and output of the script in two processes; the second one runs a line of its own before."""
    (folder / "two.py").write_text(SCRIPT.format(in_second=in_second))
    made = start(words, folder, LAUNCHER, folder / "two.py", OMP_NUM_THREADS="1", PYTHONPATH=str(PROJECT))
    return made.wait(timeout=300), " ".join((folder / "log").read_text().split())


@pytest.mark.parametrize("more", [[], ["--shard", "--gradient-checkpointing", "on"]], ids=str)
def test_two_processes_give_the_losses_of_one(words, tmp_path, more):
    """With batches that the CPU would split if it were alone, and rows that only the first process can read."""
    words = [*words, "--dropout", 0, "--max-steps", 3, "--output"]
    assert train(*words, tmp_path / "one") == 0
    code, said = train_in_two([*words, tmp_path / "two", "--accumulation", 1, *more], tmp_path, PLACE_IS_FREE)
    assert code == 0, said
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=5e-3)
    assert losses(tmp_path / "two", "eval_loss") == pytest.approx(losses(tmp_path / "one", "eval_loss"), rel=5e-3)
    norms = [losses(tmp_path / name, "grad_norm") for name in ("one", "two")]
    assert norms[0] == pytest.approx(norms[1], rel=3e-2)
    assert said.count("[3/4] Training Process") == 1 and "3 steps of up to 4 rows" in said
    kept = re.search(r"each of 2 processes keeps (\d+)% of the base model", said)
    assert int(kept[1]) < 90 if more else kept is None  # embeddings and head are most of so small a model
    weights = [load_file(tmp_path / name / WEIGHTS) for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=2e-4), name


def test_a_killed_process_ends_the_run_which_goes_on_to_the_same_bytes(words, tmp_path, capsys):
    words = [*words, "--accumulation", 1, "--max-steps", 7, "--save-steps", 2, "--shard", "--output"]
    assert train_in_two([*words, tmp_path / "whole"], tmp_path)[0] == 0
    code, said = train_in_two([*words, tmp_path / "cut"], tmp_path, DIE_AT_STEP_5)
    assert code == 1 and f"Signal {signal.SIGKILL}" in said
    assert [path.name for path in (tmp_path / ".cut.partial").glob("checkpoint-*")] == ["checkpoint-4"]
    alone = [*words, tmp_path / "cut", "--resume"]
    alone.remove("--shard")
    assert train(*alone) == 2
    assert "processes was 2, is 1" in " ".join(capsys.readouterr().err.split())
    code, said = train_in_two([*words, tmp_path / "cut", "--resume"], tmp_path)
    assert code == 0 and "continuing from step 4 of 7" in said
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert train(*alone, "--merge", tmp_path / "merged") == 0  # what is finished needs no other processes


@pytest.mark.parametrize(
    ("in_second", "more", "told"),
    [
        ("script.fingerprint_model = lambda name: 'another'", [], "not the same as in the first process: base model"),
        ("script.jsonable = lambda given: {'seed': 1}", [], "not the same as in the first process"),
        ("pass", ["--filter", "category=nothing"], "no row is left after filtering"),
        (f"script.plan_run = {RAISE}(script.console.fail('a row does not fit', 'GPU 1', 'wait'))", [], "does not fit"),
        ("script.load_and_filter = lambda args: os._exit(3)", [], "another process of this run ended"),
        (f"script.load_whole = {RAISE}(MemoryError())", [], "out of memory"),
    ],
)
def test_a_mistake_of_one_process_ends_all_and_is_reported_once(words, tmp_path, in_second, more, told):
    code, said = train_in_two([*words, *more, "--output", tmp_path / "out"], tmp_path, in_second)
    assert code == 1 and said.count(told) == 1, said
    assert "RuntimeError" not in said  # of the others, which waited for it
    assert not (tmp_path / "out").exists()


def test_the_first_alone_publishes(words, tmp_path):
    words = [*words, "--max-steps", 1, "--output", tmp_path / "mine"]
    assert train(*words) == 0
    assert train_in_two([*words, "--resume", "--merge", tmp_path / "merged"], tmp_path, "script.export = 0")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "two.py", "log", "mine", "merged"}


def test_one_process_has_nobody_to_share_with(words, tmp_path, capsys):
    assert train(*words, "--shard", "--output", tmp_path / "out") == 2
    assert "start several: torchrun" in capsys.readouterr().err
