"""The language of a collection: found in its first texts, it chooses the dictionary that words are stemmed by.

A collection has one language. The word index takes any script in any collection; only stems differ.
"""

import re
from collections.abc import Iterable

from qlora.console import Invalid, note

AUTO = "auto"
DEFAULT = "en"  # where the text is too short to say; the embedded embedding model's, too
SURE = 0.5  # probability of the likeliest language
SAMPLE = 20_000  # characters
CODES = (
    "ar=arabic hy=armenian eu=basque ca=catalan da=danish nl=dutch en=english et=estonian fi=finnish fr=french "
    "de=german el=greek hi=hindi hu=hungarian id=indonesian ga=irish it=italian lt=lithuanian ne=nepali "
    "no=norwegian pt=portuguese ro=romanian ru=russian sr=serbian es=spanish sv=swedish ta=tamil tr=turkish "
    "zh=chinese ja=japanese ko=korean th=thai lo=lao my=burmese km=khmer "
    "af=afrikaans sq=albanian am=amharic az=azerbaijani be=belarusian bn=bengali bs=bosnian bg=bulgarian "
    "hr=croatian cs=czech eo=esperanto fo=faroese gl=galician ka=georgian gu=gujarati he=hebrew is=icelandic "
    "jv=javanese kn=kannada kk=kazakh ky=kyrgyz la=latin lv=latvian lb=luxembourgish mk=macedonian ms=malay "
    "ml=malayalam mt=maltese mr=marathi mn=mongolian or=odia ps=pashto fa=persian pl=polish pa=punjabi si=sinhala "
    "sk=slovak sl=slovenian so=somali sw=swahili tl=tagalog te=telugu uk=ukrainian ur=urdu ug=uyghur vi=vietnamese "
    "cy=welsh xh=xhosa zu=zulu"
)
NAMES = dict(pair.split("=") for pair in CODES.split())
SPACELESS = {"zh", "ja", "ko", "th", "lo", "my", "km"}


def read_language(text: str) -> str | Invalid:
    """An argparse type: `auto`, or the code of a language that is given by code or English name."""
    codes = {name: code for code, name in NAMES.items()}
    word = text.lower()
    return word if word in (AUTO, *NAMES) else codes.get(word) or Invalid(text, "a language (german, de) or auto")


def detect_language(texts: Iterable[str]) -> str | None:
    """The code of the language that most of the texts are in; None where they are too short, or code or numbers."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    sample = " ".join(re.findall(r"[^\W\d_]{2,}", " ".join(texts)[:SAMPLE]))
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(sorted({*NAMES, "nn"} & set(identifier.labels)))
    code, probability = identifier.classify(sample)
    return None if probability < SURE else "no" if code == "nn" else code


def choose_dictionary(code: str, known: Iterable[str]) -> str:
    """The text search configuration of PostgreSQL for a language, of those that the server knows.

    Without one, words are compared as they are. In scripts without spaces nothing is stemmed, but English words among
    them are.
    """
    name = "english" if code in SPACELESS else NAMES[code]
    return name if name in known else "simple"


def embedder_languages(card: str) -> set[str]:
    """The languages that a model card names in its first lines (`language: en`, or a list); empty without."""
    import yaml

    front = re.match(r"---\n(.*?)\n---", card or "", re.DOTALL)
    try:
        named = (yaml.safe_load(front[1]) or {}).get("language") if front else None
    except (yaml.YAMLError, AttributeError):
        return set()
    return {named} if isinstance(named, str) else {code for code in named or () if isinstance(code, str)}


def settle_language(store, wanted: str, texts: Iterable[str]) -> None:
    """Decides the language of a collection that has no passages yet, and reports it, with a warning where the embedding
    model is made for others."""
    if store.count():
        return
    found = wanted if wanted != AUTO else detect_language(texts)
    store.choose_language(found or DEFAULT)
    language = store.language or found or DEFAULT  # another process may have been first
    how = "as named" if wanted != AUTO else "found in the text" if found else "too little text to tell"
    note(f"Language of the collection: {NAMES[language]} ({how}; --language NAME for a new collection)")
    known = embedder_languages(getattr(getattr(store.embeddings, "_client", None), "_model_card_text", ""))
    if known and not {language, "multilingual"} & known:
        note(
            f"The embedding model is made for {', '.join(sorted(NAMES.get(code, code) for code in known))}: "
            "similarity will say little here. See docs/documents.md, Languages, for --embedding-model"
        )
