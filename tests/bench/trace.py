#!/usr/bin/env python3
"""Where each server waits: its threads, on one axis of time with its clients.

Each server script is run unchanged under recorder.py, while clients play a
scene: `thinking` is that of `make demo`; in `quiet` a client sends half a
request and says no more; in `blocking` one asks for a handler that blocks.
The scene is played without the recorder too, to see what that costs.

Start it:  make trace    or    make trace SCENE=quiet

Clients and server are two processes. Their times can be compared, since
time.monotonic() is one clock for all processes of a machine (Linux, macOS, the
BSDs). Should it not be, this ends with a sentence that says so.
"""

import argparse
import asyncio
import collections
import contextvars
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from xml.sax.saxutils import escape

from harness import (
    SCRIPTS,
    ROOT,
    TIMEOUT,
    Crowd,
    Failed,
    Server,
    encode,
    glyphs,
    machine,
    progress,
    run,
    sample,
    write,
)

WIDTH = 79  # columns
MARGIN = 10  # of these, for names
RECORDER = Path(__file__).with_name("recorder.py")
QUIET = 0.6  # seconds that the quiet client stays
HALF = encode("PING")[:-4]
CALLS = ["accept", "recv", "send", "queue", "sleep", "lock"]
STATES = CALLS + ["poll", "running"]  # what a thread can be in

# What one thread was in: one of STATES; when; and with recv and send, for
# which client. `vain` is {call: how many of them failed}.
Span = collections.namedtuple("Span", "state begin end client vain")

# ---- The scenes -------------------------------------------------------------

here = contextvars.ContextVar("here", default=None)  # whose task this is


class Thinking(Crowd):
    """The clients of `make demo`: all talk at once, and think in between."""

    title = "each asks 4 times, and thinks for 0.05 s in between"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.ports = {}  # port of a connection: the number of its client

    async def visit(self, visitor):
        here.set(visitor.number)
        await super().visit(visitor)

    async def ask(self, reader, writer, *words):
        self.ports[writer.get_extra_info("sockname")[1]] = here.get()
        return await super().ask(reader, writer, *words)


class Pinging(Thinking):
    """They send PINGs; but what the first asks, and when, is the scene's."""

    async def visit(self, visitor):
        visitor.begin = visitor.asked = time.monotonic()
        reader, writer = await asyncio.open_connection(self.host, self.port)
        self.ports[writer.get_extra_info("sockname")[1]] = visitor.number
        try:
            if visitor.number == 1:
                requests = self.first
            else:
                requests = [encode("PING")] * self.options.requests
            for request in requests:
                if visitor.waits:
                    await asyncio.sleep(self.options.think)
                visitor.asked = time.monotonic()
                writer.write(request)
                if request == HALF:
                    visitor.asked = None  # the server waits, not the client
                    await asyncio.sleep(QUIET)
                    break
                if not (await reader.readline()).startswith(b"+"):
                    raise Failed(f"no good reply to {request!r}")
                visitor.waits.append((visitor.asked, time.monotonic()))
        except OSError as error:
            raise Failed(f"a connection broke: {error}") from None
        finally:
            writer.close()
        visitor.asked = None
        visitor.end = time.monotonic()


class Quiet(Pinging):
    title = "client 1 sends half a request and says no more, the others PING"
    first = [HALF]


class Blocking(Pinging):
    title = "client 1 asks for DEBUG SLEEP 0.5, the others PING"
    first = [encode("PING"), encode("DEBUG", "SLEEP", "0.5")]


SCENES = {"thinking": Thinking, "quiet": Quiet, "blocking": Blocking}

# ---- Recording --------------------------------------------------------------


class Trace:
    """One server's run: its clients, its threads, and how long it took."""

    def __init__(self, script, crowd, untraced, record):
        self.script = os.path.basename(script)
        self.crowd = crowd
        self.start = crowd.start
        self.elapsed = crowd.elapsed
        self.untraced = untraced  # the Crowd that nobody recorded
        self.pid = record["pid"]
        lanes = [Lane(lane, self) for lane in record["lanes"]]
        # A thread that ended before the scene, or began after it, is not seen.
        self.lanes = [lane for lane in lanes if lane.begin < lane.end]
        self.lanes.sort(key=lambda lane: (not lane.main, lane.begin))

    def shares(self):
        """Return {state: its part of the threads' time}, from 0 to 1.

        A thread that only waits for another one takes part in nothing, and is
        left out.
        """
        seconds = dict.fromkeys(STATES, 0.0)
        for lane in self.lanes:
            if not lane.is_beside():
                for span in lane.spans():
                    seconds[span.state] += span.end - span.begin
        total = sum(seconds.values()) or 1
        return {state: spent / total for state, spent in seconds.items()}

    def calls(self):
        """Return two dicts: how many calls of each kind; how many in vain."""
        calls, vain = collections.Counter(), collections.Counter()
        for lane in self.lanes:
            for call in lane.calls:
                calls.update(call.vain if call.state == "poll" else [call.state])
                vain.update(call.vain)
        return calls, vain


class Lane:
    """What one thread was in. Times are seconds from the scene's start.

    What was before the start, or after the end, is left out.
    """

    def __init__(self, record, trace):
        self.main = record["main"]
        self.begin = max(0.0, record["begin"] - trace.start)
        self.end = trace.elapsed
        if record["end"]:
            self.end = min(self.end, record["end"] - trace.start)
        self.calls = []  # Spans, in their order, with gaps between them
        for state, begin, end, port, vain in record["spans"]:
            begin = max(begin - trace.start, self.begin)
            end = min(end - trace.start, self.end)
            if begin <= end:
                client = trace.crowd.ports.get(port)
                if end == self.end and state != "poll":
                    vain = {}  # that it failed we would not know yet
                self.add(Span(state, begin, end, client, vain))

    def add(self, span):
        """Add a call. Polls in vain with no other call between are one."""
        if span.state == "poll" and self.calls:
            last = self.calls[-1]
            if last.state == "poll":
                vain = collections.Counter(last.vain)
                vain.update(span.vain)
                self.calls[-1] = last._replace(end=span.end, vain=dict(vain))
                return
        self.calls.append(span)

    def spans(self):
        """Return the calls, and "running" for all time between them."""
        spans = []
        now = self.begin
        for call in self.calls:
            if now < call.begin:
                spans.append(Span("running", now, call.begin, None, {}))
            spans.append(call)
            now = call.end
        if now < self.end:
            spans.append(Span("running", now, self.end, None, {}))
        return spans

    def name(self):
        """Return what the thread is for, as it shows in its calls."""
        states = {call.state for call in self.calls}
        clients = {call.client for call in self.calls if call.client}
        if "queue" in states:
            return "event loop"
        if "poll" in states:
            return "polls everybody in turn"
        if states <= {"lock"}:
            return "waits for the other thread"
        if len(clients) == 1 and "accept" not in states:
            return f"serves client {min(clients)}"
        if clients:
            return "accepts, and serves one after the other"
        return "accepts" if "accept" in states else "thread"

    def is_beside(self):
        """Return whether the thread only waits for another one."""
        return all(call.state == "lock" for call in self.calls)


def play(script, scene, options, record=None):
    """Let the clients play a scene with a server; return the Crowd.

    With `record`, the path of a file, the server writes its record there.
    """
    command = [sys.executable, script, "--port", "0"]
    if record:
        command[1:1] = [str(RECORDER), record]
    with Server(script, TIMEOUT, command) as server:
        crowd = SCENES[scene](server.host, server.port, options)
        crowd.run()
    if crowd.mistakes:
        raise Failed(f"{script}: wrong: {crowd.mistakes[0]}")
    return crowd


def trace(script, scene, options):
    """Play a scene without and with the recorder; return a Trace."""
    try:
        open(script, "rb").close()
    except OSError as error:
        raise Failed(f"cannot read {script}: {error.strerror}") from None
    progress(f"{script}: playing ...")
    untraced = play(script, scene, options)
    progress(f"{script}: playing, and recording ...")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "record.json")
        before = time.monotonic()
        crowd = play(script, scene, options, path)
        try:
            with open(path, encoding="utf-8") as file:
                record = json.load(file)
        except (OSError, ValueError):
            raise Failed(f"{script} has left no record of itself") from None
    progress("")
    if not before <= record["begin"] <= crowd.start:
        raise Failed(
            "here the clocks (time.monotonic) of two processes do not agree,"
            " so clients and server cannot be drawn on one axis"
        )
    return Trace(script, crowd, untraced, record)


# ---- Drawing ----------------------------------------------------------------

SIGNS = {  # of the terminal; with recv it is the client's number
    "accept": "a",
    "recv": "r",
    "send": "s",
    "queue": "q",
    "sleep": "z",
    "lock": "-",
    "poll": "\u2592",
    "running": "\u2588",
    "moment": "\u2502",
}
PLAIN = {"poll": "%", "running": "#", "moment": "|"}  # without Unicode
COLORS = {  # as a terminal numbers them
    "accept": 36,
    "recv": 94,
    "send": 95,
    "queue": 32,
    "sleep": 33,
    "lock": 90,
    "poll": 31,
}


class Pen:
    """Draws on stdout what it can show: signs and, on a terminal, colours."""

    def __init__(self):
        self.waiting, self.talking = glyphs()
        self.signs = dict(SIGNS)
        if self.talking == "#":
            self.signs.update(PLAIN)
        dull = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        self.colored = sys.stdout.isatty() and not dull

    def sign(self, state, client=None):
        """Return the sign of a state; with recv, that of the client."""
        text = self.signs[state]
        if state == "recv" and client:
            text = str(client % 10)  # its last digit: there is one column
        if self.colored and state in COLORS:
            text = f"\x1b[{COLORS[state]}m{text}\x1b[0m"
        return text

    def lane(self, lane, scale, columns):
        """Return a lane as a text of so many columns at most."""
        step = scale / columns
        row = []
        spans = lane.spans()
        first = 0  # of the spans that reach into the column
        for column in range(columns):
            begin, end = column * step, (column + 1) * step
            while first < len(spans) and spans[first].end <= begin:
                first += 1
            here = collections.Counter()
            for span in spans[first:]:
                if span.begin >= end:
                    break
                inside = min(end, span.end) - max(begin, span.begin)
                here[span.state, span.client] += inside
            row.append(self.column(here))
        return "".join(row).rstrip()

    def column(self, here):
        """Return the sign for a column; `here` is the time in each state."""
        if not here:
            return " "
        (state, client), _ = here.most_common(1)[0]
        # Work that is too short for a column is to be seen all the same.
        if state != "running" and "running" in {other for other, _ in here}:
            return self.sign("moment")
        return self.sign(state, client)

    def visitor(self, visitor, start, scale, columns):
        """Return a client's row: when it waits, and when it talks or thinks."""
        row = [" "] * columns

        def paint(sign, begin, end):
            first = round((begin - start) / scale * columns)
            last = round((end - start) / scale * columns)
            for column in range(first, min(max(last, first + 1), columns)):
                row[column] = sign

        paint(self.talking, visitor.begin, visitor.end)
        for asked, answered in visitor.waits:
            if answered - asked >= scale / columns / 2:
                paint(self.waiting, asked, answered)
        return "".join(row).rstrip()

    def legend(self):
        """Return lines that explain the signs."""
        sign = self.sign
        return [
            f"clients    {self.waiting} waits for the server"
            f"   {self.talking} is in conversation with it",
            f"asleep in  {sign('accept')} accept   "
            + "".join(sign("recv", number) for number in (1, 2, 3))
            + f" recv, for client 1, 2, 3   {sign('send')} send   "
            f"{sign('queue')} the queue",
            f"           {sign('sleep')} sleep    "
            f"{sign('lock')} a lock, for another thread",
            f"awake      {sign('running')} runs, or could   {sign('poll')} polls in"
            f" vain   {sign('moment')} runs for a moment",
        ]


def drawing(trace, scale, pen):
    """Return lines of text: the clients, below them the server's threads."""
    columns = WIDTH - MARGIN
    head = f"{trace.script}: {trace.elapsed:.2f} s"
    lines = [head + f"0 to {scale:.2f} s".rjust(WIDTH - len(head))]
    for visitor in sample(trace.crowd.visitors):
        name = f"client {visitor.number}"
        row = pen.visitor(visitor, trace.start, scale, columns)
        lines.append(f"{name:{MARGIN}}{row}")
    for number, lane in enumerate(sample(trace.lanes), 1):
        row = pen.lane(lane, scale, columns)
        lines.append(f"{thread_name(lane, number):{MARGIN}}{row}")
    return lines


def thread_name(lane, number):
    """Return the short name of a thread, in front of its lane."""
    return "main" if lane.main else f"thread {number}"


def figures(trace):
    """Return lines of text: where the threads' time went; calls; the cost."""
    shares, (calls, vain) = trace.shares(), trace.calls()
    shown = [
        state
        for state in STATES
        if shares[state] >= 0.0005 or (calls[state] and state != "lock")
    ]
    rows = {
        "": shown,
        "time": [f"{shares[state]:.1%}" for state in shown],
        "calls": [f"{calls[state]:,}" for state in shown],
        "in vain": [f"{vain[state]:,}" for state in shown],
    }
    for number, state in enumerate(shown):
        if state not in CALLS:
            rows["calls"][number] = rows["in vain"][number] = ""
    lines = []
    for name, texts in rows.items():
        row = "".join(text.rjust(9) for text in texts)
        lines.append(f"{name:{MARGIN}}{row}".rstrip())
    if any(lane.is_beside() for lane in trace.lanes):
        lines.append("(not counted: the thread that only waits for another)")
    return lines


def cost(traces):
    """Return lines of text: what the recorder has changed."""
    lines = [
        "What the recording costs: the same scene with it, and without it",
        f"{'':25}{'time elapsed':>18}{'CPU time':>18}{'polls':>18}",
    ]
    for trace in traces:
        crowds = trace.crowd, trace.untraced
        elapsed = [f"{crowd.elapsed:.2f} s" for crowd in crowds]
        used = [f"{cpu_time(crowd.info):.2f} s" for crowd in crowds]
        polls = [crowd.info.get("polls", "") for crowd in crowds]
        texts = [" / ".join(pair) for pair in (elapsed, used)]
        if polls[0]:
            texts.append(" / ".join(f"{int(count):,}" for count in polls))
        row = "".join(text.rjust(18) for text in texts)
        lines.append(f"{trace.script:25}{row}")
    return lines


def cpu_time(info):
    """Return the seconds of CPU time that INFO tells of."""
    names = "used_cpu_user", "used_cpu_sys"
    return sum(float(info.get(name, 0)) for name in names)


# ---- A picture --------------------------------------------------------------

LEFT, RIGHT, PAGE = 90, 850, 880  # pixels, of the axis, and of the page
ROW = {"client": 9, "lane": 16}  # pixels
STYLE = """
  svg { background: #ffffff; font-family: system-ui, sans-serif; }
  text { font-size: 12px; fill: #1f2328; }
  .head { font-size: 16px; font-weight: 600; }
  .title { font-size: 13px; font-weight: 600; }
  .small, .in { font-size: 11px; }
  .small { fill: #59636e; }
  .grid { stroke: #d1d9e0; }
  .waits { fill: #d1d9e0; }
  .talks { fill: #6e7781; }
  .accept { fill: #56b4e9; }
  .recv { fill: #0072b2; }
  .send { fill: #cc79a7; }
  .queue { fill: #009e73; }
  .sleep { fill: #e69f00; }
  .lock { fill: #afb8c1; }
  .poll { fill: #d55e00; }
  .running { fill: #000000; }
  .in { fill: #000000; }
  .in.recv, .in.queue, .in.poll { fill: #ffffff; }
  @media (prefers-color-scheme: dark) {
    svg { background: #0d1117; }
    text { fill: #f0f6fc; }
    .small { fill: #9198a1; }
    .grid { stroke: #3d444d; }
    .waits { fill: #3d444d; }
    .talks { fill: #9198a1; }
    .running { fill: #ffffff; }
  }"""


def svg(traces, title):
    """Return the drawing of all servers as SVG, as lines of text."""
    longest = max(trace.elapsed for trace in traces)
    pixels = (RIGHT - LEFT) / longest
    parts = []
    y = 28

    def text(x, y, words, kind="", anchor="start"):
        parts.append(
            f'<text x="{x:.1f}" y="{y}" class="{kind}"'
            f' text-anchor="{anchor}">{escape(words)}</text>'
        )

    def bar(kind, begin, end, height, least=0.0):
        width = max((end - begin) * pixels, least)
        parts.append(
            f'<rect class="{kind}" x="{LEFT + begin * pixels:.2f}" y="{y}"'
            f' width="{width:.2f}" height="{height}"/>'
        )

    def label(kind, begin, end, words):
        """Write into a bar, if it has room for that."""
        if (end - begin) * pixels > 7 * len(words) + 4:
            middle = LEFT + (begin + end) / 2 * pixels
            text(middle, y + 11, words, f"in {kind}", "middle")

    text(20, y, "Where each server waits", "head")
    y += 18
    text(20, y, f"{title}. {machine()}", "small")
    y += 10
    legend = dict(zip(STATES, STATES), waits="client waits", talks="client talks")
    legend.update(lock="other thread", poll="polls in vain", running="runs")
    for number, (kind, words) in enumerate(legend.items()):
        at = number % 5 * 0.2 * longest
        bar(kind, at, at + 14 / pixels, 10)
        text(LEFT + at * pixels + 20, y + 9, words, "small")
        y += 17 if number % 5 == 4 else 0
    for trace in traces:
        y += 26
        text(20, y, f"{trace.script}: {trace.elapsed:.2f} s", "title")
        y += 6
        top = y
        for visitor in sample(trace.crowd.visitors):
            start = trace.start
            bar("talks", visitor.begin - start, visitor.end - start, 7)
            for asked, answered in visitor.waits:
                bar("waits", asked - start, answered - start, 7)
            y += ROW["client"]
        text(LEFT - 8, (top + y) // 2 + 3, "clients", "small", "end")
        y += 3
        for number, lane in enumerate(sample(trace.lanes), 1):
            spans = lane.spans()
            for span in spans:
                if span.state != "running":
                    bar(span.state, span.begin, span.end, ROW["lane"] - 2)
            for span in spans:
                if span.state == "running":  # seen, however short it is
                    bar("running", span.begin, span.end, ROW["lane"] - 2, 1.0)
                elif span.client:
                    label(span.state, span.begin, span.end, str(span.client))
                else:
                    label(span.state, span.begin, span.end, span.state)
            text(LEFT - 8, y + 11, thread_name(lane, number), "small", "end")
            y += ROW["lane"]
        y += 12
        text(LEFT, y, in_words(trace), "small")
    y += 12
    for tick in ticks(longest):
        x = LEFT + tick * pixels
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 5}"/>'
        )
        text(x, y + 18, f"{tick:g} s", "small", "middle")
    y += 30
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{PAGE}" height="{y}"'
        f' viewBox="0 0 {PAGE} {y}">',
        "<title>Where each server waits, and for whom</title>",
        f"<style>{STYLE}</style>",
        *parts,
        "</svg>",
    ]


def in_words(trace):
    """Return where the threads' time went, in one line."""
    shares, (calls, vain) = trace.shares(), trace.calls()
    parts = []
    for state in sorted(STATES, key=shares.get, reverse=True):
        if shares[state] >= 0.001:
            parts.append(f"{state} {shares[state]:.1%}")
    total, failed = sum(calls.values()), sum(vain.values())
    return f"{', '.join(parts)}; {total:,} calls, {failed:,} of them in vain"


def ticks(longest):
    """Return round numbers from 0 to `longest`, some four of them."""
    step = next(s for s in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if longest / s < 8)
    return [number * step for number in range(int(longest / step) + 1)]


# ---- Chrome's Trace Event Format --------------------------------------------


def events(traces):
    """Return what a trace viewer opens, as a dict for JSON.

    Each server is a process, and its clients are one. Each begins at 0: so
    the servers, which ran one after the other, can be compared.
    """
    listed = []

    def name(kind, pid, tid, text):
        """Name a process or a thread."""
        arguments = {"name": text}
        listed.append(
            {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": arguments}
        )

    def span(text, pid, tid, begin, end, **arguments):
        begin, end = round(begin * 1e6, 1), round(end * 1e6, 1)  # microseconds
        listed.append(
            {
                "ph": "X",
                "name": text,
                "pid": pid,
                "tid": tid,
                "ts": begin,
                "dur": round(end - begin, 1),
                "args": arguments,
            }
        )

    for number, trace in enumerate(traces):
        clients, server = 2 * number + 1, 2 * number + 2
        name("process_name", clients, 0, f"clients of {trace.script}")
        for visitor in trace.crowd.visitors:
            name("thread_name", clients, visitor.number, f"client {visitor.number}")
            for asked, answered in visitor.waits:
                begin, end = asked - trace.start, answered - trace.start
                span("waits", clients, visitor.number, begin, end)
        name("process_name", server, 0, trace.script)
        for tid, lane in enumerate(trace.lanes, 1):
            text = ("main: " if lane.main else "") + lane.name()
            name("thread_name", server, tid, text)
            for call in lane.calls:
                arguments = {"client": call.client} if call.client else {}
                if call.state == "poll":
                    arguments = {"calls": sum(call.vain.values())}
                elif call.vain:
                    arguments["in vain"] = True
                span(call.state, server, tid, call.begin, call.end, **arguments)
    return {"traceEvents": listed, "displayTimeUnit": "ms"}


# ---- The command line -------------------------------------------------------


def command_line():
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message}")
    add = parser.add_argument
    add(
        "--server",
        action="append",
        metavar="SCRIPT",
        help="trace this one; may be given several times (all four)",
    )
    add("--scene", choices=SCENES, default="thinking")
    add("--connections", type=int, default=8, metavar="N", help="clients (8)")
    add("--svg", metavar="FILE", help="draw the same as a picture")
    add("--json", metavar="FILE", help="for Perfetto, speedscope and the like")
    options = parser.parse_args()
    if not 2 <= options.connections <= 100:
        parser.error("--connections takes 2 to 100")
    options.requests, options.think, options.timeout = 4, 0.05, TIMEOUT
    return options


def main():
    options = command_line()
    scripts = options.server or [
        os.path.relpath(ROOT / script) for script in SCRIPTS.values()
    ]
    traces = [trace(script, options.scene, options) for script in scripts]
    scale = max(trace.elapsed for trace in traces)
    pen = Pen()
    print(
        f"{options.connections} clients at once:"
        f" {SCENES[options.scene].title}",
        f"{machine()}",
        "",
        *pen.legend(),
        sep="\n",
    )
    for each in traces:
        print("", *drawing(each, scale, pen), *figures(each), sep="\n")
    print("", *cost(traces), sep="\n")
    if options.svg:
        title = SCENES[options.scene].title
        write(options.svg, [line + "\n" for line in svg(traces, title)])
        print(f"\nThe picture is in {options.svg}.")
    if options.json:
        write(options.json, [json.dumps(events(traces)) + "\n"])
        print(f"\nThe record is in {options.json}.")


if __name__ == "__main__":
    run(main)
