"""The application, once: its text is the same in all four files.

It is a Session without a socket; redis-server 7 must answer the same.
"""

import ast
import difflib
import random
import re
import socket
import subprocess
import sys
import threading

import pytest
from conftest import (
    HERE, PATIENCE, SCRIPTS, array, bulk, load, needs, text_of, wait_for,
)  # fmt: skip

MARK = "# ---- The application"
KIB, MIB = 1024, 1024 * 1024
OK, PONG, NIL = b"+OK\r\n", b"+PONG\r\n", b"$-1\r\n"
NOT_INTEGER = b"-ERR value is not an integer or out of range\r\n"
OVERFLOW = b"-ERR increment or decrement would overflow\r\n"
BREACH = b"-ERR Protocol error: "
MAX, MIN = b"9223372036854775807", b"-9223372036854775808"
ANY = bytes(range(256)) + b"\r\n\0\n\r*1\r\n$4\r\nPING\r\n"


@pytest.fixture(scope="module")
def module():
    return load("single")


@pytest.fixture
def new(module, monkeypatch):
    """Make sessions. They share a new store."""
    monkeypatch.setattr(module, "store", {})
    return lambda: module.Session({"pattern": "a test"})


def answer(session, *pieces):
    """Return what it replies to the pieces, and whether it is finished."""
    replies = b""
    for piece in pieces:
        if not session.finished:  # the pattern's promise
            session.receive(piece)
            replies += b"".join(iter(session.answer, b""))
    return replies, session.finished


def asked(text):
    """Return the requests of a row: commands between |, as arrays."""
    return b"".join(array(*line.split()) for line in text.split(b"|"))


TOP = b"9223372036854775806"
ROWS = [
    (b"PING | pInG a | PING b", PONG + bulk(b"a") + bulk(b"b")),
    (b"GET a | SET a v | gEt a", NIL + OK + bulk(b"v")),
    (b"INCR a | INCR a | GET a", b":1\r\n:2\r\n" + bulk(b"2")),
    (b"SET a -2 | INCR a | INCR a | INCR a", OK + b":-1\r\n:0\r\n:1\r\n"),
    (b"SET a %b | INCR a | INCR a" % TOP, OK + b":%b\r\n" % MAX + OVERFLOW),
    (b"INCRBY a %b | INCRBY a -1" % MIN, b":%b\r\n" % MIN + OVERFLOW),
    (b"INCRBY a %b | INCRBY a %b" % (MAX, MIN), b":%b\r\n:-1\r\n" % MAX),
]
TABLE = {request.decode(): (asked(request), r) for request, r in ROWS}
TABLE["bytes"] = array(b"PING", ANY) + array(b"ping", b""), bulk(ANY) + bulk(b"")
TABLE["any key"] = (
    array(b"SET", ANY, ANY) + array(b"GET", ANY) + array(b"GET", ANY.lower()),
    OK + bulk(ANY) + NIL,
)
TABLE["lines"] = (
    b"SET a 1\r\n \t PING \t  b \t \r\nincrby a x\nGET a\n\n \t \r\n",
    OK + bulk(b"b") + NOT_INTEGER + bulk(b"1"),
)
TABLE["nothing"] = b"\r\n\r\n\n*0\r\nPING\r\n\r\n", PONG
for number in [
    b"1_0", b" 10 ", b" 10", b"10 ", b"10\n", b"10\0", b"+1", b"010", b"-0",
    b"--1", b"-", b"", b"1.0", b"1e3", b"0x10", "\u0663".encode(), b"x",
    b"9223372036854775808", b"-9223372036854775809", b"1" * 5000,
]:  # fmt: skip
    TABLE[f"number {number.decode()[:30]!a}"] = (
        array(b"INCRBY", b"a", number)
        + array(b"SET", b"a", number)
        + array(b"INCR", b"a")
        + array(b"GET", b"a"),
        NOT_INTEGER + OK + NOT_INTEGER + bulk(number),
    )


@pytest.mark.parametrize("case", TABLE)
def test_replies(module, new, case):
    """The reply is exactly this one, wherever a read has ended."""
    request, reply = TABLE[case]
    assert answer(new(), request) == (reply, False)
    cuts = [[request[:at], request[at:]] for at in range(1, 200)]
    for pieces in [*cuts, [bytes([byte]) for byte in request]]:
        module.store.clear()
        pieces = [piece for piece in pieces if piece]
        assert answer(new(), *pieces) == (reply, False), pieces


ERRORS = b"""nonsense | a b c | GET | GET a b | SET | SET a | SET a v EX 5 |
INCR | INCR a 1 | INCRBY a | INCRBY a 1 2 | PING a b | HELLO 1 | HELLO 4 |
HELLO 03 | HELLO 3 AUTH a b | DEBUG | DEBUG x y | DEBUG SLEEP | DEBUG SLEEP x |
DEBUG SLEEP nan | DEBUG SLEEP inf | DEBUG SLEEP -1 | DEBUG SLEEP 10.01 |
DEBUG SLEEP 11 | DEBUG SLEEP 1e300 | DEBUG SLEEP 1_0 | DEBUG SLEEP 1 1"""
OTHERS = [
    array(b""), array(b"a\r\n+OK\r\nb", b"x"), array(b"n" * 500_000),
    array(b"DEBUG", b"SLEEP 5"), array(b"DEBUG", b"", b"SLEEP 5"),
    array(b"DEBUG", b"SLEEP", b"1" * 100_000), array(b"GET", *[b""] * 1023),
    array(b"HELLO", b""), array(b"\xff" * 9), array(b"POST", b"/"),
]  # fmt: skip


def test_errors(new):
    """Anything else gets an error in one line, and the session goes on."""
    requests = [line.strip() + b"\r\n" for line in ERRORS.split(b"|")]
    for request in [*requests, *OTHERS]:
        replies, finished = answer(new(), request + b"PING\r\n")
        assert re.fullmatch(rb"-ERR [^\r\n]{5,80}\r\n\+PONG\r\n", replies)
        assert not finished


def test_quit(new, module):
    """QUIT is the last thing that is carried out, now and later."""
    session = new()
    session.receive(b"PING\r\nquit\r\nSET a 1\r\n*x\r\n")
    assert session.answer() == PONG + OK and session.finished
    assert session.answer() == session.answer() == b""
    assert module.store == {}


def test_hello(new):
    """HELLO agrees on a version, and that on the reply for nothing."""
    two, three = b"*2\r\n$5\r\nproto\r\n:2\r\n", b"%1\r\n$5\r\nproto\r\n:3\r\n"
    one, other = new(), new()
    for request, reply, null in [
        (b"GET none\r\n", NIL, NIL),
        (b"HELLO\r\n", two, NIL),
        (array(b"hello", b"3"), three, b"_\r\n"),
        (b"HELLO\r\n", three, b"_\r\n"),  # it keeps the version
        (b"HELLO 2\r\n", two, NIL),
    ]:
        assert answer(one, request) == (reply, False)
        assert answer(one, b"GET none\r\n") == (null, False)
        assert answer(other, b"GET none\r\n") == (NIL, False)


def test_info(new):
    """Redis's format; no comma in a value, else redis-py makes a list."""
    reply, _ = answer(new(), b"INFO\r\n")
    size, _, text = reply.partition(b"\r\n")
    lines = text.decode().splitlines()
    assert int(size[1:]) == len(text) - 2 and text.endswith(b"\r\n")
    assert "role:master" in lines and "pattern:a test" in lines
    assert all(re.fullmatch(r"[a-z_]+:[^,]+", line) for line in lines)


BREACHES = [
    b"*x", b"*", b"*+1", b"* 1", b"*1_0", b"*99999999999", b"*1025", b"*-1",
    b"*9223372036854775808", b"*1\r\n$x", b"*1\r\n$", b"*1\r\n$-1", b" post",
    b"*1\r\n$+4", b"*1\r\n$ 4", b"*1\r\n$1_0", b"*1\r\nPING", b"*1\r\n",
    b"*1\r\nX4", b"*1\r\n4", b"*1\r\n$4 ", b"*1\r\n$99999999999",
    b"*2\r\n$4\r\nECHO\r\n:5", b"*1\r\n$1048577", b"*1 ",
    b"*3\r\n$4\r\nECHO\r\n$600000\r\n%b\r\n$600000" % (b"v" * 600_000),
    b"POST / HTTP/1.1", b"Host: 127.0.0.1:6380", b"hOsT:x", b"a" + b" v" * 1024,
]  # fmt: skip
ENDLESS = [b"v" * 66_000, b"*" + b"1" * 66_000, b"*1\r\n$" + b"1" * 66_000]


@pytest.mark.parametrize(
    "breach",
    [line + b"\r\n" for line in BREACHES] + ENDLESS,
    ids=lambda breach: ascii(breach[:30].decode()),
)
def test_breaches(new, module, breach):
    """Good requests first; then a line about it; then nothing any more."""
    data = b"PING\r\nSET a 1\r\n" + breach + b"\r\nSET a 2\r\nPING\r\n"
    for pieces in [data], [data[:9], data[9:]], [data[:40], data[40:]]:
        session = new()
        replies, finished = answer(session, *pieces)
        assert replies.startswith(PONG + OK + BREACH)
        assert replies.count(b"\r\n") == 3 and replies.endswith(b"\r\n")
        assert finished and module.store == {b"a": b"1"}
        assert session.answer() == b""  # it is not found again
    # Without the bytes behind it, as well.
    assert answer(new(), breach)[0].startswith(BREACH)


def test_what_is_no_breach(new):
    """Just within the limits; and POST as a word among others."""
    value = b"v" * (MIB - len(b"PING"))
    long = b"v" * (64 * KIB - len(b"PING \r\n"))
    for request, reply in [
        (array(b"PING", value) * 2, bulk(value) * 2),
        (b"PING " + long + b"\r\n", bulk(long)),
        (b"SET POST Host:\r\nGET POST\r\n", OK + bulk(b"Host:")),
        (b"*1\r\n$000004\r\nPING\r\n", PONG),
    ]:
        assert answer(new(), request) == (reply, False)
    for request in array(*[b""] * 1024), b"a" + b" v" * 1023 + b"\r\n":
        assert not answer(new(), request)[1]


@pytest.mark.parametrize(
    "begin", [b"", b"*", b"*1\r\n$", b"*1025\r\n", b"*1\r\n$1048577\r\n"]
)
def test_limits_are_checked_before_memory_is_spent(new, begin):
    """Of what goes beyond a limit, next to nothing is kept."""
    tracemalloc = pytest.importorskip("tracemalloc")  # PyPy has none
    pieces = [begin] * bool(begin) + [b"1" * 64 * KIB] * 100
    tracemalloc.start()
    try:
        replies, finished = answer(new(), *pieces)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert replies.startswith(BREACH) and finished
    assert peak < MIB


@pytest.mark.parametrize("size", [10, 1000, 500_000])
def test_replies_are_bounded(new, module, size):
    """answer() gives about 64 KiB and one reply at a time; none is lost.

    Requests wait, and change nothing, until their replies are taken.
    """
    value, count = b"v" * size, 20_000_000 // (1000 + size)
    session = new()
    answer(session, array(b"SET", b"a", value))
    session.receive((b"INCR b\r\n" + array(b"GET", b"a")) * count)
    lots = [session.answer()]
    assert 0 < int(module.store[b"b"]) < count // 2
    lots += iter(session.answer, b"")
    assert max(map(len, lots)) <= 64 * KIB + len(bulk(value))
    numbers = (b":%d\r\n" % (number + 1) for number in range(count))
    expected = b"".join(number + bulk(value) for number in numbers)
    assert b"".join(lots) == expected


def test_an_unfinished_request_costs_little(new):
    """What is read again with each piece stays small: words, lines.

    Counted are lines of Python, which do not depend on the machine.
    """

    def work(*pieces):
        session, lines = new(), [0]

        def trace(frame, event, arg):
            lines[0] += 1
            return trace

        sys.settrace(trace)
        try:
            replies, _ = answer(session, *pieces)
        finally:
            sys.settrace(None)
        return replies, lines[0]

    request = array(b"SET", b"a", b"v" * 1_000_000)
    parts = [request[i : i + 1460] for i in range(0, len(request), 1460)]
    replies, lines = work(*parts)
    assert replies == OK and lines < 100 * len(parts)
    begin = b"*1024\r\n" + b"$0\r\n\r\n" * 1023
    assert work(begin, *[b"$"] * 1)[1] < 50_000
    assert work(b"\r\n" * 3000)[1] < 100_000


def test_how_long_a_handler_sleeps(new, module, monkeypatch):
    """DEBUG SLEEP takes up to 10 seconds, and parts of them."""
    slept = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    for seconds in b"0", b"5", b"0.25", b"9.99", b"10":
        assert answer(new(), b"debug Sleep %b\n" % seconds) == (OK, False)
    assert slept == [0, 5, 0.25, 9.99, 10]


def test_no_number_is_long(new, module, monkeypatch):
    """Old Pythons take seconds for a million digits: int() sees but a few."""

    def short(text):
        assert len(text) < 30
        return int(text)

    monkeypatch.setattr(module, "int", short, raising=False)
    digits = b"1" * 60_000
    for line in b"*%b\r\n", b"*1\r\n$%b\r\n", b"INCRBY a %b\r\n":
        assert answer(new(), line % digits)[0].startswith(b"-ERR")


INTEGERS = [b"0", b"1", b"-1", b"42", MAX, MIN, b"9223372036854775806"]
SIZES = {b"PING": 1, b"GET": 1, b"INCR": 1, b"SET": 2, b"INCRBY": 2}


def random_conversation(rng):
    """Return requests of all kinds, that differ from Redis's in no way."""
    big = bytes(rng.getrandbits(8) for _ in range(5000))
    requests = [b"\r\n", b"\n", b"*0\r\n", b" \t\r\n"]
    for _ in range(rng.randint(1, 15)):
        name = rng.choice(list(SIZES))
        words = [rng.choice([name, name.lower(), name.title()])]
        kinds = [[b"a", b"b"], INTEGERS, INTEGERS + [b"x", b"1.5", b"+1"]]
        typed = rng.random() < 0.4
        if not typed:
            kinds.append([b"1_0", b" 10 ", b"010", b"-0", b"", ANY, big])
        size = range(SIZES[name] if name != b"PING" else rng.randint(0, 1))
        words += [rng.choice(rng.choice(kinds)) for _ in size]
        if typed:
            line = rng.choice([b" ", b"\t", b"  "]).join(words)
            requests.append(line + rng.choice([b"\r\n", b"\n", b" \r\n"]))
        else:
            requests.append(array(*words))
    rng.shuffle(requests)
    return b"".join(requests)


def pieces_of(rng, data):
    """Cut the data into a few pieces, anywhere."""
    cuts = sorted(rng.randint(0, len(data)) for _ in range(rng.randint(0, 6)))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]
    return [piece for piece in pieces if piece]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Return a function that asks redis-server 7, which has nothing stored."""
    needs("redis-server")
    version = subprocess.check_output(["redis-server", "--version"])
    if b"v=7." not in version:
        pytest.skip(f"compares with redis-server 7, here is {version}")
    path = tmp_path_factory.mktemp("redis")
    # A relative name: that of a UNIX socket may not be long.
    words = "redis-server --port 0 --appendonly no --daemonize no --unixsocket"
    line = [*words.split(), "./socket", "--save", ""]
    process = subprocess.Popen(line, cwd=path, stdout=subprocess.DEVNULL)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    wait_for((path / "socket").exists, "redis-server is there")
    name = f"/proc/{process.pid}/cwd/socket"
    if not (HERE.parent / name).exists():
        name = str(path / "socket")
    wait_for(lambda: sock.connect_ex(name) == 0, "it listens")
    end = bulk(b"that was all, said the real one")

    def ask(request):
        sock.sendall(request + b"*2\r\n$4\r\nECHO\r\n" + end + b"FLUSHALL\r\n")
        replies = b""
        while not replies.endswith(end + OK):
            data = sock.recv(1 << 16)
            assert data, replies
            replies += data
        return replies[: -len(end + OK)]

    yield ask
    sock.close()
    process.terminate()
    process.wait(PATIENCE)


def test_table_against_the_real_server(real):
    """The replies that the table expects are those of redis-server 7."""
    for case, (request, reply) in TABLE.items():
        assert real(request) == reply, case


def test_random_conversations(module, new, real):
    """500 random ones, cut anywhere, are answered as by redis-server 7."""
    rng, all_of_them = random.Random(20240229), b""
    for number in range(500):
        module.store.clear()
        data = random_conversation(rng)
        reply = real(data)
        assert answer(new(), *pieces_of(rng, data)) == (reply, False), data
        all_of_them += reply
    kinds = [PONG, OK, NIL, NOT_INTEGER, OVERFLOW, bulk(MAX), b":1\r\n"]
    assert [kind for kind in kinds if all_of_them.count(kind) < 3] == []


# ---- The text ---------------------------------------------------------------

LIMITS = {"single": (245, 45), "multi": (245, 46), "busy": (285, 80)}
LIMITS["kqueue"] = 360, 156


def test_one_text_for_all():
    """From the application line on, all four files are the same text."""
    texts = [text_of(name) for name in SCRIPTS]
    assert [text.count(f"\n{MARK}") for text in texts] == [1, 1, 1, 1]
    assert len({text.partition(MARK)[2] for text in texts}) == 1
    clients = [re.findall(r"^class Client:\n(?:.*\n)*?\n\n", text, re.M)
               for text in texts[2:]]  # fmt: skip
    assert clients[0] == clients[1] and len(clients[0]) == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_text(name):
    """Short, with a formatter's layout; it stands alone and imports little."""
    text = text_of(name)
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line[:6] == "class ")
    mark = next(i for i, line in enumerate(lines) if line.startswith(MARK))
    assert len(lines) <= LIMITS[name][0] and mark - first <= LIMITS[name][1]
    assert all(len(line) <= 79 and line == line.rstrip() for line in lines)
    tree = ast.parse(text, feature_version=(3, 9))
    assert f"python3 {SCRIPTS[name]}" in ast.get_docstring(tree)
    imported = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert imported <= names  # each is used
    assert imported <= set(sys.builtin_module_names) | STANDARD
    assert not imported & {"asyncio", "selectors", "socketserver", "signal"}
    statements = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.stmt)]
    assert len(statements) == len(set(statements))  # one a line
    loop = text.partition("# ---- kqueue on Linux")[0]
    assert "epoll." not in loop.partition('"""\n\n')[2]


STANDARD = {
    "argparse", "collections", "contextlib", "io", "re", "resource", "select",
    "socket", "threading",
}  # fmt: skip


def test_difference_of_1_and_2():
    """What differs is the pattern: at most 16 lines, the docstring aside."""
    texts = [text_of(name).partition("import argparse")[2].splitlines()
             for name in ("single", "multi")]  # fmt: skip
    diff = list(difflib.ndiff(*texts))
    assert 0 < sum(line[:2] in ("- ", "+ ") for line in diff) <= 16


@pytest.mark.parametrize("name", SCRIPTS)
def test_imported(name):
    """A TCPServer works when another program imports the file."""
    server = load(name).TCPServer("127.0.0.1", 0)
    threading.Thread(target=server.start, daemon=True).start()
    with socket.create_connection(server.listener.getsockname(), 10) as sock:
        sock.sendall(b"PING\r\nINFO\r\nQUIT\r\n")
        replies = b"".join(iter(lambda: sock.recv(9999), b""))
    assert replies.startswith(PONG) and b"role:master" in replies
