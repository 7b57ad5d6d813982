"""Other passages around the right one, as retrieval gives them (RAFT, arXiv 2403.10131)."""

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from qlora.prompt import Prompt
from qlora.refusal import is_refusal
from qlora.training.row_filters import TEMPLATE
from qlora.training.rows import Row
from qlora.words import CITATIONS, answer_span, normalize, pad_words

FIRST = 0.75  # share of contexts that come first: the best passage of a search is right about that often


@dataclass(frozen=True)
class Contexts:
    """The contexts of all rows in pools, from which distractors are drawn, and the answers that those must not hold."""

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
    places, words = defaultdict(set), {}
    by_document, by_subject = defaultdict(set), defaultdict(set)
    for row in rows:
        if row.context:
            places[row.context].add((row.subject, row.document))
            by_document[row.document].add(row.context)
            by_subject[row.subject].add(row.context)
            words[row.context] = words.get(row.context) or pad_words(row.context)
    pools = ({name: sorted(texts) for name, texts in pool.items()} for pool in (by_document, by_subject))
    place = {text: min(found) for text, found in places.items()}
    return Contexts(place, *pools, sorted(words), words, gather_answers(rows, refusal))


def gather_answers(rows: Sequence[Row], refusal: str) -> dict[str, set[str]]:
    """The padded words of all answers to each normalised question."""
    answers = defaultdict(set)
    for row in rows:
        if not is_refusal(row.response, refusal):
            answers[normalize(row.instruction)].add(pad_words(answer_span(row.response)))
    return answers


def draw_sets(contexts: Contexts, largest: int, seed: int) -> Sets:
    """The contexts in random sets of one to `largest` neighbours: of one document or subject where these have so many.

    Sets of all sizes, so that the model also learns to answer from a single passage.
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

    The others are neighbours, of the same document or subject where these have enough, and never hold the answer.
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
    # Equally many passages with and without the right one: their number must not give the refusal away.
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

    Only 8 * count + 8 random contexts of a large pool are checked, so that time grows with the rows, not with
    their square. Another row's answer to the same question counts as an answer as well. A bare "Yes" has no words
    to search for: two spaces are in no context's words.
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
