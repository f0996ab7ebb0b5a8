#!/usr/bin/env python3
"""Pattern 2: multi-threaded, blocking. A thread for each client.

The main thread accepts connections and starts a thread for each. accept, recv
and send are blocking calls, as before: until there is something to return, the
kernel puts the thread to sleep. But now only that one thread.

    main thread   accept ----> accept ----> accept ------------------->
    thread A        |=== serves A ===|
    thread B                     |=== serves B ===|
    thread C                                  |=== serves C ===|
                  ---------------------------------------------> time

Start it:  python3 2_multi_blocking.py
Ask it:    nc 127.0.0.1 6380   (then type: SET a 1, GET a, INFO)
Watch:     a second nc is served as well; INFO counts a thread for each.
"""

import argparse
import contextlib
import errno
import io
import os
import re
import resource
import signal
import socket
import struct
import sys
import threading
import time

CHUNK = 64 * 1024  # bytes to read at once, at most
LINGER = 1.0  # seconds that a client has to take in its last reply
SHORTAGE = errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM  # no room


class TCPServer:
    """Accepts connections, and starts a thread to serve each."""

    pattern = "multi-threaded blocking"

    def __init__(self, address, new_conversation, idle_timeout):
        """Listen on `address`, a host and a port. OSError if that fails."""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.listener = socket.create_server(address, family=family)
        self.listener.listen(4096)  # the backlog; the kernel may clip it
        # Send small replies at once. The connections inherit this.
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.new_conversation = new_conversation  # called for each client
        self.idle_timeout = idle_timeout  # seconds without a byte moving
        self.threads_started = 0

    def start(self):
        """Serve until a signal ends the program."""
        signal.setitimer(signal.ITIMER_REAL, 0.3, 0.3)  # main() says why
        while True:
            try:
                connection, address = self.listener.accept()
            except OSError as error:
                if error.errno in SHORTAGE:  # else only that client is lost
                    with contextlib.suppress(OSError):  # stderr may be closed
                        print(f"cannot accept: {error}", file=sys.stderr)
                    time.sleep(1)  # by then there may be room for it
                continue
            handler = IncomingTCPConnection(connection, self)
            self.threads_started += 1
            while not self.start_thread(handler):
                with contextlib.suppress(OSError):
                    print("cannot start a thread", file=sys.stderr)
                time.sleep(1)

    def start_thread(self, handler):
        """Have a thread run handle(). Return whether there was one for it."""
        thread = threading.Thread(target=handler.handle, daemon=True)
        # Signals are for the main thread; a new one is born with its mask.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        with contextlib.suppress(RuntimeError):
            thread.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return thread.ident is not None

    def tally(self):
        """Return the pattern's own figures, for INFO."""
        return {
            "connected_clients": threading.active_count() - 1,
            "threads_started": self.threads_started,
        }


class IncomingTCPConnection:
    """One client's connection, from its first byte to its last."""

    def __init__(self, connection, server):
        self.connection = connection
        self.conversation = server.new_conversation()
        self.idle_timeout = server.idle_timeout

    def handle(self):
        """Read and answer until the client closes, or goes silent."""
        # It ends as well when it is reset, or asks for too much memory.
        with self.connection, contextlib.suppress(OSError, MemoryError):
            self.limit_waiting(socket.SO_RCVTIMEO, self.idle_timeout)
            self.limit_waiting(socket.SO_SNDTIMEO, self.idle_timeout / 8)
            while data := self.connection.recv(CHUNK):
                self.conversation.receive(data)
                while replies := self.conversation.replies():
                    self.send(replies)
                if self.conversation.finished:
                    return self.linger()

    def send(self, replies):
        """Send replies. Raises BlockingIOError if none moves in time."""
        end = time.monotonic() + self.idle_timeout
        while replies:
            try:
                replies = replies[self.connection.send(replies) :]
                end = time.monotonic() + self.idle_timeout
            except BlockingIOError:  # each 1/8 try again: Linux sees room late
                if time.monotonic() >= end:
                    raise
            except ConnectionError:  # it has gone; what it asked is still done
                self.conversation.gone = True
                return

    def linger(self):
        """Read to the end: to close on unread bytes could lose the reply."""
        self.limit_waiting(socket.SO_RCVTIMEO, LINGER)  # macOS may fail later
        self.connection.shutdown(socket.SHUT_WR)
        end = time.monotonic() + LINGER
        while time.monotonic() < end and self.connection.recv(CHUNK):
            pass

    def limit_waiting(self, option, seconds):
        """After so long, recv or send fails with EAGAIN: BlockingIOError."""
        # settimeout() would make the socket non-blocking, and sleep in poll().
        # "ll" is a struct timeval where a long has 64 bits.
        timeval = struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
        self.connection.setsockopt(socket.SOL_SOCKET, option, timeval)


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
