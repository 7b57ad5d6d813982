"""What a person sees: steps and notes on stderr, and every mistake of a call reported at once.

A mistake is a `Problem` with three parts: what is wrong, where it came from, what to do. Checks add
theirs to a `Problems` list, so that one run tells the user everything there is to mend.
"""

import argparse
import contextlib
import difflib
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from qlora import settings

RUN_FAILED, USER_MISTAKE = 1, 2


@dataclass(frozen=True)
class Problem:
    """One mistake of the user's."""

    what: str
    where: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what} - {self.where} - {self.fix}"


class UserError(Exception):
    """Raised when the user has something to mend; ends the program with exit code 2, no traceback."""

    def __init__(self, *problems: Problem):
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class RunError(UserError):
    """Raised when a run failed in a way that we know, through no mistake in the call; exit code 1, no traceback."""


@dataclass
class Problems:
    """Mistakes found so far in one call."""

    found: list[Problem] = field(default_factory=list)

    def add(self, what: str, where: str, fix: str) -> None:
        self.found.append(Problem(what, where, fix))

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Keeps the `UserError` of the block, so that the next check runs too."""
        try:
            yield
        except UserError as error:
            self.found.extend(error.problems)

    def raise_if_any(self) -> None:
        if self.found:
            raise UserError(*self.found)


def fail(what: str, where: str, fix: str) -> UserError:
    """A `UserError` with one problem, to be raised."""
    return UserError(Problem(what, where, fix))


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """The exit code of `main(argv)`: 0 done, 2 the user's mistakes, 1 a failed run (both printed), 130 interrupted.

    Other exceptions pass through: they are ours, and their traceback is wanted.
    """
    try:
        if sys.platform == "win32":
            raise fail("Windows is not supported", "this machine", "use it in WSL: learn.microsoft.com/windows/wsl")
        return main(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        print_problems(error.problems)
        return RUN_FAILED if isinstance(error, RunError) else USER_MISTAKE
    except KeyboardInterrupt:
        note("Stopped.")
        return 130


def print_problems(problems: tuple[Problem, ...]) -> None:
    count = f"{len(problems)} things to mend" if len(problems) > 1 else "One thing to mend"
    stderr().print(f"\n[bold red]{count}[/]:")
    for problem in problems:
        stderr().print(f"  * {problem}", style="red", markup=False, highlight=False, soft_wrap=True)


# ------------------------------------------------------------------------------- arguments


@dataclass(frozen=True)
class Invalid:
    """A flag's text that could not be read; argparse alone would stop at the first of them."""

    text: str
    expected: str


def number(kind: type, minimum: float, maximum: float = float("inf"), above: bool = False) -> Callable[[str], object]:
    """An argparse type for numbers in [minimum, maximum], or (minimum, maximum] with `above`."""
    words = "a whole number" if kind is int else "a number"
    expected = f"{words} {'above' if above else 'of at least'} {minimum:g}"
    if maximum != float("inf"):
        expected += f" and at most {maximum:g}"

    def parse(text: str) -> object:
        try:
            value = kind(text)
        except ValueError:
            return Invalid(text, expected)
        inside = minimum < value <= maximum if above else minimum <= value <= maximum
        return value if inside else Invalid(text, expected)

    return parse


def choice(*names: str) -> Callable[[str], object]:
    """An argparse type for one of some words."""
    return lambda text: text if text in names else Invalid(text, f"one of {', '.join(names)}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose own errors look like all others; flags are never abbreviated."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str):
        raise fail(message, "command line", "see --help")


def parse_arguments(
    parser: argparse.ArgumentParser, argv: list[str], commands: dict[str, argparse.ArgumentParser] | None = None
) -> tuple[argparse.Namespace, Problems]:
    """The parsed arguments, and a problem for every unknown flag and every value out of range.

    An invalid value gives way to the flag's default, so that the other arguments can be checked, too.
    """
    args, unknown = parser.parse_known_args(argv)
    parser = commands[args.command] if commands else parser
    problems = Problems()
    flags = re.findall(r"--[a-z][a-z-]+", parser.format_help())
    for text in unknown:
        nearest = difflib.get_close_matches(text.partition("=")[0], flags, n=1)
        fix = f"did you mean {nearest[0]}?" if nearest else "see --help"
        problems.add(f"unknown argument {text}", "command line", fix)
    for action in parser._actions:
        values = getattr(args, action.dest, None)
        several = isinstance(values, list | tuple)
        invalid = [value for value in (values if several else [values]) if isinstance(value, Invalid)]
        for value in invalid:
            text = " ".join([*action.option_strings[-1:], value.text])
            problems.add(f"{text} is not valid", "command line", f"give {value.expected}")
        if invalid:
            valid = [value for value in values if value not in invalid] if several else action.default
            setattr(args, action.dest, valid)
    return args, problems


# ------------------------------------------------------------------------------- output


def stderr():
    """A rich console on stderr, made anew so that redirection of sys.stderr is respected.

    Of several processes only the first is heard. In a notebook lines stay lines, not a table each.
    """
    from rich.console import Console

    quiet = settings.process_rank() > 0
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet, force_jupyter=False)


def note(text: str) -> None:
    stderr().print(f"  {text}", markup=False)


@contextlib.contextmanager
def step(steps: tuple[str, ...], name: str) -> Iterator[None]:
    """Prints `[2/4] Model Setup` before the block and how long it took after it."""
    console = stderr()
    console.print(f"\n[bold cyan]\\[{steps.index(name) + 1}/{len(steps)}] {name}[/]")
    started = time.perf_counter()
    yield
    console.print(f"  [dim]{name}: {time.perf_counter() - started:.1f} s[/]")


def print_settings(title: str, values: dict[str, object]) -> None:
    """Every resolved value of a run as an aligned list on stderr."""
    console = stderr()
    console.print(f"\n[bold]{title}[/]")
    width = max(map(len, values))
    for name, value in values.items():
        console.print(f"  {name:<{width}}  {value}", markup=False)


def progress():
    """A rich progress bar on stderr: description, bar, count, elapsed time, time left."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=stderr(),
    )


def shorten_text(text: str, width: int = 80) -> str:
    """The text on one line of at most `width` characters, without control characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def printable(text: str) -> str:
    """The text without what a terminal would obey: a document could hold escape sequences."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else " " for letter in text)
