"""infer on every family and in every mode, and each mistake as one message (runs: see
test_family_runs)."""

from __future__ import annotations

import builtins
import dataclasses
import io
import json
import shutil
import sys

import pytest

from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.decode.modes import text
from t5x_lite.decode.sampling import BeamSearch, Greedy
from t5x_lite.interop import save_hf
from t5x_lite.interop.hf_tokenizers import save_vocabulary
from t5x_lite.sharding import Partitioner
from t5x_lite.train import infer
from t5x_lite.train.opening import open_model
from t5x_lite.types import InputError
from tests import common, folders
from tests.train import harness

TEXTS = ("alpha beta", "gamma", "beta delta alpha eps zeta")
GAPS = ("alpha <mask> beta", "<mask> gamma")
PEFT = folders.FIXTURES / "peft" / "gpt2" / "adapter"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Directories of Hugging Face's by the fixture's name, each made once."""
    scratch = tmp_path_factory.mktemp("models")
    known = {}

    def make(name):
        if name not in known:
            known[name] = byt5(scratch) if name == "byt5" else folders.hugging_face(name, scratch)
        return str(known[name])

    return make


def byt5(scratch):
    """A T5 of bytes, which Hugging Face's directory has no tokenizer's file for."""
    config = common.with_stacks(common.T5, num_layers=1)
    config = dataclasses.replace(config, vocab_size=384, embed_dim=8)
    folder = scratch / "byt5"
    save_hf(str(folder), *common.build(config), vocabulary=ByteVocabulary())
    save_vocabulary(str(folder), ByteVocabulary(), config)
    return folder


def ask(model_dir, items, tmp_path, **arguments):
    """What infer writes for texts or records."""
    items = [{"inputs": item} if isinstance(item, str) else item for item in items]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(item) + "\n" for item in items))
    output.unlink(missing_ok=True)
    arguments = {"batch_size": 2, "max_tokens": 3, "partitioner": harness.one_device()} | arguments
    count = infer.infer(
        model_dir=str(model_dir), input=str(source), output=str(output), **arguments
    )
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert count == len(records) == len(items)
    assert [record["inputs"] for record in records] == [item["inputs"] for item in items]
    return records


EVERY = [
    ("bert_mlm", "fill_mask"),
    ("bert_mlm", "embed"),
    ("bert", "embed"),
    ("bert_classifier", "classify"),
    ("bert_tagger", "tag"),
    ("roberta_mlm", "fill_mask"),
    ("roberta", "embed"),
    ("roberta_classifier", "classify"),
    ("roberta_tagger", "tag"),
    ("gpt2", "generate"),
    ("gpt2", "infill"),
    ("gpt2", "score"),
    ("gpt2", "embed"),
    ("gpt2_classifier", "classify"),
    ("llama", "generate"),
    ("llama", "score"),
    ("llama", "embed"),
    ("llama_classifier", "classify"),
    ("llama_classifier", "embed"),
    ("t5_1_1", "generate"),
    ("t5_1_1", "infill"),
    ("t5_1_1", "score"),
    ("t5_1_1", "embed"),
    ("t5_classifier", "classify"),
    ("t5_classifier", "embed"),
    ("byt5", "generate"),
    ("byt5", "infill"),
    ("byt5", "score"),
    ("byt5", "embed"),
    ("bart", "generate"),
    ("bart", "infill"),
    ("bart", "score"),
    ("bart", "embed"),
    ("bart_classifier", "classify"),
]
# One of each mode at once; the others, which compile as much again, with the slow tests.
QUICK = {
    ("roberta_mlm", "fill_mask"),
    ("bert", "embed"),
    ("bert_classifier", "classify"),
    ("bert_tagger", "tag"),
    ("gpt2", "generate"),
    ("t5_1_1", "infill"),
    ("llama", "score"),
}


@pytest.mark.parametrize(
    ("name", "mode"),
    [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in EVERY],
    ids=["-".join(one) for one in EVERY],
)
def test_every_family_in_every_mode(made, tmp_path, name, mode):
    texts = GAPS if mode in ("fill_mask", "infill") else TEXTS
    items = [{"inputs": text, "id": number} for number, text in enumerate(texts)]
    if mode == "score":
        items = [{**item, "targets": "beta"} for item in items]
    records = ask(made(name), items, tmp_path, mode=mode)
    assert [record["id"] for record in records] == list(range(len(items)))  # carried through
    for record in records:
        match mode:
            case "generate":
                assert isinstance(record["prediction"], str)
            case "infill":
                assert "<mask>" not in record["prediction"]
            case "fill_mask":
                shares = [one["probability"] for one in record["masks"][0]]
                assert len(shares) == 5
                assert shares == sorted(shares, reverse=True)
            case "score":
                assert record["log_likelihood"] < 0
                # An encoder-decoder's target ends with eos; BART's begins with bos, too.
                # ByT5's tokens are bytes.
                expected = {"gpt2": 1, "llama": 1, "t5": 2, "bart": 3, "byt5": 5}
                expected = expected[folders.family(name)]
                assert record["tokens"] == expected
            case "embed":
                assert len(record["embedding"]) == 8
            case "classify":
                assert record["prediction"] in ("LABEL_0", "LABEL_1", "LABEL_2")
                assert sum(record["probabilities"].values()) == pytest.approx(1.0)
            case "tag":
                assert len(record["prediction"]) == len(record["inputs"].split())
                assert record["words"][0]["word"] == record["inputs"].split()[0]


def test_each_family_has_its_own_mode_by_default(made, tmp_path, monkeypatch):
    found = {}

    class Stop(Exception):
        pass

    def stop(mode, item, number):
        found[name] = mode.name
        raise Stop

    monkeypatch.setattr(infer, "_encode", stop)
    expected = {
        "bert": "embed",
        "bert_mlm": "fill_mask",
        "bert_tagger": "tag",
        "bert_classifier": "classify",
        "gpt2": "generate",
        "llama_classifier": "classify",
        "t5_1_1": "generate",
        "byt5": "generate",
        "t5_classifier": "classify",
        "bart": "generate",
    }
    for name in expected:
        with pytest.raises(Stop):
            ask(made(name), ["alpha"], tmp_path)
    assert found == expected


@pytest.mark.slow
def test_an_adapter_answers_otherwise_than_its_base(made, tmp_path):
    base = made("peft/gpt2/base")
    arguments = {"mode": "score", "max_input_tokens": 8}
    plain = ask(base, TEXTS[:2], tmp_path, **arguments)
    tuned = ask(base, TEXTS[:2], tmp_path, adapter=str(PEFT), **arguments)
    for one, other in zip(plain, tuned, strict=True):
        assert abs(one["log_likelihood"] - other["log_likelihood"]) > 1e-3


def test_a_half_written_output_is_gone_on_with(made, tmp_path):
    """By the same lines, whatever the buckets of the inputs that are left."""
    records = ask(made("bert"), TEXTS, tmp_path)
    output = tmp_path / "out.jsonl"
    lines = output.read_text().splitlines()
    output.write_text(lines[0] + "\n" + lines[1][:9])
    infer.infer(
        model_dir=made("bert"),
        input=str(tmp_path / "in.jsonl"),
        output=str(output),
        batch_size=2,
        partitioner=harness.one_device(),
    )
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert [one["inputs"] for one in again] == [one["inputs"] for one in records]
    for one, other in zip(again, records, strict=True):
        assert one["embedding"] == pytest.approx(other["embedding"], abs=1e-5)


def test_a_sample_depends_on_the_seed_and_the_inputs_number_alone(made, tmp_path):
    arguments = {"temperature": 1.0, "top_k": 20, "max_tokens": 8, "max_input_tokens": 8}
    texts = ["alpha"] * 4 + ["beta alpha gamma delta"]
    records = ask(made("gpt2"), texts, tmp_path, seed=1, **arguments)
    said = [record["prediction"] for record in records]
    assert len(set(said[:4])) > 1  # numbers differ
    output = tmp_path / "out.jsonl"
    lines = output.read_text()
    output.write_text("".join(lines.splitlines(keepends=True)[:2]))
    again = {"input": str(tmp_path / "in.jsonl"), "output": str(output)}
    infer.infer(
        model_dir=made("gpt2"),
        seed=1,
        batch_size=2,
        partitioner=harness.one_device(),
        **again,
        **arguments,
    )
    assert output.read_text() == lines


@pytest.mark.slow
def test_eight_devices_answer_as_one_does(made, tmp_path):
    arguments = {"max_tokens": 4, "max_input_tokens": 8, "batch_size": 8}
    for mode in ("generate", "embed"):
        one, eight = (
            ask(made("llama"), TEXTS, tmp_path, mode=mode, partitioner=partitioner, **arguments)
            for partitioner in (harness.one_device(), Partitioner(data=2, fsdp=2, model=2))
        )
        for first, second in zip(one, eight, strict=True):
            assert first.get("prediction") == second.get("prediction")
            assert first.get("embedding") == pytest.approx(second.get("embedding"), abs=1e-5)


def test_the_cache_is_as_asked_for(made, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def generate(*_, cache_dtype, window, **rest):
        raise Stop(cache_dtype, window)

    monkeypatch.setattr(text, "generate", generate)
    for name, settings in (("gpt2", ("int8", 3)), ("t5_1_1", ("bfloat16", None))):
        with pytest.raises(Stop) as found:
            ask(made(name), ["alpha"], tmp_path, cache_dtype=settings[0], window=settings[1])
        assert found.value.args == settings


@pytest.mark.slow
def test_beams_and_stops(made, tmp_path):
    arguments = {"max_tokens": 4, "max_input_tokens": 8}
    (greedy,) = ask(made("t5_1_1"), ["alpha"], tmp_path, **arguments)
    (one,) = ask(made("t5_1_1"), ["alpha"], tmp_path, strategy=BeamSearch(beams=1), **arguments)
    assert one["prediction"] == greedy["prediction"]
    ask(made("t5_1_1"), ["alpha"], tmp_path, beams=3, **arguments)
    word = greedy["prediction"].split()[-1]
    (cut,) = ask(made("t5_1_1"), ["alpha"], tmp_path, stop=word, **arguments)
    assert cut["prediction"] == greedy["prediction"][: greedy["prediction"].index(word)]


def test_standard_input_is_lines(made, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("alpha\nbeta gamma\n"))
    infer.infer(model_dir=made("bert_classifier"), batch_size=2, partitioner=harness.one_device())
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["inputs"] for one in found] == ["alpha", "beta gamma"]


def test_at_a_terminal_each_line_is_answered(made, monkeypatch, capsys, tmp_path):
    lines = iter(["alpha beta", "  ", "alpha " * 30, "[bold]beta"])

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def typed(prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", typed)
    output = tmp_path / "said.jsonl"
    count = infer.infer(
        model_dir=made("bert_classifier"), output=str(output), partitioner=harness.one_device()
    )
    shown = capsys.readouterr()
    assert count == 2
    answers = [json.loads(line) for line in shown.out.splitlines()]
    assert [set(answer) for answer in answers] == [{"prediction", "probabilities"}] * 2
    assert "classify> " in shown.err
    assert "error: input 2 is empty: expected a text" in shown.err
    assert "more than infer.max_input_tokens=14" in shown.err
    saved = [json.loads(line)["inputs"] for line in output.read_text().splitlines()]
    assert saved == ["alpha beta", "[bold]beta"]


MISTAKES = {
    "a wrong mode": (
        "bert_mlm",
        {"mode": "generate"},
        "infer.mode='generate' is not for an encoder alone, which does: fill_mask, embed",
    ),
    "a wrong mode for a classifier": (
        "llama_classifier",
        {"mode": "generate"},
        "infer.mode='generate' is not for a decoder alone with a SequenceHead, which does: "
        "classify, embed",
    ),
    "tags of an encoder-decoder's classifier": (
        "t5_classifier",
        {"mode": "tag"},
        "'tag' is not for an encoder-decoder with a SequenceHead, which does: classify, embed",
    ),
    "infilling without marks for it": (
        "llama",
        {"mode": "infill", "items": ["alpha <mask> beta"]},
        "input 1: infilling with a decoder marks three places with sentinels, but the vocabulary "
        "has 0: train with FillInTheMiddle",
    ),
    "a mode of no model": ("gpt2", {"mode": "sing"}, "infer.mode='sing' is not for a decoder"),
    "an empty prompt": ("gpt2", {"items": ["alpha", " "]}, "input 2 is empty: expected a text"),
    "a prompt longer than the model": (
        "bert_classifier",
        {"items": ["alpha " * 20]},
        "input 1: 22 tokens with the specials are more than infer.max_input_tokens=14",
    ),
    "more tokens than the model has positions": (
        "bert_classifier",
        {"max_input_tokens": 15},
        "makes rows of 15 encoder tokens, but the model learned 14 positions",
    ),
    "an unknown adapter": (
        "gpt2",
        {"adapter": "/nowhere"},
        "no such folder: '/nowhere'; expected PEFT's",
    ),
    "an adapter of another model": ("llama", {"adapter": str(PEFT)}, "does not fit"),
    "no rows": ("gpt2", {"batch_size": 0}, "infer.batch_size=0: expected at least 1"),
    "two ways of decoding": (
        "gpt2",
        {"strategy": Greedy(), "top_k": 3},
        "infer.top_k and infer.strategy=Greedy.* both say how to decode",
    ),
    "beams that sample": (
        "gpt2",
        {"beams": 2, "top_p": 0.5},
        "infer.beams=2 searches and infer.top_p samples",
    ),
    "a cache of no type": ("gpt2", {"cache_dtype": "int4"}, "infer.cache_dtype='int4': expected"),
    "a window of nothing": ("gpt2", {"window": 0}, "infer.window=0: expected at least 1"),
    "a window for beams": ("gpt2", {"window": 3, "beams": 2}, "window=3 is for Greedy and Samp"),
    "a cache for what writes nothing": (
        "bert_mlm",
        {"items": ["<mask>"], "cache_dtype": "int8"},
        "infer.cache_dtype='int8' is not for mode 'fill_mask'",
    ),
    "a temperature of 0": (
        "gpt2",
        {"temperature": 0.0},
        "Sampling.temperature=0.0: expected 1e-06 or more",
    ),
    "decoding that the mode has no use for": (
        "bert_mlm",
        {"items": ["<mask>"], "temperature": 0.5},
        "infer.strategy=Sampling.* is not for mode 'fill_mask'",
    ),
    "a field that is no text": (
        "gpt2",
        {"items": [{"inputs": "alpha", "targets": 3}], "mode": "score"},
        "line 1: expected a text in the field 'targets'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_message(made, tmp_path, mistake):
    name, arguments, message = MISTAKES[mistake]
    items = arguments.get("items", ["alpha"])
    arguments = {key: value for key, value in arguments.items() if key != "items"}
    with pytest.raises(InputError, match=message):
        ask(made(name), items, tmp_path, **arguments)


def test_a_half_written_directory_is_one_clear_message(made, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(made("gpt2"), half)
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="is damaged or cut short"):
        ask(half, ["alpha"], tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match="has no weights"):
        ask(half, ["alpha"], tmp_path)


def test_a_vocabulary_may_be_named(made, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(made("bert"), bare)
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (bare / name).unlink()
    with pytest.raises(InputError, match="or name a vocabulary"):
        ask(bare, ["alpha"], tmp_path)
    vocabulary = open_model(made("bert"), partitioner=harness.one_device()).vocabulary
    found = open_model(str(bare), vocabulary=vocabulary, partitioner=harness.one_device())
    assert found.vocabulary == vocabulary
    small = open_model(made("gpt2"), partitioner=harness.one_device()).vocabulary
    assert small.size == found.model.config.vocab_size


def test_no_file_of_somebody_elses_is_touched(made, tmp_path):
    model = made("gpt2")
    (tmp_path / "in.txt").write_text("alpha beta\ngamma")
    (tmp_path / "notes.jsonl").write_text("precious")
    (tmp_path / "other.jsonl").write_text('{"inputs": "delta", "prediction": "x"}\n')
    for name in ("in.txt", "notes.jsonl", "other.jsonl"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(InputError, match=r"is infer\.input|holds something else"):
            infer.infer(
                model_dir=model,
                input=str(tmp_path / "in.txt"),
                output=str(tmp_path / name),
                max_tokens=3,
                partitioner=harness.one_device(),
            )
        assert (tmp_path / name).read_bytes() == before
