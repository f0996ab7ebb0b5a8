"""What each pattern is, and how it shows from outside, and in `make trace`."""

import json
import re
import select
import sys
import time
from xml.etree import ElementTree

import pytest
from conftest import (
    HERE, MANY, PATIENCE, PROC, SCRIPTS, SERVERS_DIR, arrived, bulk,
    clients, figures, frozen, is_readable, load, needs, needs_proc, ping,
    played, read_exactly, run, talk, text_of, together, wait_for,
)  # fmt: skip

CONNECTION = "IncomingTCPConnection"
CALLS = "accept receive sendall"
QUEUE = "kqueue" if hasattr(select, "kqueue") else "epoll in place of kqueue"
LOOP = f"event loop on {QUEUE}"
# What it calls itself, its classes, calls that sleep, its tally; its threads
# when nobody is connected, and with eight clients.
FACTS = {
    "single": ("single blocking", CONNECTION, CALLS, "clients_served", 1, 1),
    "multi": ("multi blocking", CONNECTION, CALLS, "threads_started", 1, 9),
    "busy": ("busy wait", "Client", "", "polls polls_in_vain", 1, 1),
    "kqueue": (LOOP, "EventLoop Client", "control", "wakeups events", 2, 2),
}


def test_what_it_says_and_what_it_is(server):
    """The article's names; INFO and Ctrl-C; threads; O_NONBLOCK in 3 and 4."""
    name = server.name
    pattern, classes, sleeping, tally, alone, threads = FACTS[name]
    for word in ["TCPServer", *classes.split()]:
        assert isinstance(getattr(load(name), word), type)
    calls = re.findall(r"(\w+)\(.*# sleeps", text_of(name))
    assert calls == sleeping.split()
    assert server.stdout().startswith(f"{pattern}: listening on 127.0.0.1:")
    for _ in range(4):
        server.ping()
    info = server.info()
    assert info["pattern"] == pattern and info["role"] == "master"
    # redis-py would make a list of a value with a comma.
    assert "," not in "".join(info.values())
    counts = [int(info[field]) for field in tally.split()]
    assert min(counts) >= 4
    # 2 counts a thread once it has started.
    assert name not in ("single", "multi") or max(counts) <= 5
    before = server.held_at_rest()
    socks = clients(server, 8)
    assert int(server.info(socks[0])["threads"]) == threads
    if PROC:
        assert before[0] == alone and server.held()[0] == threads
        expected = [name in ("busy", "kqueue")] * (9 if name in MANY else 2)
        assert server.nonblocking() == expected
    server.leave()
    wait_for(lambda: server.held() == before, "all is as it was")
    assert list(figures(server.stop().stdout())) == list(info)


def test_what_waiting_costs(start):
    """With 8 silent clients, 3 uses a core, the others nothing."""

    def grown(name):
        """Return by how much the figures of INFO grow while nobody talks."""
        server = start(name)
        first = clients(server, 8)[0]
        old = server.info(first)
        time.sleep(1)
        new = server.info(first)
        fields = new.keys() - {"pattern", "role"}
        return {each: float(new[each]) - float(old[each]) for each in fields}

    costs = together(grown, *SCRIPTS)
    used = [cost["used_cpu_user"] + cost["used_cpu_sys"] for cost in costs]
    busy, core = costs.pop(2), used.pop(2)
    assert all(cost["voluntary_context_switches"] for cost in costs)
    assert max(used) < 0.1, used
    # Others may want the core as well, so "most of it" is not asked for.
    assert 0.2 < core < 60 and core > 10 * max(used), (core, used)
    assert min(busy["used_cpu_user"], busy["used_cpu_sys"]) > 0.01
    assert busy["involuntary_context_switches"] >= 0
    # Nearly all of its polls were in vain; 4 was woken for the second INFO.
    assert busy["polls_in_vain"] > 100
    assert 0 < busy["polls"] - busy["polls_in_vain"] < 10
    assert costs[-1]["wakeups"] == costs[-1]["events"] == 1


WAITS = {"poll", "ppoll", "select", "pselect6", "epoll_wait", "epoll_pwait"}
WAITS |= {"epoll_pwait2", "nanosleep", "clock_nanosleep"}
if getattr(sys, "_is_gil_enabled", lambda: True)():
    WAITS.add("sched_yield")  # else it is in Python's own locks


@needs_proc
def test_calls_that_wait(start, tmp_path):
    """1 and 2 wait in accept, recv, send; 3 nowhere; 4 in its queue alone.

    So the kernel sees it. In which threads, test_where_each_waits asks.
    """
    needs("strace")
    if run("strace", "true")[0]:
        pytest.skip("strace may not trace here")

    def traced(name):
        """Return all calls but futex, each with the rest of its line."""
        # -D: strace stands beside the server, whose process remains ours.
        shell = f'exec strace -D -f -s 99 -o "{tmp_path}/{name}" "$0" "$@"'
        server = start(name, shell=shell)
        socks = clients(server, 1 if name == "single" else 2)
        time.sleep(0.8)  # silence
        for sock in socks * 3:
            ping(sock)
        server.kill()
        text = (tmp_path / name).read_text(errors="replace")
        pattern = r"^\d+ +(?:<\.\.\. )?(?!futex)(\w+?)4?(?:\(| resumed)(.*)"
        return re.findall(pattern, text.partition("listening on")[2], re.M)

    for name, calls in zip(SCRIPTS, together(traced, *SCRIPTS)):
        waits = WAITS & {call for call, _ in calls}
        vain = [call for call, rest in calls if "EAGAIN" in rest]
        if name == "kqueue":
            assert waits and waits <= {"epoll_wait", "epoll_pwait"}
            assert len(vain) < 10
        elif name == "busy":
            assert not waits and len(vain) > 100
            assert {"accept", "recvfrom"} <= set(vain)
        else:
            assert not waits and not vain


def test_second_client(server):
    """Half a request keeps all others waiting in 1; else they are served."""
    first = server.connect()
    talk(first, b"PING\r\n*2\r\n$4\r\nPING\r\n$5\r\nhe", b"+PONG\r\n")
    others = [server.connect() for _ in range(3)]
    for sock in reversed(others):
        sock.sendall(b"INCR turn\r\n")
    if server.name == "single":
        assert not is_readable(others[0], 0.1)
        talk(first, b"llo\r\n", bulk(b"hello"))
        first.close()
    turns = []
    for sock in others:
        turns.append(read_exactly(sock, 4))
        if server.name == "single":  # in the order they came
            assert not any(map(is_readable, others[len(turns) :]))
        sock.close()
    turns = turns if server.name == "single" else sorted(turns)
    assert turns == [b":1\r\n", b":2\r\n", b":3\r\n"]


@needs_proc
@pytest.mark.parametrize("name", ["busy", "kqueue"])
def test_answered_at_once(server):
    """What is carried out is answered before another's handler blocks."""
    socks = clients(server, 5)
    with frozen(server):  # all requests are there at once
        for sock in socks:
            sock.sendall(b"DEBUG SLEEP 0.15\r\n")
            arrived(sock)
    counts = set()
    while len(socks) not in counts:
        counts.add(len(select.select(socks, [], [], PATIENCE)[0]))
        time.sleep(0.02)
    # One by one; after all were read, they would come all at once. Twice, if
    # a round was going on.
    assert len(counts) > 2


# ---- In `make trace` --------------------------------------------------------
# Limits are wide: on a loaded machine a thread waits for a core.

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
