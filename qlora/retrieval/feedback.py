"""What people think of answers, kept beside the collection that they are about. Names and addresses are not kept."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from qlora.retrieval.database import Database

GOOD, BAD = "good", "bad"
COLUMNS = ("id", "given", "adapter", "prompt")  # of the table; all else is one JSON object


@dataclass(frozen=True)
class Judgement:
    """An answer of a model, what a person thinks of it, and what would have been right."""

    question: str
    answer: str = ""
    rating: str = BAD
    right_answer: str | None = None
    not_in_documents: bool = False
    right_passage: str | None = None  # its id
    passages: tuple[dict, ...] = ()  # that were shown, the best first: id, source and text of each
    adapter: str = ""  # digest of the weights that answered; empty: the base model
    prompt: str = ""  # digest of the prompt
    id: int = 0  # given when it is kept
    given: datetime | None = None


class FeedbackLog:
    """Judgements of one collection's answers, the oldest first."""

    def __init__(self, database: Database, collection: int):
        self.database, self.collection = database, collection

    def add(self, judgement: Judgement) -> int:
        """Keeps it; returns its number."""
        values = {name: value for name, value in asdict(judgement).items() if name not in COLUMNS}
        with self.database.transaction() as cursor:
            cursor.execute(
                "INSERT INTO rag.feedback (collection, adapter, prompt, judgement) VALUES (%s, %s, %s, %s) "
                "RETURNING id",
                (self.collection, judgement.adapter, judgement.prompt, json.dumps(values)),
            )
            return cursor.fetchone()[0]

    def all(self) -> list[Judgement]:
        with self.database.transaction() as cursor:
            cursor.execute(
                "SELECT id, given, adapter, prompt, judgement FROM rag.feedback WHERE collection = %s ORDER BY id",
                (self.collection,),
            )
            return [read_judgement(*row) for row in cursor.fetchall()]

    def forget(self, numbers: Sequence[int]) -> int:
        """Deletes judgements; returns how many there were."""
        with self.database.transaction() as cursor:
            cursor.execute(
                "DELETE FROM rag.feedback WHERE collection = %s AND id = ANY(%s)", (self.collection, list(numbers))
            )
            return cursor.rowcount


def read_judgement(key: int, given: datetime, adapter: str, prompt: str, values: dict) -> Judgement:
    """A judgement as it was kept; before schema version 5 its passages were ids."""
    values.pop("model", None)
    passages = [{"id": one} if isinstance(one, str) else one for one in values.pop("passages", ())]
    return Judgement(**values, passages=tuple(passages), adapter=adapter, prompt=prompt, id=key, given=given)
