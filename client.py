#!/usr/bin/env python3
"""Many clients at once, to make the difference between the servers visible.

Each client opens a connection, asks, thinks for a moment, asks again:

    SET key:1 value     INCR counter     GET key:1     INCR counter

The key is its own, the counter belongs to all. Every reply is checked. Then
each client becomes a line on a time axis: waiting for the server, or in
conversation with it.

Start it:  python3 client.py --server 1_single_blocking.py
or, with a server that runs already:  python3 client.py --port 6380
"""

import argparse
import asyncio
import contextlib
import difflib
import html
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time

WIDTH = 79  # columns to draw in
ATTEMPTS = 10  # to connect, each after a longer pause
BATCH = 1000  # clients to connect at once; the queue for accept() is finite
CONNECT_TIMEOUT = 3  # seconds; the kernel alone would ask ever more seldom
MOST_LINES = 20  # to draw; of more clients than that, a sample is shown


class Failed(Exception):
    """It cannot be done, or went wrong; the message says why."""


class NotAccepted(Failed):
    """The connection was refused or reset.

    When thousands connect at once, a kernel with a full queue does that before
    the server has seen the connection. So it is worth trying again.
    """


# ---- Talking ----------------------------------------------------------------


class Client:
    """One client's conversation, and when what happened (in seconds)."""

    def __init__(self, number):
        self.number = number
        self.begin = 0.0  # when it began to connect
        self.end = 0.0
        self.waits = []  # pairs: when it asked, when it was answered
        self.transcript = []  # a line for each request

    @property
    def first_reply(self):
        """Seconds from the wish to connect to the first reply."""
        return self.waits[0][1] - self.begin


class Conversation:
    """All clients' conversations with one server."""

    def __init__(self, host, port, options):
        self.host = host
        self.port = port
        self.options = options
        self.clients = [Client(n + 1) for n in range(options.connections)]
        self.counts = []  # the replies to INCR, of all clients
        self.mistakes = []  # replies that were not what they should be
        self.reached = False  # True once a connection has been made
        self.served = 0
        self.start = 0.0
        self.midway = {}  # INFO while the clients were there, and at the end
        self.info = {}
        # Keys of our own: the server may have been running for a while.
        self.prefix = f"{os.getpid()}-{time.time_ns():x}:"

    @property
    def elapsed(self):
        return max(client.end for client in self.clients) - self.start

    def run(self):
        """Hold all conversations. Raises Failed if one could not be held."""
        try:
            asyncio.run(asyncio.wait_for(self.talk(), self.options.timeout))
        except asyncio.TimeoutError:
            raise Failed(
                f"time ran out after {self.options.timeout:g} s: "
                f"{self.served} of {len(self.clients)} clients were served"
            ) from None

    async def talk(self):
        self.start = time.monotonic()
        self.all_open = asyncio.Event()
        progress = asyncio.ensure_future(self.show_progress())
        tasks = []
        try:
            for client in self.clients:
                if len(tasks) % BATCH == 0:
                    await self.let_the_server_catch_up(tasks)
                tasks.append(asyncio.ensure_future(self.converse(client)))
            self.all_open.set()
            await asyncio.gather(*tasks)
            await self.check_counter()
        finally:
            progress.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await progress

    async def let_the_server_catch_up(self, tasks):
        """Wait until those that have connected are served, but not for ever.

        The kernel drops what does not fit into the queue for accept(), and
        it may take the dropped ones a minute to get through.
        """
        end = time.monotonic() + CONNECT_TIMEOUT
        clients = self.clients[: len(tasks)]
        while not all(client.waits for client in clients):
            if time.monotonic() > end or any(task.done() for task in tasks):
                break
            await asyncio.sleep(0.01)

    async def converse(self, client):
        """One client's conversation, from connect to close."""
        client.begin = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await self.connect_and_talk(client)
                break
            except NotAccepted:
                # The first request is a SET: to send it twice does no harm.
                if client.waits or attempt == ATTEMPTS:
                    raise
                await asyncio.sleep(0.1 * attempt)
        client.end = time.monotonic()
        self.served += 1

    async def connect_and_talk(self, client):
        asked = client.begin
        reader, writer = await self.connect()
        try:
            for turn in range(self.options.requests):
                if turn:
                    await asyncio.sleep(self.options.think)
                    asked = time.monotonic()
                words, expected = self.request(client.number, turn)
                reply = await self.ask(reader, writer, *words)
                client.waits.append((asked, time.monotonic()))
                self.check(client, words, reply, expected)
                await self.all_open.wait()  # so that all are there together
                if client.number == 1 and turn == self.options.requests // 2:
                    self.midway = await self.ask_info(reader, writer)
        finally:
            writer.close()

    def request(self, number, turn):
        """Return what a client asks in this turn, and the right reply."""
        if turn % 2:
            return ("INCR", "counter"), None  # it depends on the others
        key, value = f"key:{number}", f"value-{number}.{turn // 4 + 1}"
        if turn % 4:
            return ("GET", key), f"${len(value)}\r\n{value}\r\n".encode()
        return ("SET", key, value), b"+OK\r\n"

    def check(self, client, words, reply, expected):
        """Write a request and its reply down, and see that they fit."""
        asked = f"client {client.number}: {' '.join(words)}"
        if expected is None and reply[:1] == b":" and reply[1:-2].isdigit():
            self.counts.append(int(reply[1:]))
            expected = reply = b":(a number)"
        if reply != expected:
            self.mistakes.append(f"{asked} was answered with {reply[:80]!r}")
        answer = reply.decode(errors="backslashreplace").split("\r\n")
        client.transcript.append(f"{asked} -> {' '.join(answer).rstrip()}")

    async def check_counter(self):
        """See that no INCR was lost or done twice. Ask for INFO, as well."""
        reader, writer = await self.connect()
        try:
            total = len(self.counts)
            reply = await self.ask(reader, writer, "INCRBY", "counter", "0")
            if reply != b":%d\r\n" % total:
                self.mistakes.append(
                    f"after INCR, {total} times, the counter is {reply[:80]!r}"
                )
            elif sorted(self.counts) != list(range(1, total + 1)):
                self.mistakes.append("INCR gave the same number twice")
            self.info = await self.ask_info(reader, writer)
        finally:
            writer.close()

    async def connect(self):
        """Open a connection; return the streams to read from and write to."""
        try:
            streams = await asyncio.wait_for(
                asyncio.open_connection(self.host, self.port), CONNECT_TIMEOUT
            )
            self.reached = True
            return streams
        except asyncio.TimeoutError:
            error = NotAccepted("no answer")
        except (OSError, OverflowError, ValueError) as failure:
            kind = NotAccepted if self.reached else Failed
            error = kind(getattr(failure, "strerror", None) or failure)
        raise type(error)(f"no server at {self.host}:{self.port}: {error}")

    async def ask(self, reader, writer, command, *words):
        """Send a request; return its reply, as the bytes that came."""
        if words:
            words = self.prefix + words[0], *words[1:]
        reply = b""
        try:
            writer.write(encode(command, *words))
            reply = await reader.readline()
            if reply[:1] == b"$" and reply != b"$-1\r\n":
                reply += await reader.readexactly(int(reply[1:]) + 2)
        except ValueError:
            raise Failed(f"this is no reply: {reply[:80]!r}") from None
        except OSError as error:
            raise NotAccepted(f"a connection broke: {error}") from None
        except asyncio.IncompleteReadError:
            reply = b""
        if not reply.endswith(b"\r\n"):
            raise Failed("the server closed a connection and owed it a reply")
        return reply

    async def ask_info(self, reader, writer):
        """Return what the server says of itself, as a dict; {} if nothing."""
        return parse_info(await self.ask(reader, writer, "INFO"))

    async def show_progress(self):
        """Every now and then say how far it is, if somebody is watching."""
        shown = False
        try:
            while sys.stderr.isatty():
                await asyncio.sleep(0.5)
                print(
                    f"\r{self.served} of {len(self.clients)} clients served",
                    f"after {time.monotonic() - self.start:.0f} s ",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
                shown = True
        finally:
            if shown:
                print("\r" + " " * 60, end="\r", file=sys.stderr, flush=True)


def encode(*words):
    """Return a request in RESP, Redis's protocol: an array of bulk strings."""
    parts = [f"*{len(words)}\r\n".encode()]
    for word in map(str.encode, words):
        parts.append(b"$%d\r\n%b\r\n" % (len(word), word))
    return b"".join(parts)


def parse_info(reply):
    """Return what a reply to INFO says, as {name: text}; {} if nothing."""
    lines = reply.decode(errors="replace").split("\r\n")
    pairs = (line.partition(":") for line in lines[1:])
    return {name: value for name, colon, value in pairs if colon}


# ---- A server of our own ----------------------------------------------------


class Server:
    """Runs a server script on a free port while a `with` block lasts."""

    def __init__(self, script, timeout, command=()):
        self.script = script
        self.timeout = timeout  # seconds to start in, and to stop in
        self.command = command or [sys.executable, script, "--port", "0"]

    def __enter__(self):
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, universal_newlines=True
        )
        watchdog = threading.Timer(self.timeout, self.process.kill)
        watchdog.start()
        try:
            line = self.process.stdout.readline()
        except BaseException:  # we are told to end: so is the server
            self.process.kill()
            raise
        finally:
            watchdog.cancel()
        if "listening on " not in line:
            self.process.kill()
            self.process.wait()
            raise Failed(f"{self.script} did not start")
        address = line.split("listening on ")[1].strip()
        self.host, _, port = address.rpartition(":")
        self.port = int(port)
        return self

    def __exit__(self, *exception):
        if exception[0]:  # what went wrong may be that the server has died
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)
        died = self.process.poll()
        self.process.terminate()
        try:
            self.process.communicate(timeout=self.timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        status = self.process.returncode
        if died is not None:
            raise Failed(f"{self.script} died: exit status {status}") from None
        if status and not exception[0]:
            raise Failed(f"{self.script} stopped with exit status {status}")


# ---- Drawing ----------------------------------------------------------------


def glyphs():
    """Return two signs, for waiting and for talking, that stdout can show."""
    try:
        "░█".encode(sys.stdout.encoding or "ascii")
        return "░█"
    except UnicodeEncodeError:
        return ".#"


def sample(things, most):
    """Return `most` of the things, evenly spread, or all if they are fewer."""
    if len(things) <= most:
        return things
    return [things[i * (len(things) - 1) // (most - 1)] for i in range(most)]


def timeline(conversation):
    """Return lines of text: what each client did, from left to right."""
    waiting, talking = glyphs()
    clients = conversation.clients
    shown = sample(clients, MOST_LINES)
    margin = len(str(len(clients))) + 3
    columns = WIDTH - margin
    step = conversation.elapsed / columns
    lines = []
    for client in shown:
        row = ""
        for column in range(columns):
            begin = conversation.start + column * step
            end = begin + step
            waited = sum(
                max(0, min(end, answered) - max(begin, asked))
                for asked, answered in client.waits
            )
            present = min(end, client.end) - max(begin, client.begin)
            if present > 0:
                row += waiting if waited > present / 2 else talking
            else:
                row += " "
        lines.append(f"{client.number:{margin - 1}} {row.rstrip()}")
    end = f"{conversation.elapsed:.2f} s"
    lines.append(" " * margin + "0 s" + end.rjust(columns - 3))
    legend = f"{waiting} waits for the server   {talking} is in conversation"
    if len(shown) < len(clients):
        legend += f"   ({len(shown)} of {len(clients)} clients)"
    lines.append(" " * margin + legend)
    return lines


def results(conversation):
    """Return what came of it, as {name: text}, INFO's figures included."""
    firsts = [client.first_reply for client in conversation.clients]
    midway, info = conversation.midway, conversation.info
    memory = total(info, "used_memory_peak")
    return {
        "time elapsed": f"{conversation.elapsed:.2f} s",
        "first reply, median": milliseconds(statistics.median(firsts)),
        "first reply, worst": milliseconds(max(firsts)),
        "clients, midway": midway.get("connected_clients", "-"),
        "threads, midway": midway.get("threads", "-"),
        "CPU time of the server": f"{cpu_time(info):.2f} s",
        "memory, at most": f"{memory / 2**20:.1f} MiB",
        **tally(info),
    }


def tally(info):
    """Return the server's own count of what the pattern took."""
    switches = total(
        info, "voluntary_context_switches", "involuntary_context_switches"
    )
    rows = {"context switches": f"{switches:,.0f}"}
    if "threads_started" in info:
        rows["threads started"] = info["threads_started"]
    if "polls" in info:
        rows["polls"] = f"{total(info, 'polls'):,.0f}"
        in_vain = total(info, "polls_empty_handed") / total(info, "polls")
        rows["polls empty-handed"] = f"{in_vain:.2%}"
    if "wakeups" in info:
        wakeups, events = total(info, "wakeups"), total(info, "events")
        rows["wake-ups"] = f"{wakeups:,.0f}"
        rows["events per wake-up"] = f"{events / wakeups:.2f}"
    return rows


def total(info, *names):
    """Add up fields of INFO. One that the server does not have counts 0."""
    return sum(float(info.get(name, 0)) for name in names)


def cpu_time(info):
    return total(info, "used_cpu_user", "used_cpu_sys")


def milliseconds(seconds):
    return f"{seconds * 1000:.0f} ms"


def table(columns, names, indent=""):
    """Return lines of text: a line for each name, a column for each server.

    `columns` is {title: {name: text}}. A line with no text is left out.
    """
    width = min((WIDTH - 24) // len(columns), 14)
    lines = []
    for name in names:
        texts = [rows.get(name, "-") for rows in columns.values()]
        if set(texts) != {"-"}:
            texts = [text.rjust(width) for text in texts]
            lines.append(f"{indent + name:24}" + "".join(texts))
    return lines


def heading(columns):
    return "".join(table({title: {"": title} for title in columns}, [""]))


# ---- A picture --------------------------------------------------------------

STYLE = """
text { font: 13px sans-serif; fill: #1f2328; }
.page { fill: #ffffff; }
.waits { fill: #e8b339; }
.talks { fill: #1f6feb; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .page { fill: #0d1117; }
  .waits { fill: #9a6700; }
  .talks { fill: #58a6ff; }
}
"""


def picture(conversations):
    """Return an SVG, as text: all servers' clients, on one scale of time.

    `conversations` is {name of the script: Conversation}.
    """
    left, right, height = 40, 760, 14  # pixels; the height is that of a client
    longest = max(c.elapsed for c in conversations.values())
    parts, y = [], 10

    def text(x, words, anchor="start"):
        parts.append(
            f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">'
            f"{html.escape(words)}</text>"
        )

    def bar(kind, begin, end):
        """Draw a bar from one time to another, in seconds from the start."""
        scale = (right - left) / longest
        x, width = left + begin * scale, (end - begin) * scale
        parts.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{y - height + 4}"'
            f' width="{max(width, 0.5):.1f}" height="{height - 3}"/>'
        )

    y += 15
    bar("waits", 0, longest / 30)
    text(left + 32, "waits for the server")
    bar("talks", longest / 4, longest / 4 + longest / 30)
    text(left + 212, "is in conversation with it")
    for script, conversation in conversations.items():
        y += 30
        text(left, f"{script}: {conversation.elapsed:.2f} s")
        y += 4
        for client in sample(conversation.clients, MOST_LINES):
            y += height
            text(left - 6, str(client.number), "end")
            begin, end, start = client.begin, client.end, conversation.start
            bar("talks", begin - start, end - start)
            for asked, answered in client.waits:
                bar("waits", asked - start, answered - start)
    y += 20
    text(left, "0 s")
    text(right, f"{longest:.2f} s", "end")
    y += 15
    size = f'width="{right + 40}" height="{y}" viewBox="0 0 {right + 40} {y}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
            "<title>What each client did: wait, or talk to the server</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{right + 40}" height="{y}"/>',
            *parts,
            "</svg>\n",
        ]
    )


# ---- Comparing --------------------------------------------------------------

CROWD = 500  # connections to hold open
PATIENCE = 1.0  # seconds to wait for a reply before it counts as missing

# The rows of the table, and below each group of them the reason.
QUESTIONS = [
    (
        "Eight clients at once, each thinks between its requests",
        ["time elapsed", "first reply, median", "first reply, worst"],
        "The first pattern serves one to the end while the others wait.",
    ),
    (
        "A client sends half a request and goes quiet",
        ["another's PING"],
        "Blocked in recv for one client, a thread can do nothing for another.",
    ),
    (
        "A handler blocks for 0.5 s (DEBUG SLEEP 0.5)",
        ["another's PING then"],
        "Where one thread serves all, a handler that blocks holds up all. Here"
        "\n  the event loop loses to threads: its handlers must never block.",
    ),
    (
        "Eight clients are connected, and silent",
        ["CPU in use"],
        "Who blocks, sleeps. Who polls, works all the time, for nothing.",
    ),
    (
        f"{CROWD} clients are connected, and each sends a PING",
        ["threads meanwhile", "memory for each", "all answered after"],
        "A thread has a stack; a client of the loop is a few small objects.",
    ),
    (
        "What that took, by the server's own count",
        [
            "context switches",
            "threads started",
            "polls empty-handed",
            "wake-ups",
            "events per wake-up",
        ],
        "Threads cost switches, polling costs calls for nothing. The more"
        "\n  clients are busy, the more events the loop gets for one wake-up.",
    ),
]

CHOICE = """\
Choose  1 single  for one client at a time: a tool, a test, a first try.
        2 multi   for some hundreds of clients, and handlers that may block.
        3 busy    when a core may burn to save microseconds. Hardly ever.
        4 kqueue  for thousands of clients, and handlers that never block."""


class Line:
    """A connection for one question at a time. Waits PATIENCE at most."""

    def __init__(self, server):
        address = server.host, server.port
        self.socket = socket.create_connection(address, PATIENCE)
        self.replies = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.replies.close()
        self.socket.close()

    def send(self, *words):
        self.asked = time.monotonic()
        self.socket.sendall(encode(*words))

    def reply(self):
        """Return the reply, as bytes, or None if it takes too long."""
        try:
            line = self.replies.readline()
            if line[:1] == b"$" and line != b"$-1\r\n":
                line += self.replies.read(int(line[1:]) + 2)
        except OSError:  # most likely socket.timeout
            return None
        if not line:
            raise Failed("the server closed a connection")
        return line

    def time_to_reply(self):
        """Return how long the reply has taken, as text."""
        if self.reply() is None:
            return "must wait"
        return milliseconds(time.monotonic() - self.asked)

    def info(self):
        self.send("INFO")
        return parse_info(self.reply() or b"")


def ask_half_a_request(server):
    with Line(server) as half, Line(server) as other:
        half.socket.sendall(encode("PING")[:-4])
        other.send("PING")
        return {"another's PING": other.time_to_reply()}


def ask_a_blocking_handler(server):
    with Line(server) as sleeper, Line(server) as other:
        sleeper.send("DEBUG", "SLEEP", "0.5")
        time.sleep(0.05)  # by now it is asleep
        other.send("PING")
        return {"another's PING then": other.time_to_reply()}


def ask_silent_clients(server):
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(Line(server)) for _ in range(8)]
        before = lines[0].info()
        time.sleep(1)
        used = cpu_time(lines[0].info()) - cpu_time(before)
    return {"CPU in use": f"{used:.0%}"}


def ask_a_crowd(server):
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(Line(server))]
        before = resident_memory(lines[0].info())
        with contextlib.suppress(OSError):  # not all find a place in the queue
            while len(lines) < CROWD:
                lines.append(stack.enter_context(Line(server)))
        start = time.monotonic()
        for line in lines:
            line.send("PING")
        answered = 0
        while answered < len(lines) and lines[answered].reply():
            answered += 1
        elapsed = time.monotonic() - start
        info = lines[0].info()
        after = resident_memory(info)
    rows = {"threads meanwhile": info["threads"]}
    if answered < CROWD:
        rows["all answered after"] = f"{answered} was"
    else:
        rows["all answered after"] = milliseconds(elapsed)
        if before and after:
            each = (after - before) / CROWD / 1024
            rows["memory for each"] = f"{each:.1f} KiB"
    return rows


def resident_memory(info):
    """Return the bytes in use by the process that sent `info`, or None."""
    pid = info["process_id"]
    with contextlib.suppress(OSError, IndexError):  # on Linux
        with open(f"/proc/{pid}/status") as status:
            return int(status.read().split("VmRSS:")[1].split()[0]) * 1024
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        command = ["ps", "-o", "rss=", "-p", pid]
        return int(subprocess.check_output(command)) * 1024
    return None


def compare(scripts, options):
    """Ask all servers all questions, and print the table of the answers."""
    columns = {}
    for script in scripts:
        if sys.stderr.isatty():
            print(f"\r{script} ...".ljust(40), end="\r", file=sys.stderr)
        with Server(script, options.timeout) as server:
            conversation = Conversation(server.host, server.port, options)
            conversation.run()
            rows = results(conversation)
            for ask in (
                ask_half_a_request,
                ask_a_blocking_handler,
                ask_silent_clients,
                ask_a_crowd,
            ):
                rows.update(ask(server))
            with Line(server) as line:
                rows.update(tally(line.info()))
        columns[title(script, columns)] = rows
    print(heading(columns))
    for question, names, reason in QUESTIONS:
        print("", question, sep="\n")
        print(*table(columns, names, "  "), f"  {reason}", sep="\n")
    print("", CHOICE, sep="\n")


# ---- The command line -------------------------------------------------------


def raise_descriptor_limit(needed):
    """Allow this process as many open files as it may have.

    Raises Failed if they are fewer than `needed`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in hard, 10240:  # macOS may say "unlimited" and take only 10240
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            soft = limit
            break
    if needed > soft != resource.RLIM_INFINITY:
        raise Failed(
            f"this takes {needed} open files, and only {soft} are allowed here"
            " (see ulimit -n)"
        )


def visit(script, options):
    """Talk to one server, show what came of it, and return the Conversation.

    `script` is started and stopped again; None is for a server that runs.
    """
    print(
        f"{os.path.basename(script or 'the server')}:"
        f" {options.connections} clients at once,"
        f" {options.requests} requests each, {options.think:g} s between\n",
        flush=True,
    )
    if script:
        with Server(script, options.timeout) as server:
            conversation = Conversation(server.host, server.port, options)
            conversation.run()
    else:
        conversation = Conversation(options.host, options.port, options)
        conversation.run()
    print(*timeline(conversation), "", sep="\n", flush=True)
    return conversation


def title(script, taken):
    """Return a short name for a script: "3 busy" for 3_busy_wait.py."""
    stem = os.path.splitext(os.path.basename(script))[0]
    short = " ".join(stem.split("_")[:2])
    same = sum(name.split(" (")[0] == short for name in taken)
    return f"{short} ({same + 1})" if same else short


def transcript(conversation):
    """Return, as lines, what was said. Nothing in it depends on timing."""
    lines = []
    for client in conversation.clients:
        lines += client.transcript
    wrong = len(conversation.mistakes)
    lines.append(f"all: {len(conversation.counts)} INCRs, {wrong} mistakes")
    return [f"{line}\n" for line in lines]


def write(path, lines):
    """Write lines of text to a file, in a folder that is made if need be."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        raise Failed(f"cannot write {path}: {error.strerror}") from None


def command_line():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message}")
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="of a server that runs already")
    add("--port", type=int, default=6380)
    add("--connections", type=int, default=8, help="at once (8)")
    add("--requests", type=int, default=4, help="on each connection (4)")
    add("--think", type=float, default=0.05, help="seconds between (0.05)")
    add("--timeout", type=float, default=30, help="seconds for a server (30)")
    add(
        "--server",
        action="append",
        default=[],
        metavar="SCRIPT",
        help="start this one and stop it again; may be given several times",
    )
    add(
        "--transcript",
        action="append",
        default=[],
        metavar="FILE",
        help="write down what was said; once, or once for each --server",
    )
    add("--svg", metavar="FILE", help="draw the clients of all servers")
    add(
        "--compare",
        action="store_true",
        help="ask each --server what its pattern costs, and print a table",
    )
    options = parser.parse_args()
    if options.compare and not options.server:
        parser.error("--compare needs a --server")
    for name in "connections", "requests", "timeout":
        if not 0 < getattr(options, name) < 1e6:
            parser.error(f"--{name} must be more than 0")
    if not 0 <= options.think < 1e6:
        parser.error("--think must be 0 or more")
    if len(options.transcript) not in (0, 1, len(options.server)):
        parser.error("--transcript goes once, or once with each --server")
    return options


def main():
    options = command_line()
    raise_descriptor_limit(options.connections + 20)
    if options.compare:
        return compare(options.server, options)
    scripts = options.server or [None]
    columns, transcripts, conversations = {}, [], {}
    for number, script in enumerate(scripts):
        conversation = visit(script, options)
        transcripts.append(transcript(conversation))
        conversations[os.path.basename(script or "server")] = conversation
        if options.transcript:
            path = options.transcript[number % len(options.transcript)]
            write(path, transcripts[-1])
        if conversation.mistakes:
            count, first = len(conversation.mistakes), conversation.mistakes[0]
            raise Failed(f"{count} wrong; the first: {first}")
        columns[title(script or "server", columns)] = results(conversation)
    if options.svg:
        write(options.svg, [picture(conversations)])
    if len(scripts) > 1:
        for script, other in zip(scripts[1:], transcripts[1:]):
            if other != transcripts[0]:
                names = scripts[0], script
                sys.stdout.writelines(
                    difflib.unified_diff(transcripts[0], other, *names)
                )
                raise Failed(f"{script} gave other replies than {scripts[0]}")
        print(f"All {len(scripts)} transcripts are the same: ", end="")
        print(f"{len(transcripts[0]) - 1} requests, the same replies.\n")
    names = dict.fromkeys(name for rows in columns.values() for name in rows)
    print(heading(columns), *table(columns, names), sep="\n")


if __name__ == "__main__":
    # Whoever ends this client ends the server that it has started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except Failed as failure:
        sys.exit(f"client.py: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
