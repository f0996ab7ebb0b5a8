#!/usr/bin/env python3
"""Pattern 3: non-blocking, busy wait. One thread asks all, over and over.

No call blocks: each returns at once, if only to say "nothing for you yet"
(EAGAIN, in Python BlockingIOError). So one thread can go round all clients.
But nothing tells it when to ask: it never rests, and nearly all it asks is
in vain.

              .--> anybody new?   no
              |    client A?      nothing
     one      |    client B?      "GET a"  --> answer it
    thread    |    client C?      nothing
              '--- and again, thousands of times a second

Start it:  python3 3_busy_wait.py
Ask it:    nc 127.0.0.1 6380   (then type: SET a 1, GET a, INFO)
Watch:     top shows a whole core in use while nobody says a word.
"""

import argparse
import io
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time

BACKLOG = 4096  # clients that may wait for accept(), if the kernel agrees
CHUNK = 64 * 1024  # bytes to read at once, at most
LINGER = 1.0  # seconds that a client has to take in its last reply


class TCPServer:
    """Asks the listening socket and each client in turn; never waits."""

    pattern = "non-blocking busy wait"

    def __init__(self, address, new_conversation, idle_timeout):
        """Listen on `address`, a pair of host and port. OSError if that fails.

        `new_conversation` is called for the application's part of each
        connection. It ends after `idle_timeout` seconds without a byte moving.
        """
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.listener = socket.create_server(
            address, family=family, backlog=BACKLOG
        )
        # Send each reply at once. The connections take this over.
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.listener.setblocking(False)
        self.new_conversation = new_conversation
        self.idle_timeout = idle_timeout
        self.clients = set()
        self.accepted = 0
        self.polls = 0
        self.empty_handed = 0  # how many of these polls brought nothing
        self.running = True

    def start(self):
        """Serve, until stop() is called."""
        while self.running:
            now = time.monotonic()
            while self.accept():
                pass
            for client in list(self.clients):
                self.poll(client, now)

    def accept(self):
        """Take in a new client. Return whether there was one."""
        self.polls += 1
        try:
            connection, address = self.listener.accept()
        except BlockingIOError:
            self.empty_handed += 1
            return False
        except ConnectionError:  # the client has given up in the meantime
            return True
        except OSError as error:  # most likely EMFILE: no descriptor is free
            logging.warning("cannot accept: %s; will try again", error)
            return False
        self.accepted += 1
        descriptor = connection.fileno()
        logging.info("descriptor %d is a client at %s", descriptor, address)
        # macOS and the BSDs take this over from the listener, Linux does not.
        connection.setblocking(False)
        client = Client(
            connection, self.new_conversation(), self.idle_timeout
        )
        self.clients.add(client)
        return True

    def poll(self, client, now):
        """Let a client do what it can; let go of it when it is done."""
        self.polls += 1
        try:
            going_on = client.run()
            if client.outgoing:  # a reply need not wait for the next round
                client.run()
            if going_on:
                return
            reason = "closed"
        except BlockingIOError:
            self.empty_handed += 1
            if now < client.deadline:
                return
            reason = "let go: too long silent"
        except OSError as error:
            reason = f"lost: {error}"
        logging.info("descriptor %d %s", client.connection.fileno(), reason)
        self.clients.discard(client)
        client.connection.close()

    def stop(self):
        """Accept no more, and end the connections."""
        self.running = False
        self.listener.close()
        for client in self.clients:
            client.connection.close()

    def tally(self):
        """Return the server's own figures, for INFO."""
        return {
            "connected_clients": len(self.clients),
            "total_connections_received": self.accepted,
            "polls": self.polls,
            "polls_empty_handed": self.empty_handed,
        }


class Client:
    """One connection. It takes one step at a time, and never waits."""

    __slots__ = ("connection", "conversation", "idle_timeout", "deadline",
                 "outgoing", "lingering")

    def __init__(self, connection, conversation, idle_timeout):
        self.connection = connection
        self.conversation = conversation
        self.idle_timeout = idle_timeout
        self.deadline = time.monotonic() + idle_timeout
        self.outgoing = b""  # replies that the kernel has not taken yet
        self.lingering = False

    def run(self):
        """Take a step: send replies that are owed or, if none is, read more.

        A client that does not read its replies is not read from either. Its
        requests stay in the kernel and, when that is full, with the client:
        this is backpressure. Returns False at the end of the connection.
        Raises BlockingIOError if nothing can be read, or written, at present,
        and OSError if nothing can be read any more.
        """
        if self.outgoing:
            try:
                sent = self.connection.send(self.outgoing)
            except ConnectionError:  # it has gone; its requests still count
                sent = len(self.outgoing)
            self.outgoing = self.outgoing[sent:] or self.conversation.replies()
        else:
            data = self.connection.recv(CHUNK)
            if not data:
                return False
            if self.lingering:
                return True
            self.conversation.receive(data)
            self.outgoing = self.conversation.replies()
        self.deadline = time.monotonic() + self.idle_timeout
        if self.conversation.finished and not self.outgoing:
            self.linger()
        return True

    def linger(self):
        """Let the last reply arrive before the connection is closed.

        To close while the client still sends makes the kernel reset the
        connection, and the client may lose replies that it has not read yet.
        """
        self.connection.shutdown(socket.SHUT_WR)
        self.lingering = True
        self.deadline = time.monotonic() + LINGER


# ---- The application: a key-value store that speaks Redis's protocol --------
#
# From this line to the end, the text is the same in all four servers. It is
# "sans-I/O": bytes go in, replies come out, and it never touches a socket.
# Moving the bytes is the business of the pattern above. The protocol is RESP 2
# (https://redis.io/docs/latest/develop/reference/protocol-spec/), the replies
# are those of redis-server 7, and so are most of the error messages.

MAX_REQUEST = 1024 * 1024  # bytes; one client must not fill the memory
MAX_WORDS = 1024  # per request; an empty word takes memory too
MAX_LINE = 64 * 1024  # bytes; nor must a line that never ends
REPLIES_AT_ONCE = 64 * 1024  # bytes; more requests wait until these are sent
MAX_SLEEP = 10  # seconds; in three of the patterns everybody waits

# Most lines that begin a request or a word: to look them up is the fastest.
COUNTS = {b"*%d\r\n" % n: n for n in range(1, MAX_WORDS + 1)}
LENGTHS = {b"$%d\r\n" % n: n for n in range(1024)}


class ProtocolError(Exception):
    """The client broke the rules. Where does its next request begin?"""


class Incomplete(Exception):
    """A request has no end yet. How many bytes, at least, are missing?"""


class Conversation:
    """What one client asks and is told: bytes in, replies out.

    A read may bring half a request or a hundred requests. receive() takes in
    what came; replies() carries out the requests that are complete.
    """

    # With its names set down, an object takes less memory.
    __slots__ = "store", "incoming", "needed", "finished"

    def __init__(self, store):
        self.store = store
        self.incoming = bytearray()  # received, and not carried out yet
        self.needed = 1  # with fewer bytes than that, nothing can be complete
        self.finished = False  # True after a protocol error: all is said

    def receive(self, data):
        """Take in `data`: bytes that may begin and end anywhere."""
        if not self.finished:
            self.incoming += data

    def replies(self):
        """Carry out the complete requests; return their replies as bytes.

        Stops at REPLIES_AT_ONCE bytes and one reply, so that a client which
        asks and never reads cannot fill the memory: send these, then call
        again. b"" means that there is nothing to do until more is received.
        """
        received = len(self.incoming)
        if received < self.needed:
            return b""
        self.needed, done = 1, 0
        stream = io.BytesIO(self.incoming)  # to read it like a file
        replies, size = [], 0
        try:
            while done < received and size < REPLIES_AT_ONCE:
                words = next_request(stream)
                done = stream.tell()
                if words:
                    reply = self.store.carry_out(words)
                    replies.append(reply)
                    size += len(reply)
        except Incomplete as error:
            self.needed = received - done + error.args[0]
        except ProtocolError as error:
            replies.append(error_reply(b"Protocol error: " + error.args[0]))
            self.finished = True
            done = received
        del self.incoming[:done]
        return b"".join(replies)


def next_request(stream):
    """Read a request; return its words. It may be empty, and has none then.

    Raises Incomplete or ProtocolError. An incomplete request is read again
    from its beginning when more has come, which its limits keep affordable.
    """
    line = stream.readline()
    count = COUNTS.get(line)
    if count is None:
        if not line.startswith(b"*"):
            return inline_request(line)
        count = read_number(stream, line, b"mbulk count string")
        if count is None or count > MAX_WORDS:
            raise ProtocolError(b"invalid multibulk length")
    words, room = [], MAX_REQUEST
    while len(words) < count:
        line = stream.readline()
        length = LENGTHS.get(line)
        if length is None or length > room:
            length = read_number(stream, line, b"bulk count string")
            if not line.startswith(b"$"):
                raise ProtocolError(b"expected '$', got '%c'" % line[0])
            if length is None or not 0 <= length <= room:
                raise ProtocolError(b"invalid bulk length")
        room -= length
        word, end = stream.read(length), stream.read(2)
        if len(end) < 2:
            raise Incomplete(length + 2 - len(word) - len(end))
        words.append(word)
    return words


def read_number(stream, line, name):
    """Return the number in a `line` such as `*2`, or None if it has none."""
    # As in Redis, the line ends at the first "\r" and one byte more.
    data, start = stream.getvalue(), stream.tell() - len(line)
    end = data.find(b"\r", start, -1)
    if end < 0:
        raise without_end(len(data) - start, name)
    stream.seek(end + 2)
    return to_integer(data[start + 1 : end])


def inline_request(line):
    """Return the words of a line such as a person types: `GET a`."""
    if not line.endswith(b"\n") or len(line) > MAX_LINE + 1:
        raise without_end(len(line), b"inline request")
    words = line.split(None, MAX_WORDS)
    if len(words) > MAX_WORDS:
        raise ProtocolError(b"too many words in inline request")
    return words


def without_end(length, name):
    """Return what to raise for a line that has `length` bytes and no end."""
    if length > MAX_LINE:
        return ProtocolError(b"too big " + name)
    return Incomplete(1)


class KeyValueStore:
    """The keys and values, which all connections share, and the commands.

    A command takes its words as bytes, and returns its reply as bytes.
    """

    def __init__(self):
        self.values = {}
        # INCR reads, adds, writes. No other thread may write in between.
        self.lock = threading.Lock()
        self.figures = dict  # what INFO tells: a function that returns a dict
        self.commands = {  # name: function, fewest words (with the name), most
            b"PING": (self.ping, 1, 2),
            b"ECHO": (self.echo, 2, 2),
            b"GET": (self.get, 2, 2),
            b"SET": (self.set, 3, MAX_WORDS),
            b"INCR": (self.increment, 2, 2),
            b"INCRBY": (self.increment, 3, 3),
            b"INFO": (self.info, 1, MAX_WORDS),
            b"DEBUG": (self.debug, 2, MAX_WORDS),
        }

    def carry_out(self, words):
        """Carry out a request, given as a list of words; return the reply."""
        name = words[0]
        command, fewest, most = self.commands.get(name.upper(), (None, 0, 0))
        if command is None:
            return error_reply(b"unknown command '%b'" % name[:128])
        if not fewest <= len(words) <= most:
            return error_reply(
                b"wrong number of arguments for '%b' command" % name.lower()
            )
        return command(*words[1:])

    def ping(self, message=None):
        return b"+PONG\r\n" if message is None else bulk_reply(message)

    def echo(self, message):
        return bulk_reply(message)

    def get(self, key):
        value = self.values.get(key)
        return b"$-1\r\n" if value is None else bulk_reply(value)

    def set(self, key, value, *options):
        if options:  # Redis has some, such as EX for an expiry; we have none
            return error_reply(b"syntax error")
        with self.lock:
            self.values[key] = value
        return b"+OK\r\n"

    def increment(self, key, amount=b"1"):
        amount = to_integer(amount)
        with self.lock:
            value = to_integer(self.values.get(key, b"0"))
            if amount is None or value is None:
                return error_reply(b"value is not an integer or out of range")
            value += amount
            if not -(2**63) <= value < 2**63:
                return error_reply(b"increment or decrement would overflow")
            self.values[key] = b"%d" % value
        return b":%d\r\n" % value

    def info(self, *sections):
        lines = ["# Server"]
        lines += [f"{name}:{value}" for name, value in self.figures().items()]
        return bulk_reply("".join(f"{line}\r\n" for line in lines).encode())

    def debug(self, subcommand, *words):
        """DEBUG SLEEP stands for a handler that blocks: a slow query, say."""
        if subcommand.upper() != b"SLEEP" or len(words) != 1:
            return error_reply(
                b"unknown subcommand or wrong number of arguments for '%b'."
                b" Try DEBUG SLEEP seconds." % subcommand[:128]
            )
        try:
            seconds = float(words[0])
        except ValueError:
            seconds = -1
        if not 0 <= seconds <= MAX_SLEEP:
            return error_reply(b"SLEEP takes 0 to %d seconds" % MAX_SLEEP)
        time.sleep(seconds)
        return b"+OK\r\n"


def bulk_reply(value):
    """Return the reply that carries `value`: its length, and its bytes."""
    return b"$%d\r\n%b\r\n" % (len(value), value)


def error_reply(text):
    """Return the reply that tells of an error."""
    # A line break in it would end the reply early, and what follows would be
    # taken for a reply of its own.
    return b"-ERR %b\r\n" % text.replace(b"\r", b" ").replace(b"\n", b" ")


def to_integer(text):
    """Return the 64-bit integer that the bytes `text` spell, or None.

    There is one spelling for each, as in Redis. int() alone would also take
    b" 10 ", b"+10", b"010" and b"1_0".
    """
    try:
        number = int(text) if len(text) <= 20 else 2**63
    except ValueError:
        return None
    if -(2**63) <= number < 2**63 and b"%d" % number == text:
        return number
    return None


def figures(server):
    """Return what the pattern has cost so far, as {name: value} for INFO."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "pattern": server.pattern,
        "process_id": os.getpid(),
        "threads": threading.active_count(),
        "used_cpu_user": f"{usage.ru_utime:.6f}",  # seconds
        "used_cpu_sys": f"{usage.ru_stime:.6f}",
        "voluntary_context_switches": usage.ru_nvcsw,  # it waited
        "involuntary_context_switches": usage.ru_nivcsw,  # it was made to wait
        "used_memory_peak": peak_memory(usage),  # bytes
        **server.tally(),
    }


def peak_memory(usage):
    """Return the most memory that this process has held at once, in bytes."""
    try:
        # On Linux, ru_maxrss starts from what the parent had. VmHWM does not.
        with open("/proc/self/status") as status:
            return int(status.read().partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def raise_descriptor_limit():
    """Allow this process as many descriptors, so clients, as it may have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for limit in hard, 10240:  # macOS may say "unlimited" and take only 10240
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return
        except (OSError, ValueError):
            pass


class OnceAMinute(logging.Filter):
    """Lets one warning a minute through. A shortage seldom comes alone."""

    quiet_until = 0

    def filter(self, record):
        if record.levelno < logging.WARNING:
            return True
        if record.created < self.quiet_until:
            return False
        self.quiet_until = record.created + 60
        return True


def command_line():
    """Return the options, checked, or end the program with one line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message}")
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=6380, help="0 takes a free one")
    add("--idle-timeout", type=float, default=60, metavar="SECONDS")
    add("-v", "--verbose", action="store_true", help="tell who comes and goes")
    options = parser.parse_args()
    if not options.host:  # it would mean: listen to the whole world
        parser.error("--host is empty")
    if not 0.001 <= options.idle_timeout <= 1e6:
        parser.error("--idle-timeout takes 0.001 to 1000000 seconds")
    return options


def main():
    options = command_line()
    log = logging.StreamHandler()  # to stderr
    log.addFilter(OnceAMinute())
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[log])
    raise_descriptor_limit()

    store = KeyValueStore()
    try:
        server = TCPServer(
            (options.host, options.port),
            lambda: Conversation(store),
            options.idle_timeout,
        )
    except (OSError, OverflowError, TypeError, ValueError) as error:
        sys.exit(f"cannot listen on {options.host}:{options.port}: {error}")
    store.figures = lambda: figures(server)

    stopped = False

    def stop(signal_number, frame):
        nonlocal stopped
        if not stopped:  # a second signal must not disturb the end
            stopped = True
            server.stop()
            raise KeyboardInterrupt  # out of the call that the thread is in

    try:
        # SIGINT as well: a script's "&" starts a program with SIGINT ignored.
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        host, port = server.listener.getsockname()[:2]
        print(f"{server.pattern}: listening on {host}:{port}", flush=True)
        server.start()
    except KeyboardInterrupt:
        pass
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ending already
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        for name, value in figures(server).items():
            print(f"{name}: {value}")
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
