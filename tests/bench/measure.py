#!/usr/bin/env python3
"""What a server costs: its CPU while nobody talks, and that of a PING.

Start it:  python3 measure.py SERVER [HOW MANY SILENT CLIENTS]
"""

import contextlib
import statistics
import sys
import time

from harness import (
    TIMEOUT,
    Failed,
    Line,
    cpu_time,
    raise_descriptor_limit,
    run,
    started,
)

PINGS = 300


def main():
    if len(sys.argv) not in (2, 3):
        raise Failed("it takes a server, and perhaps a number of clients")
    silent = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    raise_descriptor_limit(silent + 50)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(started(sys.argv[1], TIMEOUT))
        line = stack.enter_context(Line(server))
        line.ask("PING")
        for _ in range(silent):
            stack.enter_context(Line(server))
        before, begin = cpu_time(line.info()), time.monotonic()
        time.sleep(2)
        used = cpu_time(line.info()) - before
        print(f"idle: {used / (time.monotonic() - begin):.1%} of a core")
        before, waits = cpu_time(line.info()), []
        for _ in range(PINGS):
            line.ask("PING")
            waits.append(time.monotonic() - line.asked)
        used = cpu_time(line.info()) - before
    print(f"a PING takes {statistics.median(waits) * 1e6:.0f} us")
    print(f"the server's CPU for it: {used / PINGS * 1e6:.0f} us")


if __name__ == "__main__":
    run(main)
