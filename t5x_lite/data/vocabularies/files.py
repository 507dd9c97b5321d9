"""Published tokenizer files, read into a `tokenizers.Tokenizer` and the names of its specials.

    tokenizer.json               whole: how to split, the pieces, the specials
    vocab.txt                    BERT's WordPiece, a piece a line
    vocab.json and merges.txt    byte-level BPE of GPT-2, RoBERTa and BART

Beside them, `tokenizer_config.json` and `special_tokens_map.json` may name the specials.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from t5x_lite.data.vocabularies.base import read_bytes
from t5x_lite.types import InputError

ROLES: Final = ("bos", "eos", "pad", "unk", "mask")
BYTE_ALPHABET: Final = sorted(pre_tokenizers.ByteLevel.alphabet())
EXPECTED: Final = "a tokenizer.json, a vocab.txt, or a vocab.json with its merges.txt"
_IN_FOLDER = ("tokenizer.json", "vocab.json", "vocab.txt")
# What config files call a role: BERT's [CLS] and [SEP] stand where others have bos and eos.
_KEYS = {"bos": ("bos_token", "cls_token"), "eos": ("eos_token", "sep_token")}
# Where no file says: the first of these whose bos and eos are both in the vocabulary.
_CONVENTIONS: Final[tuple[Mapping[str, str], ...]] = (
    {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"},
    {"bos": "[CLS]", "eos": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"},
    {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},
    {"eos": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"},
)
Config = dict[str, Any]


def load(path: str, fields: Mapping[str, str | None], lower_case: bool | None) -> Tokenizer:
    """The tokenizer of a file (or of a folder with one), specials registered.

    `fields` gives specials by role and `lower_case` the casing of a `vocab.txt`; None: as the files
    beside say. Raises InputError for what is missing, unreadable or contradictory.
    """
    path = find(path)
    text = _text(path, EXPECTED)
    content = _json(text)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        if lower_case is not None:
            raise InputError(
                f"lower_case={lower_case} is for a vocab.txt; '{path}' says itself how it splits "
                "words: leave it out"
            )
        return _from_json(path, text)
    config = beside(path)
    if isinstance(content, dict):
        tokenizer = _byte_level(path, content, config, fields)
    elif path.endswith(".json") or text.lstrip()[:1] == "{":
        raise InputError(f"vocabulary file '{path}' is not readable JSON; expected {EXPECTED}")
    else:
        tokenizer = _wordpiece(path, text, config, fields, lower_case)
    add_specials(tokenizer, resolve(tokenizer, {**config, **_given(fields)}, path).values())
    return tokenizer


def find(path: str) -> str:
    """The file itself; in a folder, the first of `tokenizer.json`, `vocab.json`, `vocab.txt`."""
    if not os.path.isdir(path):
        return path
    for name in _IN_FOLDER:
        if os.path.exists(os.path.join(path, name)):
            return os.path.join(path, name)
    raise InputError(f"folder '{path}' has no {', '.join(_IN_FOLDER[:-1])} or {_IN_FOLDER[-1]}")


def beside(path: str) -> Config:
    """What `special_tokens_map.json` and `tokenizer_config.json` in the same folder say.

    Specials are under their role (`eos`; None where the files say there is none), the rest under
    its own key.
    """
    found: Config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        place = os.path.join(os.path.dirname(path), name)
        if os.path.exists(place):
            content = _json(_text(place, name))
            if not isinstance(content, dict):
                raise InputError(f"'{place}' is not a readable JSON object; mend or remove it")
            found |= {k: v for k, v in content.items() if v is not None or k not in found}
    for role in ROLES:
        keys = [key for key in _KEYS.get(role, (f"{role}_token",)) if key in found]
        values = [found[key] for key in keys if found[key] is not None]
        if keys:
            value = values[0] if values else None
            found[role] = value.get("content") if isinstance(value, dict) else value
    return found


def resolve(tokenizer: Tokenizer, names: Mapping[str, Any], where: str) -> dict[str, str]:
    """The specials by role: as `names` says ("" or None: none), or by the published conventions.

    Raises InputError for a name that the vocabulary lacks, and if there is no eos.
    """
    held = tokenizer.get_vocab(with_added_tokens=True)
    convention: Mapping[str, str] = next(
        (c for c in _CONVENTIONS if c["eos"] in held and c.get("bos", c["eos"]) in held), {}
    )
    found = {}
    for role in ROLES:
        if role in names:
            if names[role] and names[role] not in held:
                raise InputError(
                    f"vocabulary '{where}' has no '{names[role]}', which is to be its {role}_token"
                )
            if names[role]:
                found[role] = names[role]
        elif convention.get(role) in held:
            found[role] = convention[role]
    if "eos" not in found:
        raise InputError(
            f"vocabulary '{where}' has no end of text: none of "
            f"{', '.join(dict.fromkeys(c['eos'] for c in _CONVENTIONS))} is in it; give eos_token"
        )
    return found


def add_specials(tokenizer: Tokenizer, specials: Iterable[str]) -> None:
    """Registers specials that the vocabulary has, in the order of their ids."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    ordered = sorted(set(specials), key=lambda name: ids[name])
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in ordered])


def use_bert_words(
    tokenizer: Tokenizer,
    *,
    lower_case: bool,
    strip_accents: bool | None = None,
    chinese_characters: bool = True,
) -> None:
    """BERT's normaliser, its splitting at spaces and punctuation, and its joining of pieces."""
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=chinese_characters,
        strip_accents=strip_accents,
        lowercase=lower_case,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)


def use_byte_level(tokenizer: Tokenizer, *, add_prefix_space: bool) -> None:
    """GPT-2's splitting into words with their space, written as bytes."""
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()


def split_at_spaces(tokenizer: Tokenizer) -> None:
    """For words that are split already."""
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


def _from_json(path: str, text: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"'{path}' is not a tokenizer.json that can be used: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _wordpiece(
    path: str,
    text: str,
    config: Config,
    fields: Mapping[str, str | None],
    lower_case: bool | None,
) -> Tokenizer:
    pieces = text.removesuffix("\n").split("\n")
    vocab = {piece.rstrip("\r"): index for index, piece in enumerate(pieces)}
    unk = {**config, **_given(fields)}.get("unk", "[UNK]")
    if unk not in vocab:
        raise InputError(
            f"vocabulary file '{path}' has no line '{unk}': expected {EXPECTED}; a vocab.txt has a "
            "piece a line, its unk_token among them"
        )
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unk, max_input_chars_per_word=100))
    use_bert_words(
        tokenizer,
        lower_case=bool(config.get("do_lower_case", True)) if lower_case is None else lower_case,
        strip_accents=config.get("strip_accents"),
        chinese_characters=bool(config.get("tokenize_chinese_chars", True)),
    )
    return tokenizer


def _byte_level(
    path: str, vocab: dict[str, int], config: Config, fields: Mapping[str, str | None]
) -> Tokenizer:
    if not vocab or not all(isinstance(index, int) for index in vocab.values()):
        raise InputError(f"'{path}' does not map pieces to ids; expected {EXPECTED}")
    merges_path = os.path.join(os.path.dirname(path), "merges.txt")
    merges = []
    for number, line in enumerate(_text(merges_path, "the merges of vocab.json").split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or not all(piece in vocab for piece in (*pair, "".join(pair))):
            raise InputError(
                f"'{merges_path}', line {number}: {line!r} is not a pair of pieces that "
                f"'{path}' has, joined and apart"
            )
        merges.append((pair[0], pair[1]))
    missing = sum(byte not in vocab for byte in BYTE_ALPHABET)
    unk = {**config, **_given(fields)}.get("unk", "<unk>")
    if missing and unk not in vocab:
        raise InputError(
            f"'{path}' lacks {missing} of the 256 bytes and has no unk_token: text would vanish"
        )
    # With all the bytes nothing can be unknown.
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unk if missing else None))
    use_byte_level(tokenizer, add_prefix_space=bool(config.get("add_prefix_space")))
    return tokenizer


def _given(fields: Mapping[str, str | None]) -> dict[str, str]:
    return {role: value for role, value in fields.items() if value is not None}


def _text(path: str, expected: str) -> str:
    try:
        return read_bytes(path, expected).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"vocabulary file '{path}' is not UTF-8 text ({error.reason} at byte {error.start}); "
            f"expected {expected}. SentencePiece models are SentencePieceVocabulary's"
        ) from error


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None
