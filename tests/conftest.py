"""What the tests share: servers as processes, clients as plain sockets.

The servers stand one folder up, or in the folder that the environment
variable SERVERS_DIR names. Break a copy there, and see which test finds it.
"""

import contextlib
import importlib.util
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
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
FREE = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # free-threaded

# A shell's "&" has SIGINT ignored, and so would be all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

needs_proc = pytest.mark.skipif(not PROC, reason="looks into Linux's /proc")
many = pytest.mark.parametrize("name", MANY)
slow = pytest.mark.skipif("SLOW" not in os.environ, reason="runs in test-all")


def slowly(value):
    """Return a value for a test that takes long with it."""
    return pytest.param(value, marks=slow)


def wait_for(condition, what, patience=PATIENCE):
    """Wait until condition() is true; return what it returned."""
    end = time.monotonic() + patience
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > end:
            pytest.fail(f"waited {patience} seconds in vain: {what}")
        time.sleep(0.005)


def together(function, *items):
    """Call function(item) for all items at the same time.

    Returns what they returned. Raises the first error that one has raised.
    """
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(function, items))


def run(*command, data=b"", encoding="utf-8", cwd=None, **env):
    """Run a program to its end; return its status, stdout and stderr.

    It gets `data` on stdin. A traceback is a failure.
    """
    ended = subprocess.run(
        list(map(str, command)),
        input=data,
        capture_output=True,
        timeout=LIMIT,
        cwd=cwd,
        env={**os.environ, "PYTHONIOENCODING": encoding, **env},
    )
    out, err = ended.stdout.decode(encoding), ended.stderr.decode(encoding)
    assert "Traceback" not in err, err[-2000:]
    return ended.returncode, out, err


def needs(program):
    """Skip the test if a program is not installed."""
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")


def text_of(name):
    return (SERVERS_DIR / SCRIPTS[name]).read_text(encoding="utf-8")


def load(name):
    """Import a script, whose name begins with a digit, from its path."""
    path = SERVERS_DIR / SCRIPTS[name]
    spec = importlib.util.spec_from_file_location(f"server_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def array(*words):
    """Return a request as an array of bulk strings."""
    return b"*%d\r\n%b" % (len(words), b"".join(map(bulk, words)))


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


def talk(sock, request, reply):
    """Send a request, and check that exactly this reply comes."""
    sock.sendall(request)
    assert read_exactly(sock, len(reply)) == reply


def ping(sock):
    """Check that this connection is alive and served."""
    talk(sock, b"PING\r\n", b"+PONG\r\n")


def send_what_fits(sock, data, patience=0.2):
    """Send until there is no room for more; return how much was sent."""
    view, sent = memoryview(data), 0
    with contextlib.suppress(ConnectionError):
        while sent < len(data) and select.select([], [sock], [], patience)[1]:
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


def bytes_in(sock, queue=termios.FIONREAD):
    """Return how many bytes wait to be read, or, with TIOCOUTQ, to be sent."""
    return struct.unpack("i", ioctl(sock, queue, bytes(4)))[0]


def arrived(sock):
    """Wait until all that was sent is with the server (Linux can tell)."""
    if PROC:
        wait_for(lambda: not bytes_in(sock, termios.TIOCOUTQ), "it arrives")


def reset(sock):
    """Close so that the server gets a reset instead of an end of file."""
    linger = struct.pack("ii", 1, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    sock.close()


# ---- Servers ----------------------------------------------------------------


def command(name, *options, prelude=""):
    """Return the command that starts a script, after `prelude` if given."""
    run = "\nimport runpy, sys; del sys.argv[0]"
    run += "\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    before = ["-c", prelude + run] if prelude else []
    script = SERVERS_DIR / SCRIPTS[name]
    return [sys.executable, *before, str(script), *map(str, options)]


class Server:
    """A script that runs as a process of its own, on a free port."""

    def __init__(self, name, *options, shell=None, env=(), prelude=""):
        """Start it. `shell` is a script for sh that runs it: "$0" "$@"."""
        self.name = name
        self.sockets = []
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        line = command(name, "--port", 0, *options, prelude=prelude)
        self.process = subprocess.Popen(
            line if shell is None else ["sh", "-c", shell, *line],
            stdin=subprocess.DEVNULL,
            stdout=self.out,
            stderr=self.err,
            env={**os.environ, **dict(env)},
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

    def connect(self, receive_buffer=None):
        """Return a new connection."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        sock = socket.socket(family)
        self.sockets.append(sock)
        sock.settimeout(PATIENCE)
        if receive_buffer:
            what = socket.SOL_SOCKET, socket.SO_RCVBUF
            sock.setsockopt(*what, receive_buffer)
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
        """Check that a new client is served."""
        assert self.ask(b"PING\r\n") == b"+PONG\r\n"

    def info(self, sock=None):
        """Return what INFO says, as a dict of strings."""
        if sock is None:
            with self.connect() as sock:
                return self.info(sock)
        sock.sendall(b"INFO\r\n")
        with sock.makefile("rb") as replies:
            size = int(replies.readline()[1:])
            lines = replies.read(size + 2).decode().split("\r\n")
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def proc(self, path):
        return Path(f"/proc/{self.pid}/{path}")

    def memory(self, name="VmHWM"):
        """Return a figure of /proc/PID/status, in bytes; the peak, if none."""
        status = self.proc("status").read_text()
        return int(re.search(rf"{name}:\s*(\d+) kB", status)[1]) * 1024

    def held(self):
        """Return how many threads and descriptors the server has."""
        if not PROC:
            return int(self.info()["threads"]), None
        return tuple(len(os.listdir(self.proc(d))) for d in ("task", "fd"))

    def held_at_rest(self):
        """Return the same with nobody connected."""
        self.ping()  # what it opens once, it has opened now
        if self.name == "multi":
            wait_for(lambda: self.held()[0] == 1, "the thread is gone")
        return self.held()

    def nonblocking(self):
        """Return whether it is O_NONBLOCK, for each socket."""
        links = self.proc("fd").iterdir()
        socks = [s for s in links if os.readlink(s).startswith("socket:")]
        texts = [self.proc(f"fdinfo/{s.name}").read_text() for s in socks]
        flags = [re.search(r"flags:\s*([0-7]+)", text)[1] for text in texts]
        return [bool(int(flag, 8) & os.O_NONBLOCK) for flag in flags]

    def stop(self):
        """End it with Ctrl-C: status 0, the tally once, no traceback.

        A signal that comes just before a call sleeps is seen when the call
        returns. Then it takes another one.
        """
        for patience in 10, 10, PATIENCE:
            if self.process.poll() is None:
                os.kill(self.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(patience)
        assert "Traceback" not in self.stderr(), self.stderr()
        assert self.process.returncode == 0, self.stderr()
        assert self.stdout().count("pattern:") == 1
        return self

    def tally(self):
        """Return what it has printed at Ctrl-C, as a dict of strings."""
        lines = self.stdout().splitlines()[1:]
        return dict(line.split(":", 1) for line in lines)

    def kill(self):
        for sock in self.sockets:
            sock.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.out.close()
        self.err.close()


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
    """A server of one's own; if it runs at the end, Ctrl-C must end it."""
    server = start(name)
    yield server
    for sock in server.sockets:
        sock.close()
    if server.process.poll() is None:
        server.stop()
