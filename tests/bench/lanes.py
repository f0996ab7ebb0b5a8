"""Draws what trace.py has recorded: clients, and below them the threads.

As text, for a terminal or a file, and as SVG, for slides.
"""

import collections
import os
import sys
from xml.sax.saxutils import escape

from harness import glyphs, machine, sample

WIDTH = 79  # columns
MARGIN = 10  # of these, for names

# ---- As text ----------------------------------------------------------------

SIGNS = {  # for recv it is the client's number, if that is known
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
PLAIN = {"poll": "%", "running": "#", "moment": "|"}  # where there are not
COLORS = {  # as a terminal numbers them; the others stay as they are
    "accept": 36,
    "recv": 94,
    "send": 95,
    "queue": 32,
    "sleep": 33,
    "lock": 90,
    "poll": 31,
}


def sign(state, client=None):
    """Return the sign for a state, in colour if stdout is a terminal."""
    plain = PLAIN if glyphs()[1] == "#" else {}
    text = plain.get(state, SIGNS[state])
    if state == "recv" and client:
        text = str(client % 10)  # one column, so one digit
    dull = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    if state in COLORS and sys.stdout.isatty() and not dull:
        text = f"\x1b[{COLORS[state]}m{text}\x1b[0m"
    return text


def legend():
    """Return lines of text that explain the signs."""
    waiting, talking = glyphs()
    recv = "".join(sign("recv", number) for number in (1, 2, 3))
    return [
        f"clients    {waiting} waits for the server"
        f"   {talking} is in conversation with it",
        f"threads    {sign('accept')} sleeps in accept"
        f"   {recv} in recv, for client 1, 2, 3   {sign('send')} in send",
        f"           {sign('queue')} in the queue   {sign('sleep')} in sleep"
        f"   {sign('lock')} in a lock, for another thread",
        f"           {sign('poll')} polls in vain   {sign('running')} runs"
        f" (or waits to)   {sign('moment')} runs for a moment",
    ]


def drawing(trace, scale):
    """Return lines of text; their columns together are `scale` seconds."""
    head = f"{trace.script}: {trace.elapsed:.2f} s"
    lines = [head + f"0 to {scale:.2f} s".rjust(WIDTH - len(head))]
    step = scale / (WIDTH - MARGIN)
    for visitor in sample(trace.crowd.visitors):
        row = client_row(visitor, trace.start, step)
        lines.append(f"client {visitor.number}".ljust(MARGIN) + row)
    for lane in sample(trace.lanes):
        lines.append(lane.label.ljust(MARGIN) + thread_row(lane, step))
    return lines


def client_row(visitor, start, step):
    """Return a text: when a client waits, and when it talks or thinks."""
    waiting, talking = glyphs()
    row = [" "] * (WIDTH - MARGIN)
    for sign, times in (
        (talking, [(visitor.begin, visitor.end)]),
        (waiting, visitor.waits),
    ):
        for begin, end in times:
            first = round((begin - start) / step)
            last = min(round((end - start) / step), len(row))
            row[first:last] = sign * (last - first)
    return "".join(row).rstrip()


def thread_row(lane, step):
    """Return a text: what a thread is in, from left to right."""
    columns = [collections.Counter() for _ in range(WIDTH - MARGIN)]
    for span in lane.spans():
        first = int(span.begin / step)
        last = min(int(span.end / step), len(columns) - 1)
        for column in range(first, last + 1):
            begin, end = column * step, (column + 1) * step
            inside = min(end, span.end) - max(begin, span.begin)
            columns[column][span.state, span.client] += inside
    row = ""
    for spent in columns:
        if not spent:
            row += " "
            continue
        (state, client), _ = spent.most_common(1)[0]
        # Work that is too short for a column is to be seen all the same.
        if state != "running" and ("running", None) in spent:
            state = "moment"
        row += sign(state, client)
    return row.rstrip()


# ---- As SVG -----------------------------------------------------------------

LEFT, RIGHT, PAGE = 90, 850, 880  # pixels: the axis of time, and the page
CLIENT, THREAD = 9, 16  # pixels: the height of their rows
NAMES = {  # in the legend
    "accept": "sleeps in accept",
    "recv": "in recv",
    "send": "in send",
    "queue": "in the queue",
    "sleep": "in sleep",
    "lock": "for another thread",
    "poll": "polls in vain",
    "running": "runs",
    "waits": "client waits",
    "talks": "client talks",
}
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


class Picture:
    """An SVG that grows from top to bottom; `y` is where it has come to."""

    def __init__(self, seconds):
        self.pixels = (RIGHT - LEFT) / seconds  # for each second
        self.parts = []
        self.y = 0

    def text(self, x, words, kind, anchor="start"):
        self.parts.append(
            f'<text x="{x:.1f}" y="{self.y}" class="{kind}"'
            f' text-anchor="{anchor}">{escape(words)}</text>'
        )

    def bar(self, kind, begin, end, height, least=0.0):
        """Draw a bar below `y`, from one time to another."""
        x, width = LEFT + begin * self.pixels, (end - begin) * self.pixels
        self.parts.append(
            f'<rect class="{kind}" x="{x:.2f}" y="{self.y}"'
            f' width="{max(width, least):.2f}" height="{height}"/>'
        )

    def server(self, trace):
        """Draw a server's clients and threads."""
        self.y += 26
        self.text(20, f"{trace.script}: {trace.elapsed:.2f} s", "title")
        self.y += 6
        self.y += CLIENT - 1
        self.text(LEFT - 8, "clients", "small", "end")
        self.y -= CLIENT - 1
        for visitor in sample(trace.crowd.visitors):
            for kind, times in (
                ("talks", [(visitor.begin, visitor.end)]),
                ("waits", visitor.waits),
            ):
                for begin, end in times:
                    begin, end = begin - trace.start, end - trace.start
                    self.bar(kind, begin, end, CLIENT - 2)
            self.y += CLIENT
        self.y += 4
        for lane in sample(trace.lanes):
            self.lane(lane)

    def lane(self, lane):
        """Draw what a thread is in; with what is short above what is long."""
        calls, work = [], []
        for span in lane.spans():
            (work if span.state == "running" else calls).append(span)
        for span in calls:
            self.bar(span.state, span.begin, span.end, THREAD - 2)
        for span in work:
            self.bar(span.state, span.begin, span.end, THREAD - 2, least=1)
        self.y += 11
        self.text(LEFT - 8, lane.label, "small", "end")
        for span in calls:
            words = str(span.client) if span.client else span.state
            if (span.end - span.begin) * self.pixels > 7 * len(words) + 4:
                middle = LEFT + (span.begin + span.end) / 2 * self.pixels
                self.text(middle, words, f"in {span.state}", "middle")
        self.y += THREAD - 11

    def axis(self, seconds):
        """Draw the axis of time."""
        steps = 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10
        step = next(step for step in steps if seconds / step < 8)
        for number in range(int(seconds / step) + 1):
            x = LEFT + number * step * self.pixels
            self.parts.append(
                f'<path class="grid" d="M{x:.1f} {self.y}v5"/>',
            )
            self.y += 18
            self.text(x, f"{number * step:g} s", "small", "middle")
            self.y -= 18
        self.y += 30


def svg(traces, title):
    """Return the drawing of all servers as SVG, as lines of text."""
    seconds = max(trace.elapsed for trace in traces)
    picture = Picture(seconds)
    picture.y = 28
    picture.text(20, "Where each server waits", "head")
    picture.y += 18
    picture.text(20, f"{title}. {machine()}", "small")
    picture.y += 10
    for number, (kind, words) in enumerate(NAMES.items()):
        x = LEFT + number % 5 * 155
        at = (x - LEFT) / picture.pixels
        picture.bar(kind, at, at + 14 / picture.pixels, 10)
        picture.y += 9
        picture.text(x + 20, words, "small")
        picture.y += 8 if number % 5 == 4 else -9
    for trace in traces:
        picture.server(trace)
        picture.y += 12
        picture.text(LEFT, trace.in_words(), "small")
    picture.y += 12
    picture.axis(seconds)
    size = f'width="{PAGE}" height="{picture.y}"'
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}'
        f' viewBox="0 0 {PAGE} {picture.y}">\n',
        "<title>Where each server waits, and for whom</title>\n",
        f"<style>{STYLE}</style>\n",
        *(f"{part}\n" for part in picture.parts),
        "</svg>\n",
    ]
