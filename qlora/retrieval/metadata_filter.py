"""Conditions on a passage's metadata: from the command line or LangChain's dicts to SQL with bound values, or to
Pinecone's filters.

Operators come from a list, keys and values are bound. A number on the right compares numbers and
skips passages whose key does not hold one; anything else compares text.
"""

import re
from dataclasses import dataclass

from qlora.words import clean

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
    """`source=ferry/crew.md`, `year>=2020`. Raises ValueError for anything else."""
    match = CONDITION.fullmatch(text.strip())
    if not match or text != clean(text):
        raise ValueError(f"{text!r} is not a condition: write KEY=VALUE, or !=, <, <=, >, >= between them")
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
