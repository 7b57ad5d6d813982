"""The shapes that rows have in the world, and rows of them.

    shape = recognise(["instruction", "input", "output"], {}, "rows.json")      # Alpaca's
    shape_rows(records, shape)                                                  # list[Row]

Known are our own columns, Alpaca, questions with answers, prompt and completion, SQuAD's files, and conversations
(`messages` of OpenAI, `conversations` of ShareGPT).
"""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from qlora.console import Problems, UserError, fail, shorten_text
from qlora.prompt import Prompt
from qlora.training.row_files import Record

COLUMNS = ("instruction", "response", "context", "category", "source")
REQUIRED = ("instruction", "response")
CONVERSATIONS = ("messages", "conversations", "conversation")
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model", "output"), "assistant")
# Our names -> the names of others, the likeliest first.
CONTEXT = {"context": ("context", "passage"), "category": ("category",), "source": ("source", "title", "document")}
SHAPES = {
    "Alpaca": {"instruction": ("instruction",), "response": ("output",), "context": ("input",)},
    "questions and answers": {"instruction": ("question",), "response": ("answer", "answers"), **CONTEXT},
    "prompt and completion": {"instruction": ("prompt",), "response": ("completion",), **CONTEXT},
}
# What a renderer shows as nothing: a response of these alone is empty.
INVISIBLE = re.compile("[\\s\u00ad\u180e\u200b-\u200f\u2060-\u2064\ufeff]*")
SEPARATORS = {"context": "\n\n"}  # of the entries of a list
SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One question with its right response; the model sees `passages`, and `context` holds the answer.

    `turns` are the earlier questions of the conversation with their answers.
    """

    instruction: str
    response: str
    context: str = ""
    category: str = ""
    source: str = ""
    passages: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def document(self) -> str:
        """The group of rows that is held out together: the document, else the context, else the first question."""
        return self.source or self.context or (self.turns[0][0] if self.turns else self.instruction)

    @property
    def subject(self) -> str:
        """The group of related documents: the folder of `source`, else the category."""
        return self.source.rpartition("/")[0] or self.category

    @property
    def history(self) -> list[dict[str, str]]:
        """The earlier turns as role/content messages."""
        roles = ("user", "assistant")
        return [{"role": role, "content": text} for turn in self.turns for role, text in zip(roles, turn, strict=True)]


@dataclass(frozen=True)
class Shape:
    """A shape's name (empty for our own), our column names -> those of the dataset, and the column of messages."""

    name: str
    columns: dict[str, str]
    messages: str = ""
    unused: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------- recognise


def recognise(present: Sequence[str], columns: dict[str, str], source: str) -> Shape:
    """The shape of rows with these columns; `columns` maps our names to the dataset's, and then nothing is guessed.

    Raises UserError, with the nearest names, for rows without an instruction or a response.
    """
    lower = {name.strip().lower(): name for name in reversed(present)}
    if columns or {*REQUIRED} <= lower.keys():
        return use(Shape("", map_columns(present, lower, columns, source)), present)
    optional = {name: lower[name] for name in COLUMNS[2:] if name in lower}
    for name in CONVERSATIONS:
        if name in lower:
            return use(Shape("conversations", optional, messages=lower[name]), present)
    for name, names in SHAPES.items():
        found = {ours: next((lower[one] for one in theirs if one in lower), "") for ours, theirs in names.items()}
        if all(found[ours] for ours in REQUIRED):
            return use(Shape(name, {**optional, **{ours: theirs for ours, theirs in found.items() if theirs}}), present)
    return use(Shape("", map_columns(present, lower, columns, source)), present)


def use(shape: Shape, present: Sequence[str]) -> Shape:
    """The shape, with the columns that it leaves unused."""
    used = {*shape.columns.values(), shape.messages}
    return Shape(shape.name, shape.columns, shape.messages, [name for name in present if name not in used])


def map_columns(present: Sequence[str], lower: dict[str, str], columns: dict[str, str], source: str) -> dict[str, str]:
    """Our column names -> the dataset's. An unknown name is a problem that names the nearest one."""
    problems = Problems()
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            problems.add(f"unknown column {ours}", "--columns", f"the names to map are {', '.join(COLUMNS)}")
        elif theirs not in present:
            problems.add(f"the dataset has no column {theirs}", source, suggest_column(theirs, present, ours))
    names = {name: columns.get(name) or lower.get(name) for name in COLUMNS}
    for name in REQUIRED:
        if not names[name]:
            problems.add(f"the dataset has no column {name}", source, suggest_column(name, present, name))
    problems.raise_if_any()
    return {ours: theirs for ours, theirs in names.items() if theirs}


def suggest_column(wanted: str, present: Sequence[str], ours: str) -> str:
    if "text" in present:
        return "rows of plain text have no question: give instruction and response in columns of their own"
    nearest = difflib.get_close_matches(wanted, present, n=1, cutoff=0.5)
    hint = f"--columns {ours}={nearest[0]}" if nearest else f"map one with --columns {ours}=NAME"
    return f"{hint} (it has {', '.join(present)})"


# ------------------------------------------------------------------------------- rows


def unfold(records: Sequence[Record]) -> list[Record]:
    """The records, with one per question instead of SQuAD's articles."""
    return [one for record in records for one in (unfold_article(record) if "paragraphs" in record.cells else [record])]


def unfold_article(record: Record) -> Iterator[Record]:
    """A record per question of an article of SQuAD's JSON; a question that the text does not answer is refused."""
    try:
        for paragraph in record.cells["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = [answer["text"] for answer in asked.get("answers", [])]
                cells = {"question": asked["question"], "answers": answers, "context": paragraph["context"]}
                yield Record({**cells, "title": record.cells.get("title", "")}, record.where)
    except (TypeError, KeyError, AttributeError) as error:
        raise fail(f"not an article of SQuAD ({error!r})", record.where, "compare it with SQuAD's files") from error


def shape_rows(records: Sequence[Record], shape: Shape, train_on: str = "last") -> list[Row]:
    """The rows of the records. Of a conversation the last answer is trained, or a row each with `train_on="all"`.

    Raises UserError that names every record (the first five) that has another shape, or is no conversation.
    """
    problems, rows = Problems(), []
    for record in records:
        try:
            rows += shape_conversation(record, shape, train_on) if shape.messages else [shape_columns(record, shape)]
        except UserError as error:
            problems.found.extend(error.problems)
        except RecursionError:
            problems.add("a cell is nested too deeply", record.where, "flatten it")
        if len(problems.found) >= SHOWN:
            break
    problems.raise_if_any()
    return rows


def shape_columns(record: Record, shape: Shape) -> Row:
    """The row of a record with a column for each part."""
    known = set(shape.columns.values())
    if not {shape.columns[ours] for ours in REQUIRED} <= record.cells.keys() and record.cells.keys() - known:
        raise other_shape(record)
    cells = {ours: record.cells.get(theirs) for ours, theirs in shape.columns.items()}
    if is_messages(cells["instruction"]) and is_messages(cells["response"]):
        return shape_turns([*cells["instruction"], *cells["response"]], record.where, {})[-1]
    texts = {ours: as_text(value, ours, record.where) for ours, value in cells.items()}
    if shape.name == "questions and answers" and has_no_answer(cells["response"]):
        texts["response"] = Prompt.refusal
    return Row(**{ours: tidy(ours, text) for ours, text in texts.items()})


def is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def has_no_answer(answers: object) -> bool:
    """Whether the answers are an empty list, as SQuAD has it for a question that the text does not answer."""
    return (answers.get("text") if isinstance(answers, dict) else answers) == []


def other_shape(record: Record) -> UserError:
    return fail(
        f"a row of another shape: it has {', '.join(record.cells)}", record.where, "give rows of one shape per dataset"
    )


def as_text(value: object, name: str, where: str) -> str:
    """The cell as text: a number as it is written, nothing as nothing, of a list its first entry (or all, if optional).

    Raises UserError for an object, unless it is SQuAD's answers.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, dict) and isinstance(value.get("text"), list | str):
        return as_text(value["text"], name, where)
    if isinstance(value, list | tuple):
        texts = [as_text(one, name, where) for one in value]
        return (texts or [""])[0] if name in REQUIRED else SEPARATORS.get(name, ", ").join(texts)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | bytes):
        raise fail(f"{name} is not text but {type(value).__name__}", where, f"give {name} as text")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def tidy(name: str, text: str) -> str:
    """The text without white space around it. A response keeps the indent of its first line, as code needs it.

    A single space is no indent, but was left over from a separator.
    """
    if INVISIBLE.fullmatch(text):
        return ""
    return re.sub(r"\A(\s*\n| (?=\S))", "", text).rstrip() if name == "response" else text.strip()


# ------------------------------------------------------------------------------- conversations


def shape_conversation(record: Record, shape: Shape, train_on: str) -> list[Row]:
    """The rows of a conversation: of its last answer, or of each."""
    messages = record.cells.get(shape.messages)
    if not isinstance(messages, list):
        raise other_shape(record)
    cells = {ours: record.cells.get(theirs) for ours, theirs in shape.columns.items()}
    texts = {ours: tidy(ours, as_text(value, ours, record.where)) for ours, value in cells.items()}
    rows = shape_turns(messages, record.where, texts)
    return rows if train_on == "all" else rows[-1:]


def shape_turns(messages: list, where: str, texts: dict[str, str]) -> list[Row]:
    """A row per answer, with the turns before it. The system message is left out: the prompt's rules stand there.

    Raises UserError for roles that are unknown or out of order, an empty turn, and a conversation that does not end
    with an answer.
    """
    turns = [read_message(message, where) for message in messages]
    turns = [turn for turn in turns if turn[0] != "system"]
    said = [role for role, _ in turns]
    if not said or said != ["user", "assistant"] * (len(said) // 2):
        if said[-1:] == ["user"] and said[:-1] == ["user", "assistant"] * (len(said) // 2):
            raise fail("the conversation ends with the user", where, "remove the last turn, or the row")
        order = shorten_text(", ".join(said)) or "nobody"
        raise fail(f"roles out of order ({order})", where, "let user and assistant take turns, the user first")
    if not all(text for _, text in turns):
        raise fail("an empty turn", where, "remove the row")
    pairs = [(turns[n][1], turns[n + 1][1]) for n in range(0, len(turns), 2)]
    return [Row(asked, answer, **texts, turns=tuple(pairs[:n])) for n, (asked, answer) in enumerate(pairs)]


def read_message(message: object, where: str) -> tuple[str, str]:
    """The role, as one of ROLES' values, and the text of a message of OpenAI or ShareGPT."""
    if not isinstance(message, dict):
        raise fail(f"a turn is not an object but {type(message).__name__}", where, "write role and content")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise fail(f"unknown role {role}", where, f"use one of {', '.join(ROLES)}; calls of tools are not trained")
    if isinstance(content, list):  # OpenAI's parts
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise fail("a turn has parts that are not text", where, "remove the row: pictures are not trained")
        content = "\n".join(parts)
    if not isinstance(content, str | None):
        raise fail(f"a turn is not text but {json.dumps(content)[:40]}", where, "write its text")
    role = ROLES[role]
    return role, tidy("response" if role == "assistant" else "instruction", content or "")


def count_system_messages(records: Sequence[Record], shape: Shape) -> int:
    """The conversations with a system message."""
    conversations = [record.cells.get(shape.messages) or [] for record in records] if shape.messages else []
    roles = [{message.get("role", message.get("from")) for message in one} for one in conversations]
    return sum(bool(found & {"system", "developer"}) for found in roles)
