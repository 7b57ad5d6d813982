"""A chat: its turns, its follow-up questions, and its commands."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qlora.answering import judging
from qlora.answering.citations import content_words
from qlora.answering.conversation import Turn, indent, print_turn
from qlora.console import UserError, note, print_problems, say
from qlora.presets import EMBEDDED
from qlora.retrieval.documents import place
from qlora.words import WORD

COMMANDS = {
    "/sources": "show the passages behind the last answer",
    "/reset": "forget what was said",
    "/save FILE": "write the conversation as Markdown",
    "/quit": "end the chat, as an empty line or Ctrl-D does",
}
REMEMBERED = 3  # turns that the model sees, if the window holds them
# Words that refer back: the question cannot be searched without the one before it.
POINTING = re.compile(
    r"\b(its?|he|him|his|she|hers?|they|them|theirs?|this|that|these|those|there|then|ones?|same|former|latter|else)\b",
    re.IGNORECASE,
)
REWRITING = (
    {
        "role": "system",
        "content": "Rewrite the user's last question so that it can be understood without the conversation. "
        "Reply with the rewritten question only.",
    },
    {"role": "user", "content": "User: Who signs form B7?\nAssistant: The bosun.\nUser: And where does he keep it?"},
    {"role": "assistant", "content": "Where does the bosun keep form B7?"},
)
CONTINUING = re.compile(r"(and|or|but|so|then|what about|how about|also)\b", re.IGNORECASE)


@dataclass
class Session:
    """The turns of a chat, the oldest first; `complete` asks an instruct model, where there is one."""

    turns: list[Turn] = field(default_factory=list)
    complete: Callable[[list[dict]], str] | None = None
    keep: judging.Keep | None = None  # takes what is thought of an answer; None where the store keeps none

    def stand_alone(self, question: str) -> str:
        """The text to search for: the question, rewritten where it continues the last one or refers back to it.

        The model rewrites it. Where its text is not usable, the question is appended to the last one: both legs of the
        search find words of both questions.
        """
        is_short = len(question.split()) < 3 and len(WORD.findall(question)) < 6  # a Chinese question has no spaces
        follows = CONTINUING.match(question) or POINTING.search(question) or is_short
        if not self.turns or not follows:
            return question
        by_rule = f"{self.turns[-1].searched} {question}"
        return (self.complete and self.rewrite(question)) or by_rule

    def rewrite(self, question: str) -> str | None:
        """The model's question, if it refers back no more, keeps the words of this one, and adds only words said.

        Small models answer, repeat or invent instead.
        """
        said = f"User: {self.turns[-1].searched}\nAssistant: {self.turns[-1].answer.text}\nUser: {question}"
        written, _, rest = self.complete([*REWRITING, {"role": "user", "content": said}]).strip().partition("\n")
        words, kept = content_words(written), content_words(POINTING.sub("", CONTINUING.sub("", question, count=1)))
        faithful = kept < words <= content_words(said) and written.endswith("?")
        return written if faithful and not rest and not POINTING.search(written) else None

    def history(self) -> tuple[dict, ...]:
        """The last turns as messages, the oldest first."""
        messages = []
        for turn in self.turns[-REMEMBERED:]:
            messages += [{"role": "user", "content": turn.question}]
            messages += [{"role": "assistant", "content": turn.answer.text}]
        return tuple(messages)

    def obey(self, line: str) -> bool:
        """Runs a command; returns whether the session continues."""
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/sources":
            self.print_sources()
        elif command == "/reset":
            self.turns.clear()
            note("forgotten")
        elif command == "/save" and rest.strip():
            self.save(Path(rest.strip()).expanduser())
        elif command in judging.NAMES:
            self.judge(line)
        else:
            for name, meaning in (COMMANDS | (judging.COMMANDS if self.keep else {})).items():
                note(f"{name:<14} {meaning}")
        return True

    def judge(self, line: str) -> None:
        """Keeps what is thought of the last answer."""
        if not (self.keep and self.turns):
            note("there is no answer yet" if self.keep else "this store keeps no feedback; use PostgreSQL")
            return
        try:
            self.keep(judging.judge(line, self.turns[-1]))
            note("kept: python rag_qlora.py feedback")
        except UserError as error:
            print_problems(error.problems)

    def print_sources(self) -> None:
        for cited in self.turns[-1].answer.passages if self.turns else ():
            metadata = cited.document.metadata
            say(f"[{cited.n}] {metadata['score']:.3f}  {place(metadata)}")
            say(indent(cited.document.page_content))
        if not self.turns or not self.turns[-1].answer.passages:
            note("there are none yet")

    def save(self, path: Path) -> None:
        """Writes the conversation as Markdown; never replaces a file."""
        parts = [f"**{turn.question}**\n\n{turn.answer.text}\n" + describe_citations(turn) for turn in self.turns]
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write("\n".join(parts))
        except OSError as error:
            note(f"not saved: {error.strerror.lower()} - {path} - give another file")
        else:
            note(f"{len(self.turns)} turns saved in {path}")


def converse(session: Session, answer: Callable[[str, Session], Turn], take: Callable[[Turn], None]) -> None:
    """Answers turn after turn. Ctrl-C stops an answer; an empty line, Ctrl-D or /quit ends the chat."""
    note("Ask about your documents. /help lists the commands; an empty line or Ctrl-D ends.")
    while True:
        try:
            line = input("\n> ").strip()
            if not line or (line.startswith("/") and not session.obey(line)):
                return
            if line.startswith("/"):
                continue
            turn = answer(line, session)
        except EOFError:
            return
        except KeyboardInterrupt:
            note("stopped")
            continue
        except UserError as error:
            print_problems(error.problems)
            continue
        print_turn(turn, show_question=False)
        session.turns.append(turn)
        take(turn)


def describe_citations(turn: Turn) -> str:
    return "".join(f"\n* [{cited.n}] {place(cited.document.metadata)}" for cited in turn.answer.citations) + "\n"


def make_rewriter(base_model: str, prompt, generator) -> Callable[[list[dict]], str] | None:
    """complete(messages) -> text, by the base model; None where that has no chat template of its own.

    None for the embedded model, too: of 24 questions (tests/follow_ups.jsonl) it rewrote none usably.
    """
    from qlora.prompt import LLAMA2_TEMPLATE, as_langchain, defuse

    def complete(messages: list[dict]) -> str:
        harmless = [{**message, "content": defuse(generator.tokenizer, message["content"])} for message in messages]
        with generator.without_adapter():
            return generator.invoke(as_langchain(prompt.place_rules(harmless))).text

    return complete if prompt.chat_template != LLAMA2_TEMPLATE and base_model != EMBEDDED else None
