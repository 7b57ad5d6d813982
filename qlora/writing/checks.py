"""Checks of a draft that need nothing but its texts; each says what is wrong, or nothing.

    check_text(draft, passage, heading)        # "", or such as "answer not in the passage"

A model that reads the passage, and the search, check further (`review_drafts`).
"""

import re

from qlora.answering.citations import content_words, stands_exactly
from qlora.metrics import token_f1
from qlora.refusal import is_refusal
from qlora.words import CITATIONS, SENTENCE_END, WORD, answer_span, normalize, pad_words
from qlora.writing.drafts import Draft
from qlora.writing.question_kinds import OPENERS, fits, kind_of_question

QUESTION_MARK = re.compile("[?\uff1f\u061f]")
LONGEST_QUESTION = 40  # words
LONGEST_ANSWER = 40  # words
ALIKE = 0.8  # token F1 of two questions, from which on they are one question
GIVEN_AWAY = 0.75  # share of the answer's words in the question
# What refers to something that a question without its passage does not have.
LEANING = re.compile(
    r"\b(this|these|that|the|above|following|given|said|quoted?)\s+"
    r"(passages?|texts?|paragraphs?|articles?|excerpts?|sections?|sentences?|documents?|statements?|contexts?|examples?|"
    r"tables?|figures?|quotes?|quotations?|authors?|writers?|speakers?|narrators?)\b"
    r"|\b(passage|context|paragraph)\s*(\[?\d+\]?)"
    r"|\baccording to (it|them|him|her|this|that)\b"
    r"|^\W*(and|but|or|so|also|then)\b",
    re.IGNORECASE,
)
PRONOUNS = frozenset(re.findall(r"\w+", "he she it they him her them his hers its their theirs this these those"))
# A capitalised word that does not begin a sentence and is not "I'm", or a number.
NAME = re.compile(r"(?<![.!?]\s)(?<!^)(?<![\"'(\[]\b)\b(?!I['\u2019])[A-Z][\w'\u2019-]+|\d[\d.,:]*\d|\d")
# A sentence that speaks to a model instead of its readers.
ORDER = re.compile(
    r"\b(ignore|disregard|forget|override)\b.{0,40}\b(instructions?|rules|prompts?|above|previous|prior)\b"
    r"|\b(you are|act as|pretend to be)\b.{0,40}\b(assistant|model|ai|bot|chatbot)\b"
    r"|\bsystem prompt\b"
    r"|\b(write|ask|generate|output|add|include) (a|the|this|these|only|following)\b.{0,40}\b(questions?|rows?)\b"
    r"|\b(assistants?|models?|llms?|ais?|bots?) (must|should|shall|ha(s|ve) to)\b.{0,60}\b(answer|say|reply|write)\b",
    re.IGNORECASE,
)


def check_text(draft: Draft, text: str, heading: str = "") -> str:
    """The reason to drop a draft about a passage with this text, or nothing."""
    question, answer = draft.question, answer_span(draft.answer)
    for wrong, reason in (
        (not is_question(question), "not a question"),
        (is_refusal(draft.answer) or len(answer.split()) > LONGEST_ANSWER, "no short answer"),
        (leans(question), "question needs its passage"),
        (not is_grounded(answer, text), "answer not in the passage"),
        (gives_away(question, answer), "question holds the answer"),
        (not fits(question, answer), "answer of another kind than the question"),
        (not names_known(question, f"{heading} {text}"), "question names what the passage does not"),
        (obeys(question, answer, text), "passage gives orders to the writer"),
    ):
        if wrong:
            return reason
    return ""


def is_question(text: str) -> bool:
    """Whether it is one question of a readable length, with its mark at the end ("Name ..." needs none)."""
    if re.match(r"(name|give|list|state)\b", text, re.IGNORECASE):
        return 3 <= len(text.split()) <= LONGEST_QUESTION and len(SENTENCE_END.split(text)) == 1
    marks = QUESTION_MARK.findall(text)
    return 3 <= len(text.split()) <= LONGEST_QUESTION and len(marks) == 1 and text.endswith(marks[0])


def leans(question: str) -> bool:
    """Whether the question refers to a passage, or by a pronoun to something that it does not name.

    A pronoun is allowed after a name or noun of the same question ("When did the ferry lose its mast?").
    """
    if LEANING.search(question):
        return True
    words = [word.lower() for word in WORD.findall(question)]
    for at, word in enumerate(words):
        if word in PRONOUNS:
            return not any(before not in OPENERS | PRONOUNS | {"the", "a", "an"} for before in words[:at])
    return False


def is_grounded(answer: str, text: str) -> bool:
    """Whether the passage has the answer word for word, or all its numbers, quotations and content words."""
    if normalize(answer) and pad_words(answer) in pad_words(text):
        return True
    return bool(content_words(answer)) and content_words(answer) <= content_words(text) and stands_exactly(answer, text)


def gives_away(question: str, answer: str) -> bool:
    """Whether most of the answer's content words stand in the question, which offers no choice ("a or b")."""
    if re.search(r"\bor\b", question) or kind_of_question(question) == "yes/no":
        return False
    wanted = content_words(answer)
    return bool(wanted) and len(wanted & content_words(question)) / len(wanted) >= GIVEN_AWAY


def names_known(question: str, text: str) -> bool:
    """Whether all names and numbers of the question are in the passage or its heading: the others are made up."""
    known = f" {normalize(text)} "
    names = (normalize(re.sub(r"['\u2019]s$", "", name)) for name in NAME.findall(question))
    return all(f" {name} " in known for name in names if name)


def obeys(question: str, answer: str, text: str) -> bool:
    """Whether a sentence that gives orders to a model is what the question or its answer comes from."""
    sentences = SENTENCE_END.split(text)
    orders = [sentence for sentence in sentences if ORDER.search(sentence)]
    if not orders:
        return bool(ORDER.search(question))
    holding = [sentence for sentence in sentences if content_words(answer) & content_words(sentence)]
    best = max(
        holding, key=lambda sentence: len(content_words(f"{question} {answer}") & content_words(sentence)), default=""
    )
    return best in orders


def same_question(one: str, other: str) -> float:
    """How alike two questions are: token F1, from 0 to 1."""
    return token_f1(one, [other])


def plain_answer(answer: str) -> str:
    """The answer on one line without citations."""
    return " ".join(CITATIONS.sub("", answer).split())
