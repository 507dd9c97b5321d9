"""Batches: pure in (config, seed, step), whoever asks, in any order, with threads or processes."""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from t5x_lite.data.examples import Cache, cut, keyed_rng, shuffled
from t5x_lite.data.inspection import describe, measure
from t5x_lite.data.layouts import as_decoder, as_encoder, as_prefix_lm
from t5x_lite.data.objectives import (
    CausalLM,
    MaskedLM,
    NextSentencePairs,
    PrefixLM,
    SpanCorruption,
    TextToText,
)
from t5x_lite.data.packing import Pack, Pad
from t5x_lite.data.pipeline import Batches, EvaluationBatches, iterate
from t5x_lite.data.preprocessors import Prefix
from t5x_lite.data.sources import (
    JsonlSource,
    PairedSource,
    TextSource,
    TokenFileSource,
    write_token_file,
)
from t5x_lite.data.tasks import Chunks, Mixture, Task
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.types import InputError, check_batch
from tests.data.toy import BERT, GPT

BYTES = ByteVocabulary()
LENGTHS = {"encoder": 48, "decoder": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = [
        f"{i:03d} " + "".join(rng.choice(list("abcdef "), rng.integers(5, 90))) + "."
        for i in range(101)
    ]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "pairs.jsonl").write_text(
        "\n".join(
            f'{{"inputs": "{i:03d}{"x" * (i % 17)}", "targets": "{i:03d}{"y" * (i % 9)}"}}'
            for i in range(37)
        )
    )
    write_token_file(folder / "tokens.bin", [rng.integers(3, 259, 5000)])
    return folder


def text_task(folder, name="text", **changes):
    settings = {
        "source": TextSource({"train": str(folder / "text.txt")}),
        "vocabulary": BYTES,
        "objective": SpanCorruption(BYTES),
        "lengths": LENGTHS,
        "chunk": Chunks(window=10),
    }
    return Task(name=name, **{**settings, **changes})


def pairs_task(folder, name="pairs", **changes):
    files = {"train": str(folder / "pairs.jsonl"), "test": str(folder / "pairs.jsonl")}
    settings = {"source": JsonlSource(files), "preprocessors": [Prefix("> ")]}
    return Task(
        name=name,
        vocabulary=BYTES,
        objective=TextToText(BYTES),
        lengths=LENGTHS,
        **{**settings, **changes},
    )


def tokens_task(folder):
    source = TokenFileSource({"train": str(folder / "tokens.bin")}, length=53)
    return text_task(folder, "tokens", source=source, chunk=None)


def mixture(folder):
    return Mixture(name="mix", tasks=[text_task(folder), pairs_task(folder)], rates=[0.25, 0.75])


CASES = {
    "chunks": lambda f: Batches(text_task(f), batch_size=6, seed=3),
    "chunks, packed": lambda f: Batches(text_task(f), batch_size=6, assembly=Pack(8, 7)),
    "pairs, padded": lambda f: Batches(pairs_task(f), batch_size=6, assembly=Pad()),
    "pairs, packed": lambda f: Batches(pairs_task(f), batch_size=6, assembly=Pack(20, 8)),
    "tokens": lambda f: Batches(tokens_task(f), batch_size=6),
    "mixture, packed": lambda f: Batches(mixture(f), batch_size=6, assembly=Pack(20, 13)),
    "in order": lambda f: Batches(text_task(f), batch_size=6, shuffle=False),
}


def assert_same(one, two):
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], two[key], err_msg=key)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_depends_on_config_seed_and_step_alone(case, folder):
    steps = [0, 1, 2, 3, 11]
    batches = CASES[case](folder)
    want = {step: batches.batch(step) for step in steps}
    fresh, copied = CASES[case](folder), pickle.loads(pickle.dumps(batches))
    for step in reversed(steps):
        check_batch(want[step], BYTES.size)
        assert_same(fresh.batch(step), want[step])
        assert_same(copied.batch(step), want[step])
        for processes in (1, 2, 3, 6):
            rows = 6 // processes
            parts = [
                CASES[case](folder).batch(step, slice(p * rows, (p + 1) * rows))
                for p in reversed(range(processes))
            ][::-1]
            joined = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
            assert_same(joined, want[step])
    other = dataclasses.replace(batches, seed=99).batch(3)
    if case != "in order":
        assert any(not np.array_equal(other[k], want[3][k]) for k in other)


@pytest.mark.parametrize("workers", [0, 2])
def test_grain_delivers_the_same_batches(folder, workers):
    # A metric that can't be pickled must not reach the workers.
    task = pairs_task(folder, metrics=[lambda targets, predictions: {"n": 1.0}])
    mixed = Mixture(name="mix", tasks=[text_task(folder), task], rates=[0.25, 0.75])
    batches = Batches(mixed, batch_size=6, assembly=Pack(20, 13))
    got = iterate(batches, 5, rows=slice(2, 5), num_workers=workers, prefetch=3)
    for step, batch in zip(range(5, 12), got, strict=False):
        assert_same(batch, batches.batch(step, slice(2, 5)))


PROGRAM = """
import sys
from t5x_lite.data import inspection, pipeline, preprocessors, sources, tasks
from t5x_lite.data.builders import bible
from t5x_lite.data.objectives import SpanCorruption
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.types import InputError

if __name__ == "__main__":
    assert not {"jax", "flax", "tensorflow", "torch"} & set(sys.modules)
    vocabulary = ByteVocabulary()
    task = tasks.Task(
        name="t",
        source=sources.JsonlSource({"train": sys.argv[1]}),
        vocabulary=vocabulary,
        objective=SpanCorruption(vocabulary),
        lengths={"encoder": 64, "decoder": 32},
    )
    stream = pipeline.iterate(pipeline.Batches(task, batch_size=1, shuffle=False), num_workers=2)
    next(stream), next(stream)
    try:
        next(stream)
    except InputError as error:
        print(error)
    again = pipeline.iterate(pipeline.Batches(task, batch_size=1, shuffle=False), num_workers=2)
    held = next(again)
"""


def test_a_program_with_workers_imports_no_jax_gets_input_errors_and_ends_quietly(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"te\n{"text": "c"}\n')
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "a.jsonl")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        check=True,
    )
    assert "line 3 is not JSON" in done.stdout
    assert "Exception ignored" not in done.stderr


def test_grain_ends_where_evaluation_ends(folder):
    batches = EvaluationBatches(pairs_task(folder), "test", batch_size=8)
    for threads, prefetch in ((1, 0), (3, 2)):
        got = list(iterate(batches, num_threads=threads, prefetch=prefetch))
        assert len(got) == len(batches) == 5
        assert_same(got[-1], batches.batch(4))
    assert len(list(iterate(batches, 1, stop_step=3))) == 2


def test_each_record_once_an_epoch_in_another_order_each(folder):
    batches = Batches(pairs_task(folder), batch_size=37)
    epochs = []
    for step in range(3):
        batch = batches.batch(step)
        epochs.append([BYTES.decode(row)[:5] for row in batch["encoder_input_tokens"]])
        assert sorted(epochs[-1]) == [f"> {i:03d}" for i in range(37)]
    assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[0])
    ordered = Batches(pairs_task(folder), batch_size=37, shuffle=False).batch(4)
    assert [BYTES.decode(row)[2:5] for row in ordered["encoder_input_tokens"]] == [
        f"{i:03d}" for i in range(37)
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 101])
def test_shuffled_is_a_permutation(size):
    orders = {tuple(shuffled(i, size, seed) for i in range(size)) for seed in range(20)}
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert len(orders) > 15 or size < 10


def test_mixtures_keep_their_rates_and_each_tasks_order(folder):
    batches = Batches(mixture(folder), batch_size=4, seed=3)
    alone = Batches(pairs_task(folder), batch_size=1, seed=3)
    pairs = []
    for step in range(20):
        rows = batches.batch(step)["encoder_input_tokens"]
        texts = [BYTES.decode(row) for row in rows]
        mine = [text for text in texts if text.startswith("> ")]
        assert len(mine) == 3
        pairs += mine
    want = [BYTES.decode(alone.batch(i)["encoder_input_tokens"][0]) for i in range(len(pairs))]
    assert pairs == want


def test_noise_is_keyed_by_the_example_of_the_run(folder):
    """So that one text under two tasks of a mixture, or in two epochs, is noised differently."""
    one = tokens_task(folder)
    twice = Mixture(name="m", tasks=[one, dataclasses.replace(one, name="again")], rates=[1, 1])
    batches = Batches(twice, shuffle=False)
    first, second = batches.example(0), batches.example(1)
    assert reconstruct(first) == reconstruct(second)
    assert not np.array_equal(first["encoder_input_tokens"], second["encoder_input_tokens"])


def reconstruct(example) -> list[int]:
    first = BYTES.size - BYTES.num_sentinels
    spans = collections.defaultdict(list)
    for token in example["decoder_target_tokens"][:-1].tolist():
        if token >= first:
            last = token
        else:
            spans[last].append(token)
    inputs = example["encoder_input_tokens"][:-1].tolist()
    return list(itertools.chain(*(spans[t] if t >= first else [t] for t in inputs)))


def test_chunks_are_whole_pieces_of_the_joined_documents(folder):
    task = text_task(folder, chunk=Chunks(window=10, rows=7))
    batches = Batches(task, shuffle=False)
    records = task.open("train")
    for window in range(4):
        stream = []
        for i in range(10):
            stream += [*BYTES.encode(records[window * 10 + i]["text"]).tolist(), 1]
        length = task.limits[0]
        pieces = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
        for row in range(7):
            example = batches.example(window * 7 + row)
            assert reconstruct(example) == pieces[row % len(pieces)]
            assert len(example["encoder_input_tokens"]) == 48, "full rows"


def test_shuffled_chunks_use_each_piece_once_and_repeat_with_other_noise(folder):
    rows = 40  # more than a window of ten documents has
    task = text_task(folder, chunk=Chunks(window=10, rows=rows))
    batches = Batches(task)
    examples = [batches.example(i) for i in range(rows)]
    pieces = [tuple(reconstruct(e)) for e in examples]
    number = len(set(pieces))
    assert number == len(batches.members[0].windows(0).pieces)
    assert pieces[:number] == pieces[number : 2 * number]
    first, again = examples[0], examples[number]
    assert pieces[0] == pieces[number]
    assert not np.array_equal(first["encoder_input_tokens"], again["encoder_input_tokens"])


def test_measured_rows_waste_little(folder):
    batches = Batches(text_task(folder), batch_size=4)
    measured = measure(batches, windows=30)
    assert measured["encoder"] > 0.99
    assert measured["overflow"] == 0
    assert measured["left_out"] < 0.15
    assert measured["repeated"] < 0.15
    mixed = measure(Batches(mixture(folder), assembly=Pack(20, 5)), windows=4)
    assert mixed["overflow"] > 0.2
    assert "text/left_out" in mixed


def test_cut_by_hand():
    made = cut([np.array([5, 6]), np.array([7, 8, 9])], 3, eos_id=1)
    assert [p.tolist() for p in made.pieces] == [[5, 6, 1], [7, 8, 9]]
    assert made.left_over == 1
    assert [p.tolist() for p in cut([np.array([5])], 3, 1).pieces] == [[5, 1]]


@pytest.mark.parametrize("batch_size", [1, 8, 37, 50])
def test_evaluation_has_every_example_once(folder, batch_size):
    task = pairs_task(folder)
    batches = EvaluationBatches(task, "test", batch_size=batch_size)
    assert len(batches) == -(-37 // batch_size)
    seen, weight = [], 0.0
    for step in range(len(batches)):
        batch = batches.batch(step)
        assert batch["encoder_input_tokens"].shape == (batch_size, 48)
        real = batch["encoder_segment_ids"].any(axis=1)
        empty = {key: value[~real] for key, value in batch.items()}
        assert not any(value.any() for value in empty.values())
        records = batches.records(step)
        decoded = [BYTES.decode(row) for row in batch["encoder_input_tokens"][real]]
        assert decoded == [record["inputs"] for record in records]
        seen += decoded
        weight += batch["decoder_loss_weights"].sum()
    assert seen == [f"> {i:03d}{'x' * (i % 17)}" for i in range(37)]
    assert weight == sum(3 + i % 9 + 1 for i in range(37))
    with pytest.raises(IndexError):
        batches.batch(len(batches))
    last = len(batches) - 1
    halves = [batches.batch(last, slice(a, a + 1)) for a in range(batch_size)]
    joined = {k: np.concatenate([half[k] for half in halves]) for k in halves[0]}
    assert_same(joined, batches.batch(last))
    assert EvaluationBatches(task, "test", batch_size, limit=5).num_examples == 5


def test_evaluation_of_chunks_leaves_no_token_out(folder):
    task = text_task(folder)
    batches = EvaluationBatches(task, "train", batch_size=8)
    records = task.open("train")
    want = [[*BYTES.encode(records[i]["text"]).tolist(), 1] for i in range(len(records))]
    got = [reconstruct(batches.example(i)) for i in range(batches.num_examples)]
    assert list(itertools.chain(*got)) == list(itertools.chain(*want))
    record = batches.records(1)[2]
    assert record["inputs"] == BYTES.decode(batches.batch(1)["encoder_input_tokens"][2])


def test_describe_shows_the_batch(folder):
    batches = CASES["pairs, packed"](folder)
    shown = describe(batches, 2, slice(1, 3))
    assert [row["row"] for row in shown["rows"]] == [1, 2]
    batch = batches.batch(2, slice(1, 3))
    row = shown["rows"][0]
    ids = row["tokens"]["decoder_target_tokens"]["ids"]
    assert ids == batch["decoder_target_tokens"][0][: len(ids)].tolist()
    assert row["tokens"]["decoder_target_tokens"]["weights"] == [1.0] * len(ids)
    assert len(row["segments"]) == batch["encoder_segment_ids"][0].max()
    assert row["segments"][0]["text"]["encoder_input_tokens"].startswith("> ")
    assert 0 < shown["efficiency"]["encoder"] <= 1


def masked_task(folder, **changes):
    lines = TextSource({"train": str(folder / "numbers.txt")})
    settings = {
        "name": "masked",
        "source": lines,
        "vocabulary": BERT,
        "objective": MaskedLM(BERT),
        "layout": as_encoder,
        "lengths": {"encoder": 40, "masked": 8},
    }
    return Task(**{**settings, **changes})


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbers")
    rng = np.random.default_rng(0)
    texts = (map(str, rng.integers(5, 280, rng.integers(4, 30))) for _ in range(40))
    (folder / "numbers.txt").write_text("\n".join(map(" ".join, texts)))
    return folder


@pytest.mark.parametrize("chunk", [None, Chunks(window=10)])
@pytest.mark.parametrize("assembly", [Pad(), Pack(10, 6)])
def test_masked_batches_are_pure_and_their_slots_are_right(numbers, chunk, assembly):
    batches = Batches(masked_task(numbers, chunk=chunk), batch_size=6, assembly=assembly)
    again = pickle.loads(pickle.dumps(batches))
    shown = []
    for step in (5, 0, 2):
        batch = batches.batch(step)
        check_batch(batch, BERT.size)
        assert set(batch) == {
            "encoder_input_tokens",
            "encoder_segment_ids",
            "encoder_positions",
            "masked_positions",
            "masked_target_tokens",
            "masked_loss_weights",
        }
        halves = [again.batch(step, slice(a, a + 3)) for a in (0, 3)]
        assert_same({k: np.concatenate([half[k] for half in halves]) for k in batch}, batch)
        seen = np.take_along_axis(batch["encoder_input_tokens"], batch["masked_positions"], axis=1)
        used = batch["masked_loss_weights"] > 0
        shown.append(seen[used])
        assert not np.isin(batch["masked_target_tokens"][used], list(BERT.special_ids)).any()
    assert 0.6 < np.mean(np.concatenate(shown) == BERT.mask_id) < 1
    measured = measure(batches, windows=2)
    assert 0 < measured["masked"] <= 1


def test_masked_slots_are_described_and_recorded(numbers):
    batches = Batches(masked_task(numbers), batch_size=6, assembly=Pack(10, 6))
    batch, row = batches.batch(1), describe(batches, 1)["rows"][2]
    slots = row["tokens"]["masked_target_tokens"]
    used = int(batch["masked_loss_weights"][2].sum())
    assert slots["ids"] == batch["masked_target_tokens"][2][:used].tolist()
    assert slots["pieces"] == [str(token) for token in slots["ids"]]
    assert slots["positions"] == batch["masked_positions"][2][:used].tolist()
    assert slots["weights"] == [1.0] * used
    inputs = row["tokens"]["encoder_input_tokens"]
    for name in ("pieces", "segments"):
        shown = slots["inputs" if name == "pieces" else name]
        assert shown == [inputs[name][place] for place in slots["positions"]]
    texts = [segment["text"]["masked_target_tokens"] for segment in row["segments"]]
    assert " ".join(texts).split() == slots["pieces"]

    task = masked_task(numbers, chunk=Chunks(window=10))
    evaluation = EvaluationBatches(task, "train", batch_size=4)
    record, example = evaluation.records(1)[2], evaluation.example(6)
    assert record["inputs"] == BERT.decode(example["encoder_input_tokens"])
    assert [place for place, _ in record["masked"]] == example["masked_positions"].tolist()
    assert json.loads(json.dumps(record)) == record
    causal = dataclasses.replace(
        task, objective=CausalLM(BERT), layout=as_decoder, lengths={"decoder": 16}
    )
    records = EvaluationBatches(causal, "train").records(0)
    assert records[0].keys() == {"targets"}


def test_pairs_fill_a_row_each_and_are_described(numbers):
    task = masked_task(
        numbers,
        source=PairedSource(TextSource({"train": str(numbers / "numbers.txt")})),
        objective=NextSentencePairs(BERT),
    )
    batches = Batches(task, batch_size=20)
    batch = batches.batch(0)
    check_batch(batch, BERT.size)
    assert not batch["masked_positions"][:, 0].any()
    assert set(batch["masked_target_tokens"][:, 0].tolist()) == {0, 1}
    assert set(np.unique(batch["encoder_token_types"])) == {0, 1}
    row = describe(batches, 0, slice(0, 1))["rows"][0]
    label = int(batch["masked_target_tokens"][0, 0])
    assert row["tokens"]["masked_target_tokens"]["pieces"][0] == f"<label {label}>"
    text = row["segments"][0]["text"]["encoder_input_tokens"]
    assert text.count(BERT.piece(BERT.eos_id)) == 1, "both sentences are shown"
    assert row["tokens"]["encoder_input_tokens"]["types"][0] == 0
    with pytest.raises(InputError, match=r"a row holds one example: set assembly to Pad\(\)"):
        Batches(task, assembly=Pack(8, 4))


def test_token_types_are_in_all_tasks_of_a_mixture_or_in_none(numbers):
    masked = masked_task(numbers)
    pairs = dataclasses.replace(masked, name="pairs", objective=NextSentencePairs(BERT))
    with pytest.raises(InputError, match="token types"):
        Mixture(name="m", tasks=[masked, pairs], rates=[1, 1])


def test_causal_rows_are_whole_pieces_and_prefixes_are_marked(numbers):
    causal = masked_task(
        numbers,
        objective=CausalLM(GPT),
        vocabulary=GPT,
        layout=as_decoder,
        lengths={"decoder": 16},
        chunk=Chunks(window=10),
    )
    batch = Batches(causal, batch_size=4).batch(1)
    assert (batch["decoder_loss_weights"] == 1).all()
    assert (batch["decoder_input_tokens"][:, 0] == GPT.start_id).all()
    np.testing.assert_array_equal(
        batch["decoder_input_tokens"][:, 1:], batch["decoder_target_tokens"][:, :-1]
    )
    prefix = dataclasses.replace(causal, objective=PrefixLM(GPT), layout=as_prefix_lm)
    batches = Batches(prefix, batch_size=4, assembly=Pack(8, 8))
    batch = batches.batch(1)
    check_batch(batch, GPT.size)
    assert 0 < batch["decoder_prefix"].mean() < 1
    shown = describe(batches, 1)["rows"][0]["tokens"]["decoder_input_tokens"]
    assert shown["prefix"] == batch["decoder_prefix"][0][: len(shown["ids"])].tolist()


def test_keyed_generators_differ_and_the_cache_is_pure():
    draws = {keyed_rng(seed, i).integers(1 << 62) for seed in (0, 1, -1) for i in range(100)}
    assert len(draws) == 300
    calls = []
    cache = Cache(lambda k: calls.append(k) or k * k, capacity=2)
    assert [cache(k) for k in (1, 2, 1, 3, 1, 2)] == [1, 4, 1, 9, 1, 4]
    assert calls == [1, 2, 3, 2]


def test_input_errors(folder):
    task = pairs_task(folder)
    with pytest.raises(InputError, match=r"task 'pairs': split 'dev' .*train, test"):
        Batches(task, "dev")
    with pytest.raises(InputError, match="split 'dev'"):
        EvaluationBatches(task, "dev")
    with pytest.raises(InputError, match="batch_size"):
        Batches(task, batch_size=0)
    with pytest.raises(InputError, match="count from 0"):
        Batches(task).batch(-1)
    for rows in (slice(3, 3), slice(0, 8, 2), slice(9, 10)):
        with pytest.raises(InputError, match="rows"):
            Batches(task).batch(0, rows)
    with pytest.raises(InputError, match="is a mixture"):
        EvaluationBatches(mixture(folder), "train")
    with pytest.raises(InputError, match="limit"):
        EvaluationBatches(task, "test", limit=0)


def test_rows_of_a_packed_window_come_in_random_order(folder):
    """Else whole batches would be the near-empty last rows that first fit leaves."""
    assembly = Pack(20, 8)
    batches = Batches(pairs_task(folder), batch_size=8, assembly=assembly)
    orders = set()
    for index in range(4):
        examples = [batches.example(e) for e in range(index * 20, index * 20 + 20)]
        fitted = assembly(examples, LENGTHS).rows["decoder_target_tokens"]
        found = batches.window(index).rows["decoder_target_tokens"]
        assert sorted(map(tuple, found)) == sorted(map(tuple, fitted))
        orders.add(tuple(int(np.flatnonzero((fitted == row).all(axis=1))[0]) for row in found))
    assert len(orders) > 1
    together = batches.window(2).rows
    for key in together:  # all streams of a row move together
        np.testing.assert_array_equal(together[key], batches.batch(2)[key])
