"""Training on a tiny random Llama in real 4-bit: what is computed, what is written, what is refused."""

import json
import re
import shutil

import pytest
import torch
from conftest import QUICK, rag, sample_rows, train

from qlora.console import UserError
from qlora.model import base_model
from qlora.model.adapter import read_adapter
from qlora.model.lora import Lora, add_lora
from qlora.prompt import IGNORED
from qlora.training import trainer
from qlora.training.examples import collate, make_example

FILES = {
    "adapter_model.safetensors",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "prompt.json",
    "run.json",
    "metrics.jsonl",
    "data_report.json",
    "loss.png",
    "README.md",
}


@pytest.fixture
def model(tiny_base):
    loaded = add_lora(base_model.load_base_model(str(tiny_base), training=True), Lora(4, 8), seed=0)
    torch.manual_seed(0)
    for name, weight in loaded.named_parameters():
        if "lora_B" in name:  # starts at zero, where half of the gradients vanish
            torch.nn.init.normal_(weight, std=0.05)
    return loaded.train()


def examples():
    prompts = [list(range(10, 10 + n)) for n in (5, 12, 9)]
    responses = [[50, 51, 2], [60, 2], [70, 71, 72, 73, 2]]
    return [make_example(p + r, [IGNORED] * len(p) + r) for p, r in zip(prompts, responses, strict=True)]


def test_loss_equals_the_plain_recipe_without_padding(model):
    rows = examples()
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row.input_ids.tolist()]), torch.tensor([row.labels.tolist()])
        trained = int((labels != IGNORED).sum())
        total += model(input_ids=ids, labels=labels).loss.item() * trained
        count += trained
    assert trainer.response_loss(model, collate(rows)).item() == pytest.approx(total / count, rel=2e-2)


def test_rows_are_scored_by_loss_ending_and_odds_of_refusing(model):
    """Against transformers' own forward pass, row by row; the last row is what the model writes, but for refusing."""
    refusal = [60, 2]
    rows = examples()
    prompt = list(range(20, 30))
    likeliest = model(input_ids=torch.tensor([prompt])).logits[0, -1].topk(2).indices.tolist()
    refusal[0], written = likeliest[0], likeliest[1:]
    written += model(input_ids=torch.tensor([prompt + written])).logits[0, -1:].argmax(dim=-1).tolist()
    for response in (refusal, written):
        rows.append(make_example(prompt + response, [IGNORED] * len(prompt) + response))
    batch = collate(rows)
    with torch.no_grad():
        scores = trainer.score_rows(trainer.label_logits(model, batch), batch["labels"], refusal)
        assert scores[:, -2].tolist() == [0, 0, 0, 1, 0] and scores[:, -1].tolist()[::4] == [0, 1]
        for row, (loss, labels, ends, odds, refused, _) in zip(rows, scores.tolist(), strict=True):
            logits = model(input_ids=torch.tensor([row.input_ids.tolist()])).logits[0].float()
            trained = [n for n, label in enumerate(row.labels) if label != IGNORED]
            logs = logits.log_softmax(dim=-1)
            assert labels == len(trained) and refused == ([row.labels[n] for n in trained] == refusal)
            assert loss == pytest.approx(-sum(logs[n - 1, row.labels[n]].item() for n in trained), rel=2e-2)
            assert ends == pytest.approx(logs[-2, row.labels[-1]].exp().item(), rel=5e-2)
            first = logits[trained[0] - 1].tolist()
            assert odds == pytest.approx(first.pop(refusal[0]) - max(first), abs=0.05)


def test_when_to_refuse_is_fitted_on_held_out_rows_and_used_in_answering(tiny_base, tmp_path, collection, capsys):
    keys = "instruction", "context", "response", "source"
    rows = [(f"{n}?", f"House {n // 4} is red.", ["red", "I don't know."][n % 2], f"{n // 30}.md") for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in rows))
    words = "--base-model", tiny_base, "--dataset", tmp_path / "rows.jsonl", "--refusal-share", 1, *QUICK
    assert train(*words, "--output", tmp_path / "mine", "--max-steps", 4) == 0
    result = json.loads((tmp_path / "mine" / "run.json").read_text())["result"]
    lines = [json.loads(line) for line in (tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()]
    (best,) = (line for line in lines if "eval_loss" in line and line["step"] == result["best_step"])
    assert result["refusal_bias"] == best["eval_refusal_bias"] != 0
    assert result["eval_refusal_f1_after"] == best["eval_refusal_f1"]
    ask = "ask", "?", "--adapter", tmp_path / "mine", "--top-k", 1, "--max-new-tokens", 4, "--verbose"
    assert rag(*ask) == rag(*ask, "--refusal-bias", -2) == 0
    shown = re.findall(r"refusal bias +(\S+)", capsys.readouterr().err)
    assert [float(value) for value in shown] == [result["refusal_bias"], -2]


def test_gradients_are_the_same_before_and_after_an_evaluation(model):
    batch = collate(examples())

    def gradients():
        model.train().zero_grad()
        trainer.response_loss(model, batch).backward()
        return {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}

    before = gradients()
    with torch.no_grad():
        trainer.response_loss(model.eval(), batch)
    after = gradients()
    assert before and all(torch.equal(before[name], after[name]) for name in before)


def test_adapter_folder_has_exactly_these_files_and_says_what_happened(tiny_adapter, tiny_base):
    assert {path.name for path in tiny_adapter.iterdir()} == FILES
    run = json.loads((tiny_adapter / "run.json").read_text())
    assert run["base_model"]["name"] == str(tiny_base)
    assert run["quantisation"]["bnb_4bit_quant_type"] == "nf4" and run["quantisation"]["bnb_4bit_use_double_quant"]
    assert run["arguments"]["rank"] == 16 and run["arguments"]["seed"] == 0
    assert len(run["dataset"]["sha256_of_rows"]) == 64 and run["dataset"]["rows_kept"] == 78
    assert run["result"]["steps"] == 6 and run["result"]["useful_tokens_per_second"] > 0
    assert run["result"]["peak_memory"]["process_gb"] > 0
    assert run["versions"]["peft"]
    lines = [json.loads(line) for line in (tiny_adapter / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 7))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 6]


def test_loss_goes_down_on_real_rows(tiny_adapter):
    result = read_adapter(tiny_adapter).run["result"]
    assert result["eval_loss_after"] < 0.98 * result["eval_loss_before"]


def test_same_seed_same_adapter(tiny_adapter, tiny_base, rows_file, tmp_path):
    code = train("--base-model", tiny_base, "--dataset", rows_file, *QUICK, "--output", tmp_path / "again")
    assert code == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tiny_adapter / name).read_bytes()


def test_gradient_checkpointing_gives_the_same_losses(tiny_adapter, tiny_base, rows_file, tmp_path):
    words = ["--base-model", tiny_base, "--dataset", rows_file, *QUICK, "--output", tmp_path / "on"]
    assert train(*words, "--gradient-checkpointing", "on") == 0
    losses = [read_adapter(folder).run["result"]["eval_loss_after"] for folder in (tiny_adapter, tmp_path / "on")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_accumulation_gives_the_gradient_of_one_large_batch(tiny_base, tmp_path):
    """Two documents of eight rows: whichever is held out, one step takes all eight rows of the other.

    Without distractors, so that the rows of three contexts fill one batch.
    """
    documents = [
        [row for row in sample_rows() if row["source"] == name][:8] for name in ("ferry/freight.md", "pay/pay-bands.md")
    ]
    rows_file = tmp_path / "rows.jsonl"
    rows_file.write_text("".join(json.dumps(row) + "\n" for rows in documents for row in rows))
    norms = []
    for name, batch, accumulation in (("one", 8, 1), ("eight", 1, 8)):
        words = [
            "--base-model",
            tiny_base,
            "--dataset",
            rows_file,
            *QUICK,
            "--output",
            tmp_path / name,
            "--max-steps",
            1,
            "--distractors",
            0,
        ]
        assert train(*words, "--batch-size", batch, "--accumulation", accumulation) == 0
        first = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[1])
        norms.append(first["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


def test_plain_peft_and_transformers_load_it(tiny_adapter):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained(tiny_adapter)
    tokenizer = AutoTokenizer.from_pretrained(tiny_adapter)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    assert "[INST] <<SYS>>" in tokenizer.decode(ids["input_ids"][0])
    weights = [w for name, w in model.named_parameters() if "lora_B" in name]
    assert weights and all(w.abs().sum() > 0 for w in weights)
    assert model.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]


# ------------------------------------------------------------------------------- refused


def test_missing_incomplete_changed_and_foreign_adapters(tiny_adapter, tmp_path):
    with pytest.raises(UserError, match="not found"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not for other-model"):
        read_adapter(tiny_adapter, "other-model")
    copy = shutil.copytree(tiny_adapter, tmp_path / "copy")
    prompt = (copy / "prompt.json").read_text()
    (copy / "prompt.json").write_text(prompt.replace("numbered passages only", "anything"))
    with pytest.raises(UserError, match="changed after training"):
        read_adapter(copy)
    (copy / "prompt.json").write_text(prompt.replace('"schema": 1', '"schema": 99'))
    with pytest.raises(UserError, match="prompt schema 99"):
        read_adapter(copy)
    (copy / "run.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_adapter(copy)
    (copy / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="incomplete adapter"):
        read_adapter(copy)


def test_output_folder_is_only_replaced_when_told(tiny_adapter, tiny_base, rows_file, tmp_path, capsys):
    folder = shutil.copytree(tiny_adapter, tmp_path / "mine")
    words = ["--base-model", tiny_base, "--dataset", rows_file, *QUICK, "--output", folder, "--max-steps", 1]
    before = (folder / "adapter_model.safetensors").read_bytes()
    assert train(*words) == 2
    assert "already holds an adapter" in capsys.readouterr().err
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert train(*words, "--overwrite") == 0
    assert (folder / "adapter_model.safetensors").read_bytes() != before
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}
    (folder / "thesis.txt").write_text("mine")
    assert train(*words, "--overwrite") == 2
    assert "holds other files (thesis.txt)" in capsys.readouterr().err


def test_a_run_that_dies_leaves_the_old_adapter(tiny_adapter, tiny_base, rows_file, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_adapter, tmp_path / "mine")
    before = (folder / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(trainer, "token_losses", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("died")))
    words = [
        "--base-model",
        tiny_base,
        "--dataset",
        rows_file,
        *QUICK,
        "--output",
        folder,
        "--max-steps",
        1,
        "--overwrite",
    ]
    with pytest.raises(RuntimeError, match="died"):
        train(*words)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == FILES


def test_a_killed_first_run_leaves_no_half_made_base(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setenv("QLORA_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        base_model.prepare_embedded_model()
    assert list((tmp_path / "models").iterdir()) == []
