"""kqueue where there is none, and a kqueue that makes trouble.

Put into `select` before a server runs, so that on Linux too the loop goes
through the lines that are meant for macOS and the BSDs:

    server --> TroubleQueue --> select.kqueue, or FakeQueue where there is none

FakeQueue plays kqueue(2) on poll(), for sockets, EVFILT_READ and EVFILT_WRITE,
EV_ADD and EV_DELETE. What else a program asks for, it refuses.

TroubleQueue writes down all that goes through, above all what the queue
refuses: then the program believes in a registration which is not there. It
also makes the trouble that a test asks for.
"""

import errno
import fcntl
import json
import math
import os
import resource
import select
import socket
import struct
import termios
import time

READ, WRITE = -1, -2
ADD, DELETE, ERROR, EOF = 0x1, 0x2, 0x4000, 0x8000

# ---- kqueue on poll() -------------------------------------------------------

GONE = select.POLLERR | select.POLLHUP  # poll() reports these unasked
NO_MORE = getattr(select, "POLLRDHUP", 0x2000)  # the other side's last byte
ASK = {READ: select.POLLIN | NO_MORE, WRITE: select.POLLOUT}


class FakeEvent:
    """What select.kevent is."""

    def __init__(
        self, ident, filter=READ, flags=ADD, fflags=0, data=0, udata=0
    ):
        self.ident = ident if isinstance(ident, int) else ident.fileno()
        if self.ident < 0:
            raise ValueError("file descriptor cannot be a negative integer")
        self.filter = filter
        self.flags = flags
        self.fflags = fflags
        self.data = data
        self.udata = udata


class FakeQueue:
    """What select.kqueue is.

    A registration belongs to a descriptor and a filter, and is gone when the
    descriptor is closed. So each is kept with the file it was made for: when
    the number leads to another file now, or to none, it has been closed.
    """

    def __init__(self):
        self.closed = False
        self.registered = {}  # (ident, filter): file

    def close(self):
        self.closed = True

    def control(self, changes, max_events, timeout=None):
        if self.closed:
            raise ValueError("I/O operation on closed kqueue object")
        if max_events < 0:
            raise ValueError("Length of eventlist must be 0 or positive")
        if timeout is not None and timeout < 0:
            raise ValueError("timeout must be positive or None")
        errors = []
        for change in changes or ():
            try:
                self.apply(change)
            except OSError as error:
                if len(errors) == max_events:
                    raise
                flags = change.flags | ERROR
                event = kevent(change.ident, change.filter, flags)
                event.data = error.errno
                errors.append(event)
        if errors or not max_events:
            return errors
        return self.wait(max_events, timeout)

    def apply(self, change):
        key = change.ident, change.filter
        file = file_of(change.ident)
        if file is None:
            raise OSError(errno.EBADF, "no such descriptor")
        if change.filter not in ASK or change.flags not in (ADD, DELETE):
            raise OSError(errno.EINVAL, "this fake does not play that")
        if change.flags == ADD:  # again is no error
            self.registered[key] = file
        elif self.registered.pop(key, None) != file:
            raise OSError(errno.ENOENT, "delete what is not there")

    def wait(self, max_events, timeout):
        end = None if timeout is None else time.monotonic() + timeout
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
            left = None
            if end is not None:
                left = math.ceil(max(0, end - time.monotonic()) * 1000)
            events = []
            for ident, ready in poll.poll(left):
                for filter, make in (READ, can_read), (WRITE, can_write):
                    if (ident, filter) in self.registered:
                        events += make(ident, ready)
            if events or left == 0:
                return events[:max_events]


def file_of(descriptor):
    """Return what tells one open file from any other, or None if closed."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def can_read(ident, ready):
    if not ready & (ASK[READ] | GONE):
        return []
    event = kevent(ident, READ, ADD)
    if ready & (NO_MORE | GONE):
        event.flags |= EOF
    event.fflags = socket_error(ready)
    try:
        event.data = ask_for_number(ident, termios.FIONREAD)
    except OSError:  # it listens; then this is the length of the backlog
        event.data = backlog(ident)
    return [event]


def can_write(ident, ready):
    if not ready & (ASK[WRITE] | GONE):
        return []
    event = kevent(ident, WRITE, ADD)
    if ready & GONE:
        event.flags |= EOF
    event.fflags = socket_error(ready)
    space = ask_socket(ident, socket.SO_SNDBUF)
    event.data = max(0, space - ask_for_number(ident, termios.TIOCOUTQ))
    return [event]


def socket_error(ready):
    # A guess. Asked for the error, Linux would tell, and forget it.
    return errno.ECONNRESET if ready & select.POLLERR else 0


def ask_for_number(descriptor, request):
    return struct.unpack("i", fcntl.ioctl(descriptor, request, bytes(4)))[0]


def backlog(descriptor):
    """Return how many wait for accept(): tcpi_unacked in Linux's tcp_info."""
    info = ask_socket(descriptor, socket.TCP_INFO, socket.IPPROTO_TCP, 28)
    return struct.unpack_from("I", info, 24)[0]


def ask_socket(descriptor, option, level=socket.SOL_SOCKET, *size):
    """Return what getsockopt() says of a descriptor."""
    blocking = os.get_blocking(descriptor)
    sock = socket.socket(fileno=descriptor)
    try:
        return sock.getsockopt(level, option, *size)
    finally:
        sock.detach()
        os.set_blocking(descriptor, blocking)  # PyPy has changed it


# ---- Trouble ----------------------------------------------------------------

kqueue = getattr(select, "kqueue", FakeQueue)
kevent = getattr(select, "kevent", FakeEvent)


class TroubleQueue:
    """A kqueue under watch, with the kinds of trouble that `kinds` names.

    "again"     every batch of events comes twice over in one, the clients'
                events before the listener's: what was true at first is stale
                the second time;
    "errors"    each event has an EV_ERROR in front of it; the first for each
                descriptor is one; and there is one for a number not in use;
    "spurious"  whenever there are events, all that is watched is reported
                as ready.
    """

    kinds = ()
    log = -1  # a descriptor

    def __init__(self):
        self.queue = kqueue()
        self.watched = set()  # what the program has added: (ident, filter)
        self.met = set()  # descriptors that have had an event

    def close(self):
        self.queue.close()

    def control(self, changes, max_events, timeout=None):
        changes = list(changes or ())
        try:
            events = self.queue.control(changes, max_events, timeout)
        except Exception as error:
            self.note("refused", map(fields, changes), repr(error))
            raise
        if changes and any(event.flags & ERROR for event in events):
            self.note("refused", map(fields, changes), "EV_ERROR")
        for change in changes:
            self.note("change", fields(change))
            key = change.ident, change.filter
            if change.flags & ADD:
                self.watched.add(key)
            else:
                self.watched.discard(key)
        if events:
            for kind in self.kinds:
                events = getattr(self, kind)(events)
            self.note("events", map(fields, events))
        return events

    def note(self, kind, what, why=None):
        what = list(what)
        os.write(self.log, json.dumps([kind, what, why]).encode() + b"\n")

    def again(self, events):
        listens = socket.SO_ACCEPTCONN
        events.sort(key=lambda event: ask_socket(event.ident, listens))
        return events + events

    def errors(self, events):
        result = [an_error(10_000, READ)]
        for event in events:
            result.append(an_error(event.ident, event.filter))
            if event.ident in self.met:
                result.append(event)
            self.met.add(event.ident)
        return result

    def spurious(self, events):
        ready = {(event.ident, event.filter) for event in events}
        more = sorted(self.watched - ready)
        return events + [kevent(*key, ADD) for key in more]


def fields(event):
    return event.ident, event.filter, event.flags, event.data


def an_error(ident, filter):
    event = kevent(ident, filter, ERROR)
    event.data = errno.ENOENT
    return event


# ---- What a server's process is to call before anything else ----------------


def install(log, kinds):
    """Have this process use a TroubleQueue. It writes to the file `log`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    TroubleQueue.log = os.open(log, flags, 0o600)
    TroubleQueue.kinds = kinds
    select.kqueue, select.kevent = TroubleQueue, kevent
    select.KQ_FILTER_READ, select.KQ_FILTER_WRITE = READ, WRITE
    select.KQ_EV_ADD, select.KQ_EV_DELETE = ADD, DELETE
    select.KQ_EV_ERROR, select.KQ_EV_EOF = ERROR, EOF
    if hasattr(select, "epoll"):
        del select.epoll


def accept_inherits(inherits):
    """Have accepted sockets inherit O_NONBLOCK, as on the BSDs, or not."""
    real = socket.socket.accept

    def accept(self):
        connection, address = real(self)
        blocking = not inherits or os.get_blocking(self.fileno())
        os.set_blocking(connection.fileno(), blocking)
        return connection, address

    socket.socket.accept = accept


def accept_without_address():
    """Have the first accept() return None for the address, as on macOS."""
    real = socket.socket.accept

    def accept(self):
        connection, address = real(self)
        socket.socket.accept = real
        return connection, None

    socket.socket.accept = accept


def limit_descriptors(number):
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))
