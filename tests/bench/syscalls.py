#!/usr/bin/env python3
"""Which system calls each server makes for the same short conversation.

They are the fingerprint of its pattern. strace (Linux) writes them down.

Start it:  make syscalls
"""

import argparse
import collections
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

from harness import (
    ROOT,
    SCRIPTS,
    TIMEOUT,
    Failed,
    Line,
    machine,
    progress,
    run,
    running,
)

CLIENTS = 4
PINGS = 5
THINK = 0.01  # seconds between one round of PINGs and the next
SETTLE = 0.2  # seconds for a server to reach its first waiting call
NAMES = {  # as the table calls them; of some there is an old and a new one
    "accept4": "accept",
    "recvfrom": "recv",
    "sendto": "send",
    "epoll_pwait": "epoll_wait",
    "clone3": "clone",
}
ON_SOCKETS = ["accept", "recv", "send"]
ROWS = ON_SOCKETS + ["epoll_wait", "epoll_ctl", "futex", "clone", "close"]
ROWS += ["ioctl"]
NOTES = """\
1  accept, then recv and send until that client leaves. Each call may wait.
2  The same calls, and a clone for each client, which is a thread; others: its
   memory and signals. futex: threads take turns in the interpreter.
3  accept and recv without end, nearly all for EAGAIN: it never waits.
4  epoll_wait tells who is ready, and no recv is in vain. One epoll_ctl for
   each client, when it comes: to close it takes it out of the queue.
ioctl: non-blocking from now on.

1 gets its clients one after the other, the rest get them all at once. For 3
the count depends on time: so the conversation is short, and strace, which
makes every call slow, hides most of what it would do in that time."""

# 123 1700000000.123456 recvfrom(5, ...) = -1 EAGAIN (Resource ...) <0.000012>
# 123 1700000000.123456 <... recvfrom resumed> ...) = 0 <0.123456>
# The time is that of the line's begin, so of the call or of its return.
CALL = re.compile(
    r"\d+ +(?P<time>[\d.]+) (?P<resumed><\.\.\. )?(?P<name>\w+)"
    r".* = -?\w+ ?(?P<error>E[A-Z]+)?.* <(?P<took>[\d.]+)>$"
)


def check_strace():
    """Raise Failed unless strace works here."""
    if not sys.platform.startswith("linux"):
        raise Failed("strace is a tool of Linux, and this is another system")
    if not shutil.which("strace"):
        raise Failed("strace is missing (apt-get install strace)")
    result = subprocess.run(
        ["strace", "-D", "-f", "-o", os.devnull, sys.executable, "-V"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        timeout=TIMEOUT,
    )
    if result.returncode or "strace:" in result.stderr:
        said = (result.stderr.strip() or "no reason given").splitlines()[0]
        raise Failed(f"strace may not trace here: {said}")


def converse(server, name):
    """Talk to a server: CLIENTS of them, PINGS requests each, in turn."""
    if name == "1 single blocking":
        # It would not answer the second before the first has left.
        for _ in range(CLIENTS):
            with Line(server) as line:
                for _ in range(PINGS):
                    line.ask("PING")
                    time.sleep(THINK)
        return
    lines = [Line(server) for _ in range(CLIENTS)]
    for _ in range(PINGS):
        for line in lines:
            line.ask("PING")
        time.sleep(THINK)
    for line in lines:
        line.close()


def trace(name, log):
    """Have strace write a conversation to `log`; return its begin and end."""
    # -D: strace stands beside the server, which so remains our own child.
    strace = ["strace", "-D", "-f", "-ttt", "-T", "-o", log]
    script = os.path.relpath(ROOT / SCRIPTS[name])
    with running(*strace, sys.executable, script, "--port", "0") as server:
        time.sleep(SETTLE)
        begin = time.time()
        converse(server, name)
        time.sleep(SETTLE)  # it has to notice that they have left
        return begin, time.time()


def count(log, begin, end):
    """Count the calls that returned between two times.

    Returns {name: calls}, and {name: those that came back with EAGAIN}.
    """
    returned = []
    with open(log, errors="replace") as lines:
        for line in lines:
            call = CALL.match(line)
            if not call:  # it did not return, or is no call
                continue
            time_of_return = float(call["time"])
            if not call["resumed"]:
                time_of_return += float(call["took"])
            if begin <= time_of_return <= end:
                name = NAMES.get(call["name"], call["name"])
                returned.append((name, call["error"]))
    # It is over when the last connection is closed. What a busy wait asks
    # from then on belongs to no conversation.
    while returned and returned[-1][0] != "close":
        returned.pop()
    calls = collections.Counter(name for name, error in returned)
    in_vain = collections.Counter(
        name for name, error in returned if error == "EAGAIN"
    )
    return calls, in_vain


def table(results):
    """Return lines of text: the calls of each server, side by side."""
    titles = [" ".join(name.split()[:2]) for name in results]
    lines = [" " * 19 + "".join(f"{title:>15}" for title in titles)]

    def row(title, numbers):
        cells = "".join(f"{n:15,}" if n else f"{'-':>15}" for n in numbers)
        lines.append(f"{title:19}{cells}")

    for name in ROWS:
        row(name, [calls[name] for calls, _ in results.values()])
        if name in ON_SOCKETS:
            row("  EAGAIN", [in_vain[name] for _, in_vain in results.values()])
    row(
        "others",
        [
            sum(calls.values()) - sum(calls[name] for name in ROWS)
            for calls, _ in results.values()
        ],
    )
    row("all", [sum(calls.values()) for calls, _ in results.values()])
    requests = CLIENTS * PINGS
    row(
        "all, per request",
        [round(sum(c.values()) / requests, 1) for c, _ in results.values()],
    )
    return lines


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    parser.parse_args()
    check_strace()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in SCRIPTS:
            progress(f"strace: {name}")
            log = os.path.join(folder, "calls.txt")
            results[name] = count(log, *trace(name, log))
    progress()
    print(machine())
    print(
        f"{CLIENTS} clients connect, send {PINGS} PINGs each,"
        f" {THINK * 1000:.0f} ms apart, and leave."
        "\nThe system calls of the server that returned meanwhile:\n"
    )
    print(*table(results), "", sep="\n")
    print(NOTES)


if __name__ == "__main__":
    run(main)
