"""The words that a text is searched by: identifiers as people type them, languages, forms of letters, equal texts."""

import json
import re

import pytest
from conftest import PROJECT
from hypothesis import given, settings, strategies
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding

from qlora import presets
from qlora.console import Invalid, UserError
from qlora.retrieval import languages
from qlora.retrieval.database import Database
from qlora.retrieval.opening import load_embeddings
from qlora.retrieval.passage_store import Entry
from qlora.retrieval.pgvector_store import PgVectorStore
from qlora.retrieval.word_index import index_words, text_key

IDENTIFIERS = [json.loads(line) for line in (PROJECT / "tests/identifiers.jsonl").read_text("utf-8").splitlines()]


def open_store(url, name, embeddings=None) -> PgVectorStore:
    return PgVectorStore(Database(url), embeddings or DeterministicFakeEmbedding(size=8), "fake", name)


def put(store, texts, language="en") -> None:
    store.choose_language(language)
    passages = [Document(text, metadata={"source": "a.md", "row": n}) for n, text in enumerate(texts)]
    store.put_document(Entry("a.md", "1"), passages)


def near_misses(text: str) -> list[str]:
    """The text with its last number changed, twice, so that the words around the identifier do not find it."""
    numbers = list(re.finditer(r"\d+", text))
    if not numbers:
        return [re.sub(r"(\w+)([@.]\w+)", rf"{name}\2", text, count=1) for name in ("kim", "lee")]
    last = numbers[-1]
    return [f"{text[: last.start()]}{int(last[0]) + step:0{len(last[0])}}{text[last.end() :]}" for step in (1, 7)]


def test_identifiers_are_found_however_they_are_typed(database, collection):
    store = open_store(
        database,
        collection,
        load_embeddings(presets.EMBEDDED_EMBEDDER),
    )
    texts = [text for row in IDENTIFIERS for text in (row["text"], *near_misses(row["text"]))]
    assert len(set(texts)) == 3 * len(IDENTIFIERS) == 120
    put(store, texts)
    missed = [
        row["typed"]
        for row in IDENTIFIERS
        if row["text"] not in [found.page_content for found in store.find(row["typed"], 3)]
    ]
    assert len(missed) <= 2, missed  # recall@3 of 0.95


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("ﬁrst oﬃcer", "first officer"),
        ("War\u00adtungs\u00advertrag", "Wartungsvertrag"),
        ("recertifi-\ncation", "recertification"),
        ("Ju\u0308rgen Mu\u0308ller", "Jürgen Müller"),
        ("ＥＲＲ－１０４２", "err-1042"),
        ("zero\u200bwidth", "ZEROWIDTH"),
        ("STRASSE", "Straße"),
        ("हिन्दी", "हिन्दी"),
    ],
)
def test_forms_of_letters_are_one(database, collection, text, typed):
    store = open_store(database, collection)
    put(store, [f"Here stands {text} today.", "Something else."])
    (found,) = store.find(typed, 5, mode="lexical")
    assert found.page_content == f"Here stands {text} today."  # as it was written


def test_single_letters_and_small_joints_do_not_flood_the_index():
    assert index_words("and/or end.Next a 7 day trip 10-42") == "and or end next a 7 day trip 10 42"
    assert index_words("b7c1").split() == ["b7c1", "7", "1"]
    assert len(index_words("3f2a9c81d2e4f5a6b7c8d9e0 " * 5).split()) == 5  # checksums stay whole


@settings(max_examples=200, deadline=None)
@given(strategies.text(max_size=60))
def test_any_text_has_words_that_postgresql_takes(text):
    words = index_words(text.encode("utf-8", "replace").decode())
    assert not set(words) & set("'\\\0") and text_key(text.encode("utf-8", "replace").decode())


# ------------------------------------------------------------------------------- languages

CHINESE = [
    ("救生衣每周一由渡轮长检查。", "谁检查救生衣？"),
    ("狗在港区内必须拴绳。", "狗要拴绳吗？"),
    ("访客船只每晚停泊费为十二欧元。", "访客停泊多少钱？"),
    ("灯塔的钥匙挂在港长办公室。", "灯塔钥匙在哪里？"),
]
JAPANESE = [
    ("灯台の鍵は港長室にある。", "灯台の鍵はどこですか。"),
    ("クレーンの料金は一時間八十ユーロである。", "クレーンはいくらですか。"),
    ("犬は港内でひもにつなぐこと。", "犬を放してもいいですか。"),
]
THAI = [
    ("กุญแจประภาคารแขวนอยู่ในสำนักงานนายท่า", "กุญแจประภาคารอยู่ที่ไหน"),
    ("สุนัขต้องใส่สายจูงในท่าเรือ", "ปล่อยสุนัขได้ไหม"),
    ("ค่าจอดเรือคืนละสิบสองยูโร", "ค่าจอดเรือเท่าไร"),
]
KOREAN = [
    ("등대 열쇠는 항장 사무실에 있다.", "등대의 열쇠가 어디에 있습니까?"),
    ("개는 항구에서 목줄을 해야 한다.", "개를 풀어 놓아도 됩니까?"),
    ("정박료는 하룻밤에 십이 유로이다.", "정박료가 얼마입니까?"),
]


@pytest.mark.parametrize(
    ("code", "pairs"), [("zh", CHINESE), ("ja", JAPANESE), ("th", THAI), ("ko", KOREAN)], ids=["zh", "ja", "th", "ko"]
)
def test_words_are_found_where_no_spaces_are_between_them(database, collection, code, pairs):
    assert languages.detect_language(text for text, _ in pairs) == code
    store = open_store(database, collection)
    put(store, [text for text, _ in pairs], code)
    for text, question in pairs:
        assert store.find(question, 1, mode="lexical")[0].page_content == text


def test_words_are_stemmed_in_the_language_of_the_collection(database, collection):
    store = open_store(database, collection)
    put(store, ["Die Schiffe werden im Winter gestrichen.", "Der Hafen ist leer."], "de")
    assert store.language == "de"
    assert len(store.find("Welches Schiff?", 5, mode="lexical")) == 1
    store.choose_language("fr")
    assert store.language == "de"  # it has documents
    store.forget(["a.md"])
    store.choose_language("pl")
    put(store, ["Statki są malowane zimą."], "pl")
    assert len(store.find("malowane", 5, mode="lexical")) == 1  # without a dictionary, words as they are


def test_the_language_is_found_once_and_kept(database, collection, tmp_path, capsys):
    from test_ingest import open_store, put

    (tmp_path / "hafen.txt").write_text("Der Fährmeister prüft die Schwimmwesten an jedem Montag.", "utf-8")
    store = open_store(database, collection)
    put(store, tmp_path)
    said = capsys.readouterr().err
    assert said.count("Language of the collection: german (found in the text") == 1
    (tmp_path / "second.txt").write_text("The harbour office opens at nine o'clock in winter.", "utf-8")
    put(store, tmp_path)
    assert "Language" not in capsys.readouterr().err and store.language == "de"
    with pytest.raises(UserError, match=r"words are german, not french - --language - .*another --collection"):
        put(store, tmp_path, language="fr")
    put(store, tmp_path, language="de")
    store.forget([entry.source for entry in store.documents()])
    put(store, tmp_path, language="en")
    assert store.language == "en" and "english (as named" in capsys.readouterr().err


def test_an_embedder_of_another_language_is_reported(database, collection, tmp_path, capsys):
    from conftest import rag

    (tmp_path / "zh.txt").write_text("救生衣每周一由渡轮长检查。狗在港区内必须拴绳。", "utf-8")
    assert rag("ingest", tmp_path, "--collection", collection) == 0
    said = capsys.readouterr().err
    assert "chinese (found in the text" in said and "made for english" in said
    assert rag("ingest", tmp_path, "--language", "klingon") == 2
    assert "--language klingon is not valid" in capsys.readouterr().err


def test_names_and_codes_of_languages():
    assert languages.read_language("German") == languages.read_language("de") == "de"
    assert languages.read_language("auto") == "auto" and isinstance(languages.read_language("x"), Invalid)
    assert languages.detect_language(["text 5", "ERR-1042"]) is None
    assert languages.choose_dictionary("tr", ["simple", "english"]) == "simple"
    assert languages.embedder_languages("---\nlanguage: [en, de]\n---\n") == {"en", "de"}
    assert languages.embedder_languages("") == languages.embedder_languages("---\nlanguage: {\n---") == set()


# ------------------------------------------------------------------------------- one text, many documents


def put_copies(store, count=300) -> None:
    """A notice in many files, two other texts that are farther away, each text in one file."""
    vectors = [[1.0] + [0.0] * 7]
    for n in range(count):
        text = "The  GATE opens at six.\n" if n % 2 else "The gate opens at six."
        copy = [Document(text, metadata={"source": f"{n}.md"})]
        store.put_document(Entry(f"{n}.md", "1"), copy, vectors)
    for n, text in enumerate(["The gate is red.", "A fee at the gate."], 1):
        store.put_document(
            Entry(f"other{n}.md", "1"), [Document(text, metadata={"source": f"other{n}.md"})], [[1.0, n] + [0.0] * 6]
        )


class OneDirection(DeterministicFakeEmbedding):
    def embed_query(self, text):
        return [1.0] + [0.0] * 7


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
@pytest.mark.parametrize("diversity", [0.0, 0.5])
def test_copies_take_one_place_and_are_all_named(database, collection, mode, diversity):
    store = open_store(database, collection, OneDirection(size=8))
    put_copies(store)
    found = store.find("When does the gate open?", 3, mode=mode, diversity=diversity)
    assert len(found) == 3 and len({text_key(d.page_content) for d in found}) == 3
    (notice,) = [d for d in found if "six" in d.page_content]
    assert len(notice.metadata["also_in"]) == 299 and notice.metadata["source"] not in notice.metadata["also_in"]
    assert all("also_in" not in d.metadata for d in found if d is not notice)
    if mode != "lexical":
        assert sorted(d.metadata["ranks"]["dense"] for d in found) == [1, 2, 3]  # among texts


def test_copies_outside_a_filter_are_not_named(database, collection):
    from qlora.retrieval.metadata_filter import read_condition

    store = open_store(database, collection, OneDirection(size=8))
    put_copies(store, 4)
    (found,) = store.find("gate", 3, mode="hybrid", where=[read_condition("source=2.md")])
    assert found.metadata["source"] == "2.md" and "also_in" not in found.metadata


def test_sources_of_copies_are_shown_briefly_and_count_for_each():
    from qlora.evaluation.evaluation import score_retrieval
    from qlora.evaluation.questions import Question
    from qlora.retrieval.documents import place

    metadata = {"source": "a.md", "line": 3, "also_in": ["b.md", "c.md", "d.md", "e.md", "f.md"]}
    assert place(metadata) == "a.md, line 3 (and in b.md, c.md, d.md and 2 more)"
    found = [[Document("nine", metadata=metadata)]]
    assert score_retrieval([Question("?", ("nine",), "f.md")], found)["by_source"]["recall@1"] == 1.0


# ------------------------------------------------------------------------------- scores, sentences, refusals


def test_scores_work_without_spaces_between_words():
    from qlora.evaluation.evaluation import supports
    from qlora.evaluation.questions import Question
    from qlora.metrics import exact_match, normalize_answer, token_f1

    assert supports("访客船只每晚停泊费为十二欧元。", Question("?", ("十二欧元",)))
    assert not supports("访客船只每晚停泊费为二欧元。", Question("?", ("十二欧元",)))
    assert supports("ค่าจอดเรือคืนละสิบสองยูโร", Question("?", ("สิบสองยูโร",)))
    assert supports("정박료는 하룻밤에 십이 유로이다.", Question("?", ("십이 유로",)))
    assert exact_match("「十二 欧元」。", ["十二欧元"]) == 1.0
    assert token_f1("十二个欧元", ["十二欧元"]) == pytest.approx(8 / 9)
    assert normalize_answer("The  Café's £9.50, an “offer”.") == "cafés £950 “offer”"  # as SQuAD's own


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("狗必须拴绳。好！他说「走。」船来了", ["狗必须拴绳。", "好！", "他说「走。」", "船来了"]),
        ("ما اسمك؟ اسمي علي. نعم", ["ما اسمك؟", "اسمي علي.", "نعم"]),
        ("यह है। वह था।", ["यह है।", "वह था।"]),
        ("Er kam. Über uns. Это он. Да", ["Er kam.", "Über uns.", "Это он.", "Да"]),
        ("At 9.30 a.m. it opens. It shuts.", ["At 9.30 a.m. it opens.", "It shuts."]),
    ],
)
def test_sentences_end_in_their_own_way(text, sentences):
    from qlora.words import SENTENCE_END

    assert SENTENCE_END.split(text) == sentences


def test_citations_are_checked_without_spaces_between_words():
    from qlora.answering.citations import check_answer

    passages = [
        Document("狗在港区内必须拴绳。", metadata={"source": "a.md", "score": 1.0}),
        Document("访客船只每晚停泊费为12欧元。", metadata={"source": "b.md", "score": 1.0}),
    ]
    answer = check_answer("停泊费为12欧元。[2]狗必须拴绳。[1]", passages, "我不知道。")
    assert [statement.cites for statement in answer.statements] == [(2,), (1,)] and answer.unsupported == []
    wrong = check_answer("停泊费为13欧元。[2]", passages, "我不知道。")
    assert wrong.unsupported == ["停泊费为13欧元。"]
    assert check_answer("我不知道。", passages, "我不知道。").refused
    assert not check_answer("我知道。", passages, "我不知道。").refused


def test_refusal_and_rules_in_the_language_of_the_user(tmp_path, capsys):
    from conftest import train

    from qlora.cli.training_flags import resolve_arguments
    from qlora.evaluation.questions import load_questions
    from qlora.prompt import Prompt, word_rules
    from qlora.training.row_filters import Selection, keep_usable, word_refusals
    from qlora.training.rows import Row

    refusal = "Ich weiß es nicht."
    prompt = Prompt(**word_rules(refusal))
    assert prompt.rules.endswith(refusal) and prompt.closed_book_rules.endswith(refusal) and "know." not in prompt.rules
    rows = [
        Row("Wer?", "I don't know.", "Nichts."),
        Row("Wo?", refusal, "Nichts."),
        Row("Wann?", "Um neun.", "Um neun."),
    ]
    rows = word_refusals(rows, refusal)
    assert [row.response for row in rows] == [refusal, refusal, "Um neun."]
    kept, _ = keep_usable(rows, Selection(refusal=refusal, refusal_share=0.5))
    assert len(kept) == 2
    (tmp_path / "q.jsonl").write_text(json.dumps({"instruction": "Wer?", "response": refusal}) + "\n", "utf-8")
    assert load_questions(tmp_path / "q.jsonl", refusal=refusal)[0].answers == ()
    words = ["--output", str(tmp_path / "out"), "--refusal", refusal, "--rules"]
    with pytest.raises(UserError, match="put the text of --refusal into them"):
        resolve_arguments([*words, "Antworte nur aus den Absätzen."], "x", ("a", "b", "c", "d"))
    args = resolve_arguments([*words, f"Antworte aus den Absätzen, sonst: {refusal}"], "x", ("a", "b", "c", "d"))
    assert word_rules(args.refusal, args.rules)["rules"].startswith("Antworte")
    assert train("--output", tmp_path / "out", "--refusal", "...") == 2
    assert "a refusal without words" in capsys.readouterr().err
