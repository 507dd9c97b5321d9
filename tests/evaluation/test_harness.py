"""lm-evaluation-harness finds the same in our models as in its own `hf`, on the same weights.

`make test-lm-eval` runs these in an environment with the harness and torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from t5x_lite.decode.sampling import Greedy, Sampling
from t5x_lite.train import convert, harness
from t5x_lite.types import InputError

ROOT = Path(__file__).resolve().parents[2]
TASKS = Path(__file__).resolve().parent / "lm_eval_tasks"
POSITIONS = 96
pytestmark = pytest.mark.lm_eval


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory):
    """The harness, kept off the network and out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HOME", "HF_DATASETS_CACHE"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")
        module = pytest.importorskip("lm_eval", reason="lm_eval is missing: make test-lm-eval")
        pytest.importorskip("torch", reason="torch is missing: make test-lm-eval")
        patch.chdir(ROOT)  # where the tasks' files are looked for
        harness.register()
        yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lm_eval):
    """A GPT-2 of random weights, as transformers saves it, with a byte-level tokenizer."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("gpt2")
    texts = [file.read_text(encoding="utf-8") for file in TASKS.glob("*.jsonl")]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, 320, min_frequency=1, special_tokens=["<|endoftext|>"])
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **end)
    tokenizer.save_pretrained(path)
    torch.manual_seed(1)
    settings = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,  # far from uniform: answers differ, and no two are nearly equal
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(settings).save_pretrained(path)
    return str(path)


def run(lm_eval, model: str, arguments: str, task: str):
    """(metrics by name, what was answered to each document)."""
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[task],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        batch_size=8,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )
    values = {k: v for k, v in found["results"][task].items() if isinstance(v, float)}
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return values, [sample["resps"] for sample in samples]


def both(lm_eval, folder: str, task: str):
    hf = run(lm_eval, "hf", f"pretrained={folder},dtype=float32", task)
    return hf, run(lm_eval, harness.NAME, f"path={folder}", task)


def test_multiple_choice(lm_eval, folder):
    (theirs, expected), (ours, found) = both(lm_eval, folder, "local_choices")
    assert {"acc,none", "acc_norm,none"} <= set(theirs)
    assert ours == pytest.approx(theirs, abs=1e-12)
    for question, answers in zip(expected, found, strict=True):
        for (theirs,), (ours,) in zip(question, answers, strict=True):
            np.testing.assert_allclose(float(ours[0]), float(theirs[0]), rtol=1e-4)
            assert str(ours[1]) == str(theirs[1])


def test_generation(lm_eval, folder):
    (theirs, expected), (ours, found) = both(lm_eval, folder, "local_writing")
    assert found == expected
    assert len({str(answer) for answer in expected}) > 3  # not one text for all
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert theirs["chrf,none"] > 0.0


def test_tasks_may_sample(lm_eval):
    from t5x_lite.evaluation.harness import strategy_of

    assert strategy_of({"do_sample": False, "temperature": 0.7}) == Greedy()
    assert strategy_of({"temperature": 0.0}) == Greedy()
    assert strategy_of({"temperature": 0.7, "top_p": 0.9}) == Sampling(0.7, top_p=0.9)
    assert strategy_of({"do_sample": True, "top_k": 5}) == Sampling(1.0, top_k=5)
    assert strategy_of({"num_beams": 1, "until": ["x"], "max_gen_toks": 3}) == Greedy()
    for unread in ({"num_beams": 4}, {"typical_p": 0.5}, {"lenght_penalty": 1.0}):
        with pytest.raises(InputError, match=f"{next(iter(unread))}.*is not computed"):
            strategy_of(unread)


def test_whole_documents(lm_eval, folder):
    """One of them takes several rows."""
    (theirs, expected), (ours, found) = both(lm_eval, folder, "local_documents")
    assert {"word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"} <= set(theirs)
    assert ours == pytest.approx(theirs, rel=1e-4)
    numbers = [[float(answer[0][0]) for answer in answers] for answers in (expected, found)]
    np.testing.assert_allclose(numbers[1], numbers[0], rtol=1e-4)


def test_a_run_is_asked_as_it_was_trained(lm_eval, folder, tmp_path):
    """Its rows begin with the start token: what a directory says when told to add one."""
    made = str(tmp_path / "run")
    convert.convert(source=folder, output=made, to="run")
    asked = run(lm_eval, harness.NAME, f"path={made}", "local_choices")
    told = run(lm_eval, harness.NAME, f"path={folder},add_bos_token=True", "local_choices")
    untold = run(lm_eval, harness.NAME, f"path={folder}", "local_choices")
    assert asked == told
    assert asked[1] != untold[1]
    # A document begins with the start token once, and that is not scored.
    documents = [run(lm_eval, harness.NAME, f"path={p}", "local_documents") for p in (made, folder)]
    assert documents[0] == documents[1]


def test_what_the_model_cannot_do_is_one_message(lm_eval, folder):
    with pytest.raises(InputError, match=f"max_length=97: the model has {POSITIONS} positions"):
        run(lm_eval, harness.NAME, f"path={folder},max_length=97", "local_choices")
    with pytest.raises(InputError, match="has max_lenght, which t5x_lite doesn't know; it takes"):
        run(lm_eval, harness.NAME, f"path={folder},max_lenght=50", "local_choices")
    with pytest.raises(InputError, match="24 new tokens, and a row of this model has 20"):
        run(lm_eval, harness.NAME, f"path={folder},max_length=20", "local_writing")


def test_the_command_line(lm_eval, folder, tmp_path, monkeypatch, capsys):
    arguments = ["run", "--model", harness.NAME, "--model_args", f"path={folder}"]
    arguments += ["--tasks", "local_choices", "--include_path", str(TASKS)]
    monkeypatch.setattr(harness, "register", lambda: None)  # once is enough
    monkeypatch.setattr(
        sys, "argv", ["t5x_lite-lm_eval", *arguments, "--output_path", str(tmp_path)]
    )
    assert harness.main() == 0
    assert "acc_norm" in capsys.readouterr().out
    (written,) = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text(encoding="utf-8"))["results"]["local_choices"]
    assert 0.0 <= results["acc,none"] <= 1.0


def test_without_the_harness_the_program_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert harness.main() == 2
    assert "pip install 't5x_lite[lm_eval]'" in capsys.readouterr().err
