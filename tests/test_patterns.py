"""What each pattern is, and how it shows from outside."""

import difflib
import re
import select
import signal
import socket
import threading
import time
from collections import defaultdict

import pytest
from conftest import (
    FREE, MANY, PATIENCE, PROC, SCRIPTS, array, arrived, bytes_in, frozen,
    is_readable, load, many, needs, needs_proc, ping, read_exactly,
    read_to_end, run, talk, text_of, together, wait_for,
)  # fmt: skip

NAMES = {
    "single": "single-threaded blocking",
    "multi": "multi-threaded blocking",
    "busy": "non-blocking busy wait",
    "kqueue": "event loop on kqueue",
}
if not hasattr(select, "kqueue"):
    NAMES["kqueue"] += ", which epoll stands in for"
CLASSES = dict.fromkeys(NAMES, "IncomingTCPConnection")
CLASSES.update({"busy": "Client", "kqueue": "EventLoop Client"})
# Lines of a file at most, and of what is the pattern's in it.
LENGTHS = dict(zip(NAMES, [(345, 90), (360, 105), (365, 115), (450, 205)]))


def clients(server, count):
    """Connect, and be served as far as the pattern serves."""
    socks = [server.connect() for _ in range(count)]
    for sock in socks if server.name in MANY else socks[:1]:
        ping(sock)
    return socks


def test_length(name):
    """A file is short, and so is what is the pattern's in it."""
    whole, pattern = LENGTHS[name]
    lines = text_of(name).splitlines()
    first = [line.startswith("class ") for line in lines].index(True)
    mark = [line.startswith("# ---- The app") for line in lines].index(True)
    assert len(lines) <= whole and mark - first <= pattern
    classes = re.findall("^class (\\w+)", "\n".join(lines[:mark]), re.M)
    assert classes == ["TCPServer", *CLASSES[name].split()]
    assert max(map(len, lines)) <= 79
    assert f"python3 {SCRIPTS[name]}" in text_of(name).split('"""')[1]
    code, _, rest = "\n".join(lines[first:]).partition("# ---- kqueue on ")
    assert "epoll" not in code.partition("# ---- The app")[0]
    assert ("epoll" in rest) == (name == "kqueue")


def test_diff_of_two_neighbours():
    """What differs between 1 and 2 is at most 28 lines."""
    texts = [text_of(n).split('"""', 2)[2] for n in ("single", "multi")]
    one, two = map(str.splitlines, texts)
    matcher = difflib.SequenceMatcher(None, one, two, autojunk=False)
    same = sum(block.size for block in matcher.get_matching_blocks())
    assert 0 < len(one) + len(two) - 2 * same <= 28


def test_client_is_the_same():
    """Client is the same text in 3 and 4."""
    texts = [text_of(name) for name in ("busy", "kqueue")]
    parts = (text.partition("\n\n\nclass Client:")[2] for text in texts)
    (client,) = {part.partition("\n\n\n")[0] for part in parts}
    assert "def step(" in client


def test_figures(server):
    """The first line and INFO name the pattern; INFO has its own tally."""
    assert server.stdout() == (
        f"{NAMES[server.name]}: listening on 127.0.0.1:{server.port}\n"
    )
    socks = clients(server, 5)
    info = server.info(socks[0])
    assert info["pattern"] == NAMES[server.name]
    assert int(info["process_id"]) == server.pid
    connected = 5 if server.name in MANY else 1
    assert int(info["connected_clients"]) == connected
    assert info["role"] == "master" and float(info["used_cpu_user"]) > 0
    own = {"busy": "polls polls_empty_handed", "kqueue": "wakeups events"}
    for field in own.get(server.name, "").split():
        assert int(info[field]) >= 5
    assert server.name != "multi" or info["threads_started"] == "5"
    server.stop().check()
    lines = server.stdout().splitlines()[1:]
    assert [line.split(":")[0] for line in lines] == list(info)


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
        # Signals are for the main thread; all others refuse them.
        main = server.proc(f"task/{server.pid}")
        for task in {*main.parent.iterdir()} - {main}:
            masks = re.findall("SigBlk:(.*)", (task / "status").read_text())
            assert int(masks[0], 16) >> (signal.SIGTERM - 1) & 1
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
    assert 100 < more["polls_empty_handed"] < more["polls"]
    assert more["polls"] - more["polls_empty_handed"] < 10
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
        shell = f'exec strace -f -s 99 -o "{tmp_path}/{name}" "$0" "$@"'
        server = start(name, shell=shell)
        server.pid = int(server.info()["process_id"])
        socks = clients(server, 1 if name == "single" else 2)
        time.sleep(0.8)  # silence
        for sock in socks * 3:
            ping(sock)
        server.stop()
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
            assert send <= recv and len(recv) >= 3
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


def test_silent_clients_cost_nothing():
    """4 goes through all its clients now and then, not at each event."""
    module, looks = load("kqueue"), []

    class Clients(dict):
        def values(self):
            return looks.append(len(self)) or super().values()

    server = module.TCPServer(("127.0.0.1", 0), module.Conversation, 300)
    server.loop.clients = Clients()
    threading.Thread(target=server.loop.run, daemon=True).start()
    with socket.create_connection(server.listener.getsockname()) as sock:
        for _ in range(2000):
            ping(sock)
        assert 0 < len(looks) < 100


def test_second_client(server):
    """Half a request keeps all others waiting in 1; else they are served."""
    request = array(b"ECHO", b"hello")
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
    talk(first, request[20:], b"$5\r\nhello\r\n")
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
def test_handlers_that_block_one_after_the_other(server):
    """Ten pipelined sleeps hold the others for one at a time."""
    sleeper, other = clients(server, 2)
    sleeper.sendall(b"DEBUG SLEEP 0.05\r\n" * 10 + b"PING\r\n")
    assert read_exactly(sleeper, 5) == b"+OK\r\n"
    served = 0
    while bytes_in(sleeper) < 40:  # eight of the nine others
        ping(other)
        served += 1
    assert served >= 4
    assert read_exactly(sleeper, 52) == b"+OK\r\n" * 9 + b"+PONG\r\n"


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
        sock.sendall(b"INCR a\r\n" * each)
        sock.shutdown(socket.SHUT_WR)
    for sock in socks:
        mine = [int(line[1:]) for line in read_to_end(sock).splitlines()]
        assert mine == sorted(mine) and len(mine) == each
        numbers += mine
    assert sorted(numbers) == list(range(1, 20 * each + 1))
    # Nor is a SET undone by an INCR that began before it.
    if name in MANY:
        server.connect().sendall(b"INCR a\r\n" * 50_000)
    steps = range(1, 5001)
    sets = (b"SET a %d\r\nINCR a\r\n" % (step * 10**6) for step in steps)
    found = server.ask(b"".join(sets)).split()[1::2]
    assert [int(reply[1:]) // 10**6 for reply in found] == list(steps)
    server.stop().check()
