"""The Makefile, under GNU make and BSD make, in anybody's surroundings."""

import os
import shutil
import sys

import pytest
from conftest import HERE, SCRIPTS, needs, run, together

PROJECT = HERE.parent
TOP = {*SCRIPTS.values(), "client.py", "Makefile", "README.md", "tests"}
ONE = "SERVER=4_kqueue_loop.py", "CONNECTIONS=2", "REQUESTS=1", "THINK=0"
gnu = pytest.mark.parametrize("make", ["make"], indirect=True)


def write_program(path, text):
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project, and a Python, in folders with odd names."""
    name = "it's a $copy, \u00e4h"
    name = name.encode(sys.getfilesystemencoding(), "ignore")
    folder = tmp_path_factory.mktemp("a fresh") / os.fsdecode(name)
    ignored = shutil.ignore_patterns("build", "__pycache__", ".git")
    shutil.copytree(PROJECT, folder, ignore=ignored)
    (folder / "5_mine.py").write_text("raise SystemExit('not this one')")
    write_program(folder.parent / "a python", f'exec "{sys.executable}" "$@"')
    write_program(folder / "a fake", FAKE)
    return folder


@pytest.fixture(params=["make", "bmake"])
def make(request, copy, monkeypatch):
    """Run make, GNU's or BSD's, in the copy of the project."""
    needs(request.param)
    for name in "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES":
        monkeypatch.delenv(name, raising=False)  # those of `make test`
    line = request.param, f"PYTHON={copy.parent / 'a python'}"
    return lambda *words, **env: run(*line, *words, cwd=copy, **env)


FIRST, *OTHERS = [script[:-3] for script in SCRIPTS.values()]
RUNS = {  # what make -n has to say of each
    "demo": [*SCRIPTS.values(), "client.py --connections 8 --requests 4"],
    "trace": ["tests/bench/trace.py", "--scene thinking", *SCRIPTS.values()],
    "diff": [f"diff build/{FIRST}.txt build/{name}.txt" for name in OTHERS],
    "pictures": [f"build/{name}.svg" for name in ("demo", "trace", "scale")],
    "test": ["test test = test ||", "tests/test_faults.py", "-m venv"],
    "test-all": ["test test-all = test ||", "SLOW=1", "unset", "PIP_USER=0"],
    "clean": ["rm -rf build"],
}
for name in "compare", "scale", "bench", "syscalls":
    RUNS[name] = [f"tests/bench/{name}.py"]
for name, script in SCRIPTS.items():
    RUNS[f"demo-{name}"] = [f"--server {script}"]


def test_help(make):
    """Without a target, make says what there is; and it knows all that."""
    status, output, _ = make()
    assert status == 0 and all(f"make {name}" in output for name in RUNS)
    tried = together(lambda name: make("-n", name), *RUNS)
    for target, (status, output, _) in zip(RUNS, tried):
        output = " ".join(output.split())
        assert status == 0, target
        assert [text for text in RUNS[target] if text not in output] == []


def test_demo(make):
    """All four by default, or SERVER=; as many clients as are wanted."""
    options = "CONNECTIONS=3", "REQUESTS=2", "THINK=0.01", "TIMEOUT=60"
    status, output, err = make("demo", *options)
    assert status == 0 and "All 4 transcripts are the same" in output, err
    assert output.startswith("3 clients, 2 requests each, 0.01 s apart")
    status, output, err = make("demo", "SERVER=5_mine.py")
    assert status and "5_mine.py did not start" in err
    assert make("trace", *ONE)[1].count("4_kqueue_loop.py: ") == 1


@gnu
def test_diff_and_clean(make, copy):
    """`make diff` runs what it needs, and fails on a difference."""
    needs("diff")
    status, output, err = make("diff")
    assert status == 0 and "No difference" in output and "INCR" in output, err
    with open(copy / "build" / "3_busy_wait.txt", "a") as transcript:
        transcript.write("one line more\n")
    status, output, _ = make("diff")
    assert status != 0 and "one line more" in output, output
    assert make("clean")[0] == 0
    assert not (copy / "build").exists()


SETTINGS = """PYTHONOPTIMIZE=2 PYTHONSAFEPATH=1 PYTHONIOENCODING=ascii
PYTHONWARNINGS=error PYTHONINSPECT=1 PYTHONUTF8=0 PYTHONBREAKPOINT=0
PYTHONDEVMODE=1 PYTHONSTARTUP=/none PYTHONPATH=/none PYTHON_COLORS=1
PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PYTHONHASHSEED=0 LC_ALL=C
PYTHONASYNCIODEBUG=1 PYTHONTRACEMALLOC=5 PYTHONMALLOC=debug FORCE_COLOR=1
PYTHONFAULTHANDLER=1 PYTHONINTMAXSTRDIGITS=640 PYTHONNOUSERSITE=1 LANG=C
PYTHONCOERCECLOCALE=0 PYTHONNODEBUGRANGES=1 TERM=dumb COLUMNS=20 LINES=2
NO_COLOR=1 LOGNAME=somebody-with-a-long-name CDPATH=/tmp"""


@gnu
@pytest.mark.parametrize("target", ["demo", "trace"])
def test_settings(make, target):
    """No setting of Python, of the terminal or of a person disturbs it.

    All of a line are set at once.
    """
    lines = [line.split() for line in SETTINGS.splitlines()]
    settings = [dict(word.split("=") for word in line) for line in lines]
    results = together(lambda env: make(target, *ONE, **env), *settings)
    for line, (status, output, err) in zip(lines, results):
        assert status == 0 and "4_kqueue_loop.py" in output, (line, err)
        assert "\x1b" not in output, line


FAKE = """# Says what it is asked, and knows pytest when it has installed it.
case "$*" in
*platform*) echo fake-1.0 ;;
"-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
*"import pytest"*) test -f build/there ;;
*"pip install"*) env | grep ^PIP_USER; test -n "$FAILS" || : >build/there ;;
*) echo "asked: $* in ${PYTEST_ADDOPTS-nothing}, ${PYTHONOPTIMIZE-nothing}" ;;
esac
"""


@gnu
def test_settings_of_pip_and_pytest(make):
    """They are kept out; an install that failed is tried again."""
    words = "test", "PYTHON=./a fake"
    env = {"PYTEST_ADDOPTS": "--cov", "PYTHONOPTIMIZE": "2", "PIP_USER": "1"}
    status, output, err = make(*words, **env, FAILS="1")
    assert status and "could not be installed" in err and "asked" not in output
    status, output, err = make(*words, **env)
    assert status == 0 and "PIP_USER=0" in output, err
    asked = [line for line in output.splitlines() if line[:5] == "asked"]
    assert len(asked) == 2
    for line in asked:
        assert line.endswith("in nothing, nothing")
        assert "-c /dev/null --rootdir=. --confcutdir=tests" in line


def test_checkout(tmp_path):
    """Nothing else stands at the top; LF even where git is to write CR LF."""
    needs("git")
    words = "-c", "core.autocrlf=true", "checkout-index", "-a"
    status, _, _ = run("git", *words, f"--prefix={tmp_path}/", cwd=PROJECT)
    names = {path.name for path in tmp_path.iterdir()}
    if status or not names:
        pytest.skip("this is no checkout")
    assert {name for name in names if name[0] != "."} == TOP
    assert "build/\n" in (PROJECT / ".gitignore").read_text()
    for name in "Makefile", "client.py":
        assert b"\r\n" not in (tmp_path / name).read_bytes()
