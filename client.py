#!/usr/bin/env python3
"""Many clients at once, to make the difference between the servers visible.

Each client connects, asks, thinks for a moment, asks again:

    SET key:1 value     INCR counter     GET key:1     INCR counter

The key is its own, the counter belongs to all. Every reply is checked, and
what each client did is drawn from left to right.

Start it:  python3 client.py --server 1_single_blocking.py
or, with a server that runs already:  python3 client.py --port 6380
"""

import argparse
import asyncio
import contextlib
import os
import re
import resource
import select
import signal
import subprocess
import sys
import textwrap
import time

WIDTH = 79  # columns to draw in
MOST_LINES = 20  # to draw; of more clients than that, a sample is shown
WAITS, TALKS = "░█" if "utf" in sys.stdout.encoding.lower() else ".#"
CONNECTING = 100  # at the same moment: the queue for accept is finite
STILL = 0.1  # seconds without a new client served: the others have to wait
GRACE = 2  # the same, while some are not connected: they try again in 1 s


class Failed(Exception):
    """It cannot be done, or went wrong; the message says why."""


class Visitor:
    """One client: what it said, and when. Times are of time.monotonic()."""

    def __init__(self, number):
        self.number = number
        self.end = 0.0  # when it left; 0 while it is there
        self.waits = []  # of each request [when asked, when answered or None]
        self.transcript = ""  # a line for each request


class Crowd:
    """All clients of one server, with the options of the command line."""

    def __init__(self, options, name="the server"):
        self.options, self.name = options, name
        self.visitors = [Visitor(n + 1) for n in range(options.connections)]
        self.firsts = []  # when each visitor had its first reply
        self.counts = []  # the replies to INCR, of all visitors
        self.midway = self.info = b""  # INFO halfway, and at the end
        self.start = self.stopped = time.monotonic()  # it has not begun
        self.problem = None  # or a sentence: what went wrong
        self.transcript = ""  # what was said, client by client, not by time
        # Keys of our own: the server may have been running for a while.
        self.prefix = f"{os.getpid()}-{time.time_ns():x}:"

    @property
    def elapsed(self):
        """Seconds from the start until the last has left, or until now."""
        return (self.stopped or time.monotonic()) - self.start

    def run(self, host, port, watch=lambda: None):
        """Hold all conversations; call `watch` meanwhile. Sets `problem`."""
        self.address = host, port
        limit, text = self.options.timeout, None
        try:
            asyncio.run(asyncio.wait_for(self.talk(watch), limit))
        except Failed as failure:
            text = str(failure)
        except asyncio.TimeoutError:
            text = f"time ran out after {limit:g} s"
        except (OSError, OverflowError, UnicodeError) as error:
            text = f"the connection to {host}:{port} failed: {error}"
        except (EOFError, asyncio.LimitOverrunError, ValueError):
            text = "a connection was closed, or a reply is not in RESP"
        self.stopped = self.stopped or time.monotonic()
        self.transcript = "".join(v.transcript for v in self.visitors)
        self.problem = text and f"{self.name}: {text}"

    async def talk(self, watch):
        # One failure is raised below; asyncio would print all the others, too.
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        self.gate = asyncio.Semaphore(CONNECTING)
        self.midway_asked = asyncio.Event()  # before that, nobody leaves
        self.start, self.stopped = time.monotonic(), 0.0
        visits = asyncio.gather(*map(self.visit, self.visitors))  # begin
        while not visits.done():
            await asyncio.wait([visits], timeout=0.2)  # then redraw
            watch()
        visits.result()  # raises what a visit has raised
        self.stopped = time.monotonic()
        # No INCR may be lost, or done twice: each number comes once.
        total = len(self.counts)
        lost = len(set(range(1, total + 1)) - set(self.counts))
        if lost:
            raise Failed(f"{lost} of {total} INCRs were lost or done twice")
        reader, writer = await asyncio.open_connection(*self.address)
        with contextlib.closing(writer):
            self.info = await self.ask(reader, writer, "INFO")

    async def visit(self, visitor):
        while not visitor.end:  # again, if it could not connect
            try:
                async with self.gate:
                    streams = await asyncio.open_connection(*self.address)
                visitor.waits = [[self.start, None]]
                with contextlib.closing(streams[1]):
                    await self.converse(visitor, *streams)
                visitor.end = time.monotonic()
            except OSError:
                # The kernel's queue may be full, but not for the first one.
                # To send the first request, a SET, twice does no harm.
                if visitor.transcript or visitor.number == 1:
                    raise
                await asyncio.sleep(0.05)

    async def converse(self, visitor, *streams):
        for turn in range(self.options.requests):
            if turn:
                await asyncio.sleep(self.options.think)
                visitor.waits.append([time.monotonic(), None])
            line, right = request(visitor.number, turn)
            reply = await self.ask(*streams, line)
            visitor.waits[-1][1] = time.monotonic()
            self.check(visitor, line, reply, right)
            if turn == 0:
                self.firsts.append(time.monotonic())
                is_first = len(self.firsts) == 1
            # Halfway, the first asks for INFO, when all have been served once.
            if is_first and turn == self.options.requests // 2:
                while len(self.firsts) < len(self.visitors):
                    connected = all(v.waits for v in self.visitors)
                    patience = STILL if connected else GRACE
                    if time.monotonic() > self.firsts[-1] + patience:
                        break  # the server lets the others wait
                    await asyncio.sleep(0.01)
                self.midway = await self.ask(*streams, "INFO")
                self.midway_asked.set()
        await self.midway_asked.wait()

    def check(self, visitor, line, reply, right):
        """Add a reply to the transcript. Raises Failed if it is wrong."""
        said = f"client {visitor.number}: {line}"
        answer = ascii(reply[:80].decode("latin-1"))
        if right is None and re.fullmatch(rb":[0-9]{1,18}\r\n", reply):
            self.counts.append(int(reply[1:]))
            answer = "a number"
        elif reply != right:
            raise Failed(f"{said} was answered with {answer}")
        visitor.transcript += f"{said} -> {answer}\n"

    async def ask(self, reader, writer, line):
        """Send a request; return its reply, as the bytes that came."""
        # Redis takes a line of words, as one types it, as well as arrays.
        line = line.replace(" ", f" {self.prefix}", 1)  # in front of the key
        writer.write(f"{line}\r\n".encode())
        reply = await reader.readuntil(b"\r\n")
        if reply.startswith(b"$") and reply != b"$-1\r\n":
            reply += await reader.readexactly(int(reply[1:]) + 2)
        return reply


def request(number, turn):
    """Return a visitor's request, and the right reply: None for a number."""
    key, value = f"key:{number}", f"value-{number}.{turn // 4 + 1}"
    if turn % 2:
        return "INCR counter", None
    if turn % 4:
        return f"GET {key}", f"${len(value)}\r\n{value}\r\n".encode()
    return f"SET {key} {value}", b"+OK\r\n"


@contextlib.contextmanager
def started(script, timeout, command=None):
    """Run a server while a `with` block lasts; yield it, with host and port.

    Raises Failed if it does not start, or end well, in `timeout` seconds.
    """
    command = command or [sys.executable, script, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            ready = select.select([process.stdout], [], [], timeout)[0]
            line = ready[0].readline() if ready else b""
            where = re.search(rb"listening on (\S+):(\d{1,5})\b", line)
            if not where:
                raise Failed(f"{script} did not start: it said {line!r}")
            process.host, process.port = where[1].decode(), int(where[2])
            yield process
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)  # if it is dying, it has a status of its own
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
        finally:
            process.kill()  # it does not stay, whatever happens to us
    if process.returncode not in (0, -signal.SIGTERM):
        raise Failed(f"{script} ended with status {process.returncode}")


def drawing(crowd, scale):
    """Yield lines of text: what each did; their width is `scale` seconds."""
    now, count = crowd.start + crowd.elapsed, len(crowd.visitors)
    margin = len(str(count)) + 1
    head = f"{crowd.name:.50}: {crowd.elapsed:.2f} s"
    yield head + f"0 to {scale:.2f} s".rjust(WIDTH - len(head))

    def column(when):
        return round((when - crowd.start) / scale * (WIDTH - margin - 1))

    for visitor in crowd.visitors[:: (count - 1) // MOST_LINES + 1]:
        row = [TALKS] * max(column(visitor.end or now), 1)
        for asked, answered in visitor.waits or [(crowd.start, None)]:
            first, last = column(asked), column(answered or now)
            row[first:last] = WAITS * (last - first)
        yield f"{visitor.number:{margin}} " + "".join(row)


def results(crowd):
    """Return a column of the table, {row: text}, with some figures of INFO."""
    words = os.path.splitext(crowd.name)[0].replace("_", " ")
    rows = {"": textwrap.shorten(words, 13, placeholder="") or words[:13]}
    rows["time elapsed"] = f"{crowd.elapsed:.2f} s"
    rows["first reply, worst"] = f"{max(crowd.firsts) - crowd.start:.3f} s"
    for row, info, name in [  # INFO counts since the start of the server
        ("threads, midway", crowd.midway, b"threads"),
        ("CPU seconds", crowd.info, b"used_cpu_(?:user|sys)"),
        ("polls", crowd.info, b"polls"),
        ("wake-ups", crowd.info, b"wakeups"),
    ]:
        numbers = re.findall(rb"\n%b:([0-9.]+)\r" % name, info)
        if numbers:
            rows[row] = f"{sum(map(float, numbers)):,.2f}".replace(".00", "")
    return rows


def table(columns, names, indent=""):
    """Yield a line for each name; the columns are {name: text}."""
    width = min((WIDTH - 21) // len(columns), 15)
    for name in names:
        cells = [c.get(name, "-")[: width - 1].rjust(width) for c in columns]
        yield f"{indent + name:21}" + "".join(cells)


def raise_descriptor_limit(needed):
    """Allow this process, and those that it starts, as many open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        if 0 <= soft < needed:  # a negative number stands for no limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (OSError, ValueError):
        raise Failed(f"{needed} open files needed, {hard} allowed") from None


def command_line():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="of a server that runs already")
    add("--port", type=int, default=6380)
    add("--connections", type=int, default=8, help="at once (8)")
    add("--requests", type=int, default=4, help="on each connection (4)")
    add("--think", type=float, default=0.05, help="seconds between (0.05)")
    add("--timeout", type=float, default=30, help="seconds for a server (30)")
    many = {"action": "append", "default": []}
    add("--server", metavar="SCRIPT", help="start it, stop it again", **many)
    add("--transcript", metavar="FILE", help="write what was said", **many)
    options = parser.parse_args()
    names = "connections", "requests", "think", "timeout"
    for name, least in zip(names, [1, 1, 0, 0]):
        if not least <= getattr(options, name) < 1e6:
            parser.error(f"--{name} must be from {least} to a million")
    if len(options.transcript) not in (0, len(options.server or [None])):
        parser.error("--transcript goes once with each --server")
    return options


def play(crowd, script, scale, live):
    """Let a crowd visit a server, of our own if there is a script."""
    options, lines = crowd.options, []

    def watch():
        if live:
            up = f"\x1b[{len(lines)}A" if lines else ""  # to the first line
            lines[:] = drawing(crowd, max(scale, crowd.elapsed))
            print(up + "\x1b[K\n".join(lines), end="\x1b[K\n", flush=True)

    own = script and started(script, options.timeout)
    try:
        with own or contextlib.nullcontext(options) as server:
            crowd.run(server.host, server.port, watch)
    except Failed as failure:  # the server's end, which says more
        crowd.problem = str(failure)


def main():
    options = command_line()
    raise_descriptor_limit(options.connections + 50)
    what = f"{options.connections} clients, {options.requests} requests each"
    legend = f"{WAITS} waits   {TALKS} talks or thinks"
    print(f"{what}, {options.think:g} s apart   {legend}", flush=True)
    # One scale of time for all: room for one after the other, if that can end.
    alone = (options.requests - 1) * options.think
    serial = 1.2 * options.connections * alone + 0.1
    scale = serial if serial <= options.timeout else 1.2 * alone + 0.1
    wide, high = os.get_terminal_size(1) if os.isatty(1) else (0, 0)
    live = wide > WIDTH and high > MOST_LINES + 1
    live = live and os.environ.get("TERM") != "dumb"
    crowds = []
    for number, script in enumerate(options.server or [None]):
        crowd = Crowd(options, os.path.basename(script or "the server"))
        play(crowd, script, scale, live)
        if crowd.firsts or crowd.elapsed > scale / WIDTH:  # a column's time
            crowds.append(crowd)
        if options.transcript:
            with open(options.transcript[number], "w") as file:
                file.write(crowd.transcript)
        if crowd.problem:
            break
    longest = max([scale] + [each.elapsed for each in crowds])
    if not live or (len(crowds) > 1 and longest > scale):
        for each in crowds:
            print(*drawing(each, longest), sep="\n", flush=True)
    if crowd.problem:
        raise Failed(crowd.problem)
    assert len({each.transcript for each in crowds}) == 1  # all were checked
    if len(crowds) > 1:
        print(f"All {len(crowds)} transcripts are the same.")
    columns = [results(each) for each in crowds]
    names = dict.fromkeys(name for rows in columns for name in rows)
    print(*table(columns, names), sep="\n", flush=True)


if __name__ == "__main__":
    # Whoever ends this client ends the server that it has started, too.
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:  # whoever read our output has gone
        os._exit(1)
    except (Failed, OSError) as failure:
        sys.exit(f"client.py: {failure}")
