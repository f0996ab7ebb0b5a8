"""`make trace`: where each server's threads wait, seen from inside.

Read from the JSON that it writes, in which each call is a span. Limits are
wide: a loaded machine makes a thread wait for a core.
"""

import collections
import json
import re
import sys
from xml.etree import ElementTree

import pytest
from conftest import HERE, SCRIPTS, SERVERS_DIR, played, run, text_of

CLIENTS, WAITS = 2, "clients of "
TRACER = sys.executable, HERE / "bench" / "trace.py"
PATHS = {name: SERVERS_DIR / script for name, script in SCRIPTS.items()}
NAMES = set("accept recv send queue sleep poll lock join waits".split())
KEYS = set("ph name pid tid ts dur args".split())


def end(span):
    return span["ts"] + span["dur"]


class Traced:
    """What came of a run of the tracer: `out`, `svg`, and its JSON, sorted.

    It is Chrome's Trace Event Format: names, and spans that do not overlap.
    """

    def __init__(self, folder, scene, *names, encoding="utf-8"):
        file, self.svg = folder / f"{scene}.json", folder / f"{scene}.svg"
        options = [f"--server={PATHS[name]}" for name in names]
        options += ["--scene", scene, "--connections", CLIENTS]
        options += ["--json", file, "--svg", self.svg]
        status, self.out, err = run(*TRACER, *options, encoding=encoding)
        assert (status, err) == (0, "")
        self.named = {}  # (process, thread or 0): its name
        self.spans = collections.defaultdict(list)  # the same: its spans
        for event in json.loads(file.read_text())["traceEvents"]:
            key = event["pid"], event["tid"]
            if event["ph"] == "X":
                ended = end(self.spans[key][-1]) if self.spans[key] else 0
                assert event.keys() == KEYS and event["name"] in NAMES
                assert event["ts"] >= ended - 0.2 and event["dur"] >= 0
                self.spans[key].append(event)
            elif event["name"] in ("process_name", "thread_name"):
                self.named[key] = event["args"]["name"]
        assert self.spans.keys() <= self.named.keys()

    def lanes(self, name, prefix=""):
        """Return {thread: spans} of a server, or {client: waits}."""
        process = prefix + PATHS[name].name
        (pid,) = [p for (p, t), n in self.named.items() if n == process]
        keys = [key for key in self.named if key[0] == pid and key[1]]
        return {self.named[key]: self.spans[key] for key in keys}


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """All four servers, and a script of one's own: the loop on a kqueue."""
    folder = tmp_path_factory.mktemp("trace")
    PATHS["own"] = folder / "own.py"
    PATHS["own"].write_text(played(folder / "log") + text_of("kqueue"))
    return Traced(folder, "thinking", *PATHS)


CALLS = {  # where a thread spends its time
    "main: accepts, and serves one after the other": "recv",
    "main: accepts": "accept",
    "serves client 1": "recv",
    "serves client 2": "recv",
    "main: polls everybody in turn": "poll",
    "event loop": "queue",
    "main: waits for another thread's end": "join",
}
THREADS = {"single": 1, "multi": 1 + CLIENTS, "busy": 1, "kqueue": 2, "own": 2}


@pytest.mark.parametrize("name", THREADS)
def test_where_each_waits(thinking, name):
    """Each thread is in its call. None sleeps; one polls, one has a queue."""
    lanes = thinking.lanes(name)
    assert len(lanes) == THREADS[name]
    for lane, spans in lanes.items():
        times, call = collections.Counter(), CALLS[lane]
        for span in spans:
            times[span["name"]] += span["dur"]
        share = times[call] / (end(spans[-1]) - spans[0]["ts"])
        assert share > {"poll": 0.3, "join": 0.8}.get(call, 0.5)
        assert not {"sleep", "poll", "queue"} & set(times) - {call}
        assert not any("failed" in span["args"] for span in spans)


def test_single_and_busy(thinking):
    """1 reads from one client after the other. Polls in vain are few spans."""
    (spans,) = thinking.lanes("single").values()
    clients = [s["args"]["client"] for s in spans if s["name"] == "recv"]
    assert clients == sorted(clients) and set(clients) == {1, CLIENTS}
    (spans,) = thinking.lanes("busy").values()
    polls = [span["args"] for span in spans if span["name"] == "poll"]
    calls = sum(poll["calls"] for poll in polls)
    assert calls > 100 and len(polls) <= len(spans) // 2 + 1
    table = thinking.out.partition("3_busy")[2].replace(",", "")
    vain = re.search(r"^in vain +(\d+) +(\d+)", table, re.M).groups()
    assert sum(map(int, vain)) == calls


def test_a_handler_that_blocks(tmp_path):
    """Meanwhile threads serve others, the loop nobody. In ASCII, too."""
    traced = Traced(tmp_path, "blocking", "multi", "kqueue", encoding="ascii")
    sleepers = ("multi", "serves client 1", 1), ("kqueue", "event loop", 2)
    for name, lane, waiting in sleepers:
        lanes = traced.lanes(name)
        spans = sum(lanes.values(), [])
        (asleep,) = [span for span in spans if span["name"] == "sleep"]
        assert asleep in lanes[lane] and asleep["dur"] > 490_000
        waits = sum(traced.lanes(name, WAITS).values(), [])
        # On a loaded machine others may wait as long, for a core.
        assert sum(wait["dur"] > 400_000 for wait in waits) >= waiting
        served = [
            wait
            for wait in waits
            if asleep["ts"] < wait["ts"] and end(wait) < end(asleep)
        ]
        assert bool(served) == (name == "multi")
    assert traced.out.isascii() and "|zzzz" in traced.out


def test_a_client_that_goes_quiet(tmp_path):
    """The one thread is in recv for client 1, and the others wait."""
    traced = Traced(tmp_path, "quiet", "single")
    (spans,) = traced.lanes("single").values()
    longest = max(spans, key=lambda span: span["dur"])
    assert (longest["name"], longest["args"]) == ("recv", {"client": 1})
    waits = traced.lanes("single", WAITS)["client 2"]
    assert end(waits[0]) >= end(longest)


def test_drawing(thinking):
    """All on one scale, in 79 columns; short moments of work are seen."""
    drawn = thinking.out.partition("\nThe same is drawn in ")[0]  # no path
    assert max(map(len, drawn.splitlines())) <= 79
    scales = re.findall(r"^\S+\.py: .* (0 to .*)$", drawn, re.M)
    assert len(scales) == 5 and len(set(scales)) == 1
    lanes = re.findall(r"^(?:main|loop|of client \d) +(\S+)$", drawn, re.M)
    single, main, one, two, busy, waits, loop = lanes[:7]
    assert set("12│") <= set(single) <= set("12│█as")
    assert main.count("a") > main.count("│")
    assert "1" in one and "2" not in one and "2" in two and "1" not in two
    assert "▒" in busy and "q" in loop and "j" in waits and "q" not in waits
    # The legend has what occurs, and nothing else.
    legend = drawn.partition("\n\n1_single")[0]
    assert "in the queue" in legend and "in sleep" not in legend


def test_svg(thinking):
    """Well-formed, without a script; each server is named, and each call."""
    elements = list(ElementTree.parse(thinking.svg).iter())
    kinds = {element.tag.partition("}")[2] for element in elements}
    assert kinds == set("svg title style rect text line".split())
    texts = {str(element.text).partition(": ")[0] for element in elements}
    assert {*SCRIPTS.values(), "of client 2", "in the queue"} <= texts
    assert "prefers-color-scheme: dark" in thinking.svg.read_text("utf-8")


def test_bad_script(tmp_path):
    """One sentence, and a status that is not 0."""
    missing = tmp_path / "missing.py"
    status, out, err = run(*TRACER, "--server", missing)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"trace.py: cannot read {missing}: No such")
