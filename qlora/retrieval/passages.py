"""Sections -> passages that fit the embedding model.

A passage keeps its source, the path of headings above it, and its place: a line, page, row, slide or chapter.
"""

import functools
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter

from langchain_core.documents import Document

from qlora.reading.section import Section, find_number
from qlora.reading.table import BETWEEN
from qlora.words import FULL_STOPS

AT_ONCE = 500_000  # characters that the splitter gets; it keeps a list of all lines
# A word without a space, such as base64 or a Thai sentence, may be one token of any length. English has 4 to 5.
CHARACTERS_PER_TOKEN = 10
# Paragraphs, lines, sentences (also of scripts without spaces), words, characters.
SEPARATORS = ["\n\n", "\n", r"(?<=\. )", f"(?<=[{FULL_STOPS.strip('.!?')}])", " ", ""]


@dataclass(frozen=True)
class Splitting:
    """How files become passages; part of a document's fingerprint. Sizes are tokens of the embedding model."""

    embedding_model: str
    window: int  # where the model cuts: 256 for all-MiniLM-L6-v2
    passage_tokens: int
    overlap: int
    ocr: str = ""  # the languages of scanned pages


def split_sections(sections: Iterator[Section], source: str, tokenizer, splitting: Splitting) -> Iterator[Document]:
    """Passages of at most `passage_tokens`, neighbours sharing `overlap`.

    Sections are never mixed: a passage belongs to one heading path. With its heading path a passage never exceeds
    `window`. A row that is too long for one passage begins with its first cell in each of them.
    """

    @functools.lru_cache(100_000)  # the splitter asks two or three times for every piece
    def count(text: str) -> int:
        tokens = len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        return max(tokens, len(text) // CHARACTERS_PER_TOKEN)

    for section in sections:
        heading = fit(section.heading, splitting.window // 2, count)  # a line may look like one and be none
        room = min(splitting.passage_tokens, splitting.window - 2 - count(heading + "\n"))
        leads = {n: fit(lead, room // 2, count) for n, lead in long_rows(section, room, count)}
        room -= max((count(lead + BETWEEN) for lead in leads.values()), default=0)
        for offset, text in parts(section.text):
            for start, piece in split_text(text, room, splitting.overlap, count):
                start += offset
                lead = cut_lead(section, leads, start)
                metadata = {"source": source, **({"heading": heading} if heading else {})}
                metadata |= find_place(section, start, start + len(piece))
                yield Document(lead + piece, metadata=metadata)


def parts(text: str) -> Iterator[tuple[int, str]]:
    """(first character, text) of parts of at most AT_ONCE characters, each of whole lines where it has any."""
    at = 0
    while len(text) - at > AT_ONCE:
        end = text.rfind("\n", at, at + AT_ONCE) + 1 or at + AT_ONCE
        yield at, text[at:end]
        at = end
    yield at, text[at:]


def fit(text: str, most: int, count: Callable[[str], int]) -> str:
    """The beginning of the text, halved until it has at most so many tokens."""
    while count(text) > most:
        text = text[: len(text) // 2]
    return text


def long_rows(section: Section, room: int, count: Callable[[str], int]) -> Iterator[tuple[int, str]]:
    """(number, lead) of the section's rows that do not fit into one passage."""
    for n, (begin, end, lead) in enumerate(section.rows):
        if count(section.text[begin:end]) > room:
            yield n, lead


def split_text(text: str, room: int, overlap: int, count: Callable[[str], int]) -> Iterator[tuple[int, str]]:
    """(first character, text) of every piece."""
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    splitter = RecursiveCharacterTextSplitter(
        separators=SEPARATORS,
        is_separator_regex=True,
        chunk_size=room,
        chunk_overlap=min(overlap, room // 2),
        length_function=count,
    )
    start = -1
    for piece in splitter.split_text(text):
        # The splitter's own add_start_index counts the overlap in characters: wrong for tokens.
        start = text.find(piece, start + 1)
        yield start, piece


def cut_lead(section: Section, leads: dict[int, str], start: int) -> str:
    """What says which row the passage is of, where it begins within a long one."""
    n = bisect_right(section.rows, start, key=itemgetter(0)) - 1
    if n not in leads:
        return ""
    begin, end, _ = section.rows[n]
    return leads[n] + BETWEEN if begin + len(leads[n]) <= start < end else ""


def find_place(section: Section, start: int, end: int) -> dict[str, int]:
    """Where the passage begins; of one that goes on to another page that page, too."""
    number = find_number(section, start)
    last = find_number(section, end - 1) if section.unit == "page" else number
    return {section.unit: number} | ({"last_page": last} if last != number else {})
