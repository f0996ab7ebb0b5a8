#!/usr/bin/env python3
"""Pattern 2: multi-threaded, blocking. A thread for each client.

The main thread accepts connections and starts a thread for each. The calls are
blocking, as before. But each one puts only the thread to sleep that makes it.

    main thread   accept ----> accept ----> accept ------------------->
    thread A        |=== serves A ===|
    thread B                     |=== serves B ===|
    thread C                                  |=== serves C ===|
                  ---------------------------------------------> time

Start it:  python3 2_multi_blocking.py
Ask it:    nc 127.0.0.1 6380   (then type: SET a 1, GET a, INFO, QUIT)
Watch:     A second nc is served as well, even while DEBUG SLEEP 5 blocks the
           first. INFO counts the threads. Ctrl-C prints what it has cost.
"""

import argparse
import contextlib
import io
import re
import resource
import socket
import sys
import threading
import time

CHUNK = 64 * 1024  # bytes to read at once, at most


class TCPServer:
    """Accepts connections, and starts a thread to serve each."""

    def __init__(self, host, port):
        """Listen on a host and a port, 0 for a free one. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, port), family=family)
        self.listener.listen(4096)  # so many may wait for accept
        # Connections inherit: send small replies at once, notice dead clients.
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.statistics = {"pattern": "multi blocking", "threads_started": 0}

    def start(self):
        """Serve for ever."""
        while True:
            try:
                connection, address = self.listener.accept()  # sleeps
                incoming = IncomingTCPConnection(connection, self.statistics)
                threading.Thread(target=incoming.handle, daemon=True).start()
                self.statistics["threads_started"] += 1
            except ConnectionAbortedError:
                pass  # this client has gone before it was accepted
            except OSError as error:  # for example, no descriptor is free
                print(f"cannot accept: {error}", file=sys.stderr)
                time.sleep(0.1)  # then there may be one
            except RuntimeError as error:  # no thread can be started for it
                connection.close()
                print(f"cannot serve: {error}", file=sys.stderr)
                time.sleep(0.1)


class IncomingTCPConnection:
    def __init__(self, connection, statistics):
        self.connection = connection
        self.session = Session(statistics)

    def handle(self):
        """Serve one client until it ends, or has gone: that is an OSError."""
        with contextlib.suppress(OSError), self.connection:
            while not self.session.finished:
                self.session.receive(self.connection.recv(CHUNK))  # sleeps
                while replies := self.session.answer():
                    self.connection.sendall(replies)  # sleeps


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
