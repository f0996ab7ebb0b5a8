#!/usr/bin/env python3
"""Pattern 4: an event loop on kqueue. One thread waits for all clients.

Sockets are non-blocking, as in the busy wait. But the loop asks the kernel one
question only: which of all these descriptors are ready to be read or written?
It sleeps until there are some, and then makes the calls that are worth it.

    listener  --.
    client A  --|     .--------.                     .------.
    client B  --+---> | kqueue | -- "B and C are --> | loop | --> B.step()
    client C  --'     '--------'     ready"          '------' --> C.step()
                    its thread waits               it runs who is
                    here, for them all             ready, and waits again

Start it:  python3 4_kqueue_loop.py
Ask it:    nc 127.0.0.1 6380   (then type: SET a 1, GET a, INFO)
Watch:     a thousand clients, two threads, and no CPU while they are silent.
"""

import argparse
import collections
import contextlib
import errno
import io
import os
import re
import resource
import select
import signal
import socket
import sys
import threading
import time

CHUNK = 64 * 1024  # bytes to read at once, at most
LINGER = 1.0  # seconds that a client has to take in its last reply
TICK = 0.5  # seconds between two looks for clients that have gone silent
MAX_EVENTS = 1024  # to take from the queue at once
SHORTAGE = errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM  # no room
READ, WRITE, CLOSE = "read", "write", "close"  # what a client wants next


class TCPServer:
    """Listens, and runs an event loop in a thread of its own."""

    pattern = "event loop on kqueue"

    def __init__(self, address, new_conversation, idle_timeout):
        """Listen on `address`, a host and a port. OSError if that fails."""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.listener = socket.create_server(address, family=family)
        self.listener.listen(4096)  # the backlog; the kernel may clip it
        # Send small replies at once. The connections inherit this.
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.listener.setblocking(False)
        self.loop = EventLoop(self.listener, new_conversation, idle_timeout)

    def start(self):
        """Serve until a signal ends the program, or the loop fails."""
        thread = threading.Thread(target=self.loop.run, daemon=True)
        # Signals are for the main thread; the new one is born with its mask.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        thread.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while thread.is_alive():
            thread.join(0.5)  # a signal just before it sleeps: seen after it
        sys.exit(1)  # the loop has failed; its traceback is printed

    def tally(self):
        """Return the pattern's own figures, for INFO."""
        return {
            "connected_clients": len(self.loop.clients),
            "wakeups": self.loop.wakeups,
            "events": self.loop.events,
        }


class EventLoop:
    """Waits for all descriptors in one queue, and runs who is ready."""

    def __init__(self, listener, new_conversation, idle_timeout):
        self.listener = listener
        self.new_conversation = new_conversation  # called for each client
        self.idle_timeout = idle_timeout  # seconds without a byte moving
        self.clients = {}  # descriptor: Client
        self.wakeups = 0  # how often the queue had events for us
        self.events = 0  # how many it had, in all these
        self.next_look = 0  # when to look for the silent, and for room
        self.queue = kqueue()  # that of select, or the class below
        self.watch(listener, READ, KQ_EV_ADD)

    def run(self):
        """Serve for ever."""
        while True:
            events = self.queue.control(None, MAX_EVENTS, TICK)  # sleeps here
            now = time.monotonic()
            self.wakeups += 1 if events else 0
            self.events += len(events)
            for event in events:
                if event.ident in self.clients:
                    self.serve(self.clients[event.ident], now)
                else:  # the listener: somebody new
                    self.accept()
            if now >= self.next_look:
                self.next_look = now + TICK
                for client in list(self.clients.values()):
                    # Linux reports room late: a slow reader gets another try.
                    if client.wants == WRITE or now >= client.deadline:
                        self.serve(client, now)
                self.watch(self.listener, READ, KQ_EV_ADD)  # it may be off

    def watch(self, sock, wanted, flag):
        """Have the queue begin or end to watch a socket. Take no events."""
        filter = KQ_FILTER_WRITE if wanted == WRITE else KQ_FILTER_READ
        self.queue.control([kevent(sock.fileno(), filter, flag)], 0)

    def accept(self):
        """Take in the client that the queue has announced."""
        try:
            connection, address = self.listener.accept()
            connection.setblocking(False)
            self.watch(connection, READ, KQ_EV_ADD)
        except OSError as error:
            if error.errno in SHORTAGE:  # else only that client is lost
                with contextlib.suppress(OSError):  # stderr may be closed
                    print(f"cannot accept: {error}", file=sys.stderr)
                # Level-triggered, the queue would report this again and again.
                self.watch(self.listener, READ, KQ_EV_DELETE)
                self.next_look = time.monotonic() + 1  # and try again then
            return
        client = Client(connection, self.new_conversation(), self.idle_timeout)
        self.clients[connection.fileno()] = client

    def serve(self, client, now):
        """Let a client take a step, and watch for what it wants next."""
        before = client.wants
        client.step()
        if client.wants == CLOSE or now >= client.deadline:
            del self.clients[client.connection.fileno()]
            client.connection.close()  # this takes it out of the queue, too
        elif client.wants != before:
            # Never for both: there is nearly always room, the loop would spin.
            self.watch(client.connection, before, KQ_EV_DELETE)
            self.watch(client.connection, client.wants, KQ_EV_ADD)


class Client:
    """One connection. It takes one step at a time, and never waits."""

    def __init__(self, connection, conversation, idle_timeout):
        self.connection = connection
        self.conversation = conversation
        self.idle_timeout = idle_timeout
        self.deadline = time.monotonic() + idle_timeout
        self.outgoing = b""  # replies that the kernel has not taken yet
        self.wants = READ

    def step(self):
        """Take a step, and set what it `wants` next. False: it was in vain.

        A client that does not take its replies is not read from: its requests
        wait in the kernel, and then at its own end. This is backpressure.
        """
        try:
            if self.wants == READ:
                data = self.connection.recv(CHUNK)
                if not data or self.conversation.finished:
                    self.wants = READ if data else CLOSE  # finished: drop data
                    return True
                self.conversation.receive(data)
            self.send()
        except BlockingIOError:  # EAGAIN: there is nothing, or no room, yet
            return False
        except (OSError, MemoryError):  # it was reset, or asks for too much
            self.wants = CLOSE
        return True

    def send(self):
        """Send replies, as many as the kernel has room for."""
        self.wants = WRITE  # until all is sent
        self.outgoing = self.outgoing or self.conversation.replies()
        if self.outgoing:
            try:
                sent = self.connection.send(self.outgoing)
            except ConnectionError:  # it has gone; what it asked is still done
                self.conversation.gone = True
                sent = len(self.outgoing)
            self.outgoing = self.outgoing[sent:]
        self.deadline = time.monotonic() + self.idle_timeout
        if not self.outgoing and self.conversation.room > 0:  # none waits
            self.wants = READ
            if self.conversation.finished:  # it must read to the end, in time
                self.connection.shutdown(socket.SHUT_WR)
                self.deadline = time.monotonic() + LINGER


# ---- kqueue on Linux --------------------------------------------------------
#
# Linux has epoll. It does the same job, but watches a descriptor once, with a
# mask; kqueue watches it once for each filter. This loop uses one at a time.

try:
    from select import KQ_EV_ADD, KQ_EV_DELETE, KQ_FILTER_READ, KQ_FILTER_WRITE
    from select import kevent, kqueue
except ImportError:
    if not hasattr(select, "epoll"):
        sys.exit("this system has neither kqueue nor epoll")

    TCPServer.pattern += ", which epoll stands in for"
    KQ_FILTER_READ, KQ_FILTER_WRITE = select.EPOLLIN, select.EPOLLOUT
    KQ_EV_ADD, KQ_EV_DELETE = 1, 2

    kevent = collections.namedtuple("kevent", "ident filter flags")

    class kqueue:
        def __init__(self):
            self.epoll = select.epoll()
            self.watched = {}  # descriptor: the kevent that asked for it

        def control(self, changes, max_events, timeout=None):
            for change in changes or ():
                if change.flags == KQ_EV_DELETE:
                    self.epoll.unregister(change.ident)
                else:
                    with contextlib.suppress(FileExistsError):  # twice is fine
                        self.epoll.register(change.ident, change.filter)
                    self.watched[change.ident] = change
            ready = self.epoll.poll(timeout, max_events) if max_events else []
            return [self.watched[ident] for ident, mask in ready]


# ---- The application: a key-value store that speaks Redis -------------------
# From here to the end, the text is the same in all four files. It is sans-I/O:
# bytes go in, replies come out, and it never touches a socket. The protocol:
# https://redis.io/docs/latest/develop/reference/protocol-spec/
# Left out: quotes in typed lines, the other commands, a limit for the store.

MAX_REQUEST = 1024 * 1024  # bytes in its words: nobody may fill the memory
MAX_WORDS = 1024  # per request; an empty word takes memory, too
MAX_LINE = 64 * 1024  # bytes; it is read again and again until its end comes
REPLIES_AT_ONCE = 64 * 1024  # bytes; more requests wait until these are sent
INT64 = range(-(2**63), 2**63)
SLEEP = re.compile(rb"(?i)debug sleep ([0-9]|[0-9]?\.[0-9]+|10)")  # seconds
CHANGES = {b"set", b"incr", b"incrby", b"quit"}  # even if the client is gone
COUNTS = {b"*%d\r\n" % n: n for n in range(MAX_WORDS + 1)}  # faster than int
SIZES = {b"$%d\r\n" % n: n for n in range(1024)}


class Conversation:
    """What one client asks, and what it is told."""

    values = {}  # the store: it belongs to the class, so all share it
    lock = threading.Lock()  # pattern 2 has threads: one change at a time

    def __init__(self):
        self.incoming = bytearray()  # received, and not carried out yet
        self.needed = 1  # with fewer bytes than that, nothing can be complete
        self.room = 1  # bytes for more replies; 0 or less: send these first
        self.nothing = b"$-1\r\n"  # the reply to GET if there is no value
        self.finished = False  # True: all is said, the connection is to end
        self.gone = False  # the pattern sets it: nobody takes replies any more

    def receive(self, data):
        """Take in `data`: bytes that may begin and end anywhere."""
        self.incoming += data

    def replies(self):
        """Carry out requests, while there is room; return replies, or b""."""
        self.room, received = REPLIES_AT_ONCE, len(self.incoming)
        if received < self.needed:
            return b""
        replies, done, self.needed = [], 0, 1
        stream = io.BytesIO(self.incoming)  # to read it like a file
        try:
            while done < received and self.room > 0:
                words = next_request(stream)
                done = stream.tell()
                if words:
                    replies.append(self.carry_out(words))
                    self.room -= len(replies[-1])
        except EOFError as error:  # a request has no end yet
            self.needed = received - done + error.args[0]
        except ValueError as error:  # it breaks the protocol, or a limit
            replies.append(f"-ERR Protocol error: {error}\r\n".encode())
            self.finished = True
        del self.incoming[: received if self.finished else done]
        return b"".join(replies)

    def carry_out(self, words):
        """Carry out a request, given as a list of bytes; return the reply."""
        name, count = words[0].lower(), len(words)
        if self.gone and name not in CHANGES:
            return b""  # build no replies for nobody
        if name == b"get" and count == 2:
            values, key = self.values, words[1]
            return bulk(values[key]) if key in values else self.nothing
        if name == b"set" and count == 3:
            with self.lock:
                self.values[words[1]] = words[2]
            return b"+OK\r\n"
        if name == b"set" and count > 3:  # with an option, such as EX
            return b"-ERR syntax error\r\n"
        if (name, count) in {(b"incr", 2), (b"incrby", 3)}:
            return self.increment(*words[1:])
        if name == b"ping" and count == 1:
            return b"+PONG\r\n"
        if name in {b"ping", b"echo"} and count == 2:
            return bulk(words[1])
        if name == b"info":
            return bulk(figures(self.server).replace("\n", "\r\n").encode())
        if name == b"hello":
            return self.hello(*words[1:])
        if count == 3 and SLEEP.fullmatch(b" ".join(words)):
            time.sleep(float(words[2]))
            self.room = 0  # the others have waited for long enough
            return b"+OK\r\n"
        if name == b"quit":
            self.finished, self.room = True, 0
            return b"+OK\r\n"
        if name not in CHANGES | {b"get", b"ping", b"echo"}:
            shown = b" ".join(words)[:128].decode("latin-1")
            return b"-ERR unknown command %a\r\n" % shown  # %a: on one line
        return b"-ERR wrong number of arguments for '%b' command\r\n" % name

    def increment(self, key, amount=b"1"):
        with self.lock:
            old = to_integer(self.values[key]) if key in self.values else 0
            if old is None or to_integer(amount) is None:
                return b"-ERR value is not an integer or out of range\r\n"
            new = old + int(amount)
            if new not in INT64:
                return b"-ERR increment or decrement would overflow\r\n"
            self.values[key] = b"%d" % new
        return b":%d\r\n" % new

    def hello(self, version=b"2", *options):
        """Agree on a version of the protocol: in 3, there is `_`: nothing."""
        if version not in {b"2", b"3"}:
            return b"-NOPROTO unsupported protocol version\r\n"
        self.nothing = b"_\r\n" if version == b"3" else b"$-1\r\n"
        texts = b"server redis version 7.0.0 mode standalone role master proto"
        head = b"%7\r\n" if version == b"3" else b"*14\r\n"  # a map, an array
        tail = b":%b\r\n$2\r\nid\r\n:1\r\n$7\r\nmodules\r\n*0\r\n" % version
        return head + b"".join(map(bulk, texts.split())) + tail


def next_request(stream):
    """Return a request: its words, a list of bytes that may be empty.

    Raises ValueError if it breaks the protocol or a limit, and EOFError with
    the bytes that it lacks, at least: it is read anew when more has come.
    """
    line = stream.readline()
    if line[:1] != b"*":  # somebody types, such as: GET a
        words = whole(line).split(None, MAX_WORDS)
        if len(words) > MAX_WORDS or re.match(rb"(?i)\s*(post|host:)\s", line):
            raise ValueError("too many words, or HTTP, as from a web page")
        return words
    count = COUNTS[line] if line in COUNTS else to_integer(whole(line)[1:])
    if count is None or count > MAX_WORDS:
        raise ValueError("expected the number of words")
    words, room = [], MAX_REQUEST
    while len(words) < count:
        line = stream.readline()
        size = SIZES[line] if line in SIZES else to_integer(whole(line)[1:])
        if size is None or not 0 <= size <= room or line[:1] != b"$":
            raise ValueError("expected $ and the size of a word")
        room -= size
        word, end = stream.read(size), stream.read(2)
        if len(end) < 2:
            raise EOFError(size + 2 - len(word) - len(end))
        words.append(word)
    return words


def whole(line):
    """Return a line without its CR LF. Raises like next_request."""
    if len(line) > MAX_LINE:
        raise ValueError("too long a line")
    if not line.endswith(b"\n"):
        raise EOFError(1)
    return line.removesuffix(b"\r\n")


def to_integer(text):
    """Return the 64-bit integer that `text` spells in bytes, or None."""
    # int() alone would also take b" 10 ", b"+10", b"010" and b"1_0".
    fits = re.fullmatch(rb"0|-?[1-9][0-9]{0,18}", text) and int(text) in INT64
    return int(text) if fits else None


def bulk(value):
    """Return the reply that carries `value`: its length, and its bytes."""
    return b"$%d\r\n%b\r\n" % (len(value), value)


def figures(server):
    """Return what the pattern has cost so far, as lines `name:value`."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    facts = {
        "pattern": server.pattern,
        "process_id": os.getpid(),
        "role": "master",  # Redis clients look for it
        "threads": threading.active_count(),
        "used_cpu_user": f"{usage.ru_utime:.6f}",  # seconds
        "used_cpu_sys": f"{usage.ru_stime:.6f}",
        "voluntary_context_switches": usage.ru_nvcsw,  # it waited
        "involuntary_context_switches": usage.ru_nivcsw,  # it was made to wait
        **server.tally(),
    }
    return "".join(f"{name}:{value}\n" for name, value in facts.items())


def stop(signal_number, frame):
    """Print the figures, once, and end, whatever the threads are doing."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    with contextlib.suppress(OSError):  # stdout may be closed
        print(figures(Conversation.server), end="", flush=True)
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=TCPServer.__doc__)
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message}")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=6380, help="0: a free one")
    parser.add_argument("--idle-timeout", type=float, default=300)  # seconds
    options = parser.parse_args()
    if not options.host or not 0.001 <= options.idle_timeout <= 1e6:
        parser.error("--host is empty, or --idle-timeout not 0.001 to 1000000")
    address = options.host, options.port
    try:
        server = TCPServer(address, Conversation, options.idle_timeout)
    except (OSError, OverflowError, TypeError, ValueError) as error:
        sys.exit(f"cannot listen on {options.host}:{options.port}: {error}")
    Conversation.server = server  # for INFO
    signal.signal(signal.SIGINT, stop)  # even if a script's "&" had it ignored
    signal.signal(signal.SIGTERM, stop)
    # A signal that comes just before a call sleeps is only seen when the call
    # returns, which may be never. So an alarm ends the first sleep, once.
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    host, port = server.listener.getsockname()[:2]
    with contextlib.suppress(OSError):  # stdout may be closed
        print(f"{server.pattern}: listening on {host}:{port}", flush=True)
    server.start()


if __name__ == "__main__":
    main()
