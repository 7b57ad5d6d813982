"""What a person sees: help, steps and notes, and all mistakes of a call reported together.

A mistake is a `Problem` with three parts: what is wrong, where it came from, what to do. Checks add
theirs to a `Problems` list, so that one run reports everything that the user has to fix.
"""

import argparse
import contextlib
import difflib
import errno
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qlora import settings

RUN_FAILED, USER_MISTAKE = 1, 2
LONGEST_NAME = 200
WIDE = 100  # columns of a terminal from which a progress bar shows its rate
# In torch's RuntimeError for another process that ended: gloo's words, and NCCL's.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process", "ncclRemoteError")
FILE_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, io.UnsupportedOperation)


@dataclass(frozen=True)
class Problem:
    """One mistake of the user's."""

    what: str
    where: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what} - {self.where} - {self.fix}"


class UserError(Exception):
    """Raised when the user has something to fix; ends the program with exit code 2, no traceback."""

    code = USER_MISTAKE

    def __init__(self, *problems: Problem):
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems

    def __reduce__(self):
        return type(self), self.problems  # so that it passes from one process to another


class RunError(UserError):
    """Raised when a run fails in a known way, without a mistake in the call; exit code 1, no traceback."""

    code = RUN_FAILED


@dataclass
class Problems:
    """The mistakes of one call that were found so far."""

    found: list[Problem] = field(default_factory=list)

    def add(self, what: str, where: str, fix: str) -> None:
        self.found.append(Problem(what, where, fix))

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Keeps the `UserError` of the block, so that the next check runs as well."""
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

    A reader of stdout that goes away, such as `head`, is 1 as well, and so is a full disk. A file that cannot be read
    or written is the user's mistake, and so is a lack of memory. Other exceptions are our own mistakes: they pass
    through, with their traceback.
    """
    with contextlib.suppress(AttributeError):  # a notebook's stdout takes everything
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? instead of ending the answer
    try:
        if sys.platform == "win32":
            raise fail("Windows is not supported", "this machine", "use it in WSL: learn.microsoft.com/windows/wsl")
        code = main(sys.argv[1:] if argv is None else argv) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
        return RUN_FAILED
    except KeyboardInterrupt:
        note("Stopped.")
        return 130
    except Exception as error:
        if not (explained := explain(error)):
            raise
        print_problems(explained.problems)
        return explained.code


def explain(error: Exception) -> UserError | None:
    """The error as one that is reported without a traceback; None for a mistake of our own."""
    if isinstance(error, UserError):
        return error
    if problem := explain_loss(error):
        return RunError(problem)
    problem = explain_memory(error) or explain_file(error)
    return problem and (RunError if is_disk_full(error) else UserError)(problem)


def is_disk_full(error: Exception) -> bool:
    """Whether a write failed for lack of space; torch and safetensors say so in words of their own."""
    words = ("No space left", "Disk quota exceeded", "PytorchStreamWriter failed")
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EIO) or any(
        word in str(error) for word in words
    )


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or in torch's CPU allocator."""
    if not isinstance(error, RuntimeError | MemoryError):
        return False
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or should_reduce_batch_size(error) or "std::bad_alloc" in str(error)


def explain_loss(error: Exception) -> Problem | None:
    """The problem where torch waited for another process of this run, which has ended; None for any other error."""
    if settings.process_count() == 1 or not isinstance(error, RuntimeError):
        return None
    if not any(word in str(error) for word in LOST):
        return None
    fix = "look at its message; --resume then goes on from the last checkpoint"
    return Problem(f"another process of this run ended ({shorten_text(str(error))})", "this run", fix)


def explain_memory(error: Exception) -> Problem | None:
    """The problem behind a failed allocation; None for any other error."""
    if not ran_out_of_memory(error):
        return None
    fix = "end other processes, or take less at a time: --batch-size, --max-length, --top-k, a smaller base model"
    return Problem("out of memory", shorten_text(str(error)) or "this machine", fix)


def explain_file(error: Exception) -> Problem | None:
    """The problem behind an error of the file system; None for any other."""
    name = str(getattr(error, "filename", None) or "")
    if is_disk_full(error):
        fix = "free some space and run it again: what is complete is kept"
        return Problem("the disk is full or broken", shorten_text(name or str(error)), fix)
    if isinstance(error, FILE_ERRORS) or (isinstance(error, OSError) and name):
        what = error.strerror or shorten_text(str(error))
        return Problem(what, shorten_text(name) or "the file system", "check the path and its rights")
    return None


def print_problems(problems: tuple[Problem, ...], quiet: bool | None = None) -> None:
    """Prints them on stderr: unless told otherwise, in the first of several processes of a machine."""
    count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    count += f" of process {rank}" if (rank := settings.process_rank()) else ""
    output = stderr(settings.process_rank(local=True) > 0 if quiet is None else quiet)
    output.print(f"\n[bold red]{count}[/]:")
    for problem in problems:
        line = " ".join(printable(str(problem)).split("\n"))
        output.print(f"  * {line}", style="red", markup=False)


# ------------------------------------------------------------------------------- arguments


@dataclass(frozen=True)
class Invalid:
    """A flag's text that could not be read. argparse alone would stop at the first of them."""

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

    parse.metavar = "N" if kind is int else "X"
    return parse


def choice(*names: str) -> Callable[[str], object]:
    """An argparse type for one of some words."""

    def parse(text: str) -> object:
        return text if text in names else Invalid(text, f"one of {', '.join(names)}")

    parse.metavar = "|".join(names)
    return parse


def name(text: str) -> str | Invalid:
    """An argparse type for a name that is stored, and shown in lists."""
    usable = text.strip() and text.isprintable() and len(text) <= LONGEST_NAME
    return text if usable else Invalid(shorten_text(text), f"1 to {LONGEST_NAME} letters, none of them invisible")


class Help(argparse.RawDescriptionHelpFormatter):
    """Help with short names of values, choices, and the default of each flag that has one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)
        self._action_max_length = 14  # argparse forgets the indentation of commands

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "metavar", None) or super()._get_default_metavar_for_optional(action)

    def _format_args(self, action, default_metavar):
        text = super()._format_args(action, default_metavar)
        return f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..." if action.nargs == "+" else text

    def _get_help_string(self, action):
        default = action.default
        if not action.option_strings or default is None or default is False or default in (argparse.SUPPRESS, []):
            return action.help
        return f"{action.help} ({show_default(default)})".replace("%", "%%")


def show_default(value: object) -> str:
    """A default as help shows it: the same on every machine."""
    if isinstance(value, list | tuple):
        return " ".join(map(show_default, value))
    return f"{value:g}" if isinstance(value, float) else str(value).removeprefix(f"{settings.PROJECT}/")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose own errors look like all others; flags are never abbreviated."""

    def __init__(self, **options):
        super().__init__(formatter_class=Help, allow_abbrev=False, **options)
        self._positionals.title, self._optionals.title = "Arguments", "Options"

    def group(self, title: str):
        """The group of flags with this title, made where it is missing."""
        found = [group for group in self._action_groups if group.title == title]
        return found[0] if found else self.add_argument_group(title)

    def error(self, message: str):
        raise fail(message, "command line", "see --help")


def parse_arguments(
    parser: argparse.ArgumentParser, argv: list[str], commands: dict[str, argparse.ArgumentParser] | None = None
) -> tuple[argparse.Namespace, Problems]:
    """The parsed arguments, and a problem for every unknown flag and every value out of range.

    The flag's default replaces an invalid value, so that the other arguments can still be checked.
    """
    args, unknown = parser.parse_known_args(argv)
    parser = commands[args.command] if commands else parser
    problems = Problems()
    if path := settings.missing_env_file():
        problems.add("the file of settings cannot be read", path, "check the path in QLORA_ENV_FILE and its rights")
    flags = re.findall(r"--[a-z][a-z-]+", parser.format_help())
    for text in unknown:
        flag = text.partition("=")[0]
        if (key := flag.strip("-").replace("-", "_").upper()) in settings.KEYS:
            problems.add(f"unknown argument {flag}", "command line", f"set {key} in the environment or in .env")
            continue
        nearest = difflib.get_close_matches(flag, flags, n=1)
        fix = f"did you mean {nearest[0]}?" if nearest else "see --help"
        problems.add(f"unknown argument {re.sub('://.*', '://...', text)}", "command line", fix)
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


def stderr(quiet: bool | None = None):
    """A rich console on stderr, made anew on each call so that a redirected sys.stderr is respected.

    Unless told otherwise, only the first of several processes prints. In a notebook, lines stay lines instead of one
    table each.
    """
    from rich.console import Console

    quiet = settings.process_rank() > 0 if quiet is None else quiet
    return Console(stderr=True, highlight=False, emoji=False, soft_wrap=True, quiet=quiet, force_jupyter=False)


def printable(text: str) -> str:
    """The text without control characters: a document or a file name could hold commands for the terminal.

    Joiners stay, which Persian, Hindi and emoji are written with.
    """
    return "".join(letter if letter.isprintable() or letter in "\n\t\u200c\u200d" else " " for letter in text)


def note(text: str) -> None:
    """Prints a line on stderr."""
    stderr().print(f"  {printable(text)}", markup=False)


def say(text: str) -> None:
    """Prints a line on stdout."""
    print(printable(text), flush=True)


def json_line(value: object) -> str:
    """The value as JSON on one line, with every character escaped that is not printable."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return "".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in text)


@contextlib.contextmanager
def step(steps: tuple[str, ...], name: str) -> Iterator[None]:
    """Prints `[2/4] Model Setup` before the block, and its duration after it."""
    console = stderr()
    console.print(f"\n[bold cyan]\\[{steps.index(name) + 1}/{len(steps)}] {name}[/]")
    started = time.perf_counter()
    yield
    console.print(f"  [dim]{name}: {time.perf_counter() - started:.1f} s[/]")


def print_settings(
    title: str, args: argparse.Namespace, argv: list[str], parser: argparse.ArgumentParser, chosen: tuple[str, ...]
) -> None:
    """What the command line sets and what was `chosen` for it, as an aligned list on stderr; --verbose: all."""
    words = {word.partition("=")[0] for word in argv}
    flags = parser._actions
    given = {a.dest for a in flags if args.verbose or not a.option_strings or words & set(a.option_strings)}
    shown = {name: value for name, value in vars(args).items() if name in {*given, *chosen}}
    console = stderr()
    console.print(f"\n[bold]{title}[/]")
    if line := settings.describe_dotenv():
        note(line)
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        console.print(f"  {name.replace('_', ' '):<{width}}  {printable(show_value(value))}", markup=False)


def show_value(value: object) -> str:
    """A setting as people write it: a path relative to the current folder where it lies in it."""
    if isinstance(value, list | tuple):
        return " ".join(map(show_value, value))
    path = Path(value) if isinstance(value, Path) or str(value).startswith("/") else None
    return str(path.relative_to(Path.cwd())) if path and path.is_relative_to(Path.cwd()) else str(value)


def progress():
    """A rich progress bar on stderr: description, bar, count, rate (where there is room), elapsed time, time left."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    class Rate(ProgressColumn):
        def render(self, task) -> str:
            speed = task.completed / task.elapsed if task.finished and task.elapsed else task.speed
            said = "/s" in task.description  # training names its own
            return f"{speed:,.1f}/s" if speed and not said else ""

    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *([Rate()] if stderr().width >= WIDE else []),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=stderr(),
    )


def shorten_text(text: str, width: int = 80) -> str:
    """The text on one line of at most `width` characters, without control characters."""
    line = " ".join(printable(text).split())
    return line if len(line) <= width else line[: width - 1] + "…"
