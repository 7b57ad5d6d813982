"""The numbers of Word's lists, which stand in no paragraph: `3. `, `b) `, `2.1 `."""

from collections import Counter

W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
ROMAN = ((1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl"), (10, "x"),
         (9, "ix"), (5, "v"), (4, "iv"), (1, "i"))  # fmt: skip


class Numbering:
    """Counts the paragraphs of every list of a document, in their order."""

    def __init__(self, part):
        self.lists: dict[str, tuple[str, dict[int, int]]] = {}  # numId -> abstract list, levels that begin anew
        self.levels: dict[tuple[str, int], object] = {}
        self.counts: Counter[tuple[str, int]] = Counter()
        self.begun: set[str] = set()
        try:
            root = part.numbering_part.element
        except (KeyError, NotImplementedError):  # no list in the document
            return
        for abstract in root.iter(f"{W}abstractNum"):
            for level in abstract.iter(f"{W}lvl"):
                self.levels[abstract.get(f"{W}abstractNumId"), int(level.get(f"{W}ilvl"))] = level
        for num in root.iter(f"{W}num"):
            starts = {int(lvl.get(f"{W}ilvl")): int(value_of(lvl, "startOverride", "1"))
                      for lvl in num.iter(f"{W}lvlOverride") if lvl.find(f"{W}startOverride") is not None}  # fmt: skip
            self.lists[num.get(f"{W}numId")] = value_of(num, "abstractNumId", ""), starts

    def next_mark(self, paragraph, style) -> str:
        """The number or bullet before the paragraph, with a space; empty without one."""
        num, depth = find_list(paragraph, style)
        abstract, starts = self.lists.get(num, ("", {}))
        level = self.levels.get((abstract, depth))
        if level is None:
            return ""
        if num not in self.begun:
            self.begun.add(num)
            for at, start in starts.items():
                self.counts[abstract, at] = start - 1
        key = abstract, depth
        self.counts[key] = self.counts[key] + 1 if key in self.counts else int(value_of(level, "start", "1"))
        for deeper in [other for other in self.counts if other[0] == abstract and other[1] > depth]:
            del self.counts[deeper]
        return self.show(abstract, level)

    def show(self, abstract: str, level) -> str:
        if value_of(level, "numFmt", "decimal") == "bullet":
            return "- "
        text = value_of(level, "lvlText", "")
        for depth in range(9):
            if f"%{depth + 1}" in text and (abstract, depth) in self.levels:
                of = self.levels[abstract, depth]
                count = self.counts.get((abstract, depth), int(value_of(of, "start", "1")))
                text = text.replace(f"%{depth + 1}", show_number(count, value_of(of, "numFmt", "decimal")))
        return f"{text} " if text.strip() else ""


def find_list(paragraph, style) -> tuple[str, int]:
    """numId and level, of the paragraph or else of its style."""
    given = [paragraph.find(f"{W}pPr/{W}numPr")]
    while style is not None:
        given.append(style.element.find(f"{W}pPr/{W}numPr"))
        style = style.base_style
    for properties in given:
        if properties is not None and properties.find(f"{W}numId") is not None:
            return value_of(properties, "numId", "0"), int(value_of(properties, "ilvl", "0"))
    return "0", 0


def value_of(element, name: str, default: str) -> str:
    found = element.find(f"{W}{name}")
    return default if found is None else found.get(f"{W}val", default)


def show_number(number: int, form: str) -> str:
    """3 as 3, c, C, iii or III."""
    if form in ("lowerLetter", "upperLetter") and number > 0:
        text = chr(ord("a") + (number - 1) % 26) * ((number - 1) // 26 + 1)
    elif form in ("lowerRoman", "upperRoman") and number > 0:
        text, rest = "", number
        for value, letters in ROMAN:
            text += letters * (rest // value)
            rest %= value
    else:
        return f"{number:02d}" if form == "decimalZero" else str(number)
    return text.upper() if form.startswith("upper") else text
