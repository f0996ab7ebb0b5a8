"""client.py: its drawings, its checks, and what it says if things go wrong.

SERVERS_DIR in the environment names other servers to test it with.
"""

import asyncio
import contextlib
import fcntl
import itertools
import os
import pty
import re
import resource
import signal
import socketserver
import struct
import subprocess
import sys
import termios
import threading
import time
import types

import pytest
from conftest import (
    HERE, LIMIT, SCRIPTS, SERVERS_DIR, load, needs, run, slow, slowly,
    together, wait_for,
)  # fmt: skip

ALL = [SERVERS_DIR / script for script in SCRIPTS.values()]
KQUEUE = ALL[-1]
CLIENT = [sys.executable, "-S", str(HERE.parent / "client.py")]
sys.path.append(str(HERE.parent))

import client  # noqa: E402

application = load("kqueue")


def run_client(*options, **more):
    """Run client.py, with the standard library only; return as run does."""
    return run(*CLIENT, *options, **more)


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
        row = re.fullmatch(rf" +\d+ ([{signs}]*)", line)
        if row:
            found[-1][1].append(row[1])
    return found


def right(line):
    """Reply to a line as a right server would."""
    session = application.Session({"pattern": "a fake"})
    session.receive(line)
    return session.answer()


def spoiled(command, wrong):
    """Return a function that replies rightly, but not to one command."""
    return lambda line: wrong if line.split()[0] == command else right(line)


class Serve(socketserver.StreamRequestHandler):
    def handle(self):
        with contextlib.suppress(OSError):  # the client may go when it likes
            for line in self.rfile:
                if (reply := self.server.reply(line)) is None:
                    break  # which closes the connection
                self.wfile.write(reply)


class Fake(socketserver.ThreadingTCPServer):
    request_queue_size, daemon_threads, block_on_close = 100, True, False


@pytest.fixture
def fake():
    """Start a server in threads of this test, which replies as it is told."""
    with Fake(("127.0.0.1", 0), Serve) as server:

        def start(reply=right):
            server.reply = reply
            threading.Thread(target=server.serve_forever).start()
            return server.server_address[1]

        yield start
        server.shutdown()


def test_side_by_side(tmp_path):
    """All servers in one run: on one scale of time, and in one table."""
    files = [tmp_path / script.stem for script in ALL]
    options = [f"--server={script}" for script in ALL]
    options += [f"--transcript={file}" for file in files]
    status, output, err = run_client(*options)
    lines = output.splitlines()
    assert status == 0 and len(lines) <= 45, err
    assert max(map(len, lines)) <= 79
    drawings = drawings_of(output)
    assert [len(rows) for _, rows in drawings] == [8, 8, 8, 8]
    assert len({scale for scale, _ in drawings}) == 1
    staircase = [len(row) - len(row.lstrip("░")) for row in drawings[0][1]]
    assert staircase == sorted(set(staircase)), output
    for _, rows in drawings[1:]:
        assert max(map(len, rows)) < len(drawings[0][1][-1])
    assert re.search("^threads, midway +1 +9 +1 +2$", output, re.M), output
    for row in "CPU seconds +[0-9]", "polls +- +- +[0-9]", "wake-ups .*[0-9]$":
        assert re.search(f"^{row}", output, re.M), (row, output)
    (text,) = {file.read_text() for file in files}
    assert text.count("INCR counter") == 16


def test_all_at_once():
    """All are there together: INFO midway counts a thread for each."""
    options = "--connections", 200, "--think", 0, "--requests", 3
    found = []
    while "201" not in found:  # it may be kept from its core for a while
        _, out, err = run_client("--server", ALL[1], *options)
        found += re.findall("^threads, midway +([0-9]+)$", out, re.M)
        assert 0 < len(found) < 4, err


@pytest.mark.parametrize("count", [300, slowly(10_000)])
def test_crowd(count):
    """It allows itself the files; 20 are drawn, on a scale that shows them."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    count = min(count, hard - 100) if hard > 0 else count
    options = "--connections", count, "--requests", 2, "--think", 0.5
    command = *CLIENT, "--server", KQUEUE, "--timeout", 60, *options
    shell = 'ulimit -Sn 100; exec "$0" "$@"'
    status, out, err = run("sh", "-c", shell, *command)
    assert status == 0, err
    ((scale, rows),) = drawings_of(out)
    assert len(rows) == 20 and max(map(len, rows)) > scale


@slow
@pytest.mark.parametrize("version", range(9, 16))
def test_other_interpreters(version):
    """Each Python that is installed runs the client and all servers."""
    python = f"python3.{version}"
    needs(python)
    if run(python, "-V")[0]:
        pytest.skip(f"{python} does not run")
    servers = [f"--server={script}" for script in ALL]
    status, out, err = run(python, CLIENT[-1], *servers)
    assert status == 0 and "All 4 transcripts are the same" in out, err


def test_connecting_again(fake, monkeypatch):
    """All but the first may be refused, and try again."""
    real, calls = asyncio.open_connection, itertools.count()

    async def refuse_some(*where, **more):
        if next(calls) in (2, 4, 5, 9):
            raise ConnectionRefusedError
        return await real(*where, **more)

    monkeypatch.setattr(asyncio, "open_connection", refuse_some)
    options = {"connections": 8, "requests": 4, "think": 0, "timeout": LIMIT}
    crowd = client.Crowd(types.SimpleNamespace(**options))
    crowd.run("127.0.0.1", fake())
    assert crowd.problem is None and next(calls) > 12


def test_longer_than_expected(fake):
    """More time than there was room for: another scale. And plain ASCII."""
    port = fake(lambda line: time.sleep(0.1) or right(line))
    options = "--port", port, "--think", 0, "--requests", 3
    status, out, err = run_client(*options, encoding="ascii")
    assert status == 0, err
    scale, rows = drawings_of(out, ".#")[0]
    assert scale >= 0.3 and 70 < max(map(len, rows)) <= 76 and len(rows) == 8


@pytest.mark.parametrize("lines, think", [(24, 0.15), (9, 0.15), (24, 0)])
def test_live(fake, lines, think):
    """On a terminal that is tall enough, the drawing grows in its place.

    If it takes longer than expected, its scale grows, too.
    """
    ours, theirs = pty.openpty()
    size = struct.pack("HHHH", lines, 80, 0, 0)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    env = {**os.environ, "PYTHONIOENCODING": "utf-8", "TERM": "xterm"}
    port = fake(lambda line: time.sleep(0 if think else 0.15) or right(line))
    command = [*CLIENT, "--port", str(port), "--think", str(think)]
    with subprocess.Popen(command, stdout=theirs, env=env) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # so Linux says that it has ended
            while data := os.read(ours, 4096):
                shown += data
        os.close(ours)
    assert process.returncode == 0, shown
    states = shown.decode().replace("\x1b[K", "").split("\x1b[9A")
    drawings = [drawings_of(state.replace("\r", "")) for state in states]
    assert (len(states) > 1) == (lines == 24)
    drawn = sum(drawings, [])
    for _, rows in drawn:
        assert len(rows) == 8 and max(map(len, rows)) <= 76
    (first_scale, first), (last_scale, last) = drawn[0], drawn[-1]
    assert (first_scale < last_scale) == (think == 0)
    assert think == 0 or (len(first[0]) < len(last[0])) == (lines == 24)


@pytest.mark.parametrize(
    "command, wrong, word",
    [
        (b"SET", b"-ERR no\r\n", "client 1: SET key:1 value-1.1"),
        (b"GET", b"$-1\r\n", "GET"),
        (b"GET", b"$x\r\n", "not in RESP"),
        (b"INCR", b":1\r\n", "15 of 16 INCRs were lost or done twice"),
        (b"INCR", b":1.5\r\n", "INCR counter was answered"),
        (b"SET", b"$5\r\nab", "ran out after 0.5 s"),
        (b"GET", None, "closed"),
        (b"INFO", None, "closed"),
    ],
)
def test_wrong_reply(fake, command, wrong, word):
    """A wrong reply is found, and told in a plain sentence."""
    options = "--think", 0, "--timeout", 0.5 if "ran out" in word else LIMIT
    port = fake(spoiled(command, wrong))
    result = run_client("--port", port, "--connections", 8, *options)
    check_failure(result, "the server: ", word)
    # What was seen until then, if anything was.
    drawings = drawings_of(result[1])
    assert all(len(rows) == 8 for _, rows in drawings)
    assert drawings or command == b"SET"


def wrapped(tmp_path, code):
    """Return a script that runs a server, after some code of its own."""
    note = f"os.symlink(str(os.getpid()), {str(tmp_path / 'pid')!r})"
    path = tmp_path / "wrapped.py"
    path.write_text(
        f"import os, runpy, socket, sys, time\n{note}\n{code}\n"
        f"runpy.run_path({str(ALL[2])!r}, run_name='__main__')\n"
    )
    return path


DIES = """
calls, real = [], socket.socket.send
def send(self, data):
    calls.append(data)
    if len(calls) > 20:
        self.close()
        time.sleep(0.1)
        os._exit(7)
    return real(self, data)
socket.socket.send = send
"""
FAILS = "import signal; signal.signal(15, lambda *_: os._exit(3))"
STAYS = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {15})"


@pytest.mark.parametrize(
    "code, timeout, how",
    [
        ("sys.exit(print('listening on nonsense'))", LIMIT, "did not start"),
        ("sys.exit(print('listening on ab:x'))", LIMIT, "did not start"),
        ("time.sleep(50)", 0.5, "did not start"),
        (DIES, LIMIT, "ended with status 7"),
        (FAILS, LIMIT, "ended with status 3"),
        (STAYS, 2, "ended with status -9"),
    ],
)
def test_server_starts_or_ends_badly(tmp_path, code, timeout, how):
    """A server that does not start, dies or does not end is named."""
    options = "--think", 0.2, "--timeout", timeout
    result = run_client("--server", wrapped(tmp_path, code), *options)
    check_failure(result, f"wrapped.py {how}")
    drawings = drawings_of(result[1])  # what was seen until then
    assert len(drawings) == (how != "did not start")
    assert all(len(rows) == 8 and all(rows) for _, rows in drawings)
    with pytest.raises(ProcessLookupError):
        os.kill(int(os.readlink(tmp_path / "pid")), 0)


def test_a_server_that_replies_wrongly(tmp_path):
    """Which server, which client, what it asked, what it was told."""
    script = tmp_path / "other.py"
    script.write_text(KQUEUE.read_text().replace('b"+OK', 'b"+Ok'))
    result = run_client("--server", KQUEUE, "--server", script)
    check_failure(result, "other.py: client ", ": SET key:", "+Ok")
    assert len(drawings_of(result[1])) == 1  # what the first has shown


@pytest.mark.parametrize(
    "code, number",
    [("", signal.SIGINT), (STAYS, signal.SIGTERM), ("", signal.SIGHUP)],
)
def test_ended_from_outside(tmp_path, code, number):
    """Whoever ends the client ends the server that it has started."""
    note, script = tmp_path / "pid", wrapped(tmp_path, code)
    command = [*CLIENT, "--server", str(script), "--think", "50"]
    with subprocess.Popen(command) as process:
        wait_for(note.is_symlink, "the server runs")
        process.send_signal(number)
    assert process.returncode == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(int(os.readlink(note)), 0)


NONSENSE = """--host nonsense.invalid, --port 99999, --connections 0,
--requests 0, --timeout -1, --think nan, --think -1, --connections 1000000,
--host a..b, --transcript a --transcript b"""


def test_nonsense():
    """Nonsense on the command line is named, in one line."""
    cases = [tuple(case.split()) for case in NONSENSE.split(",")]
    results = together(lambda case: run_client(*case), *cases)
    for (option, value, *_), result in zip(cases, results):
        named = value if option in ("--host", "--port") else option
        check_failure(result, named)
    check_failure(run_client("--port", 1), "127.0.0.1:1")
    shell = 'ulimit -n 100; exec "$0" "$@"'
    result = run("sh", "-c", shell, *CLIENT, "--port", 1, "--connections", 99)
    check_failure(result, "149 open files needed, 100 allowed")


def test_output_that_cannot_be_written(fake, tmp_path):
    """A transcript: one sentence. Nobody reads stdout any more: nothing."""
    port = fake()
    result = run_client("--port", port, "--transcript", tmp_path)
    check_failure(result, "directory", str(tmp_path))
    shell = "sh", "-c", 'unset PYTHONUNBUFFERED; "$0" "$@" | head -1'
    assert run(*shell, *CLIENT, "--port", port)[2] == ""


def test_many_columns():
    """Each head stays in its column, however many there are."""
    (line,) = client.table([{"": "3 busy wait"}] * 6, [""])
    assert line.split()[:3] == ["3", "busy", "w"] and len(line) <= 79


def test_defaults(monkeypatch):
    """The options, and what they are if not given."""
    monkeypatch.setattr(sys, "argv", ["client.py"])
    assert vars(client.command_line()) == {
        **{"host": "127.0.0.1", "port": 6380, "server": [], "transcript": []},
        **{"connections": 8, "requests": 4, "think": 0.05, "timeout": 30},
    }
