#!/usr/bin/env python
"""Writes docs/reference.md from the parsers: every command, flag, default and setting.

python tools/reference.py            # writes the page
python tools/reference.py --check    # exit code 2 when the page is out of date
"""

import sys
from dataclasses import fields

import improve_qlora
import instruct_train_qlora
import rag_qlora
from qlora import console, presets, settings
from qlora.cli import rag_flags, training_flags
from qlora.markdown import as_markdown_table

PAGE = settings.PROJECT / "docs" / "reference.md"
HEAD = """# Reference

Generated from the parsers by `python tools/reference.py`; a test compares them. A value in parentheses is the default.

Precedence: flag > environment > `.env` > default. Answers go to stdout, everything else to stderr.

| Exit code | Meaning |
|---|---|
| 0 | done |
| 1 | the run failed |
| 2 | something to fix, all of it listed at once: *what is wrong - where it came from - what to do* |
| 3 | a question was refused (`ask --strict`) |
| 4 | worse than before (`compare --fail-if-worse`, `improve_qlora.py`) |
| 130 | stopped with Ctrl-C |
"""


def main(argv: list[str]) -> int:
    page = write_page()
    if argv == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != page:
            raise console.fail("the page is out of date", "docs/reference.md", "run python tools/reference.py")
    elif argv:
        raise console.fail(f"unknown argument {argv[0]}", "command line", "give --check or nothing")
    else:
        PAGE.write_text(page, encoding="utf-8")
    return 0


def write_page() -> str:
    training = training_flags.build_parser(instruct_train_qlora.__doc__, instruct_train_qlora.STEPS)
    _, commands = rag_flags.build_parser(rag_qlora.__doc__, rag_qlora.STEPS)
    parts = [HEAD, "## instruct_train_qlora.py\n", describe_parser(training), "## rag_qlora.py\n"]
    for name, parser in commands.items():
        parts += [f"### {name}\n", describe_parser(parser)]
    parts += ["## improve_qlora.py\n", describe_parser(improve_qlora.build_parser())]
    parts += ["## Presets\n", describe_presets()]
    keys = [[f"`{key}`", meaning] for key, meaning in settings.KEYS.items()]
    keys += [[f"`{settings.ENV_FILE}`", "another file of settings than the project's `.env`; in the environment only"]]
    return "\n".join([*parts, "## Settings\n", as_table([["Key", "Meaning"], *keys])])


def describe_parser(parser: console.Parser) -> str:
    """Usage, purpose, and one table of arguments per group."""
    help_of = parser._get_formatter()
    text = f"`python {parser.usage}`\n\n{parser.description}\n"
    for group in parser._action_groups:
        rows = [
            [f"`{help_of._format_action_invocation(action)}`", help_of._expand_help(action) if action.help else ""]
            for action in group._group_actions
            if action.dest != "help"
        ]
        if rows:
            text += "\n" + as_table([[group.title, ""], *rows])
    return text


def describe_presets() -> str:
    names = [field.name for field in fields(presets.Preset)]
    rows = [
        [f"`{name}`", *(console.show_default(getattr(preset, name)) or "none" for preset in presets.PRESETS.values())]
        for name in names
    ]
    return as_table([["", *presets.PRESETS], *rows])


def as_table(rows: list[list[str]]) -> str:
    return as_markdown_table([[cell.replace("|", "\\|") for cell in row] for row in rows], len(rows[0])) + "\n"


if __name__ == "__main__":
    sys.exit(console.run(main))
