"""The Makefile's targets, in a fresh copy, under GNU make and BSD make."""

import shutil
import sys

import pytest
from conftest import HERE, SCRIPTS, needs, run, together

PYTHON = f"PYTHON={sys.executable}"


@pytest.fixture(params=["make", "bmake"])
def make(request, copy, monkeypatch):
    """Run make, GNU's or BSD's, in the copy of the project."""
    needs(request.param)
    for name in "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES":
        monkeypatch.delenv(name, raising=False)  # those of `make test`
    return lambda *words: run(request.param, *words, PYTHON, cwd=copy)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("a fresh") / "a copy"
    ignored = shutil.ignore_patterns("build", "__pycache__", ".*")
    shutil.copytree(HERE.parent, folder, ignore=ignored)
    return folder


TOOLS = "compare", "scale", "bench", "syscalls"
FOUR = *SCRIPTS.values(), "--timeout 30"
FIRST, *OTHERS = [script[:-3] for script in SCRIPTS.values()]
RUNS = {  # what make -n has to say of each
    "demo": [*FOUR, "client.py --connections 8 --requests 4 --think 0.05"],
    "trace": ["tests/bench/trace.py", "--scene thinking", *FOUR[4:]],
    "diff": [f"diff build/{FIRST}.txt build/{name}.txt" for name in OTHERS],
    "pictures": [f"build/{name}.svg" for name in ("demo", "trace", "scale")],
    "test": ["test test = test ||", "env SLOW=1", "tests/test_faults.py"],
    "test-all": ["test test-all = test ||", f"{sys.executable} -m venv"],
    **{name: [f"tests/bench/{name}.py"] for name in TOOLS},
    **{f"demo-{name}": [f"--server {SCRIPTS[name]}"] for name in SCRIPTS},
    "clean": ["rm -rf build"],
}


def test_help(make):
    """Without a target, make says what there is; and it knows all that."""
    status, output, _ = make()
    assert status == 0 and all(f"make {name}" in output for name in RUNS)
    tried = together(lambda name: make("-n", name), *RUNS)
    assert [status for status, _, _ in tried] == [0] * len(RUNS)
    for (target, texts), (_, output, _) in zip(RUNS.items(), tried):
        output = " ".join(output.split())
        assert [text for text in texts if text not in output] == [], target


def test_demo(make):
    """`make demo` runs all four, with as many clients as one wants."""
    options = "CONNECTIONS=3", "REQUESTS=2", "THINK=0.01", "TIMEOUT=60"
    status, output, err = make("demo", *options)
    assert status == 0 and "All 4 transcripts are the same" in output, err
    assert output.startswith("3 clients, 2 requests each, 0.01 s apart")


@pytest.mark.parametrize("make", ["make"], indirect=True)
def test_diff_and_clean(make, copy):
    """`make diff` runs what it needs, and fails on a difference."""
    needs("diff")
    status, output, err = make("diff")
    assert status == 0 and "No difference" in output and "INCR" in output, err
    transcript = copy / "build" / "3_busy_wait.txt"
    transcript.write_text(transcript.read_text() + "one line more\n")
    status, output, _ = make("diff")
    assert status != 0 and "one line more" in output, output
    assert make("clean")[0] == 0
    assert not (copy / "build").exists()
