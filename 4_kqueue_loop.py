#!/usr/bin/env python3
"""Pattern 4: an event loop on kqueue. One thread waits for all clients.

Sockets are non-blocking, as in the busy wait. But the loop asks the kernel one
question only: which of all these descriptors are ready to be read or written?
It sleeps until some are, and then makes just the calls that are worth it.

    listener  --.
    client A  --|     .--------.                     .------.
    client B  --+---> | kqueue | -- "B and C are --> | loop | --> B.step()
    client C  --'     '--------'     ready"          '------' --> C.step()
                    its thread waits               it runs who is
                    here, for them all             ready, and waits again

Start it:  python3 4_kqueue_loop.py   (ulimit -n 2000 first, for 1,000 clients)
Ask it:    nc 127.0.0.1 6380   (then type: SET a 1, GET a, INFO, QUIT)
Watch:     A thousand clients, two threads, and no CPU while they are silent.
           DEBUG SLEEP 5 in one nc keeps all others waiting: the loop sleeps.
           Ctrl-C ends the server and prints what serving has cost.
"""

import argparse
import io
import re
import resource
import select
import socket
import sys
import threading
import time

CHUNK = 64 * 1024  # bytes to read at once, at most
MAX_EVENTS = 1024  # to take from the queue at once
PAUSE = 0.1  # seconds, when no connection can be accepted
READ, WRITE, CLOSE = "read", "write", "close"  # what a client wants next


class TCPServer:
    """Listens, and runs an event loop in a thread of its own."""

    def __init__(self, host, port):
        """Listen on a host and a port, 0 for a free one. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, port), family=family)
        self.listener.listen(4096)  # so many may wait for accept
        # Connections inherit: send small replies at once, notice dead clients.
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.listener.setblocking(False)
        self.statistics = {"pattern": PATTERN, "wakeups": 0, "events": 0}
        self.loop = EventLoop(self.listener, self.statistics)

    def start(self):
        """Run the loop in a thread of its own, as the article does."""
        thread = threading.Thread(target=self.loop.run, daemon=True)
        thread.start()
        while thread.is_alive():  # this thread only waits for the loop's end
            thread.join(1)  # on macOS, Ctrl-C does not end a longer join
        sys.exit("the event loop has failed")


class EventLoop:
    """Waits for all descriptors in one queue, and serves who is ready."""

    def __init__(self, listener, statistics):
        self.listener = listener
        self.statistics = statistics
        self.clients = {}  # descriptor: Client
        self.pause_ends = None  # when to accept again, by time.monotonic()
        self.queue = kqueue()  # of the kernel, or the class below
        self.watch(listener, READ, KQ_EV_ADD)

    def run(self):
        """Serve for ever."""
        while True:
            limit = PAUSE if self.pause_ends else None  # None: no limit
            events = self.queue.control(None, MAX_EVENTS, limit)  # sleeps
            self.statistics["wakeups"] += 1
            self.statistics["events"] += len(events)
            for event in events:
                if event.ident == self.listener.fileno():
                    self.accept()
                else:
                    self.serve(self.clients[event.ident])
            if self.pause_ends and time.monotonic() > self.pause_ends:
                self.pause_ends = None
                self.watch(self.listener, READ, KQ_EV_ADD)

    def watch(self, sock, wanted, change):
        """Have the queue begin or end to watch a socket."""
        kq_filter = KQ_FILTER_WRITE if wanted == WRITE else KQ_FILTER_READ
        self.queue.control([kevent(sock.fileno(), kq_filter, change)], 0)

    def accept(self):
        """Take in the client that the queue has announced."""
        try:
            connection, address = self.listener.accept()
            connection.setblocking(False)
            self.watch(connection, READ, KQ_EV_ADD)
        except (BlockingIOError, ConnectionAbortedError):
            return  # this client has gone before it was accepted
        except OSError as error:  # for example, no descriptor is free
            print(f"cannot accept: {error}", file=sys.stderr)
            # Level-triggered, the queue would report it again and again.
            self.watch(self.listener, READ, KQ_EV_DELETE)
            self.pause_ends = time.monotonic() + PAUSE
            return
        self.clients[connection.fileno()] = Client(connection, self.statistics)

    def serve(self, client):
        """Let a client take a step, and watch for what it wants next."""
        watched = client.wants
        try:
            try:
                client.step()
            except BlockingIOError:
                pass  # readiness is a hint: the bytes or the room can be gone
            wants = client.wants
            if wants != watched and wants != CLOSE:
                # Never for both: nearly always there is room to write.
                self.watch(client.connection, watched, KQ_EV_DELETE)
                self.watch(client.connection, wants, KQ_EV_ADD)
        except OSError:  # it has gone, or cannot be watched
            wants = CLOSE
        if wants == CLOSE:
            del self.clients[client.connection.fileno()]
            client.connection.close()  # the queue forgets a closed descriptor


class Client:
    """One connection. It takes one step at a time, and never waits."""

    def __init__(self, connection, statistics):
        self.connection = connection
        self.session = Session(statistics)
        self.outgoing = b""  # replies that the kernel has not taken yet

    @property
    def wants(self):
        """What this client waits for: room to write, or something to read."""
        # Backpressure: who does not take replies is not read from, and waits.
        if self.outgoing:
            return WRITE
        return CLOSE if self.session.finished else READ

    def step(self):
        """Read and answer, or go on sending. BlockingIOError: not now."""
        if not self.outgoing:
            self.session.receive(self.connection.recv(CHUNK))
            self.outgoing = self.session.answer()
        if self.outgoing:
            # send() takes what there is room for; sendall() would wait.
            sent = self.connection.send(self.outgoing)
            self.outgoing = self.outgoing[sent:] or self.session.answer()


# ---- kqueue on Linux --------------------------------------------------------
# Linux has epoll. It knows a descriptor once, kqueue knows it once per filter.

try:
    from select import KQ_EV_ADD, KQ_EV_DELETE, KQ_FILTER_READ, KQ_FILTER_WRITE
    from select import kevent, kqueue

    PATTERN = "event loop on kqueue"
except ImportError:
    if not hasattr(select, "epoll"):
        sys.exit("this system has neither kqueue nor epoll")

    PATTERN = "event loop on epoll in place of kqueue"
    KQ_FILTER_READ, KQ_FILTER_WRITE = select.EPOLLIN, select.EPOLLOUT
    KQ_EV_ADD, KQ_EV_DELETE = 1, 2

    class kevent:
        def __init__(self, ident, filter, flags=KQ_EV_ADD):
            self.ident, self.filter, self.flags = ident, filter, flags

    class kqueue:
        def __init__(self):
            self.epoll = select.epoll()

        def control(self, changes, max_events, limit=None):
            for change in changes or []:
                if change.flags == KQ_EV_ADD:
                    self.epoll.register(change.ident, change.filter)
                else:
                    self.epoll.unregister(change.ident)
            if max_events == 0:
                return []
            ready = self.epoll.poll(-1 if limit is None else limit, max_events)
            return [kevent(ident, mask) for ident, mask in ready]


# ---- The application: a key-value store that speaks Redis -------------------
# From here to the end, the text is the same in all four files. It is sans-I/O:
# bytes come in, replies go out, and no socket is touched. It speaks RESP, see
# https://redis.io/docs/latest/develop/reference/protocol-spec/

MAX_REQUEST = 1024 * 1024  # bytes in all words of a request
MAX_WORDS = 1024  # in a request
MAX_LINE = 64 * 1024  # bytes
MAX_REPLIES = 64 * 1024  # bytes; with so many, further requests wait
INTEGER = re.compile(rb"0|-?[1-9][0-9]{0,18}")  # int() would also take b"1_0"
INT64 = range(-(2**63), 2**63)  # Redis's integers have 64 bits
SECONDS = re.compile(rb"[0-9](\.[0-9]+)?|10")  # float() also takes b"nan"

store = {}  # keys and values, all bytes: one store for all clients
store_lock = threading.Lock()  # held to change it: pattern 2 has threads


class Session:
    """What one client asks, and what it is answered."""

    def __init__(self, statistics):
        self.statistics = statistics  # a dict, for INFO
        self.incoming = b""  # received, and not carried out yet
        self.version = b"2"  # of RESP
        self.finished = False  # True: the connection is to be closed

    def receive(self, data):
        """Take in bytes from the client. No bytes mean that it has ended."""
        self.incoming += data
        self.finished = not data

    def answer(self):
        """Carry out requests; return replies. Call it until there are none."""
        if not self.incoming:
            return b""  # as usual, when it is asked once more
        replies, done = bytearray(), 0
        stream = io.BytesIO(self.incoming)  # bytes that are read like a file
        try:
            while done < len(self.incoming) and not self.finished:
                words = read_request(stream)
                done = stream.tell()
                replies += self.carry_out(words) if words else b""
                if len(replies) >= MAX_REPLIES:
                    break  # the others wait until these replies are sent
        except EOFError:
            pass  # one is incomplete: it is read again when more has come
        except ValueError as error:  # one breaks the protocol, or a limit
            replies += b"-ERR Protocol error: %b\r\n" % str(error).encode()
            self.finished = True
        self.incoming = self.incoming[done:]
        return bytes(replies)

    def carry_out(self, words):
        """Carry out one request, a list of words; return the reply."""
        name, count = words[0].lower(), len(words)
        if name == b"get" and count == 2:
            if words[1] in store:
                return bulk(store[words[1]])
            return b"_\r\n" if self.version == b"3" else b"$-1\r\n"  # null
        if name == b"set" and count == 3:
            with store_lock:
                store[words[1]] = words[2]
            return b"+OK\r\n"
        if (name, count) in [(b"incr", 2), (b"incrby", 3)]:
            return self.increment(*words[1:])
        if name == b"ping" and count <= 2:
            return bulk(words[1]) if count == 2 else b"+PONG\r\n"
        if name == b"info":
            return bulk("\r\n".join(info(self.statistics)).encode())
        if name == b"hello" and words[1:] in ([], [b"2"], [b"3"]):
            self.version = words[1] if count == 2 else self.version
            kind = b"%1" if self.version == b"3" else b"*2"  # map, or array
            return b"%b\r\n$5\r\nproto\r\n:%b\r\n" % (kind, self.version)
        if name == b"debug" and count == 3 and words[1].lower() == b"sleep":
            if SECONDS.fullmatch(words[2]):
                time.sleep(float(words[2]))  # stands for a handler that blocks
                return b"+OK\r\n"
        if name == b"quit":
            self.finished = True  # what follows is not looked at
            return b"+OK\r\n"
        return b"-ERR unknown command, or wrong arguments\r\n"

    def increment(self, key, amount=b"1"):
        with store_lock:  # nobody may write between this read and this write
            old = store.get(key, b"0")
            for text in old, amount:
                if not INTEGER.fullmatch(text) or int(text) not in INT64:
                    return b"-ERR value is not an integer or out of range\r\n"
            new = int(old) + int(amount)
            if new not in INT64:
                return b"-ERR increment or decrement would overflow\r\n"
            store[key] = b"%d" % new
        return b":%d\r\n" % new


def read_request(stream):
    """Return the next request: its words. Raises EOFError and ValueError."""
    line = stream.readline(MAX_LINE)
    if not line.startswith(b"*"):  # typed by a person: GET a
        check_end(line)
        words = line.split()
        if len(words) > MAX_WORDS or re.match(rb"(?i)\s*(post|host:)", line):
            raise ValueError("too many words, or HTTP from a web page")
        return words
    words, room = [], MAX_REQUEST  # *2 $3 GET $1 a, each on a line of its own
    for _ in range(number(line, b"*", MAX_WORDS)):
        size = number(stream.readline(MAX_LINE), b"$", room)
        words.append(stream.read(size))
        room -= size
        if len(stream.read(2)) < 2:  # the end of that line, CR LF
            raise EOFError
    return words


def number(line, sign, limit):
    """Return 3 for the line b"$3\\r\\n", if that is within the limit."""
    digits = line[1:-2] if line.endswith(b"\r\n") else b""
    if line.startswith(sign) and digits.isdigit() and len(digits) < 8:
        value = int(digits)  # slow for very many digits: so at most 7
        if value <= limit:
            return value
    check_end(line)
    raise ValueError(f"expected {sign.decode()} and a number up to {limit}")


def check_end(line):
    """Raise EOFError if a line has no end yet, ValueError if too long."""
    if not line.endswith(b"\n"):
        raise EOFError if len(line) < MAX_LINE else ValueError("too long")


def bulk(value):
    """Return the reply that carries a value: its size, and its bytes."""
    return b"$%d\r\n%b\r\n" % (len(value), value)


def info(statistics):
    """Return what serving has cost so far. Redis's clients want a role."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    facts = dict(statistics, role="master", threads=threading.active_count())
    facts["used_cpu_user"] = f"{usage.ru_utime:.6f}"  # seconds
    facts["used_cpu_sys"] = f"{usage.ru_stime:.6f}"
    facts["voluntary_context_switches"] = usage.ru_nvcsw  # it went to sleep
    facts["involuntary_context_switches"] = usage.ru_nivcsw
    return [f"{name}:{fact}" for name, fact in facts.items()]


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)  # short errors
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=6380, help="0: a free one")
    options = parser.parse_args()
    try:
        server = TCPServer(options.host, options.port)
    except (OSError, OverflowError, TypeError, ValueError) as error:
        sys.exit(f"cannot listen on {options.host}:{options.port}: {error}")
    host, port = server.listener.getsockname()[:2]
    pattern = server.statistics["pattern"]
    try:
        print(f"{pattern}: listening on {host}:{port}", flush=True)
        server.start()
    except KeyboardInterrupt:  # Ctrl-C
        print(*info(server.statistics), sep="\n")


if __name__ == "__main__":
    main()
