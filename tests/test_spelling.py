"""Words that are copied from passages are spelled as they are there."""

import pytest

from qlora.answering.chain import finish_answer
from qlora.answering.spelling import Speller, spell_as

PASSAGE = "Cosima Hollingberry, the widowers' clerk, keeps 16 legal knots. The Niger flows at 14:30."


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Cosiima Hollingbery [1]", "Cosima Hollingberry [1]"),
        ("the wideners' clerk", "the widowers' clerk"),
        ("Widowrs do.", "Widowers do."),  # a capital stays one
        ("cosiima", "Cosima"),
        ("17 knots at 14:35", "17 knots at 14:35"),  # another number is another answer
        ("illegal", "illegal"),  # another beginning is another word
        ("because it was so, and the cat sat", "because it was so, and the cat sat"),
        ("", ""),
    ],
)
def test_misspelled_words_become_those_of_the_passage(text, right):
    assert spell_as(text, [PASSAGE]) == right


def test_a_text_in_pieces_is_spelled_as_the_whole():
    whole = "Cosiima Hollingbery keeps 16 knots [1], because 海关 is 14:30."
    for size in range(1, 9):
        speller = Speller([PASSAGE])
        pieces = [speller.add(whole[at : at + size]) for at in range(0, len(whole), size)]
        assert "".join([*pieces, speller.finish()]) == spell_as(whole, [PASSAGE])


def test_words_of_the_question_stay():
    from langchain_core.documents import Document

    document = Document("Bobby signs it.", metadata={"source": "a.md", "score": 1.0})
    answer = finish_answer("Bobb does, not Bobbi [1]", "Is Bobbi a clerk?", [document], "I don't know.")
    assert answer.text == "Bobby does, not Bobbi [1]"
