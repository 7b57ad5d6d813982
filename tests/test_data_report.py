"""The data report: what it counts and estimates, what it shows, and the examples it refuses."""

import json

import pytest
from conftest import SAMPLE

from qlora import machine
from qlora.console import UserError
from qlora.model.base_model import load_tokenizer
from qlora.model.lora import Lora
from qlora.prompt import IGNORED, Prompt, choose_prompt
from qlora.training import costs, data_report
from qlora.training.data_report import build_data_report, check_examples, print_report, write_report
from qlora.training.distractors import add_distractors
from qlora.training.examples import Example, collate, make_batches, make_example, tokenize_rows
from qlora.training.row_filters import Dropped
from qlora.training.rows import Row, load_rows

PLAN = {
    "longest": 2000,
    "seed": 0,
    "processes": 1,
    "steps": 10,
    "micro_batch": 2,
    "accumulation": 3,
    "checkpointing": False,
    "parameters": 1_000_000,
    "base_bytes": 600_000,
    "lora_parameters": 10_000,
    "layers": 4,
    "hidden_size": 100,
}
PART = {"documents": 1, "shortened": 0, "too long": 0}


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    loaded = load_tokenizer(str(tiny_base))
    choose_prompt(loaded)
    return loaded


def counts(**changes) -> dict:
    return {
        "read": 9,
        "kept": 8,
        "dropped": Dropped(),
        "leaked": Dropped(),
        "training": PART,
        "held out": PART,
    } | changes


def example(tokenizer, prompt: int = 10, response: int = 3) -> Example:
    """So many tokens of prompt, and of response with EOS."""
    trained = [60] * (response - 1) + [tokenizer.eos_token_id]
    return make_example([50] * prompt + trained, [IGNORED] * prompt + trained)


def report_on(tokenizer, examples, held_out=None, rate=1e9, plan=PLAN, **changes) -> dict:
    held_out = [example(tokenizer)] if held_out is None else held_out
    batches = make_batches(examples, plan["micro_batch"], plan["seed"])
    plan = {**plan, "batches": [collate(batch)["packed"].input_ids.numel() for batch in batches]}
    return build_data_report(tokenizer, examples, held_out, counts(**changes), plan, rate)


# ------------------------------------------------------------------------------- numbers


def test_percentiles_are_lengths_of_rows(tokenizer):
    examples = [example(tokenizer, prompt=100 + 2 * n, response=2) for n in range(1, 101)]
    report = report_on(tokenizer, examples)
    assert report["lengths"]["prompt"] == {"5%": 110, "25%": 150, "50%": 200, "75%": 250, "95%": 290, "max": 300}
    assert set(report["lengths"]["response"].values()) == {2}
    assert report["lengths"]["row"] == {"5%": 112, "25%": 152, "50%": 202, "75%": 252, "95%": 292, "max": 302}
    assert report["tokens_an_epoch"] == sum(range(104, 304, 2)) > 1.3 * report["tokens_computed_an_epoch"]
    assert report["labelled_share"] == round(200 / sum(range(104, 304, 2)), 4)


def test_rows_and_steps_are_counted(tokenizer):
    dropped, leaked = Dropped(), Dropped()
    for n in range(5):
        dropped.add("duplicate", Row(f"Question {n}?", "Ann"))
    leaked.add("question also held out", Row("Who?", "Bo"))
    cut = {"documents": 7, "shortened": 2, "too long": 1}
    examples = [example(tokenizer)] * 30
    report = report_on(tokenizer, examples, dropped=dropped, leaked=leaked, training=cut)
    assert report["rows"]["read"] == 9 and report["rows"]["kept"] == 8
    assert report["rows"]["dropped"]["duplicate"]["rows"] == 5
    assert [row["instruction"] for row in report["rows"]["dropped"]["duplicate"]["examples"]] == [
        "Question 0?",
        "Question 1?",
        "Question 2?",
    ]
    assert report["leakage"] == {
        "question also held out": {"rows": 1, "examples": [{"instruction": "Who?", "response": "Bo"}]}
    }
    assert report["training"] == {"rows": 30, "documents": 7, "tokens": 390, "shortened": 2, "too_long": 1}
    assert report["held_out"] == {"rows": 1, "documents": 1, "tokens": 13, "shortened": 0, "too_long": 0}
    assert (report["steps"], report["rows_a_step"], report["epochs"]) == (10, 6, 2.0)
    assert report_on(tokenizer, examples, plan={**PLAN, "processes": 2})["epochs"] == 4.0


def test_refusals_are_counted(tokenizer):
    prompt = Prompt()
    rows = [Row(f"Q{n}?", prompt.refusal if n else "Ann.", "Ann did.", "", f"{n}.md") for n in range(4)]
    examples, _ = tokenize_rows(tokenizer, prompt, rows, 500)
    report = report_on(tokenizer, examples)
    assert report["refused_share"] == 0.75
    assert "⟦Ann." in report["example"]
    assert f"⟦{prompt.refusal}" in report_on(tokenizer, examples[1:])["example"]


def test_time_grows_with_tokens_weights_and_recomputation(tokenizer):
    examples = [example(tokenizer)] * 4
    seconds = report_on(tokenizer, examples, rate=1e6)["estimate"]["seconds"]
    # 30 batches of two rows with the same prompt, which is computed once: 12 tokens and one of each.
    assert seconds == round(30 * 14 * 4 * 1e6 / (1e6 * costs.UTILISATION[machine.compute_dtype().itemsize]))
    recomputed = report_on(tokenizer, examples, rate=1e6, plan={**PLAN, "checkpointing": True})
    assert recomputed["estimate"]["seconds"] == pytest.approx(1.5 * seconds, abs=1)
    assert report_on(tokenizer, examples, rate=2e6)["estimate"]["seconds"] == pytest.approx(seconds / 2, abs=1)


def test_memory_is_that_of_the_largest_batch(tokenizer):
    examples = [example(tokenizer, prompt=997), *[example(tokenizer)] * 9]
    plan = {**PLAN, "base_bytes": 6 * 10**8, "lora_parameters": 10**7, "hidden_size": 1000, "layers": 10}
    parts = report_on(tokenizer, examples, plan=plan)["estimate"]["memory_gb"]
    assert (parts["base_model"], parts["lora"]) == (0.6, 0.16)
    kept = costs.ACTIVATION_BYTES_CPU[machine.compute_dtype().itemsize]
    assert parts["activations"] == round((1000 + 3) * 1000 * 10 * kept / 1e9, 2)
    assert parts["all"] == pytest.approx(sum(parts.values()) - parts["all"], abs=0.03)
    fewer = report_on(tokenizer, examples, plan={**plan, "checkpointing": True})["estimate"]["memory_gb"]
    assert 0 < fewer["activations"] < parts["activations"] / 5 and fewer["lora"] == parts["lora"]


def test_a_plan_fits_where_its_estimate_is_free(monkeypatch):
    plan = {**PLAN, "batches": [4000], "base_bytes": 10**9}
    needed = costs.estimate_memory(plan)["all"] * 1e9
    for free, fits in ((1.2 * needed, True), (0.8 * needed, False)):
        monkeypatch.setattr(machine, "free_memory", lambda free=free: free)
        assert costs.fits(plan) is fits


@pytest.mark.parametrize("longest, at_once", [(500, 1024), (2048, 2048)])
def test_the_cpu_computes_a_large_batch_in_parts(longest, at_once):
    plan = {**PLAN, "longest": longest}
    whole, part = ({**plan, "batches": [tokens]} for tokens in (4000, at_once))
    assert costs.estimate_memory(whole) == costs.estimate_memory(part)


def test_rate_of_this_machine():
    assert 1e8 < costs.measure_rate(seconds=0.05) < 1e16


def test_sizes_of_a_model_without_weights(tiny_base):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora.model.lora import add_lora

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_base))
        weights = base.num_parameters()
        model = add_lora(base, Lora(4, 8), seed=0)
        sizes = costs.describe_model(model)
    lora = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))  # two layers; q o, k v, gate up down
    in_4_bit = 2 * (2 * 64 * 64 + 64 * 32 + 2 * 64 * 128)  # q o, k, gate up; v and down stay in 16 bit
    assert (sizes["parameters"], sizes["lora_parameters"], sizes["layers"]) == (weights + lora, lora, 2)
    whole, shared = costs.count_base_bytes(model), costs.count_base_bytes(model, shares=4)
    assert whole == pytest.approx(0.516 * in_4_bit + 2 * (weights - in_4_bit), rel=1e-3)
    assert shared - whole == pytest.approx(0.5 * in_4_bit * (1 / 4 + 2 / 2 - 1), abs=2)  # two layers are whole: all
    widths = "hidden_size", "mlp_size", "query_size", "key_size", "vocabulary"
    assert [sizes[name] for name in widths] == [64, 128, 64, 32, base.config.vocab_size]


# ------------------------------------------------------------------------------- refused


def test_rows_without_labels_are_refused(tokenizer):
    silent = make_example([50, tokenizer.eos_token_id], [IGNORED, IGNORED])
    with pytest.raises(UserError, match="no token of the training rows is trained"):
        report_on(tokenizer, [silent, silent])
    with pytest.raises(UserError, match="no token of the held-out rows is trained"):
        report_on(tokenizer, [example(tokenizer)], [silent])
    check_examples(tokenizer, [], "held-out")


def test_the_first_row_that_does_not_end_in_a_trained_eos_is_named(tokenizer):
    good = example(tokenizer)
    cut = make_example(good.input_ids[:-1], good.labels[:-1])
    unlearned = make_example(good.input_ids, [*good.labels[:-1], IGNORED])
    changed = make_example([*good.input_ids[:-1], 60], good.labels)
    for bad in (cut, unlearned, changed):
        with pytest.raises(UserError, match="training row 3 does not end in a trained EOS") as error:
            report_on(tokenizer, [good, good, bad, cut])
        assert "'</s>'" in str(error.value) and "check that the tokenizer belongs to the base model" in str(error.value)


# ------------------------------------------------------------------------------- shown


@pytest.fixture(scope="module")
def real(tokenizer):
    """A report on real rows with distractors, and its examples."""
    rows = add_distractors(load_rows(str(SAMPLE / "train.jsonl"))[:20], 1, 1.0, Prompt(), 0)
    examples, _ = tokenize_rows(tokenizer, Prompt(), rows, 1000)
    return report_on(tokenizer, examples), examples


def test_the_coloured_part_is_exactly_what_is_trained(tokenizer, real):
    report, examples = real
    chosen = data_report.choose_example(tokenizer, examples)
    shown = data_report.color_trained(report["example"])
    green = "".join(shown.plain[span.start : span.end] for span in shown.spans if "green" in str(span.style))
    assert green == tokenizer.decode([label for label in chosen.labels if label != IGNORED])
    assert green.endswith("]</s>")
    assert shown.plain == tokenizer.decode(chosen.input_ids)
    assert report["example"].count("⟦") == 1 and report["example"].endswith("⟧")


def test_marks_and_terminal_commands_of_the_rows_do_no_harm(tokenizer):
    row = Row("Is ⟦this⟧ \x1b[31mred?", "It is ⟦so⟧.")
    report = report_on(tokenizer, tokenize_rows(tokenizer, Prompt(), [row], 500)[0])
    shown = data_report.color_trained(report["example"])
    assert "\x1b" not in shown.plain and "Is [[this]]" in shown.plain
    assert [shown.plain[span.start : span.end] for span in shown.spans] == ["It is [[so]].</s>"]


def test_the_report_is_json_and_goes_to_stderr(real, tmp_path, capsys):
    report, _ = real
    leaked = {"question also held out": {"rows": 2, "examples": [{"instruction": "[bold]Who?", "response": "Ann"}]}}
    report = {**report, "leakage": leaked, "training": report["training"] | {"shortened": 3, "too_long": 4}}
    write_report(tmp_path / "report.json", report)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report
    print_report(report)
    captured = capsys.readouterr()
    assert captured.out == "" and "⟦" not in captured.err
    for text in (
        "2 dropped: question also held out",
        "[bold]Who? -> Ann",
        f"10 steps of {report['rows_a_step']:g} rows = {report['epochs']} epochs",
        f"of which {report['tokens_computed_an_epoch']:,} are computed",
        "### Context:\n[1] ",
        f"{report['estimate']['memory_gb']['all']} GB",
    ):
        assert text in captured.err
    table = [line.split() for line in captured.err.splitlines()]
    assert ["tokens", "5%", "25%", "50%", "75%", "95%", "max"] in table
    assert ["prompt", *map(str, report["lengths"]["prompt"].values())] in table
