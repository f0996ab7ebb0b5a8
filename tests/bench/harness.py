"""What the tools share: starting a server, asking it, ending tidily.

Each tool beside it is one make target: compare, trace, pictures, scale, bench,
syscalls. What client.py has as well is taken from there.
"""

import contextlib
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from client import (  # noqa: E402, F401
    MOST_LINES,
    TALKS,
    WAITS,
    Crowd,
    Failed,
    raise_descriptor_limit,
    results,
    started,
    table,
)

SCRIPTS = {
    "1 single blocking": "1_single_blocking.py",
    "2 multi blocking": "2_multi_blocking.py",
    "3 busy wait": "3_busy_wait.py",
    "4 kqueue loop": "4_kqueue_loop.py",
}
LOOP = "4 kqueue loop"
TIMEOUT = 20  # seconds for a server to start in, to stop in, to answer in


# ---- Servers ----------------------------------------------------------------


def start(name):
    """Return one of the four servers, to be used in a `with` statement."""
    return started(os.path.relpath(ROOT / SCRIPTS[name]), TIMEOUT)


def running(*command):
    """Return a server that a whole command starts, for a `with` statement."""
    script = next(word for word in command if word.endswith(".py"))
    return started(script, TIMEOUT, command)


def encode(*words):
    """Return a request in RESP, Redis's protocol: an array of bulk strings."""
    parts = [b"$%d\r\n%b\r\n" % (len(w), w) for w in map(str.encode, words)]
    return b"*%d\r\n%b" % (len(words), b"".join(parts))


class Line:
    """A connection to a server, for one question at a time.

    It waits for `patience` seconds, for the connection and for each reply:
    then socket.timeout is raised. Other OSErrors come through, too.
    """

    def __init__(self, server, patience=TIMEOUT):
        address = server.host, server.port
        self.socket = socket.create_connection(address, patience)
        self.replies = self.socket.makefile("rb")
        self.asked = 0.0  # when, by time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        self.replies.close()
        self.socket.close()

    def send(self, *words):
        """Ask, and do not wait for the reply."""
        self.asked = time.monotonic()
        self.socket.sendall(encode(*words))

    def reply(self):
        """Return the next reply, as the bytes that came."""
        reply = self.replies.readline()
        if reply.startswith(b"$") and reply != b"$-1\r\n":
            reply += self.replies.read(int(reply[1:]) + 2)
        if not reply.endswith(b"\r\n"):
            raise Failed("a server closed a connection and owed it a reply")
        return reply

    def ask(self, *words):
        """Send a request, and return its reply."""
        self.send(*words)
        return self.reply()

    def info(self):
        """Return what the server says of itself, as {name: text}."""
        return parse_info(self.ask("INFO"))


def parse_info(reply):
    """Return what a reply to INFO says, as {name: text}; {} if nothing."""
    lines = reply.decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def cpu_time(info):
    """Return the seconds of CPU time that a server says it has used."""
    return figure(info, "used_cpu_user", "used_cpu_sys")


def figure(info, *names):
    """Return the sum of some figures of INFO. Failed if one is missing."""
    try:
        return sum(float(info[name]) for name in names)
    except (KeyError, ValueError):
        raise Failed(f"INFO does not tell {' and '.join(names)}") from None


def memory(server):
    """Return the bytes of memory that a server's process takes now.

    Returns None where nobody can tell.
    """
    pid = str(server.pid)
    with contextlib.suppress(OSError, IndexError):  # on Linux
        with open(f"/proc/{pid}/status") as status:
            return int(status.read().split("VmRSS:")[1].split()[0]) * 1024
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        command = ["ps", "-o", "rss=", "-p", pid]
        devnull = subprocess.DEVNULL
        return int(subprocess.check_output(command, stderr=devnull)) * 1024
    return None


# ---- A tool's frame ---------------------------------------------------------


def machine():
    """Return a line of text: where the figures come from."""
    return (
        f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, "
        f"{platform.python_implementation()} {platform.python_version()}"
    )


def sample(things):
    """Return things to draw, evenly spread, or all if they are few."""
    return things[:: (len(things) - 1) // MOST_LINES + 1]


def write(path, lines):
    """Write lines of text to a file, in a folder that is made if need be."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise Failed(f"cannot write {path}: {error.strerror}") from None


def dumb():
    """Return whether stdout or its reader wants no colours, no escapes."""
    wish = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return bool(wish or not (sys.stdout and sys.stdout.isatty()))


def progress(text=""):
    """Show how far it is, on one line, if somebody is watching."""
    if sys.stderr and sys.stderr.isatty() and not dumb():
        print(f"\r{text:78.78}", end="\r", file=sys.stderr, flush=True)


def run(main):
    """Run a tool. What goes wrong is one sentence, and no server stays."""
    name = os.path.basename(sys.argv[0])
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Failed, OSError, OverflowError) as error:
        progress()
        sys.exit(f"{name}: {error}")
