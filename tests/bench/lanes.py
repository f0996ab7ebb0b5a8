"""Draws what trace.py has recorded: clients, and below them the threads.

As text, for a terminal or a file, and as SVG, for slides.
"""

import collections
from harness import TALKS, WAITS, dumb, machine, sample
from svg import COLOURS, Picture

WIDTH = 79  # columns
MARGIN = 13  # of these, for names

# ---- As text ----------------------------------------------------------------

SIGNS = {  # for recv it is the client's number, if that is known
    "accept": "a",
    "recv": "r",
    "send": "s",
    "queue": "q",
    "sleep": "z",
    "lock": "-",
    "join": "j",
    "poll": "\u2592",
    "running": "\u2588",
    "moment": "\u2502",
    "silent": "\u00b7",
}
PLAIN = {"poll": "%", "running": "#", "moment": "|", "silent": ":"}  # in ASCII
COLORS = {  # as a terminal numbers them; the others stay as they are
    "accept": 36,
    "recv": 94,
    "send": 95,
    "queue": 32,
    "sleep": 33,
    "lock": 90,
    "join": 90,
    "poll": 31,
}


def sign(state, client=None):
    """Return the sign for a state, in colour if stdout is a terminal."""
    plain = PLAIN if TALKS == "#" else {}
    text = plain.get(state, SIGNS[state])
    if state == "recv" and client:
        text = str(client % 10)  # one column, so one digit
    if state in COLORS and not dumb():
        text = f"\x1b[{COLORS[state]}m{text}\x1b[0m"
    return text


WORDS = {
    "accept": "sleeps in accept",
    "recv": "in recv, for client 1, 2, 3",
    "send": "in send",
    "queue": "in the queue",
    "sleep": "in sleep",
    "lock": "waits for a lock",
    "join": "waits for the loop's end",
    "poll": "polls in vain",
    "running": "runs, or waits for a core",
    "moment": "runs for a moment",
}


def legend(traces):
    """Return lines of text that explain the signs that occur."""
    clients = [f"{WAITS} waits for the server", f"{TALKS} talks or thinks"]
    if any(silent(visitor) for t in traces for visitor in t.crowd.visitors):
        clients.append(f"{sign('silent')} has sent half a request, is silent")
    spans = [span for t in traces for lane in t.lanes for span in lane.spans()]
    states = {span.state for span in spans} | {"moment"}
    threads = []
    for state, words in WORDS.items():
        if state in states:
            shown = sign(state)
            if state == "recv":
                shown = "".join(sign("recv", number) for number in (1, 2, 3))
            threads.append(f"{shown} {words}")
    lines = []
    for name, texts in ("clients", clients), ("threads", threads):
        for at in range(0, len(texts), 2):
            head = "" if at else name
            lines.append(f"{head:{MARGIN}}" + "   ".join(texts[at : at + 2]))
    return lines


def silent(visitor):
    """Return when a client was silent: a pair of times, or None."""
    return getattr(visitor, "silent", None)


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
    row = [" "] * (WIDTH - MARGIN)
    for shown, times in (
        (TALKS, [(start, visitor.end)]),
        (sign("silent"), [silent(visitor)] if silent(visitor) else []),
        (WAITS, visitor.waits),
    ):
        for begin, end in times:
            first = round((begin - start) / step)
            last = min(round((end - start) / step), len(row))
            row[first:last] = shown * (last - first)
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

LEFT, RIGHT = 80, 800  # pixels: the ends of the axis of time
CLIENT, THREAD = 9, 16  # pixels: the height of their rows
KINDS = {  # in the legend: (its words, in light, in dark, text on it)
    "accept": ("sleeps in accept", "#56b4e9", "#56b4e9", "on-light"),
    "recv": ("in recv", "#0072b2", "#0072b2", "on-dark"),
    "send": ("in send", "#cc79a7", "#cc79a7", "on-light"),
    "queue": ("in the queue", "#009e73", "#009e73", "on-light"),
    "sleep": ("in sleep", "#e69f00", "#e69f00", "on-light"),
    "lock": ("in a lock", "#afb8c1", "#afb8c1", "on-light"),
    "join": ("waits for the loop", "#d1d9e0", "#6e7781", "on-light"),
    "poll": ("polls in vain", "#d55e00", "#d55e00", "on-light"),
    "running": ("runs", "#000000", "#ffffff", ""),
    "client-waits": ("client waits", "#d1d9e0", "#3d444d", ""),
    "client-talks": ("client talks", "#6e7781", "#9198a1", ""),
    "client-silent": ("client is silent", "#f0d9ff", "#5c4a6b", ""),
}
COLOURS.update({kind: about[1:3] for kind, about in KINDS.items()})
COLOURS["on-light"] = "#000000", "#000000"
COLOURS["on-dark"] = "#ffffff", "#ffffff"


def picture(traces, title):
    """Return the Picture of all servers, on one scale of time."""
    seconds = max(trace.elapsed for trace in traces)
    page = Picture("Where each server waits, and for whom", RIGHT + 40)
    page.text(20, 28, page.title, "head")
    page.text(20, 46, f"{title}. {machine()}", "tick")
    spans = [span for t in traces for lane in t.lanes for span in lane.spans()]
    occurring = {span.state for span in spans}
    occurring |= {"client-waits", "client-talks"}
    if any(silent(visitor) for t in traces for visitor in t.crowd.visitors):
        occurring.add("client-silent")
    shown = [item for item in KINDS.items() if item[0] in occurring]
    for number, (kind, about) in enumerate(shown):
        x, y = LEFT + number % 5 * 145, 58 + number // 5 * 17
        page.bar(kind, x, y, 14, 10)
        page.text(x + 20, y + 9, about[0], "tick")
    y = 110
    for trace in traces:
        page.text(20, y, f"{trace.script}: {trace.elapsed:.2f} s", "title")
        y = add_server(page, y + 8, trace, (RIGHT - LEFT) / seconds)
        page.text(LEFT, y + 11, trace.in_words(), "tick")
        y += 38
    page.time_axis(LEFT, RIGHT, y - 20, y - 15, seconds)
    return page


def add_server(page, y, trace, pixels):
    """Draw a server's clients and threads from `y`; return where they end.

    `pixels` is how many a second takes.
    """
    page.text(LEFT - 8, y + 8, "clients", "tick", "end")
    for visitor in sample(trace.crowd.visitors):
        talk = "client-talks", trace.start, visitor.end
        waits = [("client-waits", *wait) for wait in visitor.waits]
        quiet = (
            [("client-silent", *silent(visitor))] if silent(visitor) else []
        )
        for kind, begin, end in [talk, *quiet, *waits]:
            x = LEFT + (begin - trace.start) * pixels
            page.bar(kind, x, y, (end - begin) * pixels, CLIENT - 2)
        y += CLIENT
    y += 4
    for lane in sample(trace.lanes):
        page.text(LEFT - 8, y + 11, lane.label, "tick", "end")
        # Work comes last, and is as wide as one can see: it is mostly short.
        spans = sorted(lane.spans(), key=lambda span: span.state == "running")
        for state, begin, end, client, *_ in spans:
            x, width = LEFT + begin * pixels, (end - begin) * pixels
            least = 1 if state == "running" else 0
            says = f"{state} for {end - begin:.4f} s"
            page.bar(state, x, y, max(width, least), THREAD - 2, says)
        for state, begin, end, client, *_ in spans:
            words = str(client or state)
            if (end - begin) * pixels > 7 * len(words) + 4 and KINDS[state][3]:
                x = LEFT + (begin + end) / 2 * pixels
                kind = f"tick {KINDS[state][3]}"
                page.text(x, y + 11, words, kind, "middle")
        y += THREAD
    return y
