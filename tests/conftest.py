"""What the tests share: servers as processes, clients as plain sockets.

The servers stand one folder up, or in the folder that the environment
variable SERVERS_DIR names. Break a copy there, and see which test finds it.
"""

import itertools
import os
import random
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SERVERS_DIR = Path(os.environ.get("SERVERS_DIR") or HERE.parent).resolve()
SCRIPTS = {
    "single": "1_single_blocking.py",
    "multi": "2_multi_blocking.py",
    "busy": "3_busy_wait.py",
    "kqueue": "4_kqueue_loop.py",
}
MANY = ["multi", "busy", "kqueue"]  # those that serve many clients at once
PATIENCE = 30  # seconds; what has not come by then does not come
PROC = Path("/proc/self/fdinfo").exists()

needs_proc = pytest.mark.skipif(not PROC, reason="looks into Linux's /proc")
needs_prlimit = pytest.mark.skipif(
    not (PROC and hasattr(resource, "prlimit")),
    reason="changes the limits of a running process, with Linux's prlimit",
)
many = pytest.mark.parametrize("name", MANY)


def wait_for(condition, what, patience=PATIENCE):
    """Wait until condition() is true; return what it returned."""
    end = time.monotonic() + patience
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > end:
            pytest.fail(f"waited {patience} seconds in vain: {what}")
        time.sleep(0.01)


# ---- Bytes ------------------------------------------------------------------


def array(*words):
    """Return a request as an array of bulk strings."""
    parts = [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
    return b"*%d\r\n%b" % (len(words), b"".join(parts))


def bulk(value):
    """Return the reply that carries `value`."""
    return b"$%d\r\n%b\r\n" % (len(value), value)


def read_exactly(sock, size):
    """Read `size` bytes, or less if the other side closes before."""
    data = bytearray()
    while len(data) < size:
        chunk = sock.recv(min(size - len(data), 1 << 20))
        if not chunk:
            break
        data += chunk
    return bytes(data)


def read_to_end(sock):
    """Read until the other side closes."""
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def read_bulk(sock):
    """Read a bulk string, and not a byte more."""
    header = b""
    while not header.endswith(b"\n"):
        byte = sock.recv(1)
        assert byte, f"the server closed after {header!r}"
        header += byte
    assert header.startswith(b"$"), header
    return read_exactly(sock, int(header[1:]) + 2)[:-2]


def talk(sock, request, reply):
    """Send a request, and check that exactly this reply comes."""
    sock.sendall(request)
    assert read_exactly(sock, len(reply)) == reply


def ping(sock):
    """Check that this connection is alive and served."""
    talk(sock, b"PING\r\n", b"+PONG\r\n")


def exchange(sock, *pieces):
    """Send the pieces, say that this was all, and read to the end."""

    def send():
        try:
            for piece in pieces:
                sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)
        except OSError:  # the server has closed; its replies tell why
            pass

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    replies = read_to_end(sock)
    sender.join(PATIENCE)
    return replies


def is_readable(sock, seconds=0):
    """Return whether something came from the server: bytes, or the end."""
    return bool(select.select([sock], [], [], seconds)[0])


def is_over(sock):
    """Return whether the server has ended this connection, and said nothing.

    Never waits.
    """
    if not is_readable(sock):
        return False
    try:
        data = sock.recv(1)
    except ConnectionError:
        return True
    assert data == b"", data
    return True


def reset(sock):
    """Close so that the server gets a reset instead of an end of file."""
    linger = struct.pack("ii", 1, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    sock.close()


# ---- Servers ----------------------------------------------------------------

RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(name, options, folder=SERVERS_DIR, prelude=""):
    """Return the command that starts a script, after `prelude` if given."""
    script = [str(folder / SCRIPTS[name]), *map(str, options)]
    return [
        sys.executable,
        *(["-c", prelude + RUN] if prelude else []),
        *script,
    ]


def run_to_end(name, *options, **more):
    """Run a script that is expected to end by itself."""
    return subprocess.run(
        command(name, options, **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
        text=True,
    )


class Ended:
    """How a server has ended."""

    def __init__(self, server, seconds):
        self.returncode = server.process.returncode
        self.stdout = server.stdout()
        self.stderr = server.stderr()
        self.seconds = seconds

    def check(self):
        """It ended as it must: status 0, the tally, no traceback."""
        assert "Traceback" not in self.stderr, self.stderr
        assert self.returncode == 0, self.stderr
        for field in "pattern", "threads", "used_cpu_user", "used_cpu_sys":
            assert re.search(rf"^{field}: .", self.stdout, re.M), self.stdout


class Server:
    """A script that runs as a process of its own, on a free port."""

    def __init__(
        self, name, *options, preexec=None, shell=None, env=None, **more
    ):
        self.name = name
        self.sockets = []
        self.ended = None
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        line = command(name, ["--port", 0, *options], **more)
        self.process = subprocess.Popen(
            line if shell is None else ["sh", "-c", shell, *line],
            stdin=subprocess.DEVNULL,
            stdout=self.out,
            stderr=self.err,
            preexec_fn=preexec,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # so that all of it can be killed
        )
        self.pid = self.process.pid
        where = wait_for(self.where, f"{name} says where it listens")
        self.host, self.port = where[1], int(where[2])

    def where(self):
        found = re.search(r"listening on (\S+):(\d+)\n", self.stdout())
        if not found and self.process.poll() is not None:
            pytest.fail(f"{self.name} did not start: {self.stderr()}")
        return found

    # The file's position is shared with the process, so pread() it must be.
    def stdout(self):
        return os.pread(self.out.fileno(), 1 << 20, 0).decode()

    def stderr(self):
        return os.pread(self.err.fileno(), 1 << 20, 0).decode()

    def connect(self, receive_buffer=None, patience=PATIENCE):
        """Return a new connection."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        sock = socket.socket(family)
        self.sockets.append(sock)
        sock.settimeout(patience)
        if receive_buffer:
            what = socket.SOL_SOCKET, socket.SO_RCVBUF
            sock.setsockopt(*what, receive_buffer)
        sock.connect((self.host, self.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def ask(self, *pieces):
        """Return all that the server replies on a connection of its own."""
        with self.connect() as sock:
            return exchange(sock, *pieces)

    def ping(self):
        """Check that a new client is served."""
        assert self.ask(b"PING\r\n") == b"+PONG\r\n"

    def info(self, sock=None):
        """Return what INFO says, as a dict of strings."""
        if sock is None:
            with self.connect() as sock:
                return self.info(sock)
        sock.sendall(b"INFO\r\n")
        lines = read_bulk(sock).decode().splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def cpu(self, sock=None):
        """Return the seconds of CPU that the process has used, from INFO."""
        info = self.info(sock)
        return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])

    def proc(self, path):
        return Path(f"/proc/{self.pid}/{path}")

    def proc_cpu(self):
        """The same from /proc, which takes no connection."""
        fields = self.proc("stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self, name="VmRSS"):
        """Return a figure of /proc/PID/status, in bytes."""
        status = self.proc("status").read_text()
        return int(re.search(rf"{name}:\s*(\d+) kB", status)[1]) * 1024

    def threads(self):
        """Return how many threads the kernel knows, or the server itself."""
        if PROC:
            return len(os.listdir(self.proc("task")))
        return int(self.info()["threads"])

    def descriptors(self):
        """Return how many descriptors are open (0 where nobody can tell)."""
        return len(os.listdir(self.proc("fd"))) if PROC else 0

    def wait_until_left(self, baseline=None):
        """Wait until nothing of former connections is left behind."""

        def left():
            return (self.threads(), self.descriptors()) == baseline

        baseline = baseline or self.baseline
        wait_for(left, f"threads and descriptors are {baseline} again")

    def remember_baseline(self):
        """Take down what the server holds with nobody connected."""
        self.ping()  # what it opens once, it has opened now
        if self.name == "multi":
            wait_for(lambda: self.threads() == 1, "the thread is gone")
        previous = None
        while previous != (self.threads(), self.descriptors()):
            previous = self.threads(), self.descriptors()
            time.sleep(0.02)
        self.baseline = previous

    def stop(self, *signals):
        """End it with signals (SIGTERM if none is given)."""
        started = time.monotonic()
        for number in signals or [signal.SIGTERM]:
            os.kill(self.pid, number)
        return self.wait(started)

    def wait(self, started=None):
        started = started or time.monotonic()
        self.process.wait(PATIENCE)
        self.ended = Ended(self, time.monotonic() - started)
        return self.ended

    def close_clients(self):
        for sock in self.sockets:
            sock.close()

    def kill(self):
        self.close_clients()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.out.close()
        self.err.close()


def serve(server):
    """Lend a server to a test; then see that it ends as it must."""
    yield server
    server.close_clients()
    if server.ended is None:
        server.stop().check()


# ---- Fixtures ---------------------------------------------------------------


@pytest.fixture(params=SCRIPTS)
def name(request):
    """Each of the four in turn."""
    return request.param


@pytest.fixture
def start():
    """Start a server by name, with options. In the end all are killed."""
    servers = []

    def start(*args, **more):
        servers.append(Server(*args, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def server(name, start):
    """A server of one's own, which must end well."""
    server = start(name)
    yield from serve(server)


@pytest.fixture(scope="module", params=SCRIPTS)
def shared(request):
    """A server that the tests of a module share, one name after the other."""
    server = Server(request.param)
    try:
        yield from serve(server)
    finally:
        server.kill()


@pytest.fixture
def rng(request):
    """A source of random choices, the same in every run."""
    return random.Random(request.node.name)


_keys = itertools.count()


@pytest.fixture
def key():
    """A key that no other test uses, always of the same length."""
    return b"key%05d" % next(_keys)


# ---- What the tests have counted --------------------------------------------

_notes = []


@pytest.fixture
def note(record_property):
    """Have a count printed at the end of the run."""

    def note(name, value):
        record_property(name, value)
        _notes.append(f"{name}: {value}")

    return note


def pytest_terminal_summary(terminalreporter):
    for line in _notes:
        terminalreporter.write_line(line)
