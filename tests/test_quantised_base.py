"""The base model in 4-bit, kept for the next start: the same bits, whole or absent."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import QUICK, rag, train
from safetensors.torch import load_file, save_file

from qlora.model import base_model, quantised_base


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of kept models, which takes small ones, too."""
    monkeypatch.setenv("QLORA_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(quantised_base, "SMALL", 0)
    return tmp_path / "quantised"


@pytest.fixture
def base(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "base")


def bits(model) -> dict[str, torch.Tensor]:
    """Every weight, and what dequantises it."""
    found = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            found |= {f"{name}.{key}": value for key, value in module.weight.quant_state.as_dict(packed=True).items()}
    return found


@pytest.mark.cpu
@pytest.mark.parametrize("training", [False, True])
def test_the_second_start_has_the_bits_of_the_first(base, kept, training, monkeypatch, capsys):
    first = base_model.load_base_model(str(base), training)
    (folder,) = kept.iterdir()
    assert "Kept in 4-bit for the next start" in capsys.readouterr().err
    shutil.move(base / "model.safetensors", base / "gone")  # what is loaded now is not quantised anew
    monkeypatch.setattr(quantised_base, "folder_for", lambda *given: folder)
    second = base_model.load_base_model(str(base), training)
    before, after = bits(first), bits(second)
    assert before.keys() == after.keys() and any("quant_state" in name for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {value.dtype for value in before.values()} == {value.dtype for value in after.values()}
    assert second.name_or_path == str(base) == second.config._name_or_path
    assert first.config._attn_implementation == second.config._attn_implementation
    ids = torch.tensor([[1, *range(20, 60)]])
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)


def test_a_changed_base_is_quantised_again_and_the_old_one_goes(base, kept):
    base_model.load_base_model(str(base))
    (old,) = kept.iterdir()
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    base_model.load_base_model(str(base))
    (new,) = kept.iterdir()
    assert new != old


def test_a_stopped_start_leaves_nothing_half_made(base, kept, monkeypatch):
    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantised_base, "drop_older", stop)
    with pytest.raises(KeyboardInterrupt):
        base_model.load_base_model(str(base))
    assert not list(kept.iterdir())


def test_without_disk_space_it_is_told_and_the_model_is_there(base, kept, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert base_model.load_base_model(str(base)) and not list(kept.iterdir())
    assert "is not kept" in capsys.readouterr().err


def test_nothing_is_kept_of_small_models_nor_with_no_cache(base, kept, rows_file, tmp_path, collection, monkeypatch):
    monkeypatch.setattr(quantised_base, "SMALL", 1e8)
    base_model.load_base_model(str(base))
    assert not kept.exists()
    monkeypatch.setattr(quantised_base, "SMALL", 0)
    words = ["--base-model", base, "--dataset", rows_file, *QUICK, "--output", tmp_path / "mine"]
    assert train(*words, "--no-cache") == 0
    assert rag("ask", "--adapter", tmp_path / "mine", "--no-cache", "Who signs form B7?") == 0
    assert not kept.exists()
