#!/usr/bin/env python3
"""Pattern 4: an event loop on kqueue. One thread waits for everybody at once.

Sockets are non-blocking, as in the busy wait. But the loop asks the kernel one
question only: which of all these descriptors are ready to be read or written?
It sleeps until there are some, and then makes the calls that are worth it.

    listener  --.
    client A  --|     .--------.                     .------.
    client B  --+---> | kqueue | -- "B and C are --> | loop | --> B.run()
    client C  --'     '--------'     ready"          '------' --> C.run()
                    the thread waits               it runs who is
                    here, for them all             ready, and waits again

Start it:  python3 4_kqueue_loop.py
Ask it:    nc 127.0.0.1 6380   (then type: SET a 1, GET a, INFO)
Watch:     a thousand clients, two threads, and no CPU while they are silent.
"""

import argparse
import io
import logging
import os
import resource
import select
import signal
import socket
import sys
import threading
import time

BACKLOG = 4096  # clients that may wait for accept(), if the kernel agrees
CHUNK = 64 * 1024  # bytes to read at once, at most
LINGER = 1.0  # seconds that a client has to take in its last reply
TICK = 1.0  # seconds between two looks for clients that have gone silent
MAX_EVENTS = 1024  # to take from the queue at once


class TCPServer:
    """Listens, and runs an event loop in a thread of its own."""

    pattern = "event loop on kqueue"

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
        self.loop = EventLoop(self.listener, new_conversation, idle_timeout)
        self.thread = threading.Thread(target=self.loop.run, daemon=True)

    def start(self):
        """Serve, until stop() is called. SystemExit if the loop fails."""
        self.thread.start()
        while self.thread.is_alive():
            self.thread.join(TICK)  # then Python looks for signals again
        if self.loop.running:  # threading has printed the traceback
            sys.exit(1)

    def stop(self):
        """Accept no more, and end the connections."""
        self.loop.stop()
        if self.thread.is_alive():
            self.thread.join(0.5)  # not for ever: a handler may be asleep
        self.listener.close()

    def tally(self):
        """Return the server's own figures, for INFO."""
        return {
            "connected_clients": len(self.loop.clients),
            "total_connections_received": self.loop.accepted,
            "wakeups": self.loop.wakeups,
            "events": self.loop.events,
        }


class EventLoop:
    """Waits for all descriptors in one queue, and runs who is ready.

    kqueue, kevent and the KQ_ names come from the section behind the loop.
    """

    def __init__(self, listener, new_conversation, idle_timeout):
        self.listener = listener
        self.new_conversation = new_conversation
        self.idle_timeout = idle_timeout
        self.clients = {}  # descriptor: Client
        self.ready = set()  # those of them whom the queue has just reported
        self.accepted = 0
        self.wakeups = 0
        self.events = 0  # how many the queue had for us in all these
        self.running = True
        self.accepting = False
        self.queue = kqueue()
        # The loop sleeps in the queue: stop() sends a byte here to wake it.
        self.wake_me, self.waker = socket.socketpair()
        self.wake_me.setblocking(False)
        self.waker.setblocking(False)

    def run(self):
        """Serve, until stop() is called."""
        # Python handles signals in the main thread, but the kernel may wake
        # any thread for them. For it to wake that one, this one refuses.
        refused = signal.SIGINT, signal.SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, refused)
        self.change(self.wake_me.fileno(), KQ_FILTER_READ, KQ_EV_ADD)
        self.accept_again()
        next_look = 0
        try:
            while self.running:
                # With nobody connected it may sleep until somebody comes.
                timeout = TICK if self.clients or not self.accepting else None
                events = self.queue.control(None, MAX_EVENTS, timeout)
                now = time.monotonic()
                if events:
                    self.wakeups += 1
                    self.events += len(events)
                for event in events:
                    client = self.clients.get(event.ident)
                    if client:
                        self.ready.add(client)
                        self.step(client)
                    elif event.ident == self.listener.fileno():
                        self.accept()
                    # else it is stop() that wakes us, and `running` is False
                self.answer()
                # Unless there were too many events to take at once, who had
                # sent anything has been run: the rest has been silent.
                if now >= next_look and len(events) < MAX_EVENTS:
                    next_look = now + TICK
                    self.let_silent_clients_go(now)
                    self.accept_again()
        finally:
            for client in self.clients.values():
                client.connection.close()

    def change(self, descriptor, what, flag):
        """Have the queue begin or end to watch a descriptor."""
        self.queue.control([kevent(descriptor, what, flag)], 0)

    def accept(self):
        """Take in the client that the queue has announced."""
        try:
            connection, address = self.listener.accept()
            descriptor = connection.fileno()
            self.change(descriptor, KQ_FILTER_READ, KQ_EV_ADD)
        except (BlockingIOError, ConnectionError):  # it has left already
            return
        except OSError as error:  # most likely EMFILE: no descriptor is free
            logging.warning("cannot accept: %s; will try again", error)
            # Level-triggered, the queue would report this client for ever.
            self.change(self.listener.fileno(), KQ_FILTER_READ, KQ_EV_DELETE)
            self.accepting = False
            return
        # macOS and the BSDs take this over from the listener, Linux does not.
        connection.setblocking(False)
        client = Client(
            connection, self.new_conversation(), self.idle_timeout
        )
        self.clients[descriptor] = client
        self.accepted += 1
        logging.info("descriptor %d is a client at %s", descriptor, address)

    def accept_again(self):
        """Watch for new clients, if that is not so already."""
        if not self.accepting:
            self.change(self.listener.fileno(), KQ_FILTER_READ, KQ_EV_ADD)
            self.accepting = True

    def step(self, client):
        """Let a client take a step. Return whether it is still there."""
        try:
            if client.run():
                return True
            reason = "closed"
        except BlockingIOError:
            return True
        except OSError as error:
            reason = f"lost: {error}"
        self.close(client, reason)
        return False

    def answer(self):
        """Send the replies, now that all who are ready have been read from.

        Redis does so, too. A reply wakes up the process that waits for it; one
        that waits for several, on one machine, is woken up once for them all.
        """
        while self.ready:
            client = self.ready.pop()
            if client.outgoing and not self.step(client):
                continue
            # Either it reads or it writes. To watch for writes all the time
            # would wake the loop all the time: there is nearly always room.
            needs = KQ_FILTER_WRITE if client.outgoing else KQ_FILTER_READ
            if needs != client.waits_for:
                descriptor = client.connection.fileno()
                self.change(descriptor, client.waits_for, KQ_EV_DELETE)
                self.change(descriptor, needs, KQ_EV_ADD)
                client.waits_for = needs

    def let_silent_clients_go(self, now):
        """End the connections on which no byte has moved for too long."""
        for client in list(self.clients.values()):
            if now >= client.deadline:
                self.close(client, "let go: too long silent")

    def close(self, client, reason):
        """End a connection. The next may get the number of its descriptor."""
        descriptor = client.connection.fileno()
        logging.info("descriptor %d %s", descriptor, reason)
        self.change(descriptor, client.waits_for, KQ_EV_DELETE)
        del self.clients[descriptor]
        self.ready.discard(client)
        client.connection.close()
        self.accept_again()  # there is room for one now

    def stop(self):
        """End run(), from another thread."""
        self.running = False
        self.waker.send(b"!")


class Client:
    """One connection. It takes one step at a time, and never waits."""

    __slots__ = ("connection", "conversation", "idle_timeout", "deadline",
                 "outgoing", "lingering", "waits_for")

    def __init__(self, connection, conversation, idle_timeout):
        self.connection = connection
        self.conversation = conversation
        self.idle_timeout = idle_timeout
        self.deadline = time.monotonic() + idle_timeout
        self.outgoing = b""  # replies that the kernel has not taken yet
        self.lingering = False
        self.waits_for = KQ_FILTER_READ

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


# ---- kqueue on Linux --------------------------------------------------------
#
# Linux has epoll instead. The two do the same job, but
#   - kqueue has a registration for each descriptor and filter (read, write),
#     epoll has one for each descriptor, with a mask. So we keep the masks;
#   - kqueue takes changes and gives events in one call, epoll has two calls.

try:
    from select import KQ_EV_ADD, KQ_EV_DELETE, KQ_FILTER_READ, KQ_FILTER_WRITE
    from select import kevent, kqueue
except ImportError:
    if not hasattr(select, "epoll"):
        sys.exit("this system has neither kqueue nor epoll")

    KQ_FILTER_READ, KQ_FILTER_WRITE = select.EPOLLIN, select.EPOLLOUT
    KQ_EV_ADD, KQ_EV_DELETE = 1, 2
    TROUBLE = select.EPOLLERR | select.EPOLLHUP  # reported unasked

    class kevent:
        __slots__ = "ident", "filter", "flags"

        def __init__(self, ident, filter, flags):
            self.ident = ident
            self.filter = filter
            self.flags = flags

    class kqueue:
        def __init__(self):
            self.epoll = select.epoll()
            self.masks = {}  # descriptor: what it is watched for

        def control(self, changes, max_events, timeout=None):
            for change in changes or ():
                self.apply(change.ident, change.filter, change.flags)
            if not max_events:
                return []
            events = []
            timeout = -1 if timeout is None else timeout
            for ident, ready in self.epoll.poll(timeout, max_events):
                if ready & TROUBLE:  # recv or send will tell which
                    ready |= self.masks[ident]
                if ready & KQ_FILTER_READ:
                    events.append(kevent(ident, KQ_FILTER_READ, 0))
                if ready & KQ_FILTER_WRITE:
                    events.append(kevent(ident, KQ_FILTER_WRITE, 0))
            return events

        def apply(self, ident, filter, flags):
            before = self.masks.pop(ident, 0)
            mask = before | filter if flags == KQ_EV_ADD else before & ~filter
            if not before:
                self.epoll.register(ident, mask)
            elif mask:
                self.epoll.modify(ident, mask)
            else:
                self.epoll.unregister(ident)
            if mask:
                self.masks[ident] = mask


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
