"""The benchmark's own arithmetic, and models of random weights; the speeds are measured by hand."""

import email
import json
import math
import re
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from html import unescape

import bitsandbytes
import pytest
from conftest import PROJECT, SAMPLE

import instruct_train_qlora
from benchmarks import (
    ablation,
    corpus,
    document_files,
    fill_and_search,
    forgetting,
    formats,
    ingest_speed,
    languages,
    plain_recipe,
    random_llama,
    train_speed,
    trials,
)
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


# ------------------------------------------------------------------------------- documents


def read_plainly(path) -> str:
    """The text of a file of any format, without the project's own readers."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = [archive.read(name).decode() for name in archive.namelist() if name.endswith(("xml", "xhtml"))]
    elif path.suffix == ".pdf":
        streams = re.findall(rb"stream\n(.*?)\nendstream", path.read_bytes(), re.DOTALL)
        shown = [text for packed in streams for text in re.findall(rb"\((.*)\) Tj", zlib.decompress(packed))]
        parts = [text.decode("cp1252") for text in shown]
    elif path.suffix == ".eml":
        message = email.message_from_bytes(path.read_bytes())
        parts = [part.get_payload(decode=True).decode() for part in message.walk() if not part.is_multipart()]
    else:
        parts = [path.read_text(encoding="utf-8")]
    return unescape(re.sub(r"<[^>]*>", " ", "\n".join(parts)))


@pytest.mark.parametrize("name", document_files.WRITERS)
def test_every_format_holds_all_facts(name, tmp_path):
    sections = formats.read_sections()
    assert len(sections) == 10 and sum(len(section.questions) for section in sections) == 30
    for section in sections[::3]:
        formats.write_format(name, [section], tmp_path / section.title)
        text = "\n".join(read_plainly(path) for path in (tmp_path / section.title).iterdir())
        for _, wanted in formats.facts_of(section):
            assert all(fill_and_search.holds(text, [one]) for one in wanted), wanted


def test_facts_stand_in_one_section():
    sections = formats.read_sections()
    texts = ["\n".join([*section.paragraphs, *map("\n".join, section.table)]) for section in sections]
    for number, section in enumerate(sections):
        for _, wanted in formats.facts_of(section):
            holding = [n for n, text in enumerate(texts) if all(fill_and_search.holds(text, [one]) for one in wanted)]
            assert holding == [number], wanted


def test_recall_counts_a_passage_that_holds_an_answer_or_is_of_the_document():
    from langchain_core.documents import Document

    holds = fill_and_search.holds
    assert holds("costs 19 EUR", ["19 eur"]) and not holds("costs 19 EUR", ["9 EUR"])
    assert holds("bed A4 12 cm", ["12 cm"]) and holds("bed A4 12 cm", ["A4"]) and not holds("bed A41", ["A4"])
    assert holds("救生衣由渡轮长检查。", ["渡轮长"]) and holds("the ﬁrst of\nMay", ["first of May"])
    asked = [{"question": "a", "answers": ["red"], "source": "a.md"}, {"question": "b", "answers": ["blue"]}]
    found = [
        [Document("a green flag", metadata={"source": "a.md"}), Document("a red flag", metadata={"source": "b.md"})],
        [Document("", metadata={"source": "c.md", "heading": "Blue"})],
    ]
    assert fill_and_search.score(asked, found) == {"answer@1": 0.5, "answer@3": 1.0, "source@1": 0.5, "source@3": 0.5}


def test_a_run_is_watched_with_its_children():
    child = "import time; held = bytearray(60_000_000); time.sleep(1.5)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{child}']); sys.exit('told')"
    run = fill_and_search.run_measured(["-c", code])
    assert run.code == 1 and "told" in run.report and run.seconds > 1.4
    assert 60e6 < run.peak_bytes < 200e6 and run.cpu_seconds > 0
    assert fill_and_search.run_measured(["-c", "import time; time.sleep(60)"], most_seconds=0.5).seconds < 10


@pytest.mark.parametrize("code", languages.LANGUAGES)
def test_questions_of_a_language_are_answered_by_one_document(code):
    documents = {path.name: path.read_text(encoding="utf-8") for path in (languages.FOLDER / code).iterdir()}
    questions = fill_and_search.read_questions(languages.FOLDER / f"{code}.jsonl")
    assert len(questions) == 20 and len(documents) == 8
    for row in questions:
        holding = [name for name, text in documents.items() if fill_and_search.holds(text, row["answers"])]
        assert holding == [row["source"]], row


def test_a_share_of_the_corpus_has_the_pages_of_the_questions(tmp_path):
    questions = fill_and_search.read_questions(corpus.QUESTIONS)
    assert Counter(row["source"].split("/")[0] for row in questions) == {"postgresql": 15, "python": 15}
    for source in [*(row["source"] for row in questions), *(f"python/more{n}.html" for n in range(70))]:
        page = tmp_path / "manuals" / source
        page.parent.mkdir(parents=True, exist_ok=True)
        page.touch()
    manuals = {name: tmp_path / "manuals" / name for name in ("postgresql", "python")}
    for count, least, most in ((None, 100, 100), (10, 30, 40)):
        corpus.copy_pages(tmp_path / f"of {count}", manuals, count)
        copied = {
            str(page.relative_to(tmp_path / f"of {count}")) for page in (tmp_path / f"of {count}").rglob("*.html")
        }
        assert least <= len(copied) <= most and copied >= {row["source"] for row in questions}


def test_the_mixed_folder_is_the_same_at_every_call(tmp_path):
    for name in ("first", "second"):
        ingest_speed.write_folder(tmp_path / name, 40)
    first, second = (
        {path.relative_to(tmp_path / name): read_plainly(path) for path in (tmp_path / name).rglob("*.*")}
        for name in ("first", "second")
    )
    kinds = Counter(path.suffix for path in first)
    assert {kind: kinds[kind] for kind in (".txt", ".pdf", ".docx")} == {".txt": 10, ".pdf": 6, ".docx": 5}
    assert first.keys() == second.keys() and all(first[path] == second[path] for path in first)


def test_large_files_have_their_size(tmp_path):
    ingest_speed.write_large_csv(tmp_path / "large.csv", 1)
    assert 1e6 <= (tmp_path / "large.csv").stat().st_size < 1.5e6
    ingest_speed.write_long_pdf(tmp_path / "long.pdf", 30)
    assert (tmp_path / "long.pdf").read_bytes().count(b"/Type /Page ") == 30


def test_speeds_are_compared_within_rounds():
    runs = [{"passages": 100, "seconds": 10.0, "cpu_seconds": cpu, "peak_gb": 1.0} for cpu in (8.0, 10.0, 12.0)]
    others = [run | {"cpu_seconds": 2 * run["cpu_seconds"]} for run in runs]
    text = ingest_speed.describe_speed({"files": 40, "speed": {"whole": {"this": runs, "other": others}}})
    assert "| whole | this | 100 | 10.0 | 100.0 | 1.00 |  |" in text and "2.00 (2.00 to 2.00)" in text
