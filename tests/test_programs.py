"""Programs kept whole: found by all that they are made of, and by nothing less."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from t5x_lite import programs, registry
from t5x_lite.peft.compose import Compose
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.quantise import Quantise
from t5x_lite.sharding import Partitioner
from t5x_lite.train.optim import Adafactor, AdamW, Lion
from t5x_lite.train.schedules import FactorSchedule
from t5x_lite.types import InputError
from tests import common, xla

ROOT = Path(__file__).resolve().parents[1]
ADAM = AdamW(FactorSchedule("constant", base_learning_rate=0.3))

BOTH = ("traced", "compiled")
TRACED = ("traced",)  # found by its text
NEITHER = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """Of this module, whose source is told."""

    value: object = 1.0


@contextlib.contextmanager
def jaxs_cache(folder):
    """jax's own cache in a folder; None: without it."""
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in names}

    def update(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # else jax goes by what it was at first

    update(dict(zip(names, (folder is not None, folder and str(folder)), strict=True)))
    try:
        yield
    finally:
        update(before)


@pytest.fixture
def call(tmp_path):
    """Makes a program, calls it, checks its result and says what had to be done for it.

    As in a process of its own: the function is a new one each time.
    """
    done: list[str] = []

    def listen(event, seconds, fun_name="", **_):
        if event.endswith("backend_compile_duration") and "summed" in fun_name:
            done.append("compiled")

    def call(*parts, partitioner=Partitioner(), length=8, more=0.0, also=None):
        done.clear()

        def summed(x):
            done.append("traced")
            if also is not None:
                also(x)
            return {"sum": jnp.sum(x * 2.0) + more}

        x = jax.device_put(jnp.arange(float(length))[:, None], partitioner.batch_sharding)
        jitted = jax.jit(summed, out_shardings=partitioner.replicated)
        result = programs.Kept(jitted, partitioner, *parts)(x)
        assert result["sum"] == length * (length - 1) + more
        return tuple(done)

    jax.monitoring.register_event_duration_secs_listener(listen)
    programs.keep_in(tmp_path / "programs")
    try:
        with jaxs_cache(None):
            yield call
    finally:
        programs.keep_in(None)
        jax.monitoring.unregister_event_duration_listener(listen)


def test_what_is_made_of_the_same_is_read(call, tmp_path):
    assert call(Part(), ADAM) == BOTH
    assert call(Part(), dataclasses.replace(ADAM)) == NEITHER
    paths = list((tmp_path / "programs").iterdir())
    assert {path.name.partition("-")[0] for path in paths} == {"summed"}
    assert {path.suffix for path in paths} == {".key", ".program"}


def test_what_is_read_takes_the_buffers_that_are_given_to_it(call):
    partitioner = Partitioner(data=2, fsdp=2, model=2)
    for _ in range(2):

        def doubled(x):
            return x * 2

        jitted = jax.jit(doubled, donate_argnums=0, out_shardings=partitioner.batch_sharding)
        kept = programs.Kept(jitted, partitioner)
        x = jax.device_put(jnp.ones((8, 8)), partitioner.batch_sharding)
        y = kept(x)
        assert x.is_deleted()
        assert y.sharding == partitioner.batch_sharding
        assert kept(y).sum() == 4 * 64


def test_without_a_folder_nothing_is_kept(call, tmp_path):
    programs.keep_in(None)
    assert call(Part()) == call(Part()) == BOTH
    assert not (tmp_path / "programs").exists()


@pytest.mark.parametrize(
    "changed",
    [
        Part(2.0),
        Part(1),  # is not 1.0
        Part("1.0"),
        Part((1.0,)),
        Part({"a": 1.0}),
        Part(None),
        Part(np.float32(1.0)),
        Part(jnp.float32),
        Part(Part()),
    ],
)
def test_another_part_is_another_program(call, changed):
    assert call(Part()) == BOTH
    assert call(changed, more=7.0) == BOTH
    assert call(changed, more=7.0) == NEITHER
    assert call(Part()) == NEITHER


def test_another_part_may_have_the_same_program(call):
    assert call(Part()) == BOTH
    assert call(Part(2.0)) == TRACED
    assert call(Part(2.0)) == NEITHER


def test_arguments_meshes_and_jax_itself_are_told(call, monkeypatch):
    assert call() == BOTH
    assert call(length=16) == BOTH
    assert call(partitioner=Partitioner(fsdp=2)) == BOTH
    assert call(partitioner=Partitioner(model=8)) == BOTH
    rules = (*Partitioner().rules, ("more", None))
    assert call(partitioner=Partitioner(rules=rules)) == TRACED
    with jax.default_matmul_precision("highest"):
        assert call() == BOTH
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=true")
    assert call() == BOTH
    monkeypatch.undo()
    monkeypatch.setitem(programs._LIBRARIES, "flax", "0.0.1")
    assert call() == BOTH
    monkeypatch.undo()
    assert call() == NEITHER


def test_other_sources_are_told(call, tmp_path, monkeypatch):
    assert call() == BOTH
    monkeypatch.setattr(programs, "_package_digest", lambda: "changed")
    assert call() == TRACED
    monkeypatch.undo()
    assert call() == NEITHER

    # A user's module, which may have had a hand in anything.
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "users_own.py"
    source.write_text("import dataclasses\n\n@dataclasses.dataclass\nclass Own:\n    value: int\n")
    module = importlib.import_module("users_own")
    monkeypatch.setitem(sys.modules, "users_own", module)
    assert call(module.Own(3)) == TRACED
    assert call(module.Own(3)) == NEITHER
    source.write_text(source.read_text() + "# changed\n")
    assert call(module.Own(3)) == TRACED


def test_the_package_is_told_by_its_sources(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.py").write_text("one")
    monkeypatch.setattr(programs, "_PACKAGE", tmp_path)
    digest = programs._package_digest.__wrapped__
    first = digest()
    assert digest() == first
    (tmp_path / "inner" / "a.py").write_text("two")
    assert digest() != first


@pytest.mark.parametrize("value", [lambda x: x, np.ones(2), object(), {1, 2}, Path("a")])
def test_what_can_not_be_told_is_traced_each_time(call, tmp_path, value):
    assert call(Part(value)) == call(Part(value)) == BOTH
    assert not (tmp_path / "programs").exists()


def test_classes_without_a_source_can_not_be_told(call):
    inner = dataclasses.make_dataclass("Inner", [("value", int)])
    assert call(inner(1)) == call(inner(1)) == BOTH


def test_what_runs_are_made_of_can_be_told():
    """Else their programs would be made anew each time, and no one would hear of it."""
    rate = FactorSchedule("constant", base_learning_rate=0.3)
    told = []
    for made in registry.CONFIGURABLES:
        if made.__module__.split(".")[1] in ("models", "peft", "sharding", "train"):
            try:
                value = made(rate) if made in (AdamW, Adafactor, Lion) else made()
            except (TypeError, InputError):  # takes what has no default, or is no class of values
                continue
            told.append(programs._digest(value))
    told += [programs._digest(config) for config in common.FAMILIES.values()]
    told.append(programs._digest(Compose((LoRA(), Quantise()))))
    assert len(set(told)) == len(told) > 25


def test_a_program_that_calls_back_is_not_kept(call):
    def say(x):
        jax.debug.callback(lambda x: None, x)

    assert call(also=say) == call(also=say) == BOTH


def test_what_jax_has_read_back_is_not_written(call, tmp_path):
    """XLA:CPU would write it without its functions, and the next start would end by that."""
    with jaxs_cache(tmp_path / "jax"):
        assert call() == BOTH
        for path in (tmp_path / "programs").iterdir():
            path.unlink()
        assert call() == BOTH  # "compiled" is what jax calls it
        assert not list((tmp_path / "programs").glob("*.program"))
        assert call() == BOTH


def test_what_can_not_be_read_is_made_anew(call, tmp_path, monkeypatch, caplog):
    assert call() == BOTH
    (path,) = (tmp_path / "programs").glob("*.program")
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\0" * len(whole)):
        path.write_bytes(damaged)
        caplog.clear()
        assert call() == BOTH
        assert "made anew" in caplog.text
        assert call() == NEITHER  # written again
    path.unlink()
    assert call() == BOTH
    assert call() == NEITHER
    caplog.clear()
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    assert call() == BOTH
    assert "another user's" in caplog.text


def test_a_full_disk_costs_nothing_but_the_program(call, tmp_path, monkeypatch, caplog):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert call() == call() == BOTH
    assert "not kept" in caplog.text
    assert list((tmp_path / "programs").iterdir()) == []


def test_what_was_read_longest_ago_goes_first(call, tmp_path, monkeypatch):
    folder, files = tmp_path / "programs", []
    for number in (1.0, 2.0, 3.0):
        assert call(Part(number), more=number) == BOTH
        files.append(set(folder.iterdir()).difference(*files))
        for path in files[-1]:
            os.utime(path, (number, number))
    assert call(Part(1.0), more=1.0) == NEITHER
    size = sum(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setattr(programs, "MAX_BYTES", size)
    assert call(Part(4.0), more=4.0) == BOTH
    assert files[0] <= set(folder.iterdir())
    assert not files[1] & set(folder.iterdir())
    assert call(Part(1.0), more=1.0) == call(Part(4.0), more=4.0) == NEITHER
    assert call(Part(2.0), more=2.0) == BOTH


RUN = """
import json, sys
import jax
from t5x_lite import programs
from t5x_lite.sharding import Partitioner
from t5x_lite.train import loop
from tests.train import harness

programs.keep()
asked = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, fun_name="", **_:
        event.endswith("backend_compile_duration") and asked.append(fun_name))
folder, data, steps = sys.argv[1:]
loop.train(**harness.tiny_run(
    folder, data, total_steps=int(steps), partitioner=Partitioner(data=2, fsdp=2, model=2)))
print(json.dumps(asked))
"""


def test_a_second_start_traces_none_of_its_programs(tmp_path):
    def start(folder, steps, cache):
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(tmp_path / folder), str(tmp_path), str(steps)],
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT),
                "XLA_FLAGS": xla.flags(8),
                "JAX_COMPILATION_CACHE_DIR": str(tmp_path / cache),
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return set(json.loads(done.stdout.splitlines()[-1]))

    large = {"jit(init)", "jit(train_step)", "jit(score)"}
    first = start("a", 6, "cache")
    assert large <= first
    assert not (start("b", 6, "cache") & {"jit(train_step)", "jit(score)"})
    assert not (start("b", 10, "cache") & large)
    # As a run that has never been stopped, and kept nothing.
    whole = start("c", 10, "other")
    assert large <= whole
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("b", "c")]
    ends = [[line for line in each if json.loads(line)["step"] > 6] for each in lines]
    assert ends[0] == ends[1]
    assert ends[0]
