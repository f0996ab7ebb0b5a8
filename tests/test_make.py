"""The Makefile's targets, in a fresh copy, under GNU make and BSD make."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 120  # seconds for one target, on a loaded machine
PROJECT = Path(__file__).resolve().parents[1]
PYTHON = f"PYTHON={sys.executable}"


@pytest.fixture(params=["make", "bmake"])
def make(request):
    """The name of a make program, GNU's or BSD's."""
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("a fresh") / "a copy"
    ignored = shutil.ignore_patterns("build", "__pycache__", ".git", ".pytest*")
    shutil.copytree(PROJECT, folder, ignore=ignored)
    return folder


def run(folder, *command):
    """Run a command in a folder; return how it ended, and what it printed."""
    outer = "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"
    env = {name: os.environ[name] for name in os.environ if name not in outer}
    result = subprocess.run(
        command,
        cwd=folder,
        env={**env, "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=LIMIT,
    )
    return result.returncode, result.stdout


def test_help(make, copy):
    """Without a target, make says what there is; and it knows all that."""
    status, output = run(copy, make)
    assert status == 0, output
    targets = "demo demo-single demo-multi demo-busy demo-kqueue diff compare"
    targets += " trace scale bench syscalls pictures test test-all clean"
    for target in targets.split():
        assert f"make {target}" in output
        assert run(copy, make, "-n", target)[0] == 0


def test_demo(make, copy):
    """`make demo` runs all four, with as many clients as one wants."""
    options = "CONNECTIONS=3", "REQUESTS=2", "THINK=0.01", "TIMEOUT=60"
    status, output = run(copy, make, "demo", PYTHON, *options)
    assert status == 0 and "All 4 transcripts are the same" in output, output
    assert output.startswith("3 clients, 2 requests each, 0.01 s apart")


def test_diff_and_clean(copy):
    """`make diff` runs what it needs, and fails on a difference."""
    if not shutil.which("diff"):
        pytest.skip("diff is not installed")
    status, output = run(copy, "make", "diff", PYTHON)
    assert status == 0 and "No difference" in output and "INCR" in output
    transcript = copy / "build" / "3_busy_wait.txt"
    transcript.write_text(transcript.read_text() + "one line more\n")
    status, output = run(copy, "make", "diff", PYTHON)
    assert status != 0 and "one line more" in output, output
    assert run(copy, "make", "clean")[0] == 0
    assert not (copy / "build").exists()


def test_make_test(make, copy):
    """`make test` makes a virtual environment and runs pytest in it."""
    status, output = run(copy, make, "-n", "test", "PYTHON=some-python")
    assert status == 0 and "some-python -m venv" in output
    assert "-m pytest" in output and "tests" in output
