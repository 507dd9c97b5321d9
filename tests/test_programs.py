"""Programs kept whole: found by all that they are made of, and by nothing less."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import t5x_lite
from t5x_lite import programs, registry
from t5x_lite.peft.compose import Compose
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.quantise import Quantise
from t5x_lite.sharding import Partitioner
from t5x_lite.train.losses import by_sequence
from t5x_lite.train.optim import Adafactor, AdamW, Lion
from t5x_lite.train.schedules import FactorSchedule
from t5x_lite.train.step import Loss
from t5x_lite.types import InputError
from tests import common, xla

ROOT = Path(__file__).resolve().parents[1]
ADAM = AdamW(FactorSchedule("constant", base_learning_rate=0.3))

BOTH = ("traced", "compiled")
TRACED = ("traced",)  # found by its text
NEITHER = ()


@contextlib.contextmanager
def jaxs_cache(folder):
    """jax's own cache in a folder; None: without it."""
    values = {
        "jax_enable_compilation_cache": folder is not None,
        "jax_compilation_cache_dir": None if folder is None else str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in values}

    def update(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # else jax goes by what it was at first

    update(values)
    try:
        yield
    finally:
        update(before)


@pytest.fixture
def kept(tmp_path):
    """Has programs kept in `programs`, and none by jax."""
    with pytest.MonkeyPatch.context() as patch, jaxs_cache(None):
        for name, module in list(sys.modules.items()):  # what tests before have loaded and changed
            file = str(getattr(module, "__dict__", {}).get("__file__") or "")
            if file and not file.startswith(f"{ROOT}{os.sep}") and not programs._is_installed(file):
                patch.delitem(sys.modules, name)
        programs.keep_in(tmp_path / "programs")
        yield
        programs.keep_in(None)


@pytest.fixture
def call(kept):
    """Makes a program, calls it, checks its result and says what had to be done for it.

    As in a process of its own: the function is a new one each time.
    """

    def call(*parts, partitioner=Partitioner(), length=8, more=0.0, also=None):
        traced = []

        def summed(x):
            traced.append(x)
            if also is not None:
                also(x)
            return {"sum": jnp.sum(x * 2.0) + more}

        x = jax.device_put(jnp.arange(float(length))[:, None], partitioner.batch_sharding)
        jitted = jax.jit(summed, out_shardings=partitioner.replicated)
        with common.compiled() as names:
            result = programs.Kept(jitted, partitioner, *parts)(x)
        assert result["sum"] == length * (length - 1) + more
        return ("traced",) * len(traced) + ("compiled",) * names.count("jit(summed)")

    return call


def test_what_is_made_of_the_same_is_read(call, tmp_path):
    assert call(1.0, ADAM) == BOTH
    assert call(1.0, dataclasses.replace(ADAM)) == NEITHER
    paths = list((tmp_path / "programs").iterdir())
    assert {path.name.partition("-")[0] for path in paths} == {"summed"}
    assert {path.suffix for path in paths} == {".key", ".program"}


def test_what_is_read_takes_the_buffers_that_are_given_to_it(kept):
    partitioner = Partitioner(data=2, fsdp=2, model=2)
    traced = []
    for _ in range(2):

        def doubled(x):
            traced.append(x)
            return x * 2

        jitted = jax.jit(doubled, donate_argnums=0, out_shardings=partitioner.batch_sharding)
        kept = programs.Kept(jitted, partitioner)
        x = jax.device_put(jnp.ones((8, 8)), partitioner.batch_sharding)
        y = kept(x)
        assert x.is_deleted()
        assert y.sharding == partitioner.batch_sharding
        assert kept(y).sum() == 4 * 64
    assert len(traced) == 1  # the second was read


def test_without_a_folder_nothing_is_kept(call, tmp_path):
    programs.keep_in(None)
    assert call() == call() == BOTH
    assert not (tmp_path / "programs").exists()


@pytest.mark.parametrize(
    "changed",
    [2.0, 1, "1.0", (1.0,), [1.0], {"a": 1.0}, None, True, np.float32(1.0), jnp.float32, ADAM],
)
def test_another_part_is_another_program(call, changed):
    assert call(1.0) == BOTH
    assert call(changed, more=7.0) == BOTH
    assert call(changed, more=7.0) == NEITHER
    assert call(1.0) == NEITHER


def test_any_field_of_a_part_is_told(call):
    assert call((ADAM, Loss())) == BOTH
    rate = dataclasses.replace(ADAM.learning_rate, base_learning_rate=0.2)
    changed = (
        (dataclasses.replace(ADAM, learning_rate=rate), Loss()),
        (dataclasses.replace(ADAM, clip_norm=3.0), Loss()),
        (ADAM, Loss(label_smoothing=0.1)),
        (ADAM, Loss(normalisation=by_sequence)),
    )
    for number, part in enumerate(changed, start=1):
        assert call(part, more=float(number)) == BOTH


def test_another_part_may_have_the_same_program(call):
    assert call(1.0) == BOTH
    assert call(2.0) == TRACED
    assert call(2.0) == NEITHER


def test_a_program_that_needs_another_argument_is_another_program(kept):
    """jax leaves out what it doesn't need: text and arguments of these two are alike."""
    x = {"a": jnp.ones(4), "b": jnp.full(4, 10.0)}

    def of_a(x):
        return x["a"] * 2

    def of_b(x):
        return x["b"] * 2

    for _ in range(2):
        for part, function in enumerate((of_a, of_b)):
            function.__name__ = "needs"
            jitted = jax.jit(function, out_shardings=Partitioner().replicated)
            found = programs.Kept(jitted, Partitioner(), part)(x)
            assert found.tolist() == [(2.0, 20.0)[part]] * 4


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
    with flax.config.temp_flip_flag("fix_rng_separator", not flax.config.flax_fix_rng_separator):
        assert call() == BOTH
    monkeypatch.setitem(programs._LIBRARIES, "flax", "0.0.1")
    assert call() == BOTH
    monkeypatch.undo()
    assert call() == NEITHER


def test_other_sources_are_told(call, tmp_path, monkeypatch):
    assert call() == BOTH
    monkeypatch.setattr(programs, "_sources", lambda: "changed")
    assert call() == TRACED
    monkeypatch.undo()
    assert call() == NEITHER


def users(folder, monkeypatch, name, text="value = 1\n"):
    """A module of the user's, which may have had a hand in anything."""
    module = types.ModuleType(name)
    module.__file__ = str(folder / f"{name}.py")
    Path(module.__file__).write_text(text)
    monkeypatch.setitem(sys.modules, name, module)


def test_a_users_modules_are_told(call, tmp_path, monkeypatch):
    monkeypatch.setattr(t5x_lite, "BEGAN", math.inf)
    assert call() == BOTH
    users(tmp_path, monkeypatch, "users_own")
    assert call() == TRACED
    assert call() == NEITHER
    (tmp_path / "users_own.py").write_text("value = 2\n")
    programs._content.cache_clear()
    assert call() == TRACED
    monkeypatch.delitem(sys.modules, "users_own")
    assert call() == NEITHER


def test_sources_that_may_have_changed_since_they_were_read_are_not_told(
    call, tmp_path, monkeypatch
):
    users(tmp_path, monkeypatch, "users_own")
    assert call() == call() == BOTH
    assert not (tmp_path / "programs").exists()


def test_modules_that_are_loaded_by_tracing_are_not_told(call, tmp_path, monkeypatch):
    monkeypatch.setattr(t5x_lite, "BEGAN", math.inf)

    def load(x):
        users(tmp_path, monkeypatch, "users_late")

    assert call(also=load) == BOTH
    assert not list((tmp_path / "programs").glob("*.key"))
    monkeypatch.delitem(sys.modules, "users_late")
    assert call(also=load) == TRACED


def test_odd_modules_do_no_harm(call, monkeypatch):
    class Lazy(types.ModuleType):
        def __getattr__(self, name):
            raise ImportError("a dependency is missing")

    with_path = types.ModuleType("with_path")
    with_path.__file__ = Path(__file__)
    for name, module in (("lazy", Lazy("lazy")), ("with_path", with_path), ("nothing", None)):
        monkeypatch.setitem(sys.modules, name, module)
    assert call() == BOTH
    assert call() == NEITHER


def test_the_package_is_told_by_its_sources(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.py").write_text("one")
    monkeypatch.setattr(programs, "_PACKAGE", tmp_path)
    monkeypatch.setattr(t5x_lite, "BEGAN", math.inf)
    found = []
    for text in ("one", "one", "two"):
        programs._content.cache_clear()
        (tmp_path / "inner" / "a.py").write_text(text)
        found.append(programs._sources())
    (tmp_path / "inner" / "b.py").write_text("one")
    assert found[0] == found[1]
    assert len({*found, programs._sources()}) == 3


def nameless(x):
    return x


nameless.__module__ = None


@dataclasses.dataclass(frozen=True)
class Users:
    """Of a class whose code may depend on anything."""

    value: object = 1.0


class Derived(LoRA):
    """A dataclass by inheritance alone, whose fields are not all there is to it."""


Derived.__module__ = LoRA.__module__


@pytest.mark.parametrize(
    "value",
    [lambda x: x, nameless, np.ones(2), object(), {1, 2}, Path("a"), Users(), Users, Derived()],
)
def test_what_can_not_be_told_is_traced_each_time(call, tmp_path, value):
    assert call([value]) == call([value]) == BOTH
    assert not (tmp_path / "programs").exists()


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


def test_a_program_of_some_devices_is_not_kept(kept, tmp_path):
    """Where it would be read back for all."""
    for _ in range(2):
        found = programs.Kept(jax.jit(lambda x: x + 1), Partitioner())(jnp.ones(3))
        assert found.tolist() == [2.0] * 3
    assert not list((tmp_path / "programs").glob("*.program"))


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
        assert caplog.text.count("made anew") == 1
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
        assert call(number, more=number) == BOTH
        files.append(set(folder.iterdir()).difference(*files))
        for path in files[-1]:
            os.utime(path, (number, number))
    assert call(1.0, more=1.0) == NEITHER
    size = sum(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setattr(programs, "MAX_BYTES", size)
    assert call(4.0, more=4.0) == BOTH
    assert files[0] <= set(folder.iterdir())
    assert not any(path.suffix == ".program" and path.exists() for path in files[1])
    assert call(1.0, more=1.0) == call(4.0, more=4.0) == NEITHER
    assert call(2.0, more=2.0) == BOTH


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
        event.endswith(("backend_compile_duration", "jaxpr_trace_duration"))
        and asked.append(fun_name))
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

    steps = {"train_step", "score", "jit(train_step)", "jit(score)"}  # traced, and compiled
    large = {"jit(init)", *steps}
    assert large <= start("a", 6, "cache")
    assert not (start("b", 6, "cache") & steps)
    assert not (start("b", 10, "cache") & large)
    # As a run that has never been stopped, and kept nothing.
    whole = start("c", 10, "other")
    assert large <= whole
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("b", "c")]
    ends = [[line for line in each if json.loads(line)["step"] > 6] for each in lines]
    assert ends[0] == ends[1]
    assert ends[0]
