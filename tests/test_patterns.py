"""What each pattern is, and how it shows from outside."""

import re
import select
import time

import pytest
from conftest import (
    FREE, MANY, PATIENCE, PROC, SCRIPTS, arrived, bulk, frozen,
    is_readable, load, needs, needs_proc, ping, read_exactly, run, talk,
    text_of, together, wait_for,
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


def clients(server, count):
    """Connect, and be served as far as the pattern serves."""
    socks = [server.connect() for _ in range(count)]
    for sock in socks if server.name in MANY else socks[:1]:
        ping(sock)
    return socks


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
    assert info["pattern"] == pattern
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
    assert list(server.stop().tally()) == list(info)


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
WAITS |= set() if FREE else {"sched_yield"}  # there, it is in Python's locks


@needs_proc
def test_calls_that_wait(start, tmp_path):
    """1 and 2 wait in accept, recv, send; 3 nowhere; 4 in its queue alone.

    So the kernel sees it. In which threads, tests/test_trace.py asks.
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
            assert turns == sorted(turns)
        sock.close()
    assert sorted(turns) == [b":1\r\n", b":2\r\n", b":3\r\n"]


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
