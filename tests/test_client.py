"""client.py: its drawings, its checks, and what it says if things go wrong."""

import asyncio
import os
import pty
import re
import resource
import subprocess
import sys
import threading
import time
from signal import SIGHUP, SIGINT, SIGTERM

import client
import pytest
from conftest import (
    HERE, LIMIT, PATIENCE, SCRIPTS, SERVERS_DIR, load, needs, run, slowly,
    text_of, together,
)  # fmt: skip

ALL = [SERVERS_DIR / script for script in SCRIPTS.values()]
KQUEUE = ALL[-1]
CLIENT = [sys.executable, "-S", str(HERE.parent / "client.py")]


def check_failure(result, pattern):
    """The run failed, and says so in one line in which the pattern is."""
    status, out, err = result
    assert status > 0, out
    assert err.count("\n") == 1, err[-2000:]
    assert re.search(pattern, err), err


def drawings_of(output):
    """Return [(the scale in seconds, [the row of each client])]."""
    # A scale, what follows it, the next scale, and so on.
    _, *parts = re.split(r"(?m): [\d.]+ s +0 to ([\d.]+) s$", output)
    rows = re.compile(r"^ +\d+ ([░█]*|[.#]*)$", re.MULTILINE).findall
    return list(zip(map(float, parts[::2]), map(rows, parts[1::2])))


@pytest.fixture
def fake(monkeypatch):
    """Start 2 in a thread of this test; return its port.

    It thinks for some seconds before each reply, and answers one command
    wrongly. If the wrong reply is empty, it closes the connection instead.
    """
    module = load("multi")
    right = module.Session.carry_out

    def start(command=b"", wrong=b"", seconds=0):
        def carry_out(session, words):
            time.sleep(seconds)
            if words[0] != command:
                return right(session, words)
            session.finished = not wrong
            return wrong

        monkeypatch.setattr(module.Session, "carry_out", carry_out)
        server = module.TCPServer("127.0.0.1", 0)
        threading.Thread(target=server.start, daemon=True).start()
        return server.listener.getsockname()[1]

    return start


PYTHONS = [f"python3.{version}" for version in range(9, 16)]


@pytest.mark.parametrize("python", [sys.executable, *map(slowly, PYTHONS)])
def test_side_by_side(python, tmp_path):
    """All servers in one run: on one scale of time, and in one table.

    Each Python that is installed runs the client and all servers.
    """
    needs(python)
    if run(python, "-V")[0]:
        pytest.skip(f"{python} does not run")
    files = [tmp_path / script.stem for script in ALL]
    options = [f"--server={script}" for script in ALL]
    options += [f"--transcript={file}" for file in files]
    status, output, err = run(python, *CLIENT[1:], *options)
    lines = output.splitlines()
    assert status == 0 and len(lines) <= 45, err
    assert "All 4 transcripts are the same." in lines
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
    # Each head stays in its column, however many there are.
    (line,) = client.table([{"": "3 busy wait"}] * 6, [""])
    assert line.split()[:3] == ["3", "busy", "w"] and len(line) <= 79


def test_all_at_once(tmp_path):
    """All are there together, with a queue as short as on a Mac, too."""
    script = tmp_path / "short.py"
    script.write_text(text_of("multi").replace("listen(4096)", "listen(128)"))
    options = "--connections", 300, "--think", 0, "--requests", 3
    found = []
    while "301" not in found:  # it may be kept from its core for a while
        _, out, err = run(*CLIENT, "--server", script, *options)
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


def test_defaults_and_connecting_again(fake, monkeypatch):
    """With the default options. All but the first may be refused at first."""
    monkeypatch.setattr(sys, "argv", ["client.py"])
    crowd = client.Crowd(client.command_line())
    assert vars(crowd.options) == {
        **{"host": "127.0.0.1", "port": 6380, "server": [], "transcript": []},
        **{"connections": 8, "requests": 4, "think": 0.05, "timeout": 30},
    }
    real, tries = asyncio.open_connection, []

    async def refuse_some(*where):
        tries.append(where)
        if len(tries) in (3, 5, 6, 10):
            raise ConnectionRefusedError
        return await real(*where)

    monkeypatch.setattr(asyncio, "open_connection", refuse_some)
    crowd.run("127.0.0.1", fake())
    assert crowd.problem is None and len(tries) == 8 + 4 + 1  # one for INFO


@pytest.mark.parametrize(
    "lines, think, encoding",
    [(24, 0.15, "utf-8"), (24, 0, "utf-8"), (9, 0, "ascii")],
)
def test_terminal(fake, lines, think, encoding):
    """On a tall terminal the drawing grows; if it must, so does its scale."""
    port = fake(seconds=0 if think else 0.15)
    shell = f"stty rows {lines} cols 80; exec env TERM=xterm"
    shell += f' PYTHONIOENCODING={encoding} "$0" "$@" --think {think}'
    command = ["sh", "-c", shell, *CLIENT, "--port", str(port)]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdin=theirs, stdout=theirs) as process:
        os.close(theirs)
        # Linux reports the end as an error, before which cat shows it all.
        shown = subprocess.run(["cat"], stdin=ours, capture_output=True).stdout
    os.close(ours)
    assert process.returncode == 0, shown
    text = shown.decode(encoding).replace("\x1b[K", "").replace("\r", "")
    states = text.split("\x1b[9A")
    assert (len(states) > 1) == (lines == 24)
    drawn = sum(map(drawings_of, states), [])
    for _, rows in drawn:
        assert len(rows) == 8 and max(map(len, rows)) <= 76
    (first_scale, first), (last_scale, last) = drawn[0], drawn[-1]
    assert (first_scale < last_scale) == (lines == 24 and think == 0)
    assert think == 0 or len(first[0]) < len(last[0])
    assert think or last_scale >= 0.6 and max(map(len, last)) > 70


@pytest.mark.parametrize(
    "command, wrong, pattern",
    [
        (b"SET", b"-ERR no\r\n", r"client (\d): SET key:\1 value-\1\.1 "),
        (b"GET", b"$-1\r\n", r"client (\d): GET key:\1 was"),
        (b"GET", b"$x\r\n", "not in RESP"),
        (b"INCR", b":1\r\n", "15 of 16 INCRs were lost or done twice"),
        (b"INCR", b":1.5\r\n", "INCR counter was answered"),
        (b"SET", b"$5\r\nab", "ran out after 0.5 s"),
        (b"GET", b"", "closed"),
        (b"INFO", b"", "closed"),
    ],
)
def test_wrong_reply(fake, command, wrong, pattern):
    """A wrong reply is found, and told in a plain sentence."""
    late = "ran out" in pattern
    options = "--think", 0, "--timeout", 0.5 if late else LIMIT
    result = run(*CLIENT, "--port", fake(command, wrong), *options)
    check_failure(result, f"the server: .*{pattern}")
    # What was seen until then, if anything was.
    drawings = drawings_of(result[1])
    assert all(len(rows) == 8 for _, rows in drawings)
    assert drawings or command == b"SET"


def wrapped(tmp_path, code):
    """Return a script: a server, after some code of its own."""
    script = tmp_path / "wrapped.py"
    given = "import os, signal, socket, sys, time; real = socket.socket.send"
    script.write_text(f"{given}\n{code}\n{text_of('busy')}")
    return str(script)


DIES = """
calls = []
def send(self, data):
    calls.append(data)
    if len(calls) > 20:
        self.close()
        time.sleep(0.1)
        os._exit(7)
    return real(self, data)
socket.socket.send = send
"""
FAILS = "signal.signal(15, lambda *_: os._exit(3))"
STAYS = "signal.pthread_sigmask(signal.SIG_BLOCK, {15})"
LOWERS = "socket.socket.send = lambda self, data: real(self, data.lower())"
AFTER_ANOTHER = "--think", 0, "--server", KQUEUE  # whose drawing is shown


@pytest.mark.parametrize(
    "code, options, how",
    [
        ("sys.exit(print('listening on nonsense'))", (), " did not start"),
        ("sys.exit(print('listening on ab:x'))", (), " did not start"),
        ("time.sleep(9 * 60)", ("--timeout", 0.5), " did not start"),
        (DIES, (), " ended with status 7"),
        (FAILS, (), " ended with status 3"),
        (STAYS, ("--timeout", 2), " ended with status -9"),
        (LOWERS, AFTER_ANOTHER, r": client \d: SET key:.*'\+ok"),
    ],
)
def test_bad_servers(tmp_path, code, options, how):
    """A server that does not start, end or reply as it must is named."""
    options = "--think", 0.2, "--timeout", LIMIT, *options
    # This returns when nobody has stderr any more: the server has gone, too.
    result = run(*CLIENT, *options, "--server", wrapped(tmp_path, code))
    check_failure(result, rf"wrapped\.py{how}")
    drawings = drawings_of(result[1])  # what was seen until then
    assert bool(drawings) == (how != " did not start")
    assert all(len(rows) == 8 and all(rows) for _, rows in drawings)


AT_START = "print(os.getpid(), file=sys.stderr)"
SERVING = f"socket.socket.send = lambda *reply: {AT_START} or real(*reply)"


@pytest.mark.parametrize("code", [AT_START, f"{STAYS}\n{SERVING}"])
@pytest.mark.parametrize("number", [SIGINT, SIGTERM, SIGHUP])
def test_ended_from_outside(tmp_path, code, number):
    """Whoever ends the client ends the server that it has started."""
    command = *CLIENT, "--think", "50", "--server", wrapped(tmp_path, code)
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    server = int(process.stderr.readline())  # as the code has told
    process.send_signal(number)
    assert process.wait(PATIENCE) == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


NONSENSE = """--host nonsense.invalid, --port 99999, --connections 0,
--requests 0, --timeout -1, --think nan, --think -1, --connections 1000000,
--host a..b, --transcript a --transcript b"""


def test_nonsense():
    """Nonsense on the command line is named, in one line."""
    cases = [tuple(case.split()) for case in NONSENSE.split(",")]
    results = together(lambda case: run(*CLIENT, *case), *cases)
    for (option, value, *_), result in zip(cases, results):
        named = value if option in ("--host", "--port") else option
        check_failure(result, re.escape(named))
    check_failure(run(*CLIENT, "--port", 1), r"127\.0\.0\.1:1\b")
    shell = 'ulimit -n 100; exec "$0" "$@"'
    result = run("sh", "-c", shell, *CLIENT, "--port", 1, "--connections", 99)
    check_failure(result, "149 open files needed, 100 allowed")


def test_output_that_cannot_be_written(fake, tmp_path):
    """A transcript: one sentence. Nobody reads stdout any more: nothing."""
    port = fake()
    result = run(*CLIENT, "--port", port, "--transcript", tmp_path)
    check_failure(result, f"directory.*{re.escape(str(tmp_path))}")
    shell = "sh", "-c", 'unset PYTHONUNBUFFERED; "$0" "$@" | head -1'
    assert run(*shell, *CLIENT, "--port", port)[2] == ""
