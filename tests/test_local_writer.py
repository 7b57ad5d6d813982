"""A writer on this machine: drafts from one reading of the passage, and how likely their questions are."""

import pytest
import torch
from conftest import QUICK, sample_rows, train
from transformers import AutoModelForCausalLM

from qlora.answering.shared_beginnings import common_beginning, generate_groups
from qlora.model import base_model
from qlora.prompt import WRITE, choose_prompt, encode_prompt
from qlora.training.row_shapes import Row
from qlora.training.turned_rows import turn_around
from qlora.writing import local_writer
from qlora.writing.local_writer import LocalWriter, QuestionWatch, newline_tokens, split_draft

TEXT = "The ferry Wren sails at 7.40 from berth N2. Her skipper, Ida Marsh, closes the gate three minutes before."


@pytest.fixture(scope="module")
def writer(tiny_base) -> LocalWriter:
    """The tests' random model; its answers are as long as they may be."""
    from qlora.answering.generator import Generator

    tokenizer = base_model.load_tokenizer(str(tiny_base))
    prompt = choose_prompt(tokenizer)
    model = base_model.load_base_model(str(tiny_base))
    return LocalWriter(Generator(model=model, tokenizer=tokenizer, max_new_tokens=8), prompt)


def test_a_beginning_is_computed_once_and_gives_what_whole_prompts_give(writer, tiny_base):
    """The logits of four steps, of prompts of different lengths in groups of different sizes."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data *= 20  # a random model hardly looks at positions
    generator = writer.generator.model_copy(update={"model": model, "max_new_tokens": 4})
    ids = list(range(10, 90))
    groups = [[[*ids[:40], 3], [*ids[:40], 4, 5, 6]], [ids[20:80]], [ids[:9], ids[:5], [*ids[:7], 1, 2]]]
    assert [len(common_beginning(group)) for group in groups] == [40, 59, 4]
    seen: dict[str, list] = {"groups": [], "whole": []}

    def follow(name: str):
        def process(tokens, logits):
            seen[name].append(logits.float())
            forced = torch.full_like(logits, -torch.inf)
            forced[:, 20 + len(seen[name])] = 0
            return forced

        return process

    grouped = generate_groups(generator, groups, [follow("groups")])
    whole = generator.generate_ids([prompt for group in groups for prompt in group], [follow("whole")])
    assert grouped == whole == [[21, 22, 23, 24]] * 6
    for one, other in zip(seen["groups"], seen["whole"], strict=True):
        assert torch.allclose(one, other, atol=0.02)  # rounding is 1e-6, a position too far 0.3


def test_drafts_depend_on_the_seed(writer):
    once = writer.write([TEXT, TEXT + " She is 61."], 5, seed=3)
    assert writer.write([TEXT, TEXT + " She is 61."], 5, seed=3) == once
    assert writer.write([TEXT, TEXT + " She is 61."], 5, seed=4) != once
    assert [len(drafts) for drafts in once] == [5, 5]
    assert all(len({draft.answer for draft in drafts}) > 1 for drafts in once)


def test_the_likelihood_is_that_of_the_question_alone(writer):
    """Beside a plain forward pass over a response of two lines."""
    tokenizer, model = writer.sampler.tokenizer, writer.sampler.model
    prompt = encode_prompt(tokenizer, writer.prompt.messages(WRITE, [TEXT]))
    response = [*tokenizer("Ida Marsh\nWho closes it?", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids = torch.tensor([prompt + response])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits.float()
    logs = torch.log_softmax(logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    ends_line = newline_tokens(tokenizer)
    first = len(prompt) + next(n for n, token in enumerate(response) if ends_line(token)) + 1
    wanted = logs[first - 1 :].mean().item()
    watch = QuestionWatch(ends_line, [tokenizer.eos_token_id])
    for end in range(len(prompt), len(prompt) + len(response) + 1):
        scaled = watch(ids[:, :end], logits[:, end - 1])
        is_asking = end >= first
        assert torch.equal(scaled, logits[:, end - 1] * (local_writer.GREEDY if is_asking else 1))
    assert watch.likelihoods() == [pytest.approx(wanted, abs=1e-3)]


def test_a_response_is_an_answer_and_its_question():
    assert split_draft("Ida Marsh [1]\n Who  closes it?\nAnd more") == split_draft("Ida Marsh\nWho closes it? And more")
    assert split_draft("Ida Marsh").question == ""
    assert split_draft("").answer == ""


def test_rows_are_turned_around():
    rows = [
        Row("Who closes it?", "Ida  Marsh. [1]", TEXT, source="a.md"),
        Row("Who steers?", "I don't know.", TEXT),
        Row("Who steers?", "Ida Marsh"),
        Row("And then?", "Ida Marsh", TEXT, turns=(("Who?", "Ida"),)),
    ]
    (turned,) = turn_around(rows, "I don't know.")
    assert (turned.instruction, turned.response) == (WRITE, "Ida Marsh.\nWho closes it?")
    assert (turned.context, turned.passages, turned.source) == (TEXT, (TEXT,), "a.md")


def test_turned_rows_are_trained_and_measured_apart(tiny_base, rows_file, tmp_path, capsys):
    words = ("--base-model", tiny_base, "--dataset", rows_file, *QUICK, "--dry-run")
    assert train(*words, "--output", tmp_path / "plain") == 0
    plain = capsys.readouterr().err
    assert train(*words, "--writer", "--output", tmp_path / "writer") == 0
    both = capsys.readouterr().err
    held_out = [line for line in plain.splitlines() if "held out:" in line]
    assert held_out and all(line in both for line in held_out)  # the proof is about answers alone
    answered = [row for row in sample_rows() if row["category"] != "unanswerable"]
    assert len(answered) > 60 and "rows are also trained turned around" in both
