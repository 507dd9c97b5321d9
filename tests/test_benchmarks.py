"""The benchmark runs and prints what it says; its attribution of operations is right."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests import xla

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "benchmarks" / "train_step.py"


def run(program, *flags, code=0):
    """A benchmark in a process of its own, on one device, which ends with `code`."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / program), *map(str, flags)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla.flags(1)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == code, done.stderr[-2000:]
    return done


def load(name):
    """A benchmark as a module, which finds the others as it does when it is run."""
    if name not in sys.modules:  # flags can be defined but once
        sys.path.insert(0, str(PROGRAM.parent))
        try:
            importlib.import_module(name)
        finally:
            sys.path.remove(str(PROGRAM.parent))
    return sys.modules[name]


@pytest.fixture(scope="module")
def program():
    return load("train_step")


@pytest.fixture(scope="module")
def costs():
    return load("costs")


def test_rates_are_what_the_times_amount_to(program, monkeypatch):
    monkeypatch.setattr(program.os, "cpu_count", lambda: 2)
    rates = program.Rates(
        tokens=1000,
        gigaflop=300.0,
        wall=5.0,
        cpu=8.0,
        ceiling_gigaflop=20.0,
        ceiling_wall=0.5,
        ceiling_cpu=0.4,
    )
    assert rates.tokens_per_second == 200.0
    assert rates.idle_tokens_per_second == 250.0
    assert rates.gigaflops == 60.0
    assert rates.ceiling_gigaflops == 40.0
    assert rates.percent_of_ceiling == pytest.approx(75.0)  # 37.5 of 50 a CPU-second


def test_the_ceiling_counts_its_own_products(program):
    run, gigaflop = program.ceiling(16 * 128, 192, 384, "float32")
    once = 2 * 2 * 16 * 128 * 192 * 384 / 1e9
    assert gigaflop / once == pytest.approx(round(gigaflop / once))
    assert abs(run() - 1.0).max() < 1e-3


def test_it_prints_its_table():
    done = run("train_step.py", "--config=test", "--steps=2", "--costs=3")
    for column in ("tokens/s", "model GFLOP/s", "percent of the ceiling"):
        assert column in done.stdout
    by_kind, by_place = done.stdout.split("Where the time of a step goes, by ")[1:]
    assert int(re.search(r"^│ product +│ +(\d+) ", by_kind, re.M)[1]) > 20
    assert len(re.findall(r"^│ .*│ +[\d.]+ │ +[\d.]+ │", by_place, re.M)) == 3


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jit(s)/jvp(Transformer)/decoder/while/body/mlp/wi_0/dot_general", "decoder mlp, forward"),
        (
            "jit(s)/transpose(jvp(Transformer))/encode/encoder/while/body/self_attention/out/dot",
            "encoder self_attention, backward",
        ),
        (
            "jit(s)/jvp(Transformer)/decoder/while/body/layers/cross_attention.key_value/key/dot",
            "decoder cross_attention, forward",
        ),
        ("jit(s)/jvp(Transformer)/lm_head/dot_general", "logits and loss, forward"),
        ("jit(s)/add", "optimizer and the rest"),
        ("", "copies that XLA adds (loop carries, layouts)"),
    ],
)
def test_operations_belong_to_parts(program, name, part):
    assert program.part_of(name) == part


def test_a_moment_is_shared_by_all_that_run(costs):
    spans = [("a", 10, 12), ("b", 11, 13), ("c", 15, 16), ("a", 15, 16)]
    seconds, idle = costs.share(spans)
    assert seconds == {"a": 1.5 + 0.5, "b": 1.5, "c": 0.5}
    assert idle == 2
    assert costs.share([]) == ({}, 0)


def test_costs_are_those_of_the_operations(costs):
    batch, rows, inner, columns, turns = 2, 8, 16, 32, 3

    @jax.jit
    def function(x, w):
        there = lambda x: jnp.einsum("bmk,bkn->bmn", x, w)
        back = lambda x: jnp.einsum("bmn,bkn->bmk", x, w)
        product = lambda x, _: (jnp.tanh(back(there(x))), None)
        return jax.lax.scan(product, x, None, turns)[0]

    x = jnp.ones((batch, rows, inner))
    w = jnp.ones((batch, inner, columns))
    compiled = function.lower(x, w).compile()
    found = costs.measure(compiled, lambda: compiled(x, w), lambda path: path.split("/")[-1])
    assert all(cost.seconds > 0 for cost in found)
    products = [cost for cost in found if cost.kind == "product"]
    expected = turns * 2 * 2 * batch * rows * inner * columns / 1e9
    assert sum(cost.gigaflop for cost in products) == pytest.approx(expected)
    assert {cost.shape for cost in products} == {"2 of 8x16x32", "2 of 8x32x16"}
    assert {cost.count for cost in products} == {turns}
    assert {cost.kind for cost in found}.isdisjoint(costs.CONTROL)  # or loops would count twice
    assert found[-1].place == "nothing under way"
    kinds, places = costs.tables(found, 10.0, 2, "Here")
    assert kinds.row_count == len({cost.kind for cost in found})
    assert places.row_count == 2


@pytest.mark.parametrize(
    ("opcodes", "kind"),
    [
        (("parameter", "dot", "add", "reduce"), "product"),
        (("parameter", "multiply", "reduce"), "reduction"),
        (("parameter", "tanh", "dynamic-update-slice"), "write to a stack"),
        (("parameter", "bitcast", "transpose"), "copy"),
        (("parameter", "broadcast", "exponential"), "elementwise"),
    ],
)
def test_an_operation_is_of_a_kind(costs, opcodes, kind):
    assert costs.kind(opcodes) == kind


def test_the_head_at_masked_slots_saves_what_it_should():
    done = run("mlm_head.py", "--models=test", "--steps=1")
    counted, timed = re.findall(r"ratio (\S+)", done.stdout)
    # Head and body of this toy: 2 x 40 tokens against 2 x 6 slots through 32 x 1000.
    assert 1.5 < float(counted) < 2.0
    assert float(timed) > 0


def test_skip_gram_beside_nothing(tmp_path):
    """Without gensim and data it still measures itself, and says what is missing."""
    (tmp_path / "text.txt").write_text("the king and the queen of the sea\n" * 40)
    flags = [f"--texts={tmp_path / 'text.txt'}", f"--data_dir={tmp_path}", "--rounds=1"]
    done = run("word2vec.py", *flags, "--epochs=1")
    assert re.search(r"t5x_lite  median : +[\d,]+ words/s", done.stdout)
    assert "without simlex999: dataset 'simlex999' is not prepared" in done.stdout


def test_generation_is_timed_row_by_row():
    """Alone: the other side needs a Python with torch."""
    done = run("decode.py", "--rows=test gpt, batch 2, greedy", "--batches=2", "--rounds=1")
    (row,) = re.findall(r"test gpt, batch 2, greedy \| ([\d.,]+)", done.stderr)
    assert float(row.replace(",", "")) > 0
    assert "compile, s" in done.stdout


def memory(size: str) -> dict[str, float]:
    """Peaks in bytes after each thing, and the bytes of the state, by `init_memory.py`."""
    done = run("init_memory.py", f"--size={size}")
    found = re.findall(r"│ (\w+) +│ +([\d.]+) │ +([\d.]+) │", done.stdout)
    state = re.search(r"AdamW's state ([\d.]+) GB", done.stdout.replace("\n", " "))
    assert state, done.stdout
    return {name: float(peak) for name, peak, _ in found} | {"state": float(state[1])}


def test_a_starts_memory_is_measured():
    assert set(memory("test")) == {"imports", "initialise", "save", "restore", "state"}


@pytest.mark.slow
def test_memory_grows_by_little_more_than_the_state():
    """By how much a larger model takes more: what libraries take is in both."""
    small, large = memory("test"), memory("small")
    state = large["state"] - small["state"]
    for name in ("initialise", "restore"):
        assert large[name] - small[name] < 1.3 * state, name


@pytest.mark.slow
def test_starts_are_timed(tmp_path):
    (tmp_path / "text.txt").write_text("the king and the queen of the sea\n" * 40)
    given = (
        "include 'runs/pretrain_text.gin'",
        "VOCABULARY = @ByteVocabulary()",
        "ModelConfig.embed_dim = 32",
        "StackConfig.num_layers = 1",
        "StackConfig.mlp_dim = 32",
        f"TRAIN_FILES = '{tmp_path / 'text.txt'}'",
        f"VALIDATION_FILES = '{tmp_path / 'text.txt'}'",
    )
    (tmp_path / "run.gin").write_text("\n".join(given))
    done = run("start.py", f"--gin_file={tmp_path / 'run.gin'}")
    (row,) = re.findall(r"│ programs read whole +│ +(\d+) │ +(\d+) │ +(\d+) │", done.stdout)
    first, second, third = map(int, row)
    assert first == 0
    assert second >= 3  # the initialiser, the evaluation, the step
    assert third >= 1


def test_a_row_beside_no_peer_is_ours_alone():
    """The other sides need a Python with torch."""
    toys = "--rows=toy_bert,toy_lora", "--dtypes=float32"
    done = run("peers.py", *toys, "--steps=1", "--rounds=2")
    rows = re.findall(r"^(\w+), float32 \| (\w+) \| (.*)$", done.stderr, re.M)
    assert [row[:2] for row in rows] == [("toy_bert", "t5x_lite"), ("toy_lora", "t5x_lite")]
    for *_, cells in rows:
        step, least, _, rate, ratio, _, peak, first = cells.split(" | ")
        assert float(least) <= float(step) < float(first)
        assert float(rate.replace(",", "")) > 0
        assert ratio == ""
        assert float(peak) > 0.1  # what jax takes by itself
    assert "% of ceiling" in done.stdout


def test_an_unknown_row_is_named():
    done = run("peers.py", "--rows=bart", code=1)
    assert "--rows has 'bart'; known: t5, bert" in done.stderr


# In the shape of T5X's own: a network of as many parameters as it is told, and a loss.
NETWORK = """
import flax.linen as nn
import jax.numpy as jnp

class T5Config:
    def __init__(self, *, vocab_size, **sizes):
        self.vocab_size = vocab_size

class Transformer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, inputs, decoder_inputs, targets, *, enable_dropout):
        scales = self.param("scales", nn.initializers.ones, (COUNT,))
        return jnp.zeros((*targets.shape, self.config.vocab_size)) + scales.sum()
"""
LOSSES = """
def compute_weighted_cross_entropy(logits, targets, weights):
    return logits.sum(), 0.0, weights.sum()
"""


def test_t5x_is_a_side_of_rows_that_train_all_of_t5(tmp_path):
    """On stand-ins for two of its files; its packages themselves are not imported."""
    folders = [tmp_path / "t5x" / "examples" / name for name in ("t5", "scalable_t5")]
    for folder in folders:
        folder.mkdir(parents=True)
    for package in (tmp_path / "t5x", folders[0].parent, *folders):
        (package / "__init__.py").write_text("raise ImportError('two dozen packages')")
    (tmp_path / "t5x" / "losses.py").write_text(LOSSES)
    flags = f"--t5x={tmp_path}", "--dtypes=float32", "--steps=1", "--rounds=1"

    for folder in folders:
        (folder / "network.py").write_text(NETWORK.replace("COUNT", "7"))
    other = run("peers.py", "--rows=toy_t5", *flags, code=1)
    (ours,) = re.findall(r"'t5x_lite': (\d+), 't5x': 7", other.stderr)

    for folder in folders:
        (folder / "network.py").write_text(NETWORK.replace("COUNT", ours))
    done = run("peers.py", "--rows=toy_t5,toy_lora,toy_bert", *flags)
    rows = re.findall(r"^(\w+), float32 \| ([\w ]+) \|", done.stderr, re.M)
    assert rows == [
        ("toy_t5", "t5x_lite"),
        ("toy_t5", "t5x"),
        ("toy_t5", "t5x scalable"),
        ("toy_lora", "t5x_lite"),
        ("toy_bert", "t5x_lite"),
    ]


def test_a_folder_without_t5x_is_named(tmp_path):
    done = run("peers.py", "--rows=toy_t5", f"--t5x={tmp_path}", code=1)
    assert f"--t5x={tmp_path} has no t5x/examples/t5/network.py" in done.stderr


def test_operations_of_a_step_add_up_to_it():
    done = run("operations.py", "--row=toy_lora", "--rounds=1", "--steps=1")
    assert done.returncode == 0, done.stderr
    cells = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    seconds = {row[1].strip(): float(row[2]) for row in cells}
    *kinds, whole = seconds.values()
    assert len(kinds) == 4
    assert min(kinds) >= 0.0
    assert sum(kinds) == pytest.approx(whole, abs=2e-3)


def test_operations_are_of_the_kind_that_torch_calls_alike():
    kinds = load("kinds")
    for kind, ours, torchs in (
        ("PRODUCTS", ("product", "encoder self_attention, forward", "4096x512x384"), "aten::mm"),
        ("ATTENTION", ("product", "encoder self_attention, backward", "48 of 9x9x9"), "aten::bmm"),
        ("ATTENTION", ("elementwise", "decoder cross_attention, forward", ""), "aten::_softmax"),
        ("COPIES", ("read from a stack", "encoder mlp, backward", ""), "aten::copy_"),
        ("REST", ("reduction", "encoder self_attention_norm, forward", ""), "aten::_log_softmax"),
    ):
        expected = getattr(kinds, kind)
        assert kinds.of(*ours) == kinds.of_torch(torchs) == expected


def test_the_products_of_a_step_are_counted():
    done = run("products.py", "--row=toy_lora", "--rounds=1", "--steps=1")
    rows = re.findall(r"│ (\S+ , \S+) +│ (\S+) +│ +(\d+) │", done.stdout)
    counts = {row[:2]: int(row[2]) for row in rows}
    # 2 rows of 16 and 8 tokens, 16 wide: wi_0 and wi_1 of an encoder of one layer, the logits.
    assert counts["32x16 , 16x32", "mk,kn->mn"] == 2
    assert counts["16x16 , 16x64", "mk,kn->mn"] == 1
    assert f"all {sum(counts.values())} by XLA" in done.stdout
