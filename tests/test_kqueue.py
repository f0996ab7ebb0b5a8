"""The loop of 4_kqueue_loop.py against what kqueue does and epoll does not.

It runs over the kqueue that tests/fake_kqueue.py plays, which answers as a
real BSD kernel did: NetBSD's kern_event.c and TCP/IP, in user space on Linux.
"""

import errno
import gc
import itertools
import os
import re
import select
import socket
import threading
import time
from contextlib import suppress

import pytest
import test_faults
from conftest import (
    PATIENCE, arrived, load, ping, played, read_to_end, reset, wait_for,
)  # fmt: skip
from fake_kqueue import ADD, DELETE, EOF, ERROR, READ, WRITE, kevent, kqueue

pytestmark = pytest.mark.skipif(
    not hasattr(select, "epoll"), reason="plays kqueue on Linux's epoll"
)


@pytest.fixture
def net():
    """A queue, a listener, and both sides of six connections to it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        clients = [socket.create_connection(address) for _ in range(6)]
        servers = [listener.accept()[0] for _ in clients]
        yield kqueue(), listener, clients, servers
        for sock in clients + servers:
            sock.close()


def test_connection(net):
    """Reported again and again, with the bytes that are left to read.

    So at the end, with EV_EOF; at a reset with the error, too. Each of the two
    filters is one of its own.
    """
    queue, _, (client, *_), (server, *_) = net
    five = server.fileno()
    add, delete = kevent(five, READ, ADD), kevent(five, READ, DELETE)
    assert queue.control([add], 0) == queue.control(None, 9, 0) == []
    started = time.monotonic()
    assert queue.control(None, 9, 0.1) == []
    assert time.monotonic() - started >= 0.09
    client.send(b"12345")
    arrived(client)
    for _ in range(2):
        assert queue.control(None, 9, 0) == [(five, READ, ADD, 0, 5)]
    server.recv(3)
    assert queue.control([add], 0) == []  # again is no error
    assert queue.control(None, 9, 0) == [(five, READ, ADD, 0, 2)]
    server.recv(2)
    assert queue.control(None, 9, 0) == queue.control([delete], 0) == []
    with pytest.raises(FileNotFoundError):
        queue.control([delete], 0)
    (error,) = queue.control([kevent(five, WRITE, DELETE)], 1, 0)
    assert error == (five, WRITE, ERROR, 0, errno.ENOENT)
    with pytest.raises(OSError, match="Bad file descriptor"):
        queue.control([kevent(99, READ, ADD)], 0)
    room = server.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    queue.control([kevent(five, READ, ADD), kevent(five, WRITE, ADD)], 0)

    def told():
        return queue.control(None, 1, 0) + queue.control(None, 1, 0)

    client.send(b"1234")
    client.shutdown(socket.SHUT_WR)
    half = {(five, READ, ADD | EOF, 0, 4), (five, WRITE, ADD, 0, room)}
    wait_for(lambda: set(told()) == half, "the end is told")
    assert told() == told()  # one filter after the other, in turns
    reset(client)
    error = ADD | EOF, errno.ECONNRESET
    gone = {(five, READ, *error, 4), (five, WRITE, *error, room)}
    wait_for(lambda: set(told()) == gone, "the reset is told")
    assert server.recv(9) == b"1234"


def test_order(net):
    """In the order in which they became ready; a few at a time, in turns."""
    queue, _, clients, servers = net
    numbers = {sock.fileno(): n for n, sock in enumerate(servers)}
    queue.control([kevent(ident, READ, ADD) for ident in numbers], 0)
    for number in 3, 1, 5, 0:
        clients[number].send(b"x")
        arrived(clients[number])

    def told(count):
        return [numbers[e.ident] for e in queue.control(None, count, 0)]

    assert told(9) == told(9) == [3, 1, 5, 0]
    assert [told(2) for _ in range(3)] == [[3, 1], [5, 0], [3, 1]]


def test_listener_and_numbers(net):
    """`data` is how many wait. A number is forgotten when it is closed."""
    queue, listener, clients, (server, other, *_) = net
    three, number = listener.fileno(), server.fileno()
    queue.control([kevent(three, READ, ADD)], 0)
    address = listener.getsockname()
    socks = [socket.create_connection(address) for _ in range(3)]
    for waiting in 3, 2, 1:
        assert queue.control(None, 9, 0) == [(three, READ, ADD, 0, waiting)]
        socks.append(listener.accept()[0])
    assert queue.control(None, 9, 0) == []
    assert queue.control([kevent(number, READ, ADD)], 0) == []
    copy = os.dup(number)  # its file stays open: epoll would report it
    server.close()
    for client in clients[:2]:
        client.send(b"x")
        arrived(client)
        assert queue.control(None, 9, 0) == []
        os.dup2(other.fileno(), number)
    with pytest.raises(FileNotFoundError):
        queue.control([kevent(number, READ, DELETE)], 0)
    os.close(number)
    os.close(copy)


@pytest.fixture
def loop(start, tmp_path):
    """Start 4 on the played kqueue.

    In the end, it has let all clients go, does not spin, has not failed (as
    it does when the queue refuses a change), and ends as it must.
    """
    shell = 'ulimit -n 32; exec "$0" "$@"'  # one of the tests needs it
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


def logged(server, kind):
    """Return all that the queue has told ("event"), or was told ("change")."""
    lines = re.findall(rf"^{kind} (.*)\n", server.log.read_text(), re.M)
    return [kevent(*map(int, line.split())) for line in lines]


def test_connections_that_break(loop):
    """As in test_faults.py, and what is different in kqueue has occurred.

    EV_EOF may come with data still in the buffer, and close() removes kevents.
    Who waits to write is not watched for reads, and later not for writes.
    """
    test_faults.test_connections_that_break(loop)
    ends = [event for event in logged(loop, "event") if event.flags & EOF]
    assert any(event.filter == READ and event.data for event in ends)
    assert any(event.filter == WRITE for event in ends)  # reset meanwhile
    changes = logged(loop, "change")
    turns = {
        (old.ident == new.ident, old[1:3], new[1:3])
        for old, new in zip(changes, changes[1:])
        if old.flags == DELETE or new[1:3] == (WRITE, ADD)
    }
    to_write = True, (READ, DELETE), (WRITE, ADD)
    to_read = True, (WRITE, DELETE), (READ, ADD)
    assert turns == {to_write, to_read}


def test_no_descriptor_is_free(loop):
    """The listener is not watched for a while, then again."""
    socks = [loop.connect() for _ in range(40)]
    wait_for(lambda: "cannot accept" in loop.stderr(), "it is short of them")
    for sock in socks:
        ping(sock)  # by now it has been accepted
        sock.close()
    listener, *changes = logged(loop, "change")
    flags = [c.flags for c in changes if c.ident == listener.ident]
    assert flags[:2] == [DELETE, ADD]
    assert 0 <= flags.count(DELETE) - flags.count(ADD) <= 1


def test_clients_are_forgotten():
    """What the loop keeps of a client goes with it, however it ends.

    If a client cannot be watched, that one ends, and not the loop.
    """
    loop = load("kqueue").TCPServer("127.0.0.1", 0).loop
    watch, changes = loop.watch, itertools.count(1)

    def watch_if_there_is_room(*change):
        gc.collect()  # PyPy closes what is dropped when it likes
        # Full for the first client, and for one that is to wait for room.
        if next(changes) in (1, 6):
            raise OSError(errno.ENOSPC, "no room to watch")
        watch(*change)

    loop.watch = watch_if_there_is_room
    threading.Thread(target=loop.run, daemon=True).start()
    where = loop.listener.getsockname(), PATIENCE
    with socket.create_connection(*where) as sock:
        assert sock.recv(1) == b""  # it is let go
    with socket.create_connection(*where) as sock:
        ping(sock)  # changes 2 to 4: the listener, off and on, and this one
        sock.sendall(test_faults.SET_BIG + b"GET big\r\n" * 50)  # 5 and 6
        with suppress(ConnectionError):
            assert len(read_to_end(sock)) < 50 * len(test_faults.BIG)
    with socket.create_connection(*where) as sock:
        ping(sock)
        assert len(loop.clients) == 1
    wait_for(lambda: not loop.clients, "the client is forgotten")
