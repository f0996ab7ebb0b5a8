"""What the tests share: servers as processes, clients as plain sockets.

SERVERS_DIR in the environment names other servers: break them, and see.
"""

import contextlib
import importlib
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from fcntl import ioctl
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
LIMIT = 120  # seconds for a program that runs to its end, on a loaded machine
PROC = Path("/proc/self/fdinfo").exists()

sys.path[:0] = str(SERVERS_DIR), str(HERE.parent)  # the second has client.py
# Who ends the tests ends their servers. And a shell's "&" has SIGINT ignored.
for number in signal.SIGTERM, signal.SIGINT:
    signal.signal(number, signal.default_int_handler)

needs_proc = pytest.mark.skipif(not PROC, reason="looks into Linux's /proc")


def slowly(value):
    when = pytest.mark.skipif("SLOW" not in os.environ, reason="in test-all")
    return pytest.param(value, marks=when)


def wait_for(condition, what, patience=PATIENCE):
    """Wait until condition() is true; return what it returned."""
    end = time.monotonic() + patience
    while not (result := condition()):
        if time.monotonic() > end:
            pytest.fail(f"waited {patience} seconds in vain: {what}")
        time.sleep(0.005)
    return result


def together(function, *items):
    """Call function(item) for all items at once; return what they return."""
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(function, items))


def run(*command, data=b"", encoding="utf-8", cwd=None, **env):
    """Run a program, with `data` on stdin; return status, stdout, stderr."""
    env = {**os.environ, "PYTHONIOENCODING": encoding, **env}
    more = {"capture_output": True, "timeout": LIMIT, "cwd": cwd, "env": env}
    ended = subprocess.run(list(map(str, command)), input=data, **more)
    out, err = ended.stdout.decode(encoding), ended.stderr.decode(encoding)
    assert "Traceback" not in err, err[-2000:]
    return ended.returncode, out, err


def needs(program):
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")


def text_of(name):
    return (SERVERS_DIR / SCRIPTS[name]).read_text(encoding="utf-8")


def load(name):
    """Import a script, whose name begins with a digit."""
    return importlib.import_module(SCRIPTS[name][:-3])


def array(*words):
    return b"*%d\r\n%b" % (len(words), b"".join(map(bulk, words)))


def bulk(value):
    return b"$%d\r\n%b\r\n" % (len(value), value)


def read_exactly(sock, size):
    """Read `size` bytes, or less if the other side closes before."""
    data = bytearray()
    while len(data) < size and (chunk := sock.recv(size - len(data))):
        data += chunk
    return bytes(data)


def read_to_end(sock):
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def talk(sock, request, reply):
    """Send a request, and check that exactly this reply comes."""
    sock.sendall(request)
    assert read_exactly(sock, len(reply)) == reply


def ping(sock):
    talk(sock, b"PING\r\n", b"+PONG\r\n")


def send_what_fits(sock, data):
    """Send until there is no room for more; return how much was sent."""
    view, sent = memoryview(data), 0
    with contextlib.suppress(ConnectionError):
        while sent < len(data) and select.select([], [sock], [], 0.2)[1]:
            sent += sock.send(view[sent:], socket.MSG_DONTWAIT)
    return sent


def is_readable(sock, seconds=0):
    """Return whether something came from the server: bytes, or the end."""
    return bool(select.select([sock], [], [], seconds)[0])


def is_over(sock):
    """Return whether the server has ended this connection. Never waits."""
    try:
        return is_readable(sock) and not sock.recv(1, socket.MSG_PEEK)
    except ConnectionError:
        return True


def arrived(sock):
    """Wait until all that was sent is with the server (Linux can tell)."""
    ask = sock, termios.TIOCOUTQ, bytes(4)
    wait_for(lambda: not PROC or not any(ioctl(*ask)), "it arrives")


def reset(sock):
    """Close so that the server gets a reset instead of an end of file."""
    linger = struct.pack("ii", 1, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    sock.close()


# ---- Servers ----------------------------------------------------------------


def command(name, *options, prelude=""):
    """Return the command that starts a script, after `prelude` if given."""
    script = [SERVERS_DIR / SCRIPTS[name]]
    if prelude:
        script = ["-c", f"{prelude}\n{text_of(name)}"]
    return list(map(str, [sys.executable, *script, *options]))


def played(log):
    """Return a prelude for the kqueue that fake_kqueue.py plays."""
    path = f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
    return path + f"import fake_kqueue; fake_kqueue.install({str(log)!r})\n"


def figures(text):
    """Return the lines "name:value" of a text, as a dict of strings."""
    return dict(re.findall(r"^(\w+):(.*?)\r?$", text, re.M))


class Server:
    """A script that runs as a process of its own, on a free port."""

    def __init__(self, name, *options, shell=None, prelude=""):
        """Start it. `shell` is a script for sh that runs it: "$0" "$@"."""
        self.name, self.sockets = name, []
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        line = command(name, "--port", 0, *options, prelude=prelude)
        self.process = subprocess.Popen(
            line if shell is None else ["sh", "-c", shell, *line],
            stdin=subprocess.DEVNULL,
            stdout=self.out,
            stderr=self.err,
            start_new_session=True,  # so that all of it can be killed
        )
        self.pid = self.process.pid
        where = wait_for(self.where, f"{name} says where it listens")
        self.host, self.port = where[1], int(where[2])

    def where(self):
        assert self.process.poll() is None, self.stderr()
        return re.search(r"listening on (\S+):(\d+)\n", self.stdout())

    # The file's position is shared with the process, so pread() it must be.
    def stdout(self):
        return os.pread(self.out.fileno(), 1 << 20, 0).decode()

    def stderr(self):
        return os.pread(self.err.fileno(), 1 << 20, 0).decode()

    def connect(self, buffer=None):
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        sock = socket.socket(family)
        self.sockets.append(sock)
        sock.settimeout(PATIENCE)
        if buffer:  # bytes that are taken in before they are read
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.connect((self.host, self.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def ask(self, request):
        """Return all that the server replies on a connection of its own."""
        with self.connect() as sock:
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
            return read_to_end(sock)

    def ping(self):
        assert self.ask(b"PING\r\n") == b"+PONG\r\n"

    def info(self, sock=None):
        """Return what INFO says, as a dict of strings."""
        if not sock:
            return figures(self.ask(b"INFO\r\n").decode())
        sock.sendall(b"INFO\r\n")
        with sock.makefile(newline="") as replies:
            size = int(replies.readline()[1:])
            return figures(replies.read(size + 2))

    def proc(self, path):
        return Path(f"/proc/{self.pid}/{path}")

    def memory(self, name="VmHWM"):
        """Return a figure of /proc/PID/status, in bytes; the peak, if none."""
        status = self.proc("status").read_text()
        return int(re.search(rf"{name}:\s*(\d+) kB", status)[1]) * 1024

    def held(self):
        """Return how many threads and descriptors the server has."""
        if not PROC:
            asking = 1 if self.name == "multi" else 0
            return int(self.info()["threads"]) - asking, None
        return tuple(len(os.listdir(self.proc(d))) for d in ("task", "fd"))

    def held_at_rest(self):
        self.ping()  # what it opens once, it has opened now
        if self.name == "multi":
            wait_for(lambda: self.held()[0] == 1, "the thread is gone")
        return self.held()

    def nonblocking(self):
        """Return whether it is O_NONBLOCK, for each socket."""
        links = self.proc("fd").iterdir()
        socks = [link.name for link in links if "socket:" in os.readlink(link)]
        texts = [self.proc(f"fdinfo/{sock}").read_text() for sock in socks]
        flags = [int(re.search(r"flags:\s*(\d+)", t)[1], 8) for t in texts]
        return [bool(flag & os.O_NONBLOCK) for flag in flags]

    def stop(self):
        """End it with Ctrl-C: status 0, the tally once, no traceback."""
        # A signal just before a call that sleeps is seen when it returns.
        for patience in 10, 10, PATIENCE:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.send_signal(signal.SIGINT)  # unless it has ended
                self.process.wait(patience)
        assert "Traceback" not in self.stderr(), self.stderr()
        assert self.process.returncode == 0, self.stderr()
        assert self.stdout().count("pattern:") == 1
        return self

    def leave(self):
        for sock in self.sockets:
            sock.close()

    def kill(self):
        self.leave()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.out.close()
        self.err.close()


def clients(server, count):
    """Connect, and be served as far as the pattern serves."""
    socks = [server.connect() for _ in range(count)]
    for sock in socks if server.name in MANY else socks[:1]:
        ping(sock)
    return socks


@contextlib.contextmanager
def frozen(server):
    """Stop the server, so that what happens meanwhile comes all at once."""
    os.kill(server.pid, signal.SIGSTOP)
    os.waitpid(server.pid, os.WUNTRACED)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


@pytest.fixture(params=SCRIPTS)
def name(request):
    return request.param


@pytest.fixture
def start(request):
    """Start a server by name, with options. In the end all are killed."""

    def start(*args, **more):
        server = Server(*args, **more)
        request.addfinalizer(server.kill)
        return server

    return start


@pytest.fixture
def server(name, start):
    """Each of the four; if it runs at the end, Ctrl-C must end it."""
    server = start(name)
    yield server
    server.leave()
    if server.process.poll() is None:
        server.stop()
