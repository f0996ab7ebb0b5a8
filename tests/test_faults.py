"""What holds under faults: of the network, the system, and the clients."""

import contextlib
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import (
    FREE, MANY, PATIENCE, PROC, SCRIPTS, Server, array, arrived, bulk, command,
    frozen, is_over, is_readable, needs_proc, ping, read_exactly, read_to_end,
    reset, run, send_what_fits, slow, talk, together, wait_for,
)  # fmt: skip

MIB = 1024 * 1024
PYPY = sys.implementation.name == "pypy"
SOME = (300 if PYPY else 10) * MIB  # to grow by, where it could be 5 GB
BIG = b"v" * 900_000
SET_BIG = array(b"SET", b"big", BIG)

needs_prlimit = pytest.mark.skipif(
    not (PROC and hasattr(resource, "prlimit")),
    reason="changes the limits of a running process, with Linux's prlimit",
)


@contextlib.contextmanager
def nothing_left_behind(server):
    """Whatever clients do in here, nobody else notices, and nothing stays."""
    before = server.held_at_rest()
    bystander = server.connect() if server.name in MANY else None
    if bystander:
        talk(bystander, b"*2\r\n$4\r\nPI", b"")  # its request is half there
    yield
    if bystander:
        talk(bystander, b"NG\r\n$1\r\na\r\n", bulk(b"a"))
        bystander.close()
    server.ping()
    wait_for(lambda: server.held() == before, f"{before} held again")
    assert server.stderr() == ""


# ---- Clients that break off -------------------------------------------------

HALVES = [
    b"",
    b"PIN",
    b"*2\r\n$4\r\nPING\r\n$100\r\nabc",
    b"PING\r\n*2\r\n$4\r\nPING\r\n",
    b"\0\xff*\r\n$\r\n\r\n*-\r\n",
    b"*x\r\n",
]


def test_connections_that_break(server):
    """Closed, reset or half closed at any point: only that one ends."""
    with nothing_left_behind(server):
        for sent in HALVES:
            for how in ("close", "reset", "half", "half and reset"):
                sock = server.connect()
                sock.sendall(sent)
                if how.startswith("half"):
                    sock.shutdown(socket.SHUT_WR)
                if how == "half":
                    with contextlib.suppress(ConnectionError):
                        read_to_end(sock)
                if how.endswith("reset"):
                    reset(sock)
                sock.close()
        server.ask(SET_BIG)
        for read in 1, 1_000_000:  # the rest of the replies is on its way
            sock = server.connect()
            sock.sendall(b"GET big\r\n" * 20)
            assert len(read_exactly(sock, read)) == read
            reset(sock)
        for _ in range(10):  # it is gone before it is accepted
            reset(server.connect())


def test_half_closed(server):
    """Who has shut down its sending side still gets every reply."""
    requests = SET_BIG + array(b"GET", b"big") * 20
    sock = server.connect(receive_buffer=4096)
    sock.sendall(requests)
    sock.shutdown(socket.SHUT_WR)
    assert read_to_end(sock) == b"+OK\r\n" + bulk(BIG) * 20


def test_what_a_read_brought_is_carried_out(server):
    """Also if the client has closed by then, the end of file included."""
    requests = b"INCR a\r\n" * 2000 + array(b"SET", b"b", b"1") + b"INCR a\r\n"
    for done in 2001, 4002:
        sock = server.connect()
        with frozen(server):
            sock.sendall(requests)  # 16 KB: one read takes it all
            arrived(sock)
            sock.close()
        right = bulk(b"%d" % done)
        wait_for(lambda: server.ask(b"GET a\r\n") == right, f"{done} INCRs", 5)


def test_nobody_works_for_a_ghost(server):
    """Who asks for a lot and resets is given up at the first send."""
    server.ask(SET_BIG)
    before = server.held_at_rest()
    ghost = server.connect()
    send_what_fits(ghost, b"GET big\r\n" * 500_000)
    reset(ghost)
    server.ping()
    wait_for(lambda: server.held() == before, "it has left", patience=4)


def test_nothing_after_the_end(server):
    """What follows QUIT or an error is dropped, and the connection closed."""
    for end, reply in (b"QUIT", b"+OK\r\n"), (b"*x", b"-ERR Protocol error"):
        with server.connect() as sock:
            sock.sendall(b"PING\r\n%b\r\nSET a 1\r\n*x\r\n" % end)
            assert read_to_end(sock).startswith(b"+PONG\r\n" + reply)
        assert server.ask(b"GET a\r\n") == b"$-1\r\n"


ACCEPT = """
import errno, socket
real = socket.socket.accept
errors = ["ENFILE", "ECONNABORTED", "ECONNABORTED", "EPROTO"]
def accept(self):
    if errors:
        raise OSError(getattr(errno, errors.pop()), "accept fails")
    return real(self)
socket.socket.accept = accept
"""


def test_accept_fails(name, start):
    """A client that reset before it was accepted is no word worth; others."""
    server = start(name, prelude=ACCEPT)
    server.ping()
    server.stop()
    lines = server.stderr().splitlines()
    assert len(lines) == (0 if name == "busy" else 2)
    assert all(line.startswith("cannot accept: ") for line in lines)


# ---- Clients that ask for too much ------------------------------------------


@needs_proc
def test_client_that_never_reads(server):
    """Its requests wait, unread; others are served; memory is bounded."""
    server.ask(SET_BIG)
    before = server.memory()
    greedy = server.connect(receive_buffer=64 * 1024)
    sent = send_what_fits(greedy, b"GET big\r\n" * 5_000_000)
    assert sent < 20 * MIB
    if server.name in MANY:
        server.ping()
    assert is_readable(greedy, PATIENCE)
    for _ in range(20):
        assert read_exactly(greedy, len(bulk(BIG))) == bulk(BIG)
    reset(greedy)
    server.ping()
    assert server.memory() - before < SOME + sent


@needs_proc
@pytest.mark.skipif(PYPY, reason="it frees memory when it likes")
@pytest.mark.parametrize("name", ["busy", "kqueue"])
def test_readers_of_big_values(server):
    """40 who are answered at once do not make it hold 40 replies."""
    server.ask(SET_BIG)
    before = server.memory()
    socks = [server.connect(receive_buffer=2 * MIB) for _ in range(40)]
    for sock in socks:
        ping(sock)
    with frozen(server):
        for sock in socks:
            sock.sendall(b"GET big\r\n")
            arrived(sock)
    for sock in socks:
        assert read_exactly(sock, len(bulk(BIG))) == bulk(BIG)
    assert server.memory() - before < SOME + 8 * MIB


@needs_proc
@pytest.mark.skipif(PYPY, reason="it has memory of its own ways")
@pytest.mark.parametrize("name", ["kqueue"])
def test_memory_of_the_idle(server):
    """An idle connection of 4 takes less than 2 KiB (promised is 1)."""
    socks = [server.connect() for _ in range(100)]
    for sock in socks:
        ping(sock)
    before = server.memory("VmRSS")
    socks = [server.connect() for _ in range(500)]
    for sock in socks:
        ping(sock)
    assert server.memory("VmRSS") - before < 500 * 2048


# ---- Nothing left: descriptors, threads -------------------------------------


def cpu(server):
    fields = server.proc("stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def a_while(server, talkers):
    """Some ten lines a second at most, also while the connected talk."""
    before, early = cpu(server), len(server.stderr().splitlines())
    started = time.monotonic()
    while time.monotonic() < started + 1:
        for sock in talkers:
            ping(sock)
        time.sleep(0.005)
    seconds = time.monotonic() - started
    used = (cpu(server) - before) / seconds
    assert server.name == "busy" or used < 0.4  # it does not spin
    lines = server.stderr().splitlines()
    assert server.name == "busy" or early
    assert len(lines) - early <= 12 * seconds + 1 and len(set(lines)) <= 1


def serve_the_rest(socks):
    """Wait until those that have sent a PING are served, and close them."""
    while socks:
        ready = select.select(socks, [], [], PATIENCE)[0]
        assert ready, f"{len(socks)} that have waited are served"
        for sock in ready:
            assert read_exactly(sock, 7) == b"+PONG\r\n"
            socks.remove(sock)
            sock.close()


@needs_prlimit
@pytest.mark.parametrize("connected", [0, 5])
def test_no_descriptor_left(start, connected):
    """A line about it; the others are served; it goes on by itself."""

    def check(name):
        count = connected if name in MANY else min(connected, 1)
        server = start(name)
        before = server.held_at_rest()
        socks = [server.connect() for _ in range(count)]
        for sock in socks:
            ping(sock)
        what = server.pid, resource.RLIMIT_NOFILE
        limits = resource.prlimit(*what)
        # 1 is about to accept when its only client has left.
        room = before[1] + (len(socks) if name in MANY else 0)
        resource.prlimit(*what, (room, limits[1]))
        # Linux sets a descriptor aside before accept waits: one may be in.
        late = [server.connect() for _ in range(4)]
        for sock in late:
            sock.sendall(b"PING\r\n")
        if name == "single":
            for sock in socks:
                socks.remove(sock)
                sock.close()
        if name == "single" and is_readable(late[0], 0.2):
            late.pop(0).close()
        if name != "busy":
            wait_for(server.stderr, "a line about it")
            assert "Too many open files" in server.stderr()
        a_while(server, socks)
        assert sum(map(is_readable, late)) <= 1
        resource.prlimit(*what, limits)
        serve_the_rest(late)
        for sock in socks:
            ping(sock)
            sock.close()
        wait_for(lambda: server.held() == before, "nothing is left behind")
        server.stop()

    together(check, *SCRIPTS)


@needs_prlimit
def test_no_thread_left(start):
    """No thread for a client of 2: it is closed at once, a line says so."""
    shell = 'ulimit -s 65536; exec "$0" "$@"'
    server = start("multi", shell=shell, env={"MALLOC_ARENA_MAX": "1"})
    before = server.held_at_rest()
    room = server.memory("VmSize") + (3 * 64 + 40) * MIB
    what = server.pid, resource.RLIMIT_AS
    limits = resource.prlimit(*what)
    resource.prlimit(*what, (room, limits[1]))
    socks = [server.connect() for _ in range(10)]
    for sock in socks:
        with contextlib.suppress(ConnectionError):  # it may be closed by now
            sock.sendall(b"PING\r\n")
    wait_for(lambda: sum(map(is_over, socks)) >= 6, "those are let go")
    served = [sock for sock in socks if not is_over(sock)]
    assert 1 <= len(served) <= 4
    for sock in served:
        assert read_exactly(sock, 7) == b"+PONG\r\n"
    lines = server.stderr().splitlines()
    assert len(lines) == len(socks) - len(served)
    assert all(line.startswith("cannot serve: ") for line in lines)
    info = server.info(served[0])
    assert int(info["threads_started"]) == 1 + len(served)
    resource.prlimit(*what, limits)
    for sock in socks:
        sock.close()
    server.ping()
    wait_for(lambda: server.held() == before, "nothing is left behind")


# ---- The end ----------------------------------------------------------------


def silent(server):
    """Five are connected, as far as the pattern takes them in."""
    for sock in [server.connect() for _ in range(5)]:
        if server.name in MANY or sock is server.sockets[0]:
            ping(sock)


def busy(server):
    """Some ask without a pause, one never reads, one has sent a half."""
    greedy = server.connect(receive_buffer=4096)
    greedy.sendall(SET_BIG + b"GET big\r\n" * 1000)
    server.connect().sendall(b"*2\r\n$4\r\nPING\r\n$")

    def ask(sock):
        with contextlib.suppress(OSError):
            while True:
                sock.sendall(b"PING\r\n" * 1000)
                if len(read_exactly(sock, 7000)) < 7000:
                    break

    for _ in range(3):
        sock = server.connect()
        threading.Thread(target=ask, args=[sock], daemon=True).start()
    assert is_readable(greedy, PATIENCE)
    if server.name in MANY:
        assert is_readable(sock, PATIENCE)


def sleeping(server):
    """A handler blocks."""
    sock = server.connect()
    ping(sock)
    sock.sendall(b"DEBUG SLEEP 10\r\n")
    arrived(sock)


@pytest.mark.parametrize("situation", [Server.ping, silent, busy, sleeping])
def test_the_end(start, situation):
    """SIGTERM: at once, by the kernel. Ctrl-C: status 0 and the tally."""

    def check(name):
        server = start(name)
        situation(server)
        os.kill(server.pid, signal.SIGTERM)
        assert server.process.wait(PATIENCE) == -signal.SIGTERM
        for sock in server.sockets:  # nobody is left waiting
            assert sock.fileno() < 0 or is_readable(sock, PATIENCE)
        # The port can be taken at once.
        second = start(name, "--port", server.port)  # the last one counts
        assert second.port == server.port
        situation(second)
        assert second.stop().stderr() == server.stderr() == ""

    together(check, *SCRIPTS)


@slow
def test_300_stops_under_load(name, start):
    """No stop leaves a traceback, or takes more than a second Ctrl-C."""
    for number in range(300):
        server = start(name)
        busy(server)
        assert server.stop().stderr() == ""
        server.kill()


# ---- Starting ---------------------------------------------------------------


def refused(name, *options, prelude=""):
    """It ends with one line on stderr, which is returned."""
    status, out, err = run(*command(name, *options, prelude=prelude))
    assert status > 0 and out == ""
    assert err.count("\n") == 1 and err.endswith("\n")
    return err


NONSENSE = """--port 70000, --port -1, --port x1, --port 99999999999999999999,
--port, --host n..s, --host 1.2.3, --host ::zz, --host 203.0.113.1,
--host \u00e9.., --idle-timeout 3, --nonsense, nonsense"""


def test_nonsense_on_the_command_line():
    """A nonsense host, port or option, a taken port: one line names it."""
    text = NONSENSE.encode(sys.getfilesystemencoding(), "replace")
    cases = [tuple(case.split()) for case in os.fsdecode(text).split(",")]
    cases += [("--host", "n" * 300)]
    with socket.create_server(("127.0.0.1", 0)) as sock:
        cases += [("--port", str(sock.getsockname()[1]))] * 4
        named = zip(list(SCRIPTS) * 6, cases)
        lines = together(lambda case: refused(case[0], *case[1]), *named)
    for case, line in zip(cases, lines):
        named = case[0], ascii(case[-1])[1:-1][-9:]
        assert any(word in ascii(line) for word in named), (case, line)


def test_addresses(start):
    """127.0.0.1 unless told otherwise; a name, or an address of IPv6."""
    hosts = {(): ["127.0.0.1"], ("--host", "localhost"): ["127.0.0.1"]}
    with contextlib.suppress(OSError):  # there is no IPv6
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        hosts["--host", "::1"] = ["::1"]

    def check(name):
        for options, allowed in hosts.items():
            server = start(name, *options)
            server.ping()
            assert server.host in allowed

    together(check, *SCRIPTS)


@needs_proc
def test_options_of_the_connections(start):
    """Connections have TCP_NODELAY and SO_KEEPALIVE."""
    options = (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    )
    prelude = f"""
import socket
class Told(socket.socket):
    def accept(self):
        connection, address = super().accept()
        print([connection.getsockopt(*o) for o in {options}], flush=True)
        return connection, address
socket.socket = socket.SocketType = Told
"""
    for name in SCRIPTS:
        server = start(name, prelude=prelude)
        server.ping()
        assert "[1, 1]\n" in server.stdout()


# ---- The loop of 4 ----------------------------------------------------------

BROKEN_QUEUE = """
import select
real = select.epoll if hasattr(select, "epoll") else select.kqueue
class Broken:
    def __init__(self):
        self.queue, self.calls = real(), 0
    def __getattr__(self, name):
        self.calls += 1
        if self.calls > 20:
            raise RuntimeError("the queue is broken")
        return getattr(self.queue, name)
setattr(select, real.__name__, Broken)
"""
FULL_QUEUE = """
import errno, select
class Full:
    changes = 0
    def __init__(self):
        self.queue = real()
    def register(self, *arguments):
        Full.changes += 1
        if Full.changes in {2, 5}:  # the first client; one that is to write
            raise OSError(errno.ENOSPC, "no room to watch")
        self.queue.register(*arguments)
    def __getattr__(self, name):
        return getattr(self.queue, name)
real, select.epoll = select.epoll, Full
"""
NO_QUEUE = """
import select
for name in {"kqueue", "kevent", "epoll"} & set(dir(select)):
    delattr(select, name)
"""


def test_loop_fails(start):
    """If the loop's thread fails, the process ends, and says why."""
    server = start("kqueue", prelude=BROKEN_QUEUE)
    silent = server.connect()
    ping(silent)
    with contextlib.suppress(OSError), server.connect() as sock:
        while sock.send(b"PING\r\n") and sock.recv(100):
            pass
    assert server.process.wait(PATIENCE) > 0
    assert "RuntimeError: the queue is broken" in server.stderr()
    assert is_over(silent)


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="fills an epoll")
@pytest.mark.skipif(PYPY, reason="it closes what is dropped when it likes")
def test_queue_is_full(start):
    """If a client cannot be watched, that one ends, and not the loop."""
    server = start("kqueue", prelude=FULL_QUEUE)
    first = server.connect()
    wait_for(lambda: is_over(first), "it is let go")
    bystander = server.connect()  # change 3 watches the listener again
    ping(bystander)  # 4
    bystander.sendall(SET_BIG + b"GET big\r\n" * 50)  # 5: it waits to write
    assert len(read_to_end_or_reset(bystander)) < 50 * len(BIG)
    server.ping()
    server.stop()


def read_to_end_or_reset(sock):
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        while chunk := sock.recv(1 << 16):
            data += chunk
    return data


def test_neither_kqueue_nor_epoll():
    """Without kqueue and epoll, one line says so."""
    line = refused("kqueue", "--port", 0, prelude=NO_QUEUE)
    assert "kqueue" in line and "epoll" in line
