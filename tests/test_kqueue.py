"""The loop of 4_kqueue_loop.py against what kqueue does and epoll does not.

On Linux the lines for macOS and the BSDs do not run. Here they do, over the
kqueue that tests/fake_kqueue.py plays. What it plays stands in kqueue(2):

    FreeBSD   https://man.freebsd.org/cgi/man.cgi?query=kqueue&sektion=2
    macOS     https://github.com/apple-oss-distributions/xnu,
              bsd/man/man2/kqueue.2
"""

import select
import socket

import pytest
from conftest import (
    HERE, array, arrived, bulk, frozen, ping, read_to_end, reset, wait_for,
)  # fmt: skip
from fake_kqueue import ADD, DELETE, EOF, READ, WRITE

pytestmark = pytest.mark.skipif(
    not hasattr(select, "epoll"), reason="plays kqueue on Linux's poll"
)
VALUE = b"v" * 60_000


@pytest.fixture
def loop(start, tmp_path):
    """Start 4 on the played kqueue.

    In the end, it has let all clients go, does not spin, has not failed (as
    it does when the queue refuses a change), and stops as it must.
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
    yield server
    for sock in server.sockets:
        sock.close()
    with server.connect() as sock:
        wait_for(lambda: server.info(sock)["connected_clients"] == "1", "gone")
        before = int(server.info(sock)["wakeups"])
        for _ in range(20):
            ping(sock)
        assert int(server.info(sock)["wakeups"]) - before <= 25
    server.stop().check()


def logged(server, kind):
    """Return (ident, filter, flags, data) of each "change" or "event"."""
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
        closed.sendall(b"INCR b\r\n" * 9000)
        for one in sock, closed:
            arrived(one)
            one.shutdown(socket.SHUT_WR)
        closed.close()
    wait_for(lambda: added(loop, WRITE), "it waits to write")
    assert read_to_end(sock) == b":1\r\n" + bulk(VALUE) * 50
    all_done = bulk(b"9000")
    wait_for(lambda: loop.ask(b"GET b\r\n") == all_done, "it is carried out")
    events = logged(loop, "event")
    assert [e for e in events if e[1] == READ and e[2] & EOF and e[3] > 0]


def test_filters_are_separate(loop):
    """EV_ADD, EV_DELETE: each filter of a descriptor is one of its own.

    Who waits to write is not watched for reads, and later not for writes.
    """
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
    """close() removes the kevents: whoever gets the number begins anew.

    EVFILT_WRITE: EV_EOF is set when the reader disconnects.
    """
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
    """EV_ADD again is no error; EV_DELETE of what is not there is ENOENT."""
    socks = [loop.connect() for _ in range(25)]
    wait_for(lambda: "cannot accept" in loop.stderr(), "it is short of them")
    listener = logged(loop, "change")[0][0]
    for sock in socks:
        ping(sock)  # by now it has been accepted
        sock.close()
    changes = logged(loop, "change")
    assert [c for c in changes if c[0] == listener and c[2] == DELETE]
