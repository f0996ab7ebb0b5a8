"""What holds under faults: of the network, the system, and the clients."""

import contextlib
import itertools
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
    reset, run, send_what_fits, slow, slowly, talk, together, wait_for,
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
        talk(bystander, b"*2\r\n$4\r\nEC", b"")  # its request is half there
    yield
    if bystander:
        talk(bystander, b"HO\r\n$1\r\na\r\n", bulk(b"a"))
        bystander.close()
    server.ping()
    wait_for(lambda: server.held() == before, f"{before} held again")
    assert server.stderr() == ""


# ---- Clients that break off -------------------------------------------------

HALVES = [
    b"",
    b"PIN",
    b"*2\r\n$4\r\nECHO\r\n$100\r\nabc",
    b"PING\r\n*2\r\n$4\r\nECHO\r\n",
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


ACCEPT = """
import errno, socket, types
real, end = socket.socket.accept, lambda size: b""
errors = ["ENFILE", "ECONNABORTED", "EPROTO", "ENETDOWN"]
def accept(self):
    if errors:
        raise OSError(getattr(errno, errors.pop()), "accept fails")
    try:
        return real(self)[0], None
    except BlockingIOError:  # in 3: and there is always somebody new
        new = types.SimpleNamespace(setblocking=bool, recv=end, close=bool)
        return new, None
socket.socket.accept = accept
"""


def test_accept(name, start):
    """The client's own errors, a shortage, no address (macOS); a crowd."""
    server = start(name, prelude=ACCEPT)
    server.ping()
    server.stop().check()
    assert server.stderr().count("\n") == 1  # the shortage is told


@needs_proc
def test_all_that_was_sent_is_carried_out(server):
    """Also if the client closes, or resets, before it is answered."""
    server.ask(SET_BIG)
    requests = b"GET big\r\n" * 20 + b"INCR a\r\n" * 2000
    requests += array(b"SET", b"b", b"v" * 100_000) + b"INCR a\r\n"
    done = 0
    for end in socket.socket.close, reset:
        sock = server.connect()
        with frozen(server):
            sock.sendall(requests)
            arrived(sock)
            end(sock)
        done += 2001

        def all_done(right=bulk(b"%d" % done)):
            return server.ask(b"GET a\r\n") == right

        wait_for(all_done, f"{done} INCRs are carried out", 5)


def test_nobody_works_for_a_ghost(server):
    """Who asks for a lot and resets starves neither the others nor the end."""
    server.ask(SET_BIG)
    before = server.held_at_rest()
    ghost = server.connect()
    assert send_what_fits(ghost, b"GET big\r\n" * 500_000) > MIB
    reset(ghost)
    server.ping()
    wait_for(lambda: server.held() == before, "it has left", patience=4)
    server.stop().check()


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
@pytest.mark.skipif(PYPY or FREE, reason="it has memory of its own ways")
def test_no_memory_left(start):
    """A connection that asks for more than there is ends; the server stays."""

    def check(name):
        shell = 'ulimit -s 512; ulimit -v 200000; exec "$0" "$@"'
        server = start(name, shell=shell, env={"MALLOC_ARENA_MAX": "1"})
        socks = [server.connect() for _ in range(200)]
        for sock in socks:
            ping(sock)  # so in 2 it is not the thread that lacks memory
        for sock in socks[1:]:
            if not any(map(is_over, socks)):
                ping(socks[0])
                send_what_fits(sock, b"*1\r\n$1000000\r\n" + BIG, 0.02)
        wait_for(lambda: any(map(is_over, socks)), "somebody is refused", 5)
        ping(socks[0])
        for sock in socks:
            sock.close()
        server.ping()
        server.stop().check()

    together(check, *MANY)


# ---- Clients that are silent, or talk for ever ------------------------------


def seconds_until_let_go(server, how):
    """Connect, then do nothing, or send half a request, or never read."""
    sock = server.connect(receive_buffer=4096)
    started = time.monotonic()
    if how == "half":
        sock.sendall(b"*2\r\n$4\r\nECHO\r\n$1000\r\nhalf a wo")
    elif how == "unread":
        sock.sendall(SET_BIG + b"GET big\r\n" * 50)
    if server.name == "single":
        server.ping()
    else:
        with server.connect() as other:

            def alone():
                return server.info(other)["connected_clients"] == "1"

            if server.name != "multi":
                wait_for(lambda: not alone(), "it is connected")
            wait_for(alone, "it has been let go")
    assert how == "unread" or is_over(sock)
    return time.monotonic() - started


def test_silent_clients_are_let_go(start):
    """Without a byte for --idle-timeout, a client is let go: all kinds."""

    def check(case):
        name, how = case
        server = start(name, "--idle-timeout", 1.5)
        seconds = seconds_until_let_go(server, how)
        # One timeout, and in 4 a second until it is seen; not two or three.
        assert 1.4 < seconds < 2.95
        server.stop().check()
        assert server.stderr() == ""

    kinds = "silent", "half", "unread"
    together(check, *[(name, how) for name in SCRIPTS for how in kinds])


def slow_reader(server):
    """He takes in what he is owed, bit by bit."""
    replies = b"+OK\r\n" + bulk(BIG) * 40
    reader = server.connect(receive_buffer=64 * 1024, segment=1400)
    reader.sendall(SET_BIG + b"GET big\r\n" * 40)
    end, got = time.monotonic() + 4.5, 0
    while time.monotonic() < end:
        got += len(reader.recv(30_000))
        time.sleep(0.1)
    assert got < len(replies) / 2
    rest = len(replies) - got
    assert len(read_exactly(reader, rest)) == rest


def slow_sender(server):
    """He sends a byte now and then, and later waits for a handler."""
    with server.connect() as sock:
        for byte in b"PING a\r\n":
            sock.sendall(bytes([byte]))
            time.sleep(0.3)
        assert read_exactly(sock, 7) == bulk(b"a")
        talk(sock, b"DEBUG SLEEP 2.1\r\n", b"+OK\r\n")
        time.sleep(0.1)
        ping(sock)


def test_active_clients_stay(start):
    """Who sends or takes a byte before the time is up is not let go."""

    def check(case):
        name, client = case
        server = start(name, "--idle-timeout", 2)
        client(server)
        server.stop().check()

    clients = slow_reader, slow_sender
    together(check, *[(name, c) for name in SCRIPTS for c in clients])


def test_last_reply_arrives(server):
    """Who sends 2 MiB beyond an error gets every reply, and the end."""
    for beyond in b"v" * (2 * MIB), b"PING\r\n" * 300_000:
        with server.connect() as sock:
            sock.sendall(b"PING\r\n*x\r\n" + beyond)
            replies = read_to_end(sock)
        assert replies.startswith(b"+PONG\r\n-ERR Protocol error: ")
        assert replies.count(b"\r\n") == 2
    sock = server.connect()
    talk(sock, b"QUIT\r\n", b"+OK\r\n")
    assert is_readable(sock, 0.9)  # the end, and not only when it has waited


def flood_after_an_error(sock):
    """Return whether it was let go in spite of its sending on."""
    talk(sock, b"*x\r\n", b"-ERR Protocol error")
    end = time.monotonic() + 3.5  # promised are one or, in 4, two seconds
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < end:
            sock.sendall(b"PING\r\n" * 100_000)
        return False
    return True


def test_who_floods_after_an_error_is_let_go(server):
    """It must not stay by sending on, also while others keep 3 busy."""
    count = 5 if server.name in MANY else 1
    socks = [server.connect() for _ in range(count)]
    if server.name in MANY:
        busy(server)
    assert all(together(flood_after_an_error, *socks))


# ---- Nothing left: descriptors, threads -------------------------------------


def a_while(server):
    """A line once a second at most, no spinning (3 does so by trade)."""

    def cpu():
        fields = server.proc("stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    before, early = cpu(), server.stderr().splitlines()
    started = time.monotonic()
    time.sleep(2.2)
    seconds = time.monotonic() - started
    assert server.name == "busy" or (cpu() - before) / seconds < 0.2
    lines = server.stderr().splitlines()
    assert early and len(lines) - len(early) <= seconds + 1, (early, lines)
    assert len(set(lines)) == 1


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
def test_no_descriptor_left(start):
    """A line about it; the others are served; it goes on by itself."""

    def check(name):
        server = start(name)
        before = server.held_at_rest()
        socks = [server.connect() for _ in range(5 if name in MANY else 1)]
        for sock in socks:
            ping(sock)
        what = server.pid, resource.RLIMIT_NOFILE
        limits = resource.prlimit(*what)
        # 1 is about to accept when its only client has left.
        room = before[1] + (len(socks) if name in MANY else 0)
        resource.prlimit(*what, (room, limits[1]))
        late = [server.connect() for _ in range(4)]
        for sock in late:
            sock.sendall(b"PING\r\n")
        if name == "single":
            socks.pop().close()
        wait_for(server.stderr, "a line about it")
        assert "Too many open files" in server.stderr()
        a_while(server)
        for sock in socks:
            ping(sock)
        # Linux sets a descriptor aside before accept waits: one may be in.
        assert sum(map(is_readable, late)) <= 1
        if name in MANY:  # there is room when somebody leaves
            served = sum(map(is_readable, late))
            socks.pop().close()
            wait_for(lambda: sum(map(is_readable, late)) > served, "is served")
        resource.prlimit(*what, limits)
        serve_the_rest(late)
        for sock in socks:
            ping(sock)
            sock.close()
        wait_for(lambda: server.held() == before, "nothing is left behind")
        server.stop().check()

    together(check, *SCRIPTS)


@needs_prlimit
def test_no_thread_left(start):
    """No room for a thread in 2: a line, others are served, it recovers."""
    shell = 'ulimit -s 65536; exec "$0" "$@"'
    server = start("multi", shell=shell, env={"MALLOC_ARENA_MAX": "1"})
    before = server.held_at_rest()
    room = server.memory("VmSize") + (3 * 64 + 40) * MIB
    resource.prlimit(server.pid, resource.RLIMIT_AS, (room, room))
    socks = [server.connect() for _ in range(10)]
    for sock in socks:
        sock.sendall(b"PING\r\n")
    wait_for(server.stderr, "a line about it")
    served = [sock for sock in socks if is_readable(sock, 0.05)]
    assert 1 <= len(served) <= 4
    for sock in served:
        assert read_exactly(sock, 7) == b"+PONG\r\n"
    a_while(server)
    for sock in served:
        ping(sock)
        socks.remove(sock)
        sock.close()
    serve_the_rest(socks)
    wait_for(lambda: server.held() == before, "nothing is left behind")
    server.stop().check()


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
    server.connect().sendall(b"*2\r\n$4\r\nECHO\r\n$")

    def ask(sock):
        with contextlib.suppress(OSError):
            while True:
                sock.sendall(b"PING\r\n" * 5000)
                if len(read_exactly(sock, 35_000)) < 35_000:
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


ONE, OTHER = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize("situation", [Server.ping, silent, busy, sleeping])
@pytest.mark.parametrize("signals", [[ONE], [OTHER, ONE] * 5])
def test_signals(start, signals, situation):
    """They end it in a second, with status 0 and the tally, once."""

    def check(name):
        server = start(name)
        situation(server)
        server.stop(*signals).check()
        assert server.stderr() == "" and server.stdout().count("pattern:") == 1
        for sock in server.sockets:  # nobody is left waiting
            assert sock.fileno() < 0 or is_readable(sock, PATIENCE)
        second = start(name, "--port", server.port)  # the last one counts
        assert second.port == server.port  # it can be taken at once
        assert min(server.seconds, second.stop().seconds) < 1

    together(check, *SCRIPTS)


@pytest.mark.parametrize("number", [ONE, OTHER])
def test_started_in_the_background(start, number):
    """Started with & by a script, SIGINT begins ignored, and works yet.

    A second signal that arrives at the same time changes nothing.
    """

    def check(name):
        server = start(name, shell='"$0" "$@" & wait $!; echo "status $?"')
        shell, server.pid = server.pid, int(server.info()["process_id"])
        assert server.pid != shell
        ping(server.connect())
        os.kill(server.pid, signal.SIGSTOP)
        also = [ONE] if number == OTHER else []
        server.stop(number, *also, signal.SIGCONT).check()
        assert "status 0\n" in server.stdout() and server.stderr() == ""

    together(check, *SCRIPTS)


def stop_early(name, number):
    """Send a signal as soon as the server has said that it listens."""
    line, pipe = command(name, "--port", 0), subprocess.PIPE
    server = subprocess.Popen(line, stdout=pipe, stderr=pipe)
    assert b"listening on" in server.stdout.readline()
    server.send_signal(number)
    output, errors = server.communicate(timeout=PATIENCE)
    assert (server.returncode, errors) == (0, b"") and b"clients:0" in output


@pytest.mark.parametrize("times", [1, slowly(100)])
def test_early_signals(name, times):
    """A signal right after the first line ends it as any other."""
    for _ in range(times):
        together(lambda number: stop_early(name, number), ONE, OTHER)


LATE = "import signal as s, threading as t; t.Timer(1, lambda: "
LATE += "s.pthread_kill(t.get_ident(), s.SIGTERM)).start()"


def test_signal_just_before_a_sleep(start):
    """Main sleeps on, since another thread has taken it; and looks again."""
    servers = [start(name, prelude=LATE) for name in MANY]
    assert [s.process.wait(PATIENCE) for s in servers] == [0, 0, 0]


@slow
def test_300_stops_under_load(name, start):
    """No signal is lost, none is late, none leaves a traceback."""
    for number in range(300):
        server = start(name)
        busy(server)
        server.stop([ONE, OTHER][number % 2]).check()
        assert server.stderr() == ""
        server.kill()


# ---- Output that nobody takes -----------------------------------------------

# Connections get other ports.
PORTS = itertools.count(20_000 + os.getpid() % 10_000)


def run_where(name, shell='exec "$0" "$@"', **where):
    """Run a server whose output leads nowhere; return it and its port."""
    port = next(PORTS)
    line = ["sh", "-c", shell, *command(name, "--port", port)]
    process = subprocess.Popen(line, **where)

    def served():
        assert process.poll() is None
        with contextlib.suppress(ConnectionRefusedError):
            with socket.create_connection(("127.0.0.1", port), 5) as sock:
                ping(sock)
                return True

    wait_for(served, "it serves")
    return process, port


@pytest.mark.parametrize("end", ["", ">&-", ">/dev/full"])
def test_nobody_takes_what_it_says(end):
    """Its reader has gone, or it is closed, or full: it serves, and ends."""
    if "full" in end and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    reader, writer = os.pipe()
    os.close(reader)

    def check(name):
        shell = f'exec "$0" "$@" {end}'
        where = {"stdout": writer, "stderr": subprocess.PIPE}
        process, _ = run_where(name, shell, **where)
        process.terminate()
        errors = process.communicate(timeout=PATIENCE)[1]
        assert (process.returncode, errors) == (0, b"")

    together(check, *SCRIPTS)
    os.close(writer)


@needs_prlimit
def test_stuck_reader_of_stderr():
    """Nobody reads stderr, and it has something to say: it ends yet."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)

    def check(name):
        out = subprocess.PIPE
        process, port = run_where(name, stdout=out, stderr=writer)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, 3))
        address = "127.0.0.1", port
        socks = [socket.create_connection(address) for _ in range(3)]
        for sock in socks:
            sock.sendall(b"QUIT\r\n")
        tasks = f"/proc/{process.pid}/task"

        def stuck():
            with contextlib.suppress(OSError):  # a thread has ended
                files = [f"{tasks}/{task}/wchan" for task in os.listdir(tasks)]
                return any("pipe_write" in open(file).read() for file in files)

        wait_for(stuck, "it waits for the reader of its stderr")
        process.terminate()
        assert b"pattern:" in process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 0

    together(check, *SCRIPTS)
    os.close(reader)
    os.close(writer)


# ---- Starting ---------------------------------------------------------------


def refused(name, *options, prelude=""):
    """It ends with one line on stderr, which is returned."""
    status, out, err = run(*command(name, *options, prelude=prelude))
    assert status > 0 and out == ""
    assert err.count("\n") == 1 and err.endswith("\n")
    return err


NONSENSE = """--port 70000, --port -1, --port x1, --port 99999999999999999999,
--port, --host n..s, --host 1.2.3, --host ::zz, --host 203.0.113.1,
--host \u00e9.., --idle-timeout x1, --idle-timeout 0, --idle-timeout -1,
--idle-timeout nan, --idle-timeout inf, --idle-timeout 1e300, --nonsense,
nonsense"""


def test_nonsense_on_the_command_line():
    """A nonsense host, port or option, a taken port: one line names it."""
    cases = [tuple(case.split()) for case in NONSENSE.split(",")]
    cases += [("--host", ""), ("--host", "n" * 300)]
    with socket.create_server(("127.0.0.1", 0)) as sock:
        cases += [("--port", str(sock.getsockname()[1]))] * 4
        named = zip(list(SCRIPTS) * 6, cases)
        lines = together(lambda case: refused(case[0], *case[1]), *named)
    for case, line in zip(cases, lines):
        named = case[0], ascii(case[-1])[1:-1][-9:]
        assert any(word in ascii(line) for word in named), (case, line)


def test_addresses(start):
    """127.0.0.1 unless told otherwise; a name, or an address of IPv6."""
    hosts = {(): ["127.0.0.1"], ("--host", "localhost"): ["127.0.0.1", "::1"]}
    with contextlib.suppress(OSError):  # there is no IPv6
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        hosts["--host", "::1"] = ["::1"]

    def check(name):
        for options, allowed in hosts.items():
            server = start(name, *options)
            server.ping()
            assert server.host in allowed

    together(check, *SCRIPTS)


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


def test_neither_kqueue_nor_epoll():
    """Without kqueue and epoll, one line says so."""
    line = refused("kqueue", "--port", 0, prelude=NO_QUEUE)
    assert "kqueue" in line and "epoll" in line
