"""Runs a server script, unchanged, and writes down where its threads wait.

Start it:  python3 recorder.py RECORD SCRIPT [OPTION]...

`make trace` does, and ends it with SIGTERM. Python tells a profile function
when a built-in function is called and when it returns. The calls in which a
server can wait are such functions: of sockets, queues and locks, and sleep.
When the script ends, the file RECORD gets, as JSON, the process's `begin`, and
its `lanes`, one for each thread:

    main, begin, end   is it the main thread; end is null if it was there still
    spans              [what, begin, end, port, calls, failed], for each call:
        what           how the call is named in CALLS
        port           of the client whose socket it was, or null
        calls          {what: 1}
        failed         whether it ended in an error, which is mostly EAGAIN

All times are time.monotonic()'s. Calls that are alike, and follow one another
within a millisecond, are one span. So are all that fail on non-blocking
sockets, which is no news; `what` is then "poll". This keeps the record of a
busy wait small.

Whether a thread that is in no such call runs, or waits for a core or for the
interpreter's lock, does not show.
"""

import _thread
import atexit
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import time
import weakref

PIECE = 0.001  # seconds; a longer run of calls becomes several spans

MODULE = (type(time.sleep.__self__),)  # what owns a module's functions
LOCKS = (type(threading.Lock()), type(threading.RLock()))
if hasattr(_thread, "_ThreadHandle"):  # since 3.13, Thread.join() waits there
    LOCKS += (_thread._ThreadHandle,)
QUEUES = tuple(
    getattr(select, name)
    for name in ("epoll", "kqueue", "devpoll")
    if hasattr(select, name)
)
if hasattr(select, "poll"):
    QUEUES += (type(select.poll()),)
SOCKET = (socket.socket,)
ON_SOCKETS = "accept", "recv", "send"
CALLS = [  # how a call is named here, whose it may be, how Python names it
    ("accept", SOCKET, ["_accept"]),
    ("recv", SOCKET, ["recv", "recv_into", "recvfrom", "recvmsg"]),
    ("send", SOCKET, ["send", "sendall", "sendto", "sendmsg"]),
    ("queue", QUEUES, ["poll", "control"]),
    ("queue", MODULE, ["select"]),
    ("sleep", MODULE, ["sleep"]),
    ("lock", LOCKS, ["acquire", "acquire_lock"]),
    ("join", LOCKS, ["join"]),
    ("lock", MODULE, ["pause", "sigwait"]),  # for a signal, not for a thread
]
WATCHED = {
    name: (what, owners) for what, owners, names in CALLS for name in names
}
lanes = []
ports = {}  # id of a socket: (weak reference to it, its client's port or None)


class Lane:
    """What one thread did."""

    def __init__(self, main):
        self.main = main
        self.begin = time.monotonic()
        self.end = None
        self.spans = []
        # The call that the thread is in, if any: from where in the script it
        # was called, whose it is, what it is, and since when.
        self.frame = self.owner = self.what = self.since = None

    def event(self, frame, event, arg):
        """Take note of what the thread does. It is Python's profile function.

        It makes every call slower, so what is asked for first is what happens
        most often.
        """
        if event == "c_call":
            watched = WATCHED.get(arg.__name__)
            # In a call already? Then a signal's handler has come in between.
            if watched and self.frame is None:
                owner = arg.__self__
                if isinstance(owner, watched[1]):
                    self.owner = owner
                    self.what = watched[0]
                    if frame.f_code.co_name == "_wait_for_tstate_lock":
                        self.what = "join"  # so Thread.join() did until 3.12
                    if watched[1] is SOCKET and not known_port(owner):
                        learn_port(owner)
                    self.since = time.monotonic()
                    self.frame = frame
        elif event == "c_return" or event == "c_exception":
            if frame is self.frame:
                self.write_down(time.monotonic(), event == "c_exception")
        elif event == "return":
            if frame.f_code.co_name == "_bootstrap_inner":  # of threading
                self.end = time.monotonic()

    def write_down(self, now, failed):
        """Keep the call that has just returned."""
        owner, what, port = self.owner, self.what, None
        self.frame = self.owner = None
        if what in ON_SOCKETS:
            if failed and owner.gettimeout() == 0:
                what = "poll"
            else:
                port = known_port(owner)[1]
        if self.spans:
            last = self.spans[-1]
            alike = last[0] == what and last[3] == port and last[5] == failed
            if alike and now - last[1] < PIECE:
                last[2] = now
                last[4][self.what] = last[4].get(self.what, 0) + 1
                return
        calls = {self.what: 1}
        self.spans.append([what, self.since, now, port, calls, failed])

    def record(self):
        """Return the lane as it goes into the record."""
        spans = self.spans[:]
        if self.frame is not None:  # the thread is in a call now
            port = (known_port(self.owner) or [None, None])[1]
            now, calls = time.monotonic(), {self.what: 1}
            spans.append([self.what, self.since, now, port, calls, False])
        return {
            "main": self.main,
            "begin": self.begin,
            "end": self.end,
            "spans": spans,
        }


def known_port(owner):
    """Return what learn_port has found out about a socket, or None."""
    known = ports.get(id(owner))
    # When a socket has gone, another may get its id.
    return known if known and known[0]() is owner else None


def learn_port(owner):
    """Find out which client a socket belongs to, while it is surely there."""
    try:
        port = owner.getpeername()[1]
    except (OSError, IndexError):  # it listens, or is no TCP socket
        port = None
    ports[id(owner)] = weakref.ref(owner), port


def new_thread(frame, event, arg):
    """Begin a lane: threading calls this at a new thread's first event."""
    lane = Lane(main=False)
    lanes.append(lane)
    sys.setprofile(lane.event)


def main():
    path, script, *options = sys.argv[1:]
    begin = time.monotonic()

    def save():
        sys.setprofile(None)
        record = {
            "begin": begin,
            "lanes": [lane.record() for lane in lanes[:]],
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump(record, file)

    def save_and_end(number, frame):
        save()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    atexit.register(save)
    signal.signal(signal.SIGTERM, save_and_end)
    # The script finds what it would find if it had been started by itself.
    sys.argv = [script, *options]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    lanes.append(Lane(main=True))
    threading.setprofile(new_thread)
    sys.setprofile(lanes[0].event)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
