"""Rows of an instruction dataset, from the files and in the shapes that people have."""

from collections.abc import Sequence

from qlora.console import note
from qlora.training.row_files import Draw, read_records
from qlora.training.row_shapes import COLUMNS, REQUIRED, Row, count_system_messages, recognise, shape_rows, unfold

__all__ = ["COLUMNS", "REQUIRED", "Draw", "Row", "load_rows"]


def load_rows(
    sources: str | Sequence[str],
    columns: dict[str, str] | None = None,
    train_on: str = "last",
    config: str | None = None,
    split: str = "train",
    draw: Draw | None = None,
) -> list[Row]:
    """All rows of files, folders and globs of one shape, and those of hub datasets, or as many as `draw` needs.

    `columns` maps our names to the dataset's. Reports a shape other than our own, and what is left unused. Raises
    UserError with every mistake of the rows and where it is.
    """
    sources = [sources] if isinstance(sources, str) else sources
    records = unfold([record for source in sources for record in read_records(source, config, split, draw)])
    present = list(dict.fromkeys(name for record in records for name in record.cells))
    shape = recognise(present, columns or {}, ", ".join(sources))
    rows = shape_rows(records, shape, train_on)
    if shape.name:
        mapped = [f"{ours}={theirs}" for ours, theirs in shape.columns.items() if ours != theirs]
        note(f"rows in the shape of {shape.name}: {', '.join(mapped) or shape.messages} (--columns names others)")
    if left_out := count_system_messages(records, shape):
        note(f"{left_out} system messages are left out: the prompt has rules of its own")
    if shape.unused:
        note(f"columns not used: {', '.join(shape.unused)}")
    return rows
