"""Whole runs: killed and resumed, out of memory, broken, stopped early."""

import gc
import json
import random
import re
import signal
import subprocess
import time

import pytest
import torch
from conftest import losses, rag, start, train

from qlora import machine
from qlora.model import base_model
from qlora.training import export, trainer

WEIGHTS = "adapter_model.safetensors"


def kill_after(process: subprocess.Popen, folder, step: int, delay: float) -> None:
    """kill -9 a moment after the run has written what it measured at `step`."""
    deadline = time.time() + 120
    path = folder / "metrics.jsonl"
    while time.time() < deadline and process.poll() is None:
        if path.is_file() and f'"step": {step}, "loss"' in path.read_text():
            break
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture
def one_thread():
    """Here, and after a run that set as many threads as it began with."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.mark.alone
@pytest.mark.cpu
def test_a_run_killed_twice_gives_the_same_bytes(words, tmp_path, one_thread):
    """All in processes with two threads but for the end of it: here is one."""
    chance = random.Random()
    first, second = chance.randint(2, 3), chance.randint(5, 7)  # after step 1 its checkpoint may not be there yet
    delays = chance.uniform(0, 0.2), chance.uniform(0, 0.2)
    print(f"killed {delays} s after steps {first} and {second}")
    threads = {"OMP_NUM_THREADS": "2"}
    assert start([*words, "--output", tmp_path / "whole", "--save-steps", 1], tmp_path, **threads).wait() == 0
    cut = [*words, "--output", tmp_path / "cut", "--save-steps", 1]
    partial = tmp_path / ".cut.partial"
    kill_after(start(cut, tmp_path, **threads), partial, first, delays[0])
    assert list(partial.glob("checkpoint-*")) and not (tmp_path / "cut").exists()
    kill_after(start([*cut, "--resume"], tmp_path, **threads), partial, second, delays[1])
    assert train(*cut, "--resume") == 0
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 8
    assert losses(tmp_path / "cut", "eval_loss") == losses(tmp_path / "whole", "eval_loss")
    assert not partial.exists()


def test_an_unfinished_run_is_neither_lost_nor_mixed_up(words, tmp_path, capsys, monkeypatch):
    from qlora.model import adapter

    words = [*words, "--output", tmp_path / "mine", "--max-steps", 4, "--save-steps", 2, "--keep-checkpoints", 2]
    partial = tmp_path / ".mine.partial"
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "write_adapter", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train(*words) == 130
    assert {path.name for path in partial.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert train(*words) == 2
    assert "an unfinished run exists, at step 4" in capsys.readouterr().err
    assert train(*words, "--resume", "--learning-rate", 0.01, "--seed", 1) == 2
    err = capsys.readouterr().err
    assert "--learning-rate was 0.02, is 0.01" in err and "--seed was 0, is 1" in err and "sha256 of rows" in err
    manifest = json.loads((partial / "manifest.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    (partial / "manifest.json").write_text(json.dumps(manifest))
    assert train(*words, "--resume") == 0  # only the saving was left
    err = capsys.readouterr().err
    assert "torch was 1.0" in err and "continuing from step 4 of 4" in err
    assert len(losses(tmp_path / "mine")) == 4 and not partial.exists()


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_gradient(words, tmp_path, capsys, monkeypatch):
    words = [*words, "--dropout", 0, "--max-steps", 3]
    assert train(*words, "--output", tmp_path / "plain") == 0
    real = trainer.response_loss

    def scarce(model, inputs, items):
        if len(inputs["labels"]) > 1:
            real(model, inputs).backward()  # a half-done pass leaves a gradient
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(model, inputs, items)

    monkeypatch.setattr(trainer, "response_loss", scarce)
    assert train(*words, "--output", tmp_path / "scarce") == 0
    assert "Out of memory: 1 row at a time from here on, same effective batch" in capsys.readouterr().err
    assert losses(tmp_path / "scarce") == pytest.approx(losses(tmp_path / "plain"), rel=2e-3)
    norms = [losses(tmp_path / name, "grad_norm") for name in ("scarce", "plain")]
    assert norms[0] == pytest.approx(norms[1], rel=5e-2)  # bf16: an added half gradient would be 50 % off

    def scarce_scores(logits, labels, refusal):
        if len(labels) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return scores(logits, labels, refusal)

    scores = trainer.score_rows
    monkeypatch.setattr(trainer, "response_loss", real)
    monkeypatch.setattr(trainer, "score_rows", scarce_scores)
    assert train(*words, "--output", tmp_path / "scarce scores") == 0
    found = [json.loads((tmp_path / name / "run.json").read_text())["result"] for name in ("scarce scores", "plain")]
    assert found[0]["eval_loss_before"] == pytest.approx(found[1]["eval_loss_before"], rel=2e-3)
    monkeypatch.setattr(trainer, "score_rows", scores)

    def hopeless(model, inputs, items):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(trainer.ResponseTrainer, "evaluate", lambda self: {})
    monkeypatch.setattr(trainer, "response_loss", hopeless)
    assert train(*words, "--output", tmp_path / "hopeless") == 2
    assert "out of memory with 1 row at a time" in capsys.readouterr().err
    assert not (tmp_path / "hopeless").exists()


def test_a_run_that_ran_out_of_memory_goes_on_with_checkpointing(words, tmp_path, capsys, monkeypatch):
    words = [*words, "--output", tmp_path / "mine", "--max-steps", 4, "--save-steps", 1]
    real, steps = trainer.response_loss, []

    def scarce(model, inputs, items):
        steps.append(model.is_gradient_checkpointing)
        if len(steps) > 2 and not steps[-1]:
            raise MemoryError
        return real(model, inputs, items)

    monkeypatch.setattr(trainer, "response_loss", scarce)
    assert train(*words, "--batch-size", 1) == 2
    assert "add --resume --gradient-checkpointing on" in capsys.readouterr().err
    assert train(*words, "--batch-size", 1, "--resume", "--gradient-checkpointing", "on") == 0
    assert re.search("continuing from step [1-3] of 4", capsys.readouterr().err)
    assert len(losses(tmp_path / "mine")) == 4 and steps[-1]


BROKEN = {
    "the loss is nan at step 2": lambda loss, step: loss * (float("nan") if step == 2 else 1),
    "the gradient is zero at step 1": lambda loss, step: loss * 0,
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_run_saves_no_adapter(message, words, tmp_path, capsys, monkeypatch):
    real, calls = trainer.response_loss, []

    def spoil(*given):
        calls.append(0)
        return BROKEN[message](real(*given), (len(calls) + 1) // 2)

    monkeypatch.setattr(trainer, "response_loss", spoil)
    assert train(*words, "--output", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert f"{message}; no adapter was saved" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_learn_to_stop_is_not_saved(words, tmp_path, capsys, monkeypatch):
    """EOS, the last label of every row, is trained away: nothing else looks wrong."""

    def without_end(model, inputs, items):
        losses = trainer.token_losses(trainer.label_logits(model, inputs), inputs["labels"])
        return (losses[:, :-1].sum() - losses[:, -1].sum()) / items

    monkeypatch.setattr(trainer, "response_loss", without_end)
    assert train(*words, "--output", tmp_path / "out") == 1
    assert "the model does not stop after a response" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_adapter_that_never_changes_is_not_saved(words, tmp_path, capsys):
    assert train(*words, "--output", tmp_path / "out", "--max-steps", 1, "--warmup", 1) == 1  # the first rate is 0
    assert "the adapter did not change" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_early_stopping_keeps_the_best(words, tmp_path, capsys, monkeypatch):
    real, evaluated = trainer.ResponseTrainer.keep_best, []

    def worse(self, loss):
        evaluated.append(loss)
        real(self, [9.0, 5.0, 6.0, 7.0][len(evaluated) - 1])

    monkeypatch.setattr(trainer.ResponseTrainer, "keep_best", worse)
    assert train(*words, "--output", tmp_path / "out", "--eval-steps", 1, "--patience", 2) == 0
    assert "no lower loss in 2 evaluations" in capsys.readouterr().err
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["result"]["steps"], run["result"]["best_step"]) == (3, 1)
    assert run["result"]["eval_loss_after"] == pytest.approx(evaluated[1])


def test_lora_options_train_and_answer_in_bf16_and_unknown_layers_are_told(
    words, tmp_path, collection, capsys, monkeypatch
):
    monkeypatch.setattr(machine, "compute_dtype", lambda: torch.bfloat16)
    short = [*words, "--max-steps", 1, "--output", tmp_path / "out"]
    assert train(*short, "--target-modules", "q_proj", "v_proj", "--rslora", "--dora", "--neftune", 5) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"] and config["use_rslora"] and config["use_dora"]
    assert rag("ask", "?", "--adapter", tmp_path / "out", "--max-new-tokens", 4) == 0
    assert train(*short, "--overwrite", "--target-modules", "query") == 2
    assert "no layer is called that" in capsys.readouterr().err


def test_dry_run_tells_and_writes_the_report_and_nothing_else(words, tmp_path, capsys):
    assert train(*words, "--output", tmp_path / "out", "--dry-run", "--filter", "category!=unanswerable") == 0
    err = capsys.readouterr().err
    assert "category not selected" in err and "[2/4]" not in err
    report = json.loads((tmp_path / "out.data_report.json").read_text())
    kept, dropped = report["rows"]["kept"], report["rows"]["dropped"]["category not selected"]
    assert kept + dropped["rows"] == report["rows"]["read"] == 30 and 1 <= len(dropped["examples"]) <= 3
    assert report["training"]["rows"] + report["held_out"]["rows"] == kept
    assert report["steps"] == 8 and 3 < report["rows_a_step"] <= 4 and report["estimate"]["seconds"] >= 0
    trained = report["example"].split("⟦")[1].split("⟧")[0]
    assert trained.endswith("</s>") and trained.removesuffix("</s>") in err
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "out.data_report.json"}


@pytest.mark.parametrize(("free", "recomputed"), [(64e9, False), (1e9, True)])
def test_activations_are_recomputed_where_memory_is_short_to_the_same_bytes(
    words, tmp_path, capsys, monkeypatch, free, recomputed
):
    monkeypatch.setattr(machine, "free_memory", lambda: free)
    short = [*words, "--max-steps", 2, "--output"]
    assert train(*short, tmp_path / "auto") == 0
    assert f"gradient checkpointing {'on' if recomputed else 'off'}" in capsys.readouterr().err
    run = json.loads((tmp_path / "auto" / "run.json").read_text())
    assert run["result"]["gradient_checkpointing"] is recomputed
    assert train(*short, tmp_path / "other", "--gradient-checkpointing", "off" if recomputed else "on") == 0
    assert (tmp_path / "auto" / WEIGHTS).read_bytes() == (tmp_path / "other" / WEIGHTS).read_bytes()


def test_a_merge_after_training_starts_without_the_trained_model(words, tmp_path, monkeypatch):
    from peft import PeftModel

    def load(source, **options):
        gc.disable()  # nothing is collected here that was not collected before
        alive.extend(value for value in gc.get_objects() if isinstance(value, PeftModel | trainer.ResponseTrainer))
        gc.enable()
        return base_model.load_base_model(source, **options)

    alive = []
    gc.collect()
    monkeypatch.setattr(export, "load_base_model", load)
    assert train(*words, "--max-steps", 1, "--output", tmp_path / "mine", "--merge", tmp_path / "merged") == 0
    assert (tmp_path / "merged").is_dir() and not alive


def test_a_finished_run_is_merged_without_training_again(words, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    words = [*words, "--output", tmp_path / "mine"]
    assert train(*words) == 0
    before = (tmp_path / "mine" / WEIGHTS).read_bytes()
    capsys.readouterr()
    assert train(*words, "--resume", "--max-steps", 9, "--learning-rate", 0.5) == 2
    err = capsys.readouterr().err
    assert "--max-steps was 8, is 9" in err and "--learning-rate was 0.02, is 0.5" in err
    assert train(*words, "--resume", "--merge", tmp_path / "merged") == 0
    err = capsys.readouterr().err
    assert "greedy answers to 8 held-out rows" in err and "[3/4]" not in err and "nothing is left to train" in err
    assert (tmp_path / "mine" / WEIGHTS).read_bytes() == before
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    assert train(*words, "--overwrite", "--max-steps", 1, "--merge", tmp_path / "merged") == 2  # before any training
    assert "not empty" in capsys.readouterr().err


def test_a_second_run_with_the_same_output_waits_for_nothing_and_harms_nothing(words, tmp_path, capsys):
    words = [*words, "--output", tmp_path / "mine", "--save-steps", 1]
    first = start(words, tmp_path)
    while not (tmp_path / ".mine.partial" / "metrics.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.01)
    for flags in ([], ["--overwrite"], ["--resume"]):
        code = train(*words, *flags)
        said = capsys.readouterr().err
        assert code == 2 and ("another process is writing there" in said or "add --resume to continue it" in said)
    assert "another process is writing there" in said
    assert first.wait() == 0
    assert len(losses(tmp_path / "mine")) == 8 and not (tmp_path / ".mine.lock").exists()
    start([*words, "--overwrite"], tmp_path).kill()
    assert train(*words, "--overwrite", "--max-steps", 1) == 0  # a killed process holds no claim


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_weights_that_would_be_split_are_refused(words, tmp_path, capsys, monkeypatch, name):
    """Their layers would take packed 4-bit bytes for a matrix."""
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    assert train(*words, "--output", tmp_path / "out") == 2
    assert f"{name} cannot split 4-bit weights here" in capsys.readouterr().err


def test_a_launcher_that_starts_one_process_only_is_told(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")  # what `accelerate launch --num_processes 2 --cpu` leaves
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert train(*words, "--output", tmp_path / "out") == 2
    assert "torchrun --nproc_per_node 2 instruct_train_qlora.py" in capsys.readouterr().err
