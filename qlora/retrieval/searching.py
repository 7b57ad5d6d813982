"""The search statements: dense (embeddings), lexical (words), and both added up.

Lexical is the share of the question's words that a passage holds, where rare words weigh more. Hybrid takes the best
`fetch` passages of each and adds the share to the cosine similarity: with both scores at hand that finds more than
fusing ranks (Bruch, Gai and Ingber, arXiv 2210.11934). Every passage comes with its similarity and embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MODES = ("dense", "lexical", "hybrid")
DEFAULT_MODE = "hybrid"  # the best of the three on both question sets it was measured on (README)
FETCH = 50  # passages that each leg ranks
WORDS = 32  # of a question, the longest ones
COMMON = 10_000  # passages with a word, from which on it is too common to look for
# Best for 400 questions on SQuAD's training articles and 99 on the sample's training documents; 0.4 to 0.8 do as well.
LEXICAL_WEIGHT = 0.6
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
# A word weighs as in BM25 (Robertson and Zaragoza 2009); how often it stands in a passage hardly matters in short ones.
# The quotation marks make any lexeme a query of itself. Words in COMMON passages and more count if there are no others.
LEXICAL = """
asked AS MATERIALIZED (
    SELECT lexeme, ('''' || replace(replace(lexeme, '\\', '\\\\'), '''', '''''') || '''')::tsquery AS word
    FROM unnest(to_tsvector('english', %(question)s)) ORDER BY length(lexeme) DESC, lexeme LIMIT %(words)s
),
matches AS MATERIALIZED (
    SELECT lexeme, id FROM asked CROSS JOIN LATERAL (
        SELECT id FROM {table} WHERE words @@ word AND {condition} LIMIT %(common)s
    ) AS matching
),
counts AS (SELECT lexeme, count(*) AS passages FROM matches GROUP BY lexeme),
weights AS MATERIALIZED (
    SELECT lexeme, ln(1 + (total - passages + 0.5) / (passages + 0.5)) AS weight
    FROM counts, (SELECT count(*) AS total FROM {table} WHERE {condition}) AS size
    WHERE passages < %(common)s OR (SELECT min(passages) FROM counts) = %(common)s
),
lexical AS MATERIALIZED (
    SELECT id, share, row_number() OVER (ORDER BY share DESC, id) AS rank
    FROM (
        SELECT id, sum(weight) / (SELECT sum(weight) FROM weights) AS share
        FROM matches JOIN weights USING (lexeme) GROUP BY id
    ) AS weighed
)"""
BEST = """,
best AS (SELECT id FROM dense UNION SELECT id FROM lexical WHERE rank <= %(fetch)s)"""
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
    + LEXICAL
    + RESULT.format(dense="NULL", lexical="lexical.rank", legs="lexical", order="lexical.rank"),
    "hybrid": "WITH"
    + DENSE.format(limit="%(fetch)s")
    + ","
    + LEXICAL
    + BEST
    + RESULT.format(
        dense="dense.rank",
        lexical="lexical.rank",
        legs="best LEFT JOIN dense USING (id) LEFT JOIN lexical USING (id)",
        order="1 - (embedding <=> %(vector)s) + %(lexical_weight)s * coalesce(lexical.share, 0) DESC",
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
