#!/usr/bin/env python3
"""The same application elsewhere: what `make bench` compares the loop with.

floor      the barest loop that Python allows: no backpressure, no statistics
streams    asyncio's readers and writers, a coroutine for each connection
protocol   asyncio.Protocol, whose methods the loop calls

Start it:  python3 asyncio_servers.py streams --port 6380
With --loop uvloop it runs on uvloop, if that is installed.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import select
import socket
import sys
from pathlib import Path

CHUNK = 64 * 1024  # bytes to read at once, at most
BACKLOG = 4096


def load(path):
    """Import a file whose name begins with a digit."""
    spec = importlib.util.spec_from_file_location("application", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Session = load(
    Path(__file__).resolve().parents[2] / "4_kqueue_loop.py"
).Session


def floor(listener, statistics):
    """Serve with recv, receive, answer and send, and nothing else."""
    listener.setblocking(False)
    clients, listening = {}, listener.fileno()
    epoll = hasattr(select, "epoll")
    queue = select.epoll() if epoll else select.kqueue()

    def watch(descriptor):
        if epoll:
            queue.register(descriptor, select.EPOLLIN)
        else:
            queue.control([select.kevent(descriptor)], 0)

    watch(listening)
    while True:
        if epoll:
            ready = [descriptor for descriptor, _ in queue.poll()]
        else:
            ready = [event.ident for event in queue.control(None, 1024)]
        for descriptor in ready:
            if descriptor == listening:
                connection, _ = listener.accept()
                connection.setblocking(False)
                clients[connection.fileno()] = connection, Session(statistics)
                watch(connection.fileno())
                continue
            connection, session = clients[descriptor]
            try:
                session.receive(connection.recv(CHUNK))
                replies = session.answer()
                if replies:
                    connection.send(replies)
            except OSError:
                session.finished = True
            if session.finished:
                del clients[descriptor]
                connection.close()


async def serve_streams(listener, statistics):
    """Serve with asyncio streams."""

    async def handle(reader, writer):
        session = Session(statistics)
        with contextlib.suppress(OSError), contextlib.closing(writer):
            while not session.finished:
                session.receive(await reader.read(CHUNK))
                while replies := session.answer():
                    writer.write(replies)
                    await writer.drain()  # waits for a client that reads late

    return await asyncio.start_server(handle, sock=listener, backlog=BACKLOG)


class Protocol(asyncio.Protocol):
    """One connection. The loop calls these methods; none of them waits."""

    def __init__(self, session):
        self.session = session
        self.full = False  # True while the client does not read its replies

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.session.receive(data)
        self.answer()

    def answer(self):
        """Carry out what was asked, as long as the client takes it in."""
        while not self.full:
            replies = self.session.answer()
            if not replies:
                break
            self.transport.write(replies)
        if self.session.finished:
            # It closes once all is sent. Not from within resume_writing():
            # asyncio would then close twice, and print a traceback.
            asyncio.get_running_loop().call_soon(self.transport.close)

    def pause_writing(self):
        """Who does not read his replies is not read from either."""
        self.full = True
        self.transport.pause_reading()

    def resume_writing(self):
        self.full = False
        self.answer()
        if not self.full:
            self.transport.resume_reading()

    def connection_lost(self, error):
        self.full = True  # nobody is there to answer


async def serve_protocol(listener, statistics):
    """Serve with asyncio.Protocol."""
    return await asyncio.get_running_loop().create_server(
        lambda: Protocol(Session(statistics)), sock=listener, backlog=BACKLOG
    )


async def serve(kind, listener, statistics):
    """Serve for ever on an event loop of asyncio's kind."""
    kinds = {"streams": serve_streams, "protocol": serve_protocol}
    server = await kinds[kind](listener, statistics)
    await server.serve_forever()


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("kind", choices=["floor", "streams", "protocol"])
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=6380)
    add("--loop", choices=["asyncio", "uvloop"], default="asyncio")
    options = parser.parse_args()
    run = asyncio.run
    if options.loop == "uvloop":
        try:
            import uvloop
        except ImportError:
            sys.exit("uvloop is not installed (python3 -m pip install uvloop)")
        if hasattr(uvloop, "run"):
            run = uvloop.run
        else:  # before 0.18
            uvloop.install()
    address = options.host, options.port
    try:
        listener = socket.create_server(address, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        sys.exit(f"cannot listen on {options.host}:{options.port}: {error}")
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    statistics = {"pattern": f"{options.loop} {options.kind}"}
    host, port = listener.getsockname()[:2]
    print(f"{statistics['pattern']}: listening on {host}:{port}", flush=True)
    if options.kind == "floor":
        floor(listener, statistics)
    run(serve(options.kind, listener, statistics))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
