"""The rules of the project itself: layout, budgets, settings, dependencies, sample data."""

import ast
import graphlib
import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, SAMPLE, sample_rows

import improve_qlora
import instruct_train_qlora
import rag_qlora
from benchmarks import (
    ablation,
    binary_vectors,
    corpus,
    formats,
    gpu_check,
    ingest_processes,
    ingest_speed,
    languages,
    recipe_search,
    retrieval_speed,
    train_speed,
    written_rows,
)
from qlora import settings
from qlora.cli import rag_flags, training_flags

SCRIPTS = (instruct_train_qlora, rag_qlora)
# For users.
BENCHMARKS = (recipe_search, ablation, gpu_check, train_speed, corpus, formats, ingest_speed, languages, written_rows)
BENCHMARKS += (binary_vectors, ingest_processes, retrieval_speed)
MODULES = sorted((PROJECT / "qlora").rglob("*.py"))
CODE = [*MODULES, *(Path(script.__file__) for script in SCRIPTS)]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node: ast.AST) -> set[str]:
    names = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            names |= {alias.name.split(".")[0] for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            names.add(child.module.split(".")[0])
    return names


NAMED_BY_LIBRARIES = {"from_texts", "attend"}  # with the parameters that LangChain and transformers give them
# Each may use those before it.
ROOMS = ("reading", "model", "retrieval", "answering", "evaluation", "training", "writing", "releasing")
ROOMS += ("serving", "cli")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts)


def uses(path: Path) -> set[str]:
    """The modules of qlora/ that a file imports, wherever in it."""
    names = {module_name(module) for module in MODULES}
    found = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom)]
    full = {f"{node.module}.{alias.name}" for node in found for alias in node.names} | {node.module for node in found}
    return full & names


def floor(name: str) -> int:
    parts = name.split(".")
    return 1 + ROOMS.index(parts[1]) if len(parts) == 3 else 0


# ------------------------------------------------------------------------------- layout


def test_rooms_use_only_the_rooms_below_them():
    assert {path.name for path in (PROJECT / "qlora").iterdir() if path.is_dir()} - {"__pycache__"} == set(ROOMS)
    for path in MODULES:
        above = [name for name in uses(path) if floor(name) > floor(module_name(path))]
        assert not above, f"{path} imports {above}"


def test_modules_import_each_other_in_no_circle():
    order = graphlib.TopologicalSorter({module_name(path): uses(path) for path in MODULES})
    assert len(list(order.static_order())) == len(MODULES)  # a CycleError names the circle


def test_scripts_import_no_script_and_modules_import_no_script():
    names = {Path(script.__file__).stem for script in SCRIPTS}
    for path in CODE:
        assert not imports(tree(path)) & names, path


def test_scripts_import_nothing_heavy_at_the_top():
    for script in SCRIPTS:
        body = tree(Path(script.__file__)).body
        top = imports(ast.Module([node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]))
        assert top - {"qlora"} <= sys.stdlib_module_names


def test_budgets_of_files_and_functions():
    lengths = []
    for path in CODE:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                lengths.append(node.end_lineno - node.lineno + 1)
                assert lengths[-1] <= 50, f"{path.name}: {node.name} has {lengths[-1]} lines"
                given = [arg.arg for arg in [*node.args.args, *node.args.kwonlyargs] if arg.arg not in ("self", "cls")]
                assert len(given) <= 6 or node.name in NAMED_BY_LIBRARIES, f"{path.name}: {node.name} takes {given}"
    assert statistics.median(lengths) <= 14


def test_public_functions_of_modules_have_docstrings():
    for path in MODULES:
        for node in tree(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.end_lineno - node.lineno > 6:
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_step_names_are_the_same_everywhere(script):
    text = Path(script.__file__).read_text(encoding="utf-8")
    banners = re.findall(r"^# =+ (.+)$", text, re.M)
    assert tuple(banners[:4]) == script.STEPS and banners[4:] in ([], ["Command line"])
    for name in script.STEPS:
        assert f'console.step(STEPS, "{name}")' in text
        assert name in PAGES["design.md"]


def test_only_settings_touches_the_environment():
    for path in CODE:
        if path.name != "settings.py":
            assert not re.search(r"\bos\.(environ|getenv|putenv)\b", path.read_text(encoding="utf-8")), path


def test_nothing_loads_remote_code_or_pickles():
    for path in CODE:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"trust_remote_code\W+True|pickle|torch\.load|shell=True", text), path


def test_every_line_to_a_terminal_passes_console():
    for path in CODE:
        calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        names = {call.id for call in calls if isinstance(call, ast.Name)}
        written = {ast.unparse(call) for call in calls if isinstance(call, ast.Attribute) and call.attr == "write"}
        if path.name != "console.py":
            assert "print" not in names and not written & {"sys.stdout.write", "sys.stderr.write"}, path


# ------------------------------------------------------------------------------- settings, dependencies


def test_env_example_lists_every_setting_and_nothing_else():
    lines = (PROJECT / ".env.example").read_text(encoding="utf-8").splitlines()
    assert [line.split("=")[0] for line in lines if "=" in line and not line.startswith("#")] == list(settings.KEYS)
    read = {key for path in CODE for key in re.findall(r'settings\.get\("(\w+)"\)', path.read_text(encoding="utf-8"))}
    read |= set(re.findall(r'\bget\("(\w+)"\)', (PROJECT / "qlora/settings.py").read_text(encoding="utf-8")))
    assert read | {"HF_TOKEN"} == set(settings.KEYS)  # huggingface_hub itself reads HF_TOKEN


def pinned() -> dict[str, str]:
    """Package -> version of all three requirement files."""
    pins = {}
    for path in PROJECT.glob("requirements*.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split("#")[0].split()
            if words:
                name, version = words[0].split("==")
                pins[name] = version
    return pins


def test_every_pin_is_installed_and_used():
    files = [*CODE, *(PROJECT / "tests").glob("*.py"), PROJECT / "Makefile", PROJECT / "notebooks" / "build.py"]
    files += [PROJECT / "benchmarks" / "document_files.py", PROJECT / "pyproject.toml"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    behind = {  # what a library of ours uses for us
        "gguf": "gguf_file",
        "scikit-learn": "from sklearn",
        "python-multipart": "UploadFile",
        "python-dotenv": "import dotenv_values",
        "markdown-it-py": "import MarkdownIt",
        "python-docx": "import docx",
        "python-pptx": "from pptx import",
        "psycopg2-binary": "import psycopg2",
        "sentence-transformers": "HuggingFaceEmbeddings",
        "accelerate": "device_map",
        "ipykernel": '"kernelspec"',
        "pytest-xdist": "--dist loadfile",
        "pytest-timeout": "timeout = ",
        "pyyaml": "import yaml",
        "execnet": "PYTEST_XDIST",
    }
    for name, version in pinned().items():
        assert importlib.metadata.version(name).split("+")[0] == version, name
        assert behind.get(name, name.replace("-", "_")) in text, f"nothing uses {name}"


def test_nothing_names_this_machine():
    files = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        text = (PROJECT / name).read_text(encoding="utf-8", errors="replace")  # a picture, too
        assert not re.search(r"/wor[k]/|/roo[t]/|\.\./share[d]", text), name


# ------------------------------------------------------------------------------- README


PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")]
}


def parsers() -> list:
    """Of the scripts, each command of rag_qlora.py, and the benchmarks that users run."""
    commands = rag_flags.build_parser(rag_qlora.__doc__, rag_qlora.STEPS)[1]
    training = training_flags.build_parser(instruct_train_qlora.__doc__, instruct_train_qlora.STEPS)
    scripts = [script.build_parser() for script in (improve_qlora, *BENCHMARKS)]
    return [training, *commands.values(), *scripts]


def test_help_fits_a_screen_and_shows_no_path_of_this_machine(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for parser in parsers():
        text = parser.format_help()
        assert str(PROJECT) not in text and len(text.splitlines()) <= 75, parser.usage
        assert not re.search(r"\([^()]*\) \([^()]*\)$", text, re.M), f"a default twice: {parser.usage}"


@pytest.mark.parametrize("page", PAGES)
def test_docs_show_only_commands_and_flags_that_exist(page):
    text = PAGES[page]
    helps = {
        name: command.format_help()
        for name, command in rag_flags.build_parser(rag_qlora.__doc__, rag_qlora.STEPS)[1].items()
    }
    training = training_flags.build_parser(instruct_train_qlora.__doc__, instruct_train_qlora.STEPS).format_help()
    improving = improve_qlora.build_parser().format_help()
    benchmarks = "".join(script.build_parser().format_help() for script in BENCHMARKS)
    foreign = {"--enable-lora", "--build-arg", "--lora-modules", "--chat-template", "--check", "--port", "--write"}
    foreign |= {"--max-lora-rank", "--nnodes", "--quantization", "--shm-size"}
    flags = re.findall(r"(?<![\w-])--[a-z][a-z-]+(?![a-z_])", text)  # ours have no underscores, launchers' do
    for flag in set(flags) - foreign:
        assert flag in training + improving + benchmarks + "".join(helps.values()), flag
    for script, command, rest in re.findall(r"^\$ python (\w+)\.py ?(\w*)(.*)$", text, re.M):
        known = helps[command] if script == "rag_qlora" else improving if script == "improve_qlora" else training
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", rest.split("#")[0]):
            assert flag in known, f"{command} {flag}"
    targets = set(re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"(?:`|\$ )make ([\w-]+)", text)) <= targets


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_docs_lead_somewhere(page):
    folder = PROJECT if page == "README.md" else PROJECT / "docs"
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        if not path.startswith("http"):
            assert not path or (folder / path).exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.*)$", PAGES[Path(path).name if path else page], re.M)
                assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target


def test_the_readme_is_short_and_the_design_page_names_every_module():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120
    for path in (path for path in MODULES if path.name != "__init__.py"):
        assert path.stem in PAGES["design.md"], f"{path.name} has no gloss"


def test_the_reference_is_that_of_the_parsers():
    done = subprocess.run(
        [sys.executable, "tools/reference.py", "--check"], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------- sample data


def plain(text: str) -> str:
    return " ".join(text.lower().split())


def stands_in(answer: str, context: str) -> bool:
    """A span of the context, after "Yes," or "No," where the question asks for it."""
    span = re.sub(r"^(yes|no)\b[,.]?\s*", "", plain(answer)).rstrip(".")
    return span in plain(context)


def questions(name: str = "questions.jsonl") -> list[dict]:
    return [json.loads(line) for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines()]


def test_sample_documents():
    documents = list((SAMPLE / "documents").rglob("*.md"))
    assert len(documents) >= 40 and len({path.parent.name for path in documents}) >= 8
    for path in documents:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# ") and "\n## " in text and 150 <= len(text.split()) <= 500, path


def test_sample_rows():
    rows = sample_rows()
    assert len(rows) >= 420 and len({row["source"] for row in rows}) >= 30
    assert len({row["instruction"] for row in rows}) == len(rows)
    refused = [row for row in rows if row["category"] == "unanswerable"]
    assert 0.1 < len(refused) / len(rows) < 0.2
    for row in rows:
        document = (SAMPLE / "documents" / row["source"]).read_text(encoding="utf-8")
        assert row["context"] in document
        assert (row["response"] == "I don't know.") == (row["category"] == "unanswerable")
        assert row in refused or stands_in(row["response"], row["context"]), row
    kinds = ("who", "when", "how many", "why", "which", "where", "what", "how")
    assert all(sum(kind in row["instruction"].lower() for row in rows) >= 5 for kind in kinds)
    assert sum(row["response"].startswith(("Yes,", "No,")) for row in rows) >= 20


@pytest.mark.parametrize(
    ("name", "least", "documents"), [("questions.jsonl", 90, 12), ("second_questions.jsonl", 40, 6)]
)
def test_sample_questions_touch_no_document_of_the_rows(name, least, documents):
    rows, asked = sample_rows(), questions(name)
    assert len(asked) >= least and len({q["source"] for q in asked}) == documents
    assert not {q["source"] for q in asked} & {row["source"] for row in rows}
    assert not {plain(q["question"]) for q in asked} & {plain(row["instruction"]) for row in rows}
    assert 0.13 < sum(not q["answers"] for q in asked) / len(asked) < 0.2
    for q in asked:
        assert q["context"] in (SAMPLE / "documents" / q["source"]).read_text(encoding="utf-8")
        assert all(stands_in(answer, q["context"]) for answer in q["answers"]), q
        assert not q["answers"] or any(plain(a) not in ("yes", "no") for a in q["answers"]), q


def test_the_two_files_of_questions_share_no_document():
    first, second = ({q["source"] for q in questions(name)} for name in ("questions.jsonl", "second_questions.jsonl"))
    assert not first & second
