"""A base model is known by its weights: wherever it is, however its path is typed and its files are split."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import QUICK, rag, train
from safetensors.torch import load_file, save_file

from qlora.console import UserError
from qlora.model.adapter import read_adapter
from qlora.model.fingerprint import fingerprint_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def home(tiny_base, rows_file, tmp_path, monkeypatch):
    """A folder with a base model and rows, where an adapter was trained by relative paths."""
    home = tmp_path / "home"
    shutil.copytree(tiny_base, home / "my-llama")
    shutil.copy(rows_file, home / "rows.jsonl")
    monkeypatch.chdir(home)
    words = "--base-model", "./my-llama", "--dataset", "rows.jsonl", "--output", "adapters/mine"
    assert train(*words, *QUICK, "--max-steps", 1) == 0
    return home


def change_weights(base) -> None:
    """Other values in one tensor; names, sizes and times of the files stay."""
    path = base / WEIGHTS
    times, weights = path.stat().st_mtime_ns, load_file(path)
    weights["model.norm.weight"] *= 2
    save_file(weights, path, metadata={"format": "pt"})
    os.utime(path, ns=(times, times))


def base_of(folder, named=None) -> str:
    return os.path.relpath(read_adapter(Path(folder), named).base_model)


def test_an_adapter_answers_from_any_folder_and_wherever_it_is_copied(home, tmp_path, monkeypatch, collection, capsys):
    config = json.loads((home / "adapters/mine/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(home / "my-llama")  # for plain PEFT in any folder
    monkeypatch.chdir(tmp_path)
    assert base_of("home/adapters/mine") == "home/my-llama"
    assert base_of("home/adapters/mine", "home/my-llama") == base_of("home/adapters/mine", str(home / "my-llama"))
    answer = "ask", "--max-new-tokens", 2, "--adapter"
    assert rag(*answer, home / "adapters" / "mine", "Who?") == 0
    other = shutil.copytree(home, tmp_path / "other")
    home.rename(tmp_path / "gone")
    assert base_of(other / "adapters" / "mine") == "other/my-llama"
    assert rag(*answer, "other/adapters/mine", "Who?") == 0
    shutil.copytree(other / "adapters" / "mine", "alone")
    capsys.readouterr()
    assert rag(*answer, "alone", "Who?") == 2
    assert "the base model of the adapter, ./my-llama, is not here" in capsys.readouterr().err
    assert rag(*answer, "alone", "--base-model", "other/my-llama", "Who?") == 0


def test_another_model_of_the_same_shape_is_another_model(home, capsys):
    shutil.copytree("my-llama", "their-llama")
    change_weights(home / "their-llama")
    assert rag("ask", "--adapter", "adapters/mine", "--base-model", "their-llama", "Who?") == 2
    assert "was made for ./my-llama, not for their-llama" in capsys.readouterr().err
    change_weights(home / "my-llama")
    with pytest.raises(UserError, match="is not here or was changed"):
        read_adapter(home / "adapters" / "mine")


def test_a_run_resumes_with_its_paths_typed_otherwise(home, capsys, monkeypatch):
    from qlora.model import adapter

    words = "--output", "adapters/next", *QUICK, "--max-steps", 2, "--save-steps", 1
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "write_adapter", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train("--base-model", "./my-llama", "--dataset", "rows.jsonl", *words) == 130
    shutil.copytree("my-llama", "their-llama")
    change_weights(home / "their-llama")
    dataset = "--dataset", home / "rows.jsonl"
    assert train("--base-model", "their-llama", *dataset, *words, "--resume") == 2
    assert "base model was" in capsys.readouterr().err
    assert train("--base-model", home / "my-llama", *dataset, *words, "--resume") == 0


def test_a_fingerprint_is_that_of_the_weights(tiny_base, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert fingerprint_model(str(tmp_path / "shards")) == fingerprint_model(str(tiny_base))
    assert fingerprint_model("someone/nowhere") is None and fingerprint_model("./nowhere") is None
    damaged = shutil.copytree(tiny_base, tmp_path / "damaged")
    (damaged / WEIGHTS).write_bytes((tiny_base / WEIGHTS).read_bytes()[:-100_000])
    with pytest.raises(UserError, match=r"damaged base model .* is cut off"):
        fingerprint_model(str(damaged))
    (damaged / WEIGHTS).write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match="damaged base model"):
        fingerprint_model(str(damaged))
