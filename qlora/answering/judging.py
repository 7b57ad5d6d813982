"""What a person says about an answer, as a judgement: the same words in `chat` and after `ask --feedback`.

judge("/right The bosun", turn)     # Judgement(rating="bad", right_answer="The bosun", ...)
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace

from qlora.answering.conversation import Turn
from qlora.console import UserError, fail, note, print_problems
from qlora.retrieval.feedback import GOOD, Judgement

COMMANDS = {
    "/good": "the answer is right",
    "/bad": "the answer is wrong",
    "/right ANSWER": "what would have been right",
    "/none": "the documents do not say",
    "/passage N": "passage N is the one that answers",
}
NAMES = tuple(name.split()[0] for name in COMMANDS)
Keep = Callable[[Judgement], object]


def judge(line: str, turn: Turn) -> Judgement:
    """The judgement of a turn that a command makes. Raises UserError for one that is not complete."""
    command, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    made = Judgement(turn.searched, turn.answer.text, passages=describe_passages(turn))
    if command == "/good":
        return replace(made, rating=GOOD)
    if command == "/bad":
        return made
    if command == "/none":
        return replace(made, not_in_documents=True)
    if command == "/right" and rest:
        return replace(made, right_answer=rest)
    if command == "/passage" and rest.isdecimal() and 1 <= int(rest) <= len(made.passages):
        return replace(made, rating=GOOD, right_passage=made.passages[int(rest) - 1]["id"])
    shown = f"a number from 1 to {len(made.passages)}" if made.passages else "no passage was shown"
    fix = {"/right": "write /right ANSWER", "/passage": f"write /passage N: {shown}"}
    raise fail("not a judgement", line, fix.get(command, f"write one of {', '.join(COMMANDS)}"))


def describe_passages(turn: Turn) -> tuple[dict, ...]:
    """The passages of an answer as they are kept, by their numbers."""
    documents = [cited.document for cited in turn.answer.passages]
    return tuple({"id": d.id, "source": d.metadata["source"], "text": d.page_content} for d in documents)


def ask_judgement(turn: Turn, keep: Keep) -> None:
    """Asks at the terminal, until a judgement is kept or nothing is said."""
    note(f"Was that right? {', '.join(COMMANDS)}; Enter: no opinion")
    with contextlib.suppress(EOFError):  # Ctrl-D, or no terminal: no opinion
        while line := input().strip():  # without a prompt: it would go to stdout, among the JSON of --json
            try:
                keep(judge(line, turn))
                note("kept")
                return
            except UserError as error:
                print_problems(error.problems)
