"""What each pattern is, and how it shows from outside."""

import re
import select
import socket
import threading
import time
from collections import defaultdict

import pytest
from conftest import (
    FREE, MANY, PATIENCE, PROC, SCRIPTS, array, arrived, bulk, frozen,
    is_readable, load, many, needs, needs_proc, ping, read_exactly,
    read_to_end, run, talk, text_of, together, wait_for,
)  # fmt: skip

NAMES = {
    "single": "single blocking",
    "multi": "multi blocking",
    "busy": "busy wait",
    "kqueue": "event loop on kqueue",
}
if not hasattr(select, "kqueue"):
    NAMES["kqueue"] = "event loop on epoll in place of kqueue"
CLASSES = dict.fromkeys(NAMES, "IncomingTCPConnection")
CLASSES.update({"busy": "Client", "kqueue": "EventLoop Client"})
TALLY = {
    "single": ["clients_served"],
    "multi": ["threads_started"],
    "busy": ["polls", "polls_in_vain"],
    "kqueue": ["wakeups", "events"],
}


def clients(server, count):
    """Connect, and be served as far as the pattern serves."""
    socks = [server.connect() for _ in range(count)]
    for sock in socks if server.name in MANY else socks[:1]:
        ping(sock)
    return socks


def test_names(name):
    """The classes have the article's names; calls that sleep say so."""
    module = load(name)
    for word in ["TCPServer", *CLASSES[name].split()]:
        assert isinstance(getattr(module, word), type)
    sleeping = re.findall(r"(\w+)\(.*# sleeps", text_of(name))
    blocking = ["accept", "receive", "sendall"]
    expected = {"busy": [], "kqueue": ["control"]}.get(name, blocking)
    assert sleeping == expected


def test_figures(server):
    """INFO and Ctrl-C say what it is, and what serving has cost so far."""
    for _ in range(4):
        server.ping()
    with server.connect() as sock:
        info = server.info(sock)
    assert info["pattern"] == NAMES[server.name]
    assert server.stdout().startswith(f"{NAMES[server.name]}: listening on ")
    for field in ["threads", *TALLY[server.name]]:
        assert int(info[field]) >= (1 if field == "threads" else 4), field
    if server.name in ("single", "multi"):  # 2 counts once it has started
        assert int(info[TALLY[server.name][0]]) <= 5
    for field in "used_cpu_user", "used_cpu_sys":
        assert 0 <= float(info[field]) < 60
    assert float(info["used_cpu_user"]) > 0
    for field in "voluntary", "involuntary":
        assert int(info[f"{field}_context_switches"]) >= 0
    assert list(server.stop().tally()) == list(info)


def test_threads_and_sockets(server):
    """1; 1 and one for each connection; 1; 2. O_NONBLOCK in 3 and 4 only."""
    alone = 2 if server.name == "kqueue" else 1
    each = 1 if server.name == "multi" else 0
    before = server.held_at_rest()
    socks = clients(server, 8)
    assert int(server.info(socks[0])["threads"]) == alone + 8 * each
    if PROC:
        assert before[0] == alone and server.held()[0] == alone + 8 * each
        sockets = 9 if server.name in MANY else 2
        expected = [server.name in ("busy", "kqueue")] * sockets
        assert server.nonblocking() == expected
    for sock in socks:
        sock.close()
    wait_for(lambda: server.held() == before, "all is as it was")


def test_what_waiting_costs(start):
    """With 8 silent clients, 3 uses a core, the others nothing."""
    servers = together(start, *SCRIPTS)
    first = [clients(server, 8)[0] for server in servers]

    def figures():
        return [server.info(sock) for server, sock in zip(servers, first)]

    before = figures()
    time.sleep(1)
    used, more = {}, {}
    for server, old, new in zip(servers, before, figures()):
        for field in new.keys() - {"pattern", "role"}:
            more[field] = float(new[field]) - float(old[field])
        used[server.name] = more["used_cpu_user"] + more["used_cpu_sys"]
        if server.name == "busy":
            assert min(more["used_cpu_user"], more["used_cpu_sys"]) > 0.01
        assert more["voluntary_context_switches"] or server.name == "busy"
    busy = used.pop("busy")
    assert max(used.values()) < 0.1, used
    # Others may want the core as well, so "most of it" is not asked for.
    assert busy > 0.2 and busy > 10 * max(used.values()), (busy, used)
    # Nearly all of its polls were in vain; 4 was woken for the second INFO.
    assert 100 < more["polls_in_vain"] < more["polls"]
    assert more["polls"] - more["polls_in_vain"] < 10
    assert more["wakeups"] == more["events"] == 1


WAITS = {"poll", "ppoll", "select", "pselect6", "epoll_wait", "epoll_pwait"}
WAITS |= {"epoll_pwait2", "nanosleep", "clock_nanosleep"}
WAITS |= set() if FREE else {"sched_yield"}  # there, it is in Python's locks
NETWORK = {"accept", "accept4", "recvfrom", "sendto", "read", "write"}


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
        threads = defaultdict(set)  # call: the threads that make it
        for thread, call, _ in calls:
            threads[call].add(thread)
        accept = threads["accept"] | threads["accept4"]
        recv, send = threads["recvfrom"], threads["sendto"]
        waits = {call: threads[call] for call in WAITS if threads[call]}
        vain = [c[1] for c in calls if c[1] in NETWORK and "EAGAIN" in c[2]]
        main = {server.pid}
        assert accept and recv and send, threads.keys()
        if server.name == "multi":
            assert accept == main and not main & recv
            assert send <= recv and len(recv) == 2
        elif server.name == "kqueue":
            (loop,) = accept
            assert accept == recv == send != main
            assert set(waits) <= {"epoll_wait", "epoll_pwait"}
            assert set(map(frozenset, waits.values())) == {frozenset([loop])}
            assert len(vain) < 10
        else:
            assert accept == recv == send == main
        if server.name == "busy":
            assert not waits and len(vain) > 100 and "recvfrom" in vain
            assert "accept" in vain or "accept4" in vain
        elif server.name != "kqueue":
            assert not waits and not vain


def test_second_client(server):
    """Half a request keeps all others waiting in 1; else they are served."""
    request = array(b"PING", b"hello")
    first = server.connect()
    ping(first)
    first.sendall(request[:20])
    others = [server.connect() for _ in range(3)]
    for sock in reversed(others):
        sock.sendall(b"INCR turn\r\n")
    if server.name != "single":
        turns = [read_exactly(sock, 4) for sock in others]
        assert sorted(turns) == [b":1\r\n", b":2\r\n", b":3\r\n"]
        return
    assert not is_readable(others[0], 0.1)
    talk(first, request[20:], bulk(b"hello"))
    first.close()
    for turn, sock in enumerate(others, 1):  # in the order they came
        assert read_exactly(sock, 4) == b":%d\r\n" % turn
        assert not any(map(is_readable, others[turn:]))
        sock.close()


def test_handler_that_blocks(server):
    """A handler that sleeps holds the others, but not in 2."""
    sleeper, other = server.connect(), server.connect()
    ping(sleeper)
    if server.name == "single":
        sleeper.sendall(b"DEBUG SLEEP 0.2\r\nPING\r\n")
        other.sendall(b"PING\r\n")
        assert read_exactly(sleeper, 12) == b"+OK\r\n+PONG\r\n"
        assert not is_readable(other)
        return
    ping(other)
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
    for _ in range(10):  # who comes first in 3 is a matter of chance
        sleeper, *pingers = socks
        with frozen(server):  # all requests are there at once
            for sock in pingers:
                sock.sendall(b"PING\r\n")
                arrived(sock)
            sleeper.sendall(b"DEBUG SLEEP 0.2\r\n")
            arrived(sleeper)
        assert select.select(pingers, [], [], PATIENCE)[0]
        at_once = not is_readable(sleeper, 0.05)
        assert read_exactly(sleeper, 5) == b"+OK\r\n"
        for sock in pingers:
            assert read_exactly(sock, 7) == b"+PONG\r\n"
        if at_once:
            return
        socks.append(socks.pop(0))
    pytest.fail("replies have waited for another's handler each time")


def test_incr_loses_nothing(name, start):
    """INCR from 20 connections at once counts every one."""
    # Threads take turns as often as Python lets them.
    prelude = "import sys; sys.setswitchinterval(1e-6)\n"
    server = start(name, prelude=prelude if name == "multi" else "")
    each, numbers = 300, []
    socks = [server.connect() for _ in range(20)]
    for sock in socks:
        sock.sendall(b"INCR a\r\n" * each)  # 2,400 bytes
        sock.shutdown(socket.SHUT_WR)
    for sock in socks:
        mine = [int(line[1:]) for line in read_to_end(sock).splitlines()]
        assert mine == sorted(mine) and len(mine) == each
        numbers += mine
    assert sorted(numbers) == list(range(1, 20 * each + 1))
    # Nor is a SET undone by an INCR that began before it.
    if name not in MANY:
        return
    over = threading.Event()

    def increment():
        with server.connect() as sock:
            while not over.is_set():
                sock.sendall(b"INCR a\r\n" * 200)
                lines = 0
                while lines < 200:
                    lines += sock.recv(1 << 16).count(b"\n")

    thread = threading.Thread(target=increment)
    thread.start()
    with server.connect() as sock:
        for step in range(1, 3001):
            sock.sendall(b"SET a %d\r\nINCR a\r\n" % (step * 10**6))
            reply = b""
            while reply.count(b"\n") < 2:
                reply += sock.recv(100)
            found = int(reply.split()[1][1:]) // 10**6
            if found != step:
                break
    over.set()
    thread.join()
    assert found == step
