"""The one prompt, for training and for answering: passages + instruction -> messages -> tokens, labels.

    tokens = encode_prompt(tokenizer, prompt.messages("Who signs it?", ["The director signs form B7."]))
    ids, labels = encode_row(tokenizer, messages, "The director. [1]")

The texts are in `Prompt`, which is saved with every adapter and read from there, so that questions
are asked in the words that the adapter was trained on. At the level of token ids the prompt is a
strict prefix of the training sequence, because the response is tokenised separately.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial

from qlora.console import fail
from qlora.words import clean

SCHEMA = 1
IGNORED = -100  # the label of tokens without loss, torch's cross_entropy default

# Llama-2's published chat format (llama/generation.py, chat_completion): BOS and EOS around every
# turn, the system message inside the first user turn.
LLAMA2_TEMPLATE = (
    "{% set rules = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
    "{% for message in (messages if rules is none else messages[1:]) %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and rules is not none %}{{ '<<SYS>>\n' + rules + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ message['content'].strip() + ' [/INST]' }}{% endif %}"
    "{% endfor %}"
)
EARLIER = [{"role": "user", "content": "EARLIER"}, {"role": "assistant", "content": "REPLY"}]
CONTROL_TEXT = r"<\|[^|<>\s]{1,40}\|>|\[/?INST\]|<</?SYS>>|###(?= *(?:Context|Instruction|Response):)"


@dataclass(frozen=True)
class Prompt:
    """Every text around passages and instruction; saved as prompt.json."""

    rules: str = (
        "Answer from the numbered passages only and cite them as [n]. "
        "If they do not hold the answer, say exactly: I don't know."
    )
    closed_book_rules: str = "Answer the question briefly. If you don't know the answer, say exactly: I don't know."
    context: str = "### Context:\n{context}\n\n### Instruction:\n{instruction}"
    closed_book_context: str = "### Instruction:\n{instruction}"
    refusal: str = "I don't know."
    chat_template: str = LLAMA2_TEMPLATE
    schema: int = SCHEMA
    rules_in_question: bool = False  # the template has no system role (Gemma): the first question begins with the rules

    @property
    def digest(self) -> str:
        """sha256 of all texts: prompts with equal digests are equal."""
        texts = asdict(self)
        if not self.rules_in_question:  # which earlier versions did not know
            del texts["rules_in_question"]
        return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()

    def messages(self, instruction: str, passages: Sequence[str] = (), history: Sequence[dict] = ()) -> list[dict]:
        """System, user and earlier turns as role/content messages; the texts must be harmless already."""
        if passages:
            user = self.context.format(context=number_passages(passages), instruction=instruction)
        else:
            user = self.closed_book_context.format(instruction=instruction)
        rules = self.rules if passages else self.closed_book_rules
        return self.place_rules([{"role": "system", "content": rules}, *history, {"role": "user", "content": user}])

    def place_rules(self, messages: list[dict]) -> list[dict]:
        """The messages, of which the first is the system's, as the chat template takes them."""
        rules, first, *others = messages
        if not self.rules_in_question:
            return messages
        return [{**first, "content": f"{rules['content']}\n\n{first['content']}"}, *others]


# The instruction of a row that is turned around: the response is an answer and, on the next line, its question.
WRITE = "Choose an answer in passage [1], and write the question that it answers."


def as_langchain(messages: list[dict]):
    """The messages as a LangChain prompt value."""
    from langchain_core.messages import convert_to_messages
    from langchain_core.prompt_values import ChatPromptValue

    return ChatPromptValue(messages=convert_to_messages(messages))


def word_rules(refusal: str, rules: str | None = None) -> dict[str, str]:
    """The texts of a prompt with another refusal, and other rules for answers from passages where they are given."""
    ours = {"rules": Prompt.rules, "closed_book_rules": Prompt.closed_book_rules}
    worded = {name: text.replace(Prompt.refusal, refusal) for name, text in ours.items()}
    return {**worded, **({"rules": rules} if rules else {}), "refusal": refusal}


def choose_prompt(tokenizer, texts: dict[str, str] | None = None) -> Prompt:
    """Our texts, or `texts` (`word_rules`), with the tokenizer's chat template, or Llama-2's when it has none.

    The tokenizer uses that template from here on, and ends a response with the token that ends a turn there. Raises
    UserError for a template that takes no question or loses one.
    """
    from jinja2 import TemplateError

    template = tokenizer.chat_template or LLAMA2_TEMPLATE
    tokenizer.chat_template, refused = template, ""
    for rules_in_question in (False, True):
        prompt = Prompt(chat_template=template, rules_in_question=rules_in_question, **texts or {})
        try:
            shown = show_prompt(tokenizer, prompt.messages("QUESTION", ["PASSAGE"], EARLIER))
        except TemplateError as error:
            refused = refused or str(error)
            continue
        places = [shown.find(text) for text in (prompt.rules, "EARLIER", "REPLY", "PASSAGE", "QUESTION")]
        if -1 not in places and places == sorted(places):
            tokenizer.eos_token = find_turn_end(tokenizer)
            return prompt
    what = f"the chat template {f'refuses our messages ({refused})' if refused else 'loses or moves messages'}"
    raise fail(what, "--base-model", "use a base model whose chat template keeps questions and answers in their order")


def find_turn_end(tokenizer) -> str:
    """The special token after an answer in the chat template (Gemma: <end_of_turn>), else the tokenizer's EOS."""
    messages = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "REPLY"}]
    rest = tokenizer.apply_chat_template(messages, tokenize=False).rpartition("REPLY")[2]
    added = (tokenizer.convert_ids_to_tokens(n) for n in tokenizer(rest, add_special_tokens=False).input_ids)
    special = {*tokenizer.all_special_tokens, *(str(token) for token in tokenizer.added_tokens_decoder.values())}
    return next((token for token in added if token in special), tokenizer.eos_token)


def number_passages(passages: Sequence[str]) -> str:
    return "\n\n".join(f"[{n}] {text}" for n, text in enumerate(passages, 1))


def encode_prompt(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids that end where the response begins; the template itself writes BOS, once."""
    return tokenizer(show_prompt(tokenizer, messages), add_special_tokens=False).input_ids


def show_prompt(tokenizer, messages: list[dict]) -> str:
    """The prompt as text. Models that can think aloud first (Qwen3, SmolLM3) do not."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def encode_row(tokenizer, messages: list[dict], response: str) -> tuple[list[int], list[int]]:
    """Token ids of prompt + response + EOS, and labels that are IGNORED up to the response."""
    prompt_ids = encode_prompt(tokenizer, messages)
    response_ids = [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return prompt_ids + response_ids, [IGNORED] * len(prompt_ids) + response_ids


# ------------------------------------------------------------------------------- untrusted text


def defuse(tokenizer, text: str) -> str:
    """The text with a space inside everything that a chat template reads as a special token.

    `<|im_end|>` becomes `< |im_end|>`: still readable, but no longer a token. NUL bytes and lone surrogates go, too.
    """
    pattern = control_pattern(tuple(sorted(tokenizer.all_special_tokens)))
    return pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", clean(text))


@cache
def control_pattern(special_tokens: tuple[str, ...]) -> re.Pattern:
    """Matches the tokenizer's special tokens, the marks of the common chat templates, and our own headings."""
    return re.compile("|".join([*map(re.escape, special_tokens), CONTROL_TEXT]))


# ------------------------------------------------------------------------------- fitting the window


def fill_prompt(
    tokenizer, prompt: Prompt, budget: int, question: str, passages: Sequence[str], history: Sequence[dict] = ()
) -> list[dict]:
    """The messages to ask with: made harmless, with passages shortened to `budget` tokens in all.

    History may take half of the budget; its oldest turns are dropped first. Raises UserError when the question alone
    fills the budget.
    """
    question = defuse(tokenizer, question)
    history = [{**turn, "content": defuse(tokenizer, turn["content"])} for turn in history]
    while history and len(encode_prompt(tokenizer, prompt.messages(question, (), history))) > budget // 2:
        history = history[2:]
    passages = [defuse(tokenizer, text) for text in passages]
    ask = partial(prompt.messages, question, history=history)
    messages = ask(fit_passages(tokenizer, ask, passages, budget))
    if len(encode_prompt(tokenizer, messages)) > budget:
        raise fail("the question fills the whole window", f"{budget} tokens", "ask a shorter question")
    return messages


def fit_passages(
    tokenizer,
    messages: Callable[[Sequence[str]], list[dict]],
    passages: Sequence[str],
    budget: int,
    last: int | None = None,
    keep: str = "",
) -> list[str]:
    """The passages, shortened from the end of the list on until the prompt has at most `budget` tokens.

    `messages` makes the prompt's messages of passages. Passage number `last` (the one with the answer) is
    shortened after all others, and around `keep`. Rules and instruction are never cut: the caller checks
    whether the rest fits. Passages shortened to nothing stay as empty strings, so that numbers keep their meaning.
    """
    passages = list(passages)

    def excess() -> int:
        return len(encode_prompt(tokenizer, messages(passages))) - budget

    order = sorted(range(len(passages)), key=lambda n: (n == last, -n))
    for n in order:
        while (over := excess()) > 0:
            shorter = shorten(tokenizer, passages[n], over, keep if n == last else "")
            if shorter == passages[n]:
                break
            passages[n] = shorter
    return passages


def shorten(tokenizer, text: str, excess: int, keep: str) -> str:
    """The text without about `excess` tokens: from the end, or from both ends around `keep`."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    left = len(offsets) - excess
    # Not by lower(): it changes the length of some letters, such as İ.
    kept = re.search(re.escape(keep), text, re.IGNORECASE) if keep else None
    if not kept:
        return text[: offsets[left][0]].rstrip() if left > 0 else ""
    inside = [n for n, (a, b) in enumerate(offsets) if a < kept.end() and b > kept.start()]
    margin = max(0, left - len(inside))
    first = min(max(0, inside[0] - margin // 2), max(0, len(offsets) - left))
    last = max(inside[-1], min(len(offsets), first + left) - 1)
    first = min(first, inside[0])
    return text[offsets[first][0] : offsets[last][1]].strip()
