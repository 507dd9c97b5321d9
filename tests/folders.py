"""Hugging Face directories for tests: a fixture's weights with a small tokenizer beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

FIXTURES = Path(__file__).resolve().parent / "fixtures"
SIZE = 42  # of every fixture's vocabulary
WORDS = ("alpha", "beta", "gamma", "delta", "eps", "zeta", "##ta", "##ma")
# By family, the specials in the order of their ids, and how many sentinels end the vocabulary.
_SPECIALS = {
    "bert": (("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), 0),
    "roberta": (("<s>", "<pad>", "</s>", "<unk>", "<mask>"), 0),
    "bart": (("<s>", "<pad>", "</s>", "<unk>", "<mask>"), 0),
    "gpt2": (("<|endoftext|>", "<unk>"), 3),
    "llama": (("<unk>", "<s>", "</s>"), 0),
    "t5": (("<pad>", "</s>", "<unk>"), 4),
}


def family(name: str) -> str:
    """'bert' for 'bert_tagger' and 'peft/t5/base'."""
    parts = name.split("/")
    return (parts[1] if parts[0] == "peft" else parts[0]).split("_")[0]


def write_tokenizer(folder: Path, name: str, size: int = SIZE) -> None:
    """A `tokenizer.json` of `WORDS` and fillers, words cut greedily as WordPiece does."""
    specials, sentinels = _SPECIALS[family(name)]
    extra = [f"<extra_id_{k}>" for k in reversed(range(sentinels))]
    unknown = next(special for special in specials if "unk" in special.lower())
    pieces = [*specials, *WORDS]
    pieces += [f"filler{k}" for k in range(size - len(pieces) - sentinels)] + extra
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in (*specials, *extra)])
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = next((s for s in ("</s>", "[SEP]", "<|endoftext|>") if s in specials), specials[0])
    bos = next((s for s in ("<s>", "[CLS]", "<|endoftext|>") if s in specials), None)
    names = {"eos_token": eos, "unk_token": unknown, "bos_token": bos}
    names["pad_token"] = next((s for s in ("<pad>", "[PAD]") if s in specials), eos)
    names["mask_token"] = next((s for s in ("<mask>", "[MASK]") if s in specials), None)
    (folder / "special_tokens_map.json").write_text(json.dumps(names))


def hugging_face(name: str, scratch: Path) -> Path:
    """A copy of `tests/fixtures/hf/<name>` or `peft/<name>/base` in `scratch`, with a tokenizer."""
    source = FIXTURES / (name if name.startswith("peft/") else f"hf/{name}")
    made = scratch / name.replace("/", "_")
    shutil.copytree(source, made, ignore=shutil.ignore_patterns("*.npz"))
    settings = json.loads((made / "config.json").read_text())
    write_tokenizer(made, name, settings["vocab_size"])
    return made
