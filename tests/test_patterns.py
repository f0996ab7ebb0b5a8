"""What each pattern is, and how it shows from outside."""

import contextlib
import re
import select
import socket
import threading
import time
from collections import defaultdict

import pytest
from conftest import (
    FREE, MANY, PATIENCE, PROC, SCRIPTS, arrived, bulk, frozen,
    is_readable, load, many, needs, needs_proc, ping, read_exactly,
    read_to_end, run, talk, text_of, together, wait_for,
)  # fmt: skip

CONNECTION = "IncomingTCPConnection"
BLOCKING = "accept receive sendall"
QUEUE = "kqueue" if hasattr(select, "kqueue") else "epoll in place of kqueue"
LOOP = f"event loop on {QUEUE}"
FACTS = {  # what it calls itself, its classes, calls that sleep, its tally
    "single": ("single blocking", CONNECTION, BLOCKING, "clients_served"),
    "multi": ("multi blocking", CONNECTION, BLOCKING, "threads_started"),
    "busy": ("busy wait", "Client", "", "polls polls_in_vain"),
    "kqueue": (LOOP, "EventLoop Client", "control", "wakeups events"),
}


def clients(server, count):
    """Connect, and be served as far as the pattern serves."""
    socks = [server.connect() for _ in range(count)]
    for sock in socks if server.name in MANY else socks[:1]:
        ping(sock)
    return socks


def test_what_it_says_and_what_it_is(server):
    """The article's names; INFO and Ctrl-C; threads and sockets.

    Threads: 1; 1 and one for each connection; 1; 2. O_NONBLOCK in 3 and 4.
    """
    name = server.name
    pattern, classes, sleeping, tally = FACTS[name]
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
    alone = 2 if name == "kqueue" else 1
    threads = alone + (8 if name == "multi" else 0)
    before = server.held_at_rest()
    socks = clients(server, 8)
    assert int(server.info(socks[0])["threads"]) == threads
    if PROC:
        assert before[0] == alone and server.held()[0] == threads
        expected = [name in ("busy", "kqueue")] * (9 if name in MANY else 2)
        assert server.nonblocking() == expected
    for sock in socks:
        sock.close()
    wait_for(lambda: server.held() == before, "all is as it was")
    assert list(server.stop().tally()) == list(info)


def test_what_waiting_costs(start):
    """With 8 silent clients, 3 uses a core, the others nothing."""
    servers = together(start, *SCRIPTS)
    first = [clients(server, 8)[0] for server in servers]

    def figures():
        return [server.info(sock) for server, sock in zip(servers, first)]

    before = figures()
    time.sleep(1)
    more, used = defaultdict(dict), {}
    for name, old, new in zip(SCRIPTS, before, figures()):
        for field in new.keys() - {"pattern", "role"}:
            more[name][field] = float(new[field]) - float(old[field])
        cpu = more[name]["used_cpu_user"], more[name]["used_cpu_sys"]
        used[name] = sum(cpu)
        assert more[name]["voluntary_context_switches"] or name == "busy"
    busy, loop, core = more["busy"], more["kqueue"], used.pop("busy")
    assert max(used.values()) < 0.1, used
    # Others may want the core as well, so "most of it" is not asked for.
    assert 0.2 < core < 60 and core > 10 * max(used.values()), (core, used)
    assert min(busy["used_cpu_user"], busy["used_cpu_sys"]) > 0.01
    assert busy["involuntary_context_switches"] >= 0
    # Nearly all of its polls were in vain; 4 was woken for the second INFO.
    assert busy["polls_in_vain"] > 100
    assert 0 < busy["polls"] - busy["polls_in_vain"] < 10
    assert loop["wakeups"] == loop["events"] == 1


WAITS = {"poll", "ppoll", "select", "pselect6", "epoll_wait", "epoll_pwait"}
WAITS |= {"epoll_pwait2", "nanosleep", "clock_nanosleep"}
WAITS |= set() if FREE else {"sched_yield"}  # there, it is in Python's locks


@needs_proc
def test_where_each_waits(start, tmp_path):
    """Each pattern waits in its own calls, and in its own threads."""
    needs("strace")
    if run("strace", "true")[0]:
        pytest.skip("strace may not trace here")

    def traced(name):
        """Return the server, and its calls as (thread, call, the rest)."""
        # -D: strace stands beside the server, whose process remains ours.
        shell = f'exec strace -D -f -s 99 -o "{tmp_path}/{name}" "$0" "$@"'
        server = start(name, shell=shell)
        socks = clients(server, 1 if name == "single" else 2)
        time.sleep(0.8)  # silence
        for sock in socks * 3:
            ping(sock)
        server.kill()
        pattern = r"^(\d+) +(?:<\.\.\. )?(\w+)(?:\(| resumed)(.*)"
        text = (tmp_path / name).read_text(errors="replace")
        found = re.findall(pattern, text.partition("listening on")[2], re.M)
        return server, [(int(thread), *rest) for thread, *rest in found]

    for server, calls in together(traced, *SCRIPTS):
        name, threads = server.name, defaultdict(set)
        for thread, call, _ in calls:
            threads[call].add(thread)
        accept = threads["accept"] | threads["accept4"]
        recv, send = threads["recvfrom"], threads["sendto"]
        waits = {call: threads[call] for call in WAITS & threads.keys()}
        vain = [c[1] for c in calls if "EAGAIN" in c[2] and c[1] != "futex"]
        main = {server.pid}
        if name == "multi":
            assert accept == main and not main & recv
            assert send and send <= recv and len(recv) == 2
        elif name == "kqueue":
            assert accept == recv == send != main and len(accept) == 1
            assert waits and waits.keys() <= {"epoll_wait", "epoll_pwait"}
            assert all(waiting == accept for waiting in waits.values())
            assert len(vain) < 10
        else:
            assert accept == recv == send == main
        if name == "busy":
            assert not waits and len(vain) > 100 and "recvfrom" in vain
            assert "accept" in vain or "accept4" in vain
        elif name != "kqueue":
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


@many
def test_handler_that_blocks(server):
    """A handler that sleeps holds the others, but not in 2."""
    sleeper, other = clients(server, 2)
    # The other one asks without a pause. So one of its requests comes while
    # the handler sleeps, and in 3 and 4 it takes as long as that.
    sleeper.sendall(b"DEBUG SLEEP 0.6\r\n")
    times = [time.monotonic()]
    while not is_readable(sleeper):
        ping(other)
        times.append(time.monotonic())
    longest = max(b - a for a, b in zip(times, times[1:]))
    if server.name == "multi":
        assert len(times) > 10 and (longest < 0.4 or len(times) > 100)
    else:
        assert longest > 0.3


@many
@needs_proc
def test_answered_at_once(server):
    """What is carried out is answered before another's handler blocks."""
    socks = clients(server, 5)
    for sleeper in socks * 2:  # who comes first in 3 is a matter of chance
        pingers = [sock for sock in socks if sock is not sleeper]
        with frozen(server):  # all requests are there at once
            for sock in [*pingers, sleeper]:
                slow = sock is sleeper
                sock.sendall(b"DEBUG SLEEP 0.2\r\n" if slow else b"PING\r\n")
                arrived(sock)
        assert select.select(pingers, [], [], PATIENCE)[0]
        at_once = not is_readable(sleeper, 0.05)
        assert read_exactly(sleeper, 5) == b"+OK\r\n"
        for sock in pingers:
            assert read_exactly(sock, 7) == b"+PONG\r\n"
        if at_once:
            return
    pytest.fail("replies have waited for another's handler each time")


def test_incr_loses_nothing(name, start):
    """INCR from 20 connections at once counts every one."""
    # Threads take turns as often as Python lets them.
    prelude = "import sys; sys.setswitchinterval(1e-6)\n"
    server = start(name, prelude=prelude if name == "multi" else "")
    numbers = []
    socks = [server.connect() for _ in range(20)]
    for sock in socks:
        sock.sendall(b"INCR a\r\n" * 300)
        sock.shutdown(socket.SHUT_WR)
    for sock in socks:
        mine = [int(line[1:]) for line in read_to_end(sock).splitlines()]
        assert mine == sorted(mine) and len(mine) == 300
        numbers += mine
    assert sorted(numbers) == list(range(1, 20 * 300 + 1))
    # Nor is a SET undone by an INCR that began before it.
    if name not in MANY:
        return
    setter, other = server.connect(), server.connect()
    talk(setter, b"SET a 1000000000\r\n", b"+OK\r\n")
    other.sendall(b"INCR a\r\n" * 200)

    def increment():
        with contextlib.suppress(OSError):  # until the server ends
            while read_exactly(other, 200 * 13):  # numbers of ten digits
                other.sendall(b"INCR a\r\n" * 200)

    threading.Thread(target=increment, daemon=True).start()
    for step in range(1001, 4001):
        setter.sendall(b"SET a %d000000\r\nINCR a\r\n" % step)
        assert read_exactly(setter, 18).startswith(b"+OK\r\n:%d" % step)
