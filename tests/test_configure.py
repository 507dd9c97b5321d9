"""Gin files and flags: what is built, what is said about mistakes, and what is written down."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import pytest
from absl.testing import flagsaver

from t5x_lite import configure
from t5x_lite.bindings import parameters
from t5x_lite.commandline import descriptions, rewrite_bindings
from t5x_lite.distributed import Process
from t5x_lite.types import InputError

SCRIPTS = configure.GIN_CONFIGS.parent / "scripts"


@dataclasses.dataclass(frozen=True)
class ToyNoise:
    density: float = 0.15
    lengths: tuple[float, ...] = (3.0,)

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise InputError(f"ToyNoise.density={self.density}: expected between 0 and 1")


@dataclasses.dataclass(frozen=True)
class ToyTask:
    name: str
    noise: ToyNoise = ToyNoise()
    limits: dict[str, int] = dataclasses.field(default_factory=lambda: {"encoder": 512})
    cap: float | None = None


class ToyModule(nn.Module):
    width: int
    depth: int = 2


def toy_schedule(step: int, *, peak: float = 1.0, decay: float = 0.5) -> float:
    return peak * decay**step


ran: list[dict[str, Any]] = []


def toy_train(
    *,
    model_dir: str,
    task: ToyTask,
    total_steps: int = 100,
    schedule: Callable[[int], float] = toy_schedule,
    others: tuple[ToyTask, ...] = (),
) -> None:
    """Trains a toy.

    Args:
      model_dir: the run's
        folder.
      task, others: what is learned: nothing.

    Returns:
      total_steps: is described by no argument.
    """
    ran.append(dict(locals()))


def toy_infer(*, task: ToyTask, beams: int) -> None:
    ran.append(dict(locals()))


configure.register([ToyNoise, ToyTask, ToyModule, toy_schedule, toy_train, toy_infer])

RUN = """
include 'parts/task.gin'
MODEL_DIR = %gin.REQUIRED
STEPS = 1000

toy_train.model_dir = %MODEL_DIR
toy_train.total_steps = %STEPS
toy_train.task = @train/ToyTask()
toy_train.others = (@eval/ToyTask(), @ToyTask())
toy_train.schedule = @warm/toy_schedule
warm/toy_schedule.peak = 1e999
"""
TASK = """
ToyTask.name = 'bible'
ToyTask.noise = @ToyNoise()
ToyNoise.density = %DENSITY
DENSITY = 0.2
train/ToyTask.cap = 7.0
eval/ToyNoise.density = 0.5
"""


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is bound, no flag is set, and the current directory holds run.gin."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "run.gin").write_text(RUN)
    (tmp_path / "parts" / "task.gin").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    ran.clear()
    with configure.isolated(), flagsaver.flagsaver():
        yield


def launch(
    monkeypatch: pytest.MonkeyPatch, *argv: str, function: Any = toy_train, **given: Any
) -> int:
    monkeypatch.setattr(sys, "argv", ["program.py", *argv])
    with pytest.raises(SystemExit) as stop:
        configure.main(function, **given)
    return stop.value.code or 0


def message(
    *bindings: str, files: tuple[str, ...] = ("run.gin",), function: Any = toy_train
) -> str:
    def read_and_build() -> None:
        configure.parse(files, bindings)
        configure.arguments(function)

    with pytest.raises(InputError) as error:
        read_and_build()
    return str(error.value)


# Building


def test_files_bindings_scopes_and_macros_build_the_arguments() -> None:
    configure.parse(["run.gin"], ["MODEL_DIR = 'x'", "STEPS = 5"])
    built = configure.arguments(toy_train)
    assert built["model_dir"] == "x"
    assert built["total_steps"] == 5
    assert built["task"] == ToyTask("bible", ToyNoise(0.2), cap=7.0)
    assert built["others"] == (ToyTask("bible", ToyNoise(0.5)), ToyTask("bible", ToyNoise(0.2)))
    assert built["schedule"](3) == math.inf
    assert type(built["task"]) is ToyTask  # of the class itself, so that it pickles and compares


def test_later_files_win(tmp_path: Path) -> None:
    (tmp_path / "over.gin").write_text("STEPS = 7\nMODEL_DIR = 'y'\n")
    configure.parse(["run.gin", "over.gin"])
    assert configure.arguments(toy_train)["total_steps"] == 7


def test_flax_modules_are_built_whole() -> None:
    configure.parse([], ["ToyModule.width = 3"])
    assert ToyModule(**configure.arguments(ToyModule)) == ToyModule(3)
    assert "ToyModule has no parameter 'parent'" in message("ToyModule.parent = 1", files=())


def test_including_file_search_path_and_packaged_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged, extra = tmp_path / "packaged", tmp_path / "extra"
    for folder, text in ((packaged, "A = 1"), (extra, "A = 2")):
        (folder / "models").mkdir(parents=True)
        (folder / "models" / "m.gin").write_text(f"{text}\ninclude 'n.gin'\ntoy_infer.beams = %A")
        (folder / "models" / "n.gin").write_text("ToyTask.name = 'n'\ntoy_infer.task = @ToyTask()")
    monkeypatch.setattr(configure, "GIN_CONFIGS", packaged)
    configure.parse(["models/m.gin"])
    assert configure.arguments(toy_infer) == {"task": ToyTask("n"), "beams": 1}
    configure.parse(["models/m.gin"], search_paths=["extra"])
    assert configure.arguments(toy_infer)["beams"] == 2


def test_user_modules_register_their_own_and_stay_in_the_saved_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_toys.py").write_text(
        "from t5x_lite import configure\n"
        "def my_noise(density): return ('mine', density)\n"
        "configure.register([my_noise])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.gin").write_text(
        "import my_toys\nToyTask.name='x'\nToyTask.noise=@my_noise()\nmy_noise.density=0.5\n"
    )
    configure.parse(["mine.gin"])
    assert configure.arguments(ToyTask)["noise"] == ("mine", 0.5)
    assert "import my_toys\n" in configure.operative_config()
    assert "can't import 'no_such'" in message("import no_such")


def test_blocks_and_singletons_work_and_are_saved(tmp_path: Path) -> None:
    shared = "@one/gin.singleton()"
    (tmp_path / "a.gin").write_text(
        "ToyTask:\n  name = 'x'\n  cap = 1.0\none/gin.singleton.constructor = @ToyTask\n"
        f"toy_train:\n  model_dir = ''\n  task = {shared}\n  others = ({shared},)\n"
    )
    configure.parse(["a.gin"])
    built = configure.arguments(toy_train)
    assert built["task"] is built["others"][0]
    (tmp_path / "saved.gin").write_text(configure.operative_config())
    configure.reset()
    configure.parse(["saved.gin"])
    assert configure.arguments(toy_train) == {**built, "total_steps": 100}  # defaults are bound now


def test_a_name_stands_for_one_object() -> None:
    configure.register([ToyNoise])
    with pytest.raises(ValueError, match="'ToyNoise' stands for"):
        configure.register([("ToyNoise", ToyTask)])


def test_the_table_registers() -> None:
    configure.register()


# Mistakes


def test_unknown_file_names_folders_and_close_files() -> None:
    text = message(files=("rum.gin",))
    assert "there is no gin file 'rum.gin'" in text
    assert "Did you mean run.gin?" in text
    assert str(Path.cwd()) in text
    assert str(configure.GIN_CONFIGS) in text


def test_unknown_include_names_the_including_line(tmp_path: Path) -> None:
    (tmp_path / "a.gin").write_text("\ninclude 'parts/tsk.gin'")
    assert "'parts/tsk.gin' (a.gin:2). Did you mean parts/task.gin?" in message(files=("a.gin",))


def test_files_that_include_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.gin").write_text("include 'b.gin'")
    (tmp_path / "b.gin").write_text("include 'a.gin'")
    assert "includes itself" in message(files=("a.gin",))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("toy_train.total_steps == 3", "a.gin:2"),
        ("toy_train.total_steps = (3,", "a.gin:"),
        ("toy_train.model_dir = somewhere", "'somewhere' is no value: a string needs quotes"),
        ("toy_train.model_dir", "a.gin:2"),
    ],
)
def test_syntax_errors_name_file_and_line(tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "a.gin").write_text(f"# first\n{line}\n")
    text = message(files=("a.gin",))
    assert "syntax error" in text
    assert expected in text


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.gin").write_bytes(b"A = '\xff'")
    assert "a.gin is not UTF-8 text at byte 5" in message(files=("a.gin",))


@pytest.mark.parametrize(
    ("binding", "expected"),
    [
        ("toy_trian.total_steps = 1", "'toy_trian' (command line: 'toy_trian.total_steps = 1')"),
        ("toy_trian.total_steps = 1", "Did you mean toy_train"),
        ("script.toy_train.total_steps = 1", "Did you mean toy_train"),
        ("toy_train.task = [@ToyTsk()]", "Did you mean ToyTask"),
        ("toy_train.totl_steps = 1", "Did you mean total_steps?"),
        ("toy_train.totl_steps = 1", "It takes: model_dir, task, total_steps, schedule, others"),
        ("MODEL_DIRR = 1", "nothing uses the macro MODEL_DIRR (command line: 'MODEL_DIRR = 1')"),
        ("MODEL_DIRR = 1", "Did you mean MODEL_DIR?"),
        ("MODEL_DIRR = 1", "Macros in use: DENSITY, MODEL_DIR, STEPS"),
        ("toy_train = 1", "toy_train.PARAMETER = VALUE"),
        ("STEPS = 5", "%MODEL_DIR has no value yet: run.gin:3 requires one"),
        ("STEPS = 5", "toy_train.model_dir (run.gin:6) uses it. Add --gin.MODEL_DIR=VALUE"),
        ("toy_train.model_dir = %gin.REQUIRED", "toy_train.model_dir has no value yet"),
        ("toy_train.model_dir = %MODLE_DIR", "%MODLE_DIR, used by toy_train.model_dir (command"),
        ("toy_train.model_dir = %MODLE_DIR", "is never defined. Did you mean MODEL_DIR?"),
        ("DENSITY = %DENSITY", "in a circle: toy_train -> train/ToyTask -> train/ToyNoise -> %D"),
        ("ToyNoise.lengths = @ToyNoise()", "train/ToyNoise -> train/ToyNoise"),
    ],
)
def test_mistakes_are_named_with_their_mend(binding: str, expected: str) -> None:
    bindings = ["MODEL_DIR = 'x'"] if "circle" in expected or "->" in expected else []
    assert expected in message(*bindings, binding)


def test_missing_arguments_of_the_function_and_within() -> None:
    text = message(files=())
    assert "toy_train needs a value for model_dir, task" in text
    assert "`toy_train.model_dir = VALUE`" in text
    text = message("toy_train.model_dir = 'x'", "toy_train.task = @a/ToyTask()", files=())
    assert "a/ToyTask, used by toy_train.task (command line: " in text
    assert "needs a value for name" in text
    assert "--gin.a/ToyTask.name=VALUE" in text


def test_what_the_function_does_not_reach_may_be_incomplete() -> None:
    configure.parse(["run.gin"], ["toy_infer.beams = 4", "toy_infer.task = @eval/ToyTask()"])
    assert configure.arguments(toy_infer)["task"].noise.density == 0.5


def test_an_overridden_use_of_a_macro_counts_as_a_use() -> None:
    configure.parse(["run.gin"], ["toy_train.model_dir = 'x'", "toy_train.total_steps = 2"])
    assert configure.arguments(toy_train)["total_steps"] == 2


def test_errors_from_constructors_are_one_line_that_names_the_configurable() -> None:
    text = message("MODEL_DIR = 'x'", "eval/ToyNoise.density = 2.0")
    assert text == ("ToyNoise.density=2.0: expected between 0 and 1 [in @eval/ToyNoise()]")


# Flags


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("10", "10"),
        ("-1e-3", "-1e-3"),
        ("'/tmp/x'", "'/tmp/x'"),
        ('"/tmp/x"', '"/tmp/x"'),
        ("/tmp/x", "'/tmp/x'"),
        ("10k", "'10k'"),
        ("2026-11-23", "'2026-11-23'"),
        ("it's", '"it\'s"'),
        ("a b=c", "'a b=c'"),
        ("", "''"),
        ("True", "True"),
        ("None", "None"),
        ("(1, 'a')", "(1, 'a')"),
        ("@train/ToyTask()", "@train/ToyTask()"),
        ("%STEPS", "%STEPS"),
    ],
)
def test_gin_flags_take_values_and_bare_strings(given: str, expected: str) -> None:
    argv = ["program", "--dry_run", f"--gin.train/a.b={given}"]
    assert rewrite_bindings(argv, configure.is_value) == [
        "program",
        "--dry_run",
        f"--gin_bindings=train/a.b = {expected}",
    ]


@pytest.mark.parametrize("argument", ["--gin.A", "--gin.=1", "--gin.A=true", "--gin.A=NONE"])
def test_gin_flags_refuse_what_would_mislead(argument: str) -> None:
    with pytest.raises(InputError, match="--gin"):
        rewrite_bindings([argument], configure.is_value)


def test_main_runs_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ("--gin_file=run.gin", "--gin_bindings=STEPS = 3", "--gin.MODEL_DIR=/tmp/x")
    assert launch(monkeypatch, *argv, schedule=toy_schedule) == 0
    assert [call["model_dir"] for call in ran] == ["/tmp/x"]
    assert ran[0]["total_steps"] == 3
    assert ran[0]["schedule"] is toy_schedule  # from the program, over the gin file


def test_dry_run_prints_and_does_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--gin_file=run.gin", "--gin.MODEL_DIR=/tmp/x", "--dry_run")
    assert launch(monkeypatch, *argv) == 0
    out = capsys.readouterr().out
    assert ran == []
    assert "toy_train.task = @train/ToyTask()" in out
    assert "Next would come toy_train with" in out


def toy_plan(*, model_dir: str, total_steps: int, topology: str = "here") -> None:
    ran.append({"model_dir": model_dir, "total_steps": total_steps, "topology": topology})


def test_a_program_takes_the_files_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own bindings win; parameters that it does not have are left out."""
    argv = ("--gin_file=run.gin", "--gin.MODEL_DIR=/tmp/x", "--gin.toy_plan.total_steps=7")
    assert launch(monkeypatch, *argv, function=toy_plan, like=toy_train) == 0
    assert ran == [{"model_dir": "/tmp/x", "total_steps": 7, "topology": "here"}]


def toy_mesh(*, model_dir: str = "", partitioner: str = "") -> None:
    ran.append(dict(locals()))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `distributed.start` was called with, on a pod of two workers."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(configure.distributed, "on_pod", lambda: Process("w-0:8482", 2, 1))
    monkeypatch.setattr(configure.distributed, "start", lambda *given: calls.append(given))
    return calls


def test_flags_say_which_process_this_is(
    monkeypatch: pytest.MonkeyPatch, started: list[tuple[Any, ...]]
) -> None:
    several = ("--coordinator=host:9", "--num_processes=3", "--process_id=1")
    assert launch(monkeypatch, *several, "--process_timeout=7.5", function=toy_mesh) == 0
    assert launch(monkeypatch, *several, "--model_dir=x", function=toy_mesh) == 0
    (one, timeout, agreed), (other, _, disagreed) = started
    assert one == other == Process("host:9", 3, 1)
    assert timeout == 7.5
    assert agreed != disagreed
    assert len(ran) == 2
    assert launch(monkeypatch, *several, "--dry_run", function=toy_mesh) == 0
    assert len(started) == 2  # a dry run waits for nobody


def test_on_a_pod_programs_with_a_mesh_meet_by_themselves(
    monkeypatch: pytest.MonkeyPatch, started: list[tuple[Any, ...]]
) -> None:
    assert launch(monkeypatch, function=toy_mesh) == 0
    assert launch(monkeypatch, "--gin_file=run.gin", "--gin.MODEL_DIR=x") == 0
    assert [process for process, *_ in started] == [Process("w-0:8482", 2, 1), None]


def test_the_others_are_told_how_a_program_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(configure.distributed, "started", lambda: Process("w-0:8482", 2, 1))
    monkeypatch.setattr(configure.distributed, "finish", lambda: told.append("done"))
    monkeypatch.setattr(configure.distributed, "leave", told.append)

    def failing(*, error: str) -> None:
        raise {"input": InputError, "interrupt": KeyboardInterrupt}[error](error)

    assert launch(monkeypatch, function=toy_mesh) == 0
    assert launch(monkeypatch, "--error=input", function=failing) == 2
    assert launch(monkeypatch, "--error=interrupt", function=failing) == 130
    assert told == ["done", 2, 130]
    with pytest.raises(KeyError):
        launch(monkeypatch, "--error=unforeseen", function=failing)
    assert told[3:] == [1]


def test_flags_of_a_process_that_are_not_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(monkeypatch, "--num_processes=2", "--gin_file=none.gin", function=toy_mesh) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --coordinator=HOST:PORT and --process_id=I missing")
    assert launch(monkeypatch, "--num_processes=0", function=toy_mesh) == 2
    assert launch(monkeypatch, "--process_timeout=0", function=toy_mesh) == 2
    assert ran == []


def test_a_binding_without_effect_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--gin_file=run.gin", "--gin.MODEL_DIR=x", "--gin.trian/ToyTask.cap=1.0")
    assert launch(monkeypatch, *argv) == 0
    assert capsys.readouterr().err == (
        "warning: toy_train doesn't use command line: 'trian/ToyTask.cap = 1.0'\n"
    )


@pytest.mark.parametrize(
    "argv",
    [
        ("--gin_file=none.gin",),
        ("--gin_file=run.gin", "--gin.MODEL_NAME_THAT_DOES_NOT_EXIST=1"),
        ("--gin_flie=run.gin",),
        ("run.gin",),
        ("--gin.MODEL_DIR",),
        ("--gin_file=run.gin", "--gin.MODEL_DIR=x", "--gin.DENSITY=7"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(monkeypatch, *argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert ran == []


def test_verbose_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(monkeypatch, "--gin_file=none.gin", "--v=1") == 2
    assert "Traceback" in capsys.readouterr().err


def test_interruption_says_how_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert launch(monkeypatch, "--gin_bindings=", function=interrupted) == 130
    assert "python program.py --gin_bindings=" in capsys.readouterr().err


def test_unforeseen_errors_are_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("the original")

    monkeypatch.setattr(sys, "argv", ["program.py"])
    with pytest.raises(ZeroDivisionError, match=r"^the original$"):
        configure.main(broken)


def test_help_shows_flags_and_parameters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(monkeypatch, "--help") == 0
    short = capsys.readouterr().out
    assert "python program.py --gin_file=" in short
    assert "total_steps: int = 100" in short
    assert "--coordinator       HOST:PORT of process 0" in short
    assert "\n  model_dir: str (required)\n      the run's folder.\n" in short
    assert "\n  task: ToyTask (required)\n      what is learned: nothing.\n" in short
    assert "\n  total_steps: int = 100\n  schedule" in short
    assert short.endswith("others: tuple[ToyTask, ...] = ()\n      what is learned: nothing.\n")
    assert "ToyNoise " not in short
    assert launch(monkeypatch, "--helpfull") == 0
    full = capsys.readouterr().out
    assert "ToyNoise " in full
    assert "--log_dir" not in full  # other libraries' flags


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_help_describes_all_that_a_program_takes(script: Path) -> None:
    (name,) = re.findall(r"configure\.main\((\w+)", script.read_text())
    function = runpy.run_path(str(script))[name]
    described = descriptions(inspect.getdoc(function) or "")
    taken = set(parameters(function)) - {"console"}  # from Python alone
    assert taken - set(described) == set()
    assert all(described.values())
    assert set(described) <= set(parameters(function))


def test_a_program_of_its_own(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        '''Counts.'''
        from t5x_lite import configure
        from t5x_lite.types import InputError

        def count(*, limit: int = 3):
            if limit < 0:
                raise InputError(f"count.limit={limit}: expected at least 0")
            print(*range(limit))

        if __name__ == "__main__":
            configure.main(count)
        """)
    )

    def run(*argv: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, program, *argv],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(configure.GIN_CONFIGS.parent), "JAX_PLATFORMS": "cpu"},
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    assert run("--gin.count.limit=2") == (0, "0 1\n", "")
    assert run("--gin.count.limit=-1") == (2, "", "error: count.limit=-1: expected at least 0\n")
    assert run("--help")[1].startswith("Counts.\n")


# Writing down


def test_the_operative_config_alone_builds_the_same(tmp_path: Path) -> None:
    configure.parse(["run.gin"], ["MODEL_DIR = 'x'", "ToyNoise.lengths = (1.5,)"])
    built = configure.arguments(toy_train)
    text = configure.operative_config()

    configure.reset()
    (tmp_path / "saved.gin").write_text(text)
    configure.parse(["saved.gin"])
    again = configure.arguments(toy_train)
    # A schedule given by reference is a wrapper, made anew each time; it computes the same.
    assert again.pop("schedule")(2) == built.pop("schedule")(2) == math.inf
    assert again == built
    assert configure.operative_config() == text


def test_the_operative_config_has_defaults_and_what_is_called_later() -> None:
    configure.parse(["run.gin"], ["MODEL_DIR = 'x'", "toy_infer.beams = 4"])
    configure.arguments(toy_train)
    lines = configure.operative_config().splitlines()
    assert "train/ToyNoise.lengths = (3.0,)" in lines  # a default, of a nested dataclass
    assert "eval/ToyTask.limits = {'encoder': 512}" in lines  # from a default factory
    assert "warm/toy_schedule.decay = 0.5" in lines  # not called yet
    assert "warm/toy_schedule.peak = 1e999" in lines
    assert "toy_infer.beams = 4" in lines  # not used, but not lost


def test_defaults_that_gin_cannot_say_are_comments() -> None:
    configure.parse([], ["toy_train.model_dir = 'x'", "toy_train.task = @ToyTask()"])
    configure.parse([], ["ToyTask.name = 'a'"])
    configure.arguments(toy_train)
    text = configure.operative_config()
    assert "# ToyTask.noise = ToyNoise(density=0.15, lengths=(3.0,))  (a default" in text
    assert "# toy_train.schedule = <function toy_schedule>  (a default" in text


def test_long_values_survive(tmp_path: Path) -> None:
    limits = {f"stream {i}": i for i in range(40)}
    configure.parse([], ["ToyTask.name = 'a'", f"ToyTask.limits = {limits}"])
    configure.arguments(ToyTask)
    (tmp_path / "saved.gin").write_text(configure.operative_config())
    assert max(map(len, configure.operative_config().splitlines())) <= 100
    configure.reset()
    configure.parse(["saved.gin"])
    assert configure.arguments(ToyTask)["limits"] == limits


def test_saving_keeps_an_older_config_that_differs(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def save(steps: int) -> list[str]:
        with configure.isolated():
            configure.parse(["run.gin"], ["MODEL_DIR = 'x'", f"STEPS = {steps}"])
            configure.arguments(toy_train)
            configure.save_operative_config(folder)
        return sorted(path.name for path in folder.iterdir())

    assert save(1) == ["config.gin"]
    assert save(1) == ["config.gin"]
    assert save(2) == ["config-0001.gin", "config.gin"]
    assert save(3) == ["config-0001.gin", "config-0002.gin", "config.gin"]
    assert "STEPS = 1" in (folder / "config-0001.gin").read_text()
    assert "STEPS = 3" in (folder / "config.gin").read_text()


def test_only_process_0_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure.parse(["run.gin"], ["MODEL_DIR = 'x'"])
    configure.arguments(toy_train)
    monkeypatch.setattr(configure.jax, "process_index", lambda: 1)
    configure.save_operative_config(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_programs_look_for_no_garbage_among_what_they_imported() -> None:
    program = textwrap.dedent("""
        import gc
        from t5x_lite import configure

        def toy():
            print(before, gc.isenabled(), gc.get_freeze_count() > 10_000)

        before = gc.isenabled(), gc.get_freeze_count()
        configure.main(toy)
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "(True, 0) True True\n", done.stderr
