"""Trained vocabularies: nothing is lost, ids and sizes, and the same bytes in every process."""

import random
import subprocess
import sys

import pytest
import sentencepiece

from t5x_lite.data.sources import TextSource
from t5x_lite.data.vocabularies import (
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizersVocabulary,
    train_byte_level,
    train_sentencepiece,
    train_wordpiece,
)
from t5x_lite.data.vocabulary_training import (
    ByteLevelPieces,
    SentencePieces,
    WordPieces,
    train_vocabulary,
)
from t5x_lite.types import InputError

TEXTS = [
    "In the beginning was the word, and the word was long.",
    "The river runs to the sea; yet the sea is not full.",
    'A time to plant, and a time to pluck up that which is planted. "Why?"',
] * 20
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz",
    "ßøłđħąęžœ",
    "Ωλφжщюאבגदकت",
    "火花日本語漢字한국어ひらがな",
    "😀🚀🎉👍🏽🧬",
    "<>/[]|_#@.,!?'\"",
]


def generated_strings(number=1000):
    """Words of the text with a letter changed, new words, emoji, CJK, other scripts, mixtures."""
    rng = random.Random(0)
    known = " ".join(TEXTS[:3]).split()

    def word():
        if rng.random() < 0.4:
            letters = list(rng.choice(known))
            letters[rng.randrange(len(letters))] = rng.choice("".join(ALPHABETS))
            return "".join(letters)
        alphabet = rng.choice(ALPHABETS)
        return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 12)))

    return [" ".join(word() for _ in range(rng.randint(1, 6))) for _ in range(number)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.mark.parametrize(
    "train",
    [
        lambda path: train_sentencepiece(TEXTS, path, vocab_size=300),
        lambda path: train_sentencepiece(TEXTS, path, vocab_size=300, model_type="bpe"),
        lambda path: train_sentencepiece(TEXTS, path, vocab_size=300, mask_token="<mask>"),
        lambda path: train_byte_level(TEXTS, path, vocab_size=300),
        lambda path: train_byte_level(TEXTS, path, vocab_size=300, special_tokens=["</s>"]),
        lambda path: ByteVocabulary(),
    ],
    ids=["unigram", "bpe", "masked", "byte-level", "byte-level, one special", "bytes"],
)
def test_nothing_is_unknown(train, tmp_path):
    vocabulary = train(tmp_path / "v")
    texts = generated_strings()
    assert len(set(texts)) > 990
    for text in texts:
        ids = vocabulary.encode(text)
        assert vocabulary.special_ids.isdisjoint(ids.tolist()), text
        assert vocabulary.decode(ids) == text


def test_a_masked_sentencepiece_vocabulary(folder):
    v = train_sentencepiece(TEXTS, folder / "m.model", vocab_size=300, mask_token="<mask>")
    assert (v.pad_id, v.eos_id, v.unk_id, v.mask_id, v.size) == (0, 1, 2, 3, 400)
    assert v.special_ids == {0, 1, 2, 3, *range(300, 400)}
    assert 3 not in v.encode("a <mask> here")
    assert v.decode([*v.encode("the sea"), 3]) == "the sea"
    plain = train_sentencepiece(TEXTS, folder / "p.model", vocab_size=300)
    assert plain.mask_id is None
    assert plain.bos_id is None
    assert plain.start_id == plain.pad_id
    assert SentencePieceVocabulary(v.path, start_token="<mask>").start_id == 3
    with pytest.raises(InputError, match="mask_token='#'"):
        train_sentencepiece(TEXTS, folder / "x.model", vocab_size=300, mask_token="#")


def test_llamas_layout(folder):
    """No padding piece: unk 0, bos 1, eos 2."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "llama"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    v = SentencePieceVocabulary(folder / "llama.model", extra_ids=0)
    assert (v.unk_id, v.bos_id, v.eos_id, v.pad_id, v.start_id) == (0, 1, 2, 2, 1)
    assert v.size == 300
    assert v.special_ids == {0, 1, 2}
    assert v.decode([1, *v.encode("the sea"), 2, 2, 9]) == "the sea"
    assert SentencePieceVocabulary(v.path, 0, start_token="</s>").fingerprint != v.fingerprint


def test_words_and_sentences_of_sentencepiece_and_bytes(folder):
    v = train_sentencepiece(TEXTS, folder / "w.model", vocab_size=300)
    text = 'The sea is full. "Why?" 花'
    ids = v.encode(text)
    words = "".join(
        "|" * bool(s) + v.piece(i) for s, i in zip(v.starts_word(ids), ids, strict=True)
    )
    assert words.count("|") == len(text.split())
    assert words.replace("|", "").startswith("▁The▁sea")
    assert words.count("|▁") == words.count("▁")
    ends = [v.piece(i) for i in ids[v.ends_sentence(ids)]]
    assert ends
    assert all(set(piece) & set(".?") for piece in ends)
    b = ByteVocabulary()
    assert b.starts_word(b.encode("a b")).tolist() == [False, True, False]
    assert b.ends_sentence(b.encode("a.b? é")).tolist() == [c in ".?" for c in "a.b? éx"]
    for one in (v, b):
        special = sorted(one.special_ids)
        assert one.starts_word(special).all()
        assert not one.ends_sentence(special).any()


def test_wordpiece(folder):
    v = train_wordpiece([*TEXTS, "Café 火"], folder / "wp.json", vocab_size=100)
    assert v.size == 100
    pieces = [v.piece(i) for i in range(v.size)]
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (v.pad_id, v.unk_id, v.bos_id, v.eos_id, v.mask_id) == (0, 1, 2, 3, 4)
    assert len(set(pieces)) == 100
    characters = [p for p in pieces[5:] if len(p) == 1]
    assert characters == sorted({c for c in "".join(TEXTS).lower() if not c.isspace()} | {"火"})
    assert "##火" not in pieces  # BERT makes each such character a word
    ids = v.encode("The Words: plants, CAFE, 火!")
    assert v.decode(ids) == "the words [UNK] plants, cafe, 火 [UNK]"
    assert "the" in pieces
    cased = train_wordpiece(TEXTS, folder / "cased.json", vocab_size=100, lower_case=False)
    assert cased.decode(cased.encode("The the")) == "The the"


def test_wordpiece_leaves_out_rare_characters(folder):
    texts = ["abc abd acd", "abcd", "x 火"]
    v = train_wordpiece(texts, folder / "few.json", vocab_size=40, max_characters=4)
    assert [v.piece(i) for i in range(5, 9)] == ["a", "b", "c", "d"]
    assert v.encode("x abx 火").tolist() == [1, 1, 1]
    assert v.decode(v.encode("abcd")) == "abcd"


def test_byte_level(folder):
    v = train_byte_level(TEXTS, folder / "bl.json", vocab_size=300)
    assert [v.piece(i) for i in range(5)] == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert (v.bos_id, v.pad_id, v.eos_id, v.unk_id, v.mask_id) == (0, 1, 2, 3, 4)
    assert v.size == 300
    assert v.encode(" the").tolist() == [[v.piece(i) for i in range(300)].index("Ġthe")]
    gpt2 = train_byte_level(
        TEXTS, folder / "gpt2.json", vocab_size=300, special_tokens=["<|endoftext|>"]
    )
    assert gpt2.bos_id == gpt2.eos_id == gpt2.pad_id == 0
    assert gpt2.special_ids == {0}


PROGRAM = """
import hashlib, pathlib, sys
from t5x_lite.data.vocabularies import train_byte_level, train_wordpiece
words = ["".join("abcdefghij"[int(d)] for d in str(i * i * 7919)) for i in range(400)]
texts = [" ".join(words[i : i + 9]) + " 火花é"[: i % 4] for i in range(390)]
for train in (train_byte_level, train_wordpiece):
    for more in ({}, {"max_sentences": 50, "seed": 3}):
        train(texts, sys.argv[1], vocab_size=400, **more)
        print(hashlib.sha256(pathlib.Path(sys.argv[1]).read_bytes()).hexdigest())
"""


def test_training_writes_the_same_bytes_in_every_process(tmp_path):
    """Hash tables of the library are seeded anew in each; no id may hang on their order."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "v.json")]
    found = {
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in "abc"
    }
    assert len(found) == 1
    assert len(set(found.pop().split())) == 4


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        (SentencePieces(mask_token="<mask>"), SentencePieceVocabulary),
        (SentencePieces("bpe"), SentencePieceVocabulary),
        (WordPieces(lower_case=False), TokenizersVocabulary),
        (ByteLevelPieces(("<|endoftext|>",)), TokenizersVocabulary),
        (None, SentencePieceVocabulary),
    ],
)
def test_the_program_trains_each_kind_from_a_source(kind, cls, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    source = TextSource({"train": str(tmp_path / "text.txt")})
    output = str(tmp_path / "folder" / "vocabulary")
    for _ in range(2):  # what exists is kept
        train_vocabulary(source=source, output=output, vocab_size=300, kind=kind)
    said = capsys.readouterr().out
    assert "characters a token, 0.00% unknown" in said
    assert "exists already" in said
    vocabulary = cls(output)
    assert vocabulary.decode(vocabulary.encode("the sea is not full")) == "the sea is not full"


def test_what_cannot_be_trained_writes_nothing(tmp_path):
    output = tmp_path / "v.json"
    for train in (train_wordpiece, train_byte_level):
        for nothing in ([], ["", " \n"]):
            with pytest.raises(InputError, match="training text is empty"):
                train(nothing, output, vocab_size=300)
    with pytest.raises(InputError, match=r"vocab_size=20 has no room for 2. characters"):
        train_wordpiece(TEXTS, output, vocab_size=20)
    with pytest.raises(InputError, match="vocab_size=260 has no room for bytes and specials"):
        train_byte_level(TEXTS, output, vocab_size=260)
    with pytest.raises(InputError, match="has no end of text"):
        train_byte_level(TEXTS, output, vocab_size=300, special_tokens=["<s>"])
    assert not output.exists()
