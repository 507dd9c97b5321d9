"""What a model is asked for: a continuation or an answer, its masks' contents, a label, a vector.

A mode turns texts into rows of token ids, rows into what its program computes, and that into
records for people. `<mask>` in a text stands for a gap, whatever the vocabulary calls it.

| mode | encoder | decoder | encoder-decoder |
|---|---|---|---|
| generate | | goes on from the text, or answers it | writes what it was trained to |
| infill | | fills one `<mask>`, or as its neighbour | fills every `<mask>` (T5), or writes the text anew (BART) |
| score | | log-likelihood of a text, or of targets behind it | of targets behind inputs |
| fill_mask | candidates for each `<mask>` | | |
| embed | one vector | one vector | one vector, of the encoder |
| classify | label or value, by a SequenceHead | likewise | likewise |
| tag | a label a word, by a TokenHead | | |
"""  # noqa: E501

from __future__ import annotations

from typing import Literal

from t5x_lite.decode.asking import Gaps
from t5x_lite.decode.loaded import Loaded
from t5x_lite.decode.modes.base import Item, Mode, Options, Row
from t5x_lite.decode.modes.labels import Classify, Tag
from t5x_lite.decode.modes.masks import FillMask
from t5x_lite.decode.modes.scores import Score
from t5x_lite.decode.modes.text import FillGap, FillSentinels, Generate, Rewrite
from t5x_lite.decode.modes.vectors import Embed
from t5x_lite.models.config_heads import LMHead, SequenceHead, TokenHead
from t5x_lite.types import InputError

__all__ = ["Item", "Mode", "Name", "Options", "Row", "make", "room"]

Name = Literal["generate", "infill", "score", "fill_mask", "embed", "classify", "tag"]
_INFILL: dict[Gaps, type[Mode]] = {"mask": Rewrite, "sentinels": FillSentinels, "middle": FillGap}
_DEFAULT_INPUT_TOKENS = 128


def make(loaded: Loaded, name: Name | None, options: Options = Options()) -> Mode:
    """The model asked in the mode called `name`; None: what the model is for.

    Raises InputError for a mode that the model can't do, options that the mode doesn't take, and
    rows longer than the model.
    """
    family, modes = _modes(loaded)
    name = next(iter(modes)) if name is None else name
    if name not in modes:
        raise InputError(f"infer.mode='{name}' is not for {family}, which does: {', '.join(modes)}")
    made = modes[name](loaded, options)
    _check_lengths(loaded, made)
    return made


def _modes(loaded: Loaded) -> tuple[str, dict[Name, type[Mode]]]:
    """What kind of model this is, and its modes, the one that it is for first."""
    config = loaded.model.config
    family = "an encoder-decoder"
    if config.decoder is None:
        family = "an encoder alone"
    elif config.encoder is None:
        family = "a decoder alone"
    headed = f"{family} with a {type(config.head).__name__}"
    match config.head:
        case LMHead() if config.decoder is None:
            return family, {"fill_mask": FillMask, "embed": Embed}
        case LMHead():
            infill = _INFILL[_gaps(loaded)]
            return family, {
                "generate": Generate,
                "infill": infill,
                "score": Score,
                "embed": Embed,
            }
        case SequenceHead():
            return headed, {"classify": Classify, "embed": Embed}
        case TokenHead() if config.decoder is None:
            return headed, {"tag": Tag, "embed": Embed}
    return headed.replace("a Emb", "an Emb"), {"embed": Embed}


def _gaps(loaded: Loaded) -> Gaps:
    """What stands for a gap: as the model was trained, or by what its vocabulary has."""
    if loaded.asking.gaps is not None:
        return loaded.asking.gaps
    if loaded.model.config.encoder is None:
        return "middle"
    return "sentinels" if loaded.vocabulary.mask_id is None else "mask"


def room(loaded: Loaded, name: Name | None, max_tokens: int) -> int:
    """How many tokens of inputs a row has by default: 128, or as many as the model can take."""
    config = loaded.model.config
    writes = name in (None, "generate", "infill") and isinstance(config.head, LMHead)
    most = _DEFAULT_INPUT_TOKENS
    for stack in ("encoder", "decoder"):
        if getattr(config, stack) is not None and (own := loaded.room(stack)) is not None:
            # A decoder alone has what it writes in the same row.
            shared = max_tokens - 1 if writes and config.encoder is None else 0
            most = min(most, own - shared)
    return max(1, most)


def _check_lengths(loaded: Loaded, mode: Mode) -> None:
    """Raises InputError where rows are longer than the positions that a model learned."""
    config = loaded.model.config
    inputs, new = mode.options.max_input_tokens, mode.options.max_tokens
    writes = isinstance(mode, Generate) and not isinstance(mode, Score)
    rows = {"encoder": inputs, "decoder": new if writes else inputs}
    if config.encoder is None and writes:
        rows["decoder"] = inputs + new - 1
    if isinstance(mode, Embed) and config.encoder is not None:
        rows["decoder"] = 0
    for name, length in rows.items():
        most = None if getattr(config, name) is None else loaded.room(name)
        if most is not None and length > most:
            what = f"infer.max_input_tokens={inputs}"
            what += f" and max_tokens={new} make" if writes else " makes"
            raise InputError(
                f"{what} rows of {length} {name} tokens, but the model learned {most} positions "
                "for them: lower one of the two"
            )
