"""The program: what it is told, and the commands of docs/serve.md as they stand there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from t5x_lite.serving import serve as program
from t5x_lite.serving.hosting import Host, buckets
from t5x_lite.serving.serve import open_all, parse_adapters, serve
from t5x_lite.types import InputError
from tests import folders, pages, xla
from tests.serving.common import OneDevice


def test_adapters_are_named():
    assert parse_adapters("") == {}
    assert parse_adapters("a=x/y, b = z") == {"a": "x/y", "b": "z"}
    for text in ("a", "a=", "=x"):
        with pytest.raises(InputError, match="expected NAME=FOLDER"):
            parse_adapters(text)
    with pytest.raises(InputError, match="two called 'a'"):
        parse_adapters("a=x,a=y")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_dir": "nowhere"}, "no such folder: 'nowhere'"),
        ({"adapters": "a=nowhere"}, "adapter 'a': no such folder: 'nowhere'"),
        ({"slots": 0}, "serve.slots=0 is too small"),
        ({"queue": -1}, "serve.queue=-1 is too small"),
        ({"max_tokens": 0}, "serve.max_tokens=0: expected at least 1"),
        ({"max_input_tokens": 30, "max_tokens": 30}, "serve.max_input_tokens=30 and max_tokens=30"),
    ],
)
def test_mistakes_are_one_message_before_anything_is_served(tmp_path, changes, message):
    arguments = {"model_dir": str(folders.hugging_face("gpt2", tmp_path)), "port": 0, **changes}
    with pytest.raises(InputError) as caught:
        serve(**arguments, partitioner=OneDevice())
    assert message in str(caught.value)


def test_an_address_that_is_taken_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"can't listen at .*serve.port={port}"):
            program._listen("127.0.0.1", port)
    with pytest.raises(InputError, match="port=70000"):
        program._listen("127.0.0.1", 70_000)


@pytest.mark.parametrize(
    ("given", "expected"),
    [((None, None), (12, 12)), ((20, None), (20, 4)), ((None, 4), (20, 4)), ((3, 3), (3, 3))],
)
def test_a_row_of_learned_positions_is_shared(tmp_path, given, expected):
    folder = folders.hugging_face("gpt2", tmp_path)  # has 24 of them
    models = open_all(str(folder), {}, None, OneDevice())
    host = Host("small", models, input_tokens=given[0], new_tokens=given[1])
    assert (host.input_tokens, host.new_tokens) == expected


def test_rows_are_padded_to_few_lengths():
    assert buckets(8) == (8,)
    assert buckets(16) == (16,)
    assert buckets(40) == (16, 32, 40)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="the page's command needs curl")
def test_the_commands_of_the_docs_run(tmp_path):
    (tmp_path / "scripts").symlink_to(pages.ROOT / "scripts")
    base = folders.hugging_face("peft/gpt2/base", tmp_path)
    for name in ("demo_gpt", "demo/pretrained"):
        shutil.copytree(base, tmp_path / "runs" / name)
    (tmp_path / "runs/demo/lora").symlink_to(folders.FIXTURES / "peft/gpt2/adapter")
    lines = "".join(pages.blocks("docs/serve.md")).replace("\\\n", "").splitlines()
    starts = [line for line in lines if line.startswith("python scripts/serve.py")]
    (curl,) = [line for line in lines if line.startswith("curl ")]
    assert len(starts) == 2
    env = {
        **os.environ,
        "PYTHONPATH": str(pages.ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla.flags(1),
    }
    for start in starts:
        command = [sys.executable, *start.split()[1:], "--port=0"]
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as server:
            try:
                said = server.stdout.readline()
                found = re.fullmatch(r"Serving \S+ at (http://\S+)/ \(Ctrl-C ends it\)\n", said)
                assert found, server.stderr.read()
                asked = curl.replace("http://127.0.0.1:8000", found[1])
                asked = asked.replace('"max_tokens": 16', '"max_tokens": 2')  # of a tiny model
                done = subprocess.run(
                    ["bash", "-c", asked], capture_output=True, text=True, check=True, timeout=120
                )
            finally:
                server.send_signal(signal.SIGINT)
            assert json.loads(done.stdout).keys() == {"text", "finished", "tokens"}
            assert server.wait(60) == 0
            assert server.stderr.read() == ""
