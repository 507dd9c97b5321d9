"""Shapes as a compiled program's text has them: `(bf16[2,8]{1,0:T(8,128)S(1)}, f32[])`."""

from __future__ import annotations

import math
import re
from typing import Final

_BYTES: Final = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2", "s4", "u4"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
_HOST: Final = "S(5)"  # of an array's layout


def elements(shape: str) -> int:
    """Numbers in an array, or in a tuple's first."""
    match = re.search(r"\w+\[([\d,]*)\]", shape)
    return math.prod(int(n) for n in match[1].split(",") if n) if match else 0


def nbytes(shape: str) -> int:
    """Bytes of a shape's text, all parts of a tuple together."""
    return sum(
        _BYTES[kind] * math.prod(int(n) for n in sides.split(",") if n)
        for kind, sides in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        if kind in _BYTES
    )


def hbm_bytes(shape: str) -> int:
    """Bytes of a shape's arrays in HBM, and not in a chip's own memory, `S(1)`, or a host's."""
    return sum(
        nbytes(part)
        for part in re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", shape)
        if "S(" not in part
    )


def on_host(shape: str) -> bool:
    """Whether an array, or one of a tuple's, is in the host's memory."""
    return _HOST in shape


def parts(shape: str) -> list[str]:
    """Of a tuple's text, its parts."""
    depth, found = 0, [""]
    for character in shape.strip()[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character == ",":
            found.append("")
        else:
            found[-1] += character
    return found
