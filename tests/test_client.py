"""client.py: its drawings, its checks, and what it says if things go wrong.

SERVERS_DIR in the environment names other servers to test it with.
"""

import contextlib
import fcntl
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
from pathlib import Path

import pytest
from fake_server import right, spoiled, start

ROOT = Path(__file__).resolve().parents[1]
SERVERS = Path(os.environ.get("SERVERS_DIR") or ROOT).resolve()
ALL = sorted(SERVERS.glob("[1-4]_*.py"))
KQUEUE = SERVERS / "4_kqueue_loop.py"
LIMIT = 100  # seconds for a run of the client, on a loaded machine
CLIENT = [sys.executable, str(ROOT / "client.py")]
sys.path.insert(0, str(ROOT))

import client  # noqa: E402


def run_client(*options, before=(), encoding="utf-8"):
    """Run client.py to its end; it must not end in a traceback."""
    result = subprocess.run(
        [*before, *CLIENT, *map(str, options)],
        capture_output=True,
        encoding=encoding,
        timeout=LIMIT,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert "Traceback" not in result.stderr, result.stderr[-2000:]
    return result


def visit(port, **options):
    """Visit a server from here; return its Crowd."""
    usual = {"connections": 8, "requests": 4, "think": 0, "timeout": LIMIT}
    options = types.SimpleNamespace(**{**usual, **options})
    crowd = client.Crowd("127.0.0.1", port, options)
    crowd.run()
    return crowd


def check_failure(result, *words):
    """The run failed, and says so in one line that contains the words."""
    assert result.returncode > 0, result.stdout
    assert result.stderr.count("\n") == 1, result.stderr[-2000:]
    assert all(word in result.stderr for word in words), result.stderr


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
    result = run_client(*options)
    assert result.returncode == 0, result.stderr
    output = result.stdout
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
    result = run_client(*options, encoding="ascii")
    assert result.returncode == 0, result.stderr
    scale, rows = drawings_of(result.stdout, ".#")[0]
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


@pytest.mark.parametrize(
    "line", ["threads:0", "used_cpu_user:nan", "polls:x", "a:9"]
)
def test_wrong_info(fake, line):
    """INFO that cannot be true is one sentence, which names it."""
    lines = "threads:1\r\nused_cpu_user:1\r\nused_cpu_sys:1\r\n" + line
    reply = b"$%d\r\n\r\n%b\r\n" % (len(lines) + 2, lines.encode())
    result = run_client("--port", fake(spoiled(b"INFO", reply)))
    if line == "a:9":  # what it does not know is no mistake
        assert result.returncode == 0, result.stderr
    else:
        check_failure(result, line.split(":")[0])


@pytest.mark.parametrize("begin", [b"$99999999999\r\n", b"$"])
def test_endless_reply(fake, begin):
    """A reply without an end fails at once, and fills no memory."""

    def endless(words):
        yield begin
        while True:
            yield b"7" * 65536

    code = (
        "import resource, subprocess, sys; subprocess.call(sys.argv[1:]);"
        "print('size', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    before = sys.executable, "-c", code
    result = run_client("--port", fake(endless), before=before)
    assert "too long" in result.stderr and result.stderr.count("\n") == 1
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    assert int(result.stdout.split("size")[1]) * unit < 200 * 2**20


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


@pytest.mark.parametrize(
    "code",
    [
        "print('listening on nonsense')",
        "print('listening on 127.0.0.1:x')",
        "while True: print(end='x' * 9999)",
        "import time; time.sleep(50)",
    ],
)
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


def test_server_ends_badly(tmp_path):
    """A server that stops with another status than 0 is named."""
    code = "end = os._exit; os._exit = lambda status: end(5)"
    script = wrapped(tmp_path, code)
    with pytest.raises(client.Failed, match="wrapped.py stopped.* 5"):
        with client.Server(str(script), LIMIT):
            pass


def test_different_transcripts(tmp_path):
    """Two servers that reply differently are told apart, with a diff."""
    script = tmp_path / "other.py"
    script.write_text(KQUEUE.read_text().replace('b"+OK', 'b"+Ok'))
    result = run_client("--server", KQUEUE, "--server", script)
    check_failure(result, "other.py", KQUEUE.name)
    assert re.search("^-client 1: SET .*OK", result.stdout, re.M)
    assert re.search("^[+]client 1: SET .*Ok", result.stdout, re.M)


def test_ended_from_outside(tmp_path):
    """Whoever ends the client ends the server that it has started."""
    note = tmp_path / "pid"
    code = f"os.symlink(str(os.getpid()), {str(note)!r})"  # in one step
    script = wrapped(tmp_path, code)
    command = [*CLIENT, "--server", str(script), "--think", "50"]
    with subprocess.Popen(command) as process:
        end = time.monotonic() + LIMIT
        while not note.is_symlink() and time.monotonic() < end:
            time.sleep(0.01)
        process.terminate()
    assert process.returncode == 128 + 15
    with pytest.raises(ProcessLookupError):
        os.kill(int(os.readlink(note)), 0)


@pytest.mark.parametrize(
    "options, word",
    [
        (["--host", "nonsense.invalid"], "nonsense.invalid"),
        (["--port", "1"], "127.0.0.1:1"),
        (["--port", "99999"], "99999"),
        (["--connections", "0"], "--connections"),
        (["--think", "nan"], "--think"),
        (["--transcript", "a", "--transcript", "b"], "--transcript"),
    ],
)
def test_nonsense(options, word):
    """Nonsense on the command line is named, in one line."""
    check_failure(run_client(*options), word)
