"""client.py: its drawings, its checks, and what it says if things go wrong.

SERVERS_DIR in the environment names other servers to test it with.
"""

import contextlib
import fcntl
import itertools
import os
import pty
import re
import resource
import struct
import subprocess
import sys
import termios
import time
import types

import pytest
from conftest import HERE, LIMIT, SCRIPTS, SERVERS_DIR, run, together, wait_for
from fake_server import right, spoiled, start

ALL = [SERVERS_DIR / script for script in SCRIPTS.values()]
KQUEUE = ALL[-1]
CLIENT = [sys.executable, str(HERE.parent / "client.py")]
sys.path.insert(0, str(HERE.parent))

import client  # noqa: E402

ENDLESS = itertools.repeat(b"7" * 65536)


def run_client(*options, **more):
    """Run client.py to its end; return its status, stdout and stderr."""
    return run(*CLIENT, *options, **more)


def visit(port, **options):
    """Visit a server from here; return its Crowd."""
    usual = {"connections": 8, "requests": 4, "think": 0, "timeout": LIMIT}
    options = types.SimpleNamespace(**{**usual, **options})
    crowd = client.Crowd("127.0.0.1", port, options)
    crowd.run()
    return crowd


def check_failure(result, *words):
    """The run failed, and says so in one line that contains the words."""
    status, out, err = result
    assert status > 0, out
    assert err.count("\n") == 1, err[-2000:]
    assert all(word in err for word in words), err


def drawings_of(output, signs="░█"):
    """Return [(the scale in seconds, [the row of each client])]."""
    found = []
    for line in output.splitlines():
        head = re.search(r": [\d.]+ s +0 to ([\d.]+) s$", line)
        if head:
            found.append((float(head[1]), []))
        row = re.fullmatch(rf" +\d+ ([{signs} ]*)", line)
        if row:
            found[-1][1].append(row[1])
    return found


@pytest.fixture
def fake():
    """Start fake servers; all are closed in the end."""
    with contextlib.ExitStack() as stack:
        yield lambda reply=right: start(reply, stack)


# ---- Talking and drawing ----------------------------------------------------


def test_side_by_side(tmp_path):
    """All servers in one run: on one scale of time, and in one table."""
    files = [tmp_path / "new" / script.stem for script in ALL]
    options = []
    for script, file in zip(ALL, files):
        options += ["--server", script, "--transcript", file]
    status, output, err = run_client(*options)
    assert status == 0, err
    assert len(output.splitlines()) <= 45
    assert max(map(len, output.splitlines())) <= 80
    drawings = drawings_of(output)
    assert [len(rows) for _, rows in drawings] == [8, 8, 8, 8]
    assert len({scale for scale, _ in drawings}) == 1
    staircase = [len(row) - len(row.lstrip("░")) for row in drawings[0][1]]
    assert staircase == sorted(set(staircase)), output
    for _, rows in drawings[1:]:
        assert max(map(len, rows)) < len(drawings[0][1][-1])
    assert re.search("^threads, midway +1 +9 +1 +2$", output, re.M), output
    texts = {file.read_text() for file in files}
    assert len(texts) == 1 and texts.pop().count("INCR counter") == 16


def test_many_at_once(monkeypatch):
    """All are connected at the same time, and the server has room for all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(2000, hard - 100) if hard > 0 else 2000
    monkeypatch.setattr(client, "BATCH", 400)  # so it takes some of them
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        client.raise_descriptor_limit(count + 50)
        with client.Server(str(KQUEUE), LIMIT) as server:
            crowd = visit(server.port, connections=count, requests=2)
            assert visit(server.port, requests=7).mistakes == []  # once more
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert crowd.mistakes == []
    assert crowd.midway["connected_clients"] == str(count)


def test_longer_than_expected(fake):
    """More time than there was room for: another scale. And plain ASCII."""
    port = fake(lambda words: time.sleep(0.1) or right(words))
    options = "--port", port, "--think", 0, "--requests", 3
    status, out, err = run_client(*options, encoding="ascii")
    assert status == 0, err
    scale, rows = drawings_of(out, ".#")[0]
    assert scale >= 0.3 and 70 < max(map(len, rows)) <= 76 and len(rows) == 8


@pytest.mark.parametrize("lines, grows", [(24, True), (9, False)])
def test_live(fake, lines, grows):
    """On a terminal that is tall enough, the drawing grows in its place."""
    ours, theirs = pty.openpty()
    size = struct.pack("HHHH", lines, 80, 0, 0)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    env = {**os.environ, "PYTHONIOENCODING": "utf-8", "LINES": "0"}
    command = [*CLIENT, "--port", str(fake()), "--think", "0.15"]
    with subprocess.Popen(command, stdout=theirs, env=env) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # so Linux says that it has ended
            while data := os.read(ours, 4096):
                shown += data
        os.close(ours)
    assert process.returncode == 0, shown
    states = shown.decode().replace("\x1b[K", "").split("\x1b[9A")
    rows = [drawings_of(state)[-1][1] for state in states]
    assert all(len(of_one_state) == 8 for of_one_state in rows)
    assert (len(rows[0][0]) < len(rows[-1][0])) == (len(rows) > 1) == grows


# ---- When things go wrong ---------------------------------------------------


@pytest.mark.parametrize(
    "command, wrong, word",
    [
        (b"", b"", "no mistake"),
        (b"SET", b"-ERR no\r\n", "SET"),
        (b"GET", b"$-1\r\n", "GET"),
        (b"GET", b"$x\r\n", "GET"),
        (b"INCR", b":1\r\n", "counter"),
        (b"INCRBY", b":15\r\n", "counter"),
        (b"GET", b"$5\r\nab", "ran out"),
        (b"GET", None, "closed"),
        (b"INFO", None, "closed"),
    ],
)
def test_wrong_reply(fake, command, wrong, word):
    """A wrong reply is found, and told in a plain sentence."""
    timeout = 0.5 if word == "ran out" else LIMIT
    try:
        crowd = visit(fake(spoiled(command, wrong)), timeout=timeout)
        said = [*crowd.mistakes, "no mistake"][0]
    except client.Failed as failure:
        said = str(failure)
    assert word in said and "\n" not in said


def test_wrong_info(fake):
    """INFO that cannot be true is one sentence, which names it."""

    def ask(line):
        lines = b"threads:1\r\nused_cpu_user:1\r\nused_cpu_sys:1\r\n" + line
        reply = b"$%d\r\n\r\n%b\r\n" % (len(lines) + 2, lines)
        return run_client("--port", fake(spoiled(b"INFO", reply)))

    wrong = b"threads:0", b"used_cpu_user:nan", b"polls:x"
    *results, unknown = together(ask, *wrong, b"a:9")
    for line, result in zip(wrong, results):
        check_failure(result, line.decode().split(":")[0])
    assert unknown[0] == 0, unknown  # what it does not know is no mistake


@pytest.mark.parametrize("begin", [b"$99999999999\r\n", b"$"])
def test_endless_reply(fake, begin):
    """A reply without an end fails at once, and fills no memory."""
    code = (
        "import resource, subprocess, sys; subprocess.call(sys.argv[1:]);"
        "print('size', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    endless = fake(lambda words: itertools.chain([begin], ENDLESS))
    client = *CLIENT, "--port", endless
    _, out, err = run(sys.executable, "-c", code, *client)
    assert "too long" in err and err.count("\n") == 1
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    assert int(out.split("size")[1]) * unit < 200 * 2**20


@pytest.mark.parametrize(
    "reply, word, count",
    [(None, "no connection", 1500), (lambda words: None, "closed", 300)],
)
def test_broken_connections(fake, reply, word, count):
    """All connections are reset, or closed: that is one sentence."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    count = min(count, hard - 100) if hard > 0 else count
    result = run_client("--port", fake(reply), "--connections", count)
    check_failure(result, word)


BAD_STARTS = [
    "print('listening on nonsense')",
    "print('listening on 127.0.0.1:x')",
    "while True: print(end='x' * 9999)",
    "import time; time.sleep(50)",
]


@pytest.mark.parametrize("code", BAD_STARTS)
def test_bad_start(tmp_path, code):
    """A server that does not say where it listens is named, and ended."""
    script = tmp_path / "bad.py"
    script.write_text(code)
    server = client.Server(str(script), 0.5 if "sleep" in code else LIMIT)
    with pytest.raises(client.Failed, match="bad.py did not start.{0,250}$"):
        server.__enter__()
    assert server.process.poll() is not None


def wrapped(tmp_path, code):
    """Return a script that runs a server, after some code of its own."""
    script = tmp_path / "wrapped.py"
    script.write_text(
        f"import builtins, os, runpy, threading\n{code}\n"
        f"runpy.run_path({str(KQUEUE)!r}, run_name='__main__')\n"
    )
    return script


DIES = """
timer = threading.Timer(0.3, os._exit, [7])
say = print
builtins.print = lambda *words, **more: say(*words, **more) or timer.start()
"""


def test_server_dies(tmp_path):
    """A server that dies is named, with its status."""
    script = wrapped(tmp_path, DIES)
    result = run_client("--server", script, "--think", 0.2)
    check_failure(result, "wrapped.py died", "7")


def test_different_transcripts(tmp_path):
    """Two servers that reply differently are told apart, with a diff."""
    script = tmp_path / "other.py"
    script.write_text(KQUEUE.read_text().replace('b"+OK', 'b"+Ok'))
    result = run_client("--server", KQUEUE, "--server", script)
    check_failure(result, "other.py", KQUEUE.name)
    assert re.search("^-client 1: SET .*OK", result[1], re.M)
    assert re.search("^[+]client 1: SET .*Ok", result[1], re.M)


def test_ended_from_outside(tmp_path):
    """Whoever ends the client ends the server that it has started."""
    note = tmp_path / "pid"
    code = f"os.symlink(str(os.getpid()), {str(note)!r})"  # in one step
    script = wrapped(tmp_path, code)
    command = [*CLIENT, "--server", str(script), "--think", "50"]
    with subprocess.Popen(command) as process:
        wait_for(note.is_symlink, "the server runs")
        process.terminate()
    assert process.returncode == 128 + 15
    with pytest.raises(ProcessLookupError):
        os.kill(int(os.readlink(note)), 0)


NONSENSE = """--host nonsense.invalid, --port 99999, --connections 0,
--think nan, --transcript a --transcript b"""


def test_nonsense():
    """Nonsense on the command line is named, in one line."""
    cases = [tuple(case.split()) for case in NONSENSE.split(",")]
    results = together(lambda case: run_client(*case), *cases)
    for (option, value, *_), result in zip(cases, results):
        check_failure(result, option if len(value) < 4 else value)
    check_failure(run_client("--port", 1), "127.0.0.1:1")
