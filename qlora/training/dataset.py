"""Rows of an instruction dataset: load, validate, filter, split, add distractors, tokenise.

A row has `instruction`, `response` and optionally `context`, `category` and `source` (the document
its context comes from): the columns of databricks-dolly-15k and one more.
"""

import csv
import difflib
import hashlib
import json
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from qlora.console import Problems, fail
from qlora.prompt import Prompt, defuse, encode_row, fit_passages
from qlora.training.row_filters import (
    CITATIONS,
    COLUMNS,
    REQUIRED,
    Dropped,
    Selection,
    answer_span,
    is_refusal,
    limit_refusals,
    normalize,
    pad_words,
    reason_to_drop,
    sample_rows,
)

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
FIRST = 0.75  # of the contexts stand first: the best passage of a search is the right one about so often
TEMPLATE = 5  # contexts from which on an instruction is a task for any text ("Summarise this"), no question


@dataclass(frozen=True)
class Row:
    """One question with its right response; `passages` is what the model sees, `context` what answers it."""

    instruction: str
    response: str
    context: str = ""
    category: str = ""
    source: str = ""
    passages: tuple[str, ...] = ()

    @property
    def document(self) -> str:
        """What keeps rows together when a share is held out: the document, else the context, else the row."""
        return self.source or self.context or self.instruction

    @property
    def subject(self) -> str:
        """What related documents share: the folder of `source`, else the category."""
        return self.source.rpartition("/")[0] or self.category


# ------------------------------------------------------------------------------- load


def load_rows(source: str, columns: dict[str, str] | None = None) -> list[Row]:
    """All rows of a file (.json, .jsonl, .csv, .parquet) or of the train split of a hub dataset.

    `columns` maps our names to the dataset's. Raises UserError for a missing file, an unknown type, a
    line that is no JSON, a column that is not there, cells that are no text, and an empty dataset.
    """
    path = Path(source)
    is_file = path.exists() or path.suffix in BUILDERS or path.is_absolute()
    table = load_file(path) if is_file else load_from_hub(source)
    if len(table) == 0:
        raise fail("the dataset has no rows", source, "give a dataset with at least two rows")
    names = map_columns(table.column_names, columns or {}, source)
    check_cells(table, names, source)
    return [
        Row(**{ours: (row[theirs] or "").strip() for ours, theirs in names.items()})
        for row in table.select_columns(list(names.values()))
    ]


def load_file(path: Path):
    """A datasets.Dataset of the file's rows."""
    if not path.is_file():
        raise fail("dataset file not found", str(path), "check the path")
    if path.suffix not in BUILDERS:
        known = ", ".join(BUILDERS)
        raise fail(f"unknown dataset type {path.suffix or '(none)'}", str(path), f"give one of {known}")
    if path.stat().st_size == 0:
        raise fail("the dataset has no rows", str(path), "give a dataset with at least two rows")
    if path.suffix == ".jsonl":
        check_json_lines(path)
    import datasets

    try:
        options = csv_options(path) if path.suffix == ".csv" else {}
        return datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        if "no data" in cause:
            raise fail("the dataset has no rows", str(path), "give a dataset with at least two rows") from error
        raise fail(f"unreadable dataset ({cause})", str(path), "mend the file, or convert it to JSON Lines") from error


def csv_options(path: Path) -> dict:
    """Options that read every cell of a CSV file as the text it is: 27 stays "27", and NA "NA"."""
    import datasets

    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file), [])
    return {"features": datasets.Features(dict.fromkeys(names, datasets.Value("string"))), "keep_default_na": False}


def check_json_lines(path: Path) -> None:
    """Raises UserError that names every line (the first five) that is no JSON object with text cells."""
    problems = Problems()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                problems.add(f"not JSON ({error})", f"{path}:{number}", "mend or remove the line")
                continue
            if not isinstance(row, dict):
                problems.add("not a JSON object", f"{path}:{number}", "write one object with named columns a line")
                continue
            for name in REQUIRED:
                if name in row and not isinstance(row[name], str | None):
                    found = type(row[name]).__name__
                    problems.add(f"{name} is no text but {found}", f"{path}:{number}", "put the text in quotes")
            if len(problems.found) >= 5:
                break
    problems.raise_if_any()


def load_from_hub(name: str):
    """The train split of a hub dataset."""
    import datasets

    try:
        return datasets.load_dataset(name, split="train")
    except (OSError, ValueError) as error:  # DatasetNotFoundError, also of a gated dataset, is an OSError
        raise fail(
            f"dataset {name} cannot be loaded ({str(error).strip().splitlines()[0][:160]})",
            "--dataset",
            "check the name and the network (gated? set HF_TOKEN), or give a .jsonl, .json, .csv or .parquet file",
        ) from error


def map_columns(present: Sequence[str], columns: dict[str, str], source: str) -> dict[str, str]:
    """Our column names -> the dataset's. A name that is not there is an error with the nearest one."""
    problems = Problems()
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            problems.add(f"unknown column {ours}", "--columns", f"the names to map are {', '.join(COLUMNS)}")
        elif theirs not in present:
            problems.add(f"the dataset has no column {theirs}", source, suggest_column(theirs, present, ours))
    names = {name: columns.get(name, name) for name in COLUMNS if columns.get(name, name) in present}
    for name in REQUIRED:
        if name not in names and name not in columns:
            problems.add(f"the dataset has no column {name}", source, suggest_column(name, present, name))
    problems.raise_if_any()
    return names


def suggest_column(wanted: str, present: Sequence[str], ours: str) -> str:
    nearest = difflib.get_close_matches(wanted, present, n=1, cutoff=0.5)
    hint = f"--columns {ours}={nearest[0]}" if nearest else f"map one with --columns {ours}=NAME"
    return f"{hint} (it has {', '.join(present)})"


def check_cells(table, names: dict[str, str], source: str) -> None:
    """Raises UserError for columns whose cells are not text."""
    problems = Problems()
    for ours, theirs in names.items():
        kind = getattr(table.features[theirs], "dtype", "a list")
        if kind not in ("string", "large_string", "null"):
            problems.add(f"column {theirs} holds {kind}, not text", source, f"give {ours} as text")
    problems.raise_if_any()


# ------------------------------------------------------------------------------- filter, split


EVERY_ROW = Selection()


def keep_usable(rows: Sequence[Row], selection: Selection = EVERY_ROW, seed: int = 0) -> tuple[list[Row], Dropped]:
    """The rows that pass, in their order, and how many were dropped for which reason, with examples.

    Rows with an empty instruction or response and repeated rows go too; `seed` decides which rows stay
    within `max_rows`. Raises UserError when nothing is left.
    """
    passed: dict[Row, None] = {}
    dropped = Dropped()
    for row in rows:
        reason = reason_to_drop(row, selection) or ("duplicate" if row in passed else "")
        if reason:
            dropped.add(reason, row)
        else:
            passed[row] = None
    if not passed:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise fail("no row is left after filtering", reasons, "loosen --filter or give other rows")
    limited = limit_refusals(list(passed), selection.refusal_share, seed)
    kept = sample_rows(limited, selection.max_rows, seed)
    for reason, rows, chosen in (("--refusal-share", passed, set(limited)), ("--max-rows", limited, set(kept))):
        for row in rows:
            if row not in chosen:
                dropped.add(f"over {reason}", row)
    return kept, dropped


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows and evaluation rows without a document in common; about `share` of the rows are held out.

    Raises UserError when all rows come from one document.
    """
    by_document = defaultdict(list)
    for row in rows:
        by_document[row.document].append(row)
    if len(by_document) < 2:
        raise fail("all rows come from one document", "dataset", "give rows of two documents, to hold one out")
    documents = sorted(by_document)
    random.Random(seed).shuffle(documents)
    held: set[str] = set()
    count = 0
    for document in documents[:-1]:
        if count >= share * len(rows):
            break
        held.add(document)
        count += len(by_document[document])
    training = [row for row in rows if row.document not in held]
    return training, [row for row in rows if row.document in held]


def drop_leaked(training: Sequence[Row], held_out: Sequence[Row]) -> tuple[list[Row], Dropped]:
    """Training rows whose question and context no held-out row has, and what was dropped.

    `hold_out` keeps documents apart, but two documents may share a paragraph, or answer one question.
    Compared are whole words (`normalize`). An instruction for any text ("Summarise this"), which stands
    with `TEMPLATE` contexts or more, is no question. Raises UserError when no training row is left.
    """
    contexts_of = defaultdict(set)
    for row in [*training, *held_out]:
        contexts_of[normalize(row.instruction)].add(normalize(row.context))
    templates = {question for question, contexts in contexts_of.items() if len(contexts) >= TEMPLATE}
    questions = {normalize(row.instruction) for row in held_out} - templates - {""}
    contexts = {normalize(row.context) for row in held_out} - {""}
    kept, dropped = [], Dropped()
    for row in training:
        if normalize(row.instruction) in questions:
            dropped.add("question also held out", row)
        elif normalize(row.context) in contexts:
            dropped.add("context also held out", row)
        else:
            kept.append(row)
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise fail("no training row is left apart from the held-out ones", reasons, "give rows of more documents")
    return kept, dropped


# ------------------------------------------------------------------------------- shape


@dataclass(frozen=True)
class Contexts:
    """Where distractors come from: all contexts, in pools, and what they must not hold."""

    place: dict[str, tuple[str, str]]  # context -> its subject and document
    by_document: dict[str, list[str]]
    by_subject: dict[str, list[str]]
    everything: list[str]
    words: dict[str, str]  # context -> its padded words
    answers: dict[str, set[str]]  # normalised question -> padded words of its answers


@dataclass(frozen=True)
class Sets:
    """Every context in one set of neighbours, which are shown together."""

    own: dict[str, list[str]]  # context -> its set, itself included
    next: dict[str, list[str]]  # context -> the set after that, where its questions have no answer
    rank: dict[str, float]  # context -> what passages are sorted by
    first: set[str]  # contexts that come before all others when they are asked about


def gather_contexts(rows: Sequence[Row], refusal: str) -> Contexts:
    """The contexts of the rows in sorted pools, so that the order of the rows doesn't matter."""
    places, words, answers = defaultdict(set), {}, defaultdict(set)
    by_document, by_subject = defaultdict(set), defaultdict(set)
    for row in rows:
        if row.context:
            places[row.context].add((row.subject, row.document))
            by_document[row.document].add(row.context)
            by_subject[row.subject].add(row.context)
            words[row.context] = words.get(row.context) or pad_words(row.context)
        if not is_refusal(row.response, refusal):
            answers[normalize(row.instruction)].add(pad_words(answer_span(row.response)))
    pools = ({name: sorted(texts) for name, texts in pool.items()} for pool in (by_document, by_subject))
    return Contexts({text: min(found) for text, found in places.items()}, *pools, sorted(words), words, answers)


def draw_sets(contexts: Contexts, largest: int, seed: int) -> Sets:
    """The contexts in random sets of one to `largest` neighbours: of one document or subject where these have so many.

    Of all sizes, so that the model learns to answer from a single passage, too.
    """
    chance = random.Random(seed)
    names = sorted({name for place in contexts.place.values() for name in place})
    order = {name: chance.random() for name in [*names, *contexts.everything]}
    texts = sorted(contexts.everything, key=lambda text: [order[name] for name in (*contexts.place[text], text)])
    rest, sets = iter(texts), []
    while one := list(islice(rest, chance.randint(1, largest))):
        sets.append(one)
    own = {text: one for one in sets for text in one}
    after = {text: sets[(n + 1) % len(sets)] for n, one in enumerate(sets) for text in one}
    rank = {text: chance.random() for text in texts}
    return Sets(own, after, rank, {text for text in texts if chance.random() < FIRST})


def add_distractors(rows: Sequence[Row], count: int, gold_probability: float, prompt: Prompt, seed: int) -> list[Row]:
    """Rows with passages as retrieval gives them: the context among up to `count` others, mostly before them.

    Others are neighbours: of the same document or subject where these have so many, and never hold the answer.
    Rows about one context share their passages wherever that is possible, so that training computes them once
    (packing). With probability 1 - `gold_probability` the context is left out and the right response is the
    refusal (RAFT, arXiv 2403.10131: training on distractors is what makes tuning help retrieval). Other
    responses end in the citation of the context. Depends on the row, the contexts of all rows and the
    seed alone. Rows without context are left as they are.
    """
    contexts = gather_contexts(rows, prompt.refusal)
    sets = draw_sets(contexts, count + 1, seed)
    given = contexts, sets, gold_probability, prompt.refusal, seed
    return [shape_row(row, *given) if row.context else row for row in rows]


def shape_row(row: Row, contexts: Contexts, sets: Sets, gold_probability: float, refusal: str, seed: int) -> Row:
    """One row of `add_distractors`."""
    chance = random.Random(hashlib.sha256(f"{seed}\n{row.instruction}\n{row.context}".encode()).digest())
    refused = is_refusal(row.response, refusal)
    keeps_gold = refused or chance.random() < gold_probability
    # As many passages with the right one as without it: their number must not give the refusal away.
    near = sets.own[row.context] if keeps_gold else sets.next[row.context]
    others = pick_distractors(row, contexts, near, len(near) - keeps_gold, refusal, chance)
    keeps_gold |= not others
    lead = row.context if keeps_gold else near[0]
    passages = [row.context, *others] if keeps_gold else others
    passages.sort(key=lambda text: (text != lead or lead not in sets.first, sets.rank[text]))
    if refused or not keeps_gold:
        return replace(row, passages=tuple(passages), response=refusal)
    cited = f"{CITATIONS.sub('', row.response)} [{passages.index(row.context) + 1}]"
    return replace(row, passages=tuple(passages), response=cited)


def pick_distractors(
    row: Row, contexts: Contexts, near: list[str], count: int, refusal: str, chance: random.Random
) -> list[str]:
    """Up to `count` contexts without the answer: those `near`, then from the nearest pool that has some.

    Of a large pool only 8 * count + 8 random contexts are looked at, so that time grows with the rows, not
    with their square. What another row answers to the same question is an answer, too: a refusal has no
    other. A bare "Yes" leaves no words to look for: two spaces stand in no context's words.
    """
    own = set() if is_refusal(row.response, refusal) else {pad_words(answer_span(row.response))}
    same_question = contexts.answers.get(normalize(row.instruction), set())
    answers = own | same_question if len(same_question) < TEMPLATE else own
    seen = {contexts.words[row.context]}
    picked: list[str] = []
    for pool in (near, contexts.by_document[row.document], contexts.by_subject[row.subject], contexts.everything):
        for text in pool if pool is near else chance.sample(pool, min(len(pool), 8 * count + 8)):
            if len(picked) == count:
                return picked
            words = contexts.words[text]
            if words not in seen and not any(answer in words for answer in answers):
                seen.add(words)
                picked.append(text)
    return picked


@dataclass(frozen=True)
class Example:
    """A tokenised row: `labels` equals `input_ids` where there is loss and is -100 elsewhere.

    Rows of one `group` have the same passages, or none.
    """

    input_ids: list[int]
    labels: list[int]
    group: int = 0


def tokenize_rows(
    tokenizer, prompt: Prompt, rows: Sequence[Row], max_length: int
) -> tuple[list[Example], dict[str, int]]:
    """Examples of at most `max_length` tokens, and how many rows were shortened or were too long.

    Only passages are shortened, the one with the answer last and around it; a row whose instruction
    and response alone exceed `max_length` is left out.
    """
    examples = []
    counts = {"shortened": 0, "too long": 0}
    groups = {}
    for row in rows:
        group = groups.setdefault(row.passages, len(groups))
        instruction, response = defuse(tokenizer, row.instruction), defuse(tokenizer, row.response)
        passages = [defuse(tokenizer, text) for text in row.passages]
        input_ids, labels = encode_row(tokenizer, prompt.messages(instruction, passages), response)
        if len(input_ids) > max_length and passages:
            trained = sum(label >= 0 for label in labels)
            gold = row.passages.index(row.context) if row.context in row.passages else None
            budget = max_length - trained
            passages = fit_passages(
                tokenizer, prompt, instruction, passages, budget, last=gold, keep=answer_span(response)
            )
            input_ids, labels = encode_row(tokenizer, prompt.messages(instruction, passages), response)
            counts["shortened"] += len(input_ids) <= max_length
        if len(input_ids) > max_length:
            counts["too long"] += 1
        else:
            examples.append(Example(input_ids, labels, group))
    if not examples:
        raise fail("every row is too long", f"--max-length {max_length}", "raise --max-length")
    return examples, counts


def batch_groups(groups: Sequence[int], size: int, seed: int) -> list[list[int]]:
    """Row numbers in batches of at most `size` in random order; rows of a group come together, as far as they fit.

    `groups` are those of the rows.
    """
    members = defaultdict(list)
    for number, group in enumerate(groups):
        members[group].append(number)
    chance = random.Random(seed)
    parts = []
    for numbers in members.values():
        chance.shuffle(numbers)
        count = math.ceil(len(numbers) / size)  # of about equal length
        parts += [numbers[n::count] for n in range(count)]
    chance.shuffle(parts)
    batches = [[]]
    for part in parts:
        if len(batches[-1]) + len(part) > size:
            batches.append([])
        batches[-1] += part
    return batches
