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
import pathlib
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
TICK = 0.2  # seconds between two redraws
CONNECTING = 100  # clients at once: the queue for accept is finite
ATTEMPTS = 10  # to connect, each after a longer pause
GRACE = 2  # seconds; who is not connected by then is not waited for
STILL = 0.1  # seconds; if nobody new is answered, the others have to wait


class Failed(Exception):
    """It cannot be done, or went wrong; the message says why."""


class Visitor:
    """One client: what it said, and when. Times are of time.monotonic()."""

    def __init__(self, number):
        self.number = number
        self.begin = self.end = 0.0  # end is 0 while it is there
        self.asked = None  # when it asked what is not answered yet
        self.waits = []  # pairs: when it asked, when it was answered
        self.transcript = []  # a line for each request


class Crowd:
    """All visitors of one server. The options are the command line's."""

    def __init__(self, host, port, options, name="the server"):
        self.host, self.port, self.name = host, port, name
        self.options = options
        self.visitors = [Visitor(n + 1) for n in range(options.connections)]
        self.connected, self.answered = set(), set()  # visitors, so far
        self.counts = []  # the replies to INCR, of all visitors
        self.mistakes = []  # sentences: what was not as it should be
        self.start = self.stopped = 0.0
        self.midway = self.info = b""  # INFO with all there, and at the end
        # Keys of our own: the server may have been running for a while.
        self.prefix = f"{os.getpid()}-{time.time_ns():x}:"

    @property
    def elapsed(self):
        """Seconds from the start until the last has left, or until now."""
        ends = [visitor.end for visitor in self.visitors]
        now = self.stopped or time.monotonic()
        return (max(ends) if all(ends) else now) - self.start

    @property
    def transcript(self):
        """What was said, client by client, so not by time."""
        return "".join(line for v in self.visitors for line in v.transcript)

    def run(self, watch=lambda: None):
        """Hold all conversations, or raise Failed; call `watch` meanwhile."""
        limit = self.options.timeout  # seconds
        try:
            asyncio.run(asyncio.wait_for(self.talk(watch), limit))
        except asyncio.TimeoutError:
            served = sum(visitor.end > 0 for visitor in self.visitors)
            text = f"{served} of {len(self.visitors)} clients were served"
            raise Failed(f"time ran out after {limit:g} s: {text}") from None
        except (OSError, OverflowError) as error:
            what = "lost the" if self.answered else "no"
            where = f"connection to {self.host}:{self.port}"
            raise Failed(f"{what} {where}: {error}") from None
        except (EOFError, asyncio.LimitOverrunError, ValueError):
            text = "a connection was closed, or a reply is not in RESP"
            raise Failed(text) from None
        finally:
            self.stopped = time.monotonic()

    async def talk(self, watch):
        # What fails is raised below; asyncio need not print it for each, too.
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        self.gate = asyncio.Semaphore(CONNECTING)
        self.all_open = asyncio.Event()  # all are connected, or cannot be
        self.midway_asked = asyncio.Event()  # before that, nobody leaves
        self.start = self.news = time.monotonic()
        visits = asyncio.gather(*map(self.visit, self.visitors))
        while not visits.done():
            await asyncio.wait([visits], timeout=TICK)
            if time.monotonic() > self.news + GRACE:
                self.all_open.set()
            watch()
        visits.result()  # raises what a visit has raised
        # No INCR may be lost or done twice.
        async with self.connection() as ask:
            total, different = len(self.counts), len(set(self.counts))
            reply = await ask("INCRBY", "counter", "0")
            if reply != b":%d\r\n" % total or different < total:
                text = f"after {total} INCRs the counter is {reply[:40]!a}"
                self.mistakes.append(f"{text}, {different} numbers were given")
            self.info = await ask("INFO")

    async def visit(self, visitor, attempt=1):
        visitor.begin = visitor.asked = self.start
        try:
            async with self.connection() as ask:
                self.news = time.monotonic()
                self.connected.add(visitor)
                if len(self.connected) == len(self.visitors):
                    self.all_open.set()
                await self.converse(visitor, ask)
            visitor.end = time.monotonic()
        except OSError:
            # The kernel's queue may be full, but not for the first one. To
            # send the first request, a SET, twice does no harm.
            if visitor.waits or visitor.number == 1 or attempt == ATTEMPTS:
                raise
            await asyncio.sleep(0.1 * attempt)
            await self.visit(visitor, attempt + 1)

    async def converse(self, visitor, ask):
        for turn in range(self.options.requests):
            if turn:
                await asyncio.sleep(self.options.think)
                visitor.asked = time.monotonic()
            words, right = request(visitor.number, turn)
            reply = await ask(*words)
            visitor.waits.append((visitor.asked, time.monotonic()))
            visitor.asked = None
            said = f"client {visitor.number}: {' '.join(words)}"
            answer = ascii(reply[:80].decode("latin-1"))
            if right is None and re.fullmatch(rb":[0-9]{1,18}\r\n", reply):
                self.counts.append(int(reply[1:]))
                answer = "a number"
            elif reply != right:
                self.mistakes.append(f"{said} was answered with {answer}")
            visitor.transcript.append(f"{said} -> {answer}\n")
            if turn == 0:
                first = not self.answered
                self.answered.add(visitor)
                self.news = time.monotonic()
            await self.all_open.wait()  # so that all are there together
            if first and turn == self.options.requests // 2:
                while len(self.answered) < len(self.visitors):
                    if time.monotonic() > self.news + STILL:
                        break  # the server keeps the others waiting
                    await asyncio.sleep(0.01)
                self.midway = await ask("INFO")
                self.midway_asked.set()
        await self.midway_asked.wait()

    @contextlib.asynccontextmanager
    async def connection(self):
        """Open a connection, and lend a function that asks."""
        async with self.gate:
            streams = await asyncio.open_connection(self.host, self.port)
        with contextlib.closing(streams[1]):
            yield lambda *words: self.ask(*streams, *words)

    async def ask(self, reader, writer, command, *words):
        """Send a request; return its reply, as the bytes that came."""
        if words:
            words = self.prefix + words[0], *words[1:]
        writer.write(encode(command, *words))
        reply = await reader.readuntil(b"\r\n")
        if reply.startswith(b"$") and reply != b"$-1\r\n":
            reply += await reader.readexactly(int(reply[1:]) + 2)
        return reply


def request(number, turn):
    """Return a visitor's request, and the right reply: None for a number."""
    key, value = f"key:{number}", f"value-{number}.{turn // 4 + 1}"
    if turn % 2:
        return ("INCR", "counter"), None
    if turn % 4:
        return ("GET", key), f"${len(value)}\r\n{value}\r\n".encode()
    return ("SET", key, value), b"+OK\r\n"


def encode(*words):
    """Return a request in RESP, Redis's protocol: an array of bulk strings."""
    parts = [b"$%d\r\n%b\r\n" % (len(w), w) for w in map(str.encode, words)]
    return b"*%d\r\n%b" % (len(words), b"".join(parts))


class Server:
    """Runs a server script on a free port while a `with` block lasts.

    Afterwards `problem` says how the script has ended, if not as it should.
    """

    def __init__(self, script, timeout, command=None):
        self.script, self.timeout = script, timeout  # seconds, to start or end
        self.command = command or [sys.executable, script, "--port", "0"]
        self.problem = None

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE)
        try:
            said = self.process.stdout
            ready = select.select([said], [], [], self.timeout)[0]
            line = said.readline().decode(errors="replace") if ready else ""
            where = re.search(r"listening on (\S+):(\d{1,5})$", line.strip())
            if not where:
                raise Failed(f"{self.script} did not start: it said {line!a}")
        except BaseException:  # or we are told to end: so is the server
            self.process.kill()
            self.process.wait()
            raise
        self.host, self.port = where[1], int(where[2])
        return self

    def __exit__(self, *error):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.2)  # it may have died
        how = "stopped" if self.process.returncode is None else "died"
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(self.timeout)
        self.process.kill()
        status = self.process.wait()
        self.process.stdout.close()
        if how == "died" or status not in (0, -signal.SIGTERM):
            self.problem = f"{self.script} {how}: status {status}"


def glyphs():
    """Return signs for waiting and for talking that stdout can show."""
    encoding = getattr(sys.stdout, "encoding", None) or ""
    return "░█" if encoding.lower().startswith("utf") else ".#"


def sample(things, most=MOST_LINES):
    """Return `most` of the things, evenly spread, or all if they are fewer."""
    if len(things) <= most:
        return things
    return [things[i * (len(things) - 1) // (most - 1)] for i in range(most)]


def drawing(crowd, scale):
    """Return lines of text: what each did until now, in `scale` seconds."""
    waiting, talking = glyphs()
    now = crowd.start + crowd.elapsed
    margin = len(str(len(crowd.visitors))) + 2
    head = f"{crowd.name:.50}: {crowd.elapsed:.2f} s"
    lines = [head + f"0 to {scale:.2f} s".rjust(WIDTH - len(head))]
    for visitor in sample(crowd.visitors):
        going_on = [(visitor.asked, now)] if visitor.asked else []
        spans = [(talking, visitor.begin, visitor.end or now)]
        spans += [(waiting, *wait) for wait in visitor.waits + going_on]
        row = [" "] * (WIDTH - margin)
        for sign, *times in spans:
            columns = [(t - crowd.start) / scale * len(row) for t in times]
            first, last = map(round, columns)
            if sign == talking:
                last = max(last, first + 1)  # who was there is seen
            row[first:last] = sign * (last - first)
        text = f"{visitor.number:{margin - 1}} " + "".join(row)
        lines.append(text.rstrip()[:WIDTH])
    return lines


def results(crowd):
    """Return a column of the table, {row: text}, with some figures of INFO."""
    firsts = [v.waits[0][1] - crowd.start for v in crowd.visitors if v.waits]
    words = os.path.splitext(crowd.name)[0].replace("_", " ")
    rows = {"": textwrap.shorten(words, 13, placeholder="") or words[:13]}
    rows["time elapsed"] = f"{crowd.elapsed:.2f} s"
    rows["first reply, worst"] = f"{max(firsts, default=0):.3f} s"
    for row, info, name in [
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
    """Return a line for each name; the columns are {name: text}."""
    width = min((WIDTH - 21) // len(columns), 15)
    lines = []
    for name in names:
        texts = [rows.get(name, "-") for rows in columns]
        if set(texts) != {"-"}:
            cells = "".join(text.rjust(width) for text in texts)
            lines.append(f"{indent + name:21}{cells}")
    return lines


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
    least = {"connections": 1, "requests": 1, "think": 0, "timeout": 0.001}
    for name in least:
        if not least[name] <= getattr(options, name) < 1e6:
            parser.error(f"--{name} must be {least[name]} or more")
    if len(options.transcript) not in (0, len(options.server or [None])):
        parser.error("--transcript goes once with each --server")
    return options


def visit(script, options, scale, live):
    """Visit a server, of our own if there is a script; return the Crowd."""
    lines = []

    def redraw():
        up = f"\x1b[{len(lines)}A" if lines else ""  # to its first line
        lines[:] = drawing(crowd, max(scale, crowd.elapsed))
        print(up + "\x1b[K\n".join(lines), end="\x1b[K\n", flush=True)

    own = Server(script, options.timeout) if script else None
    with own or contextlib.nullcontext(options) as server:
        name = os.path.basename(script or "the server")
        crowd = Crowd(server.host, server.port, options, name)
        try:
            crowd.run(redraw if live else lambda: None)
        except Failed as failure:
            crowd.mistakes.insert(0, str(failure))
    if own and own.problem:
        crowd.mistakes.insert(0, own.problem)
    return crowd


def main():
    options = command_line()
    raise_descriptor_limit(options.connections + 50)
    what = f"{options.connections} clients, {options.requests} requests each"
    legend = "{} waits for the server   {} talks".format(*glyphs())
    print(f"{what}, {options.think:g} s apart   {legend}", flush=True)
    # One scale of time for all: room for one after the other, if that can end.
    alone = (options.requests - 1) * options.think
    serial = 1.2 * options.connections * alone + 0.1
    scale = serial if serial <= options.timeout else 1.2 * alone + 0.1
    live = os.isatty(1) and os.environ.get("TERM") != "dumb"
    if live:
        columns, lines = os.get_terminal_size(1)
        live = columns > WIDTH and lines > MOST_LINES + 1
    crowds = []
    for number, script in enumerate(options.server or [None]):
        crowds.append(crowd := visit(script, options, scale, live))
        if options.transcript:
            path = pathlib.Path(options.transcript[number])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(crowd.transcript, encoding="utf-8")
        if crowd.mistakes:
            break
    longest = max(scale, *(crowd.elapsed for crowd in crowds))
    if not live or longest > scale:  # it took longer than expected
        for each in crowds:
            print(*drawing(each, longest), sep="\n")
    if crowd.mistakes:
        where = f"{crowd.name}: " if options.server else ""
        raise Failed(where + crowd.mistakes[0])
    if len({each.transcript for each in crowds}) > 1:
        raise Failed("not all transcripts are the same")
    if len(crowds) > 1:
        print(f"All {len(crowds)} transcripts are the same.")
    columns = [results(each) for each in crowds]
    names = dict.fromkeys(name for rows in columns for name in rows)
    print(*table(columns, names), sep="\n")


if __name__ == "__main__":
    # Whoever ends this client ends the server that it has started, too.
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (Failed, OSError) as failure:
        sys.exit(f"client.py: {failure}")
