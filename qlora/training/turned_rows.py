"""Rows turned around, for a model that asks: the passage is given, an answer and its question are the response."""

from collections.abc import Sequence
from dataclasses import replace

from qlora.prompt import WRITE
from qlora.refusal import is_refusal
from qlora.training.rows import Row
from qlora.words import CITATIONS


def turn_around(rows: Sequence[Row], refusal: str) -> list[Row]:
    """The rows from which a question can be written: from the context alone to the answer, and its question below it.

    Left out are rows that refuse or have no context, and follow-up questions.
    """
    usable = (row for row in rows if row.context and not row.turns and not is_refusal(row.response, refusal))
    return [replace(row, instruction=WRITE, response=join_pair(row), passages=(row.context,)) for row in usable]


def join_pair(row: Row) -> str:
    lines = [" ".join(text.split()) for text in (CITATIONS.sub("", row.response), row.instruction)]
    return "\n".join(lines)
