"""The loop of 4_kqueue_loop.py against what kqueue does and epoll does not.

On Linux the lines for macOS and the BSDs do not run. Here they do, over the
kqueue that tests/fake_kqueue.py plays. What it plays, a real BSD kernel has
answered: NetBSD's kern_event.c and TCP/IP, run in user space on Linux.
"""

import errno
import fcntl
import os
import select
import socket
import time

import pytest
from conftest import (
    HERE, array, arrived, bulk, frozen, ping, read_to_end, reset, wait_for,
)  # fmt: skip
from fake_kqueue import ADD, DELETE, EOF, ERROR, READ, WRITE, kevent, kqueue

pytestmark = pytest.mark.skipif(
    not hasattr(select, "epoll"), reason="plays kqueue on Linux's epoll"
)
VALUE = b"v" * 60_000


# ---- What is played ---------------------------------------------------------


@pytest.fixture
def queue():
    return kqueue()


@pytest.fixture
def pair():
    """A connection: the client's side, and the server's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), 10)
        server = listener.accept()[0]
    with client, server:
        yield client, server


def change(queue, sock, filter, flags, max_events=0):
    return queue.control([kevent(sock.fileno(), filter, flags)], max_events, 0)


def events(queue, max_events=1024, timeout=0):
    return [tuple(event) for event in queue.control(None, max_events, timeout)]


def test_level_triggered(queue, pair):
    """Reported again and again, with the bytes that are left to read."""
    client, server = pair
    five = server.fileno()
    assert change(queue, server, READ, ADD) == events(queue) == []
    started = time.monotonic()
    assert events(queue, timeout=0.1) == []
    assert time.monotonic() - started >= 0.09
    client.send(b"12345")
    for left in 5, 5, 2:
        if left == 2:
            server.recv(3)
        wait_for(lambda: events(queue), "reported")
        assert events(queue) == [(five, READ, ADD, 0, left)]
    assert change(queue, server, READ, ADD) == []  # again is no error
    server.recv(2)
    assert events(queue) == []
    assert change(queue, server, READ, DELETE) == []
    with pytest.raises(FileNotFoundError):
        change(queue, server, READ, DELETE)
    (error,) = change(queue, server, WRITE, DELETE, 1)
    assert (error.flags, error.data) == (ERROR, errno.ENOENT)
    with pytest.raises(OSError) as caught:
        queue.control([kevent(99, READ, ADD)], 0)
    assert caught.value.errno == errno.EBADF


def test_filters_and_order(queue, pair):
    """Each filter is one of its own; who was reported goes to the end."""
    client, server = pair
    client.send(b"123")
    change(queue, server, READ, ADD)
    change(queue, server, WRITE, ADD)
    wait_for(lambda: len(events(queue)) == 2, "both are ready")
    taken = [events(queue, 1)[0][1] for _ in range(4)]
    assert taken in ([READ, WRITE] * 2, [WRITE, READ] * 2)


def test_order_in_which_they_became_ready(queue):
    """Reported in that order; two at a time, they take turns."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        clients = [socket.create_connection(address) for _ in range(6)]
        servers = [listener.accept()[0] for _ in clients]
        for sock in servers:
            change(queue, sock, READ, ADD)
        order = [3, 1, 5, 0]
        for number in order:
            clients[number].send(b"x")
            arrived(clients[number])
        numbers = {sock.fileno(): n for n, sock in enumerate(servers)}

        def reported(count=1024):
            return [numbers[event[0]] for event in events(queue, count)]

        assert reported() == reported() == order
        assert [reported(2) for _ in range(3)] == [[3, 1], [5, 0], [3, 1]]
        for sock in clients + servers:
            sock.close()


@pytest.mark.parametrize("filter", [READ, WRITE])
def test_ends(queue, pair, filter):
    """EV_EOF with bytes unread; at a reset with the error, too."""
    client, server = pair
    client.send(b"1234")
    client.shutdown(socket.SHUT_WR)
    change(queue, server, filter, ADD)
    ident, flags = server.fileno(), ADD | (EOF if filter == READ else 0)
    wait_for(lambda: events(queue)[0][2] == flags, "the end of file")
    ((*event, data),) = events(queue)
    assert event == [ident, filter, flags, 0] and (filter != READ or data == 4)
    reset(client)
    wait_for(lambda: events(queue)[0][3], "the reset")
    ((*event, data),) = events(queue)
    assert event == [ident, filter, ADD | EOF, errno.ECONNRESET]
    assert filter != READ or (data == 4 and server.recv(9) == b"1234")


def test_listener_and_numbers(queue, pair):
    """`data` is how many wait. A closed number is forgotten, used again or not."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        change(queue, listener, READ, ADD)
        socks = [socket.create_connection(address) for _ in range(3)]
        for waiting in 3, 2, 1:
            assert events(queue) == [(listener.fileno(), READ, ADD, 0, waiting)]
            socks.append(listener.accept()[0])
        assert events(queue) == []
    client, server = pair
    change(queue, server, READ, ADD)
    number = server.fileno()
    server.close()
    assert events(queue) == []
    assert fcntl.fcntl(socks[-1], fcntl.F_DUPFD, number) == number
    socks[2].send(b"x")
    arrived(socks[2])
    assert events(queue) == []
    with pytest.raises(FileNotFoundError):
        queue.control([kevent(number, READ, DELETE)], 0)
    os.close(number)
    for sock in socks:
        sock.close()


# ---- The loop on top of it --------------------------------------------------


@pytest.fixture
def loop(start, tmp_path):
    """Start 4 on the played kqueue.

    In the end, it has let all clients go, does not spin, has not failed (as
    it does when the queue refuses a change), and ends as it must.
    """
    log = tmp_path / "log"
    prelude = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from fake_kqueue import *
install({str(log)!r})
"""
    shell = 'ulimit -n 16; exec "$0" "$@"'  # one of the tests needs it
    server = start("kqueue", prelude=prelude, shell=shell)
    server.log = log
    before = server.held_at_rest()
    yield server
    for sock in server.sockets:
        sock.close()
    wait_for(lambda: server.held() == before, "all are gone")
    with server.connect() as sock:
        wakeups = int(server.info(sock)["wakeups"])
        for _ in range(20):
            ping(sock)
        assert int(server.info(sock)["wakeups"]) - wakeups <= 25
    assert server.stdout().startswith("event loop on kqueue: ")
    server.stop()


def logged(server, kind):
    """Return (ident, filter, flags, fflags, data) of each change or event."""
    lines = server.log.read_text().rpartition("\n")[0].splitlines()
    words = [line.split() for line in lines]
    return [tuple(map(int, word[1:])) for word in words if word[0] == kind]


def added(server, filter):
    changes = logged(server, "change")
    return [change[0] for change in changes if change[1:3] == (filter, ADD)]


def ask_and_not_read(server):
    """Return a connection that is owed more than the kernel takes."""
    server.ask(array(b"SET", b"big", VALUE))
    sock = server.connect(receive_buffer=4096)
    before = len(added(server, WRITE))
    sock.sendall(b"GET big\r\n" * 200)
    wait_for(lambda: len(added(server, WRITE)) > before, "it waits to write")
    return sock


def test_end_with_bytes_unread(loop):
    """EVFILT_READ: EV_EOF may come with data still in the buffer."""
    loop.ask(array(b"SET", b"big", VALUE))
    with frozen(loop):
        sock, closed = loop.connect(4096), loop.connect()
        sock.sendall(b"INCR a\r\n" + b"GET big\r\n" * 50)
        closed.sendall(b"INCR b\r\n" * 2000)
        for one in sock, closed:
            arrived(one)
            one.shutdown(socket.SHUT_WR)
        closed.close()
    wait_for(lambda: added(loop, WRITE), "it waits to write")
    assert read_to_end(sock) == b":1\r\n" + bulk(VALUE) * 50
    all_done = bulk(b"2000")
    wait_for(lambda: loop.ask(b"GET b\r\n") == all_done, "it is carried out")
    events = logged(loop, "event")
    assert [e for e in events if e[1] == READ and e[2] & EOF and e[4] > 0]


def test_filters_are_separate(loop):
    """Who waits to write is not watched for reads, and later not for writes."""
    sock = ask_and_not_read(loop)
    ident = added(loop, WRITE)[-1]
    sock.shutdown(socket.SHUT_WR)
    assert read_to_end(sock) == 200 * bulk(VALUE)
    flags = [
        change[1:3]
        for change in logged(loop, "change")
        if change[0] == ident and change[1] == WRITE or change[2] == DELETE
    ]
    assert flags[:2] == [(READ, DELETE), (WRITE, ADD)]
    assert (WRITE, DELETE) in flags


def test_closing_drops_registrations(loop):
    """close() removes the kevents: whoever gets the number begins anew."""
    for _ in range(3):
        gone, writer = loop.connect(), ask_and_not_read(loop)
        ident = added(loop, WRITE)[-1]
        ping(gone)
        reset(writer)
        gone.close()
        for sock in [loop.connect() for _ in range(3)]:
            ping(sock)
            sock.sendall(b"*x\r\n")
            assert read_to_end(sock).startswith(b"-ERR Protocol error")
        events = [e for e in logged(loop, "event") if e[0] == ident]
        assert [e for e in events if e[1] == WRITE and e[2] & EOF]


def test_no_descriptor_is_free(loop):
    """The listener is not watched for a while, then again."""
    socks = [loop.connect() for _ in range(25)]
    wait_for(lambda: "cannot accept" in loop.stderr(), "it is short of them")
    listener = logged(loop, "change")[0][0]
    for sock in socks:
        ping(sock)  # by now it has been accepted
        sock.close()
    changes = [c[2] for c in logged(loop, "change") if c[0] == listener]
    assert changes[:3] == [ADD, DELETE, ADD]
    assert 0 <= changes.count(ADD) - changes.count(DELETE) <= 1
