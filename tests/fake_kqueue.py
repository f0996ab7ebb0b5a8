"""kqueue(2) where there is none: for sockets, played on Linux's epoll.

With it 4_kqueue_loop.py goes through its lines for macOS and the BSDs. It
plays EVFILT_READ and EVFILT_WRITE with EV_ADD and EV_DELETE, and answers as a
real BSD kernel did (NetBSD's, in user space): see test_kqueue.py.
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
IN, OUT, ERR, HUP, RDHUP = 0x1, 0x4, 0x8, 0x10, 0x2000  # those of epoll
MASKS = {READ: IN | RDHUP, WRITE: OUT}  # it adds ERR and HUP to each
epoll = getattr(select, "epoll", None)

fields = "ident filter flags fflags data"
kevent = collections.namedtuple("kevent", fields, defaults=(READ, ADD, 0, 0))


class kqueue:
    """What select.kqueue is.

    A registration ends when its descriptor is closed, and epoll's when its
    file is. So the file is kept: the number may lead to another one by now.
    """

    log = None  # a file for a line of each change and event; stdout if None

    def __init__(self):
        self.files = {}  # (ident, filter): file
        self.active = []  # keys of those that are ready, in that order
        self.epolls = {READ: epoll(), WRITE: epoll()}  # they keep the order

    def control(self, changes, max_events, timeout=None):
        events = []
        for change in changes or ():
            print("change", *change, file=self.log, flush=True)
            try:
                self.apply(*change[:3])
            except OSError as error:
                if not max_events:
                    raise
                events.append(change._replace(flags=ERROR, data=error.errno))
        if max_events and not events:
            events = self.wait(max_events, timeout)
        for event in events:
            print("event", *event, file=self.log, flush=True)
        return events

    def apply(self, ident, filter, flags):
        """Make a change. It fails as epoll fails: ENOENT, EBADF."""
        if flags == DELETE:
            self.epolls[filter].unregister(ident)
        else:
            with contextlib.suppress(FileExistsError):  # again is no error
                self.epolls[filter].register(ident, MASKS[filter])
            self.files[ident, filter] = file_of(ident)

    def wait(self, max_events, timeout):
        """Return the first that are ready, and put them behind the others."""
        end = time.monotonic() + (10**9 if timeout is None else timeout)
        while not (ready := self.ready()) and time.monotonic() < end:
            left = max(0, end - time.monotonic())  # seconds
            select.select(self.epolls.values(), [], [], left)
        keys = [key for key in self.active if key in ready]
        keys += [key for key in ready if key not in keys]
        self.active = keys[max_events:] + keys[:max_events]
        return [event_of(*key, ready[key]) for key in keys[:max_events]]

    def ready(self):
        """Return what epoll says of each that is open: {key: mask}."""
        return {
            (ident, filter): mask
            for filter, queue in self.epolls.items()
            for ident, mask in queue.poll(0, 10_000)
            if self.files.get((ident, filter)) == file_of(ident)
        }


def event_of(ident, filter, mask):
    """Return the event of a filter, from what epoll says of its descriptor."""
    sock = socket.socket(fileno=ident)
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        told = sock.getsockopt(socket.SOL_TCP, socket.TCP_INFO, 104)
        (data,) = struct.unpack_from("I", told, 24)  # how many wait
    else:
        what = termios.FIONREAD if filter == READ else termios.TIOCOUTQ
        (data,) = struct.unpack("i", fcntl.ioctl(sock, what, bytes(4)))
    if filter == WRITE:  # what there is room for, beside what is under way
        room = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        data = max(0, room - data)
    sock.detach()  # it is not ours
    flags = ADD | (EOF if mask & (ERR | HUP | RDHUP) else 0)
    fflags = errno.ECONNRESET if mask & ERR else 0
    return kevent(ident, filter, flags, fflags, data)


def file_of(descriptor):
    """Return what tells one open file from any other, or None if closed."""
    with contextlib.suppress(OSError):
        status = os.fstat(descriptor)
        return status.st_dev, status.st_ino


def install(log):
    """Have this process use this kqueue. It writes to the file `log`."""
    if not epoll:
        return  # there is a real one
    kqueue.log = open(log, "a")
    select.kqueue, select.kevent = kqueue, kevent
    select.KQ_FILTER_READ, select.KQ_FILTER_WRITE = READ, WRITE
    select.KQ_EV_ADD, select.KQ_EV_DELETE = ADD, DELETE
    del select.epoll
