"""The search statements: dense (embeddings), lexical (words), and both added up.

Lexical is the share of the question's words that a passage holds, where rare words weigh more. Hybrid takes the best
`nearest` passages of each and adds the share to the cosine similarity. With both scores known, that finds more than
fusing ranks (Bruch, Gai and Ingber, arXiv 2210.11934). Every passage comes with its similarity and embedding.
"""

from collections.abc import Sequence

from psycopg2 import sql

from qlora.retrieval.metadata_filter import NUMBER, OPERATORS, Condition

WORDS = 32  # of a question, the longest ones
COMMON = 10_000  # passages with a word above which it is too common to search
# Best for 400 questions on SQuAD's training articles and 99 on the sample's training documents; 0.4 to 0.8 are equal.
LEXICAL_WEIGHT = 0.6
SECONDS = 60  # that a search may take

# strict_order: without it a search with a filter returns too few rows. jit compiles for longer than a search takes.
INDEX_SETTINGS = """
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
        SELECT id, embedding <=> %(vector)s AS distance FROM {table} WHERE {condition}
        ORDER BY embedding <=> %(vector)s LIMIT %(nearest)s
    ) AS nearest
)"""
# A word weighs as in BM25 (Robertson and Zaragoza 2009); its count in a passage hardly matters in short passages.
# The quotation marks make a query of any lexeme. Words in COMMON or more passages count only if there are no others.
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
best AS (SELECT id FROM dense UNION SELECT id FROM lexical WHERE rank <= %(nearest)s)
SELECT id, text, metadata, 1 - (embedding <=> %(vector)s) AS score, dense.rank, lexical.rank, embedding
FROM best LEFT JOIN dense USING (id) LEFT JOIN lexical USING (id) JOIN {table} USING (id)
ORDER BY 1 - (embedding <=> %(vector)s) + %(lexical_weight)s * coalesce(lexical.share, 0) DESC, id LIMIT %(k)s
"""
STATEMENTS = {  # each returns the columns of a Hit
    "dense": "WITH"
    + DENSE
    + """
SELECT id, text, metadata, 1 - (embedding <=> %(vector)s) AS score, dense.rank, NULL, embedding
FROM dense JOIN {table} USING (id)
ORDER BY dense.rank, id LIMIT %(k)s
""",
    "lexical": "WITH"
    + LEXICAL
    + """
SELECT id, text, metadata, 1 - (embedding <=> %(vector)s) AS score, NULL, lexical.rank, embedding
FROM lexical JOIN {table} USING (id)
ORDER BY lexical.rank, id LIMIT %(k)s
""",
    "hybrid": "WITH" + DENSE + "," + LEXICAL + BEST,
}


def as_sql(conditions: Sequence[Condition]) -> tuple[sql.Composable, dict[str, object]]:
    """An expression over the column `metadata` that is true where all conditions hold, and its values."""
    parts: list[sql.Composable] = [sql.SQL("true")]
    values: dict[str, object] = {}
    for n, condition in enumerate(conditions):
        values[f"key{n}"] = condition.key
        tests = [test_value(condition, value, n, m, values) for m, value in enumerate(condition.values)]
        either = sql.SQL(" AND " if condition.operator == "!=" else " OR ").join(tests or [sql.SQL("false")])
        parts.append(sql.SQL("({})").format(either))
    return sql.SQL(" AND ").join(parts), values


def test_value(condition: Condition, value: str, n: int, m: int, values: dict[str, object]) -> sql.Composable:
    """The test of the condition's m-th value, which is added to `values`."""
    name = f"value{n}_{m}"
    values[name] = value
    is_number = NUMBER.fullmatch(value) and condition.operator not in ("=", "!=")
    # CASE, because AND may evaluate the cast first and fail on text.
    left = "CASE jsonb_typeof(metadata->%({key})s) WHEN 'number' THEN (metadata->>%({key})s)::numeric END"
    template = (
        f"{left} {{operator}} %({{name}})s::numeric" if is_number else "metadata->>%({key})s {operator} %({name})s"
    )
    # The operator comes from OPERATORS, key and name are made here: no text of the user is formatted in.
    return sql.SQL(template.format(key=f"key{n}", operator=OPERATORS[condition.operator], name=name))
