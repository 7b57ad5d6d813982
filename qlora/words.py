"""Texts compared as sequences of whole words, so that "9" is not in "19"."""

import re
import unicodedata

# 9.10 and 4,915 are one word each; Chinese and Japanese are written without spaces: a character is a word.
WORD = re.compile(r"\d+(?:[.,:]\d+)+|[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
ARTICLES = {"a", "an", "the"}
CITATIONS = re.compile(r"(?<!\s)\s+(\[\d+\]\s*)+\.?$")  # `a[0]` is code


def clean(text: str) -> str:
    """The text without NUL bytes and lone surrogates, which PostgreSQL or a tokenizer cannot hold."""
    return text.encode("utf-8", "replace").decode().replace("\0", "")


def normalize(text: str) -> str:
    """The words, lower case and one space apart, without punctuation and articles."""
    words = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return " ".join(word.replace(",", "") for word in words if word not in ARTICLES)


def pad_words(text: str) -> str:
    """The normalised words with a space on both sides, so that `in` finds whole words."""
    return f" {normalize(text)} "


def answer_span(response: str) -> str:
    """The response without its citation, a leading "Yes," or "No," and the full stop: the span of the context."""
    answer = CITATIONS.sub("", response)
    return re.sub(r"^(yes|no)\b[,.:;]?\s*", "", answer, flags=re.IGNORECASE).rstrip(".")


MARK = re.compile(r"\[(\d+)\]")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(\[A-Z0-9])")
