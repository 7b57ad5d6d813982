"""A writer on this machine: an adapter that was trained on turned rows writes drafts, and reads its questions."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter

from qlora.answering.chain import make_fill
from qlora.answering.generator import Generator
from qlora.answering.shared_beginnings import generate_groups
from qlora.prompt import WRITE, Prompt, encode_prompt
from qlora.words import MARK
from qlora.writing.checks import plain_answer
from qlora.writing.drafts import Draft

TEMPERATURE, TOP_P = 0.8, 0.95
MAX_TOKENS = 96
GREEDY = 100.0  # logits this many times as large leave sampling one choice


class LocalWriter:
    """Drafts about a passage, and answers to their questions, by one adapter."""

    at_once = 4  # half the time per passage of one at a time, with six drafts of each

    def __init__(self, generator: Generator, prompt: Prompt):
        update = {"temperature": TEMPERATURE, "top_p": TOP_P, "max_new_tokens": MAX_TOKENS, "first_bias": {}}
        self.generator, self.prompt, self.failures = generator, prompt, Counter()
        self.sampler = generator.model_copy(update=update)

    def write(self, texts: Sequence[str], count: int, seed: int) -> list[list[Draft]]:
        """`count` drafts about each passage, in one batch over one reading of each."""
        self.sampler.seed = seed
        tokenizer, fill = self.sampler.tokenizer, make_fill(self.prompt, self.sampler)
        groups = [[encode_prompt(tokenizer, fill(WRITE, [text], ()))] * count for text in texts]
        watch = QuestionWatch(newline_tokens(tokenizer), self.sampler.end_tokens())
        made = generate_groups(self.sampler, groups, [watch])
        said = tokenizer.batch_decode(made, skip_special_tokens=True)
        drafts = [split_draft(text, likelihood) for text, likelihood in zip(said, watch.likelihoods(), strict=True)]
        return [drafts[n : n + count] for n in range(0, len(drafts), count)]

    def read(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """The reader's answer for each (passage, question); the refusal where it finds none.

        Questions about one passage follow each other.
        """
        if not pairs:
            return []
        tokenizer, fill = self.generator.tokenizer, make_fill(self.prompt, self.generator)
        prompts = [(text, encode_prompt(tokenizer, fill(question, [text], ()))) for text, question in pairs]
        groups = [[prompt for _, prompt in group] for _, group in groupby(prompts, key=itemgetter(0))]
        said = tokenizer.batch_decode(generate_groups(self.generator, groups), skip_special_tokens=True)
        return [plain_answer(MARK.sub("", text)) for text in said]


def split_draft(text: str, likelihood: float | None = None) -> Draft:
    """The draft of a response: the answer is its first line, the question its second."""
    answer, _, question = text.strip().partition("\n")
    return Draft(" ".join(question.split()), plain_answer(answer), likelihood)


def newline_tokens(tokenizer) -> Callable[[int], bool]:
    """Whether a token ends a line, by its id."""
    known: dict[int, bool] = {}

    def ends_line(token: int) -> bool:
        if token not in known:
            known[token] = "\n" in tokenizer.decode([token])
        return known[token]

    return ends_line


class QuestionWatch:
    """A logits processor that makes questions greedy, and adds up their log-probability.

    Answers are sampled, so that drafts differ. Given its answer, the likeliest question is the best.
    """

    def __init__(self, ends_line: Callable[[int], bool], ends: Sequence[int]):
        self.ends_line, self.ends = ends_line, ends
        self.sums, self.counts, self.asking, self.ended, self.before = [], [], [], [], None

    def __call__(self, ids, logits):
        import torch

        if self.before is None:
            rows = len(ids)
            self.sums, self.counts, self.asking = [0.0] * rows, [0] * rows, [False] * rows
            self.ended = [False] * rows
        else:
            self.count_last(ids[:, -1])
        self.before = torch.log_softmax(logits.float(), dim=-1)
        scale = torch.tensor([GREEDY if asks else 1.0 for asks in self.asking], device=logits.device)
        return logits * scale[:, None].to(logits.dtype)

    def count_last(self, chosen) -> None:
        """Adds the last tokens of the rows that are in their question; those after its end are padding."""
        gained = self.before.gather(1, chosen[:, None])[:, 0].tolist()
        for row, token in enumerate(chosen.tolist()):
            if self.asking[row] and not self.ended[row]:
                self.sums[row] += gained[row]
                self.counts[row] += 1
                self.ended[row] = token in self.ends
            self.asking[row] = self.asking[row] or self.ends_line(token)

    def likelihoods(self) -> list[float | None]:
        """The mean log-probability per token of each question; None where there is none."""
        pairs = zip(self.sums, self.counts, strict=True)
        return [round(total / count, 4) if count else None for total, count in pairs]
