#!/usr/bin/env python3
"""What each client did, as an SVG picture: waiting, or in conversation.

All servers are drawn one below the other, on one scale of time.

Start it:  make pictures
"""

import argparse
import os

from harness import (
    SCRIPTS,
    TIMEOUT,
    Crowd,
    Failed,
    progress,
    run,
    sample,
    start,
    write,
)
from svg import Picture

LEFT, RIGHT = 50, 750  # pixels: the ends of the axis of time
ROW = 14  # pixels for each client


def visit(options):
    """Return {script: its Crowd}, all of them visited one after the other."""
    crowds = {}
    for name, script in SCRIPTS.items():
        progress(f"{name}: {options.connections} clients")
        with start(name) as server:
            crowds[script] = Crowd(options, script)
            crowds[script].run(server.host, server.port)
        if crowds[script].problem:
            raise Failed(crowds[script].problem)
    progress()
    return crowds


def picture(crowds):
    """Return the Picture of these crowds, {script: Crowd}."""
    longest = max(crowd.elapsed for crowd in crowds.values())
    page = Picture("What each client did: wait, or be served", RIGHT + 50)
    page.bar("waits", LEFT, 14, 24, 11)
    page.text(LEFT + 32, 24, "waits for the server")
    page.bar("talks", LEFT + 200, 14, 24, 11)
    page.text(LEFT + 232, 24, "is in conversation with it")
    y, below = 40, len(page.parts)

    def bar(kind, begin, end):
        scale = (RIGHT - LEFT) / longest
        x = LEFT + (begin - crowd.start) * scale
        says = f"{kind} for {end - begin:.3f} s"
        page.bar(kind, x, y + 2, (end - begin) * scale, ROW - 3, says)

    for script, crowd in crowds.items():
        y += 22
        page.text(LEFT, y, f"{script}: {crowd.elapsed:.2f} s", "title")
        y += 6
        for visitor in sample(crowd.visitors):
            page.text(LEFT - 8, y + 12, str(visitor.number), "tick", "end")
            bar("talks", crowd.start, visitor.end)
            for asked, answered in visitor.waits:
                bar("waits", asked, answered)
            y += ROW
    axis = Picture("", 0)  # below the bars, so it comes before them
    axis.time_axis(LEFT, RIGHT, 50, y + 6, longest)
    page.parts[below:below] = axis.parts
    page.reach(axis.height)
    return page


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--connections", type=int, default=8)
    add("--requests", type=int, default=4)
    add("--think", type=float, default=0.05, help="seconds")
    add("--timeout", type=float, default=TIMEOUT, help="seconds")
    add("--svg", metavar="FILE", default=os.path.join("build", "demo.svg"))
    options = parser.parse_args()
    if min(options.connections, options.requests) < 1 or options.think < 0:
        parser.error("it takes at least 1 connection and 1 request")
    write(options.svg, picture(visit(options)).lines())
    print(f"What each client did is drawn in {options.svg}.")


if __name__ == "__main__":
    run(main)
