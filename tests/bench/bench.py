#!/usr/bin/env python3
"""How many requests a second, and how much CPU each: with redis-benchmark.

The four servers stand beside the same application on asyncio and on uvloop,
and beside redis-server, as far as these are installed.

Start it:  make bench
"""

import argparse
import contextlib
import importlib.util
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

from harness import (
    LOOP,
    SCRIPTS,
    TIMEOUT,
    Failed,
    Line,
    cpu_time,
    machine,
    progress,
    run,
    running,
    start,
)

MANY = 50  # connections
IN_FLIGHT = 16  # requests sent without waiting for their replies
MODES = [  # connections, requests in flight on each
    (MANY, 1),
    (MANY, IN_FLIGHT),
    (1, 1),
    (1, IN_FLIGHT),
]
SINGLE = "1 single blocking"
FLOOR = "floor"  # the barest loop that Python allows
STREAMS = "asyncio streams"
PROTOCOL = "asyncio.Protocol"
UVLOOP = "uvloop"  # and Protocol
REDIS = "redis-server"
KEY = "key:__rand_int__"  # what redis-benchmark asks for


# ---- Who takes part ---------------------------------------------------------


class Redis:
    """Runs redis-server while a `with` block lasts. It writes no files."""

    def __init__(self):
        self.host = "127.0.0.1"

    def __enter__(self):
        with socket.create_server((self.host, 0)) as listener:
            self.port = listener.getsockname()[1]  # free by now, most likely
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            ["redis-server", "--bind", self.host, "--port", str(self.port)]
            + ["--save", "", "--appendonly", "no", "--dir", self.folder.name],
            stdout=subprocess.DEVNULL,
        )
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                Line(self).close()
                return self
            time.sleep(0.02)
        self.__exit__()
        raise Failed("redis-server did not start")

    def __exit__(self, *exception):
        self.process.kill()  # it has nothing to save
        self.process.wait()
        self.folder.cleanup()


def contestants():
    """Return {name: function that starts it, for a `with` statement}."""
    script = os.path.join(os.path.dirname(__file__), "asyncio_servers.py")
    script = os.path.relpath(script)

    def on_asyncio(*words):
        command = sys.executable, script, *words, "--port", "0"
        return lambda: running(*command)

    found = {name: lambda name=name: start(name) for name in SCRIPTS}
    found[FLOOR] = on_asyncio("floor")
    found[STREAMS] = on_asyncio("streams")
    found[PROTOCOL] = on_asyncio("protocol")
    if importlib.util.find_spec("uvloop"):
        found[UVLOOP] = on_asyncio("protocol", "--loop", "uvloop")
    if shutil.which("redis-server"):
        found[REDIS] = Redis
    return found


# ---- Measuring --------------------------------------------------------------


def measure(server, connections, in_flight, options):
    """Return requests per second, and microseconds of CPU per request."""
    requests = options.requests * (6 if in_flight > 1 else 1)
    if connections == 1:  # it is slower, and would take longest of all
        requests //= 2
    before = cpu_used(server)
    rate = redis_benchmark(
        server, connections, in_flight, requests, options.command
    )
    return rate, (cpu_used(server) - before) / requests * 1e6


def cpu_used(server):
    # On a connection of its own: server 1 serves nobody else meanwhile.
    with Line(server) as line:
        info = line.info()
    return cpu_time(info)


def redis_benchmark(server, connections, in_flight, requests, command):
    """Run it; return the requests per second that it has seen."""
    words = ["redis-benchmark", "-h", server.host, "-p", str(server.port)]
    words += ["-c", str(connections), "-P", str(in_flight)]
    words += ["-n", str(requests), "-t", command, "--csv"]
    try:
        result = subprocess.run(
            words,
            stdout=subprocess.PIPE,
            # It warns that it could not fetch Redis's configuration.
            stderr=subprocess.DEVNULL,
            universal_newlines=True,
            timeout=60,
        )
        for line in result.stdout.splitlines():
            fields = line.replace('"', "").split(",")
            if fields[0] == command.upper():
                return float(fields[1])
    except subprocess.TimeoutExpired:
        raise Failed("redis-benchmark did not end within 60 s") from None
    raise Failed(f"redis-benchmark failed: exit status {result.returncode}")


def measure_all(starters, options):
    """Return {mode: {name: [(rate, CPU per request) of each round]}}."""
    results = {mode: {} for mode in MODES}
    for number in range(1, options.rounds + 1):
        # In turn: what disturbs this machine for a while disturbs them all.
        for name, starter in starters.items():
            progress(f"round {number} of {options.rounds}: {name}")
            # It runs only now: an idle busy wait would disturb the others.
            with starter() as server:
                with Line(server) as line:
                    line.ask("SET", KEY, "xxx")
                for mode in MODES:
                    if name == SINGLE and mode[0] > 1:
                        continue
                    figures = measure(server, *mode, options)
                    results[mode].setdefault(name, []).append(figures)
    progress()
    return results


# ---- Showing ----------------------------------------------------------------


def median_ratio(these, those):
    """Return these CPU times by those, round for round: the median."""
    return statistics.median(a[1] / b[1] for a, b in zip(these, those))


def table(names, results, connections):
    """Return lines of text: unpipelined on the left, pipelined right."""
    modes = [mode for mode in MODES if mode[0] == connections]
    who = f"{connections} connection" + "s" * (connections > 1)
    titles = ["one request in flight", f"{IN_FLIGHT} in flight on each"]
    lines = [f"{who:19}" + "".join(f"{title:>30}" for title in titles)]
    lines.append(" " * 19 + f"{'requests/s':>14}{'CPU us':>8}{'ratio':>8}" * 2)
    for name in names:
        row = f"{name:19}"
        for mode in modes:
            rounds = results[mode].get(name)
            if not rounds:
                row += f"{'-':>14}{'-':>8}{'-':>8}"
                continue
            rate, cpu = map(statistics.median, zip(*rounds))
            row += f"{rate:14,.0f}{cpu:8.2f}"
            loop = results[mode].get(LOOP)
            ratio = f"{median_ratio(rounds, loop):.2f}" if loop else "-"
            row += f"{ratio:>8}"
        lines.append(row)
    return lines


def comparison(results):
    """Return lines of text: the loop's CPU per request by that of others."""
    lines = []
    for mode in MODES[:2]:
        loop = results[mode].get(LOOP)
        others = [
            f"{median_ratio(loop, results[mode][name]):.2f} of {name}"
            for name in (FLOOR, PROTOCOL, UVLOOP, REDIS)
            if loop and name in results[mode]
        ]
        if others:
            lines.append(f"  {mode[1]:2} in flight:  " + ", ".join(others))
    if lines:
        lines.insert(0, "The loop's (4) CPU time per request:")
    return lines


def command_line():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="of all in turn (5)")
    add(
        "--requests",
        type=int,
        default=16000,
        help="in each measurement (16000); pipelined, six times as many",
    )
    add("--command", choices=["get", "set"], default="get")
    add(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="those whose name contains this; may be given several times",
    )
    options = parser.parse_args()
    if options.rounds < 1 or options.requests < 100:
        parser.error("it takes at least 1 round and 100 requests")
    return options


def main():
    options = command_line()
    if not shutil.which("redis-benchmark"):
        raise Failed(
            "redis-benchmark is missing; it comes with Redis (apt-get install"
            " redis-tools, or brew install redis)"
        )
    starters = contestants()
    if options.only:
        starters = {
            name: starter
            for name, starter in starters.items()
            if any(part in name for part in options.only)
        }
    if not starters:
        raise Failed("nobody has such a name: " + ", ".join(options.only))
    print(machine())
    print(
        f"redis-benchmark, {options.command.upper()} of 3 bytes;"
        f" rounds in turn: {options.rounds}, medians\n",
        flush=True,
    )
    results = measure_all(starters, options)
    print(*table(starters, results, MANY), "", sep="\n")
    print(*table(starters, results, 1), "", sep="\n")
    print("CPU us: the server's CPU time per request, in microseconds")
    print("ratio:  that CPU time by the loop's (4), in the same round")
    print(*comparison(results), sep="\n")
    if REDIS not in contestants():
        print("Not here: redis-server (apt-get install redis-server).")
    if UVLOOP not in contestants():
        print("Not here: uvloop (python3 -m pip install uvloop).")


if __name__ == "__main__":
    run(main)
