"""Published tokenizer files: ids as their conventions have them, round trips, and every error."""

import json
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from t5x_lite.data.vocabularies import (
    TokenizersVocabulary,
    Vocabulary,
    train_byte_level,
    train_wordpiece,
)
from t5x_lite.types import InputError

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "sea", "un", "##full", "##ness"]
PIECES += [".", "cafe", "Café", "火", "!"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "s"), ("e", "a"), ("Ġs", "ea"), (".", '"')]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>"]


def bert_files(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "vocab.txt"


def bpe_files(folder, before=ROBERTA, after=("<mask>",), **config):
    """`vocab.json` and `merges.txt`, the specials where RoBERTa or GPT-2 have theirs."""
    folder.mkdir(exist_ok=True)
    pieces = [*before, *BYTES, *("".join(pair) for pair in MERGES), *after]
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    merges = "".join(f"{a} {b}\n" for a, b in MERGES)
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    if config:
        (folder / "special_tokens_map.json").write_text(json.dumps(config))
    return folder / "vocab.json"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return TokenizersVocabulary(bpe_files(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(params=["vocab.txt", "vocab.json", "gpt2", "tokenizer.json", "folder"])
def vocabulary(request, tmp_path):
    if request.param == "vocab.txt":
        return TokenizersVocabulary(str(bert_files(tmp_path / "a")), extra_ids=3)
    if request.param == "vocab.json":
        return TokenizersVocabulary(str(bpe_files(tmp_path / "a")), start_token="</s>")
    if request.param == "gpt2":
        return TokenizersVocabulary(bpe_files(tmp_path / "a", (), ("<|endoftext|>",)))
    texts = ["the sea is not full of the sea"] * 9
    folder = tmp_path / "a"
    trained = train_byte_level(texts, folder / "tokenizer.json", vocab_size=270)
    return trained if request.param == "tokenizer.json" else TokenizersVocabulary(str(folder))


def test_wordpiece_is_berts(tmp_path):
    v = TokenizersVocabulary(str(bert_files(tmp_path)))
    ids = v.encode("The unfullness.  CAFÉ火 xyz")
    assert ids.dtype == np.int32
    assert ids.tolist() == [5, 7, 8, 9, 10, 11, 13, 1]  # accents go with lower-casing
    assert [v.piece(i) for i in ids[:4]] == ["the", "un", "##full", "##ness"]
    assert v.starts_word(ids).tolist() == [True, True, False, False, True, True, True, True]
    assert v.ends_sentence(ids).tolist() == [i == 10 for i in ids]
    assert v.decode([2, *ids, 3, 5]) == "the unfullness. cafe 火 [UNK]"
    assert (v.pad_id, v.unk_id, v.bos_id, v.eos_id, v.mask_id) == (0, 1, 2, 3, 4)
    assert v.size == len(PIECES)
    assert v.start_id == 2
    assert v.special_ids == {0, 1, 2, 3, 4}


def test_casing_is_the_configs_or_the_fields(tmp_path):
    path = bert_files(tmp_path, do_lower_case=False)
    assert TokenizersVocabulary(path).encode("Café The").tolist() == [12, 1]
    assert TokenizersVocabulary(path, lower_case=True).encode("Café The").tolist() == [11, 5]
    cased = bert_files(tmp_path / "other")
    assert TokenizersVocabulary(cased).encode("Café").tolist() == [11]
    assert TokenizersVocabulary(cased, lower_case=False).encode("Café").tolist() == [12]


def test_byte_level_is_robertas(tmp_path):
    v = TokenizersVocabulary(str(bpe_files(tmp_path)))
    pieces = [v.piece(i) for i in v.encode('the sea."')]
    assert pieces == ["the", "Ġsea", '."']
    assert v.encode('the sea."').tolist() == [261, 264, 265]
    assert (v.bos_id, v.pad_id, v.eos_id, v.unk_id, v.mask_id) == (0, 1, 2, 3, 266)
    assert v.start_id == 0
    assert v.special_ids == {0, 1, 2, 3, 266}
    assert v.starts_word(v.encode('the sea."')).tolist() == [False, True, False]
    assert v.ends_sentence(v.encode('the sea."')).tolist() == [False, False, True]
    bart = TokenizersVocabulary(v.path, start_token="</s>")
    assert bart.start_id == bart.eos_id == 2
    assert bart.fingerprint != v.fingerprint
    assert bart.decode([2, 0, *v.encode("the sea"), 2, 261]) == "the sea"  # starts with eos


def test_gpt2_has_one_special_for_everything(tmp_path):
    v = TokenizersVocabulary(str(bpe_files(tmp_path, (), ("<|endoftext|>",))))
    assert v.bos_id == v.eos_id == v.pad_id == v.unk_id == v.start_id == v.size - 1 == 262
    assert v.mask_id is None
    text = v.encode("the sea").tolist()
    for ids in (text, [262, *text, 262], [*text, 262, 257], [262, *text, 262, 262]):
        assert v.decode(ids) == "the sea"
    assert v.decode([262, 262, *text]) == v.decode([262]) == ""
    assert v.decode([*text, 263]) == "the sea\ufffd"  # a row beyond the vocabulary


def test_specials_are_named_by_the_files_and_by_the_fields_before_them(tmp_path):
    before = ["<s>", "</s>", "<begin>", "<end>", "<fill>"]
    named = {"bos_token": "<begin>", "eos_token": {"content": "<end>"}, "mask_token": None}
    path = bpe_files(tmp_path, before, ("<mask>",), **named)
    v = TokenizersVocabulary(path)
    assert (v.bos_id, v.eos_id, v.pad_id, v.mask_id) == (2, 3, 3, None)
    other = TokenizersVocabulary(path, bos_token="", pad_token="<fill>", mask_token="<mask>")
    assert (other.bos_id, other.eos_id, other.pad_id) == (None, 3, 4)
    assert other.start_id == 4  # no bos: padding, as in T5
    assert other.piece(other.mask_id) == "<mask>"


def test_interface_pickles_and_files(vocabulary, tmp_path):
    assert isinstance(vocabulary, Vocabulary)
    text = "the sea."
    expected = vocabulary.encode(text)
    data = pickle.dumps(vocabulary)
    assert len(data) < 600  # the path, not the model
    copy = pickle.loads(data)
    assert copy == vocabulary
    np.testing.assert_array_equal(copy.encode(text), expected)
    stored = vocabulary.stored(str(tmp_path / "run" / "vocabulary.model"))
    shutil.rmtree(tmp_path / "a")
    assert stored.fingerprint == vocabulary.fingerprint
    fresh = pickle.loads(pickle.dumps(stored))  # reads the one file
    assert fresh.fingerprint == vocabulary.fingerprint
    np.testing.assert_array_equal(fresh.encode(text), expected)
    assert fresh.decode(expected) == vocabulary.decode(expected) == text
    for name in ("size", "pad_id", "eos_id", "unk_id", "bos_id", "mask_id", "start_id"):
        assert getattr(fresh, name) == getattr(vocabulary, name), name
    assert fresh.special_ids == vocabulary.special_ids
    assert fresh.num_sentinels == vocabulary.extra_ids


def test_the_fingerprint_is_of_what_turns_text_into_ids(tmp_path):
    one = TokenizersVocabulary(bert_files(tmp_path / "one"))
    assert one.fingerprint == TokenizersVocabulary(bert_files(tmp_path / "two")).fingerprint
    different = [
        TokenizersVocabulary(one.path, extra_ids=1),
        TokenizersVocabulary(one.path, lower_case=False),
        TokenizersVocabulary(one.path, mask_token=""),
        TokenizersVocabulary(bpe_files(tmp_path / "bpe")),
        TokenizersVocabulary(bpe_files(tmp_path / "bpe"), start_token="</s>"),
    ]
    assert len({one.fingerprint, *(v.fingerprint for v in different)}) == 6


def test_sentinels_are_on_top(tmp_path):
    v = TokenizersVocabulary(bert_files(tmp_path), extra_ids=2)
    assert (v.size, v.sentinel_id(0), v.sentinel_id(1)) == (17, 16, 15)
    assert {15, 16} < v.special_ids
    assert v.decode([5, 16, 6, 15, 0, 3, 5]) == "the <extra_id_0> sea <extra_id_1>"
    with pytest.raises(InputError, match="extra_ids"):
        v.sentinel_id(2)
    pieces = [*PIECES, "<extra_id_1>", "<extra_id_0>"]  # as T5's tokenizer.json has them
    (tmp_path / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    own = TokenizersVocabulary(tmp_path / "vocab.txt")
    assert (own.size, own.num_sentinels, own.sentinel_id(0)) == (17, 2, 16)
    with pytest.raises(InputError, match="2 sentinels of its own"):
        TokenizersVocabulary(tmp_path / "vocab.txt", extra_ids=2)


@settings(max_examples=60, deadline=None)
@given(text=st.text() | st.sampled_from(["</s> <mask>", "a<s>b", "<pad>"]))
def test_no_text_becomes_a_special(text, byte_level):
    v = byte_level
    ids = v.encode(text)
    assert v.special_ids.isdisjoint(ids.tolist())
    assert v.decode(ids) == text


def test_a_truncating_tokenizer_json_does_not_truncate(tmp_path):
    texts = ["the sea is not full"] * 5
    path = tmp_path / "tokenizer.json"
    trained = train_wordpiece(texts, path, vocab_size=60)
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    path.write_text(json.dumps(content))
    again = TokenizersVocabulary(path)
    assert again.encode("the sea is not full").size > 2
    assert again.fingerprint == trained.fingerprint


def broken_folders(root):
    """`(path, message)` for what is missing or broken."""
    yield root / "none.json", "none.json' cannot be read .*expected a tokenizer.json, a vocab.txt"
    (root / "empty").mkdir()
    yield root / "empty", "has no tokenizer.json, vocab.json or vocab.txt"
    for name, content, message in (
        ("empty.txt", b"", r"has no line '\[UNK\]'"),
        ("binary.model", b"\x0a\xff\xfe\x00", "not UTF-8 text.*SentencePieceVocabulary"),
        ("cut.json", b'{"model": {"type": "BPE", "vo', "not readable JSON"),
        ("list.json", b"[1, 2]", "not readable JSON"),
        ("other.json", b'{"model": {"type": "Nothing"}}', "not a tokenizer.json that can be used"),
        ("numbers.json", b'{"a": "b"}', "does not map pieces to ids"),
        ("alone.json", b'{"a": 0, "<s>": 1, "</s>": 2}', r"merges.txt' cannot be read"),
        ("no_eos.txt", b"[UNK]\nthe\n", "has no end of text.*give eos_token"),
    ):
        (root / name).write_bytes(content)
        yield root / name, message
    bad = bpe_files(root / "merge")
    (root / "merge" / "merges.txt").write_text("#version: 0.2\nt h\nq q\n")
    yield bad, "merges.txt', line 3: 'q q' is not a pair of pieces"
    lossy = root / "lossy" / "vocab.json"
    lossy.parent.mkdir()
    lossy.write_text('{"a": 0, "</s>": 1}')
    (root / "lossy" / "merges.txt").write_text("")
    yield lossy, "lacks 255 of the 256 bytes and has no unk_token"
    config = bert_files(root / "config")
    (root / "config" / "tokenizer_config.json").write_text("{")
    yield config, "tokenizer_config.json' is not a readable JSON object"


def test_each_broken_file_is_one_message(tmp_path):
    for path, message in broken_folders(tmp_path):
        with pytest.raises(InputError, match=message) as raised:
            TokenizersVocabulary(str(path))
        assert "\n" not in str(raised.value)


def test_fields_that_do_not_fit(tmp_path):
    bert, bpe = bert_files(tmp_path / "a"), bpe_files(tmp_path / "b")
    with pytest.raises(InputError, match=r"has no '<mask>', which is to be its mask_token"):
        TokenizersVocabulary(bert, mask_token="<mask>")
    with pytest.raises(InputError, match="has no '<go>', its start_token"):
        TokenizersVocabulary(bpe, start_token="<go>")
    with pytest.raises(InputError, match="extra_ids is -1"):
        TokenizersVocabulary(bpe, extra_ids=-1)
    stored = TokenizersVocabulary(bpe).stored(str(tmp_path / "v.model"))
    with pytest.raises(InputError, match=r"lower_case=True is for a vocab.txt"):
        TokenizersVocabulary(stored.path, lower_case=True)
