"""The words that a text is searched by: one function for passages and questions, so that both have the same ones.

    index_words("Error ERR-1042, see § 12 (3)")   # error err 1042 err1042 see 12 3 sign12 12sub3
    index_words("引航员须在到达前")                  # 引 引航 航 航员 ...

PostgreSQL stems them afterwards. Identifiers count as a whole and in their parts, so that ERR-1042, ERR 1042, ERR1042
and error 1042 find each other. Scripts without spaces between words give pairs of neighbouring characters, as
Lucene's CJKAnalyzer does.
"""

import hashlib
import re
from collections.abc import Iterator
from itertools import pairwise

from qlora.words import CHARACTER, MARKS, SPACELESS, unify

LETTERS = rf"[^\W_{SPACELESS}]+(?:[{MARKS}]+[^\W_{SPACELESS}]*)*"
# Between the parts of one name. A hyphen at a line's end may belong to the word or to the line.
JOINT = re.compile(r"[-\u2010\u2011]\n[ \t]*|[-\u2010\u2011._/@:+\\#&,]")
PIECE = re.compile(rf"(?P<run>[{SPACELESS}][{SPACELESS}{MARKS}]*)|{LETTERS}(?:(?:{JOINT.pattern}){LETTERS})*")
NUMBER = re.compile(r"v?(\d+(?:[.,:]\d+)+)")  # a version, an amount, a time, a date
THOUSANDS = re.compile(r"\d{1,3}(?:[.,]\d{3})+")
RUNS = re.compile(r"\d+|[^\W\d]+")  # of digits, of letters
PLACE = re.compile(r"(§+\s?)?(?<![^\W_])(\d+[a-z]?)((?:\s?\([0-9a-z]{1,3}\))*)(?![^\W_])")  # § 12 (3) (b)
SPACED = re.compile(r"(?<![^\W_])([A-Zb-z]) (\d+)(?![^\W_])")  # B 7; not: a 7 day trip
HANGUL = re.compile("[\uac00-\ud7af]")
HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
LONGEST, MOST_RUNS = 64, 5  # letters of a name as a whole; runs that one is cut into: a checksum has dozens
SHORTEST = 6  # digits of numbers as a whole: 10-42 is not 1042


def index_words(text: str) -> str:
    """The words of a text, one space apart, in any order and number."""
    return " ".join(list_words(unify(text)))


def text_key(text: str) -> bytes:
    """16 bytes that two passages share if their texts differ in white space, case and forms of letters at most."""
    return hashlib.blake2b(" ".join(unify(text).casefold().split()).encode(), digest_size=16).digest()


def list_words(text: str) -> Iterator[str]:
    """The words, then the names with a space in them: B 7, § 12 (3)."""
    for piece in PIECE.finditer(folded := text.casefold()):
        word = piece[0]
        if piece["run"]:
            yield from pair_characters(word)
        elif word.isalpha():
            yield word
        else:
            yield from cut_name(word)
    for letter, number in SPACED.findall(text):
        yield f"{letter.casefold()}{number}"
    if "§" in folded or "(" in folded:
        for sign, number, rest in PLACE.findall(folded):
            if sign:
                yield f"sign{number}"
            for part in re.findall(r"\w+", rest):
                yield (number := f"{number}sub{part}")


def pair_characters(run: str) -> Iterator[str]:
    """Pairs of neighbours, and words of one character: a Chinese one, and a Korean one that has particles on it."""
    characters = CHARACTER.findall(run)
    yield from (first + second for first, second in pairwise(characters))
    is_short = len(characters) == 1 or (len(characters) <= 3 and HANGUL.match(run))
    yield from (one for n, one in enumerate(characters) if HAN.match(one) or (n == 0 and is_short))


def cut_name(name: str) -> Iterator[str]:
    """A word with marks, digits or joints in it: as a whole, and its parts but single letters."""
    if number := NUMBER.fullmatch(name):
        yield from cut_number(number[1])
        return
    sections = re.split(r"(?<=\d)[-/_+](?=\D)|(?<=\D)[-/_+](?=v?\d)", name)  # pump-v2.3.1-rc2
    parts = [
        part for section in sections for part in ([section] if NUMBER.fullmatch(section) else JOINT.split(section))
    ]
    for part in parts:
        if number := NUMBER.fullmatch(part):
            yield from cut_number(number[1])
        elif len(part) > 1 or part.isdigit():
            yield part
            runs = RUNS.findall(part)
            if 1 < len(runs) <= MOST_RUNS:
                yield from (run for run in runs if len(run) > 1 or run.isdigit())
    whole = JOINT.sub("", name)
    if len(parts) > 1 and len(whole) <= LONGEST and not (whole.isdigit() and len(whole) < SHORTEST):
        yield from [whole] * is_one_name(name, parts)


def is_one_name(name: str, parts: list[str]) -> bool:
    """Whether people write the parts as one word, too: ERR-1042, e-mail, U.S.A.; not and/or, end.Next."""
    joints = set(JOINT.findall(name))
    hyphens = all(joint[0] in "-\u2010\u2011" for joint in joints)
    return hyphens or "@" in joints or any(map(str.isdigit, name)) or all(len(part) == 1 for part in parts)


def cut_number(number: str) -> Iterator[str]:
    """2.3.1 as a whole; 12,5 as 12.5; 4,915 also as 4915; hours and minutes, and years, also by themselves."""
    yield re.sub("[,:]", ".", number)
    if THOUSANDS.fullmatch(number):
        yield re.sub("[.,]", "", number)
    yield from (part for part in re.split("[.,:]", number) if ":" in number or len(part) == 4)
