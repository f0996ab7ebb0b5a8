"""client.py: its picture, its checks, and what it says when things go wrong."""

import contextlib
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import HERE, SCRIPTS, SERVERS_DIR, bulk

CLIENT = HERE.parent / "client.py"
LIMIT = 120  # seconds for a run of the client, on a loaded machine


def run_client(*options, **env):
    """Run client.py to its end; it must not end in a traceback."""
    result = subprocess.run(
        [sys.executable, str(CLIENT), *map(str, options)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=LIMIT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **env},
    )
    result.stdout = result.stdout.decode()
    result.stderr = result.stderr.decode()
    assert "Traceback" not in result.stderr, result.stderr
    return result


def servers(*names):
    """Return the options that have the client start these servers."""
    options = []
    for name in names:
        options += ["--server", SERVERS_DIR / SCRIPTS[name]]
    return options


def check_failure(result, *words):
    """The run failed, and says so in one line that contains the words."""
    assert result.returncode not in (0, None), result.stdout
    last = result.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last, result.stderr


def rows_of(output, waiting="░", talking="█"):
    """Return the clients' lines of a timeline, without their numbers."""
    pattern = rf"^ *\d+ ([{waiting}{talking} ]+)$"
    return re.findall(pattern, output, re.M)


def figure(output, name):
    """Return the figures of a row of the table, as text."""
    line = re.search(rf"^ *{name}  +(.*)$", output, re.M)
    assert line, f"no row {name!r} in {output}"
    return re.split(r"  +", line[1].strip())


# ---- The picture ------------------------------------------------------------


def test_each_server(name):
    """It talks to each server, checks all, and draws a line per client."""
    result = run_client(*servers(name), "--timeout", LIMIT)
    assert result.returncode == 0, result.stderr
    assert len(rows_of(result.stdout)) == 8
    assert figure(result.stdout, "threads, midway") == [
        {"single": "1", "multi": "9", "busy": "1", "kqueue": "2"}[name]
    ]
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_staircase():
    """The first pattern draws a staircase: each waits for all before him."""
    result = run_client(*servers("single"), "--timeout", LIMIT)
    waits = [len(row) - len(row.lstrip("░")) for row in rows_of(result.stdout)]
    assert waits == sorted(waits) and len(set(waits)) == 8, result.stdout


def test_side_by_side(tmp_path):
    """All servers in one run: one table, and the same transcript from all."""
    files = [tmp_path / f"{name}.txt" for name in SCRIPTS]
    options = servers(*SCRIPTS)
    for file in files:
        options += ["--transcript", file]
    result = run_client(*options, "--timeout", LIMIT)
    assert result.returncode == 0, result.stderr
    assert "All 4 transcripts are the same" in result.stdout
    texts = {file.read_text() for file in files}
    assert len(texts) == 1 and texts.pop().count("INCR counter") == 16
    clients = figure(result.stdout, "clients, midway")
    assert clients == ["1", "8", "8", "8"]
    elapsed = figure(result.stdout, "time elapsed")
    single, *others = [float(text.split()[0]) for text in elapsed]
    assert all(single > other for other in others), elapsed
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_ascii():
    """Where stdout can show no more, the picture is plain ASCII."""
    result = run_client(*servers("kqueue"), PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii()
    assert len(rows_of(result.stdout, ".", "#")) == 8


def test_svg(tmp_path):
    """--svg writes valid XML with the names as text and no script."""
    file = tmp_path / "new folder" / "picture.svg"
    options = servers("single", "kqueue")
    result = run_client(*options, "--svg", file, "--timeout", LIMIT)
    assert result.returncode == 0, result.stderr
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.parse(file).getroot()
    texts = " ".join(element.text for element in root.iter(f"{svg}text"))
    assert root.tag == f"{svg}svg" and not list(root.iter(f"{svg}script"))
    assert "1_single_blocking.py" in texts and "4_kqueue_loop.py" in texts
    # A bar of talk and four of waiting for each client, beside the legend.
    assert len(list(root.iter(f"{svg}rect"))) == 2 * 8 * 5 + 3


def test_a_server_that_runs_already(start):
    """Without --server it talks to what runs; twice, with the same result."""
    server = start("kqueue")
    for _ in range(2):
        result = run_client("--port", server.port, "--requests", 7)
        assert result.returncode == 0, result.stderr
    server.stop().check()


def test_ten_thousand(note):
    """It opens 10,000 connections, or as many as this machine allows."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY:
        hard = 10240  # what macOS takes at least
    count = min(10_000, hard - 100)
    options = ["--connections", count, "--timeout", LIMIT - 10]
    result = run_client(*servers("kqueue"), *options)
    assert result.returncode == 0, result.stderr
    assert f"of {count} clients)" in result.stdout
    note("connections of the client at once", count)


def test_compare():
    """--compare: who is held up, who is not, and what it costs."""
    options = ["--compare", "--timeout", LIMIT]
    result = run_client(*servers(*SCRIPTS), *options)
    assert result.returncode == 0, result.stderr
    out = result.stdout
    half = figure(out, "another's PING")
    assert half[0] == "must wait" and "must wait" not in half[1:]
    blocked = figure(out, "another's PING then")
    assert blocked[0] == "must wait"
    multi, busy, kqueue = [float(text.split()[0]) for text in blocked[1:]]
    assert multi < busy and multi < kqueue and kqueue > 300, blocked
    cpu = [int(text.rstrip("%")) for text in figure(out, "CPU in use")]
    assert cpu[2] > 3 * max(cpu[0], cpu[1], cpu[3], 5), cpu
    threads = figure(out, "threads meanwhile")
    assert threads == ["1", "501", "1", "2"]
    assert all(len(line) <= 79 for line in out.splitlines())


# ---- When things go wrong ---------------------------------------------------


class Fake:
    """A server in a thread of the test, which replies as it is told to.

    `reply` gets a request as a list of words; it returns the reply as bytes,
    or None to close the connection.
    """

    def __init__(self, reply):
        self.reply = reply
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                sock = self.listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self.serve, args=[sock], daemon=True).start()

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
                sock.sendall(reply)


def right_reply():
    """Return a function that replies as a right server would."""
    count, values, lock = [0], {}, threading.Lock()

    def reply(words):
        command, *words = words
        with lock:
            if command == b"SET":
                values[words[0]] = words[1]
                return b"+OK\r\n"
            if command == b"GET":
                return bulk(values.get(words[0], b"nothing"))
            if command == b"INCR":
                count[0] += 1
            if command == b"INFO":
                return bulk(b"# Server\r\nthreads:1\r\n")
            return b":%d\r\n" % count[0]

    return reply


def spoiled(command, wrong):
    """Return a function that replies rightly, but to one command."""
    right = right_reply()
    return lambda words: wrong if words[0] == command else right(words)


@pytest.fixture
def fake():
    fakes = []

    def make(reply):
        fakes.append(Fake(reply))
        return fakes[-1]

    yield make
    for one in fakes:
        one.listener.close()


def test_right_replies(fake):
    """The fake server, when it is right, passes: so the next tests can fail."""
    result = run_client("--port", fake(right_reply()).port)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "command, wrong, word",
    [
        (b"SET", b"-ERR no\r\n", "SET"),
        (b"GET", b"$5\r\nwrong\r\n", "GET"),
        (b"GET", b"$-1\r\n", "GET"),
        (b"INCR", b"+OK\r\n", "INCR"),
        (b"INCR", b":x\r\n", "INCR"),
        (b"INCR", b":1\r\n", "counter"),
        (b"INCRBY", b":15\r\n", "counter"),
        (b"GET", b"nonsense\r\n", "GET"),
        (b"GET", b"$x\r\n", "no reply"),
        (b"GET", b"$5\r\nab", "ran out"),
        (b"SET", b"x" * 100_000 + b"\r\n", "no reply"),
        (b"GET", None, "closed"),
        (b"INFO", None, "closed"),
    ],
)
def test_wrong_reply(fake, command, wrong, word):
    """A wrong reply is found, and the run fails with a plain sentence."""
    port = fake(spoiled(command, wrong)).port
    timeout = 3 if word == "ran out" else LIMIT
    check_failure(run_client("--port", port, "--timeout", timeout), word)


def test_time_runs_out(fake):
    """A server that never replies makes the time run out."""
    port = fake(lambda words: b"").port
    result = run_client("--port", port, "--timeout", 1)
    check_failure(result, "time ran out after 1 s", "0 of 8")


def test_no_server():
    """Nobody listens: one line that names the address."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    check_failure(run_client("--port", port), f"no server at 127.0.0.1:{port}")


@pytest.mark.parametrize(
    "options, word",
    [
        (["--host", "nonsense.invalid"], "nonsense.invalid"),
        (["--port", "99999"], "99999"),
        (["--port", "x"], "--port"),
        (["--connections", "0"], "--connections"),
        (["--requests", "-1"], "--requests"),
        (["--think", "nan"], "--think"),
        (["--timeout", "0"], "--timeout"),
        (["--server", "nowhere.py"], "nowhere.py"),
        (["--compare"], "--server"),
        (["--connections", "100000"], "open files"),
        (["--transcript", "a", "--transcript", "b"], "--transcript"),
    ],
)
def test_nonsense(options, word):
    """Nonsense on the command line is named, in one line."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if word == "open files" and not 0 < hard < 100_000:
        pytest.skip("this machine allows 100,000 open files")
    check_failure(run_client(*options), word)


SCRIPT = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print("listening on 127.0.0.1:%d" % listener.getsockname()[1], flush=True)
"""


@pytest.mark.parametrize(
    "script, words",
    [
        ("raise SystemExit(7)", ["did not start"]),
        ("print('hello', flush=True); __import__('time').sleep(99)", ["start"]),
        (SCRIPT + "listener.accept(); os._exit(3)", ["died", "status 3"]),
        (SCRIPT + "os._exit(3)", ["died", "status 3"]),
    ],
)
def test_server_that_fails(tmp_path, script, words):
    """A server that does not start, or dies, is named with its status."""
    path = tmp_path / "broken.py"
    path.write_text(script)
    result = run_client("--server", path, "--timeout", 20)
    check_failure(result, "broken.py", *words)


def test_server_that_ends_badly(tmp_path):
    """A server that talks well but ends with a status that is not 0 fails."""
    text = (SERVERS_DIR / SCRIPTS["kqueue"]).read_text()
    path = tmp_path / "ends_badly.py"
    path.write_text(text.replace("    main()\n", "    main()\n    sys.exit(5)\n"))
    result = run_client("--server", path)
    check_failure(result, "ends_badly.py", "exit status 5")


def test_different_transcripts(tmp_path):
    """Two servers that reply differently, both rightly, are told apart."""
    text = (SERVERS_DIR / SCRIPTS["kqueue"]).read_text()
    path = tmp_path / "other.py"
    path.write_text(text.replace('return b"+OK\\r\\n"', 'return b"+Ok\\r\\n"'))
    assert path.read_text() != text
    result = run_client(*servers("kqueue"), "--server", path)
    check_failure(result, "SET", "+Ok")
