"""Rows as token ids, and the batches that they are trained in, epoch by epoch."""

import hashlib
import math
import random
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from qlora.console import fail
from qlora.prompt import IGNORED, Prompt, defuse, encode_row, fit_passages
from qlora.training.rows import Row
from qlora.words import answer_span

INT32 = "i"  # a list of Python integers takes five times the memory


@dataclass(frozen=True)
class Example:
    """A tokenised row: `labels` equals `input_ids` where there is loss and is -100 elsewhere.

    Both are arrays of INT32. Rows of one `group` have the same passages, or none.
    """

    input_ids: array
    labels: array
    group: int = 0

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the response."""
        return self.input_ids[: self.labels.count(IGNORED)].tolist()

    @property
    def response_ids(self) -> list[int]:
        """The trained tokens: the response with its EOS."""
        return self.input_ids[self.labels.count(IGNORED) :].tolist()


def make_example(input_ids: Sequence[int], labels: Sequence[int], group: int = 0) -> Example:
    return Example(array(INT32, input_ids), array(INT32, labels), group)


class Epochs:
    """The batches of all epochs by number. An epoch is drawn when its first batch is needed.

    `batches` are those of the first epoch; `draw(epoch)` gives those of any, the same ones each time. Only one epoch
    is in memory.
    """

    def __init__(self, batches: list[list[Example]], draw: Callable[[int], list[list[Example]]]):
        self.batches, self.draw = batches, draw
        self.epoch = self.start = 0  # of the batches in memory, and the number of the first of them

    def __getitem__(self, number: int) -> list[Example]:
        if number < self.start:
            self.epoch, self.start, self.batches = 0, 0, self.draw(0)
        while number >= self.start + len(self.batches):
            self.start += len(self.batches)
            self.epoch += 1
            self.batches = self.draw(self.epoch)
        return self.batches[number - self.start]


def tokenize_rows(
    tokenizer, prompt: Prompt, rows: Sequence[Row], max_length: int
) -> tuple[list[Example], dict[str, int]]:
    """Examples of at most `max_length` tokens, and the numbers of rows that were shortened or too long.

    Earlier turns are left out first, the oldest before others. Then passages are shortened, the one with the answer
    last and around it. A row whose instruction and response alone exceed `max_length` is left out.
    """
    examples = []
    counts = {"shortened": 0, "too long": 0}
    groups = {}
    for row in rows:
        group = groups.setdefault(row.passages, len(groups))
        instruction, response = defuse(tokenizer, row.instruction), defuse(tokenizer, row.response)
        history = [{**turn, "content": defuse(tokenizer, turn["content"])} for turn in row.history]
        passages = [defuse(tokenizer, text) for text in row.passages]
        input_ids, labels = encode_row(tokenizer, prompt.messages(instruction, passages, history), response)
        is_long = len(input_ids) > max_length
        while len(input_ids) > max_length and history:
            history = history[2:]
            input_ids, labels = encode_row(tokenizer, prompt.messages(instruction, passages, history), response)
        if len(input_ids) > max_length and passages:
            trained = sum(label >= 0 for label in labels)
            gold = row.passages.index(row.context) if row.context in row.passages else None
            budget = max_length - trained
            ask = partial(prompt.messages, instruction)
            passages = fit_passages(tokenizer, ask, passages, budget, last=gold, keep=answer_span(response))
            input_ids, labels = encode_row(tokenizer, prompt.messages(instruction, passages), response)
        counts["shortened"] += is_long and len(input_ids) <= max_length
        if len(input_ids) > max_length:
            counts["too long"] += 1
        else:
            examples.append(make_example(input_ids, labels, group))
    if not examples:
        raise fail("every row is too long", f"--max-length {max_length}", "raise --max-length")
    return examples, counts


def batch_groups(groups: Sequence[int], size: int, seed: int) -> list[list[int]]:
    """Row numbers in batches of at most `size` in random order; rows of a group stay together as far as they fit.

    `groups` are those of the rows.
    """
    members = defaultdict(list)
    for number, group in enumerate(groups):
        members[group].append(number)
    chance = random.Random(seed)
    parts = []
    for numbers in members.values():
        chance.shuffle(numbers)
        count = math.ceil(len(numbers) / size)  # of about equal length
        parts += [numbers[n::count] for n in range(count)]
    chance.shuffle(parts)
    batches = [[]]
    for part in parts:
        if len(batches[-1]) + len(part) > size:
            batches.append([])
        batches[-1] += part
    return batches


def make_batches(examples: Sequence[Example], size: int, seed: int) -> list[list[Example]]:
    """The rows in batches of up to `size`, in random order; rows with the same passages stay together."""
    numbers = batch_groups([example.group for example in examples], size, seed)
    return [[examples[n] for n in batch] for batch in numbers]


def collate(examples: Sequence[Example]) -> dict:
    """A batch padded on the left: (rows, longest) input_ids, attention_mask and labels, tensors of int64.

    And what the loss is computed from (`add_packed`).
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def pad(rows: list[array], value: int) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left")

    return add_packed(
        {
            # The mask hides the padding, so any id serves there.
            "input_ids": pad([example.input_ids for example in examples], 0),
            "attention_mask": pad([array(INT32, [1]) * len(example.input_ids) for example in examples], 0),
            "labels": pad([example.labels for example in examples], IGNORED),
        }
    )


def add_packed(padded: dict) -> dict:
    """The padded batch, and `packed`: without padding, with common beginnings once; `targets`: the labels that are
    trained, row by row; and `places`: where in the packed batch the model predicts them.
    """
    from qlora.model import packing

    labels = padded["labels"]
    packed = packing.pack(padded["input_ids"], padded["attention_mask"])
    # A token is predicted one position earlier.
    places = packed.index[:, :-1][labels[:, 1:] != IGNORED]
    return padded | {"packed": packed, "targets": labels[labels != IGNORED], "places": places}


def split_rows(inputs: dict, parts: int) -> list[dict]:
    """A collated batch in `parts` of about as many rows each, on the same device."""
    device, size = inputs["labels"].device, math.ceil(len(inputs["labels"]) / parts)
    padded = {name: inputs[name].cpu() for name in ("input_ids", "attention_mask", "labels")}
    found = []
    for at in range(0, len(padded["labels"]), size):
        part = add_packed({name: tensor[at : at + size] for name, tensor in padded.items()})
        found.append({name: value.to(device) for name, value in part.items()})
    return found


# ------------------------------------------------------------------------------- count


def unbatch(batches: Iterable[Sequence[Example]]) -> list[Example]:
    return list(chain.from_iterable(batches))


def count_tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.input_ids) for example in examples)


def count_labels(example: Example) -> int:
    """The number of trained tokens of the row."""
    return len(example.labels) - example.labels.count(IGNORED)


def digest_examples(examples: Sequence[Example]) -> str:
    """The sha256 of their tokens and labels, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{len(example.input_ids)} ".encode() + example.input_ids.tobytes() + example.labels.tobytes())
    return digest.hexdigest()
