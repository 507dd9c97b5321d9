"""Programs keep what they compile: where, unless told otherwise, and without trusting it."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from t5x_lite import compilation

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import json
import jax, jax.numpy as jnp
from t5x_lite import configure

read = []
jax.monitoring.register_event_listener(lambda name, **_: read.append(name.rpartition("/")[2]))

def say_where():
    value = jax.jit(lambda x: jnp.sum(jnp.sin(x) @ x.T))(jnp.ones((3, 4)))
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size",
             "jax_persistent_cache_min_compile_time_secs")
    print(json.dumps({"value": float(value), "hits": read.count("cache_hits"),
                      "config": {name: getattr(jax.config, name) for name in names}}))

configure.main(say_where)
"""


def start(folder, **environment):
    """What a program of `PROGRAM` says, in a process whose cache folder is `folder`."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=ours
        | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder)}
        | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_start_reads_what_the_first_compiled(tmp_path):
    all_of_it = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    first = start(tmp_path, **all_of_it)
    folder = Path(first["config"]["jax_compilation_cache_dir"])
    assert folder.relative_to(tmp_path).parts[:2] == ("t5x_lite", "xla")
    assert first["hits"] == 0
    entries = sorted(folder.glob("*-cache"))
    assert entries
    second = start(tmp_path, **all_of_it)
    assert second["hits"] == len(entries)
    assert second["value"] == first["value"]

    # What can't be read is compiled anew.
    entries[0].write_bytes(b"")
    for entry in entries[1:]:
        entry.write_bytes(entry.read_bytes()[:40])
    third = start(tmp_path, **all_of_it)
    assert third["hits"] < len(entries)
    assert third["value"] == first["value"]


def test_the_environment_decides(tmp_path):
    default = start(tmp_path / "a")["config"]
    assert default["jax_compilation_cache_max_size"] == compilation.MAX_BYTES
    assert default["jax_persistent_cache_min_compile_time_secs"] == compilation.LEAST_SECONDS
    named = start(tmp_path / "b", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))["config"]
    assert named["jax_compilation_cache_dir"] == str(tmp_path / "mine")
    assert named["jax_compilation_cache_max_size"] == -1
    off = start(tmp_path / "c", JAX_ENABLE_COMPILATION_CACHE="false")["config"]
    assert off["jax_compilation_cache_dir"] is None
    assert not (tmp_path / "b").exists()
    assert not (tmp_path / "c").exists()


def test_a_folder_that_cannot_be_made_is_gone_without(tmp_path):
    (tmp_path / "file").write_text("")
    found = start(tmp_path / "file")
    assert found["config"]["jax_compilation_cache_dir"] is None


def test_hosts_with_other_processors_share_nothing(monkeypatch):
    before = compilation.folder()
    assert compilation.folder() == before
    monkeypatch.setattr(compilation, "_abilities", lambda: "flags: sse2")
    assert compilation.folder().parent == before.parent
    assert compilation.folder() != before


@pytest.mark.parametrize("value", ["", "relative/folder", None])
def test_the_folder_is_the_users(value, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    expected = Path("~/.cache/t5x_lite/xla").expanduser()
    assert compilation.folder().parent == expected


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc's"
)
def test_what_was_freed_between_pieces_in_use_is_given_back():
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]

    def resident():
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    size = 100 * 2**10  # below what malloc maps by itself
    pieces = [libc.malloc(size) for _ in range(2048)]
    for piece in pieces:
        ctypes.memset(piece, 1, size)
    for piece in pieces[::2]:
        libc.free(piece)
    before = resident()
    compilation.give_back()
    assert before - resident() > 800 * size
    for piece in pieces[1::2]:
        libc.free(piece)
