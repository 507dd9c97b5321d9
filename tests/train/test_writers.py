"""Metric files survive kills and resumes byte for byte; the console stays quiet."""

import io
import json
import math
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from t5x_lite.train import writers
from t5x_lite.types import InputError


def _record(step):
    return {"loss": np.float32(1 / (step + 3)), "accuracy": jnp.float32(0.1 * step), "tokens": step}


def _write(path, steps):
    writer = writers.JsonlWriter(path)
    for step in steps:
        writer.write(step, _record(step))
    writer.close()


def test_floats_read_back_exactly_and_keys_are_sorted(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    _write(path, [7])
    line = path.read_text()
    assert list(json.loads(line)) == ["accuracy", "loss", "step", "tokens"]
    assert np.float32(json.loads(line)["loss"]) == np.float32(0.1)
    assert json.loads(line)["loss"] == float(np.float32(0.1))
    assert line.endswith('"step": 7, "tokens": 7}\n')


def test_what_json_lacks_is_null(tmp_path):
    writer = writers.JsonlWriter(tmp_path / "m.jsonl")
    writer.write(0, {"a": math.nan, "b": jnp.float32(jnp.inf), "c": jnp.bfloat16(0.5)})
    assert (tmp_path / "m.jsonl").read_text() == '{"a": null, "b": null, "c": 0.5, "step": 0}\n'


@pytest.mark.parametrize("torn", [b"", b'{"acc', b'{"accuracy": 0.5, "loss": 1.0, "step": 3}'])
def test_a_resumed_file_is_byte_identical(tmp_path, torn):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    _write(whole, range(10))
    _write(resumed, range(7))
    with open(resumed, "ab") as file:
        file.write(torn)
    writer = writers.JsonlWriter(resumed)
    writer.truncate_after(4)
    assert [r["step"] for r in writers.read_jsonl(resumed)] == [0, 1, 2, 3, 4]
    _write(resumed, range(5, 10))
    assert resumed.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["resumed.jsonl", "whole.jsonl"]


def test_truncate_while_open_then_write(tmp_path):
    writer = writers.JsonlWriter(tmp_path / "m.jsonl")
    writer.truncate_after(-1)  # nothing there yet
    for step in range(3):
        writer.write(step, {})
    writer.truncate_after(0)
    writer.write(1, {"x": 1})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 0}\n{"step": 1, "x": 1}\n'


def test_a_failed_truncation_leaves_the_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    _write(path, range(5))
    before = path.read_bytes()

    def killed(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        writers.JsonlWriter(path).truncate_after(2)
    assert path.read_bytes() == before


def test_a_killed_process_loses_no_finished_record(tmp_path):
    path = tmp_path / "m.jsonl"
    program = (
        "import os, signal, sys; from t5x_lite.train.writers import JsonlWriter\n"
        "w = JsonlWriter(sys.argv[1])\n"
        "for step in range(5): w.write(step, {'loss': 1.5})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [r["step"] for r in writers.read_jsonl(path)] == [0, 1, 2, 3, 4]


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"m\.jsonl, line 2"):
        writers.JsonlWriter(path).truncate_after(5)
    with pytest.raises(InputError, match=r"can't read.*none\.jsonl"):
        writers.read_jsonl(tmp_path / "none.jsonl")


def test_tensorboard_events_hold_what_was_written(tmp_path):
    from tensorboardX.proto import event_pb2

    writer = writers.TensorBoardWriter(tmp_path)
    writer.truncate_after(3)  # a fresh folder has nothing to hide
    assert not list(tmp_path.iterdir())
    writer.write(1, {"train/loss": jnp.float32(2.5)})
    assert _scalars(tmp_path, event_pb2) == [(1, "train/loss", 2.5)]  # before it is closed
    writer.write(2, {"train/loss": 2.25, "eval/loss": math.nan})
    writer.truncate_after(1)
    writer.write(2, {"train/loss": 2.0})
    assert len(list(tmp_path.iterdir())) == 2
    steps = [e.step for e in _events(tmp_path, event_pb2) if e.HasField("session_log")]
    assert steps == [2]  # TensorBoard hides what came before from this step on
    assert _scalars(tmp_path, event_pb2)[-1] == (2, "train/loss", 2.0)


def _events(folder, event_pb2):
    """Events of TFRecord files: length (8 bytes), its crc (4), data, its crc (4)."""
    for file in sorted(folder.iterdir(), key=lambda file: int(file.suffix[1:])):
        content = file.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            yield event_pb2.Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]


def _scalars(folder, event_pb2):
    return [
        (event.step, value.tag, value.simple_value)
        for event in _events(folder, event_pb2)
        for value in event.summary.value
    ]


def _console(**kwargs):
    stream = io.StringIO()
    return Console(file=stream, width=200, **kwargs), stream


def test_without_a_terminal_the_console_prints_lines_now_and_then():
    console, stream = _console()
    now = iter([0.0, 4.0, 8.0, 12.0, 16.0])
    writer = writers.ConsoleWriter(10, console, seconds=10.0, clock=lambda: next(now))
    for step in (1, 2, 3, 4, 10):
        writer.write(step, {"timing/tokens_per_second": 1234.5})
        writer.write(step, {"train/loss": 1 / step, "x": 1})
    writer.close()
    assert stream.getvalue().splitlines() == [
        "step 1/10  loss 1.0000  1,234 tokens/s",
        "step 4/10  loss 0.2500  1,234 tokens/s  0:24 left",
        "step 10/10  loss 0.1000  1,234 tokens/s",
    ]


def test_evaluations_always_show():
    console, stream = _console()
    writer = writers.ConsoleWriter(100, console, clock=lambda: 0.0)
    writer.write(1, {"loss": 2.0})
    writer.write(2, {"eval/loss": 1.5, "eval/chrf": 30.25})
    writer.write(3, {"loss": 1.0})
    assert stream.getvalue().splitlines() == [
        "step 1/100  loss 2.0000",
        "step 2  eval/loss 1.5  eval/chrf 30.25",
    ]


def test_intervals_stand_behind_their_value():
    console, stream = _console()
    writer = writers.ConsoleWriter(100, console)
    limits = {"eval/chrf_low": 29.125, "eval/chrf_high": 31.0}
    writer.write(2, {"eval/chrf": 30.25, **limits, "eval/high": 1.0, "eval/x_low": 2.0})
    (line,) = stream.getvalue().splitlines()
    assert line == "step 2  eval/chrf 30.25 (29.12 to 31)  eval/high 1  eval/x_low 2"


def test_in_a_terminal_there_is_a_bar():
    console, stream = _console(force_terminal=True)
    writer = writers.ConsoleWriter(10, console)
    for step in range(1, 11):
        writer.write(step, {"loss": 0.5, "tokens_per_second": 5000.0})
    writer.write(10, {"eval/loss": 1.5})
    writer.close()
    text = stream.getvalue()
    assert "10/10" in text
    assert "loss 0.5000  5,000 tokens/s" in text
    assert "step 10  eval/loss 1.5" in text


def test_only_process_0_writes(tmp_path, monkeypatch):
    make = lambda: writers.MultiWriter([writers.JsonlWriter(tmp_path / "m.jsonl")])
    monkeypatch.setattr(writers.jax, "process_index", lambda: 1)
    other = writers.on_first_process(make)
    other.write(1, {"loss": 1.0})
    other.truncate_after(0)
    other.close()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(writers.jax, "process_index", lambda: 0)
    first = writers.on_first_process(make)
    first.write(1, {"loss": 1.0})
    first.write(2, {"loss": 1.0})
    first.truncate_after(1)
    first.close()
    assert len(writers.read_jsonl(tmp_path / "m.jsonl")) == 1
