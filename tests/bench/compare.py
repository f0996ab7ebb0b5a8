#!/usr/bin/env python3
"""What each pattern costs, and whom it lets wait: questions to all servers.

Start it:  make compare
"""

import argparse
import contextlib
import os
import statistics
import time

from harness import (
    ROOT,
    SCRIPTS,
    TIMEOUT,
    Crowd,
    Failed,
    Line,
    cpu_time,
    encode,
    figure,
    memory,
    progress,
    raise_descriptor_limit,
    results,
    run,
    started,
    table,
)

CROWD = 500  # connections to hold open
SETTLE = 0.5  # seconds for a server to accept them all
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
        "The PING came 50 ms after the handler began. Where one thread serves"
        "\n  all, a handler that blocks holds up all. Here the loop loses to"
        "\n  threads: its handlers must never block.",
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
        f"What these {CROWD} took, by the server's own count",
        [
            "context switches",
            "threads started",
            "polls",
            "polls in vain",
            "wake-ups for PINGs",
            "events per wake-up",
        ],
        "Threads cost switches, polling costs calls for nothing. The more"
        "\n  clients are busy, the more events the loop gets for one wake-up.",
    ),
]

CHOICE = """\
Choose  1 single  for one client at a time: a tool, a test, a first try.
        2 multi   for some hundreds of clients, and handlers that may block.
        3 busy    where a core may burn to save microseconds. Hardly ever.
        4 kqueue  for thousands of clients, and handlers that never block."""


class Demo:
    """What the clients of `make demo` do, as options of a Crowd."""

    connections = 8
    requests = 4
    think = 0.05  # seconds
    timeout = TIMEOUT


# Each of these asks a server a question, and returns rows: {name: text}.


def ask_eight_at_once(server):
    script = server.args[1]  # behind Python's own path
    crowd = Crowd(Demo, os.path.basename(script))
    crowd.run(server.host, server.port)
    if crowd.problem:
        raise Failed(crowd.problem)
    firsts = [first - crowd.start for first in crowd.firsts]
    return {
        **results(crowd),
        "first reply, median": milliseconds(statistics.median(firsts)),
        "first reply, worst": milliseconds(max(firsts)),
    }


def ask_half_a_request(server):
    with Line(server, PATIENCE) as half, Line(server, PATIENCE) as other:
        half.socket.sendall(encode("PING")[:-4])
        other.send("PING")
        return {"another's PING": time_to_reply(other)}


def ask_a_blocking_handler(server):
    with Line(server, PATIENCE) as sleeper, Line(server, PATIENCE) as other:
        sleeper.send("DEBUG", "SLEEP", "0.5")
        time.sleep(0.05)  # by now it is asleep
        other.send("PING")
        return {"another's PING then": time_to_reply(other)}


def ask_silent_clients(server):
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(Line(server)) for _ in range(8)]
        before, begin = cpu_time(lines[0].info()), time.monotonic()
        time.sleep(1)
        used = cpu_time(lines[0].info()) - before
        elapsed = time.monotonic() - begin
    return {"CPU in use": f"{used / elapsed:.0%}"}


def ask_a_crowd(server):
    with contextlib.ExitStack() as stack:
        with Line(server, PATIENCE) as first:
            before = first.info()
        size, lines = memory(server), []
        with contextlib.suppress(OSError):  # not all find a place in the queue
            while len(lines) < CROWD:
                lines.append(stack.enter_context(Line(server, PATIENCE)))
        time.sleep(SETTLE)  # until all are accepted; in pattern 1 it is one
        connected = lines[0].info()
        start = time.monotonic()
        for line in lines:
            line.send("PING")
        answered = 0
        with contextlib.suppress(OSError):  # one must wait for too long
            for line in lines:
                line.reply()
                answered += 1
        elapsed = time.monotonic() - start
        after = lines[0].info()
        growth = memory(server) - size if size else None
    rows = own_count(before, connected, after)
    rows["threads meanwhile"] = f"{figure(after, 'threads'):.0f}"
    if answered < CROWD:
        rows["all answered after"] = f"only {answered} of {CROWD}"
    else:
        rows["all answered after"] = milliseconds(elapsed)
        if growth is not None:
            rows["memory for each"] = f"{growth / CROWD / 1024:.1f} KiB"
    return rows


def own_count(before, connected, after):
    """Return what the pattern did, in all and since `connected`, as rows.

    Each of the three is an INFO: {name: text}.
    """

    def grown(*names, since=before):
        return figure(after, *names) - figure(since, *names)

    switches = "voluntary_context_switches", "involuntary_context_switches"
    rows = {"context switches": f"{grown(*switches):,.0f}"}
    if "threads_started" in after:
        rows["threads started"] = f"{grown('threads_started'):,.0f}"
    if "polls" in after:
        polls = grown("polls")
        rows["polls"] = f"{polls:,.0f}"
        in_vain = grown("polls_in_vain") / max(polls, 1)
        rows["polls in vain"] = f"{in_vain:.2%}"
    if "wakeups" in after:
        # Newcomers came one by one, each an event; the PINGs come together.
        wakeups = grown("wakeups", since=connected)
        events = grown("events", since=connected)
        rows["wake-ups for PINGs"] = f"{wakeups:,.0f}"
        rows["events per wake-up"] = f"{events / max(wakeups, 1):.1f}"
    return rows


def time_to_reply(line):
    """Return how long the reply to what was asked has taken, as text."""
    try:
        line.reply()
    except OSError:  # most likely socket.timeout
        return "must wait"
    return milliseconds(time.monotonic() - line.asked)


def milliseconds(seconds):
    return f"{seconds * 1000:.0f} ms"


def compare(script):
    """Ask a server all questions; return the rows of its answers."""
    rows = {}
    name = os.path.basename(script)
    with started(script, TIMEOUT) as server:
        for ask, what in [
            (ask_eight_at_once, "eight clients at once"),
            (ask_half_a_request, "half a request"),
            (ask_a_blocking_handler, "a handler that blocks"),
            (ask_silent_clients, "eight silent clients"),
            (ask_a_crowd, f"{CROWD} clients"),
        ]:
            progress(f"{name}: {what}")
            rows.update(ask(server))
    progress()
    return rows


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    parser.add_argument(
        "--server",
        action="append",
        metavar="SCRIPT",
        help="ask this one, and not all four; may be given several times",
    )
    scripts = parser.parse_args().server
    if not scripts:
        scripts = [os.path.relpath(ROOT / name) for name in SCRIPTS.values()]
    raise_descriptor_limit(CROWD + 50)
    columns = [compare(script) for script in scripts]
    print(*table(columns, [""]), sep="\n")
    for question, names, reason in QUESTIONS:
        print("", question, sep="\n")
        known = [name for name in names if any(name in c for c in columns)]
        print(*table(columns, known, "  "), f"  {reason}", sep="\n")
    print("", CHOICE, sep="\n")


if __name__ == "__main__":
    run(main)
