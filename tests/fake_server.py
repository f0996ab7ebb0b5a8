"""A server in threads of a test, which replies as it is told to."""

import contextlib
import socket
import threading

from conftest import array, load, reset


def start(reply, stack):
    """Start a server, and return its port; `stack` will close it.

    `reply` gets a request, its words, and returns the reply: bytes, or an
    iterator of bytes; None closes the connection. No `reply`: all are reset.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=2000)
    stack.enter_context(listener)
    args = listener, reply
    threading.Thread(target=accept, args=args, daemon=True).start()
    return listener.getsockname()[1]


def accept(listener, reply):
    with contextlib.suppress(OSError):  # the test is over
        while True:
            args = listener.accept()[0], reply
            threading.Thread(target=serve, args=args, daemon=True).start()


def serve(sock, reply):
    """Serve one client of a fake server."""
    if reply is None:
        return reset(sock)
    with contextlib.suppress(OSError), sock, sock.makefile("rb") as lines:
        for count in lines:
            words = []
            for _ in range(int(count[1:])):
                size = int(lines.readline()[1:])
                words.append(lines.read(size + 2)[:-2])
            parts = reply(words)
            if parts is None:
                return
            for part in [parts] if isinstance(parts, bytes) else parts:
                sock.sendall(part)


application = load("kqueue")


def right(words):
    """Reply as a right server would; this one knows no INFO."""
    if words[0] == b"INFO":
        return b"-ERR unknown command\r\n"
    session = application.Session({})
    session.receive(array(*words))
    return session.answer()


def spoiled(command, wrong):
    """Return a function that does all rightly, but replies to one command."""

    def reply(words):
        rightly = right(words)
        return wrong if words[0] == command else rightly

    return reply
