"""Questions with known answers: ours, dataset rows, or SQuAD's."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora.console import Problems, fail
from qlora.machine import decode_text
from qlora.prompt import Prompt
from qlora.refusal import is_refusal
from qlora.words import clean, normalize


@dataclass(frozen=True)
class Question:
    """A question with its right answers (none: the documents don't answer it), their document and context."""

    question: str
    answers: tuple[str, ...]
    source: str | None = None
    context: str | None = None


def load_questions(path: Path, limit: int | None = None, refusal: str = Prompt.refusal) -> list[Question]:
    """Questions of a .jsonl file (ours, or dataset rows) or of a SQuAD v1 or v2 .json file.

    Dataset rows that say `refusal`, or the English one, have no answer. With `limit` a deterministic sample with equal
    shares of answerable and unanswerable ones. Raises UserError that names each bad line.
    """
    if not path.is_file():
        raise fail("question file not found", str(path), "check --questions")
    questions = read_squad(path) if path.suffix == ".json" else read_lines(path, refusal)
    if not questions:
        raise fail("no questions in the file", str(path), "write one JSON object per line: question, answers")
    return spread(questions, limit)


def read_asked(paths: Iterable[Path | str]) -> frozenset[str]:
    """The questions of files, as `normalize` compares them. Raises UserError as `load_questions` does."""
    return frozenset(normalize(one.question) for path in paths for one in load_questions(Path(path)))


def digest_questions(questions: Sequence[Question]) -> str:
    """The sha256 of questions and answers, in any order."""
    lines = sorted(json.dumps([question.question, sorted(question.answers)]) for question in questions)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def spread(questions: list[Question], limit: int | None) -> list[Question]:
    """At most `limit` of the questions, with equal shares of answerable and unanswerable ones."""
    if not limit or limit >= len(questions):
        return questions
    ordered = sorted(range(len(questions)), key=lambda n: bool(questions[n].answers))
    return [questions[n] for n in sorted(ordered[n * len(ordered) // limit] for n in range(limit))]


def read_lines(path: Path, refusal: str = Prompt.refusal) -> list[Question]:
    """The questions of a .jsonl file; all bad lines are reported together."""
    problems, questions = Problems(), []
    for number, line in enumerate(decode_text(path.read_bytes(), path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            questions.append(read_question(json.loads(line), refusal))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"not a question ({type(error).__name__}: {error})"
            fix = '{"question": "...", "answers": ["..."], "source": null, "context": null}'
            problems.add(what, f"{path}:{number}", f"write {fix}")
    problems.raise_if_any()
    return questions


def read_question(row: dict, refusal: str = Prompt.refusal) -> Question:
    """One of our questions, or a dataset row, whose response is the answer."""
    if "question" not in row and "instruction" in row:
        refused = row.get("category") == "unanswerable" or any(
            is_refusal(row["response"], words) for words in (refusal, Prompt.refusal)
        )
        row = {**row, "question": row["instruction"], "answers": [] if refused else [row["response"]]}
    texts = [row["question"], *row["answers"]]
    if isinstance(row["answers"], str) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("question and answers must be text")
    return make_question(row["question"], row["answers"], row.get("source"), row.get("context"))


def make_question(question: str, answers: Iterable[str], source: str | None, context: str | None) -> Question:
    """The question without characters that no file or database takes."""
    source, context = (clean(text) if text else None for text in (source, context))
    return Question(clean(question), tuple(map(clean, answers)), source, context)


def read_squad(path: Path) -> list[Question]:
    """The questions of SQuAD's own format; the article's title, as a Markdown file, is the source."""
    try:
        articles = json.loads(decode_text(path.read_bytes(), path))["data"]
        return [
            make_question(
                entry["question"].strip(),
                dict.fromkeys(answer["text"] for answer in entry["answers"]),
                f"{article['title']}.md",
                paragraph["context"],
            )
            for article in articles
            for paragraph in article["paragraphs"]
            for entry in paragraph["qas"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise fail(f"not a SQuAD file ({error})", str(path), "give SQuAD v1 or v2 JSON, or .jsonl") from error
