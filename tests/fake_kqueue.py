"""kqueue(2) where there is none: for sockets, played on poll().

Put into `select` before 4_kqueue_loop.py runs, so that on Linux too the loop
goes through the lines that are meant for macOS and the BSDs. It plays
EVFILT_READ and EVFILT_WRITE with EV_ADD and EV_DELETE, and refuses the rest.
"""

import collections
import contextlib
import errno
import fcntl
import math
import os
import select
import socket  # noqa: F401  looks for kqueue, so before install()
import struct
import termios
import time

READ, WRITE = -1, -2
ADD, DELETE, EOF = 0x1, 0x2, 0x8000
GONE = select.POLLERR | select.POLLHUP  # poll() reports these unasked
NO_MORE = getattr(select, "POLLRDHUP", 0x2000)  # the other side's last byte
ASK = {READ: select.POLLIN | NO_MORE, WRITE: select.POLLOUT}


# What select.kevent is.
fields = "ident filter flags data"
kevent = collections.namedtuple("kevent", fields, defaults=(READ, ADD, 0))


class kqueue:
    """What select.kqueue is.

    A registration belongs to a descriptor and a filter, and is gone when the
    descriptor is closed. So each is kept with the file it was made for: when
    the number leads to another file now, or to none, it has been closed.
    """

    log = None  # a file that gets a line for each change and event

    def __init__(self):
        self.registered = {}  # (ident, filter): file

    def control(self, changes, max_events, timeout=None):
        assert not (changes and max_events), "this fake does not play that"
        for change in changes or ():
            self.apply(change)
            self.note("change", change)
        events = self.wait(max_events, timeout) if max_events else []
        for event in events:
            self.note("event", event)
        return events

    def note(self, kind, what):
        if self.log:
            print(kind, *what, file=self.log, flush=True)

    def apply(self, change):
        key, file = (change.ident, change.filter), file_of(change.ident)
        if file is None:
            raise OSError(errno.EBADF, "no such descriptor")
        if change.filter not in ASK or change.flags not in (ADD, DELETE):
            raise OSError(errno.EINVAL, "this fake does not play that")
        if change.flags == ADD:  # again is no error
            self.registered[key] = file
        elif self.registered.pop(key, None) != file:
            raise OSError(errno.ENOENT, "delete what is not there")

    def wait(self, max_events, timeout):
        end = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            masks = {}
            for (ident, filter), file in list(self.registered.items()):
                if file_of(ident) == file:
                    masks[ident] = masks.get(ident, 0) | ASK[filter]
                else:
                    del self.registered[ident, filter]
            poll = select.poll()
            for ident, mask in masks.items():
                poll.register(ident, mask)
            left = max(0, min(end - time.monotonic(), 3600))
            ready = dict(poll.poll(math.ceil(left * 1000)))
            events = [
                event_of(ident, filter, ready.get(ident, 0))
                for ident, filter in sorted(self.registered)
                if ready.get(ident, 0) & (ASK[filter] | GONE)
            ]
            if events or not left:
                return events[:max_events]


def event_of(ident, filter, ready):
    """Return the event for a descriptor that poll() says is `ready`."""
    ends = GONE | NO_MORE if filter == READ else GONE
    data = 1
    with contextlib.suppress(OSError):  # it listens: data is how many wait
        number = fcntl.ioctl(ident, termios.FIONREAD, bytes(4))
        data = struct.unpack("i", number)[0] if filter == READ else 1
    return kevent(ident, filter, ADD | (EOF if ready & ends else 0), data)


def file_of(descriptor):
    """Return what tells one open file from any other, or None if closed."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
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
