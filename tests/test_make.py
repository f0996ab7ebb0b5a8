"""The Makefile's targets, under GNU make and BSD make, in a fresh copy."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import HERE, SCRIPTS, SERVERS_DIR

LIMIT = 240  # seconds for one target, on a loaded machine
PROJECT = HERE.parent


@pytest.fixture(scope="module", params=["make", "bmake"])
def make(request):
    """The name of a make program, GNU's or BSD's."""
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture
def copy(tmp_path):
    """A copy of the project, in a folder with a space in its name."""
    folder = tmp_path / "a fresh copy"
    ignored = shutil.ignore_patterns("build", "__pycache__", ".git", ".pytest*")
    shutil.copytree(PROJECT, folder, ignore=ignored)
    for script in SCRIPTS.values():
        shutil.copy(SERVERS_DIR / script, folder)
    return folder


def run(folder, *command):
    """Run a command in a folder; return how it ended, and what it printed."""
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    # What an outer make has said must not steer this one.
    for name in "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES":
        env.pop(name, None)
    result = subprocess.run(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=LIMIT,
    )
    return result.returncode, result.stdout.decode()


def test_help(make, copy):
    """Without a target, make says what there is."""
    status, output = run(copy, make)
    assert status == 0, output
    targets = "demo demo-single demo-multi demo-busy demo-kqueue diff compare"
    for target in (targets + " trace scale bench syscalls pictures test clean").split():
        assert f"make {target}" in output


def test_demo_and_clean(make, copy):
    """`make demo` runs all four and leaves nothing that git would show."""
    if shutil.which("git"):
        for words in "init -q", "add -A":
            assert run(copy, "git", *words.split())[0] == 0
        before = run(copy, "git", "status", "--porcelain")
    status, output = run(copy, make, "demo", f"PYTHON={sys.executable}")
    assert status == 0, output
    places = [output.index(script) for script in SCRIPTS.values()]
    places.append(output.index("All 4 transcripts are the same"))
    places.append(output.index("time elapsed"))
    assert places == sorted(places), "the four, then the diff, then the table"
    assert len(list((copy / "build").glob("*.txt"))) == 4
    if shutil.which("git"):
        assert run(copy, "git", "status", "--porcelain") == before
    assert run(copy, make, "clean")[0] == 0
    assert not (copy / "build").exists()


def test_demo_of_one(copy, name):
    """Each demo-... target runs its server."""
    command = ["make", f"demo-{name}", f"PYTHON={sys.executable}"]
    status, output = run(copy, *command)
    assert status == 0 and output.startswith(SCRIPTS[name]), output


def test_diff(make, copy):
    """`make diff` runs what it needs, and fails on a difference."""
    if not shutil.which("diff"):
        pytest.skip("diff is not installed")
    command = [make, "diff", f"PYTHON={sys.executable}"]
    status, output = run(copy, *command)
    assert status == 0 and "No difference" in output, output
    transcript = copy / "build" / "3_busy_wait.txt"
    transcript.write_text(transcript.read_text() + "one line more\n")
    status, output = run(copy, *command)
    assert status != 0 and "one line more" in output, output


def test_make_test(make, copy):
    """`make test` makes a virtual environment and runs pytest in it."""
    status, output = run(copy, make, "-n", "test", "PYTHON=some-python")
    assert status == 0 and "some-python -m venv" in output
    assert "-m pytest" in output and "tests" in output


def test_a_user_without_a_home(copy, tmp_path):
    """Not root, a home that cannot be written, no locale, a plain pipe."""
    if os.name != "posix" or os.geteuid() != 0:
        user = []  # we are not root already
    elif shutil.which("setpriv"):
        user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    else:
        pytest.skip("to become another user takes setpriv")
    for folder in copy, *copy.parents:
        if folder == tmp_path.parent.parent.parent:
            break
        folder.chmod(0o755)
    clean = ["env", "-i", "HOME=/", "LC_ALL=C"]
    # A Python below root's home is not for other users; then the system's is.
    for python in sys.executable, "/usr/bin/python3":
        command = [*user, *clean, python]
        if run(copy, *command, "-c", "")[0] == 0:
            break
    else:
        pytest.skip("no Python here is for other users")
    script = SCRIPTS["kqueue"]
    status, output = run(copy, *command, "client.py", "--server", script)
    assert status == 0, output
    assert "time elapsed" in output
