#!/usr/bin/env python3
"""The same application on asyncio, twice: what `make bench` compares with.

streams    asyncio's readers and writers, a coroutine for each connection
protocol   asyncio.Protocol, whose methods the loop calls

Start it:  python3 asyncio_servers.py streams --port 6380
With --loop uvloop it runs on uvloop, if that is installed.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import signal
import sys
from pathlib import Path

CHUNK = 64 * 1024  # bytes to read at once, at most


def load(path):
    """Import a file whose name begins with a digit."""
    spec = importlib.util.spec_from_file_location("application", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


application = load(Path(__file__).resolve().parents[2] / "4_kqueue_loop.py")


class Tally:
    """What INFO wants to know of a server."""

    def __init__(self, pattern):
        self.pattern = pattern
        self.connected = 0
        self.accepted = 0

    def opened(self):
        self.connected += 1
        self.accepted += 1

    def closed(self):
        self.connected -= 1

    def tally(self):
        return {
            "connected_clients": self.connected,
            "total_connections_received": self.accepted,
        }


async def serve_streams(new_conversation, tally, address):
    """Serve with asyncio streams."""

    async def handle(reader, writer):
        conversation = new_conversation()
        tally.opened()
        try:
            while not conversation.finished:
                data = await reader.read(CHUNK)
                if not data:
                    break
                conversation.receive(data)
                while replies := conversation.replies():
                    writer.write(replies)
                    await writer.drain()  # waits for a client that reads late
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            tally.closed()
            writer.close()

    return await asyncio.start_server(handle, *address, backlog=4096)


class Protocol(asyncio.Protocol):
    """One connection. The loop calls these methods; none of them waits."""

    def __init__(self, conversation, tally):
        self.conversation = conversation
        self.tally = tally
        self.full = False  # True while the client does not read its replies

    def connection_made(self, transport):
        self.transport = transport
        self.tally.opened()

    def data_received(self, data):
        self.conversation.receive(data)
        self.answer()

    def answer(self):
        """Carry out what was asked, as long as the client takes it in."""
        while not self.full:
            replies = self.conversation.replies()
            if not replies:
                break
            self.transport.write(replies)
        if self.conversation.finished:
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
        self.tally.closed()


async def serve_protocol(new_conversation, tally, address):
    """Serve with asyncio.Protocol."""
    return await asyncio.get_running_loop().create_server(
        lambda: Protocol(new_conversation(), tally), *address, backlog=4096
    )


async def serve(options):
    """Serve, until SIGINT or SIGTERM comes."""
    tally = Tally(f"{options.loop} {options.kind}")
    application.Conversation.server = tally  # whose figures INFO tells
    stop = asyncio.Event()
    for number in signal.SIGINT, signal.SIGTERM:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    kinds = {"streams": serve_streams, "protocol": serve_protocol}
    server = await kinds[options.kind](
        application.Conversation, tally, (options.host, options.port)
    )
    host, port = server.sockets[0].getsockname()[:2]
    print(f"{tally.pattern}: listening on {host}:{port}", flush=True)
    await stop.wait()
    server.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=["streams", "protocol"])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=6380)
    parser.add_argument(
        "--loop", choices=["asyncio", "uvloop"], default="asyncio"
    )
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
    try:
        run(serve(options))
    except (OSError, OverflowError) as error:
        sys.exit(f"cannot listen on {options.host}:{options.port}: {error}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
