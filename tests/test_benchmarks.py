"""The benchmark's own arithmetic, and models of random weights; the speeds are measured by hand."""

import json
import math
import subprocess
import sys

import bitsandbytes
import pytest
from conftest import PROJECT, SAMPLE

import instruct_train_qlora
from benchmarks import ablation, forgetting, plain_recipe, random_llama, train_speed, trials
from qlora.console import UserError
from qlora.prompt import Prompt, choose_prompt, encode_row
from qlora.training import distractors, examples
from qlora.training.distractors import add_distractors
from qlora.training.examples import make_batches, make_example, tokenize_rows
from qlora.training.rows import Row, load_rows
from qlora.words import answer_span


def a_run(rate: float, **changes) -> dict:
    run = {"useful_tokens_per_second": rate, "useful_tokens": 800, "rows": 8, "steps": 2}
    run |= {"peak_memory": {"process_gb": rate / 100}, "rows_with_equal_tokens": 8}
    return {**run, "layer_weights": 1e8, "matmul_gflops": 400.0, **changes}


def test_ratio_is_taken_within_rounds_whose_order_alternates(capsys):
    assert train_speed.order_of_round(1) == train_speed.order_of_round(0)[::-1] and train_speed.VARIANTS[0] == "plain"
    runs = {"plain": [a_run(100), a_run(50)], "ours": [a_run(400), a_run(250)], "checkpointed": [a_run(300), a_run(9)]}
    setup = plain_recipe.Setup("folder", "base", batch_size=4, rows=8)
    losses = {"before": 3.0, "plain": 2.0, "ours": 1.9, "checkpointed": 1.9}
    result = train_speed.summarise(setup, runs, losses)
    assert result["ours_over_plain"] == {"median": 4.5, "min": 4.0, "max": 5.0, "rounds": [4.0, 5.0]}
    assert result["ours_gflops"] == pytest.approx(325 * 4 * 1e8 / 1e9)
    assert result["variants"]["ours"]["examples_per_second"] == pytest.approx(3.25)
    assert json.loads(json.dumps(result))["variants"]["plain"]["peak_process_gb"] == 1.0
    train_speed.print_comparison(result)
    shown = capsys.readouterr().out
    assert "4.50 times" in shown and "4.00 .. 5.00; rounds: 2" in shown and "8 of 8" in shown
    assert max(map(len, shown.splitlines())) < 100


def test_runs_of_different_work_are_no_comparison():
    train_speed.check_same_work({"plain": [a_run(1)], "ours": [a_run(2, useful_tokens=805)]})
    for other in ({"useful_tokens": 820}, {"rows": 7}):
        with pytest.raises(UserError):
            train_speed.check_same_work({"plain": [a_run(1)], "ours": [a_run(2, **other)]})


@pytest.mark.parametrize("wanted", [12, 48, 64])  # 48 are left by no sample
def test_rows_are_chosen_so_that_the_split_leaves_about_as_many_as_asked_for(wanted):
    rows = load_rows(str(SAMPLE / "train.jsonl"))
    for given in (rows, list({row.context: row for row in rows}.values())):
        sample, trained = train_speed.choose_rows(given, wanted)
        training, held_out = plain_recipe.split_rows(sample)
        assert len(training) == trained and held_out and abs(trained - wanted) <= 2
    with pytest.raises(UserError):
        train_speed.choose_rows(rows, len(rows))


def test_rows_come_with_their_whole_contexts():
    rows = load_rows(str(SAMPLE / "train.jsonl"))
    for wanted in (12, 64):
        training, _ = plain_recipe.split_rows(train_speed.choose_rows(rows, wanted)[0])
        assert len({row.context for row in training}) < wanted / 3


def test_plain_text_has_the_prompt_of_ours(tiny_base):
    tokenizer = plain_recipe.base_model.load_tokenizer(str(tiny_base))
    messages = choose_prompt(tokenizer).messages("Who signs?", ["The director signs."])
    text = plain_recipe.as_plain_text(tokenizer, messages, "the director")
    ids, labels = encode_row(tokenizer, messages, text["completion"])
    trl = tokenizer(text["prompt"] + text["completion"] + tokenizer.eos_token).input_ids
    assert trl == ids
    table = [{"input_ids": ids, "labels": labels}, {"input_ids": ids, "labels": ids}]
    counted = plain_recipe.count_tokens(table, [(ids, labels)] * 2)
    assert counted == {"rows": 2, "rows_with_equal_tokens": 1, "useful_tokens": 2 * len(ids)}


@pytest.mark.parametrize("shape", ["tiny", "tied"])
def test_random_llama_is_made_in_4bit_as_the_loader_would_quantise_it(shape, tmp_path, monkeypatch):
    import torch

    from qlora.model import base_model

    monkeypatch.setitem(random_llama.SHAPES, "tied", random_llama.SHAPES["tiny"] | {"tie_word_embeddings": True})
    folder = tmp_path / shape
    folder.mkdir()
    random_llama.write_llama(folder, shape, ["the crew of the ferry", "the pilot boat"], "cpu")
    model = base_model.load_base_model(str(folder))
    attention, mlp = 2 * 64 * 64 + 64 * 32, 2 * 64 * 128  # q, o and k; gate and up: narrow models keep v and down
    assert sum(shape.numel() for shape in packed_shapes(model)) == 2 * (attention + mlp)
    packed = model.model.layers[0].self_attn.q_proj
    back = bitsandbytes.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state).float()
    assert back.std().item() == pytest.approx(random_llama.STD, rel=0.1)
    ids = torch.tensor([base_model.load_tokenizer(str(folder))("the ferry of the pilot").input_ids])
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss == pytest.approx(math.log(1000), rel=0.05)  # of 1000 tokens all are as likely
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied == (shape == "tied")


def packed_shapes(model):
    """The shapes of all matrices in 4-bit."""
    packed = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    return [module.weight.quant_state.shape for module in packed]


@pytest.mark.parametrize("script", ["train_speed", "gpu_check"])
def test_benchmarks_start_without_torch(script):
    code = f"import sys, benchmarks.{script}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


# ------------------------------------------------------------------------------- trials


def test_parts_of_the_recipe_are_taken_away(monkeypatch, tiny_base):
    from qlora.model import base_model, quantised_base
    from qlora.retrieval import documents
    from qlora.retrieval.passages import Splitting

    tokenizer = base_model.load_tokenizer(str(tiny_base))
    prompt = choose_prompt(tokenizer)
    rows = [row for row in load_rows(str(SAMPLE / "train.jsonl"))[:24] if row.category != "unanswerable"]

    def shape():
        return add_distractors(rows, 2, 1.0, prompt, 0)

    def count_answers(shaped) -> int:
        """Rows that still hold the answer, cut to 240 tokens."""
        shown, _ = tokenize_rows(tokenizer, prompt, shaped, 240)
        texts = [tokenizer.decode(e.prompt_ids).split("### Instruction")[0] for e in shown]
        return sum(answer_span(row.response) in text for row, text in zip(shaped, texts, strict=True))

    shaped = shape()
    kept = count_answers(shaped)
    monkeypatch.setattr(examples, "fit_passages", examples.fit_passages)
    ablation.cut_any_passage()
    assert count_answers(shaped) < kept

    assert all("[" in row.response for row in shaped)
    monkeypatch.setattr(distractors, "shape_row", distractors.shape_row)
    ablation.drop_citations()
    assert not any("[" in row.response for row in shape())

    monkeypatch.setattr(examples, "batch_groups", examples.batch_groups)
    rows = [make_example([n], [n], group=n // 5) for n in range(20)]
    ablation.scatter_rows()
    assert {len(batch) for batch in make_batches(rows, 4, 0)} == {4}

    monkeypatch.setattr(documents, "split_sections", documents.split_sections)
    ablation.drop_headings()
    path = SAMPLE / "documents" / "ferry" / "crew.md"
    passages = list(documents.load_passages(path, "crew.md", tokenizer, Splitting("fake", 256, 120, 24)))
    assert passages and not any("heading" in passage.metadata for passage in passages)

    monkeypatch.setattr(base_model, "SENSITIVE", [*base_model.SENSITIVE])
    assert len(packed_shapes(base_model.load_base_model(str(tiny_base)))) == 10
    ablation.quantize_all()
    assert len(packed_shapes(base_model.load_base_model(str(tiny_base)))) == 14

    import transformers

    monkeypatch.setattr(quantised_base, "folder_for", quantised_base.folder_for)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", transformers.AutoModelForCausalLM.from_pretrained
    )
    ablation.keep_16_bit()
    assert not packed_shapes(base_model.load_base_model(str(tiny_base)))


def test_a_part_that_nothing_calls_was_not_taken_away(monkeypatch):
    monkeypatch.setattr(distractors, "shape_row", distractors.shape_row)
    monkeypatch.setattr(ablation, "CALLED", {})
    monkeypatch.setattr(instruct_train_qlora, "main", lambda words: 0)
    with pytest.raises(UserError, match=r"nothing called qlora\.training\.distractors\.shape_row"):
        ablation.run_without("drop_citations", "instruct_train_qlora", [])
    rows = [Row("Who?", "Ann", "Ann did.")]
    monkeypatch.setattr(instruct_train_qlora, "main", lambda words: len(add_distractors(rows, 0, 1, Prompt(), 0)) - 1)
    assert ablation.run_without("drop_citations", "instruct_train_qlora", []) == 0
    monkeypatch.delattr(distractors, "shape_row")
    with pytest.raises(AttributeError):
        ablation.run_without("drop_citations", "instruct_train_qlora", [])


def test_forgetting_is_the_rise_of_the_loss_a_token(tiny_adapter, capsys):
    found = forgetting.compare([(10.0, 10), (60.0, 30)], [(12.0, 10), (65.0, 30)])
    assert (found["base"], found["tuned"], found["tokens"]) == (1.75, 1.925, 40)
    assert found["worse by"]["mean"] == pytest.approx(0.1)
    assert forgetting.main(["--adapter", str(tiny_adapter)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 40 and found["base"] != found["tuned"] and abs(found["worse by"]["mean"]) < 0.1


def test_a_trial_is_trained_evaluated_logged_and_not_run_again(collection, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "LOG", tmp_path / "runs.jsonl")
    monkeypatch.setattr(trials, "ADAPTERS", tmp_path / "adapters")
    data = trials.split_data("few", SAMPLE / "train.jsonl", trials.DOCUMENTS / "ferry", tmp_path)
    sources = [
        {json.loads(line)["source"] for line in path.read_text().splitlines()} for path in (data.rows, data.questions)
    ]
    assert not sources[0] & sources[1] and len(sources[0] | sources[1]) == 36
    for path in (data.rows, data.questions):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:: len(lines) // 5][:5]))
    flags = {"base-model": str(tiny_base), "max-steps": "1", "learning-rate": "0.02", "warmup": "0", "top-k": "1"}
    trial = trials.Trial(data, flags | {"eval-share": "0.5"}, seed=3)
    record = trials.run_trial(trial)
    assert set(record["cells"]) == {"tuned retrieved", "tuned oracle"} and record["questions"] == 5
    assert record["flags"] == trial.flags and record["seed"] == 3 and record["eval_loss"] > 0
    monkeypatch.setattr(trials, "run_script", None)
    assert trials.run_trial(trial) == record
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1


def test_tables_are_written_from_the_log(tmp_path, monkeypatch, capsys):
    def log(flags: dict, seed: int, f1: float, citations: float | None) -> str:
        data = trials.Data("sample", trials.SAMPLE / "train.jsonl", ablation.join_questions(), trials.DOCUMENTS)
        described = {"data": data.describe(), "flags": flags, "seed": seed, "without": ""}
        found = {"f1": f1, "refusal_f1": 0.5, "citation_precision": citations}
        cells = {"tuned retrieved": found, "tuned oracle": found | {"f1": f1 + 0.1}}
        record = {"key": trials.name_of(described), **described, "train_seconds": 300 + 60 * seed, "cells": cells}
        return json.dumps(record) + "\n"

    cases = [({}, 0, 0.6, 0.9), ({}, 1, 0.7, 0.8), ({"rank": "1"}, 0, 0.2, None), ({"rank": "1"}, 1, 0.4, 0.5)]
    monkeypatch.setattr(trials, "LOG", tmp_path / "runs.jsonl")
    trials.LOG.write_text("".join(log(*case) for case in cases))
    monkeypatch.setattr(trials, "run_script", None)
    monkeypatch.setattr(ablation, "PARTS", {"all": ({}, ""), "rank 1": ({"rank": "1"}, "")})
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- ablation -->\nold\n<!-- end of ablation -->\nafter\n")
    assert ablation.main(["--write", str(page)]) == 0
    before, _, _, _, *rows, _, after = page.read_text().splitlines()
    assert rows == [
        "| all | 0.65 (0.60, 0.70) | 0.75 | 0.50 | 0.85 | 5.5 |",
        "| rank 1 | 0.30 (0.20, 0.40) | 0.40 | 0.50 |  | 5.5 |",  # a seed cited nothing: there is no mean
    ]
    assert (before, after) == ("before", "after") and rows[0] in capsys.readouterr().out
