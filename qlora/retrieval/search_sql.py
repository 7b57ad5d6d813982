"""The search statements: dense (embeddings), lexical (words), and both added up.

Lexical is the share of the question's words that a passage holds, where rare words weigh more. Hybrid takes the best
`nearest` passages of each and adds the share to the cosine similarity. With both scores known, that finds more than
fusing ranks (Bruch, Gai and Ingber, arXiv 2210.11934). Every passage comes with its similarity and embedding.
"""

from collections.abc import Sequence

from psycopg2 import sql

from qlora.retrieval.metadata_filter import NUMBER, OPERATORS, Condition

WORDS = 64  # of a question, the longest ones
LOOKED_AT = 2  # passages per text that each leg looks at first
MOST, MORE = 50_000, 8  # passages that a leg looks at in the end; and how many times more each time it has drowned
COMMON = 10_000  # passages with a word above which it is too common to search
# Best for 400 questions on SQuAD's training articles and 99 on the sample's training documents; 0.4 to 0.8 are equal.
LEXICAL_WEIGHT = 0.6
SECONDS = 60  # that a search may take

# Entries of the HNSW index that a search keeps in mind (ef_search): as many as it looks at, but at least so many that
# it finds nearly all among a million passages (benchmarks/retrieval_speed.py). pgvector takes 1,000 at most.
MIN_CANDIDATES, MAX_CANDIDATES = 200, 1_000
# strict_order: without it a search with a filter returns too few rows. jit compiles for longer than a search takes.
INDEX_SETTINGS = """
SET LOCAL jit = off;
SET LOCAL hnsw.ef_search = %(candidates)s;
SET LOCAL hnsw.iterative_scan = strict_order;
SET LOCAL hnsw.max_scan_tuples = 1000000;
"""
COUNT = "SELECT count(*) FROM {table} WHERE {condition}"
SAMPLE = "SELECT count(*) FROM {table} TABLESAMPLE SYSTEM (%(percent)s) REPEATABLE (0) WHERE {condition}"
# As of the last ANALYZE, or fewer where some were removed since. A copy of the database knows of no changes: 0. After a
# crash the server knows only of later ones, so few are counted once more.
SIZE = """
SELECT CASE pg_stat_get_live_tuples(oid) WHEN 0 THEN reltuples ELSE least(reltuples, pg_stat_get_live_tuples(oid)) END
FROM pg_class WHERE oid = to_regclass('rag.' || %(passages)s)
"""

# Passages of one text take one place, that of the best. So more than `nearest` are looked at.
NEAREST = """
SELECT id, same, embedding <=> %(vector)s AS distance FROM {table} WHERE {condition}
ORDER BY embedding <=> %(vector)s LIMIT %(looked_at)s
"""
LOOKED_AT_ROWS = "\nlooked_at AS MATERIALIZED (" + NEAREST + "),"
DENSE = """
dense AS MATERIALIZED (
    SELECT id, same, 1 - distance AS total, row_number() OVER (ORDER BY distance, id) AS rank
    FROM (SELECT DISTINCT ON (same) id, same, distance FROM looked_at ORDER BY same, distance, id) AS texts
    ORDER BY distance, id LIMIT %(nearest)s
)"""
# A word weighs as in BM25 (Robertson and Zaragoza 2009); its count in a passage hardly matters in short passages.
# The quotation marks make a query of any lexeme: ours have no such mark in them.
# Words in COMMON or more passages count only if there are no others. Those that PostgreSQL's statistics know to be in
# twice as many are not even looked up, unless the search has no other leg and no other word: among a million passages
# that takes a tenth of a second per word.
LEXICAL = """
frequent AS MATERIALIZED (
    SELECT known.lexeme
    FROM pg_stats, unnest(most_common_elems::text::text[], most_common_elem_freqs) AS known (lexeme, share)
    WHERE schemaname = 'rag' AND tablename = %(passages)s AND attname = 'words'
        AND share >= %(often)s AND known.lexeme IS NOT NULL
),
asked AS MATERIALIZED (
    SELECT lexeme, ('''' || lexeme || '''')::tsquery AS word, lexeme IN (SELECT lexeme FROM frequent) AS is_frequent
    FROM (SELECT dictionary FROM rag.collections WHERE id = %(collection)s) AS collection,
        unnest(to_tsvector(dictionary::regconfig, %(words)s)) ORDER BY length(lexeme) DESC, lexeme LIMIT %(most)s
),
rare AS MATERIALIZED (
    SELECT lexeme, id, same FROM asked CROSS JOIN LATERAL (
        SELECT id, same FROM {table} WHERE words @@ word AND {condition} LIMIT %(common)s
    ) AS matching WHERE NOT is_frequent
),
matches AS MATERIALIZED (
    SELECT * FROM rare
    UNION ALL
    SELECT lexeme, id, same FROM asked CROSS JOIN LATERAL (
        SELECT id, same FROM {table} WHERE words @@ word AND {condition} LIMIT %(common)s
    ) AS matching WHERE is_frequent AND %(alone)s AND NOT EXISTS (SELECT FROM rare)
),
counts AS (SELECT lexeme, count(*) AS passages FROM matches GROUP BY lexeme),
weights AS MATERIALIZED (
    SELECT lexeme, ln(1 + (%(total)s - passages + 0.5) / (passages + 0.5)) AS weight
    FROM counts
    WHERE passages < %(common)s OR (SELECT min(passages) FROM counts) = %(common)s
),
shares AS MATERIALIZED (
    SELECT id, same, sum(weight) / (SELECT sum(weight) FROM weights) AS share
    FROM matches JOIN weights USING (lexeme) GROUP BY id, same
),
found AS MATERIALIZED (SELECT id, same, share FROM shares ORDER BY share DESC, id LIMIT %(looked_at)s),
lexical AS MATERIALIZED (
    SELECT id, same, share AS total, row_number() OVER (ORDER BY share DESC, id) AS rank
    FROM (SELECT DISTINCT ON (same) id, same, share FROM found ORDER BY same, share DESC, id) AS texts
    ORDER BY share DESC, id LIMIT %(nearest)s
)"""
BEST = """
scored AS MATERIALIZED (
    SELECT id, same, 1 - (embedding <=> %(vector)s) + %(lexical_weight)s * coalesce(share, 0) AS total
    FROM (SELECT id FROM dense UNION SELECT id FROM lexical) AS either
    JOIN {table} USING (id) LEFT JOIN (SELECT id, share FROM shares) AS share USING (id)
),
best AS (
    SELECT id, same, total, row_number() OVER (ORDER BY total DESC, id) AS place,
        dense.rank AS dense, lexical.rank AS lexical
    FROM (SELECT DISTINCT ON (same) id, same, total FROM scored ORDER BY same, total DESC, id) AS texts
    LEFT JOIN (SELECT same, rank FROM dense) AS dense USING (same)
    LEFT JOIN (SELECT same, rank FROM lexical) AS lexical USING (same)
    ORDER BY place LIMIT %(k)s
)"""
# Whether a leg looked at as many passages as it may, and found too few texts among them.
DROWNED = "(SELECT count(*) FROM {seen}) >= %(looked_at)s AND (SELECT count(*) FROM {leg}) < %(texts)s"
DENSE_DROWNED = DROWNED.format(seen="looked_at", leg="dense")
LEXICAL_DROWNED = DROWNED.format(seen="found", leg="lexical")
HITS = """
SELECT id, text, metadata, 1 - (embedding <=> %(vector)s) AS score, best.total, best.dense, best.lexical, embedding,
    ARRAY(
        SELECT DISTINCT metadata->>'source' FROM {table} AS copy
        WHERE copy.same = best.same AND metadata->>'source' IS NOT NULL AND {condition} ORDER BY 1
    ) AS sources
"""
FROM_BEST = " FROM best JOIN {table} USING (id) ORDER BY best.place"
BEST_OF_LEG = """,
best AS (
    SELECT id, same, total, rank AS place, rank AS {leg}, NULL::bigint AS {other} FROM {leg} ORDER BY rank LIMIT %(k)s
)
"""
OF_DENSE = BEST_OF_LEG.format(leg="dense", other="lexical")
OF_LEXICAL = BEST_OF_LEG.format(leg="lexical", other="dense")
EITHER_DROWNED = f"({DENSE_DROWNED}) OR ({LEXICAL_DROWNED})"
STATEMENTS = {  # each returns the columns of a Hit, and whether a leg has drowned
    "dense": "WITH" + LOOKED_AT_ROWS + DENSE + OF_DENSE + HITS + "," + DENSE_DROWNED + FROM_BEST,
    "lexical": "WITH" + LEXICAL + OF_LEXICAL + HITS + "," + LEXICAL_DROWNED + FROM_BEST,
    "hybrid": "WITH" + LOOKED_AT_ROWS + DENSE + "," + LEXICAL + "," + BEST + HITS + "," + EITHER_DROWNED + FROM_BEST,
}


def count_candidates(looked_at: int) -> int:
    """How many entries of the index a search that looks at so many passages keeps in mind."""
    return min(MAX_CANDIDATES, max(MIN_CANDIDATES, looked_at))


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
