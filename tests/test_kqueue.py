"""The loop of 4_kqueue_loop.py against what kqueue does and epoll does not.

It runs over the kqueue that tests/fake_kqueue.py plays, which answers as a
real BSD kernel did: NetBSD's kern_event.c and TCP/IP, in user space on Linux.
"""

import errno
import os
import re
import select
import socket
import threading
import time

import pytest
from conftest import (
    array, arrived, bulk, frozen, load, ping, played, read_to_end, reset,
    wait_for,
)  # fmt: skip
from fake_kqueue import ADD, DELETE, EOF, ERROR, READ, WRITE, kevent, kqueue

pytestmark = pytest.mark.skipif(
    not hasattr(select, "epoll"), reason="plays kqueue on Linux's epoll"
)
VALUE = b"v" * 60_000


# ---- What is played ---------------------------------------------------------


class Queue(kqueue):
    def change(self, ident, filter, flags, max_events=0):
        return self.control([kevent(ident, filter, flags)], max_events, 0)

    def events(self, max_events=1024, timeout=0):
        return list(map(tuple, self.control(None, max_events, timeout)))


@pytest.fixture
def net():
    """A queue, a listener, and both sides of six connections to it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        clients = [socket.create_connection(address) for _ in range(6)]
        servers = [listener.accept()[0] for _ in clients]
        yield Queue(), listener, clients, servers
        for sock in clients + servers:
            sock.close()


def test_level_triggered(net):
    """Reported again and again, with the bytes that are left to read."""
    queue, _, (client, *_), (server, *_) = net
    five = server.fileno()
    assert queue.change(five, READ, ADD) == queue.events() == []
    started = time.monotonic()
    assert queue.events(timeout=0.1) == []
    assert time.monotonic() - started >= 0.09
    client.send(b"12345")
    arrived(client)
    assert queue.events() == queue.events() == [(five, READ, ADD, 0, 5)]
    server.recv(3)
    assert queue.change(five, READ, ADD) == []  # again is no error
    assert queue.events() == [(five, READ, ADD, 0, 2)]
    server.recv(2)
    assert queue.events() == queue.change(five, READ, DELETE) == []
    with pytest.raises(FileNotFoundError):
        queue.change(five, READ, DELETE)
    (error,) = queue.change(five, WRITE, DELETE, 1)
    assert (error.flags, error.data) == (ERROR, errno.ENOENT)
    with pytest.raises(OSError, match="Bad file descriptor"):
        queue.change(99, READ, ADD)


def test_order(net):
    """In the order in which they became ready; a few at a time, in turns.

    Each of the two filters is one of its own.
    """
    queue, _, clients, servers = net
    numbers = {sock.fileno(): n for n, sock in enumerate(servers)}
    for ident in numbers:
        queue.change(ident, READ, ADD)
    for number in 3, 1, 5, 0:
        clients[number].send(b"x")
        arrived(clients[number])

    def told(count=1024):
        return [numbers[event[0]] for event in queue.events(count)]

    assert told() == told() == [3, 1, 5, 0]
    assert [told(2) for _ in range(3)] == [[3, 1], [5, 0], [3, 1]]
    both = Queue()
    for filter in READ, WRITE:
        both.change(servers[0].fileno(), filter, ADD)
    filters = [both.events(1)[0][1] for _ in range(4)]
    assert filters in ([READ, WRITE] * 2, [WRITE, READ] * 2)


@pytest.mark.parametrize("filter", [READ, WRITE])
def test_ends(net, filter):
    """EV_EOF with bytes unread; at a reset with the error, too."""
    queue, _, (client, *_), (server, *_) = net
    client.send(b"1234")
    client.shutdown(socket.SHUT_WR)
    queue.change(server.fileno(), filter, ADD)

    def told(*flags):
        event = server.fileno(), filter, *flags
        wait_for(lambda: queue.events()[0][:4] == event, "the end is told")
        return filter == WRITE or queue.events()[0][4] == 4

    assert told(ADD | EOF if filter == READ else ADD, 0)
    reset(client)
    assert told(ADD | EOF, errno.ECONNRESET)
    assert filter == WRITE or server.recv(9) == b"1234"


def test_listener_and_numbers(net):
    """`data` is how many wait. A number is forgotten when it is closed."""
    queue, listener, clients, (server, other, *_) = net
    three, number = listener.fileno(), server.fileno()
    queue.change(three, READ, ADD)
    address = listener.getsockname()
    socks = [socket.create_connection(address) for _ in range(3)]
    for waiting in 3, 2, 1:
        assert queue.events() == [(three, READ, ADD, 0, waiting)]
        socks.append(listener.accept()[0])
    assert queue.events() == queue.change(number, READ, ADD) == []
    copy = os.dup(number)  # its file stays open: epoll would report it
    server.close()
    for client in clients[:2]:
        client.send(b"x")
        arrived(client)
        assert queue.events() == []
        os.dup2(other.fileno(), number)
    with pytest.raises(FileNotFoundError):
        queue.change(number, READ, DELETE)
    os.close(number)
    os.close(copy)


# ---- The loop on top of it --------------------------------------------------


@pytest.fixture
def loop(start, tmp_path):
    """Start 4 on the played kqueue.

    In the end, it has let all clients go, does not spin, has not failed (as
    it does when the queue refuses a change), and ends as it must.
    """
    shell = 'ulimit -n 16; exec "$0" "$@"'  # one of the tests needs it
    server = start("kqueue", prelude=played(tmp_path / "log"), shell=shell)
    server.log = tmp_path / "log"
    before = server.held_at_rest()
    yield server
    server.leave()
    wait_for(lambda: server.held() == before, "all are gone")
    with server.connect() as sock:
        wakeups = int(server.info(sock)["wakeups"])
        for _ in range(20):
            ping(sock)
        assert int(server.info(sock)["wakeups"]) - wakeups <= 25
    assert server.stdout().startswith("event loop on kqueue: ")
    server.stop()


def logged(server, kind, filters=(READ, WRITE), flag=ADD | DELETE):
    """Return (ident, filter, flags, fflags, data) of each change or event."""
    text = server.log.read_text().rpartition("\n")[0]
    lines = re.findall(rf"^{kind} (.*)", text, re.M)
    found = [tuple(map(int, line.split())) for line in lines]
    return [e for e in found if e[1] in filters and e[2] & flag]


def test_ends_and_closes(loop):
    """EVFILT_READ: EV_EOF may come with data still in the buffer.

    Who waits to write is not watched for reads, and later not for writes.
    close() removes the kevents: whoever gets the number begins anew.
    """
    loop.ask(array(b"SET", b"big", VALUE))
    with frozen(loop):
        sock, closed = loop.connect(4096), loop.connect()
        sock.sendall(b"INCR a\r\n" + b"GET big\r\n" * 50)
        closed.sendall(b"INCR b\r\n" * 2000)
        for one in sock, closed:
            arrived(one)
            one.shutdown(socket.SHUT_WR)
        closed.close()

    def writers():
        return logged(loop, "change", [WRITE], ADD)

    ident = wait_for(writers, "it waits to write")[0][0]
    assert read_to_end(sock) == b":1\r\n" + bulk(VALUE) * 50
    all_done = bulk(b"2000")
    wait_for(lambda: loop.ask(b"GET b\r\n") == all_done, "it is carried out")
    assert any(event[4] for event in logged(loop, "event", [READ], EOF))
    changes = [c[1:3] for c in logged(loop, "change") if c[0] == ident]
    turn = changes.index((READ, DELETE))
    assert changes[turn + 1 : turn + 3] == [(WRITE, ADD), (WRITE, DELETE)]
    for count in 1, 2, 3:
        gone, writer = loop.connect(), loop.connect(receive_buffer=4096)
        writer.sendall(b"GET big\r\n" * 200)
        wait_for(lambda: len(writers()) > count, "it waits to write")
        ping(gone)
        reset(writer)
        gone.close()
        for sock in [loop.connect() for _ in range(3)]:
            ping(sock)
            sock.sendall(b"*x\r\n")
            assert read_to_end(sock).startswith(b"-ERR Protocol error")
        assert len(logged(loop, "event", [WRITE], EOF)) >= count


def test_no_descriptor_is_free(loop):
    """The listener is not watched for a while, then again."""
    socks = [loop.connect() for _ in range(25)]
    wait_for(lambda: "cannot accept" in loop.stderr(), "it is short of them")
    for sock in socks:
        ping(sock)  # by now it has been accepted
        sock.close()
    changes = logged(loop, "change")
    changes = [c[2] for c in changes if c[0] == changes[0][0]]  # the listener
    assert changes[:3] == [ADD, DELETE, ADD]
    assert 0 <= changes.count(ADD) - changes.count(DELETE) <= 1


def test_clients_are_forgotten():
    """What the loop keeps of a client goes with it, not with its successor."""
    server = load("kqueue").TCPServer("127.0.0.1", 0)
    threading.Thread(target=server.loop.run, daemon=True).start()
    with socket.create_connection(server.listener.getsockname(), 10) as sock:
        ping(sock)
        assert len(server.loop.clients) == 1
    wait_for(lambda: not server.loop.clients, "the client is forgotten")
