"""The search statements: dense (embeddings), lexical (words), and both fused by reciprocal rank.

Each leg ranks its best `fetch` passages; hybrid adds 1 / (60 + rank) over the legs (Cormack, Clarke and
Buettcher 2009). Every passage comes with its cosine similarity and its embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MODES = ("dense", "lexical", "hybrid")
DEFAULT_MODE = "hybrid"  # the best of the three on both question sets it was measured on (README)
FETCH = 50  # passages that each leg ranks
WORDS = 32  # of a question, the longest ones
SECONDS = 60  # that a search may take

# strict_order: without it a search under a filter returns too few rows. jit compiles for longer than a search takes.
SETTINGS = """
SET LOCAL jit = off;
SET LOCAL hnsw.ef_search = %(candidates)s;
SET LOCAL hnsw.iterative_scan = strict_order;
SET LOCAL hnsw.max_scan_tuples = 1000000;
"""
COUNT = "SELECT count(*) FROM (SELECT 1 FROM {table} WHERE {condition} LIMIT %(enough)s + 1) AS matching"

DENSE = """
dense AS MATERIALIZED (
    SELECT id, row_number() OVER (ORDER BY distance, id) AS rank
    FROM (
        SELECT id, embedding <=> %(vector)s AS distance FROM {{table}} WHERE {{condition}}
        ORDER BY embedding <=> %(vector)s LIMIT {limit}
    ) AS nearest
)"""
LEXICAL = """
asked AS MATERIALIZED (SELECT rag.any_word(%(question)s, %(words)s) AS words),
lexical AS MATERIALIZED (
    SELECT id, row_number() OVER (ORDER BY weight DESC, id) AS rank
    FROM (
        SELECT id, ts_rank_cd(words, (SELECT words FROM asked)) AS weight FROM {{table}}
        WHERE words @@ (SELECT words FROM asked) AND {{condition}}
        ORDER BY weight DESC, id LIMIT {limit}
    ) AS matching
)"""
RESULT = """
SELECT id, text, metadata, 1 - (embedding <=> %(vector)s) AS score, {dense}, {lexical}, embedding
FROM {legs} JOIN {{table}} USING (id)
ORDER BY {order}, id LIMIT %(k)s
"""
STATEMENTS = {
    "dense": "WITH"
    + DENSE.format(limit="%(k)s")
    + RESULT.format(dense="dense.rank", lexical="NULL", legs="dense", order="dense.rank"),
    "lexical": "WITH"
    + LEXICAL.format(limit="%(k)s")
    + RESULT.format(dense="NULL", lexical="lexical.rank", legs="lexical", order="lexical.rank"),
    "hybrid": "WITH"
    + DENSE.format(limit="%(fetch)s")
    + ","
    + LEXICAL.format(limit="%(fetch)s")
    + RESULT.format(
        dense="dense.rank",
        lexical="lexical.rank",
        legs="dense FULL JOIN lexical USING (id)",
        order="coalesce(1.0 / (60 + dense.rank), 0) + coalesce(1.0 / (60 + lexical.rank), 0) DESC",
    ),
}


@dataclass(frozen=True)
class Hit:
    """A row that a statement returns."""

    id: str
    text: str
    metadata: dict
    score: float
    dense: int | None
    lexical: int | None
    embedding: Sequence[float]

    def as_document(self):
        """A LangChain Document with the score and the ranks in its metadata."""
        from langchain_core.documents import Document

        found = {"score": round(self.score, 4), "ranks": {"dense": self.dense, "lexical": self.lexical}}
        return Document(self.text, metadata={**self.metadata, **found}, id=self.id)
