"""What compiles in a thread of its own: with whose settings, and what becomes of it at the end."""

from __future__ import annotations

import subprocess
import sys
import threading

import jax
import pytest

from t5x_lite import aside


def test_a_thread_of_its_own_compiles_unless_the_callers_settings_are_the_threads_own():
    assert aside.start(threading.get_ident).result() != threading.get_ident()
    with jax.default_matmul_precision("highest"):
        assert aside.start(threading.get_ident).result() == threading.get_ident()


FAILS = """
import time
from t5x_lite import aside, configure
from t5x_lite.types import InputError

def toy():
    aside.start(time.sleep, 600)
    raise {error}

configure.main(toy)
"""


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        ("InputError('no weights')", 2, "error: no weights"),
        ("KeyboardInterrupt", 130, "interrupted; "),
        ("ZeroDivisionError('unforeseen')", 1, "ZeroDivisionError: unforeseen"),
    ],
)
def test_a_program_that_failed_does_not_stay_for_its_compiler(error, code, says):
    done = subprocess.run(
        [sys.executable, "-c", FAILS.format(error=error)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code
    assert says in done.stderr
