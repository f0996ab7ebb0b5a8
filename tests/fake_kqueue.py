"""kqueue(2) where there is none: for sockets, played on Linux's epoll.

Put into `select` before 4_kqueue_loop.py runs, so that on Linux too the loop
goes through the lines that are meant for macOS and the BSDs. It plays
EVFILT_READ and EVFILT_WRITE with EV_ADD and EV_DELETE, and answers as a real
BSD kernel did (NetBSD's, in user space); test_kqueue.py has these answers.
"""

import collections
import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import termios
import time

READ, WRITE = -1, -2
ADD, DELETE, ERROR, EOF = 0x1, 0x2, 0x4000, 0x8000
epoll = getattr(select, "epoll", None)
RDHUP = getattr(select, "EPOLLRDHUP", 0x2000)  # PyPy does not name it

# What select.kevent is.
fields = "ident filter flags fflags data"
kevent = collections.namedtuple("kevent", fields, defaults=(READ, ADD, 0, 0))


class kqueue:
    """What select.kqueue is.

    A registration belongs to a descriptor and a filter, and is gone when the
    descriptor is closed. So each is kept with the file it was made for: when
    the number leads to another file now, or to none, it has been closed.
    """

    log = None  # a file that gets a line for each change and event

    def __init__(self):
        self.files = {}  # (ident, filter): file
        self.active = []  # keys of those that are ready, in that order
        self.epolls = {READ: epoll(), WRITE: epoll()}  # they keep the order

    def control(self, changes, max_events, timeout=None):
        events = []
        for change in changes or ():
            self.note("change", change)
            number = self.apply(change)
            if number and not max_events:
                raise OSError(number, os.strerror(number))
            if number:
                events.append(change._replace(flags=ERROR, data=number))
        if max_events and not events:
            events = self.wait(max_events, timeout)
        for event in events:
            self.note("event", event)
        return events

    def note(self, kind, what):
        if self.log:
            print(kind, *what, file=self.log, flush=True)

    def apply(self, change):
        """Make a change; return 0, or the number of the error."""
        key, file = (change.ident, change.filter), file_of(change.ident)
        if file is None:
            return errno.EBADF
        if change.filter not in (READ, WRITE):
            return errno.EINVAL
        there = self.files.get(key) == file
        if change.flags == ADD and not there:  # again is no error
            mask = {READ: select.EPOLLIN | RDHUP}
            mask = mask.get(change.filter, select.EPOLLOUT)
            self.epolls[change.filter].register(change.ident, mask)
            self.files[key] = file
        elif change.flags == DELETE:
            if not there:
                return errno.ENOENT
            self.epolls[change.filter].unregister(change.ident)
            del self.files[key]
        return 0

    def wait(self, max_events, timeout):
        """Return the first that are ready, and put them behind the others."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            ready = {}
            for filter, queue in self.epolls.items():
                for ident, mask in queue.poll(0, 10_000):
                    if self.files.get((ident, filter)) == file_of(ident):
                        ready[ident, filter] = mask
            self.active = [key for key in self.active if key in ready]
            self.active += [key for key in ready if key not in self.active]
            left = None if end is None else max(0, end - time.monotonic())
            if self.active or left == 0:
                first = self.active[:max_events]
                self.active = self.active[max_events:] + first
                return [event_of(*key, ready[key]) for key in first]
            select.select(list(self.epolls.values()), [], [], left)


def event_of(ident, filter, mask):
    """Return the event of a filter, from what epoll says of its descriptor."""
    ends = select.EPOLLHUP | select.EPOLLERR
    ends |= RDHUP if filter == READ else 0
    flags = ADD | (EOF if mask & ends else 0)
    fflags = errno.ECONNRESET if mask & select.EPOLLERR else 0
    sock = socket.socket(fileno=ident)
    if filter == WRITE:
        room = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        data = max(0, room - ask(sock, termios.TIOCOUTQ))
    else:
        try:
            data = ask(sock, termios.FIONREAD)
        except OSError:  # it listens: how many wait for accept
            told = sock.getsockopt(socket.SOL_TCP, socket.TCP_INFO, 104)
            (data,) = struct.unpack_from("I", told, 24)
    sock.detach()  # it is not ours
    return kevent(ident, filter, flags, fflags, data)


def ask(sock, what):
    return struct.unpack("i", fcntl.ioctl(sock, what, bytes(4)))[0]


def file_of(descriptor):
    """Return what tells one open file from any other, or None if closed."""
    with contextlib.suppress(OSError):
        status = os.fstat(descriptor)
        return status.st_dev, status.st_ino


# ---- What a server's process is to call before anything else ----------------


def install(log):
    """Have this process use this kqueue. It writes to the file `log`."""
    kqueue.log = open(log, "a")
    select.kqueue, select.kevent = kqueue, kevent
    select.KQ_FILTER_READ, select.KQ_FILTER_WRITE = READ, WRITE
    select.KQ_EV_ADD, select.KQ_EV_DELETE = ADD, DELETE
    if hasattr(select, "epoll"):
        del select.epoll
