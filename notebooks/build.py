#!/usr/bin/env python
"""Builds the notebooks: prose from the Markdown beside this file, code from the scripts, outputs from a real run.

    python notebooks/build.py            # expand, execute, write (about ten minutes on two cores)
    python notebooks/build.py --small    # execute a small slice, write nothing
    python notebooks/build.py --check    # are the committed notebooks those of today's scripts? (seconds, no kernel)

A line `# source: instruct_train_qlora.load_model` in a code cell is followed by that function's source, and one that
names a module by its imports and constants; `<!-- source: qlora.prompt.encode_row -->` in the text becomes a block to
read. `NAME.md` steps through the script NAME.py, where there is one: its numbered headings are the script's STEPS, and
it calls the step functions in the order of main().
"""

import ast
import itertools
import re
import sys
import tempfile
import textwrap
from pathlib import Path

from qlora import console

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parent

MARK = re.compile(r"(?P<code># source: (\S+))|<!-- source: (\S+) -->")
LIMIT = 1_000_000  # bytes a notebook; GitHub shows no large ones
SMALL = "SMALL = False", "SMALL = True"
NOT_STEPPED = {"chat", "write"}  # a chat wants a person; what writes is another model, loaded by main()


def main(argv: list[str]) -> int:
    args, problems = console.parse_arguments(build_parser(), argv)
    problems.raise_if_any()
    for prose in sorted(FOLDER.glob("*.md")):
        if args.names and prose.stem not in args.names:
            continue
        if args.check:
            check(prose, problems)
        else:
            build(prose, args.small)
    problems.raise_if_any()
    return 0


def build_parser():
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="build.py [flags] [NAME ...]", description=title, epilog=text)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a notebook (all)")
    parser.add_argument("--small", action="store_true", help="execute a small slice, write nothing")
    parser.add_argument("--check", action="store_true", help="compare the committed notebooks with the scripts")
    return parser


# ------------------------------------------------------------------------------- expand


def read_prose(path: Path):
    """The notebook of a Markdown file, its sources expanded."""
    import jupytext

    notebook = jupytext.read(path)
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{path.stem.replace('_', '-')}-{number}"
        cell.source = "\n".join(map(expand, cell.source.splitlines()))
    return notebook


def expand(line: str) -> str:
    mark = MARK.fullmatch(line)
    if not mark:
        return line
    source = find_source(mark[2] or mark[3])
    return f"{line}\n{source}" if mark["code"] else f"```python\n{source}\n```"


def find_source(name: str) -> str:
    """The source of a function or class as it stands in the file; the imports and constants at a module's top."""
    parts = name.split(".")
    count = next(n for n in range(len(parts), 0, -1) if PROJECT.joinpath(*parts[:n]).with_suffix(".py").is_file())
    text = PROJECT.joinpath(*parts[:count]).with_suffix(".py").read_text(encoding="utf-8")
    inside = ast.parse(text).body
    if count == len(parts):
        top = itertools.takewhile(lambda node: not isinstance(node, ast.FunctionDef | ast.ClassDef), inside)
        wanted = [node for node in top if isinstance(node, ast.Import | ast.ImportFrom | ast.Assign)]
        return "\n".join(cut(text, node) for node in wanted)
    for part in parts[count:]:
        node = next(node for node in inside if getattr(node, "name", None) == part)
        inside = node.body
    return cut(text, node)


def cut(text: str, node: ast.stmt) -> str:
    """The lines of a statement with its decorators."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return textwrap.dedent("\n".join(text.splitlines()[first - 1 : node.end_lineno]))


# ------------------------------------------------------------------------------- execute


def build(prose: Path, small: bool) -> None:
    """Executes the notebook from the project's folder, and writes it unless it is small."""
    import nbformat
    from jupyter_client import AsyncKernelManager
    from nbclient import NotebookClient

    notebook = read_prose(prose)
    if small:
        for cell in notebook.cells:
            cell.source = cell.source.replace(*SMALL)
    codes = sum(cell.cell_type == "code" for cell in notebook.cells)
    with console.progress() as bar, tempfile.TemporaryDirectory(prefix="kernel-") as sockets:
        task = bar.add_task(prose.stem, total=codes)
        client = NotebookClient(
            notebook,
            # No port that others could reach.
            km=AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/ipc"),
            timeout=None,
            record_timing=False,
            resources={"metadata": {"path": str(PROJECT)}},
            on_cell_executed=lambda **_: bar.advance(task),
        )
        client.execute()
    for cell in notebook.cells:
        clean(cell)
    if not small:
        nbformat.write(notebook, prose.with_suffix(".ipynb"))


def clean(cell) -> None:
    """Joins what was printed, on stdout and stderr, as a terminal shows it; without the places of this machine."""
    if cell.cell_type != "code":
        return
    joined = []
    for output in cell.outputs:
        if "text/plain" in output.get("data", {}):
            output.data["text/plain"] = without_places(output.data["text/plain"])
        if output.output_type == "stream":
            output.text = without_places(output.text)
            output.name = "stdout"
            if joined and joined[-1].output_type == "stream":
                joined[-1].text += output.text
                continue
        joined.append(output)
    cell.outputs = joined


def without_places(text: str) -> str:
    return text.replace(f"{PROJECT}/", "").replace(str(PROJECT), ".").replace(str(Path.home()), "~")


# ------------------------------------------------------------------------------- check


def check(prose: Path, problems: console.Problems) -> None:
    """Adds whatever the committed notebook does not have in common with today's Markdown and script."""
    import nbformat

    fix = "run: make notebooks"
    path = prose.with_suffix(".ipynb")
    if not path.is_file():
        problems.add("there is no notebook", str(path), fix)
        return
    wanted, found = read_prose(prose), nbformat.read(path, as_version=4)
    pairs = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (wanted, found)]
    if pairs[0] != pairs[1]:
        at = next((n for n, (a, b) in enumerate(zip(*pairs, strict=False)) if a != b), min(map(len, pairs)))
        problems.add(f"cell {at} is not what Markdown and script say", path.name, fix)
    codes = [cell for cell in found.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in codes] != list(range(1, len(codes) + 1)):
        problems.add("the cells were not executed once each, in order", path.name, fix)
    outputs = [output for cell in codes for output in cell.outputs]
    if any(output.output_type == "error" for output in outputs):
        problems.add("a cell failed", path.name, fix)
    for place in (str(PROJECT), str(Path.home())):
        if any(place in str(output) for output in outputs):
            problems.add("an output holds a path of a machine", path.name, "print less, or a relative path")
    if path.stat().st_size > LIMIT:
        problems.add(f"{path.stat().st_size / 1e6:.1f} MB", path.name, f"keep it below {LIMIT / 1e6:.0f} MB")
    if (PROJECT / f"{prose.stem}.py").is_file():
        check_steps(prose.stem, wanted, problems)


def check_steps(script: str, notebook, problems: console.Problems) -> None:
    """Adds headings that are not the script's STEPS, and step functions called otherwise than in the script's steps."""
    tree = ast.parse((PROJECT / f"{script}.py").read_text(encoding="utf-8"))
    constants = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    steps = ast.literal_eval(constants["STEPS"])
    prose = [line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    headings = [line.split(". ", 1)[1] for line in prose if line.startswith("## ") and line[3].isdigit()]
    if headings != list(steps):
        problems.add(f"the numbered headings are {headings}", f"{script}.md", f"write {list(steps)}")
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.With) and "console.step(" in ast.unparse(node)]
    wanted = [name for name in called(blocks) if name in functions and name not in NOT_STEPPED]
    cells = [ast.parse(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    code = [node for cell in cells for node in cell.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    order = [name for name in called(code) if name in wanted]
    if order != wanted:
        problems.add(f"the steps are called as {order}", f"{script}.md", f"the script calls {wanted}")


def called(nodes: list[ast.AST]) -> list[str]:
    """Names of the functions that are called, in the order of their first call."""
    names = []
    for node in nodes:
        calls = [call for call in ast.walk(node) if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)]
        names += [call.func.id for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset))]
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    sys.exit(console.run(main))
