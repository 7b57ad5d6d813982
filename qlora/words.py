"""Texts compared as sequences of whole words, so that "9" is not in "19"."""

import re
import unicodedata
from itertools import groupby


def list_marks() -> str:
    """The combining marks as ranges of a character class: vowels of Hindi and Thai, accents of decomposed letters.

    `\\w` does not match them (10 ms).
    """
    codes = [code for code in range(0x10000) if unicodedata.category(chr(code))[0] == "M"]
    groups = [list(run) for _, run in groupby(enumerate(codes), key=lambda pair: pair[1] - pair[0])]
    return "".join(f"{chr(run[0][1])}-{chr(run[-1][1])}" for run in groups)


MARKS = list_marks()
# Without spaces between words, or (Korean) with particles on them: Thai, Lao, Burmese, Khmer, kana, Han, Hangul.
SPACELESS = (
    "\u0e01-\u0e4e\u0e81-\u0ecf\u0edc-\u0eff\u1000-\u103f\u1050-\u109f\u1780-\u17d3\u3005-\u3007\u3040-\u309f"
    "\u30a1-\u30fa\u30fc-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
CHARACTER = re.compile(f"[{SPACELESS}][{MARKS}]*")  # of such a script, with its vowels
# 9.10 and 4,915 are one word each; in scripts without spaces a character is a word.
WORD = re.compile(rf"\d+(?:[.,:]\d+)+|{CHARACTER.pattern}|(?:[^\W_{SPACELESS}][{MARKS}]*)+")
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")  # soft hyphens, zero-width spaces and joiners
ARTICLES = {"a", "an", "the"}
CITATIONS = re.compile(r"(?<!\s)\s+(\[\d+\]\s*)+\.?$")  # `a[0]` is code


def clean(text: str) -> str:
    """The text without NUL bytes and lone surrogates, which PostgreSQL or a tokenizer cannot hold."""
    return text.encode("utf-8", "replace").decode().replace("\0", "")


def unify(text: str) -> str:
    """The text in one form of each letter (NFKC), without invisible ones: ﬁ is fi, a decomposed ü is one letter."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFKC", INVISIBLE.sub("", text))


def normalize(text: str) -> str:
    """The words, lower case and one space apart, without punctuation and articles."""
    words = WORD.findall(unify(text).casefold())
    return " ".join(word.replace(",", "") for word in words if word not in ARTICLES)


def pad_words(text: str) -> str:
    """The normalised words with a space on both sides, so that `in` finds whole words."""
    return f" {normalize(text)} "


def answer_span(response: str) -> str:
    """The response without its citation, a leading "Yes," or "No," and the full stop: the span of the context."""
    answer = CITATIONS.sub("", response)
    return re.sub(r"^(yes|no)\b[,.:;]?\s*", "", answer, flags=re.IGNORECASE).rstrip(".")


MARK = re.compile(r"\[(\d+)\]")
FULL_STOPS = ".!?。！？｡؟۔।॥։"
CLOSING = "」』”’）)"
# Capitals with accents, of Greek and Cyrillic, opening quotation marks, and letters of scripts without capitals.
BEGINNING = f"\u00c0-\u00d6\u00d8-\u00de\u0391-\u03a9\u0401-\u042f\u0531-\u0556\u0590-\u0dff«¿¡„“{SPACELESS}"
SENTENCE_END = re.compile(
    r"(?<=[.!?])\s+(?=[\"'(\[A-Z0-9])"
    rf"|(?<=[.!?؟۔։])\s+(?=[{BEGINNING}])"
    rf"|(?<=[。！？｡।॥])(?![。！？｡।॥{CLOSING}])\s*(?=\S)"
    rf"|(?<=[。！？｡][{CLOSING}])\s*(?=\S)"
)
