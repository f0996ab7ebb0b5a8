#!/usr/bin/env python3
"""Where each server waits: its threads, on one axis of time with its clients.

Each server script is run unchanged under recorder.py, while clients play a
scene: `thinking` is that of `make demo`; in `quiet` a client sends half a
request and waits; in `blocking` one asks for a handler that blocks.
The scene is played without the recorder too, to see what that costs.

Start it:  make trace    or    make trace SCENE=quiet

Clients and server are two processes. Their times can be compared, since
time.monotonic() is one clock for all processes of a machine (Linux, macOS, the
BSDs). Should it not be, this ends with a sentence that says so.
"""

import argparse
import asyncio
import collections
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from harness import (
    ROOT,
    SCRIPTS,
    TIMEOUT,
    Crowd,
    Failed,
    cpu_time,
    encode,
    figure,
    machine,
    parse_info,
    progress,
    raise_descriptor_limit,
    run,
    started,
    write,
)
from lanes import MARGIN, drawing, legend, picture

RECORDER = Path(__file__).with_name("recorder.py")
LEAST = 0.0005  # of the time; what is less is not worth a word
QUIET = 0.6  # seconds that the quiet client stays
SETTLE = 0.05  # seconds until a server is told to end
CALLS = ["accept", "recv", "send", "queue", "sleep", "lock", "join"]
STATES = CALLS + ["poll", "running"]  # what a thread can be in

# What a thread was in: one of STATES; when, in seconds from the scene's start;
# for which client; in how many calls, as {call: number}; and if they failed.
Span = collections.namedtuple("Span", "state begin end client calls failed")

# ---- The scenes -------------------------------------------------------------


class Thinking(Crowd):
    """The clients of `make demo`: all talk at once, and think in between."""

    title = (
        "each asks {requests} times, and thinks {think:g} s before the next"
    )

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.ports = {}  # port of a connection: the number of its client

    async def converse(self, visitor, reader, writer):
        self.ports[writer.get_extra_info("sockname")[1]] = visitor.number
        await super().converse(visitor, reader, writer)


class Pinging(Thinking):
    """The others PING, while the first client does what the scene is about."""

    async def converse(self, visitor, *streams):
        port = streams[1].get_extra_info("sockname")[1]
        self.ports[port] = visitor.number
        if visitor.number == 1:
            await self.first(visitor, *streams)
        else:
            for _ in range(self.options.requests):
                await self.talk_once(visitor, *streams, "PING")

    async def talk_once(self, visitor, reader, writer, line):
        """Think, but not at first; ask; wait until it is answered."""
        if visitor.waits[-1][1]:
            await asyncio.sleep(self.options.think)
            visitor.waits.append([time.monotonic(), None])
        writer.write(f"{line}\r\n".encode())
        reply = await reader.readline()
        if not reply.startswith(b"+"):
            raise Failed(f"{line} was answered with {reply[:80]!a}")
        visitor.waits[-1][1] = time.monotonic()


class Quiet(Pinging):
    title = "client 1 sends half a request, leaves in 0.6 s; the others PING"

    async def first(self, visitor, reader, writer):
        writer.write(encode("PING")[:-4])
        visitor.waits.clear()  # it is the server that waits
        await asyncio.sleep(QUIET)
        visitor.silent = self.start, time.monotonic()


class Blocking(Pinging):
    title = "client 1 asks for DEBUG SLEEP 0.5, the others PING"

    async def first(self, visitor, *streams):
        await self.talk_once(visitor, *streams, "PING")
        await self.talk_once(visitor, *streams, "DEBUG SLEEP 0.5")


SCENES = {"thinking": Thinking, "quiet": Quiet, "blocking": Blocking}

# ---- Recording --------------------------------------------------------------


class Trace:
    """One server's run: its clients, its threads, and how long it took."""

    def __init__(self, script, crowd, untraced, record):
        self.script = os.path.basename(script)
        self.crowd = crowd
        self.start = crowd.start
        self.elapsed = crowd.elapsed
        now = crowd.start + crowd.elapsed
        for visitor in crowd.visitors:  # one who is not served has no end
            visitor.end = visitor.end or now
            visitor.waits = [
                (asked, end or now) for asked, end in visitor.waits
            ]
        self.untraced = untraced  # the Crowd that nobody recorded
        lanes = [Lane(lane, self) for lane in record["lanes"]]
        # A thread that ended before the scene, or began after it, is not seen.
        self.lanes = [lane for lane in lanes if lane.begin < lane.end]
        self.lanes.sort(key=lambda lane: (not lane.main, lane.begin))
        for number, lane in enumerate(self.lanes, 1):
            lane.label = "main" if lane.main else lane.kind(number)

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
                calls.update(call.calls)
                vain.update(call.calls if call.failed else {})
        return calls, vain

    def in_words(self):
        """Return where the threads' time went, in one line."""
        shares, (calls, vain) = self.shares(), self.calls()
        parts = []
        for state in sorted(STATES, key=shares.get, reverse=True):
            if shares[state] >= LEAST:
                parts.append(f"{state} {shares[state]:.1%}")
        total, failed = sum(calls.values()), sum(vain.values())
        return f"{', '.join(parts)}; {total:,} calls, {failed:,} in vain"


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
        for state, begin, end, port, calls, failed in record["spans"]:
            begin = max(begin - trace.start, self.begin)
            end = end - trace.start
            # What it came to after the end was not known yet.
            failed = failed and (state == "poll" or end <= self.end)
            end = min(end, self.end)
            if begin <= end:
                client = trace.crowd.ports.get(port)
                self.add(Span(state, begin, end, client, calls, failed))

    def add(self, span):
        """Add a call. Polls in vain with no other call between are one."""
        last = self.calls[-1] if self.calls else None
        if last and last.state == span.state == "poll":
            calls = collections.Counter(last.calls)
            calls.update(span.calls)
            self.calls[-1] = last._replace(end=span.end, calls=calls)
        else:
            self.calls.append(span)

    def spans(self):
        """Return the calls, and "running" for all time between them."""
        spans = []
        now = self.begin
        for call in self.calls:
            if now < call.begin:
                spans.append(Span("running", now, call.begin, None, {}, False))
            spans.append(call)
            now = call.end
        if now < self.end:
            spans.append(Span("running", now, self.end, None, {}, False))
        return spans

    def kind(self, number):
        """Return a short name for a thread that is not the main one."""
        name = self.name()
        if name.startswith("serves client"):
            return name.replace("serves", "of")
        return "loop" if name == "event loop" else f"thread {number}"

    def name(self):
        """Return what the thread is for, as it shows in its calls."""
        states = {call.state for call in self.calls}
        clients = {call.client for call in self.calls if call.client}
        if "queue" in states:
            return "event loop"
        if "poll" in states:
            return "polls everybody in turn"
        if self.is_beside():
            return "waits for another thread's end"
        if len(clients) == 1 and "accept" not in states:
            return f"serves client {min(clients)}"
        if clients:
            return "accepts, and serves one after the other"
        return "accepts" if "accept" in states else "thread"

    def is_beside(self):
        """Return whether the thread only waits for another one."""
        states = {call.state for call in self.calls}
        return "join" in states and states <= {"join", "lock"}


def play(script, scene, options, record=None):
    """Let the clients play a scene with a server; return the Crowd.

    With `record`, the path of a file, the server writes its record there.
    """
    command = [sys.executable, script, "--port", "0"]
    if record:
        # Its relative path is ASCII, which PyPy wants where LC_ALL is C.
        command[1:1] = [os.path.relpath(RECORDER), record]
    crowd = SCENES[scene](options, os.path.basename(script))
    try:
        with started(script, options.timeout, command) as server:
            crowd.run(server.host, server.port)
            time.sleep(SETTLE)
    except Failed as failure:
        if not crowd.elapsed:
            raise  # there is nothing to draw
        crowd.problem = str(failure)
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
    progress()
    if not before <= record["begin"] <= crowd.start:
        raise Failed(
            "here the clocks (time.monotonic) of two processes do not agree,"
            " so clients and server cannot be drawn on one axis"
        )
    return Trace(script, crowd, untraced, record)


# ---- In figures -------------------------------------------------------------


def figures(trace):
    """Return lines of text: where the threads' time went, and the calls."""
    shares, (calls, vain) = trace.shares(), trace.calls()
    shown = [
        state
        for state in STATES
        if shares[state] >= LEAST
        or (calls[state] and state not in ("lock", "join"))
    ]
    rows = {
        "": shown,
        "% of time": [f"{shares[state]:.1%}" for state in shown],
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
        lines.append(
            "(without the main thread, which waits for the loop's end)"
        )
    return lines


def cost(traces):
    """Return lines of text: what the recorder has changed."""
    lines = [
        "What the recording costs: the same scene with it / without it."
        " It costs most",
        "where most calls are made, which is in a busy wait.",
        f"{'':25}{'time elapsed':>18}{'CPU time':>18}{'polls':>18}",
    ]
    for trace in traces:
        crowds = trace.crowd, trace.untraced
        columns = [[f"{crowd.elapsed:.2f} s" for crowd in crowds]]
        infos = [parse_info(crowd.info) for crowd in crowds]
        if all("used_cpu_user" in info for info in infos):
            columns.append([f"{cpu_time(info):.2f} s" for info in infos])
        if all("polls" in info for info in infos):
            polls = [figure(info, "polls") for info in infos]
            columns.append([f"{number:,.0f}" for number in polls])
        row = "".join(" / ".join(pair).rjust(18) for pair in columns)
        lines.append(f"{trace.script:25}{row}")
    return lines


# ---- Chrome's Trace Event Format --------------------------------------------


def events(traces):
    """Return what a trace viewer opens, as a dict for JSON.

    Each server is a process, and its clients are one. All begin at 0: so the
    servers, which ran one after the other, can be compared.
    """
    events = []

    def add(kind, name, pid, tid, arguments, **more):
        event = {"ph": kind, "name": name, "pid": pid, "tid": tid}
        events.append({**event, **more, "args": arguments})

    def add_span(name, pid, tid, begin, end, **arguments):
        begin, end = round(begin * 1e6, 1), round(end * 1e6, 1)  # microseconds
        duration = round(end - begin, 1)
        add("X", name, pid, tid, arguments, ts=begin, dur=duration)

    for number, trace in enumerate(traces, 1):
        # A main thread has its process's number.
        clients, server = 20_000 * number, 20_000 * number + 10_000
        for pid, name in (
            (clients, f"clients of {trace.script}"),
            (server, trace.script),
        ):
            add("M", "process_name", pid, 0, {"name": name})
            add("M", "process_sort_index", pid, 0, {"sort_index": pid})
        for visitor in trace.crowd.visitors:
            tid = clients + visitor.number
            name = f"client {visitor.number}"
            add("M", "thread_name", clients, tid, {"name": name})
            for asked, answered in visitor.waits:
                begin, end = asked - trace.start, answered - trace.start
                add_span("waits", clients, tid, begin, end)
        for tid, lane in enumerate(trace.lanes, server):
            name = ("main: " if lane.main else "") + lane.name()
            add("M", "thread_name", server, tid, {"name": name})
            for state, begin, end, client, calls, failed in lane.calls:
                arguments = {"client": client} if client else {}
                if state == "poll" or sum(calls.values()) > 1:
                    arguments["calls"] = sum(calls.values())
                elif failed:
                    arguments["failed"] = True
                add_span(state, server, tid, begin, end, **arguments)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


# ---- The command line -------------------------------------------------------


def command_line():
    """Return the options."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    add = parser.add_argument
    add(
        "--server",
        action="append",
        metavar="SCRIPT",
        help="trace this one; may be given several times (all four)",
    )
    add("--scene", choices=SCENES, default="thinking")
    add("--connections", type=int, default=8, help="clients (8)")
    add("--requests", type=int, default=4, help="of each (4)")
    add("--think", type=float, default=0.05, help="seconds between (0.05)")
    add("--timeout", type=float, default=TIMEOUT, help="seconds for a scene")
    add("--svg", metavar="FILE", help="draw the same as a picture")
    add("--json", metavar="FILE", help="for Perfetto, speedscope and the like")
    options = parser.parse_args()
    if not (0 < options.connections < 10_000 and options.requests > 0):
        parser.error("it takes 1 to 9999 connections, and at least 1 request")
    if not (0 <= options.think < 1e6 and 0 < options.timeout < 1e6):
        parser.error("--think takes 0 or more seconds, --timeout more than 0")
    return options


def main():
    options = command_line()
    raise_descriptor_limit(options.connections + 20)
    scripts = options.server or [
        os.path.relpath(ROOT / script) for script in SCRIPTS.values()
    ]
    traces = [trace(script, options.scene, options) for script in scripts]
    scale = max(trace.elapsed for trace in traces)
    title = SCENES[options.scene].title.format(**vars(options))
    title = f"{options.connections} clients: {title}"
    print(title, machine(), "", *legend(traces), sep="\n")
    print(
        "% of time: of all threads of a server, from first connect to last end"
    )
    if options.scene == "thinking":
        pauses = options.requests - 1
        print(f"{options.requests} requests have {pauses} pauses between them")
    for each in traces:
        print("", *drawing(each, scale), *figures(each), sep="\n")
    print("", *cost(traces), sep="\n")
    if options.svg:
        write(options.svg, picture(traces, title).lines())
        print(f"\nThe same is drawn in {options.svg}.")
    if options.json:
        write(options.json, [json.dumps(events(traces)) + "\n"])
        print(f"\nPerfetto and the like open {options.json}.")
    for each in traces:
        if each.crowd.problem:
            raise Failed(each.crowd.problem)


if __name__ == "__main__":
    run(main)
