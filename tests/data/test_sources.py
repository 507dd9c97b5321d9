"""Sources: the same records as plain reading, random access, pickling, and every error."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite.data import textfiles
from t5x_lite.data.sources import (
    JsonlSource,
    PairedSource,
    TextSource,
    TfdsSource,
    TokenFileSource,
    texts,
    write_token_file,
)
from t5x_lite.data.textfiles import Paragraphs
from t5x_lite.types import InputError


def read(source, split="train"):
    records = source.open(split)
    return [records[i] for i in range(len(records))]


line = st.text(
    st.characters(codec="utf-8", exclude_characters="\r\n\v\f\x1c\x1d\x1e\x85\u2028\u2029")
)


@settings(max_examples=60, deadline=None)
@given(st.lists(line, max_size=8), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_text_lines_are_those_of_plain_reading(tmp_path_factory, lines, feed, ends):
    lines = ["first", *lines]
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes((feed.join(lines) + feed * ends).encode())
    kept = [one for one in lines if one.encode().strip()]
    assert [r["text"] for r in read(TextSource({"train": str(path)}))] == kept


def test_blocks_do_not_show(tmp_path, monkeypatch):
    text = "αβγ one\n\n δε two \n火 three"
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    source = TextSource({"train": str(path)})
    want = read(source)
    for block in range(1, 12):
        monkeypatch.setattr(textfiles, "_BLOCK", block)
        assert read(source) == want


def test_paragraphs_and_several_files(tmp_path):
    (tmp_path / "b.txt").write_text("\n\none\ntwo\n \nthree\n\n\n")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfzero")
    source = TextSource({"train": str(tmp_path / "*.txt")}, unit=Paragraphs())
    assert [r["text"] for r in read(source)] == ["zero", "one\ntwo", "three"]
    explicit = TextSource({"train": [str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]})
    assert list(texts(explicit)) == ["one", "two", "three", "zero"]
    assert pickle.loads(pickle.dumps(source)) == source


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"inputs": "é", "targets": "b"}, {"inputs": "c", "targets": "d", "n": 3}]
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    source = JsonlSource({"test": str(path)})
    assert source.splits == ("test",)
    assert read(source, "test") == rows
    assert list(texts(source, "test", ("inputs", "targets"))) == ["é", "b", "c", "d"]


def test_token_files(tmp_path):
    arrays = [np.arange(7), np.arange(50, 60)]
    paths = [str(tmp_path / "a.bin"), str(tmp_path / "b.bin")]
    for path, array in zip(paths, arrays, strict=True):
        assert write_token_file(path, np.array_split(array, 3)) == len(array)
    records = read(TokenFileSource({"train": paths}, length=3))
    want = [arrays[0][0:3], arrays[0][3:6], *arrays[1][:9].reshape(3, 3)]
    assert len(records) == len(want)
    for record, array in zip(records, want, strict=True):
        assert record["tokens"].dtype == np.int32
        np.testing.assert_array_equal(record["tokens"], array)
    bare = tmp_path / "bare.bin"
    arrays[0].astype("uint32").tofile(bare)
    assert len(read(TokenFileSource({"train": str(bare)}, length=2, dtype="uint32"))) == 3


def test_text_errors(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n")
    source = TextSource({"train": str(path), "gone": str(tmp_path / "*.none"), "none": []})
    with pytest.raises(InputError, match="the splits are: train, gone"):
        source.open("test")
    with pytest.raises(InputError, match="no such file"):
        source.open("gone")
    with pytest.raises(InputError, match="no files"):
        source.open("none")
    for content in (b"", b" \n\n", b"\xef\xbb\xbf"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.txt' is empty"):
            source.open("train")
    path.write_bytes("αβ\nok\nab".encode() + b"\xffcd\n")
    with pytest.raises(InputError, match=r"a\.txt' is not UTF-8: line 3, byte offset 10 \(0xff\)"):
        source.open("train")
    path.write_bytes("ok\nδ".encode()[:-1])
    with pytest.raises(InputError, match="line 2, byte offset 3 "):
        source.open("train")


def test_utf8_offset_is_right_across_blocks(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes("αβγδ\nεζηθ\n".encode() + "火".encode()[:2] + b"\n")
    for block in range(1, 20):
        monkeypatch.setattr(textfiles, "_BLOCK", block)
        with pytest.raises(InputError, match="line 3, byte offset 18 "):
            TextSource({"train": str(path)}).open("train")


def test_jsonl_errors(tmp_path):
    path = tmp_path / "a.jsonl"
    source = JsonlSource({"train": str(path)})
    path.write_text('{"a": 1}\n\n{"a": \n{"a": 2}\n')
    records = source.open("train")
    with pytest.raises(InputError, match=r"a\.jsonl', line 3 is not JSON"):
        records[1]
    path.write_text('{"a": 1}\n{"a": "trunc')
    with pytest.raises(InputError, match="line 2 is not JSON"):
        source.open("train")
    path.write_text("[1, 2]\n")
    with pytest.raises(InputError, match="JSON list"):
        source.open("train")
    path.write_text('{"a": "1"}\n')
    with pytest.raises(InputError, match="no field 'text'"):
        list(texts(source))


def test_token_file_errors(tmp_path):
    path = str(tmp_path / "a.bin")
    write_token_file(path, [np.arange(100)])
    with pytest.raises(InputError, match="not uint32"):
        TokenFileSource({"train": path}, length=10, dtype="uint32").open("train")
    with pytest.raises(InputError, match="fewer than one record"):
        TokenFileSource({"train": path}, length=101).open("train")
    with open(path, "r+b") as file:
        file.truncate(150)
    with pytest.raises(InputError, match="truncated: 150 bytes, expected 200"):
        TokenFileSource({"train": path}, length=10).open("train")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(InputError, match="truncated"):
        TokenFileSource({"train": str(tmp_path / "odd.bin")}, length=1).open("train")
    with pytest.raises(InputError, match="does not fit uint16"):
        write_token_file(tmp_path / "b.bin", [np.array([70000])])
    assert not (tmp_path / "b.bin").exists()
    with pytest.raises(InputError, match="dtype"):
        TokenFileSource({}, length=1, dtype="float32")
    with pytest.raises(InputError, match="length"):
        TokenFileSource({}, length=0)


def test_a_dataset_that_is_not_prepared_names_the_command(tmp_path):
    source = TfdsSource("bible_text", str(tmp_path))
    command = f"python scripts/prepare_data.py --dataset=bible_text --data_dir={tmp_path}"
    with pytest.raises(InputError, match=command):
        source.open("train")


def test_paired_records_have_anothers_text(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"line {i}" for i in range(7)))
    (tmp_path / "b.txt").write_text("alone")
    text = TextSource({"train": str(tmp_path / "a.txt"), "test": str(tmp_path / "b.txt")})
    source = PairedSource(text)
    assert source.splits == ("train", "test")
    records = read(source)
    assert [record["text"] for record in records] == [f"line {i}" for i in range(7)]
    assert all(record["other"] != record["text"] for record in records)
    assert pickle.loads(pickle.dumps(source)).open("train")[3] == source.open("train")[3]
    seen = {(i, read(PairedSource(text, seed=s))[i]["other"]) for s in range(60) for i in range(7)}
    assert len(seen) == 7 * 6, "any other"
    assert source.open("train")[6] == records[6], "no matter what was read before"
    with pytest.raises(InputError, match="1 records: PairedSource takes"):
        source.open("test")
    with pytest.raises(InputError, match=r"PairedSource\.field is 'body', but the record has text"):
        PairedSource(text, field="body").open("train")[0]
