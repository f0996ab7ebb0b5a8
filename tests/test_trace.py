"""`make trace`: where each server's threads wait, seen from inside.

Read from the JSON that it writes, in which each call is a span. Limits are
wide: a loaded machine makes a thread wait for a core.
"""

import json
import re
import sys
from xml.etree import ElementTree

import pytest
from conftest import HERE, SCRIPTS, SERVERS_DIR, played, run, text_of

TRACER = sys.executable, HERE / "bench" / "trace.py"
SINGLE, MULTI, BUSY, KQUEUE = SCRIPTS.values()
NAMES = set("accept recv send queue sleep poll lock join waits".split())
KEYS = set("ph name pid tid ts dur args".split())


def end(span):
    return span["ts"] + span["dur"]


class Traced:
    """What came of a run of the tracer: `out`, `svg`, and `lanes`.

    These are {process: {thread: spans}}, from its JSON: Chrome's Trace Event
    Format. All have a name. Spans of a thread do not overlap.
    """

    def __init__(self, folder, scene, *scripts, encoding="utf-8"):
        file, self.svg = folder / f"{scene}.json", folder / f"{scene}.svg"
        options = [f"--server={SERVERS_DIR / script}" for script in scripts]
        options += ["--scene", scene, "--connections", 2]
        options += ["--json", file, "--svg", self.svg]
        status, self.out, err = run(*TRACER, *options, encoding=encoding)
        assert (status, err) == (0, "")
        self.lanes, processes, threads = {}, {}, {}
        for event in json.loads(file.read_text())["traceEvents"]:
            pid, thread = event["pid"], (event["pid"], event["tid"])
            if event["name"] == "process_name":
                processes[pid] = self.lanes[event["args"]["name"]] = {}
            elif event["name"] == "thread_name":
                threads[thread] = processes[pid][event["args"]["name"]] = []
            elif event["ph"] == "X":
                spans = threads[thread]
                ended = end(spans[-1]) if spans else 0
                assert event.keys() == KEYS and event["name"] in NAMES
                assert event["ts"] >= ended - 0.2 and event["dur"] >= 0
                spans.append(event)


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """All four servers, and a script of one's own: the loop on a kqueue."""
    folder = tmp_path_factory.mktemp("trace")
    own = folder / "own.py"
    own.write_text(played(folder / "log") + text_of("kqueue"))
    return Traced(folder, "thinking", *SCRIPTS.values(), own)


LANES = {  # the threads of each, and the call in which each spends its time
    SINGLE: {"main: accepts, and serves one after the other": "recv"},
    MULTI: {
        "main: accepts": "accept",
        "serves client 1": "recv",
        "serves client 2": "recv",
    },
    BUSY: {"main: polls everybody in turn": "poll"},
    KQUEUE: {
        "main: waits for another thread's end": "join",
        "event loop": "queue",
    },
}
LANES["own.py"] = LANES[KQUEUE]


@pytest.mark.parametrize("script", LANES)
def test_where_each_waits(thinking, script):
    """Each thread is in its call. None sleeps; one polls, one has a queue."""
    lanes = thinking.lanes[script]
    assert lanes.keys() == LANES[script].keys()
    for lane, call in LANES[script].items():
        spans = lanes[lane]
        inside = sum(span["dur"] for span in spans if span["name"] == call)
        share = inside / (end(spans[-1]) - spans[0]["ts"])
        assert share > {"poll": 0.3, "join": 0.8}.get(call, 0.5)
        others = {span["name"] for span in spans} - {call}
        assert not {"sleep", "poll", "queue"} & others
        assert not any("failed" in span["args"] for span in spans)


def test_single_and_busy(thinking):
    """1 reads from one client after the other. Polls in vain are few spans."""
    (spans,) = thinking.lanes[SINGLE].values()
    clients = [s["args"]["client"] for s in spans if s["name"] == "recv"]
    assert clients == sorted(clients) and set(clients) == {1, 2}
    (spans,) = thinking.lanes[BUSY].values()
    polls = [span["args"] for span in spans if span["name"] == "poll"]
    calls = sum(poll["calls"] for poll in polls)
    assert calls > 100 and len(polls) <= len(spans) // 2 + 1
    table = thinking.out.partition("3_busy")[2].replace(",", "")
    vain = re.search(r"^in vain +(\d+) +(\d+)", table, re.M).groups()
    assert sum(map(int, vain)) == calls


def test_a_handler_that_blocks(tmp_path):
    """Meanwhile 2's other thread serves, 3 and 4 nobody. In ASCII, too."""
    sleepers = {MULTI: "serves client 1", KQUEUE: "event loop"}
    sleepers[BUSY] = "main: polls everybody in turn"
    traced = Traced(tmp_path, "blocking", *sleepers, encoding="ascii")
    for script, sleeper in sleepers.items():
        lanes = traced.lanes[script]
        spans = sum(lanes.values(), [])
        (asleep,) = [span for span in spans if span["name"] == "sleep"]
        assert asleep in lanes[sleeper] and asleep["dur"] > 490_000
        waits = sum(traced.lanes[f"clients of {script}"].values(), [])
        # On a loaded machine others may wait as long, for a core.
        long = [wait for wait in waits if wait["dur"] > 400_000]
        assert len(long) >= (1 if script == MULTI else 2)
        asked = [wait for wait in waits if wait["ts"] > asleep["ts"]]
        served = any(end(wait) < end(asleep) for wait in asked)
        assert served == (script == MULTI)
    assert traced.out.isascii() and "|zzzz" in traced.out


def test_a_client_that_goes_quiet(tmp_path):
    """The one thread is in recv for client 1, and the others wait."""
    lanes = Traced(tmp_path, "quiet", SINGLE).lanes
    (spans,) = lanes[SINGLE].values()
    longest = max(spans, key=lambda span: span["dur"])
    assert (longest["name"], longest["args"]) == ("recv", {"client": 1})
    waits = lanes[f"clients of {SINGLE}"]["client 2"]
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
