#!/usr/bin/env python3
"""Many clients at once, to make the difference between the servers visible.

Each client connects, asks, thinks for a moment, asks again:

    SET key:1 value     INCR counter     GET key:1     INCR counter

The key is its own, the counter belongs to all. Every reply is checked, and
what each client did is drawn, from left to right.

Start it:  python3 client.py --server 1_single_blocking.py
or, with a server that runs already:  python3 client.py --port 6380
"""

import argparse
import asyncio
import contextlib
import difflib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

WIDTH = 79  # columns to draw in
MOST_LINES = 20  # to draw; of more clients than that, a sample is shown
TICK = 0.2  # seconds from one redraw to the next, from one batch to the next
BATCH = 1000  # clients to connect at once; the queue for accept() is finite
ATTEMPTS = 10  # to connect, each after a longer pause
MAX_REPLY = 64 * 1024  # bytes; no server may fill our memory
NUMBER = re.compile(rb"[:$][0-9]{1,18}\r\n")


class Failed(Exception):
    """It cannot be done, or went wrong; the message says why."""


class Visitor:
    """One client: what it said, and when. Times are of time.monotonic()."""

    def __init__(self, number):
        self.number = number
        self.begin = 0.0  # when it wanted to connect
        self.end = 0.0  # 0: it is still there
        self.asked = None  # when it asked what is not answered yet
        self.waits = []  # pairs: when it asked, when it was answered
        self.transcript = []  # a line for each request


class Crowd:
    """All visitors of one server. The options are the command line's."""

    def __init__(self, host, port, options):
        self.host = host
        self.port = port
        self.options = options
        self.name = "the server"
        self.visitors = [Visitor(n + 1) for n in range(options.connections)]
        self.counts = []  # the replies to INCR, of all visitors
        self.mistakes = []  # replies that were not what they should be
        self.start = 0.0
        self.midway = {}  # INFO while the visitors were there, and at the end
        self.info = {}
        # Keys of our own: the server may have been running for a while.
        self.prefix = f"{os.getpid()}-{time.time_ns():x}:"

    @property
    def elapsed(self):
        """Seconds from the start until the last has left, or until now."""
        ends = [visitor.end for visitor in self.visitors]
        return (max(ends) if all(ends) else time.monotonic()) - self.start

    def run(self, watch=lambda: None):
        """Hold all conversations, or raise Failed; call `watch` meanwhile."""
        limit = self.options.timeout  # seconds
        try:
            asyncio.run(asyncio.wait_for(self.talk(watch), limit))
        except asyncio.TimeoutError:
            served = sum(visitor.end > 0 for visitor in self.visitors)
            text = f"{served} of {len(self.visitors)} clients were served"
            raise Failed(f"time ran out after {limit:g} s: {text}") from None
        except (OSError, ValueError, OverflowError) as error:
            text = f"no connection to {self.host}:{self.port}: {error}"
            raise Failed(text) from None

    async def talk(self, watch):
        # What fails is raised below; asyncio need not print it for each, too.
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        self.all_open = asyncio.Event()
        self.start = time.monotonic()
        coming, tasks = self.visitors, set()
        while coming or tasks:
            for visitor in coming[:BATCH]:
                visitor.begin = visitor.asked = self.start
                tasks.add(asyncio.ensure_future(self.visit(visitor)))
            coming = coming[BATCH:]
            if not coming:
                self.all_open.set()
            done, tasks = await asyncio.wait(tasks, timeout=TICK)
            for task in done:
                task.result()  # raises what the task has raised
            watch()
        await self.check_counter()

    async def visit(self, visitor):
        """One visitor's conversation, from connect to close."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with self.connection() as ask:
                    await self.converse(visitor, ask)
                break
            except OSError:
                # A kernel whose queue is full may refuse or reset, but not the
                # first. To send the first request, a SET, twice does no harm.
                if visitor.waits or visitor.number == 1 or attempt == ATTEMPTS:
                    raise
                await asyncio.sleep(0.1 * attempt)
        visitor.end = time.monotonic()

    async def converse(self, visitor, ask):
        for turn in range(self.options.requests):
            if turn:
                await asyncio.sleep(self.options.think)
                visitor.asked = time.monotonic()
            words, expected = self.request(visitor.number, turn)
            reply = await ask(*words)
            visitor.waits.append((visitor.asked, time.monotonic()))
            visitor.asked = None
            self.check(visitor, words, reply, expected)
            await self.all_open.wait()  # so that all are there together
            if visitor.number == 1 and turn == self.options.requests // 2:
                self.midway = parse_info(await ask("INFO"))

    def request(self, number, turn):
        """Return what a visitor asks in this turn, and the right reply."""
        if turn % 2:
            return ("INCR", "counter"), None  # it depends on the others
        key, value = f"key:{number}", f"value-{number}.{turn // 4 + 1}"
        if turn % 4:
            return ("GET", key), f"${len(value)}\r\n{value}\r\n".encode()
        return ("SET", key, value), b"+OK\r\n"

    def check(self, visitor, words, reply, expected):
        """Write a request and its reply down, and see that they fit."""
        asked = f"client {visitor.number}: {' '.join(words)}"
        answer = ascii(reply[:80].decode("latin-1"))
        if expected is None and NUMBER.fullmatch(reply):
            self.counts.append(int(reply[1:]))
            answer = "a number"
        elif reply != expected:
            self.mistakes.append(f"{asked} was answered with {answer}")
        visitor.transcript.append(f"{asked} -> {answer}\n")

    async def check_counter(self):
        """See that no INCR was lost or done twice. Ask for INFO, as well."""
        async with self.connection() as ask:
            total, different = len(self.counts), len(set(self.counts))
            reply = await ask("INCRBY", "counter", "0")
            if reply != b":%d\r\n" % total or different < total:
                text = f"after {total} INCRs the counter is {reply[:40]!a}"
                self.mistakes.append(f"{text}, {different} numbers were given")
            self.info = parse_info(await ask("INFO"))

    @contextlib.asynccontextmanager
    async def connection(self):
        """Open a connection, and lend a function that asks."""
        where = self.host, self.port
        reader, writer = await asyncio.open_connection(*where, limit=MAX_REPLY)
        with contextlib.closing(writer):
            yield lambda *words: self.ask(reader, writer, *words)

    async def ask(self, reader, writer, command, *words):
        """Send a request; return its reply, as the bytes that came."""
        if words:
            words = self.prefix + words[0], *words[1:]
        try:
            writer.write(encode(command, *words))
            reply = await reader.readline()
            if reply[:1] == b"$" and NUMBER.fullmatch(reply):
                if int(reply[1:]) > MAX_REPLY:
                    raise ValueError
                reply += await reader.readexactly(int(reply[1:]) + 2)
        except ValueError:  # readline raises it, too
            raise Failed(f"the reply to {command} is too long") from None
        except asyncio.IncompleteReadError:
            reply = b""
        if not reply.endswith(b"\r\n"):
            raise Failed("the server closed a connection and owed it a reply")
        return reply


def encode(*words):
    """Return a request in RESP, Redis's protocol: an array of bulk strings."""
    parts = [b"$%d\r\n%b\r\n" % (len(w), w) for w in map(str.encode, words)]
    return b"*%d\r\n%b" % (len(words), b"".join(parts))


def parse_info(reply):
    """Return what a reply to INFO says, as {name: text}; {} if nothing."""
    lines = reply.decode(errors="replace").split("\r\n")
    pairs = (line.partition(":") for line in lines[1:])
    return {name: value for name, colon, value in pairs if colon}


# ---- A server of our own ----------------------------------------------------


class Server:
    """Runs a server script on a free port while a `with` block lasts."""

    def __init__(self, script, timeout, command=None):
        self.script = script
        self.timeout = timeout  # seconds to start in, and to stop in
        self.command = command or [sys.executable, script, "--port", "0"]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE)
        watchdog = threading.Timer(self.timeout, self.process.kill)
        watchdog.start()
        try:
            line = self.process.stdout.readline(200).decode(errors="replace")
            where = re.search(r"listening on (\S+):(\d{1,5})$", line.strip())
            if not where:
                raise Failed(f"{self.script} did not start: it said {line!a}")
        except BaseException:  # or we are told to end: so is the server
            self.process.kill()
            self.process.wait()
            raise
        finally:
            watchdog.cancel()
        self.host, self.port = where[1], int(where[2])
        return self

    def __exit__(self, error, *details):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.2 if error else 0)  # it may have died
        died = self.process.returncode is not None
        self.process.terminate()
        try:
            self.process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
        status = self.process.wait()
        self.process.stdout.close()  # unread: it could be without end
        if died or (status and not error):
            how = "died" if died else "stopped"
            raise Failed(f"{self.script} {how}: status {status}") from None


# ---- Drawing ----------------------------------------------------------------


def glyphs():
    """Return two signs, for waiting and for talking, that stdout can show."""
    encoding = (sys.stdout.encoding or "").lower()
    return "░█" if encoding.startswith("utf") else ".#"


def sample(things, most=MOST_LINES):
    """Return `most` of the things, evenly spread, or all if they are fewer."""
    if len(things) <= most:
        return things
    return [things[i * (len(things) - 1) // (most - 1)] for i in range(most)]


def drawing(crowd, scale):
    """Return lines of text: what each did until now, in `scale` seconds."""
    waiting, talking = glyphs()
    now = time.monotonic()
    margin = len(str(len(crowd.visitors))) + 2
    columns = WIDTH - margin
    lines = [f"{crowd.name}: {crowd.elapsed:.2f} s"]
    lines[0] += f"0 to {scale:.2f} s".rjust(WIDTH - len(lines[0]))
    for visitor in sample(crowd.visitors):
        going_on = [(visitor.asked, now)] if visitor.asked else []
        spans = [(talking, visitor.begin, visitor.end or now)]
        spans += [(waiting, *wait) for wait in visitor.waits + going_on]
        row = [" "] * columns
        for sign, begin, end in spans:
            first = round((begin - crowd.start) / scale * columns)
            last = round((end - crowd.start) / scale * columns)
            if sign == talking:
                last = max(last, first + 1)  # who was there is seen
            row[first:last] = sign * (last - first)
        row.insert(0, f"{visitor.number:{margin - 1}} ")
        lines.append("".join(row).rstrip()[:WIDTH])
    return lines


def results(crowd):
    """Return what came of it, as {row: text}, INFO's figures included."""
    first = max(v.waits[0][1] for v in crowd.visitors) - crowd.start
    rows = {
        "": " ".join(crowd.name.split("_")[:2])[:13],
        "time elapsed": f"{crowd.elapsed:.2f} s",
        "first reply, worst": f"{first:.3f} s",
    }
    for row, info, *names in [
        ("threads, midway", crowd.midway, "threads"),
        ("CPU seconds", crowd.info, "used_cpu_user", "used_cpu_sys"),
        ("polls", crowd.info, "polls"),
        ("wake-ups", crowd.info, "wakeups"),
    ]:
        if names[0] in info:
            rows[row] = f"{figure(info, *names):,.2f}".replace(".00", "")
    return rows


def figure(info, *names):
    """Return the sum of figures of INFO. Raises Failed if that cannot be."""
    texts = [info.get(name, "missing") for name in names]
    with contextlib.suppress(ValueError):
        if 0 < sum(map(float, texts)) < 1e15:  # the server has done something
            return sum(map(float, texts))
    raise Failed(f"INFO says {' + '.join(names)} is {' + '.join(texts)!a:.40}")


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


# ---- The command line -------------------------------------------------------


def raise_descriptor_limit(needed):
    """Allow this process, and those that it starts, as many open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        if 0 <= soft < needed:  # a negative number stands for no limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (OSError, ValueError):
        raise Failed(f"{needed} open files needed, {hard} allowed") from None


def write(path, lines):
    """Write lines of text to a file, in a folder that is made if need be."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        raise Failed(f"cannot write {path}: {error.strerror}") from None


def visit(script, options, scale, live):
    """Visit a server, of our own if there is a script; return the Crowd."""
    lines = []

    def redraw():
        up = f"\x1b[{len(lines)}A" if lines else ""  # to its first line
        lines[:] = drawing(crowd, max(scale, crowd.elapsed))
        print(up + "\x1b[K\n".join(lines), end="\x1b[K\n", flush=True)

    own = Server(script, options.timeout) if script else None
    with own or contextlib.nullcontext(options) as server:
        crowd = Crowd(server.host, server.port, options)
        crowd.name = os.path.basename(script or crowd.name)
        crowd.run(redraw if live else lambda: None)
    return crowd


def check_transcript(crowd, first):
    """See that a server gave the right replies, the same as the first."""
    for one, other in zip(first.visitors, crowd.visitors):
        if one.transcript != other.transcript:
            texts = one.transcript, other.transcript
            diff = difflib.unified_diff(*texts, first.name, crowd.name)
            sys.stdout.writelines(diff)
            raise Failed(f"{crowd.name} and {first.name} reply differently")
    if crowd.mistakes:
        raise Failed(f"{crowd.name}: {crowd.mistakes[0]}")


def command_line():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message}")
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
    columns, lines = shutil.get_terminal_size()
    room = columns > WIDTH and lines > min(options.connections, MOST_LINES) + 1
    live = room and sys.stdout.isatty()
    crowds = []
    for number, script in enumerate(options.server or [None]):
        crowds.append(crowd := visit(script, options, scale, live))
        if options.transcript:
            said = [line for v in crowd.visitors for line in v.transcript]
            write(options.transcript[number], said)
        check_transcript(crowd, crowds[0])
    longest = max(crowd.elapsed for crowd in crowds)
    if not live or longest > scale:  # it took longer than expected
        for crowd in crowds:
            print(*drawing(crowd, max(scale, longest)), sep="\n")
    if len(crowds) > 1:
        print(f"All {len(crowds)} transcripts are the same.")
    columns = [results(crowd) for crowd in crowds]
    names = dict.fromkeys(name for rows in columns for name in rows)
    print(*table(columns, names), sep="\n")


if __name__ == "__main__":
    # Whoever ends this client ends the server that it has started, too.
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except Failed as failure:
        sys.exit(f"client.py: {failure}")
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
