"""The loop of 4_kqueue_loop.py against what kqueue does and epoll does not.

On Linux the lines for macOS and the BSDs do not run. Here they do: over a
kqueue that tests/fake_kqueue.py plays, or over the real one where there is
one. What it plays stands in these manual pages, which a docstring means by
"kqueue(2)" where they agree, and names where they do not:

    FreeBSD   https://man.freebsd.org/cgi/man.cgi?query=kqueue&sektion=2
    macOS     https://github.com/apple-oss-distributions/xnu,
              bsd/man/man2/kqueue.2
    OpenBSD   https://man.openbsd.org/kqueue.2

What is Python's own stands in https://docs.python.org/3/library/select.html.
"""

import contextlib
import errno
import json
import os
import re
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
from fcntl import ioctl

import fake_kqueue
import pytest
from conftest import (
    HERE,
    PATIENCE,
    SCRIPTS,
    SERVERS_DIR,
    array,
    bulk,
    needs_proc,
    ping,
    read_to_end,
    reset,
    run_to_end,
    talk,
    wait_for,
)
from fake_kqueue import ADD, DELETE, EOF, ERROR, READ, WRITE

LINUX = sys.platform == "linux"
FIN_WAIT2 = 5  # of Linux's TCP_INFO: the other side has our end of file
VALUE = b"v" * 60_000


# ---- A server on such a kqueue ----------------------------------------------


class Log:
    """What went through the server's queue, as fake_kqueue writes it down."""

    def __init__(self, path):
        self.path = path

    def lines(self, *kinds):
        complete = self.path.read_text().rpartition("\n")[0]
        lines = map(json.loads, complete.splitlines())
        return [line for line in lines if line[0] in kinds]

    def changes(self):
        """Return (ident, filter, flags) of each change that was made."""
        return [tuple(what[:3]) for _, what, _ in self.lines("change")]

    def events(self):
        """Return (ident, filter, flags, data) of each event."""
        batches = [what for _, what, _ in self.lines("events")]
        return [tuple(event) for batch in batches for event in batch]

    def stale_events(self):
        """Return how many were for a descriptor closed in the same batch.

        And for how many of these the number was in use again by then.
        """
        closed = reused = 0
        batch = []
        for kind, what, _ in self.lines("events", "change"):
            if kind == "events":
                batch, deleted = [event[0] for event in what], set()
            elif batch.count(what[0]) > 1:
                if what[2] == DELETE:
                    deleted.add(what[0])
                    closed += 1
                elif what[0] in deleted:
                    reused += 1
        return closed, reused


def prepare(*calls):
    """Return what a process must do first to have fake_kqueue's functions."""
    path = f"import sys; sys.path.insert(0, {str(HERE)!r})"
    return "\n".join([path, "from fake_kqueue import *", *calls, ""])


@pytest.fixture
def loop(start, tmp_path):
    """Start 4 on a kqueue that makes the trouble which is named.

    In the end, it has let all clients go, does not spin, has never asked the
    queue for what cannot be, and stops as it must.
    """
    servers = []

    def loop(*kinds, then=()):
        log = tmp_path / f"queue{len(servers)}.log"
        prelude = prepare(f"install({str(log)!r}, {kinds!r})", *then)
        server = start("kqueue", "-v", prelude=prelude)
        server.log = Log(log)
        servers.append(server)
        return server

    yield loop
    for server in servers:
        server.close_clients()
        assert server.process.poll() is None, server.stderr()
        with server.connect() as sock:
            wait_for(lambda: figure(server, sock) == 1, "all others are gone")
            before = figure(server, sock, "wakeups")
            for _ in range(20):
                server.info(sock)
            assert figure(server, sock, "wakeups") - before <= 30
        server.stop().check()
        assert server.log.lines("refused") == []


def figure(server, sock, name="connected_clients"):
    return int(server.info(sock)[name])


@contextlib.contextmanager
def frozen(server):
    """Stop the server, so that what happens meanwhile comes in one batch."""
    os.kill(server.pid, signal.SIGSTOP)
    _, status = os.waitpid(server.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def send(sock, data):
    """Send, and wait until it is with the server (as far as can be known)."""
    sock.sendall(data)
    if LINUX:
        wait_for(lambda: not unacknowledged(sock), "the bytes have arrived")


def unacknowledged(sock):
    return struct.unpack("i", ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]


def send_end(sock):
    """Send the end of file, and wait until it is with the server."""
    sock.shutdown(socket.SHUT_WR)
    if LINUX:
        wait_for(lambda: tcp_state(sock) == FIN_WAIT2, "the end has arrived")


def tcp_state(sock):
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def end_came_with_bytes(server):
    """Return whether the queue has told of both in one event."""
    return not LINUX or any(  # elsewhere it may have told of one, then both
        filter == READ and flags & EOF and data > 0
        for _, filter, flags, data in server.log.events()
    )


def ask_and_not_read(server, times=200):
    """Return a connection that is owed more than the kernel takes."""
    server.ask(array(b"SET", b"big", VALUE))
    sock = server.connect(receive_buffer=4096)
    writers = len(added(server, WRITE))
    sock.sendall(b"GET big\r\n" * times)
    wait_for(
        lambda: len(added(server, WRITE)) > writers,
        "the loop waits until it can write",
    )
    return sock


def added(server, filter):
    return [
        ident
        for ident, *what in server.log.changes()
        if what == [filter, ADD]
    ]


# ---- What differs from epoll ------------------------------------------------


def test_client(loop):
    """kqueue(2), DESCRIPTION: a whole conversation goes through kevent()."""
    server = loop()
    ended = subprocess.run(
        [sys.executable, str(HERE.parent / "client.py")]
        + ["--host", server.host, "--port", str(server.port)]
        + ["--think", "0.005"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE,
    )
    assert ended.returncode == 0, ended.stdout.decode()
    assert len(added(server, READ)) >= 2 + 8  # two of its own, eight clients
    assert any(data > 0 for *_, data in server.log.events())


def test_end_with_bytes_unread(loop):
    """kqueue(2), EVFILT_READ: EOF may come with data still in the buffer."""
    server = loop()
    with frozen(server):
        sock = server.connect()
        send(sock, b"SET a 1\r\nINCR a\r\n" + array(b"GET", b"a"))
        send_end(sock)
    assert read_to_end(sock) == b"+OK\r\n:2\r\n" + bulk(b"2")
    assert end_came_with_bytes(server)


def test_end_while_replies_wait(loop):
    """kqueue(2), EVFILT_READ: the end of reading is not that of writing."""
    server = loop()
    server.ask(array(b"SET", b"big", VALUE))
    with frozen(server):
        sock = server.connect(receive_buffer=4096)
        send(sock, b"GET big\r\n" * 50)
        send_end(sock)
    wait_for(lambda: added(server, WRITE), "the loop waits to write")
    replies = read_to_end(sock)
    assert len(replies) == 50 * len(bulk(VALUE))
    assert replies == 50 * bulk(VALUE)
    assert end_came_with_bytes(server)


@pytest.mark.parametrize("count", [1, 3000])
def test_send_and_close(loop, count):
    """kqueue(2), EVFILT_READ: "the connection is gone", its bytes are not."""
    server = loop()
    with frozen(server):
        sock = server.connect()
        send(sock, b"INCR a\r\n" * count)
        send_end(sock)
        sock.close()
    wait_for(
        lambda: server.ask(b"GET a\r\n") == bulk(b"%d" % count),
        "all that was sent is carried out",
    )
    assert end_came_with_bytes(server)


def test_nothing_is_deleted_twice(loop):
    """kqueue(2), ERRORS: ENOENT for what is not there, EBADF if closed.

    The fixture looks for these in the log.
    """
    server = loop()
    waiting = ask_and_not_read(server)
    with server.connect() as sock:  # the end, while it reads
        ping(sock)
    with server.connect() as sock:  # a last word, then the end
        assert read_to_end_of_error(sock)
    reset(waiting)  # the end, while it writes
    sock = server.connect()
    ping(sock)
    reset(sock)
    with server.connect() as sock:
        wait_for(lambda: figure(server, sock) == 1, "all others are gone")
        last = {}  # what was done to each filter at last
        for ident, filter, flag in server.log.changes():
            assert last.get((ident, filter)) != flag, "the same again"
            last[ident, filter] = flag
        assert sorted(last.values()).count(ADD) == 3  # its own two, and `sock`


def read_to_end_of_error(sock):
    sock.sendall(b"*x\r\n")
    return read_to_end(sock).startswith(b"-ERR Protocol error")


@pytest.mark.skipif(not LINUX, reason="macOS drops whom it cannot accept")
def test_no_descriptor_is_free(loop):
    """kqueue(2), EV_ADD and EV_DELETE: the listener off, and on again."""
    server = loop(then=["limit_descriptors(24)"])
    socks = [server.connect() for _ in range(40)]
    wait_for(lambda: "cannot accept" in server.stderr(), "it is short of them")
    for number, sock in enumerate(socks):
        ping(sock)  # by now it has been accepted
        sock.close()
    changes = server.log.changes()
    taken_off = [ident for ident, _, flag in changes if flag == DELETE]
    assert added(server, READ)[1] in taken_off  # the listener comes second


@pytest.mark.parametrize("newcomers", [0, 5])
def test_stale_events(loop, newcomers):
    """kqueue(2): close() removes the kevents; those handed out are out."""
    server = loop("again")
    bystander = server.connect()
    leavers = [server.connect() for _ in range(5)]
    for sock in [bystander, *leavers]:
        ping(sock)
    with frozen(server):
        for sock in leavers:
            send_end(sock)
        new = [server.connect() for _ in range(newcomers)]
        for sock in new:
            send(sock, b"PI")
    for sock in leavers:
        assert read_to_end(sock) == b""
    for sock in new:
        talk(sock, b"NG\r\n", b"+PONG\r\n")
    ping(bystander)
    closed, reused = server.log.stale_events()
    assert closed >= 5 or not LINUX
    assert reused >= bool(newcomers) or not LINUX


def test_error_events(loop):
    """kqueue(2), RETURN VALUES: errors come as events with EV_ERROR."""
    server = loop("errors")
    reader = server.connect()
    writer = ask_and_not_read(server)
    for _ in range(10):
        ping(reader)
    writer.shutdown(socket.SHUT_WR)
    assert read_to_end(writer) == 200 * bulk(VALUE)
    broken = server.connect()
    ping(broken)
    reset(broken)
    ping(reader)
    flags = {(what, flag) for _, what, flag, _ in server.log.events()}
    assert (READ, ERROR) in flags and (WRITE, ERROR) in flags


def test_spurious_events(loop):
    """kqueue(2), DESCRIPTION: what was true before need not be true now."""
    server = loop("spurious")
    reader, other = server.connect(), server.connect()
    writer = ask_and_not_read(server)
    for _ in range(10):
        ping(reader)
    ping(other)
    writer.shutdown(socket.SHUT_WR)
    assert read_to_end(writer) == 200 * bulk(VALUE)
    events = server.log.events()
    for filter in READ, WRITE:
        assert [filter, ADD, 0] in [what for _, *what in events]


def test_writer_is_gone(loop):
    """kqueue(2), EVFILT_WRITE: EOF is set when the reader disconnects."""
    server = loop()
    bystander = server.connect()
    writer = ask_and_not_read(server)
    ident = added(server, WRITE)[-1]
    wait_for(lambda: is_stuck(server, bystander), "the kernel takes no more")
    reset(writer)
    wait_for(lambda: figure(server, bystander) == 1, "it has been let go")
    ends = [
        filter
        for number, filter, flags, _ in server.log.events()
        if number == ident and flags & EOF
    ]
    assert WRITE in ends


def is_stuck(server, sock):
    """Return whether nobody but `sock` keeps the loop awake."""
    events = [figure(server, sock, "events") for _ in range(5)]
    return events == list(range(events[0], events[0] + 5))


@pytest.mark.parametrize("inherits", [True, False])
def test_accepted_sockets(loop, inherits):
    """accept(2): the BSDs and macOS hand O_NONBLOCK on, Linux does not."""
    # An accept() or recv() that blocks would hang on a spurious event.
    server = loop("spurious", then=[f"accept_inherits({inherits})"])
    sock = server.connect()
    talk(sock, b"GE", b"")
    server.ping()
    talk(sock, b"T a\r\n", b"$-1\r\n")


@needs_proc
@pytest.mark.parametrize("inherits", [True, False])
def test_accepted_sockets_do_not_block(loop, inherits):
    """accept(2): whatever it inherits, the loop's socket is O_NONBLOCK."""
    server = loop(then=[f"accept_inherits({inherits})"])
    ping(server.connect())
    ident = added(server, READ)[-1]
    text = server.proc(f"fdinfo/{ident}").read_text()
    flags = int(re.search(r"flags:\s*([0-7]+)", text)[1], 8)
    assert flags & os.O_NONBLOCK


def test_accept_without_address(name, start):
    """macOS, accept(2): who has reset already may come without an address.

    XNU gives 0 for its length then, and Python None for the address. Others
    have met it: https://github.com/giampaolo/pyftpdlib/issues/104
    """
    prelude = prepare("accept_without_address()")
    server = start(name, prelude=prelude)
    reset(server.connect())
    server.ping()
    server.stop().check()


NO_QUEUE = """
import select
for name in "kqueue", "epoll":
    if hasattr(select, name):
        delattr(select, name)
"""


def test_neither_kqueue_nor_epoll():
    """Python, select: both are there on some systems only."""
    ended = run_to_end("kqueue", "--port", 0, prelude=NO_QUEUE)
    assert ended.returncode not in (0, None)
    assert ended.stdout == ""
    assert re.fullmatch(".*kqueue.*epoll.*\n", ended.stderr)


# ---- One table for all queues -----------------------------------------------
#
# The real kqueue, the fake one and the small class of 4_kqueue_loop.py go
# through the same steps, and tell the same. So the fake is worth something,
# and the class is what the loop may take it for.


def of_the_file():
    names = runpy.run_path(
        str(SERVERS_DIR / SCRIPTS["kqueue"]), run_name="not main"
    )
    classes = names["kqueue"], names["kevent"]
    filters = {
        "read": names["KQ_FILTER_READ"],
        "write": names["KQ_FILTER_WRITE"],
    }
    return classes, filters, (names["KQ_EV_ADD"], names["KQ_EV_DELETE"])


def of_the_test():
    classes = fake_kqueue.kqueue, fake_kqueue.kevent
    return classes, {"read": READ, "write": WRITE}, (ADD, DELETE)


class Bench:
    """A queue, a connection, and steps to take with them, by name."""

    def __init__(self, queue):
        (kqueue, self.kevent), self.filters, self.flags = queue
        self.queue = kqueue()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.ours, self.theirs = self.pair()
        self.spare = self.pair()
        self.number = self.ours.fileno()
        self.open = [self.listener, self.ours, self.theirs, *self.spare]

    def pair(self):
        theirs = socket.create_connection(self.listener.getsockname())
        ours = self.listener.accept()[0]
        ours.setblocking(False)
        return ours, theirs

    def take(self, step):
        name, *filter = step.split()
        getattr(self, name)(*filter)

    def change(self, filter, flag):
        change = self.kevent(self.number, self.filters[filter], flag)
        assert not self.queue.control([change], 0)

    def add(self, filter):
        self.change(filter, self.flags[0])

    def delete(self, filter):
        self.change(filter, self.flags[1])

    def look(self):
        """Return what is ready: "read", "write", "read write" or ""."""
        events = self.queue.control(None, 10, 0)
        assert all(event.ident == self.number for event in events)
        names = {value: name for name, value in self.filters.items()}
        return " ".join(sorted(names[event.filter] for event in events))

    def bytes(self):
        send(self.theirs, b"bytes")
        self.wait()

    def end(self):
        send_end(self.theirs)
        self.wait()

    def reset(self):
        reset(self.theirs)
        self.wait()

    def wait(self):
        """Wait until it has arrived: all of these make a socket readable."""
        assert select.select([self.ours], [], [], PATIENCE)[0]

    def receive(self):
        assert self.ours.recv(100) == b"bytes"

    def fill(self):
        """Send until there is no room, and none appears."""
        while select.select([], [self.ours], [], 0.02)[1]:
            with contextlib.suppress(BlockingIOError):
                self.ours.send(bytes(1 << 20))

    def copy(self):
        self.open.append(self.ours.dup())

    def close(self):
        self.ours.close()

    def reuse(self):
        """Have another connection on the number of the one just closed."""
        ours, self.theirs = self.spare
        os.dup2(ours.fileno(), self.number)
        ours.close()
        self.ours = socket.socket(fileno=self.number)
        self.open.append(self.ours)


def outcome(queue, steps):
    """Take the steps; return what is ready then, or what error came up."""
    bench = Bench(queue())
    try:
        for step in steps.split(", "):
            bench.take(step)
        found = bench.look()
    except OSError as error:
        found = errno.errorcode[error.errno]
    for sock in bench.open:
        sock.close()
    return found


SAME = {
    "add read": "",
    "add read, bytes": "read",
    "bytes, add read": "read",
    "bytes": "",
    "add read, bytes, look": "read",
    "add read, bytes, receive": "",
    "add read, add read, bytes": "read",
    "add read, add read, delete read, bytes": "",
    "add read, delete read, add read, bytes": "read",
    "add write": "write",
    "add write, look": "write",
    "add write, fill": "",
    "add write, bytes": "write",
    "add read, add write": "write",
    "add read, add write, bytes": "read write",
    "add read, add write, bytes, delete write": "read",
    "add read, add write, bytes, delete read": "write",
    "add read, delete read, add write, bytes": "write",
    "add read, end": "read",
    "add read, bytes, end": "read",
    "add read, bytes, end, receive": "read",
    "add write, fill, end": "",
    "add read, add write, fill, end": "read",
    "add read, reset": "read",
    "add write, fill, reset": "write",
    "add read, add write, fill, reset": "read write",
    "add read, bytes, delete read, reset": "",
    "add read, bytes, close": "",
    "add read, close, reuse, bytes": "",
    "add read, delete read, close, reuse, bytes": "",
    "add read, delete read, close, reuse, add read, bytes": "read",
    "add read, delete read, close, reuse, add write, bytes": "write",
}

DIFFERENT = {  # steps: what kqueue says, what the class over epoll says
    "delete read": ("ENOENT", ""),
    "add read, delete write": ("ENOENT", ""),
    # Who closes without a DELETE leaves a mask behind. The loop does not.
    "add read, close, reuse, add read, bytes": ("read", "ENOENT"),
    # kqueue knows descriptors, epoll the file behind them.
    "add read, bytes, copy, close": ("", "read"),
}


@pytest.mark.parametrize("queue", [of_the_file, of_the_test])
@pytest.mark.parametrize("steps", SAME)
def test_same(queue, steps):
    """kqueue(2), DESCRIPTION and EV_ADD to EVFILT_WRITE: what is reported."""
    assert outcome(queue, steps) == SAME[steps]


@pytest.mark.parametrize("steps", DIFFERENT)
def test_different(steps):
    """kqueue(2), close() and ENOENT: what the loop must not do, therefore."""
    on_kqueue, on_epoll = DIFFERENT[steps]
    assert outcome(of_the_test, steps) == on_kqueue
    if not hasattr(select, "kqueue"):
        assert outcome(of_the_file, steps) == on_epoll


def test_delete_of_a_closed_descriptor():
    """kqueue(2), ERRORS: EBADF."""
    assert outcome(of_the_test, "add read, close, delete read") == "EBADF"


@pytest.mark.parametrize("watched, kept", [("read", 0), ("write", 1)])
def test_hang_up(watched, kept):
    """kqueue(2), "Fifos, Pipes": reported when the other side is gone.

    There epoll has EPOLLHUP or EPOLLERR alone. With sockets, it never does.
    """
    (kqueue, kevent), filters, (add, _) = of_the_file()
    queue, pipe = kqueue(), os.pipe()
    if watched == "write":  # fill it
        os.set_blocking(pipe[1], False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(pipe[1], bytes(4096))
    queue.control([kevent(pipe[kept], filters[watched], add)], 0)
    assert queue.control(None, 10, 0) == []
    os.close(pipe[1 - kept])
    (event,) = queue.control(None, 10, 0)
    os.close(pipe[kept])
    assert (event.ident, event.filter) == (pipe[kept], filters[watched])


@pytest.fixture
def bench():
    bench = Bench(of_the_test())
    yield bench
    for sock in bench.open:
        sock.close()
    bench.queue.close()


def test_error_goes_where_there_is_room(bench):
    """kqueue(2), RETURN VALUES: an event with EV_ERROR, or else errno."""
    changes = [
        bench.kevent(bench.number, READ, ADD),
        bench.kevent(bench.number, WRITE, DELETE),
    ]
    (event,) = bench.queue.control(changes, 1, PATIENCE)
    assert (event.ident, event.filter) == (bench.number, WRITE)
    assert event.flags & ERROR and event.data == errno.ENOENT
    with pytest.raises(OSError) as raised:
        bench.queue.control(changes, 0)
    assert raised.value.errno == errno.ENOENT
    bench.bytes()
    assert bench.look() == "read"  # the change in front of it was made


def test_what_an_event_tells(bench):
    """kqueue(2), EVFILT_READ: data is bytes, or backlog; EV_EOF with them."""
    bench.add("read")
    bench.bytes()
    (event,) = bench.queue.control(None, 10, PATIENCE)
    assert event.data == 5 and not event.flags & EOF
    bench.end()
    (event,) = bench.queue.control(None, 10, PATIENCE)
    assert event.data == 5 and (event.flags & EOF or not LINUX)
    bench.receive()
    (event,) = bench.queue.control(None, 10, PATIENCE)
    assert event.data == 0 and event.flags & EOF
    bench.delete("read")
    bench.add("write")
    (event,) = bench.queue.control(None, 10, PATIENCE)
    assert event.data > 0 and not event.flags & EOF
    bench.delete("write")
    change = bench.kevent(bench.listener, READ, ADD)
    with socket.create_connection(bench.listener.getsockname()):
        (event,) = bench.queue.control([change], 10, PATIENCE)
    assert event.ident == bench.listener.fileno() and event.data == 1


def test_control(bench):
    """Python, kqueue.control: max_events from 0, timeout from 0, or None."""
    assert bench.queue.control(None, 0, None) == []
    assert bench.queue.control([], 10, 0) == []
    assert bench.queue.control([], 10, 0.01) == []
    for wrong in [(None, -1, 0), (None, 1, -1)]:
        with pytest.raises(ValueError):
            bench.queue.control(*wrong)
    bench.queue.close()
    assert bench.queue.closed
    with pytest.raises(ValueError):
        bench.queue.control(None, 0)
