"""What the benches share: to start a server, to ask it, to end tidily."""

import contextlib
import os
import platform
import signal
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from client import (  # noqa: E402, F401
    Failed,
    Server,
    figure,
    encode,
    glyphs,
    parse_info,
    raise_descriptor_limit,
    write,
)

SCRIPTS = {
    "1 single blocking": "1_single_blocking.py",
    "2 multi blocking": "2_multi_blocking.py",
    "3 busy wait": "3_busy_wait.py",
    "4 kqueue loop": "4_kqueue_loop.py",
}
LOOP = "4 kqueue loop"
TIMEOUT = 20  # seconds for a server to start in, to stop in, to answer in


def running(*command):
    """Return a server that a whole command starts, for a `with` statement."""
    script = next(word for word in command if word.endswith(".py"))
    return Server(script, TIMEOUT, command)


def start(name):
    """Return one of the four servers, to be used in a `with` statement."""
    return Server(os.path.relpath(ROOT / SCRIPTS[name]), TIMEOUT)


def connect(server):
    """Open a connection to a server."""
    return socket.create_connection((server.host, server.port), TIMEOUT)


def ask(connection, *words):
    """Send a request; return its reply, as the bytes that came."""
    connection.sendall(encode(*words))
    with connection.makefile("rb") as stream:
        reply = stream.readline()
        if reply[:1] == b"$" and reply != b"$-1\r\n":
            reply += stream.read(int(reply[1:]) + 2)
    if not reply.endswith(b"\r\n"):
        raise Failed("the server closed a connection and owed it a reply")
    return reply


def ask_info(connection):
    """Return what a server says of itself, as {name: text}."""
    return parse_info(ask(connection, "INFO"))


def cpu_time(info):
    """Return the seconds of CPU time that a server says it has used."""
    return figure(info, "used_cpu_user", "used_cpu_sys")


def machine():
    """Return a line of text: where the figures come from."""
    return (
        f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, "
        f"{platform.python_implementation()} {platform.python_version()}"
    )


def progress(text):
    """Show how far it is, on one line, if somebody is watching."""
    if sys.stderr.isatty():
        print(f"\r{text:78.78}", end="\r", file=sys.stderr, flush=True)


def run(main):
    """Run a bench. What goes wrong is one sentence, and no server stays."""
    name = os.path.basename(sys.argv[0])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except Failed as failure:
        progress("")
        sys.exit(f"{name}: {failure}")
    except OSError as error:
        progress("")
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        if isinstance(error, BrokenPipeError):  # our reader may have gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        progress("")
        sys.exit(130)
