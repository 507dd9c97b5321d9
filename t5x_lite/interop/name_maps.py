"""An architecture of Hugging Face's as data: its settings, and the names of its tensors.

A `Rule` says which of their tensors holds one of our parameters. `{base}` in a name is the prefix
that a class with a head puts before its trunk's tensors; `{layer}` counts along our first axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from t5x_lite.interop.axes import Axes, parse, same
from t5x_lite.models.config import ModelConfig

Settings: TypeAlias = Mapping[str, Any]  # a config.json
Tensors: TypeAlias = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Rule:
    """One of our parameters and the tensor that holds it."""

    path: str  # ours, as in docs/contracts.md
    name: str  # theirs
    axes: str | None = None  # see `axes`; None: the same axes in the same order
    # Names under which files may hold the same tensor once more, or instead (tied weights).
    aliases: tuple[str, ...] = ()

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name

    def layout(self, shape: Sequence[int]) -> Axes:
        """Of a parameter (or one layer of it) of `shape`."""
        return same(len(shape)) if self.axes is None else parse(self.axes)


def linear(path: str, name: str, inputs: str, outputs: str) -> tuple[Rule, ...]:
    """A `torch.nn.Linear` with axes `inputs` -> `outputs`; its bias, where the model has one."""
    return (
        Rule(f"{path}/kernel", f"{name}.weight", f"{inputs} {outputs} -> ({outputs}) ({inputs})"),
        Rule(f"{path}/bias", f"{name}.bias", f"{outputs} -> ({outputs})"),
    )


def attention(path: str, query: str, key: str, value: str, out: str) -> tuple[Rule, ...]:
    """Four `torch.nn.Linear`."""
    return (
        *linear(f"{path}/query", query, "embed", "heads kv"),
        *linear(f"{path}/key", key, "embed", "heads kv"),
        *linear(f"{path}/value", value, "embed", "heads kv"),
        *linear(f"{path}/out", out, "heads kv", "embed"),
    )


def fused(path: str, name: str, axes: str) -> tuple[Rule, ...]:
    """Queries, keys and values in one tensor: `{part}` in the kernel's axes is each one's share.

    Such as "embed heads kv -> (heads {part} kv) embed". Biases have the same axes but embed.
    """
    return tuple(
        Rule(f"{path}/{ours}/{leaf}", f"{name}.{theirs}", described.replace("{part}", f"{index}/3"))
        for index, ours in enumerate(("query", "key", "value"))
        for leaf, theirs, described in (
            ("kernel", "weight", axes),
            ("bias", "bias", axes.replace("embed", "")),
        )
    )


def norm(path: str, name: str) -> tuple[Rule, ...]:
    """A norm's scale; its bias, where it has one."""
    return Rule(f"{path}/scale", f"{name}.weight"), Rule(f"{path}/bias", f"{name}.bias")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What `load_hf` and `save_hf` know of a `model_type`."""

    model_type: str
    # Their classes, and the prefix that each puts before the trunk's tensors ("" or "bert.").
    classes: Mapping[str, str]
    # (settings with `architectures`, tensors) -> config. Tensors are given because some settings
    # are only seen there: a bias of zeros, a head that is tied or not. Raises InputError.
    read: Callable[[Settings, Tensors], ModelConfig]
    # config -> settings, with `architectures`. Raises InputError where there are none for it.
    write: Callable[[ModelConfig], dict[str, Any]]
    # config -> rules; those of parameters that the config's model doesn't have are ignored.
    rules: Callable[[ModelConfig], tuple[Rule, ...]]
    # Regexes of tensors that may be left out if no rule takes them: buffers, unused heads.
    left_out: tuple[str, ...] = ()
    # (regex, replacement) that turn names of old files into today's.
    renamed: tuple[tuple[str, str], ...] = ()
    # Tensors of a config that no parameter of ours holds.
    constants: Callable[[ModelConfig], dict[str, np.ndarray]] = lambda config: {}
    # Regex of settings that our configs don't have, and that go with a tokenizer.
    carried: str = r".*_token_id"
