"""The programs as a user runs them: each mistake is one clear message, and they work together."""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl.testing import flagsaver

from t5x_lite import configure
from tests import xla

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["light", "water", "word", "hand", "king", "house", "river", "stone", "bread", "day"]

# A tiny run over text files: what a user would write for his own text.
GIN = """
include 'models/t5_1_1_tiny.gin'
include 'objectives/span_corruption.gin'
ModelConfig.vocab_size = 384
ModelConfig.embed_dim = 32
StackConfig.num_layers = 1
StackConfig.num_heads = 2
StackConfig.head_dim = 8
StackConfig.mlp_dim = 32
VOCABULARY = @ByteVocabulary()
FOLDER = '.'
TASK = @Task()
Task.name = 'words'
Task.source = @TextSource()
TextSource.files = {'train': '%(folder)s/train.txt', 'validation': '%(folder)s/train.txt'}
Task.vocabulary = %%VOCABULARY
Task.objective = @SpanCorruption()
Task.lengths = {'encoder': 64, 'decoder': 32}
Task.chunk = @Chunks()
Chunks.window = 8
train.model_dir = '%(folder)s/run'
train.model = %%MODEL
train.total_steps = 4
train.batches = @train/Batches()
train/Batches.task = %%TASK
train/Batches.batch_size = 8
train.optimizer = @AdamW()
AdamW.learning_rate = 1e-2
train.partitioner = @Partitioner()
train.evaluations = [@held_out/TeacherForced()]
held_out/TeacherForced.name = 'held_out'
held_out/TeacherForced.batches = @held_out/EvaluationBatches()
held_out/EvaluationBatches.task = %%TASK
held_out/EvaluationBatches.limit = 10
train.eval_period = 2
train.checkpoints = @CheckpointPolicy()
CheckpointPolicy.period = 2
CheckpointPolicy.best_metric = 'held_out/accuracy'
evaluate_run.model_dir = '%(folder)s/run'
evaluate_run.evaluations = [@held_out/TeacherForced()]
inspect_data.batches = @train/Batches()
inspect_params.model = %%MODEL
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("programs")
    rng = random.Random(0)
    lines = [" ".join(rng.choice(WORDS) for _ in range(20)) for _ in range(60)]
    (path / "train.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (path / "run.gin").write_text(GIN % {"folder": path}, encoding="utf-8")
    return path


def run(program, *arguments, devices=1, check=None, stdin=None):
    """Runs a program in a process of its own, from another folder than the repository's."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla.flags(devices),
        "COLUMNS": "160",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{program}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=env,
        input=stdin,
        timeout=300,
        check=False,
    )
    if check is not None:
        assert done.returncode == check, done.stderr[-3000:]
    return done


@pytest.fixture
def launch(monkeypatch, tmp_path, capsys):
    """Runs a program in this process, which has imported all that it needs; on 8 devices.

    If anything was compiled, stderr says so.
    """
    compiled = []

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(seconds)

    def start(program, *arguments):
        path = ROOT / "scripts" / f"{program}.py"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        level = logging.root.level
        compiled.clear()
        with configure.isolated(), flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
        logging.root.setLevel(level)
        printed = capsys.readouterr()
        said = printed.err + "compiled\n" * len(compiled)
        return subprocess.CompletedProcess(sys.argv, int(stop.value.code or 0), printed.out, said)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield start
    jax.monitoring.unregister_event_duration_listener(listen)


def the_message(done):
    """The one message of a failed program: nothing else on stderr, nothing compiled."""
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    assert "compil" not in done.stderr.lower(), done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("error: ") == 1
    return done.stderr


@pytest.fixture(scope="module")
def trained(folder):
    """The run of `run.gin`, which says where its output is."""
    done = run("train", f"--gin_file={folder / 'run.gin'}", check=0)
    assert "held_out/loss" in done.stderr
    assert str(folder / "run") in done.stderr
    return folder / "run"


def test_a_dry_run_leaves_nothing(folder, launch):
    fresh = folder / "dry"
    dry = launch("train", f"--gin_file={folder / 'run.gin'}", f"--model_dir={fresh}", "--dry_run")
    assert dry.returncode == 0
    assert "train.total_steps = 4" in dry.stdout
    assert not fresh.exists()


def test_what_a_run_reads_and_trains_is_shown(folder, launch):
    gin = f"--gin_file={folder / 'run.gin'}"
    seen = launch("inspect_data", gin, "--step=1")
    assert seen.returncode == 0
    assert "decoder_target_tokens" in seen.stdout
    assert "efficiency" in seen.stdout
    table = launch("inspect_params", gin)
    assert table.returncode == 0
    assert "encoder/layers/self_attention/query/kernel" in table.stdout
    assert "(1, 32, 2, 8)" in table.stdout


def test_the_programs_work_together(folder, trained):
    gin = f"--gin_file={folder / 'run.gin'}"
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 2, 4, 4]

    # The saved config alone launches the same run again, elsewhere.
    again = folder / "again"
    run("train", f"--gin_file={folder / 'run/config.gin'}", f"--model_dir={again}", check=0)
    first, second = (path / "metrics.jsonl" for path in (folder / "run", again))
    assert first.read_bytes() == second.read_bytes()

    evaluated = run("eval", gin, "--step=best", check=0)
    scores = json.loads((folder / "run/eval/metrics.jsonl").read_text().splitlines()[-1])
    measured = {r["step"]: r for r in records if r["step"] and "held_out/loss" in r}
    best = min(measured, key=lambda step: measured[step]["held_out/accuracy"])  # mode: "min"
    assert scores["step"] == best
    assert scores["held_out/loss"] == pytest.approx(measured[best]["held_out/loss"], rel=1e-5)
    assert "eval" in evaluated.stdout

    out = folder / "predictions.jsonl"
    flags = (f"--model_dir={folder / 'run'}", "--max_tokens=4", "--batch_size=2")
    inputs = "light water\nking house\nriver\n"
    (folder / "in.txt").write_text(inputs)
    run("infer", *flags, f"--input={folder / 'in.txt'}", f"--output={out}", check=0)
    whole = out.read_text()
    lines = whole.splitlines()
    assert [json.loads(line)["inputs"] for line in lines] == inputs.splitlines()
    out.write_text(lines[0] + "\n" + lines[1][:7])  # killed while writing the second
    run("infer", *flags, f"--input={folder / 'in.txt'}", f"--output={out}", check=0)
    assert out.read_text() == whole
    piped = run("infer", *flags, check=0, stdin=inputs).stdout
    assert piped == whole


# With the number of devices of a process of its own; None: said in this one.
MISTAKES = {
    "a name that nothing uses": (
        ["--gin.MODEL_NAME_THAT_DOES_NOT_EXIST=1"],
        1,
        "MODEL_NAME_THAT_DOES_NOT_EXIST",
    ),
    "an unknown gin file": (["--gin_file=runs/nowhere.gin"], None, "runs/nowhere.gin"),
    "a mesh that does not fit": (["--gin.Partitioner.data=3"], 2, "needs 3 devices"),
    "a batch that does not divide": (
        ["--gin.Partitioner.data=2", "--gin_bindings=train/Batches.batch_size=7"],
        2,
        "batch_size=7",
    ),
    "microbatches that do not divide": (["--microbatches=3"], None, "microbatches"),
    "heads that do not divide": (
        ["--gin.Partitioner.data=1", "--gin.Partitioner.model=4"],
        4,
        "'heads' of size 2 does not divide over 4",
    ),
    "a split that is not there": (["--gin_bindings=train/Batches.split='dev'"], None, "'dev'"),
    "a vocabulary that is too large": (
        ["--gin.ModelConfig.vocab_size=100"],
        None,
        "ModelConfig.vocab_size=100",
    ),
    "no such checkpoint to start from": (
        [
            "--gin_bindings=train.initial=@RunCheckpoint()",
            "--gin.RunCheckpoint.model_dir=/nowhere/run",
        ],
        None,
        "/nowhere/run",
    ),
    "a parameter that does not exist": (["--gin.StackConfig.num_layer=2"], None, "num_layers"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_message(mistake, folder, launch):
    arguments, devices, expected = MISTAKES[mistake]
    fresh = folder / mistake.replace(" ", "_")
    start = launch if devices is None else functools.partial(run, devices=devices)
    flags = (f"--gin_file={folder / 'run.gin'}", f"--model_dir={fresh}")
    done = start("train", *flags, *arguments)
    assert expected in the_message(done)
    assert not list(fresh.glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "is empty"), (b"a line\nbad \xff\xfe bytes\n", "UTF-8")],
    ids=["empty", "not UTF-8"],
)
def test_bad_text_files_are_named(content, expected, folder, launch):
    bad = folder / "bad.txt"
    bad.write_bytes(content)
    done = launch(
        "train",
        f"--gin_file={folder / 'run.gin'}",
        f"--model_dir={folder / 'bad_run'}",
        f"--gin.TextSource.files={{'train': '{bad}', 'validation': '{bad}'}}",
    )
    message = the_message(done)
    assert expected in message
    assert "bad.txt" in message


def test_another_vocabulary_than_the_checkpoints_is_refused(folder, trained, launch):
    flags = (f"--gin_file={folder / 'run.gin'}", f"--model_dir={trained}")
    done = launch("train", *flags, "--gin.ByteVocabulary.extra_ids=90", "--total_steps=8")
    assert "fingerprint" in the_message(done)
    other = launch(
        "train",
        flags[0],
        f"--model_dir={folder / 'tuned'}",
        "--gin_bindings=train.initial=@RunCheckpoint()",
        f"--gin.RunCheckpoint.model_dir={trained}",
        "--gin.ByteVocabulary.extra_ids=90",
    )
    assert "fingerprint" in the_message(other)


def test_a_traceback_is_there_for_those_who_ask(folder, launch):
    done = launch("train", f"--gin_file={folder / 'run.gin'}", "--microbatches=0", "--v=1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("error: ")


def test_help_teaches(launch):
    done = launch("train", "--help")
    assert done.returncode == 0
    for part in ("--gin_file", "--dry_run", "total_steps", "scripts/train.py --gin_file="):
        assert part in done.stdout
