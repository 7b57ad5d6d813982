"""What people think of answers, kept beside the collection that they are about."""

import json

from qlora.retrieval.database import Database


class FeedbackLog:
    """Judgements of one collection's answers, each a JSON object, the oldest first."""

    def __init__(self, database: Database, collection: int):
        self.database, self.collection = database, collection

    def add(self, judgement: dict) -> int:
        """Keeps it; returns its number."""
        with self.database.transaction() as cursor:
            cursor.execute(
                "INSERT INTO rag.feedback (collection, judgement) VALUES (%s, %s) RETURNING id",
                (self.collection, json.dumps(judgement)),
            )
            return cursor.fetchone()[0]

    def all(self) -> list[dict]:
        """All of them, with their number and time."""
        with self.database.transaction() as cursor:
            cursor.execute(
                "SELECT id, given, judgement FROM rag.feedback WHERE collection = %s ORDER BY id", (self.collection,)
            )
            return [{"id": key, "given": str(given), **judgement} for key, given, judgement in cursor.fetchall()]
