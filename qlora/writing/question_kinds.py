"""Kinds of questions by the words that they begin with, and what an answer of each kind has.

kind_of_question("How many berths has N2?")      # "how many"
fits("How many berths has N2?", "on Mondays")    # False
"""

import re

from qlora.answering.citations import content_words
from qlora.words import WORD


def words_of(text: str) -> frozenset[str]:
    return frozenset(text.split())


AUXILIARIES = words_of("is are was were am do does did can could may might must should would will has have had")
KINDS = {
    "yes/no": AUXILIARIES,
    **{word: {word} for word in ("who", "when", "where", "why", "which", "what")},
    "list": {"name", "list"},
}
BEFORE = words_of("in by on at to for from since until about")  # before the word that asks
OPENERS = AUXILIARIES | words_of(
    "who whose whom when where why which what how name list give state explain describe tell if in at on to for "
    "from by under with during after before until about of up between through within against whether since as"
)
COUNTS = words_of(
    "no none zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand "
    "million billion half third quarter dozen once twice thrice both all each every few several many most only "
    "single double pair couple a an nothing free majority minority"
)
TIMES = words_of(
    "january february march april may june july august september october november december monday tuesday "
    "wednesday thursday friday saturday sunday spring summer autumn winter morning noon midday afternoon evening "
    "night midnight dawn dusk sunrise sunset second minute hour day week weekend month quarter year decade "
    "century before after until unless till when whenever while once as if during since at within upon daily "
    "weekly monthly yearly now today tomorrow yesterday immediately tide never always easter christmas age period "
    "first last date"
)
MEASURES = words_of("many much long old far often")
WHEN = re.compile(
    r"^\W*((since|until|till|by|from) )?when (is|are|was|were|do|does|did|can|may|must|should|will|has|have|had)\b"
    r"|\b(what|which) (year|day|date|month|time|hour|century|decade)\b",
    re.IGNORECASE,
)
HOW_MANY = re.compile(r"\bhow (many|much|old|far|tall|high|deep|wide|heavy|large|big)\b", re.IGNORECASE)
UNIT = re.compile(r"\bhow many (?:more |other |different )?\w{3,}", re.IGNORECASE)
WHO = re.compile(r"^(who|whom|whose|to whom|by whom)\b", re.IGNORECASE)
PREPOSITIONS = words_of("in at on from for with through into under over because since as during after until if")


def kind_of_question(question: str) -> str:
    """who, when, where, why, which, what, how many, how, yes/no, list, or other."""
    words = [word.lower() for word in WORD.findall(question)]
    if "how" in words[:3]:
        after = words[words.index("how") + 1 :][:1]
        return "how many" if MEASURES.intersection(after) else "how"
    first = next((word for word in words if word in OPENERS - BEFORE), "")
    return next((kind for kind, openers in KINDS.items() if first in openers), "other")


def fits(question: str, answer: str) -> bool:
    """Whether the answer has a number or a time where the question asks for one, and is no place where it asks who.

    "How many people" is not answered by "8,000 crowns". Of answers that people wrote, 1 in 100 does not fit.
    """
    words = [word.lower() for word in WORD.findall(answer)]
    has_digit = any(word[0].isdigit() for word in words)
    if HOW_MANY.search(question):
        counted = {word for word in content_words(answer) if not word[0].isdigit() and word not in COUNTS}
        is_of_another = len(counted) == 1 and not any(word[:4] in question.lower() for word in counted)
        return (has_digit or not COUNTS.isdisjoint(words)) and not (UNIT.search(question) and is_of_another)
    if WHEN.search(question):
        return has_digit or not TIMES.isdisjoint({*words, *(word.rstrip("s") for word in words)})
    return not (WHO.search(question) and words and words[0] in PREPOSITIONS)
