"""Training a saved adapter further: what is taken over, what is refused, and what is kept of its rows."""

import hashlib
import json
import shutil

import pytest
import torch
from conftest import QUICK, rag, train
from safetensors.torch import load_file, save_file

from qlora.model import adapter, base_model
from qlora.model.lora import Lora, add_lora
from qlora.model.parent import grow, load_weights, read_parent
from qlora.writing import embedded_writer

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def parent(tiny_adapter, tmp_path):
    """A copy of a trained adapter."""
    folder = tmp_path / "parent"
    shutil.copytree(tiny_adapter, folder)
    return folder


@pytest.fixture
def words(tiny_base, rows_file):
    return ["--base-model", tiny_base, "--dataset", rows_file, *QUICK, "--learning-rate", 0.002]


def run_of(folder) -> dict:
    return json.loads((folder / "run.json").read_text())


def change(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("more", [[], ["--rank", 24]], ids=str)
def test_it_begins_where_the_adapter_ended(parent, words, tmp_path, more):
    """Also with a higher rank: the new part of B is zero, and the scale is kept."""
    change(parent / "run.json", result=run_of(parent)["result"] | {"refusal_bias": -1.5})
    assert train(*words, "--start-from", parent, "--output", tmp_path / "child", *more) == 0
    before, after = run_of(parent), run_of(tmp_path / "child")
    assert after["result"]["eval_loss_before"] == pytest.approx(before["result"]["eval_loss_after"], rel=1e-3)
    assert after["result"]["eval_loss_after"] < 1.01 * before["result"]["eval_loss_after"]
    arguments = after["arguments"]
    assert arguments["rank"] == (24 if more else 16) and arguments["alpha"] == 2 * arguments["rank"]
    assert sorted(arguments["target_modules"]) == sorted(
        json.loads((parent / "adapter_config.json").read_text())["target_modules"]
    )
    assert after["result"]["refusal_bias"] == -1.5  # six rows are too few to fit another
    [first] = after["parents"]
    assert first["sha256_of_weights"] != adapter.digest_weights(tmp_path / "child")
    assert first["adapter"] == str(parent) and first["sha256_of_rows"] == before["dataset"]["sha256_of_rows"]
    assert (tmp_path / "child" / "prompt.json").read_text() == (parent / "prompt.json").read_text()


def test_the_embedded_writer_is_known_by_its_name(parent, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedded_writer, "folder", lambda: tmp_path / "none")
    assert train(*words, "--start-from", "embedded", "--output", tmp_path / "child", "--rank", 0) == 2
    shown = capsys.readouterr().err
    assert "not trained yet" in shown and "--rank" in shown  # all mistakes at once
    assert rag("ask", "Who?", "--adapter", "embedded") == 2
    assert "not trained yet" in capsys.readouterr().err
    monkeypatch.setattr(embedded_writer, "folder", lambda: parent)
    assert train(*words, "--start-from", "embedded", "--output", tmp_path / "child", "--dry-run") == 0


def test_the_base_model_is_the_adapter_s_and_the_line_is_kept(parent, words, tmp_path):
    known = {"adapter": "older", "sha256_of_weights": "0"}
    change(parent / "run.json", parents=[known])
    assert train(*words[2:], "--start-from", parent, "--output", tmp_path / "child") == 0
    run = run_of(tmp_path / "child")
    assert run["base_model"]["fingerprint"] == run_of(parent)["base_model"]["fingerprint"]
    assert [one["adapter"] for one in run["parents"]] == [str(parent), "older"]


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True}], ids=str)
def test_a_higher_rank_is_the_same_function(tiny_base, tmp_path, options):
    ids = torch.tensor([[1, *range(20, 60)]])
    small = Lora(4, 8, targets=["q_proj", "down_proj"], **options)
    model = add_lora(base_model.load_base_model(str(tiny_base)), small, seed=1).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(tmp_path)
    parent = read_parent(str(tmp_path), str(tiny_base))
    larger = grow(parent.lora, 8)
    assert (larger.rank, parent.lora.rank, larger.dora, larger.rslora) == (8, 4, small.dora, small.rslora)
    grown = add_lora(base_model.load_base_model(str(tiny_base)), larger, seed=2).eval()
    load_weights(grown, parent)
    with torch.inference_mode():
        wanted, found = model(ids).logits, grown(ids).logits
        with model.disable_adapter():
            step = (wanted - model(ids).logits).abs().max()
    assert (found - wanted).abs().max() < 0.05 * step


def test_an_adapter_of_others_is_trained_further(parent, words, tmp_path, capsys):
    """In PEFT's format alone: no run.json, no prompt.json."""
    for path in parent.iterdir():
        if path.name not in (WEIGHTS, "adapter_config.json"):
            path.unlink()
    assert train(*words, "--start-from", parent, "--output", tmp_path / "child") == 0
    assert "goes on from" in capsys.readouterr().err
    assert run_of(tmp_path / "child")["parents"] == [{"adapter": str(parent), **digest(parent)}]
    assert train(*words, "--start-from", parent, "--output", tmp_path / "other", "--replay", 0.2) == 2
    assert "nothing says which rows" in capsys.readouterr().err


def digest(folder) -> dict[str, str]:
    from qlora.model.adapter import digest_weights

    return {"sha256_of_weights": digest_weights(folder)}


def test_flags_that_contradict_the_adapter_are_told_together(parent, words, tmp_path, capsys):
    flags = "--rank", 8, "--alpha", 7, "--target-modules", "q_proj", "--rslora", "--dora"
    assert train(*words, "--start-from", parent, "--output", tmp_path / "child", *flags) == 2
    said = capsys.readouterr().err
    for flag in ("--rank 8", "--alpha 7", "--target-modules ['q_proj']", "--rslora True", "--dora True"):
        assert flag in said
    assert "5 problems" in said and train(*words, "--start-from", parent, "--output", parent, "--overwrite") == 2
    assert "the output is the adapter to start from" in capsys.readouterr().err
    assert train(*words, "--replay", 0.2, "--output", tmp_path / "child") == 2
    assert "--replay without an adapter" in capsys.readouterr().err


BROKEN = {
    "no adapter there": lambda folder: (folder / "adapter_config.json").unlink(),
    "incomplete adapter": lambda folder: (folder / WEIGHTS).unlink(),
    "in a .bin file": lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
    "damaged adapter": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "the adapter is LOHA, not LoRA": lambda folder: change(folder / "adapter_config.json", peft_type="LOHA"),
    "the adapter has modules_to_save": lambda folder: change(
        folder / "adapter_config.json", modules_to_save=["lm_head"]
    ),
    "prompt.json was changed": lambda folder: change(folder / "prompt.json", refusal="No."),
    "prompt schema 9": lambda folder: change(folder / "prompt.json", schema=9),
}


@pytest.mark.parametrize("told", BROKEN)
def test_an_adapter_that_cannot_go_on_is_told_before_anything_is_loaded(
    parent, words, tmp_path, told, capsys, monkeypatch
):
    BROKEN[told](parent)
    monkeypatch.setattr(base_model, "load_base_model", lambda *given, **options: pytest.fail("loaded"))
    assert train(*words, "--start-from", parent, "--output", tmp_path / "child") == 2
    assert told in capsys.readouterr().err


def test_weights_that_do_not_fit_are_told(parent, words, tmp_path, capsys):
    weights = load_file(parent / WEIGHTS)
    name = next(iter(weights))
    for changed, told in (
        ({key: value for key, value in weights.items() if key != name}, "1 weights are not those of the model"),
        ({**weights, name: torch.zeros(3, 5)}, f"{name} is (3, 5)"),
    ):
        save_file(changed, parent / WEIGHTS)
        assert train(*words, "--start-from", parent, "--output", tmp_path / "child", "--overwrite") == 2
        assert told in capsys.readouterr().err
    (parent / WEIGHTS).write_bytes(b"no weights")
    assert train(*words, "--start-from", parent, "--output", tmp_path / "child", "--overwrite") == 2
    assert "damaged weights" in capsys.readouterr().err


def test_a_run_that_makes_the_adapter_worse_says_so(parent, words, tmp_path, capsys):
    assert train(*words, "--start-from", parent, "--output", tmp_path / "child", "--learning-rate", 0.01) in (0, 1)
    said = capsys.readouterr().err
    worse = "is better on these rows" in said
    result = run_of(tmp_path / "child")["result"] if (tmp_path / "child").exists() else None
    assert result is None or worse == (result["eval_loss_after"] > result["eval_loss_before"])


def test_another_base_model_is_refused(parent, words, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(words[1], other)
    weights = load_file(other / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    words = ["--base-model", other, *words[2:]]
    assert train(*words, "--start-from", parent, "--output", tmp_path / "child") == 2
    assert "the adapter was made for" in capsys.readouterr().err


def test_rows_of_the_adapter_are_mixed_in(parent, words, rows_file, tmp_path, capsys):
    lines = [json.loads(line) for line in rows_file.read_text().splitlines()]
    new = tmp_path / "new.jsonl"
    new.write_text(
        "".join(
            json.dumps(
                {
                    **row,
                    "source": f"new/{n % 4}.md",
                    "context": f"New {n}. " + row["context"],
                    "instruction": f"New {n}? {row['instruction']}",
                }
            )
            + "\n"
            for n, row in enumerate(lines[:24])
        )
    )
    words = [*words[:3], new, *words[4:], "--start-from", parent, "--output", tmp_path / "child", "--dry-run"]
    assert train(*words, "--replay", 0.25) == 0
    said = capsys.readouterr().err
    drawn = next(int(line.split()[0]) for line in said.splitlines() if line.endswith("are mixed in"))
    trained = json.loads((tmp_path / "child.data_report.json").read_text())["training"]["rows"]
    assert drawn / trained == pytest.approx(0.25, abs=0.03)
    moved = rows_file.with_name("moved.jsonl")
    rows_file.rename(moved)
    try:
        assert train(*words, "--replay", 0.25) == 2
        assert "dataset file not found" in capsys.readouterr().err
        rows_file.write_text("".join(json.dumps(row) + "\n" for row in lines[1:]))
        assert train(*words, "--replay", 0.25) == 2
        assert "were changed" in capsys.readouterr().err
    finally:
        moved.rename(rows_file)


def test_a_run_goes_on_with_the_adapter_that_it_began_with(parent, words, tmp_path, capsys, monkeypatch):
    from qlora.model import adapter

    words = [*words, "--start-from", parent, "--output", tmp_path / "child", "--save-steps", 1]
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "write_adapter", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train(*words) == 130
    weights = (parent / WEIGHTS).read_bytes()
    doubled = {name: weight * 2 for name, weight in load_file(parent / WEIGHTS).items()}
    save_file(doubled, parent / WEIGHTS)
    assert train(*words, "--resume") == 2
    assert "start from" in capsys.readouterr().err
    (parent / WEIGHTS).write_bytes(weights)
    assert train(*words, "--resume") == 0


def test_what_an_adapter_held_out_is_held_out_again(parent, words, tmp_path, rows_file):
    """Whatever else is there; its documents are no longer those that a split of the new rows would choose."""
    held = run_of(parent)["dataset"]["held_out_documents"]
    more = [{"instruction": f"What is {n}?", "response": f"{n}", "context": f"It is {n}."} for n in range(20)]
    lines = [json.dumps({**row, "source": f"new {n % 5}.md"}) + "\n" for n, row in enumerate(more)]
    (tmp_path / "more.jsonl").write_text(rows_file.read_text() + "".join(lines))
    words = ["--start-from", parent, "--output", tmp_path / "child", "--max-steps", 1, *words]
    assert train(*words, "--dataset", tmp_path / "more.jsonl") == 0
    assert run_of(tmp_path / "child")["dataset"]["held_out_documents"] == held
    added = [row for row in map(json.loads, rows_file.read_text().splitlines()) if short_digest(row["source"]) in held]
    (tmp_path / "added.jsonl").write_text("".join(json.dumps(row) + "\n" for row in added))
    (tmp_path / "only.jsonl").write_text("".join([*lines[:2], *map(lambda row: json.dumps(row) + "\n", added)]))
    assert train(*words, "--overwrite", "--dataset", tmp_path / "only.jsonl") == 0  # most is held out: it is split anew
    assert run_of(tmp_path / "child")["dataset"]["training_rows"] > 0
    assert train(*words, "--overwrite", "--added-rows", tmp_path / "added.jsonl") == 0
    assert not set(held) & set(run_of(tmp_path / "child")["dataset"]["held_out_documents"])


def short_digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:12]
