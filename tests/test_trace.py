"""`make trace`: where each server's threads wait, seen from inside.

Read from the JSON that it writes, in which each call is a span. Limits are
wide: a loaded machine makes a thread wait for a core.
"""

import collections
import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import HERE, SCRIPTS, SERVERS_DIR, run

CLIENTS = 2
TRACER = sys.executable, HERE / "bench" / "trace.py"
SVG = "{http://www.w3.org/2000/svg}"
PATHS = {name: SERVERS_DIR / script for name, script in SCRIPTS.items()}


class Traced:
    """What came of a run of the tracer: `out`, `svg`, and its JSON, sorted."""

    def __init__(self, folder, scene, *names, encoding="utf-8"):
        files = folder / f"{scene}.json", folder / f"{scene}.svg"
        options = ["--scene", scene, "--connections", CLIENTS]
        options += ["--json", files[0], "--svg", files[1]]
        options += [f"--server={PATHS[name]}" for name in names]
        status, self.out, err = run(*TRACER, *options, encoding=encoding)
        assert (status, err) == (0, "")
        self.svg = files[1].read_text("utf-8")
        self.named = {}  # (process, thread or 0): its name
        self.spans = collections.defaultdict(list)  # the same: its spans
        for event in json.loads(files[0].read_text())["traceEvents"]:
            key = event["pid"], event["tid"]
            if event["ph"] == "X":
                self.spans[key].append(event)
            elif event["name"] in ("process_name", "thread_name"):
                self.named[key] = event["args"]["name"]

    def lanes(self, name):
        """Return {what a thread is for: its spans} of a server's process."""
        script = PATHS[name].name if name in PATHS else name
        (pid,) = [p for (p, t), n in self.named.items() if n == script]
        keys = [key for key in self.named if key[0] == pid and key[1]]
        return {self.named[key]: self.spans[key] for key in keys}

    def waits(self, name):
        """Return {a client of a server: the spans in which it waits}."""
        return self.lanes(f"clients of {SCRIPTS[name]}")


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """All four servers, and a script of one's own: the loop on a kqueue."""
    folder = tmp_path_factory.mktemp("trace")
    PATHS["own"] = folder / "own.py"
    PATHS["own"].write_text(
        f"import runpy, sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from fake_kqueue import install\n"
        f"install({str(folder / 'log')!r})\n"
        f"runpy.run_path({str(PATHS['kqueue'])!r}, run_name='__main__')\n"
    )
    return Traced(folder, "thinking", *PATHS)


def shares(spans):
    """Return {call: its part of the time from the first to the last span}."""
    shares = collections.Counter()
    total = end(spans[-1]) - spans[0]["ts"]
    for span in spans:
        shares[span["name"]] += span["dur"] / total
    return shares


def end(span):
    return span["ts"] + span["dur"]


def test_single(thinking):
    """One thread, nearly all the time in recv, for one after the other."""
    ((_, spans),) = thinking.lanes("single").items()
    assert shares(spans)["recv"] > 0.5
    clients = [s["args"]["client"] for s in spans if s["name"] == "recv"]
    assert sorted(set(clients)) == list(range(1, CLIENTS + 1))
    assert clients == sorted(clients)


def test_multi(thinking):
    """A thread for each client, asleep in recv; the main one in accept."""
    lanes = thinking.lanes("multi")
    assert shares(lanes.pop("main: accepts"))["accept"] > 0.5
    assert set(lanes) == {f"serves client {n + 1}" for n in range(CLIENTS)}
    assert all(shares(spans)["recv"] > 0.5 for spans in lanes.values())


def test_busy(thinking):
    """One thread that never sleeps. Its polls in vain are few spans."""
    ((_, spans),) = thinking.lanes("busy").items()
    assert shares(spans)["poll"] > 0.3
    assert shares(spans)["sleep"] == shares(spans)["queue"] == 0
    polls = [span for span in spans if span["name"] == "poll"]
    calls = sum(span["args"]["calls"] for span in polls)
    assert calls > 100 and len(polls) <= len(spans) // 2 + 1
    table = thinking.out.partition("3_busy")[2]
    vain = re.search(r"^in vain +(\S+) +(\S+)", table, re.M).groups()
    assert sum(int(text.replace(",", "")) for text in vain) == calls


@pytest.mark.parametrize("name", ["kqueue", "own"])
def test_kqueue(thinking, name):
    """The loop sleeps in the queue; the main thread waits for the loop."""
    lanes = thinking.lanes(name)
    loop = lanes["event loop"]
    main = lanes["main: waits for another thread's end"]
    assert len(lanes) == 2
    assert shares(loop)["queue"] > 0.5 and shares(main)["join"] > 0.8
    assert shares(loop)["sleep"] == shares(loop)["poll"] == 0
    assert not any("failed" in span["args"] for span in loop)


def test_a_handler_that_blocks(tmp_path):
    """The loop sleeps and all clients wait. Of the threads, one sleeps.

    The drawing is in ASCII, if stdout takes no more.
    """
    traced = Traced(tmp_path, "blocking", "multi", "kqueue", encoding="ascii")
    sleepers = ("multi", "serves client 1"), ("kqueue", "event loop")
    for (name, lane), waiting in zip(sleepers, (1, CLIENTS)):
        lanes = traced.lanes(name)
        spans = [span for spans in lanes.values() for span in spans]
        (asleep,) = [span for span in spans if span["name"] == "sleep"]
        assert asleep in lanes[lane] and asleep["dur"] > 490_000
        waits = [w for waits in traced.waits(name).values() for w in waits]
        assert sum(wait["dur"] > 400_000 for wait in waits) == waiting
    assert traced.out.isascii() and "|zzzz" in traced.out


def test_a_client_that_goes_quiet(tmp_path):
    """The one thread is in recv for client 1, and the others wait."""
    traced = Traced(tmp_path, "quiet", "single")
    (spans,) = traced.lanes("single").values()
    longest = max(spans, key=lambda span: span["dur"])
    assert (longest["name"], longest["args"]) == ("recv", {"client": 1})
    waits = traced.waits("single")["client 2"]
    assert end(waits[0]) >= end(longest)


def test_json(thinking):
    """Chrome's Trace Event Format: names, and spans that do not overlap."""
    names = set("accept recv send queue sleep poll lock join waits".split())
    keys = set("ph name pid tid ts dur args".split())
    for key, spans in thinking.spans.items():
        assert key in thinking.named
        now = 0
        for span in spans:
            assert set(span) == keys and span["name"] in names
            assert span["ts"] >= now - 0.2 and span["dur"] >= 0  # rounded
            now = end(span)


def test_drawing(thinking):
    """All on one scale, in 79 columns; short moments of work are seen."""
    drawn = thinking.out.partition("\nThe same is drawn in ")[0]  # no path
    assert max(map(len, drawn.splitlines())) <= 79
    scales = re.findall(r"^\S+\.py: .* (0 to .*)$", thinking.out, re.M)
    assert len(scales) == 5 and len(set(scales)) == 1
    name = r"^(?:main|loop|of client \d) +(\S+)$"
    lanes = re.findall(name, thinking.out, re.M)
    single, main, one, two, busy, waits, loop = lanes[:7]
    assert set("12│") <= set(single) <= set("12│█as")
    assert main.count("a") > main.count("│")
    assert "1" in one and "2" not in one and "2" in two and "1" not in two
    assert "▒" in busy and "q" in loop and "j" in waits and "q" not in waits
    # The legend has what occurs, and nothing else.
    legend = thinking.out.partition("\n\n1_single")[0]
    assert "in the queue" in legend and "in sleep" not in legend


def test_svg(thinking):
    """Well-formed, without a script, each server named and each call."""
    root = ElementTree.fromstring(thinking.svg)
    kinds = {element.tag[len(SVG) :] for element in root.iter()}
    assert kinds == set("svg title style rect text line".split())
    texts = {e.text.partition(": ")[0] for e in root.iter(SVG + "text")}
    assert {*SCRIPTS.values(), "of client 2", "in the queue"} <= texts
    assert "prefers-color-scheme: dark" in thinking.svg


def test_bad_script(tmp_path):
    """One sentence, and a status that is not 0."""
    missing = tmp_path / "missing.py"
    status, out, err = run(*TRACER, "--server", missing)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"trace.py: cannot read {missing}: No such")
