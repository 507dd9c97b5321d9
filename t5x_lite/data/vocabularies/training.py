"""Training vocabularies: the same arguments write the same bytes, on any machine."""

from __future__ import annotations

import collections
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import sentencepiece
from tokenizers import Tokenizer, models, trainers

from t5x_lite.data.vocabularies import files
from t5x_lite.data.vocabularies.base import write_atomically
from t5x_lite.data.vocabularies.sentence_piece import SentencePieceVocabulary
from t5x_lite.data.vocabularies.tokenizer import TokenizersVocabulary
from t5x_lite.types import InputError

# SentencePiece splits its sums over threads: a fixed number gives the same model on any machine.
_TRAINING_THREADS = 4
# SentencePiece silently skips longer sentences, so texts are cut at spaces before they reach it.
_MAX_SENTENCE_BYTES = 4096
_WORDPIECE_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ROBERTA_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_EMPTY = "the vocabulary's training text is empty: expected at least one non-empty text"


def train_sentencepiece(
    texts: Iterable[str],
    output: str | os.PathLike[str],
    *,
    vocab_size: int,
    model_type: Literal["unigram", "bpe"] = "unigram",
    byte_fallback: bool = True,
    character_coverage: float = 1.0,
    mask_token: str | None = None,
    max_sentences: int = 0,
    seed: int = 0,
) -> SentencePieceVocabulary:
    """Trains a SentencePiece model on `texts`, writes it to `output` and returns its vocabulary.

    Ids are T5's: pad 0, eos 1, unk 2, no bos; a `mask_token` ("<mask>" or "[MASK]", for masked
    language models) comes next. With `byte_fallback` 256 pieces are bytes, so that no
    text ever becomes unk. `vocab_size` counts the pieces of the file; sentinels come on top. The
    texts are streamed; with `max_sentences` a sample of so many, drawn with `seed`, is kept.

    Raises InputError if there is no text, or if `vocab_size` does not suit it.
    """
    count = 0

    def sentences() -> Iterator[str]:
        nonlocal count
        for text in texts:
            for sentence in _cut(text):
                count += 1
                yield sentence

    if mask_token not in (None, "<mask>", "[MASK]"):
        raise InputError(f"mask_token='{mask_token}': expected '<mask>' or '[MASK]', or None")
    # Control symbols, unlike user-defined ones, never come out of a text.
    controls: dict[str, Any] = {"control_symbols": [mask_token]} if mask_token else {}
    model = io.BytesIO()
    chosen = sample(sentences(), max_sentences, seed) if max_sentences else sentences()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chosen),
            model_writer=model,  # no model_prefix: the path must not get into the bytes
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=byte_fallback,
            character_coverage=character_coverage,
            max_sentence_length=2 * _MAX_SENTENCE_BYTES,
            num_threads=_TRAINING_THREADS,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
            **controls,
        )
    except (RuntimeError, OSError) as error:
        if not count:
            raise InputError(_EMPTY) from error
        # "Internal: src/x.cc(678) [condition] Vocabulary size too high (300). Please set ..."
        reason = re.sub(r"^.*\.cc\(\d+\) \[.*?\] ?(?=[A-Z])", "", str(error), flags=re.S).strip()
        raise InputError(
            f"SentencePiece cannot train vocab_size={vocab_size} on this text of {count} "
            f"sentences: {reason}"
        ) from error
    write_atomically(output, model.getvalue())
    return SentencePieceVocabulary(os.fspath(output))


def train_wordpiece(
    texts: Iterable[str],
    output: str | os.PathLike[str],
    *,
    vocab_size: int,
    lower_case: bool = True,
    max_characters: int = 1000,
    max_sentences: int = 0,
    seed: int = 0,
) -> TokenizersVocabulary:
    """Trains BERT's WordPiece on `texts`, writes `output` (a `tokenizer.json`) and returns it.

    BERT's normaliser (`lower_case` also strips accents) and word splitting; ids 0 to 4 are [PAD],
    [UNK], [CLS], [SEP], [MASK]. Then come single characters: the `max_characters` most frequent of
    the text, and again with `##` those seen inside of words. WordPiece has no byte fallback: a word
    with a character beyond these, or with one that was only ever seen first where it now stands
    inside, is [UNK] as a whole. Vocabularies that must never lose a word are byte-level or have
    byte fallback. Merges are by frequency, as the `tokenizers` library does them (Google's own
    trainer was not published; it is said to go by likelihood: Schuster & Nakajima 2012).

    Raises InputError if there is no text, or if `vocab_size` has no room for the characters.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    files.use_bert_words(tokenizer, lower_case=lower_case)
    words: collections.Counter[str] = collections.Counter()
    for text in _chosen(texts, max_sentences, seed):
        normal = tokenizer.normalizer.normalize_str(text)
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    if not words:
        raise InputError(_EMPTY)
    counts: collections.Counter[str] = collections.Counter()
    for word, number in words.items():
        for character in word:
            counts[character] += number
    # Ties go by code point. The trainer breaks them by its hash table, which is another in every
    # process, and numbers the `##` characters so: both are therefore settled here.
    kept = {c for c, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}
    kept = set(sorted(kept, key=lambda c: (-counts[c], c))[:max_characters])
    spelt = {word: number for word, number in sorted(words.items()) if kept.issuperset(word)}
    inside = sorted({f"##{character}" for word in spelt for character in word[1:]})
    fixed = [*_WORDPIECE_SPECIALS, *sorted(kept), *inside]
    _check_room(vocab_size, len(fixed), f"{len(kept)} characters, {len(inside)} of them inside too")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=fixed, initial_alphabet=[], show_progress=False
    )
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    files.split_at_spaces(trained)
    trained.train_from_iterator(_repeated(spelt), trainer)
    tokenizer.model = models.WordPiece(trained.get_vocab(), unk_token="[UNK]")
    return _finish(tokenizer, _WORDPIECE_SPECIALS, output)


def train_byte_level(
    texts: Iterable[str],
    output: str | os.PathLike[str],
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = _ROBERTA_SPECIALS,
    max_sentences: int = 0,
    seed: int = 0,
) -> TokenizersVocabulary:
    """Trains byte-level BPE on `texts`, writes `output` (a `tokenizer.json`) and returns it.

    GPT-2's splitting into words and its 256 bytes as first pieces (Radford et al. 2019), so that
    every text round-trips exactly and nothing is ever unknown. `special_tokens` take the first ids:
    RoBERTa's by default; `["<|endoftext|>"]` for GPT-2's single one.

    Raises InputError if there is no text, if `vocab_size` has no room for bytes and specials, or if
    the specials have no eos (`</s>` or `<|endoftext|>`).
    """
    _check_room(vocab_size, 256 + len(special_tokens), "bytes and specials")
    tokenizer = Tokenizer(models.BPE())
    files.use_byte_level(tokenizer, add_prefix_space=False)
    # One at a time: the trainer holds on to a few hundred only.
    stream = _chosen(texts, max_sentences, seed)
    first = next((text for text in stream if text.strip()), None)
    if first is None:
        raise InputError(_EMPTY)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=files.BYTE_ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain([first], stream), trainer)
    return _finish(tokenizer, special_tokens, output)


def sample(items: Iterable[str], size: int, seed: int) -> list[str]:
    """`size` of the items (all, if there are no more), each set of them as likely as another.

    Reservoir sampling in one pass (Vitter 1985, algorithm R). SentencePiece samples too, but by
    its own generator: with the same seed it drew other sentences in every process.
    """
    rng = np.random.default_rng(seed)
    kept: list[str] = []
    for index, item in enumerate(items):
        if index < size:
            kept.append(item)
        elif (place := int(rng.integers(index + 1))) < size:
            kept[place] = item
    return kept


def _cut(text: str) -> Iterator[str]:
    """Non-empty lines of `text`, the long ones cut at spaces into pieces SentencePiece accepts."""
    for line in text.splitlines():
        # A character is at most 4 bytes; a word longer than a piece is cut inside.
        yield from re.findall(
            rf"\S.{{0,{_MAX_SENTENCE_BYTES // 4 - 1}}}(?=\s|$)|\S{{1,{_MAX_SENTENCE_BYTES // 4}}}",
            line,
        )


def _chosen(texts: Iterable[str], max_sentences: int, seed: int) -> Iterator[str]:
    """The texts, or with `max_sentences` a sample of their lines, as for SentencePiece."""
    if not max_sentences:
        return iter(texts)
    return iter(sample((line for text in texts for line in _cut(text)), max_sentences, seed))


def _repeated(words: dict[str, int], at_once: int = 1000) -> Iterator[str]:
    """Each word as often as it was counted, in lines: trainers take texts, not counts."""
    for word, number in words.items():
        for begin in range(0, number, at_once):
            yield " ".join([word] * min(at_once, number - begin))


def _check_room(vocab_size: int, needed: int, what: str) -> None:
    if vocab_size < needed:
        raise InputError(
            f"vocab_size={vocab_size} has no room for {what}: expected {needed} or more"
        )


def _finish(
    tokenizer: Tokenizer, specials: Sequence[str], output: str | os.PathLike[str]
) -> TokenizersVocabulary:
    files.add_specials(tokenizer, specials)
    content = tokenizer.to_str().encode()
    files.resolve(tokenizer, {}, os.fspath(output))  # before anything is written
    write_atomically(output, content)
    return TokenizersVocabulary(os.fspath(output))
