"""client.py: its drawings, its checks, and what it says if things go wrong.

SERVERS_DIR in the environment names other servers to test it with.
"""

import argparse
import contextlib
import fcntl
import os
import pty
import re
import resource
import select
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLIENT = ROOT / "client.py"
SERVERS = Path(os.environ.get("SERVERS_DIR") or ROOT).resolve()
ALL = sorted(SERVERS.glob("[1-4]_*.py"))
KQUEUE = SERVERS / "4_kqueue_loop.py"
LIMIT = 100  # seconds for a run of the client, on a loaded machine
sys.path.insert(0, str(ROOT))

import client  # noqa: E402


def run_client(*options, before=(), **env):
    """Run client.py to its end; it must not end in a traceback."""
    result = subprocess.run(
        [*before, sys.executable, str(CLIENT), *map(str, options)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=LIMIT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **env},
    )
    assert "Traceback" not in result.stderr, result.stderr[-2000:]
    return result


def visit(port, **options):
    """Visit a server from here; return its Crowd."""
    usual = {"connections": 8, "requests": 4, "think": 0, "timeout": LIMIT}
    options = argparse.Namespace(**{**usual, **options})
    crowd = client.Crowd("127.0.0.1", port, options)
    crowd.run()
    return crowd


def check_failure(result, *words):
    """The run failed, and says so in one line that contains the words."""
    assert result.returncode > 0, result.stdout
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr[-2000:]
    for word in words:
        assert word in lines[0]


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


def figures(output, name):
    """Return the figures of a row of the table, as text."""
    line = re.search(rf"^ *{name}  +(.*)$", output, re.M)
    assert line, f"no row {name!r} in {output}"
    return re.split(r"  +", line[1].strip())


# ---- Talking and drawing ----------------------------------------------------


def test_side_by_side(tmp_path):
    """All servers in one run: on one scale of time, and in one table."""
    files = [tmp_path / "new" / f"{script.stem}.txt" for script in ALL]
    options = []
    for script, file in zip(ALL, files):
        options += ["--server", script, "--transcript", file]
    result = run_client(*options)
    assert result.returncode == 0, result.stderr
    output = result.stdout
    assert len(output.splitlines()) <= 45
    assert all(len(line) <= 80 for line in output.splitlines())
    drawings = drawings_of(output)
    assert [len(rows) for _, rows in drawings] == [8, 8, 8, 8]
    assert len({scale for scale, _ in drawings}) == 1
    staircase = [len(row) - len(row.lstrip("░")) for row in drawings[0][1]]
    assert staircase == sorted(set(staircase)), output
    for _, rows in drawings[1:]:
        assert max(map(len, rows)) < len(drawings[0][1][-1])
    assert figures(output, "threads, midway") == ["1", "9", "1", "2"]
    texts = {file.read_text() for file in files}
    assert len(texts) == 1 and texts.pop().count("INCR counter") == 16


def test_many_at_once():
    """All are connected at the same time, and the server has room for all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(2000, hard - 100) if hard > 0 else 2000
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        client.raise_descriptor_limit(count + 50)
        with client.Server(str(KQUEUE), LIMIT) as server:
            crowd = visit(server.port, connections=count, requests=2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert crowd.mistakes == []
    assert crowd.midway["connected_clients"] == str(count)


def test_a_server_that_runs_already():
    """Without --server it talks to what runs; twice, with the same result."""
    with client.Server(str(KQUEUE), LIMIT) as server:
        for _ in range(2):
            assert visit(server.port, requests=7).mistakes == []


def test_ascii(fake):
    """Where stdout can show no more, the drawing is plain ASCII."""
    result = run_client("--port", fake().port, PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and result.stdout.isascii()
    assert len(drawings_of(result.stdout, ".#")[0][1]) == 8


def test_longer_than_expected(fake):
    """A drawing that needs more room than there was gets another scale."""
    slow = fake(lambda words: time.sleep(0.1) or right(words))
    options = "--port", slow.port, "--think", 0, "--requests", 3
    result = run_client(*options)
    assert result.returncode == 0, result.stderr
    scale, rows = drawings_of(result.stdout)[0]
    assert scale >= 0.3 and 70 < max(map(len, rows)) <= 76


@pytest.mark.parametrize("lines, redraws", [(24, True), (9, False)])
def test_live(fake, lines, redraws):
    """On a terminal that is tall enough, the drawing grows in its place."""
    ours, theirs = pty.openpty()
    size = struct.pack("HHHH", lines, 80, 0, 0)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    env = {name: env[name] for name in env if name not in ("LINES", "COLUMNS")}
    command = [CLIENT, "--port", str(fake().port), "--think", "0.15"]
    process = subprocess.Popen(
        [sys.executable, *command], stdin=theirs, stdout=theirs, env=env
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux's way to say that it has ended
        while select.select([ours], [], [], LIMIT)[0]:
            data = os.read(ours, 4096)
            if not data:
                break
            shown += data
    os.close(ours)
    assert process.wait(LIMIT) == 0, shown
    states = shown.decode().replace("\x1b[K", "").split("\x1b[9A")
    assert (len(states) >= 3) == redraws, shown
    last = [drawings_of(state)[-1] for state in (states[0], states[-1])]
    assert len(last[0][1]) == len(last[1][1]) == 8
    if redraws:
        assert len(last[0][1][0]) < len(last[1][1][0])


# ---- When things go wrong ---------------------------------------------------


class Fake:
    """A server in a thread of the test, which replies as it is told to.

    `reply` gets a request as a list of words. It returns the reply as bytes;
    None closes the connection, an iterator of bytes is sent to its end.
    """

    def __init__(self, reply):
        self.reply = reply
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=2000)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):  # the test is over
            while True:
                sock = self.listener.accept()[0]
                serve = threading.Thread(target=self.serve, args=[sock])
                serve.daemon = True
                serve.start()

    def serve(self, sock):
        with contextlib.suppress(OSError), sock, sock.makefile("rb") as lines:
            while True:
                count = lines.readline()
                if not count:
                    return
                words = []
                for _ in range(int(count[1:])):
                    length = int(lines.readline()[1:])
                    words.append(lines.read(length + 2)[:-2])
                reply = self.reply(words)
                if reply is None:
                    return
                for part in [reply] if isinstance(reply, bytes) else reply:
                    sock.sendall(part)


values, counts, lock = {}, {}, threading.Lock()


def right(words):
    """Reply as a right server would."""
    command, *words = words
    with lock:
        if command == b"SET":
            values[words[0]] = words[1]
            return b"+OK\r\n"
        if command == b"GET":
            value = values.get(words[0], b"")
            return b"$%d\r\n%b\r\n" % (len(value), value)
        if command == b"INFO":
            return b"$11\r\nthreads:1\r\n\r\n"
        counts.setdefault(words[0], 0)
        counts[words[0]] += command == b"INCR"
        return b":%d\r\n" % counts[words[0]]


@pytest.fixture
def fake():
    fakes = []

    def make(reply=right):
        fakes.append(Fake(reply))
        return fakes[-1]

    yield make
    for one in fakes:
        one.listener.close()


def spoiled(command, wrong):
    """Return a function that replies rightly, but to one command."""
    return lambda words: wrong if words[0] == command else right(words)


@pytest.mark.parametrize(
    "command, wrong, word",
    [
        (b"SET", b"-ERR no\r\n", "SET"),
        (b"GET", b"$5\r\nwrong\r\n", "GET"),
        (b"GET", b"$-1\r\n", "GET"),
        (b"INCR", b":x\r\n", "INCR"),
        (b"INCR", b":1\r\n", "counter"),
        (b"INCRBY", b":15\r\n", "counter"),
        (b"GET", b"$x\r\n", "GET"),
        (b"GET", b"$5\r\nab", "ran out"),
        (b"GET", None, "closed"),
        (b"INFO", None, "closed"),
    ],
)
def test_wrong_reply(fake, command, wrong, word):
    """A wrong reply is found, and told in a plain sentence."""
    timeout = 0.5 if word == "ran out" else LIMIT
    try:
        crowd = visit(fake(spoiled(command, wrong)).port, timeout=timeout)
        said = crowd.mistakes[0]
    except client.Failed as failure:
        said = str(failure)
    assert word in said and "\n" not in said


@pytest.mark.parametrize(
    "line, fails",
    [
        ("threads:x", True),
        ("threads:0", True),
        ("used_cpu_user:nan", True),
        ("polls:0", True),
        ("wakeups:-1", True),
        ("wakeups:9", False),
    ],
)
def test_wrong_info(fake, line, fails):
    """INFO that cannot be true is one sentence, which names it."""
    lines = "threads:1\r\nused_cpu_user:1\r\nused_cpu_sys:1\r\n" + line
    reply = b"$%d\r\n\r\n%b\r\n" % (len(lines) + 2, lines.encode())
    result = run_client("--port", fake(spoiled(b"INFO", reply)).port)
    if fails:
        check_failure(result, line.split(":")[0])
    else:
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("begin", [b"$99999999999\r\n", b"+", b"$" + b"9" * 9])
def test_endless_reply(fake, begin):
    """A reply without an end fails at once, and fills no memory."""

    def endless(words):
        yield begin
        while True:
            yield b"7" * 65536

    code = """if True:
        import resource, subprocess, sys
        status = subprocess.call(sys.argv[1:])
        size = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        print("maxrss", size * (1 if sys.platform == "darwin" else 1024))
        sys.exit(status)"""
    before = [sys.executable, "-c", code]
    options = "--port", fake(endless).port, "--timeout", 8
    result = run_client(*options, before=before)
    check_failure(result, "too long")
    assert int(result.stdout.split("maxrss")[1]) < 200 * 2**20


def test_resets():
    """1,500 connections are reset: that is one sentence."""

    def reset(listener):
        with contextlib.suppress(OSError):  # the test is over
            while True:
                sock = listener.accept()[0]
                linger = struct.pack("ii", 1, 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                sock.close()

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    count = min(1500, hard - 100) if hard > 0 else 1500
    with socket.create_server(("127.0.0.1", 0), backlog=2000) as listener:
        resetting = threading.Thread(target=reset, args=[listener])
        resetting.daemon = True
        resetting.start()
        port = listener.getsockname()[1]
        result = run_client("--port", port, "--connections", count)
    check_failure(result, str(port))


@pytest.mark.parametrize(
    "code, word",
    [
        ("print('listening on nonsense')", "nonsense"),
        ("print('listening on 127.0.0.1:x')", "127.0.0.1:x"),
        ("print('listening on')", "listening on"),
        ("while True: print(end='x' * 9999)", "xxx"),
        ("import time; time.sleep(50)", ""),
        ("", ""),
    ],
)
def test_bad_start(tmp_path, code, word):
    """A server that does not say where it listens is named."""
    script = tmp_path / "bad.py"
    script.write_text(code)
    seconds = 0.5 if "sleep" in code else LIMIT
    with pytest.raises(client.Failed, match=f"bad.py did not.*{word}"):
        client.Server(str(script), seconds).__enter__()


SPOILED = """
import os, runpy, sys, threading
sys.argv[0] = {script!r}
{code}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def other(tmp_path):
    """Make a script that runs a server after some code of its own."""

    def make(code):
        path = tmp_path / "other.py"
        path.write_text(SPOILED.format(script=str(KQUEUE), code=code))
        return path

    return make


def test_server_dies(other):
    """A server that ends while it is asked is named, with its status."""
    script = other("threading.Timer(0.6, os._exit, [7]).start()")
    result = run_client("--server", script, "--think", 0.5)
    check_failure(result, "other.py died", "7")


def test_server_ends_badly(other):
    """A server that stops with another status than 0 is named."""
    script = other("end = os._exit; os._exit = lambda status: end(5)")
    check_failure(run_client("--server", script), "other.py stopped", "5")


def test_different_transcripts(tmp_path):
    """Two servers that reply differently are told apart, with a diff."""
    text = KQUEUE.read_text()
    script = tmp_path / "other.py"
    script.write_text(text.replace('return b"+OK', 'return b"+Ok'))
    assert script.read_text() != text
    result = run_client("--server", KQUEUE, "--server", script)
    check_failure(result, "other.py", KQUEUE.name)
    assert re.search("^-client 1: SET .*OK", result.stdout, re.M)
    assert re.search("^[+]client 1: SET .*Ok", result.stdout, re.M)


def test_ended_from_outside(other, tmp_path):
    """Whoever ends the client ends the server that it has started."""
    note = tmp_path / "pid"
    code = f"open({str(note)!r}, 'w').write(str(os.getpid()) + '.')"
    command = [CLIENT, "--server", other(code), "--think", "50"]
    with subprocess.Popen([sys.executable, *command]) as process:
        end = time.monotonic() + LIMIT
        while not note.exists() or not note.read_text().endswith("."):
            assert time.monotonic() < end
            time.sleep(0.01)
        process.terminate()
        assert process.wait(LIMIT) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()[:-1]), 0)


@pytest.mark.parametrize(
    "options, word",
    [
        (["--host", "nonsense.invalid"], "nonsense.invalid"),
        (["--port", "1"], "127.0.0.1:1"),
        (["--port", "99999"], "99999"),
        (["--port", "x"], "--port"),
        (["--connections", "0"], "--connections"),
        (["--think", "nan"], "--think"),
        (["--timeout", "0"], "--timeout"),
        (["--transcript", "a", "--transcript", "b"], "--transcript"),
        (["--connections", "999999"], "open files"),
    ],
)
def test_nonsense(options, word):
    """Nonsense on the command line is named, in one line."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if word == "open files" and not 0 < hard < 999_999:
        pytest.skip("this machine allows 999,999 open files")
    check_failure(run_client(*options), word)
