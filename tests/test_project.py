"""The project as a whole: README, clients of other people, tools, Makefile."""

import os
import re
import shutil
import sys
import textwrap
from xml.etree import ElementTree

import pytest
from conftest import (
    HERE, MANY, PROC, SCRIPTS, SERVERS_DIR, bulk, needs, run, text_of,
    together,
)  # fmt: skip

PROJECT = HERE.parent
PAGES = PROJECT / "README.md", PROJECT / ".github" / "LECTURE.md"
README, LECTURE = (page.read_text(encoding="utf-8") for page in PAGES)
SOURCES = [(PROJECT / script).read_text() for script in SCRIPTS.values()]


def test_what_stands_at_the_top(tmp_path):
    """Short files, and no others; LF even where git is to write CR LF."""
    assert len(README.splitlines()) <= 320
    assert len((PROJECT / "client.py").read_text().splitlines()) <= 350
    assert "build/\n" in (PROJECT / ".gitignore").read_text()
    needs("git")
    words = "-c", "core.autocrlf=true", "checkout-index", "-a"
    status, _, _ = run("git", *words, f"--prefix={tmp_path}/", cwd=PROJECT)
    names = {path.name for path in tmp_path.glob("[!.]*")}
    if status or not names:
        pytest.skip("this is no checkout")
    others = {"client.py", "Makefile", "README.md", "tests"}
    assert names == {*SCRIPTS.values(), *others}
    for name in "Makefile", "client.py":
        assert b"\r\n" not in (tmp_path / name).read_bytes()


def blocks(language, word=""):
    """Return the README's blocks in a language, "" for those without."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    return [text for name, text in found if name == language and word in text]


def test_code_is_the_code():
    """Python and small pictures stand in a server; the diff is the real one.

    It is shown with its hunk headers, but without the texts at the top.
    """
    pieces = blocks("python")
    pieces += [block for block in blocks("") if "--" in block[:400]]
    assert len(pieces) == 8  # a picture of each; two, none, three and one
    for piece in pieces:
        indented = [textwrap.indent(piece, " " * n) for n in range(0, 24, 4)]
        assert any(text in source for text in indented for source in SOURCES)
    scripts = SCRIPTS["single"], SCRIPTS["multi"]
    hunks = re.split(r"(?m)^(?=\d)", run("diff", *scripts, cwd=PROJECT)[1])
    top = SOURCES[0].splitlines().index("import argparse")
    rest = [hunk for hunk in hunks[1:] if int(re.match(r"\d+", hunk)[0]) > top]
    assert blocks("diff") == ["".join(rest)]


def test_names():
    """A server's options, with their defaults; make's targets; all files."""
    shown = dict(re.findall(r"`(--[a-z-]+) ([0-9.]+)`", README))
    real = re.findall(r'"(--[a-z-]+)".*?default="?([0-9.]+)', SOURCES[0])
    assert shown == dict(real) == {"--host": "127.0.0.1", "--port": "6380"}
    named = set(re.findall(r"`?make ([a-z-]+)", README + LECTURE))
    prose = {"one", "it", "a", "them", "the", "sure", "an", "no"}
    assert {"demo", "trace", "compare", "test"} <= named <= RUNS.keys() | prose
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
            assert "://" in link or (page.parent / link).exists(), link


def test_answers_typed_by_hand(server):
    """What one types into nc is answered as shown."""
    (session,) = blocks("", "$ nc")
    _, *parts = re.split(r"(?m)^([A-Z]{3}.*\n)", session)
    answers = server.ask("".join(parts[::2]).encode()).decode()
    assert answers.replace("\r\n", "\n") == "".join(parts[1::2])


TYPED = b'SET k "a b"\nGET k\nGET nothing\nINCRBY n 42\nINFO\nQUIT\n'
SHOWN = r"OK\na b\n\n42\n.*role:master.*"
BY_HAND = b"SET a 1\nINCR a\nGET a\nnonsense\nQUIT\n"
BENCHMARK = "redis-benchmark -h {} -p {} -c {} -n 1600 -t ping,set,get,incr -q"
FIVE = r"(.*?requests per second){5}.*"
CLIENTS = [
    ("redis-cli -2 -h {} -p {}", TYPED, SHOWN),
    ("redis-cli -3 -h {} -p {}", TYPED, SHOWN),
    ("nc {} {}", BY_HAND, r"\+OK\r\n:2\r\n\$1\r\n2\r\n-ERR .*\+OK\r\n"),
    (BENCHMARK, b"", FIVE),
    (BENCHMARK + " -P 16", b"", FIVE),
]


@pytest.mark.parametrize("line, data, shown", CLIENTS)
def test_client(server, line, data, shown):
    """It talks to a server, and comes to its end."""
    clients = 20 if server.name in MANY else 1
    words = line.format(server.host, server.port, clients).split()
    needs(words[0])
    status, out, err = run(*words, data=data)
    assert status == 0 and re.fullmatch(shown, out, re.S), out + err
    if words[0] == "redis-benchmark":
        assert server.ask(b"GET counter:__rand_int__\r\n") == bulk(b"1600")


SINGLE, _, _, KQUEUE = [SERVERS_DIR / script for script in SCRIPTS.values()]
OPTIONS = {
    "compare, single": [f"--server={SINGLE}"],
    "compare, kqueue": [f"--server={KQUEUE}"],
    "pictures": ["--svg", "pictures.svg"],
    "scale": "--most 20 --seconds 0.1 --svg scale.svg".split(),
    "bench": "--rounds 1 --requests 300 --only k --only P".split(),
    "syscalls": [],
    "measure": [KQUEUE, 20],
    "late": [KQUEUE],
    "late, wrong": ["never_waits.py"],
}


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """All tools, run at the same time: they spend most of it waiting."""
    folder = tmp_path_factory.mktemp("tools")
    text = text_of("kqueue").replace("wants != watched and", "False and")
    (folder / "never_waits.py").write_text(text)
    # Without what is installed, and with no more files than on a Mac.
    shell = "sh", "-c", 'ulimit -Sn 256; exec "$0" -S "$@"', sys.executable

    def run_tool(tool):
        path = HERE / "bench" / f"{tool.partition(',')[0]}.py"
        return run(*shell, path, *OPTIONS[tool], cwd=folder)

    ended = zip(OPTIONS, together(run_tool, *OPTIONS))
    return {"folder": folder, **dict(ended)}


def output_of(result):
    """Return what a tool has printed: in 79 columns, and no complaint."""
    status, out, err = result
    if status and ("strace" in err or "Linux" in err):
        pytest.skip(err)  # it is missing, or may not trace here
    assert (status, err) == (0, "")
    assert not re.search(".{80}", out)
    return out


def test_compare(tools):
    """Who is held up and who is not; what the figures of a crowd count."""
    each = r"\S+ KiB" if sys.implementation.name == "pypy" else r"[01]\.\d KiB"
    columns = [output_of(tools[f"compare, {n}"]) for n in ("single", "kqueue")]
    for row, *cells in [
        ("time elapsed", r"\d\.\d\d s", r"\d\.\d\d s"),
        ("first reply, worst", r"\d+ ms", r"\d+ ms"),
        ("another's PING", "must wait", r"\d+ ms"),
        ("another's PING then", "must wait", r"\d{3} ms"),
        ("CPU in use", r"\d%", r"\d%"),
        ("threads meanwhile", "1", "2"),
        ("memory for each", "", each if PROC else ".*"),
        ("all answered after", "only 1 of 500", r"\d+ ms"),
        ("context switches", r"[\d,]+", r"[\d,]+"),
        ("wake-ups for PINGs", "", r"\d+"),
        ("events per wake-up", "", r"[\d.]+"),
    ]:
        for out, cell in zip(columns, cells):
            shown = "".join(re.findall(f"^  {row}  +(.*)$", out, re.M))
            assert re.fullmatch(cell, shown), (row, out)
    assert "\n  The PING came 50 ms after the handler began" in out
    assert "\nChoose  1 single" in out and "\n        4 kqueue" in out
    # The README's table has these rows, and these sentences.
    (table,) = blocks("", "1 single")
    _, *lines = filter(None, map(str.strip, table.splitlines()))
    assert len(lines) > 19
    for line in lines:
        assert re.split("  +", line)[0] in "".join(columns)


def test_pictures(tools):
    """The pictures are XML, their text is text, and they hold no script."""
    texts, bars = [], []
    for tool in "pictures", "scale":
        out = output_of(tools[tool])
        assert f"{tool}.svg" in out
        tree = ElementTree.parse(tools["folder"] / f"{tool}.svg")
        assert not tree.findall(".//{*}script")
        texts.append([text.text for text in tree.findall(".//{*}text")])
        bars += [bar.get("class") for bar in tree.findall(".//{*}rect")]
    assert f"{SCRIPTS['kqueue']}: " in " ".join(texts[0])
    assert {"4 kqueue loop", "connections"} <= set(texts[1])
    # Of each client of each server, and one more in the legend.
    assert bars.count("talks") == 4 * 8 + 1
    assert bars.count("waits") == 4 * 8 * 4 + 1
    assert "requests/s, all active" in out and "4 kqueue loop" in out


SPEED = r"idle: #% of a core\na PING takes # us\nthe server's CPU .*: # us"
ROWS = [  # of a tool's output, and how many there are
    ("bench", "4 kqueue loop .*", 2),
    ("bench", r"4 kqueue loop .* 1\.00.*", 2),  # it is compared with itself
    ("bench", r"asyncio.Protocol .*\d", 2),
    # Each pattern's fingerprint: what only it calls, what it never does.
    ("syscalls", "send +20 +20 +20 +20", 1),
    ("syscalls", r"clone +- +4 +- +\S+", 1),
    ("syscalls", r"epoll_wait +- +- +- +[\d,]+", 1),
    ("syscalls", r"recv .*\n +EAGAIN +- +- +[\d,]+ +-", 1),
    ("late", "0 bytes of the replies are missing", 1),
    ("late, wrong", r"[1-9]\d+ bytes of the replies are missing", 1),
    ("measure", SPEED.replace("#", r"[\d.]+"), 1),
]


@pytest.mark.parametrize("tool, row, count", ROWS)
def test_other_tools(tools, tool, row, count):
    """Their figures have their names; late.py finds who never waits."""
    if tool == "bench":
        needs("redis-benchmark")
    out = output_of(tools[tool])
    assert len(re.findall(f"^{row}$", out, re.M)) == count, out


ONE = "SERVER=4_kqueue_loop.py", "CONNECTIONS=2", "REQUESTS=1", "THINK=0"
gnu = pytest.mark.parametrize("make", ["make"], indirect=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project, and a Python, in folders with odd names."""
    folder = tmp_path_factory.mktemp("a fresh")
    folder /= os.fsdecode("it's a $copy, \u00e4h".encode())
    ignored = shutil.ignore_patterns("build", "__pycache__", ".git")
    shutil.copytree(PROJECT, folder, ignore=ignored)
    (folder.parent / "a python").symlink_to(sys.executable)
    return folder


@pytest.fixture(params=["make", "bmake"])
def make(request, copy):
    """Run make, GNU's or BSD's, in the copy; `env` are settings."""
    needs(request.param)
    line = request.param, f"PYTHON={copy.parent / 'a python'}"
    return lambda *words, env=(): run("env", *env, *line, *words, cwd=copy)


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


def test_demo(make, copy):
    """All four by default, or SERVER=; as many clients as are wanted."""
    options = "CONNECTIONS=3", "REQUESTS=2", "THINK=0.01", "TIMEOUT=60"
    status, output, err = make("demo", *options)
    assert status == 0 and "All 4 transcripts are the same" in output, err
    assert output.startswith("3 clients, 2 requests each, 0.01 s apart")
    (copy / "5_mine.py").write_text("raise SystemExit('not this one')")
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
def test_settings(make):
    """Settings of Python, terminal, person do not matter: a line at once."""
    lines = [line.split() for line in SETTINGS.splitlines()]
    ran = together(lambda env: make("demo", "trace", *ONE, env=env), *lines)
    for line, (status, output, err) in zip(lines, ran):
        assert status == 0, (line, err)
        assert output.count("\n4_kqueue_loop.py: ") == 2, (line, output)
        assert "\x1b" not in output, line


FAKE = """#!/bin/sh
# Says what it is asked, and knows pytest when it has installed it.
case "$*" in
*platform*) echo fake-1.0 ;;
"-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
*"import pytest"*) test -f build/there ;;
*"pip install"*) env | grep ^PIP_USER; test -n "$FAILS" || : >build/there ;;
*) echo "asked: $* in ${PYTEST_ADDOPTS-nothing}, ${PYTHONOPTIMIZE-nothing}" ;;
esac
"""


@gnu
def test_settings_of_pip_and_pytest(make, copy):
    """They are kept out; an install that failed is tried again."""
    (copy / "a fake").write_text(FAKE)
    (copy / "a fake").chmod(0o755)
    words = "test", "PYTHON=./a fake"
    env = "PYTEST_ADDOPTS=--cov", "PYTHONOPTIMIZE=2", "PIP_USER=1"
    status, output, err = make(*words, env=[*env, "FAILS=1"])
    assert status and "could not be installed" in err and "asked" not in output
    status, output, err = make(*words, env=env)
    assert status == 0 and "PIP_USER=0" in output, err
    pattern = "^asked: .*-c /dev/null --rootdir=. --confcutdir=tests .*"
    asked = re.findall(pattern + "in nothing, nothing$", output, re.M)
    assert len(asked) == output.count("asked") == 2
