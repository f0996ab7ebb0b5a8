"""What each pattern is, and how it shows from outside.

| server | threads              | sockets    | waits in            | idle CPU |
|--------|----------------------|------------|---------------------|----------|
| single | 1                    | blocking   | accept, recv, send  | 0        |
| multi  | 1 + 1 per connection | blocking   | the same, by thread | 0        |
| busy   | 1                    | O_NONBLOCK | nothing             | a core   |
| kqueue | 2                    | O_NONBLOCK | kqueue (epoll)      | 0        |
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections import defaultdict

import pytest
from conftest import (
    MANY,
    PATIENCE,
    PROC,
    SCRIPTS,
    array,
    is_over,
    is_readable,
    many,
    needs_proc,
    ping,
    read_exactly,
    talk,
    wait_for,
)

O_NONBLOCK = 0o4000  # as /proc shows it
NAMES = {
    "single": "single-threaded blocking",
    "multi": "multi-threaded blocking",
    "busy": "non-blocking busy wait",
    "kqueue": "event loop on kqueue",
}


def clients(server, count):
    """Connect, and be served as far as the pattern serves."""
    socks = [server.connect() for _ in range(count)]
    for sock in socks if server.name in MANY else socks[:1]:
        ping(sock)
    return socks


# ---- Threads and descriptors ------------------------------------------------


def test_pattern_has_a_name(server):
    """The first line on stdout, INFO and the tally name the pattern."""
    assert server.stdout().startswith(f"{NAMES[server.name]}: listening on ")
    assert server.stdout().count("\n") == 1
    assert server.info()["pattern"] == NAMES[server.name]


def test_threads(server):
    """1; 1 and one for each connection, gone when it closes; 1; 2."""
    expected = {
        "single": (1, 1),
        "multi": (1, 9),
        "busy": (1, 1),
        "kqueue": (2, 2),
    }
    alone, with_eight = expected[server.name]
    if PROC:  # else INFO is asked, by one client more
        wait_for(lambda: server.threads() == alone, "threads at the start")
    socks = clients(server, 8)
    assert int(server.info(socks[0])["threads"]) == with_eight
    if PROC:
        assert server.threads() == with_eight
    if server.name == "multi":
        for sock in socks[4:]:
            sock.close()
        wait_for(
            lambda: int(server.info(socks[0])["threads"]) == 5,
            "four threads end with their connections",
        )
    for sock in socks:
        sock.close()
    if PROC:
        wait_for(lambda: server.threads() == alone, "threads at the end")


def socket_flags(server):
    """Return the flags of all descriptors that are sockets."""
    flags = {}
    for link in server.proc("fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(link).startswith("socket:"):
                text = server.proc(f"fdinfo/{link.name}").read_text()
                octal = re.search(r"flags:\s*([0-7]+)", text)[1]
                flags[int(link.name)] = int(octal, 8)
    return flags


@needs_proc
def test_nonblocking_sockets(server):
    """No socket is O_NONBLOCK in 1 and 2, and every socket is in 3 and 4."""
    clients(server, 5)
    flags = socket_flags(server)
    at_least = 6 if server.name in MANY else 2  # the listener, and clients
    assert len(flags) >= at_least
    nonblocking = {bool(flag & O_NONBLOCK) for flag in flags.values()}
    assert nonblocking == {server.name in ("busy", "kqueue")}, flags


# ---- What waiting costs -----------------------------------------------------


def test_idle_cpu(start):
    """With 8 silent clients, 3 uses a core, and the others use nothing."""
    servers = [start(name) for name in SCRIPTS]
    first = {server: clients(server, 8)[0] for server in servers}
    before = {server: server.cpu(first[server]) for server in servers}
    time.sleep(1)
    used = {
        server.name: server.cpu(first[server]) - before[server]
        for server in servers
    }
    busy = used.pop("busy")
    assert max(used.values()) < 0.1, used
    # Others may want the core as well, so "most of it" is not asked for.
    assert busy > 0.2 and busy > 10 * max(used.values()), (busy, used)


def test_idle_loop_sleeps(server):
    """The tally shows it: 3 asks in vain over and over, 4 is not woken."""
    if server.name not in ("busy", "kqueue"):
        pytest.skip("keeps no such tally")
    (sock,) = clients(server, 1)
    before = server.info(sock)
    time.sleep(0.3)
    after = server.info(sock)
    more = {
        field: int(after[field]) - int(before[field])
        for field in ("polls", "polls_empty_handed", "wakeups", "events")
        if field in before
    }
    if server.name == "busy":
        assert more["polls_empty_handed"] > 100
        assert 0 < more["polls"] - more["polls_empty_handed"] < 10
    else:
        assert more == {"wakeups": 1, "events": 1}  # for the second INFO


# ---- Who is kept waiting ----------------------------------------------------


def test_second_client(server):
    """A second client waits for the first one's end in 1; else is served."""
    first = server.connect()
    ping(first)
    second = server.connect()
    second.sendall(b"PING\r\n")
    if server.name == "single":
        for _ in range(20):
            ping(first)
        assert not is_readable(second, 0.1)
        first.close()
    assert read_exactly(second, 7) == b"+PONG\r\n"
    second.close()


def test_clients_in_turn(server):
    """Those who wait are served in the order in which they came."""
    if server.name != "single":
        pytest.skip("nobody waits")
    socks = [server.connect() for _ in range(5)]
    for sock in reversed(socks):
        sock.sendall(b"INCR turn\r\n")
    for turn, sock in enumerate(socks, 1):
        reply = b":%d\r\n" % turn
        assert read_exactly(sock, len(reply)) == reply
        assert not any(map(is_readable, socks[turn:]))
        sock.close()


def test_half_a_request(server):
    """Half a request keeps all others waiting in 1, and nobody else's."""
    request = array(b"ECHO", b"hello")
    slow = server.connect()
    ping(slow)
    slow.sendall(request[:20])
    other = server.connect()
    other.sendall(b"PING\r\n")
    if server.name == "single":
        assert not is_readable(other, 0.1)
    else:
        assert read_exactly(other, 7) == b"+PONG\r\n"
    talk(slow, request[20:], b"$5\r\nhello\r\n")
    slow.close()
    if server.name == "single":
        assert read_exactly(other, 7) == b"+PONG\r\n"


def test_handler_that_blocks(server):
    """While one client's handler sleeps, only 2 serves the others."""
    sleeper = server.connect()
    ping(sleeper)
    other = server.connect()
    if server.name == "single":
        sleeper.sendall(b"DEBUG SLEEP 0.3\r\nPING\r\n")
        other.sendall(b"PING\r\n")
        assert read_exactly(sleeper, 12) == b"+OK\r\n+PONG\r\n"
        assert not is_readable(other)
        return
    ping(other)
    # The other one asks without a pause. So one of its requests comes while
    # the handler sleeps, and in 3 and 4 it takes as long as that.
    sleeper.sendall(b"DEBUG SLEEP 1\r\n")
    count = longest = 0
    while not is_readable(sleeper):
        started = time.monotonic()
        ping(other)
        longest = max(longest, time.monotonic() - started)
        count += 1
    assert read_exactly(sleeper, 5) == b"+OK\r\n"
    if server.name == "multi":
        assert count >= 10
        assert longest < 0.8 or count > 100
    else:
        assert longest > 0.5


@many
def test_big_reply_does_not_keep_others_waiting(server):
    """Who takes in his big replies slowly does not hold up the others."""
    value = b"v" * 500_000
    slow = server.connect(receive_buffer=4096)
    talk(slow, array(b"SET", b"a", value), b"+OK\r\n")
    slow.sendall(array(b"GET", b"a") * 50)
    other = server.connect()
    for _ in range(100):
        ping(other)
    reply = b"$%d\r\n%b\r\n" % (len(value), value)
    for _ in range(3):
        assert read_exactly(slow, len(reply)) == reply
        ping(other)


# ---- Where each waits, as strace sees it ------------------------------------

WAITS = {"poll", "ppoll", "select", "pselect6", "epoll_wait", "epoll_pwait"}
WAITS |= {"epoll_pwait2", "nanosleep", "clock_nanosleep", "sched_yield"}
WAITS |= {"pause", "rt_sigtimedwait", "io_uring_enter"}
NETWORK = {"accept", "accept4", "recvfrom", "recvmsg", "read"}
NETWORK |= {"sendto", "sendmsg", "write"}


class Trace:
    """System calls of a server, from the moment on when strace is there."""

    def __init__(self, server, folder):
        if not shutil.which("strace"):
            pytest.skip("strace is not installed")
        self.path, errors = folder / "calls", folder / "errors"
        line = ["strace", "-f", "-o", self.path, "-p", str(server.pid)]
        with open(errors, "w") as file:
            self.process = subprocess.Popen(line, stderr=file)

        def attached():
            text = errors.read_text()
            if self.process.poll() is not None:
                pytest.skip(f"strace may not trace here: {text.strip()}")
            return re.search(r"attached( with \d+ threads)?$", text, re.M)

        wait_for(attached, "strace has attached")

    def stop(self):
        """Return a list of (thread, call, the rest of the line)."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(PATIENCE)
        calls = []
        for line in self.path.read_text(errors="replace").splitlines():
            thread, _, rest = line.partition(" ")
            found = re.match(
                r"(?:<\.\.\. )?(\w+)(?:\(| resumed)(.*)", rest.strip()
            )
            if found:
                calls.append((int(thread), found[1], found[2]))
        return calls


@needs_proc
def test_where_it_waits(server, tmp_path):
    """Each pattern waits in its own calls, and in its own threads."""
    name = server.name
    socks = clients(server, 1 if name == "single" else 2)
    trace = Trace(server, tmp_path)
    try:
        time.sleep(0.8)  # silence
        for sock in socks * 3:
            ping(sock)
        if name == "single":
            socks.pop().close()
        else:
            socks.append(server.connect())
        ping(server.connect())
    finally:
        calls = trace.stop()

    threads = defaultdict(set)  # call: the threads that make it
    for thread, call, _ in calls:
        threads[call].add(thread)
    accept = threads["accept"] | threads["accept4"]
    recv, send = threads["recvfrom"], threads["sendto"]
    waits = {call: threads[call] for call in WAITS if threads[call]}
    in_vain = [c for c in calls if c[1] in NETWORK and "EAGAIN" in c[2]]
    main = {server.pid}
    assert accept and recv and send, threads.keys()
    if name in ("single", "multi"):  # accept gives up twice a second
        late = [call for call in in_vain if call[1].startswith("accept")]
        in_vain = [call for call in in_vain if call not in late]
        assert len(late) < 20, "accept does not wait"
    if name == "single":
        assert (accept, recv, send) == (main, main, main)
        assert not waits and not in_vain
    elif name == "multi":
        assert accept == main
        assert len(recv) >= 3 and not recv & main
        assert send <= recv and len(send) >= 3
        assert not waits and not in_vain
    elif name == "busy":
        assert (accept, recv, send) == (main, main, main)
        assert not waits
        assert len(in_vain) > 100
        assert {c[1] for c in in_vain} >= {"recvfrom"}
        assert {c[1] for c in in_vain} & {"accept", "accept4"}
    else:
        (loop,) = threads["epoll_wait"] | threads["epoll_pwait"]
        assert loop != server.pid
        assert set(waits) <= {"epoll_wait", "epoll_pwait"}
        assert (accept, recv, send) == ({loop}, {loop}, {loop})
        assert len(in_vain) < 10


@needs_proc
@pytest.mark.parametrize("name", ["kqueue"], indirect=True)
def test_loop_reads_from_all_before_it_answers(server, tmp_path):
    """Of clients that are ready at once, all are read from, then answered."""
    sleeper, *others = clients(server, 6)
    trace = Trace(server, tmp_path)
    try:
        for _ in range(5):  # one of these will do, on a slow machine
            sleeper.sendall(b"DEBUG SLEEP 0.1\r\n")
            for sock in others:
                sock.sendall(b"PING\r\n")
            assert read_exactly(sleeper, 5) == b"+OK\r\n"
            for sock in others:
                assert read_exactly(sock, 7) == b"+PONG\r\n"
    finally:
        calls = trace.stop()
    order = [call for _, call, _ in calls if call in ("recvfrom", "sendto")]
    both = ["recvfrom"] * 5 + ["sendto"] * 5
    assert any(order[at : at + 10] == both for at in range(len(order))), order


@many
def test_closing_one_ends_no_other(server):
    """When a client leaves, the others' connections stay as they are."""
    socks = clients(server, 10)
    for sock in socks[::2]:
        sock.close()
    for sock in socks[1::2]:
        ping(sock)
        assert not is_over(sock)
