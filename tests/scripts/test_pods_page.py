"""docs/pods.md and scripts/tpu_vm.sh: its commands, and what they would do on two hosts."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests import pages
from tests.pages import ROOT
from tests.processes import free_port

SCRIPT = ROOT / "scripts" / "tpu_vm.sh"
SLICE = ("--name=pod", "--zone=z")

# Stands in for gcloud: a host is a folder, and `ssh` a shell there.
GCLOUD = """#!/usr/bin/env bash
set -euo pipefail
[[ "$1 $2 $3" == "compute tpus tpu-vm" ]]
verb=$4; shift 4
for argument in "$@"; do
  case $argument in
    --worker=all) workers=(0 1) ;;
    --worker=*) workers=("${argument#*=}") ;;
    --command=*) command=${argument#*=} ;;
  esac
done
for worker in "${workers[@]}"; do
  case $verb in
    scp) cp "$1" "$HOSTS/$worker/${2#*:}" ;;
    ssh) (cd "$HOSTS/$worker" && bash -c "$command") ;;
  esac
done
"""
# Stand in for what installs.
MAKE = """#!/usr/bin/env bash
mkdir -p .venv/bin
printf '#!/bin/sh\\nexec "%s" "$@"\\n' "$PYTHON" >.venv/bin/python
printf '#!/bin/sh\\necho "$@" >installed\\n' >.venv/bin/pip
chmod +x .venv/bin/*
echo "$@" >made
"""


def tpu_vm(*arguments, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def printed(*arguments):
    """The words of the commands that a dry run prints."""
    done = tpu_vm(*arguments, *SLICE, "--dry_run")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_a_dry_run_prints_gclouds_commands():
    start = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert printed("create", "--type=v5litepod-32", "--version=v2-alpha-tpuv5-lite") == [
        [
            *(*start, "create", "pod", "--accelerator-type=v5litepod-32"),
            *("--version=v2-alpha-tpuv5-lite", "--zone=z"),
        ]
    ]
    copy, install = printed("copy")
    assert copy[4:] == ["scp", "t5x_lite.tar.gz", "pod:t5x_lite.tar.gz", "--worker=all", "--zone=z"]
    assert install[4:7] == ["ssh", "pod", "--worker=all"]
    assert "make install PYTHON=python3.11" in install[7]
    (tail,) = printed("tail", "--worker=3")
    assert tail[4:7] == ["ssh", "pod", "--worker=3"]
    assert tail[7].endswith("tail -n 50 -F logs/log")
    (stop,) = printed("stop")
    assert stop[4:7] == ["ssh", "pod", "--worker=all"]
    assert printed("delete") == [[*start, "delete", "pod", "--quiet", "--zone=z"]]
    done = tpu_vm("delete", *SLICE, DRY_RUN="1", PATH=os.environ["PATH"])
    assert shlex.split(done.stdout) == printed("delete")[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "Usage:"),
        (("destroy",), "error: 'destroy' is none of create, copy, run"),
        (("stop", "--name=pod"), "error: stop needs --name=NAME and --zone=ZONE"),
        (("create", *SLICE), "error: create needs --type=TYPE"),
        (("run", *SLICE), "error: run needs a program"),
        (("run", *SLICE, "scripts/train.py"), "error: unknown argument 'scripts/train.py'"),
        (("stop", *SLICE, "--", "x"), "error: stop takes no program"),
    ],
)
def test_mistakes_are_one_line(arguments, expected):
    done = tpu_vm(*arguments, DRY_RUN="1")
    assert done.returncode == 2
    assert done.stderr.startswith(expected)
    assert done.stdout == ""


def test_help_is_no_mistake():
    for flags in (("--help",), ("run", "--help")):
        done = tpu_vm(*flags)
        assert done.returncode == 0
        assert "run ... -- scripts/train.py" in done.stdout


def test_a_program_is_copied_started_and_stopped_on_every_host(tmp_path):
    tools, hosts = tmp_path / "tools", [tmp_path / "hosts" / name for name in "01"]
    tools.mkdir()
    for host in hosts:
        host.mkdir(parents=True)
    for name, text in {"gcloud": GCLOUD, "make": MAKE, "python3.11": "", "sudo": ""}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "HOSTS": str(tmp_path / "hosts"),
        "PYTHON": sys.executable,
    }

    def succeed(*arguments):
        done = tpu_vm(*arguments, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    succeed("copy", *SLICE)
    program = "import sys, time; print(sys.argv[1:], flush=True); time.sleep(600)"
    run = ("run", *SLICE, "--", "-c", program, "--gin.PREFIX='it\"s: '", "$HOME")
    succeed(*run)
    try:
        for host in hosts:
            folder = host / "t5x_lite"
            assert (folder / "scripts" / "train.py").exists()
            assert (folder / "made").read_text() == "install PYTHON=python3.11\n"
            assert (folder / "installed").read_text() == "install --quiet jax[tpu]\n"
            log, deadline = folder / "logs" / "log", time.monotonic() + 30
            while not log.read_text() and time.monotonic() < deadline:
                time.sleep(0.1)
            assert log.read_text() == str(["--gin.PREFIX='it\"s: '", "$HOME"]) + "\n"
        again = tpu_vm(*run, **environment)
        assert again.returncode == 1
        assert "a program is running here: stop it first" in again.stderr
        pids = [int((host / "t5x_lite" / "logs" / "pid").read_text()) for host in hosts]
    finally:
        succeed("stop", *SLICE)
    for pid in pids:
        deadline = time.monotonic() + 30
        while is_running(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_running(pid)
    succeed("stop", *SLICE)  # with nothing to stop


def is_running(pid: int) -> bool:
    """Whether there is such a process; a dead one that nobody has waited for is none."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_the_pages_job_runs_a_program_of_ours(tmp_path):
    (text,) = pages.blocks("docs/pods.md", "yaml")
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    chips = spec["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert spec["parallelism"] == spec["completions"]
    assert chips == int(rows) * int(columns)
    (tmp_path / "my_text").mkdir()
    for name in ("train", "validation"):
        (tmp_path / "my_text" / f"{name}.txt").write_text("a line\n")
    vocabulary = ["--gin.VOCABULARY=@ByteVocabulary()", "--gin.VOCABULARY_FILE=x"]
    command = [*container["command"], *vocabulary, "--gin.ModelConfig.vocab_size=384", "--dry_run"]
    shown = pages.run(shlex.join(command), tmp_path)
    assert f"Partitioner.fsdp = {chips}" in shown
    assert "/shared/runs/my_text" in shown


@pytest.mark.slow
def test_the_pages_commands_run(tmp_path):
    two, slices, several = pages.blocks("docs/pods.md")
    assert "127.0.0.1:8482" in two
    mine = pages.blocks("README.md")[2]  # makes my_text
    assert "my_text/train.txt" in mine
    commands = two.replace(":8482", f":{free_port()}")
    pages.run(f"{mine}\n{commands}\n{several}", tmp_path, pages.train_for(2))
    for run in ("my_text_gpt", "two_slices"):
        assert (tmp_path / "runs" / run / "checkpoints" / "2").is_dir()
    shown = pages.run(f"export DRY_RUN=1\n{slices}", tmp_path)
    assert [line.split()[4] for line in shown.splitlines()] == [
        *("create", "scp", "ssh", "ssh", "ssh", "ssh", "delete")
    ]
