"""Times generation beside Hugging Face transformers on the same CPU: tokens/s, prefill included.

    python benchmarks/decode.py --hf_python=/path/to/python    # one with torch and transformers
    python benchmarks/decode.py --rows=gpt                     # rows whose names have "gpt"; ours

Two processes take turns, row by row and round by round, so that both see the same machine; random
weights of the same shapes, float32, prompts without padding, and no row ends before its last
token. Nothing here is asserted.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import sides
from absl import app, flags
from rich.console import Console
from rich.table import Table

from t5x_lite import types
from t5x_lite.decode.generate import generate
from t5x_lite.decode.sampling import BeamSearch, Greedy
from t5x_lite.models import transformer
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.models.config_heads import LMHead
from t5x_lite.models.config_positions import Learned


@dataclass(frozen=True)
class Shape:
    """A model, and the prompts it goes on from."""

    vocab: int
    embed: int
    layers: int
    encoder_layers: int  # 0: a decoder alone, GPT-2's
    heads: int
    head_dim: int
    mlp: int
    positions: int  # that a decoder alone learns
    prompt: int
    new: int  # tokens made

    def config(self) -> ModelConfig:
        """Ours: T5 1.1's, or GPT-2's."""
        if self.encoder_layers:
            stack = functools.partial(
                StackConfig, num_heads=self.heads, head_dim=self.head_dim, mlp_dim=self.mlp
            )
            return ModelConfig(
                vocab_size=self.vocab,
                embed_dim=self.embed,
                encoder=stack(num_layers=self.encoder_layers),
                decoder=stack(num_layers=self.layers),
            )
        return ModelConfig(
            vocab_size=self.vocab,
            embed_dim=self.embed,
            decoder=StackConfig(
                num_layers=self.layers,
                num_heads=self.heads,
                head_dim=self.head_dim,
                mlp_dim=self.mlp,
                mlp_activations=("gelu",),
                biases=("query", "key", "value", "out", "wi", "wo"),
                positions=Learned(max_length=self.positions),
                attention_scale=None,
                norm="layer",
                norm_epsilon=1e-5,
            ),
            head=LMHead(tied=True),
            initializer_stddev=0.02,
        )


SHAPES = {
    "T5 1.1 small, 512": Shape(32128, 512, 8, 8, 6, 64, 1024, 0, 512, 64),
    "gpt 6 x 512, 128": Shape(50257, 512, 6, 0, 8, 64, 2048, 1024, 128, 64),
    "test T5": Shape(64, 16, 1, 1, 2, 8, 32, 0, 16, 4),
    "test gpt": Shape(64, 16, 1, 0, 2, 8, 32, 32, 16, 4),
}
STRATEGIES = {"greedy": Greedy(), "beam 4": BeamSearch(4)}

_ROWS = flags.DEFINE_string("rows", "", "Only rows whose names contain this; 'test' runs toys.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Prompts that are answered together.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed turns of each side.")
_HF_PYTHON = flags.DEFINE_string("hf_python", None, "A Python with torch and transformers.")


@dataclass
class Times:
    """Of one side, in seconds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, wall: float, cpu: float) -> None:
        self.wall.append(wall)
        self.cpu.append(cpu)

    def rate(self, tokens: int) -> float:
        """Tokens a second, by the median."""
        return tokens / statistics.median(self.wall)


def compiled(
    shape: Shape, params: Any, tokens: np.ndarray, strategy: Any
) -> tuple[Callable[[], Any], float]:
    """One whole generation, and the seconds it took to compile it."""
    key = types.ENCODER_INPUT_TOKENS if shape.encoder_layers else types.DECODER_INPUT_TOKENS
    batch = {key: tokens}
    model = transformer.Transformer(shape.config())
    # No token is -1: every row goes on to its last token.
    program = functools.partial(
        generate, model, strategy=strategy, max_tokens=shape.new, eos_id=-1, pad_id=0
    )
    start = time.perf_counter()
    run = jax.jit(program).lower(params, batch).compile()
    return lambda: jax.block_until_ready(run(params, batch)), time.perf_counter() - start


def main(argv: list[str]) -> None:
    if argv[1:]:
        sys.exit(f"error: unexpected '{argv[1]}' (--help shows the flags)")
    names = [
        (name, int(batch), strategy)
        for name in SHAPES
        for batch in _BATCHES.value
        for strategy in STRATEGIES
        if _ROWS.value in f"{name}, batch {batch}, {strategy}"
        and (name.startswith("test") == _ROWS.value.startswith("test"))
    ]
    if not names:
        sys.exit(f"error: no row's name has '{_ROWS.value}'; shapes: {', '.join(SHAPES)}")
    theirs = sides.Side(_HF_PYTHON.value, "decode_hf.py") if _HF_PYTHON.value else None
    title = f"jax {jax.__version__}"
    if theirs is not None:
        title += "".join(f", {name} {version}" for name, version in theirs.hello.items())
    table = Table(title=title)
    columns = ("tokens/s", "Hugging Face", "ratio", "CPU-s", "Hugging Face", "compile, s")
    table.add_column("row")
    for column in columns:
        table.add_column(column, justify="right")
    made, params = "", None
    for name, batch, strategy in names:
        shape = SHAPES[name]
        if name != made:
            model = transformer.Transformer(shape.config())
            params = jax.jit(functools.partial(transformer.init, model))(jax.random.key(0))
            if theirs is not None:
                theirs.ask(make=vars(shape))
            made = name
        rng = np.random.default_rng(0)
        tokens = rng.integers(2, shape.vocab, (batch, shape.prompt)).astype(np.int32)
        run, seconds = compiled(shape, params, tokens, STRATEGIES[strategy])
        beams = getattr(STRATEGIES[strategy], "beams", 1)
        ask = {"tokens": tokens.tolist(), "beams": beams, "new": shape.new}
        own, other = Times(), Times()
        for turn in range(_ROUNDS.value + 1):  # the first is not timed
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            spent = time.perf_counter() - wall, time.process_time() - cpu
            answer = theirs.ask(run=ask) if theirs is not None else None
            if turn:
                own.add(*spent)
                if answer is not None:
                    other.add(answer["wall"], answer["cpu"])
        total = batch * shape.new
        cells = [f"{own.rate(total):,.1f}", "", "", f"{statistics.median(own.cpu):.2f}", ""]
        if theirs is not None:
            cells[1] = f"{other.rate(total):,.1f}"
            cells[2] = f"{own.rate(total) / other.rate(total):.2f}"
            cells[4] = f"{statistics.median(other.cpu):.2f}"
        row = [f"{name}, batch {batch}, {strategy}", *cells, f"{seconds:.1f}"]
        print(" | ".join(row), file=sys.stderr, flush=True)
        table.add_row(*row)
    if theirs is not None:
        theirs.close()
    Console(width=max(Console().width, 110)).print(table)


if __name__ == "__main__":
    app.run(main)
