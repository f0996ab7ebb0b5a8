#!/usr/bin/env python3
"""What a growing crowd of connections costs servers 2, 3 and 4.

One request (PING) goes out on each active connection, then all the replies
are read, and again. First everybody in the crowd is active, then only ten.

Start it:  make scale
"""

import argparse
import collections
import contextlib
import itertools
import math
import resource
import signal
import socket
import textwrap
import time

from harness import (
    SCRIPTS,
    WAITS,
    Failed,
    Line,
    cpu_time,
    encode,
    machine,
    memory,
    progress,
    raise_descriptor_limit,
    run,
    start,
    write,
)
from svg import Picture

SIZES = [1, 10, 100, 1000, 10000]
ACTIVE = 10  # connections, when the rest of the crowd is silent
NAMES = list(SCRIPTS)[1:]  # server 1 serves no crowd
BATCH = 100  # connections to open before each has got an answer
SPARE = 50  # descriptors that are no connections
MOST = 10  # seconds to wait for a batch, or for a round that will not end
OPEN = 25.0  # seconds to open a server's crowd in
PING, PONG = encode("PING"), b"+PONG\r\n"

# Of one server with a crowd of one size:
Point = collections.namedtuple("Point", "rate cpu memory")


class TimeUp(Exception):
    """It took too long."""


@contextlib.contextmanager
def time_limit(seconds):
    """End what the `with` block does, with TimeUp, after so many seconds."""

    def give_up(number, frame):
        raise TimeUp

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


# ---- Measuring --------------------------------------------------------------


class Crowd:
    """Connections to one server, of which there are ever more."""

    def __init__(self, server, seconds):
        self.server = server
        self.seconds = seconds  # to spend on a point
        self.connections = []
        self.answered = 0  # requests
        self.end_of_opening = time.monotonic() + OPEN

    def grow(self, size):
        """Open connections until they are `size`.

        Returns None or, if they did not become so many, the reason.
        """
        while len(self.connections) < size:
            if time.monotonic() > self.end_of_opening:
                return f"more would take longer than {OPEN:.0f} s to open"
            batch = []
            try:
                with time_limit(MOST):
                    self.open(batch, size)
            except TimeUp:
                reason = f"the next got no answer within {MOST} s"
            except OSError as error:
                reason = f"the next was not served: {error}"
            else:
                self.connections += batch
                continue
            for connection in batch:
                connection.close()
            return reason
        return None

    def open(self, batch, size):
        """Open a batch, and wait until each of it has got an answer.

        A connection that the kernel has made waits for accept(). Too many of
        them, and the kernel drops some: on Linux without a word.
        """
        for _ in range(min(BATCH, size - len(self.connections))):
            batch.append(Line(self.server))
            # For the kernel to wait in recv, and not Python in poll().
            batch[-1].socket.setblocking(True)
        self.play_round(batch)

    def measure(self, active):
        """Return the Point that `active` of these connections give.

        If a round does not come to its end, the Point has no CPU time: such a
        server has no time for INFO, either.
        """
        step = len(self.connections) // active
        talking = self.connections[::step][:active]
        info = talking[0].info()
        before = cpu_time(info)
        self.answered, begin = 0, time.monotonic()
        try:
            with time_limit(MOST):
                while time.monotonic() - begin < self.seconds:
                    self.play_round(talking)
        except TimeUp:
            self.answered += self.count_replies(talking)
            rate = self.answered / (time.monotonic() - begin)
            return Point(rate, None, mebibytes(self.server))
        rate = self.answered / (time.monotonic() - begin)
        cpu = cpu_time(talking[0].info()) - before
        return Point(rate, cpu / self.answered * 1e6, mebibytes(self.server))

    def play_round(self, connections):
        """Send a request on each connection, then read all the replies."""
        for connection in connections:
            connection.socket.send(PING)
        for connection in connections:
            if connection.socket.recv(64) != PONG:
                raise Failed("a server gave another reply than PONG, or none")
            self.answered += 1

    def count_replies(self, connections):
        """Count the replies that have come and that nobody has read yet."""
        count = 0
        for connection in connections:
            with contextlib.suppress(BlockingIOError):
                reply = connection.socket.recv(64, socket.MSG_DONTWAIT)
                count += bool(reply)
        return count


def mebibytes(server):
    """Return the memory that a server takes now, or None."""
    size = memory(server)
    return size and size / 2**20


def measure_server(name, sizes, seconds, results, notes):
    """Measure one server, with a crowd of each of the sizes.

    `results` is {(name, everybody): {size: Point}}, `everybody` True or False.
    What could not be measured is told in `notes`.
    """
    crowd = None
    try:
        with start(name) as server:
            crowd = Crowd(server, seconds)
            for size in sizes:
                progress(f"{name}: opening {size:,} connections")
                stopped = crowd.grow(size)
                size = len(crowd.connections)
                if stopped:
                    notes.append(f"{name}: stopped at {size:,}: {stopped}")
                if not size or size in results[name, True]:
                    break
                measure_size(name, crowd, results)
                if stopped:
                    break
    except TimeUp:
        notes.append(
            f"{name}: with all {size:,} active, {crowd.answered:,} were"
            f" answered in {MOST} s; then we gave up"
        )
    finally:
        for connection in crowd.connections if crowd else ():
            connection.close()


def measure_size(name, crowd, results):
    """Measure one server with the crowd that is there."""
    size = len(crowd.connections)
    # Ten first: after a round without an end there is no other.
    for active in sorted({min(size, ACTIVE), size}):
        progress(f"{name}: {active:,} of {size:,} are active")
        point = crowd.measure(active)
        if active == size:
            results[name, True][size] = point
        if active <= ACTIVE:
            results[name, False][size] = point
        if point.cpu is None:
            crowd.server.timeout = 1  # it would take as long to stop
            raise TimeUp


def affordable(most):
    """Return the sizes to try, and a note if descriptors forbid some."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    room = most if hard == resource.RLIM_INFINITY else hard - SPARE
    wanted = [size for size in SIZES if size < most] + [most]
    sizes = [size for size in wanted if size <= room]
    if sizes != wanted and (not sizes or room >= 2 * sizes[-1]):
        sizes.append(room)
    raise_descriptor_limit(sizes[-1] + SPARE)
    if sizes == wanted:
        return sizes, []
    return sizes, [
        f"all: stopped at {sizes[-1]:,} connections: only {hard:,} open files"
        " are allowed here (see ulimit -n)"
    ]


# ---- The table --------------------------------------------------------------


def table(results):
    """Return lines of text: all Points, in figures."""
    titles = "requests/s", "CPU per request, us", "memory, MiB"
    lines = []
    for everybody in True, False:
        who = "all active" if everybody else f"{ACTIVE} active"
        lines.append(f"{who:13}" + "".join(f"{t:>22}" for t in titles))
        short = ("".join(f"{n.split()[1]:>7}" for n in NAMES) + " ") * 3
        lines.append(f"{'connections':13}" + short.rstrip())
        sizes = {s for n in NAMES for s in results[n, everybody]}
        for size in sorted(sizes):
            points = [results[n, everybody].get(size) for n in NAMES]
            row = f"{size:<13,}"
            for field in Point._fields:
                for point in points:
                    row += f"{number(getattr(point, field, None)):>7}"
                row += " "
            lines.append(row.rstrip())
        lines.append("")
    return lines


def number(value):
    """Return a figure as a short text."""
    if value is None:
        return "-"
    if value >= 99_999.5:
        return f"{value / 1000:,.0f}k"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}"


# ---- The plots --------------------------------------------------------------
#
# Both axes are logarithmic: a step to the right is ten times the connections.


def panels(results):
    """Return what there is to draw: [(title, [(name, [(x, y), ...]), ...])].

    What a row of panels shows is the same, so its y axes are, too.
    """
    rows = []
    for field, title in [
        ("rate", "requests/s"),
        ("cpu", "CPU per request (us)"),
        ("memory", "memory (MiB)"),
    ]:
        row = []
        for everybody in True, False:
            if field == "memory" and not everybody:
                continue  # it is the same crowd
            who = "all active" if everybody else f"{ACTIVE} active"
            if field == "memory":
                who = "whoever is active"
            curves = []
            for name in NAMES:
                points = sorted(results[name, everybody].items())
                dots = [(x, getattr(point, field)) for x, point in points]
                curves.append((name, [(x, y) for x, y in dots if y]))
            row.append((f"{title}, {who}", curves))
        rows.append(row)
    return rows


def span(values):
    """Return the ends of an axis: 1, 2 or 5 times a power of ten, each."""
    steps = [m * 10.0**e for e in range(-3, 10) for m in (1, 2, 5)]
    low = max(step for step in steps if step <= max(min(values), 0.001))
    high = min(step for step in steps if step >= max(values))
    return low, max(high, low * 10)


def spans(row):
    """Return the ends of the x axis and of the y axis of a row of panels."""
    dots = [dot for _, curves in row for _, dots in curves for dot in dots]
    xs, ys = zip(*dots or [(1, 1)])  # an empty plot, where nobody can tell
    return (1, max(10, *xs)), span(ys)


def place(value, ends):
    """Return where a value lies between the ends of its axis: 0 to 1."""
    low, high = map(math.log10, ends)
    return (math.log10(max(value, ends[0])) - low) / (high - low)


def decades(ends):
    """Return the powers of ten within the ends of an axis."""
    first, last = (math.log10(end) for end in ends)
    first, last = math.ceil(first - 1e-9), math.floor(last + 1e-9)
    return [10.0**exponent for exponent in range(first, last + 1)]


def short(value):
    """Return the text of a tick: 10k for 10,000."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def draw_panel(title, curves, ends, columns=32, height=9):
    """Return lines of text: one plot, 38 columns wide.

    A curve's dots are the number of its server, * where several meet.
    """
    x_ends, y_ends = ends
    blocks = WAITS == "░"  # what stdout can show
    trail, upright, corner, across = "·│└─" if blocks else ".|+-"
    canvas = [[" "] * columns for _ in range(height)]

    def cell(x, y):
        column = round(place(x, x_ends) * (columns - 1))
        return column, height - 1 - round(place(y, y_ends) * (height - 1))

    for _, dots in curves:
        for one, other in zip(dots, dots[1:]):
            (left, top), (right, bottom) = cell(*one), cell(*other)
            for column in range(left + 1, right):
                part = (column - left) / (right - left)
                canvas[round(top + (bottom - top) * part)][column] = trail
    taken = set()
    for name, dots in curves:
        for column, line in {cell(*dot) for dot in dots}:
            meet = (column, line) in taken
            canvas[line][column] = "*" if meet else name[0]
            taken.add((column, line))
    labels = {cell(1, y)[1]: short(y) for y in decades(y_ends) + [*y_ends]}
    lines = [title]
    for line, signs in enumerate(canvas):
        label = labels.get(line, "")
        lines.append(f"{label:>4} {upright}" + "".join(signs))
    lines.append(" " * 5 + corner + across * columns)
    ticks = [" "] * (columns + 6)
    for x in decades(x_ends):
        text = short(x)
        at = min(6 + cell(x, y_ends[0])[0], columns + 6 - len(text))
        ticks[at : at + len(text)] = text
    lines.append("".join(ticks))
    return lines


def draw(results):
    """Return lines of text: all plots, two in a row."""
    lines = []
    for row in panels(results):
        drawn = [draw_panel(*panel, spans(row)) for panel in row]
        if len(drawn) == 1:
            drawn.append(legend())
        for left, right in itertools.zip_longest(*drawn, fillvalue=""):
            lines.append(f"{left:41}{right}".rstrip())
        lines.append("")
    return lines


def legend():
    lines = [""] * 3 + [f"  {name}" for name in NAMES]
    return lines + ["  * several of them", "", "  across: connections"]


# ---- The picture ------------------------------------------------------------

PANEL = 440, 250  # pixels, with its title and the texts beside the axes
PLOT = 360, 170


def picture(results):
    """Return the same plots as a Picture."""
    page = Picture("What a growing crowd costs each server", 2 * PANEL[0] + 20)
    page.text(20, 28, "What a growing crowd costs", "head")
    page.text(20, 46, machine(), "tick")
    top = 60
    for row in panels(results):
        for number, panel in enumerate(row):
            draw_plot(page, 65 + number * PANEL[0], top, *panel, spans(row))
        if len(row) == 1:
            draw_legend(page, 65 + PANEL[0], top + 60)
        top += PANEL[1]
    return page


def draw_plot(page, left, top, title, curves, ends):
    """Draw one plot below `top`, its axes beginning at `left`."""
    top += 32
    right, bottom = left + PLOT[0], top + PLOT[1]

    def spot(x, y):
        x = left + place(x, ends[0]) * PLOT[0]
        return x, bottom - place(y, ends[1]) * PLOT[1]

    page.text(left, top - 14, title, "title")
    for y in sorted({*decades(ends[1]), *ends[1]}):
        at = spot(1, y)[1]
        page.grid(left, at, right, at)
        page.text(left - 8, at + 4, short(y), "tick", "end")
    for x in decades(ends[0]):
        at = spot(x, ends[1][0])[0]
        page.grid(at, top, at, bottom)
        page.text(at, bottom + 17, short(x), "tick", "middle")
    middle = left + PLOT[0] / 2
    page.text(middle, bottom + 33, "connections", "tick", "middle")
    for name, dots in curves:
        spots = [spot(*dot) for dot in dots]
        page.curve(f"s{name[0]}", spots)
        for x, y in spots:
            page.dot(f"s{name[0]}", x, y)


def draw_legend(page, left, top):
    for name in NAMES:
        page.curve(f"s{name[0]}", [(left, top), (left + 40, top)])
        page.dot(f"s{name[0]}", left + 20, top)
        page.text(left + 50, top + 4, name)
        top += 28
    for words in [
        "One PING on each active connection,",
        "then all the replies; and again.",
        "Both axes are logarithmic.",
    ]:
        page.text(left, top + 6, words, "tick")
        top += 17


# ---- The command line -------------------------------------------------------


def command_line():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--most", type=int, default=SIZES[-1], help="connections (10000)")
    add(
        "--seconds",
        type=float,
        default=1.0,
        help="for each point, or the time of one round if that is more (1)",
    )
    add("--svg", metavar="FILE", help="draw the plots in a file, too")
    options = parser.parse_args()
    if not 1 <= options.most <= 50000:
        parser.error("--most takes 1 to 50000 connections")
    if not 0 < options.seconds <= 10:
        parser.error("--seconds takes more than 0, at most 10")
    return options


def main():
    options = command_line()
    sizes, notes = affordable(options.most)
    results = {(name, every): {} for name in NAMES for every in (True, False)}
    for name in NAMES:
        measure_server(name, sizes, options.seconds, results, notes)
    progress()
    print(machine())
    print("One PING on each active connection, then all the replies; again.\n")
    if all(results.values()):
        print(*draw(results), sep="\n")
    print(*table(results), sep="\n")
    for note in notes:
        print(textwrap.fill(note, 79, subsequent_indent="  "))
    if options.svg:
        write(options.svg, picture(results).lines())
        print(f"The picture is in {options.svg}.")


if __name__ == "__main__":
    run(main)
