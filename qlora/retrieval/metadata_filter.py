"""Conditions on a passage's metadata: from the command line or LangChain's dicts to SQL with bound values, or to
Pinecone's filters.

Operators come from a list, keys and values are bound. A number on the right compares numbers and
passes over passages where the key holds none; anything else compares text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from psycopg2 import sql

OPERATORS = {"=": "=", "!=": "IS DISTINCT FROM", "<": "<", "<=": "<=", ">": ">", ">=": ">="}
LANGCHAIN = {"$eq": "=", "$ne": "!=", "$lt": "<", "$lte": "<=", "$gt": ">", "$gte": ">="}
CONDITION = re.compile(r"(?P<key>[^=!<>]+?)\s*(?P<operator>!=|<=|>=|=|<|>)\s*(?P<value>.*)", re.DOTALL)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")


@dataclass(frozen=True, repr=False)
class Condition:
    key: str
    operator: str
    values: tuple[str, ...]  # more than one: any of them, or with != none of them

    def __repr__(self) -> str:
        return f"{self.key}{self.operator}{'|'.join(self.values)}"


def read_condition(text: str) -> Condition:
    """`source=ferry/crew.md`, `year>=2020`. Raises ValueError when it is no condition."""
    match = CONDITION.fullmatch(text.strip())
    if not match or "\0" in text:
        raise ValueError(f"{text!r} is no condition: write KEY=VALUE, or !=, <, <=, >, >= between them")
    return Condition(match["key"].strip(), match["operator"], (match["value"],))


def read_dict(filters: dict | None) -> list[Condition]:
    """LangChain's way: {"source": "a.md", "year": {"$gte": 2020}, "kind": {"$in": ["a", "b"]}}.

    Raises ValueError for an unknown operator.
    """
    conditions = []
    for key, wanted in (filters or {}).items():
        for operator, value in wanted.items() if isinstance(wanted, dict) else [("$eq", wanted)]:
            if operator in ("$in", "$nin"):
                conditions.append(Condition(key, "=" if operator == "$in" else "!=", tuple(map(as_text, value))))
            elif operator in LANGCHAIN:
                conditions.append(Condition(key, LANGCHAIN[operator], (as_text(value),)))
            else:
                raise ValueError(f"unknown operator {operator}: use {', '.join(LANGCHAIN)}, $in or $nin")
    return conditions


def as_text(value: object) -> str:
    """As PostgreSQL's ->> writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_sql(conditions: Sequence[Condition]) -> tuple[sql.Composable, dict[str, object]]:
    """An expression over the column `metadata` that holds for what fulfils all conditions, and its values."""
    parts: list[sql.Composable] = [sql.SQL("true")]
    values: dict[str, object] = {}
    for n, condition in enumerate(conditions):
        values[f"key{n}"] = condition.key
        tests = [compare(condition, value, n, m, values) for m, value in enumerate(condition.values)]
        either = sql.SQL(" AND " if condition.operator == "!=" else " OR ").join(tests or [sql.SQL("false")])
        parts.append(sql.SQL("({})").format(either))
    return sql.SQL(" AND ").join(parts), values


def compare(condition: Condition, value: str, n: int, m: int, values: dict[str, object]) -> sql.Composable:
    """The test of the condition's m-th value, which is added to `values`."""
    name = f"value{n}_{m}"
    values[name] = value
    is_number = NUMBER.fullmatch(value) and condition.operator not in ("=", "!=")
    # CASE, because AND may evaluate the cast first and fail on text.
    left = "CASE jsonb_typeof(metadata->%({key})s) WHEN 'number' THEN (metadata->>%({key})s)::numeric END"
    template = (
        f"{left} {{operator}} %({{name}})s::numeric" if is_number else "metadata->>%({key})s {operator} %({name})s"
    )
    # The operator comes from OPERATORS, key and name are made here: no text of the user's is formatted in.
    return sql.SQL(template.format(key=f"key{n}", operator=OPERATORS[condition.operator], name=name))


def as_pinecone(conditions: Sequence[Condition]) -> dict | None:
    """The conditions in Pinecone's filter language (docs.pinecone.io, "Filter by metadata").

    Its values have types: a value that reads as a number or a truth value is looked for as text, too. Raises ValueError
    for < and > with text, which Pinecone does not compare.
    """
    parts = []
    for condition in conditions:
        key, operator = condition.key, condition.operator
        if operator == "!=":
            parts += [
                {"$or": [{key: {"$exists": False}}, {"$and": [{key: {"$ne": v}} for v in read_values(text)]}]}
                for text in condition.values
            ]
        elif operator == "=":
            values = [value for text in condition.values for value in read_values(text)]
            # Not $in, whose values have one type. Nothing is equal to none of them.
            parts.append({"$or": [{key: {"$eq": value}} for value in values]} if values else {key: {"$in": []}})
        elif NUMBER.fullmatch(condition.values[0]):
            names = {ours: theirs for theirs, ours in LANGCHAIN.items()}
            parts.append({key: {names[operator]: float(condition.values[0])}})
        else:
            raise ValueError(f"Pinecone compares numbers only: {condition}")
    return {"$and": parts} if parts else None


def read_values(text: str) -> list[str | float | bool]:
    """What the text may have been in a passage's metadata."""
    values: list[str | float | bool] = [text]
    if NUMBER.fullmatch(text):
        values.append(float(text))
    if text in ("true", "false"):
        values.append(text == "true")
    return values
