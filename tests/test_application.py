"""The application, a Session without a socket: as redis-server 7 answers."""

import ast
import difflib
import random
import re
import socket
import subprocess
import threading
import time
import trace

import pytest
from conftest import (
    PATIENCE, SCRIPTS, array, bulk, load, needs, run, talk,
    text_of, together, wait_for,
)  # fmt: skip

KIB, MIB = 1024, 1024 * 1024
OK, PONG, NIL = b"+OK\r\n", b"+PONG\r\n", b"$-1\r\n"
NOT_INTEGER = b"-ERR value is not an integer or out of range\r\n"
OVERFLOW = b"-ERR increment or decrement would overflow\r\n"
BREACH = b"-ERR Protocol error: "
MAX, MIN = b"9223372036854775807", b"-9223372036854775808"
TOP = b"9223372036854775806"
ANY = bytes(range(256)) + b"\r\n\0\n\r*1\r\n$4\r\nPING\r\n"

module = load("single")
values = module.store


def short_int(text):
    """Stand in for int(), which needs seconds for many digits if it is old."""
    assert len(text) < 30
    return int(text)


module.int = short_int  # in all tests


def new():
    """Return a session, with nothing stored."""
    values.clear()
    return module.Session({"pattern": "a test"})


def answer(session, *pieces):
    """Return what it replies to the pieces, and whether it is finished."""
    replies = b""
    for piece in pieces:
        if not session.finished:  # the pattern's promise
            session.receive(piece)
            replies += b"".join(iter(session.answer, b""))
    return replies, session.finished


def asked(text, value=b""):
    """Return the requests between the bars, as arrays; ? is the value."""
    requests = [line.split() for line in text.split(b"|")]
    known = {b"?": value}
    return b"".join(array(*[known.get(w, w) for w in r]) for r in requests)


TABLE = [
    (asked(b"PING | pInG a | PING b"), PONG + bulk(b"a") + bulk(b"b")),
    (asked(b"GET a | SET a v | gEt a | GET A"), NIL + OK + bulk(b"v") + NIL),
    (asked(b"INCR a | INCR a | GET a"), b":1\r\n:2\r\n" + bulk(b"2")),
    (asked(b"SET a -2 | INCR a | INCR a"), OK + b":-1\r\n:0\r\n"),
    (asked(b"SET a ? | INCR a", TOP), OK + b":%b\r\n" % MAX),
    (asked(b"INCRBY a ? | INCR a", MAX), b":%b\r\n" % MAX + OVERFLOW),
    (asked(b"INCRBY a ? | INCRBY a -1", MIN), b":%b\r\n" % MIN + OVERFLOW),
    (asked(b"SET a ? | INCRBY a %b" % MIN, MAX), OK + b":-1\r\n"),
    (asked(b"PING ? | SET ? ? | GET ?", ANY), bulk(ANY) + OK + bulk(ANY)),
    (asked(b"PING ? | SET ? ? | GET ?"), bulk(b"") + OK + bulk(b"")),
    (b"SET a 1\r\n \t PING \t  b \t \r\n\n \t \r\n", OK + bulk(b"b")),
    (b"SET POST Host:\nGET POST\n", OK + bulk(b"Host:")),
    (b"SET a x\nincr a\n", OK + NOT_INTEGER),
    (b"\r\n\r\n\n*0\r\nPING\r\n\r\n", PONG),
]
for number in [
    b"1_0", b" 10 ", b" 10", b"10 ", b"10\n", b"10\0", b"+1", b"010", b"-0",
    b"--1", b"-", b"", b"1.0", b"1e3", b"0x10", "\u0663".encode(), b"x",
    b"9223372036854775808", b"-9223372036854775809", b"1" * 5000,
]:  # fmt: skip
    request = asked(b"INCRBY a ? | SET a ? | INCR a | GET a", number)
    reply = NOT_INTEGER + OK + NOT_INTEGER + bulk(number)
    TABLE.append((request, reply))
TWO, THREE = b"*2\r\n$5\r\nproto\r\n:2\r\n", b"%1\r\n$5\r\nproto\r\n:3\r\n"
OURS = [
    (asked(b"HELLO 3 | GET a | HELLO | GET a"), (THREE + b"_\r\n") * 2),
    (b"GET a\r\nHELLO\r\nGET a\r\n", NIL + TWO + NIL),  # each has its own
    (b"HELLO 3\r\nHELLO 2\r\nGET a\r\n", THREE + TWO + NIL),
    (b"*1\r\n$000004\r\nPING\r\n", PONG),
]


def test_replies():
    """The reply is exactly this one, wherever a read has ended."""
    for request, reply in OURS + TABLE:
        cuts = [[request[:at], request[at:]] for at in range(200)]
        for pieces in [*cuts, [bytes([byte]) for byte in request]]:
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
    array(b"DEBUG", b"SLEEP", b"1" * 100_000), array(b"HELLO", b""),
    array(b"\xff" * 9), array(b"POST", b"/"),
    array(*[b""] * 1024), b"a" + b" v" * 1023,  # as many words as are allowed
]  # fmt: skip


def test_errors_and_sleeps(monkeypatch):
    """Anything else gets an error in one line, and the session goes on."""
    slept = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    for request in [*ERRORS.split(b"|"), *OTHERS]:
        replies, finished = answer(new(), request + b"\r\nPING\r\n")
        assert re.fullmatch(rb"-ERR [^\r\n]{5,80}\r\n\+PONG\r\n", replies)
        assert not finished and not slept
    for seconds in b"0", b"5", b"0.25", b"9.99", b"10":
        assert answer(new(), b"debug Sleep %b\n" % seconds) == (OK, False)
    assert slept == [0, 5, 0.25, 9.99, 10]


BREACHES = [
    b"*x", b"*", b"*+1", b"* 1", b"*1_0", b"*99999999999", b"*1025", b"*-1",
    b"*9223372036854775808", b"*1\r\n$x", b"*1\r\n$", b"*1\r\n$-1", b" post",
    b"*1\r\n$+4", b"*1\r\n$ 4", b"*1\r\n$1_0", b"*1\r\nPING", b"*1\r\n",
    b"*1\r\nX4", b"*1\r\n4", b"*1\r\n$4 ", b"*1\r\n$99999999999",
    b"*2\r\n$4\r\nECHO\r\n:5", b"*1\r\n$1048577", b"*1 ",
    b"*3\r\n$4\r\nECHO\r\n$600000\r\n%b\r\n$600000" % (b"v" * 600_000),
    b"POST / HTTP/1.1", b"Host: 127.0.0.1:6380", b"hOsT:x",
    b"a" + b" v" * 1024, b"*" + b"1" * 60_000, b"*1\r\n$" + b"1" * 60_000,
]  # fmt: skip
ENDLESS = [b"v" * 66_000, b"*" + b"1" * 66_000, b"*1\r\n$" + b"1" * 66_000]


def test_breaches_and_quit():
    """Good requests first; then a line about it; then nothing any more."""
    breaches = [line + b"\r\n" for line in BREACHES] + ENDLESS
    for end, last in [(b"quit\r\n", OK), *((b, BREACH) for b in breaches)]:
        data = b"PING\r\nSET a 1\r\n" + end
        whole = data + b"\r\nSET a 2\r\n*x\r\nPING\r\n"
        for at in 9, 15, 40, len(data), len(whole):
            session = new()
            replies, finished = answer(session, whole[:at], whole[at:])
            assert replies.startswith(PONG + OK + last), end[:30]
            assert replies.count(b"\r\n") == 3 and replies.endswith(b"\r\n")
            assert finished and values == {b"a": b"1"}
            assert session.answer() == b""  # it is not found again


def test_limits():
    """As much as is allowed. Of what goes beyond, next to nothing is kept."""
    value, line = b"v" * (MIB - 4), b"v" * (64 * KIB - len(b"PING \r\n"))
    assert answer(new(), array(b"PING", value) * 2) == (bulk(value) * 2, False)
    assert answer(new(), b"PING %b\r\n" % line) == (bulk(line), False)
    tracemalloc = pytest.importorskip("tracemalloc")  # PyPy has none
    for begin in b"*", b"*1\r\n$", b"*1025\r\n", b"*1\r\n$1048577\r\n", b"1":
        tracemalloc.start()
        replies, finished = answer(new(), begin, *[b"1" * 64 * KIB] * 100)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert replies.startswith(BREACH) and finished
        assert peak < MIB


@pytest.mark.parametrize("size", [10, 1000, 500_000])
def test_replies_are_bounded(size):
    """About 64 KiB and one reply at a time. The other requests wait."""
    value, count = b"v" * size, 20_000_000 // (1000 + size)
    session = new()
    answer(session, array(b"SET", b"a", value))
    session.receive(b"INCR b\r\nGET a\r\n" * count)
    lots = [session.answer()]
    assert 0 < int(values[b"b"]) < count // 2
    lots += iter(session.answer, b"")
    assert max(map(len, lots)) <= 64 * KIB + len(bulk(value))
    numbers = (b":%d\r\n" % (number + 1) for number in range(count))
    assert b"".join(lots) == b"".join(n + bulk(value) for n in numbers)


def test_an_unfinished_request_costs_little():
    """Few lines of Python are run again with each piece: words, lines."""
    request = array(b"SET", b"a", b"v" * 1_000_000)
    parts = [request[i : i + 1460] for i in range(0, len(request), 1460)]
    for pieces, reply, limit in [
        (parts, OK, 85 * len(parts)),
        ([b"*1024\r\n" + b"$0\r\n\r\n" * 1023, b"$"], b"", 50_000),
        ([b"\r\n" * 3000], b"", 66_000),
    ]:
        tracer = trace.Trace(trace=False)
        assert tracer.runfunc(answer, new(), *pieces) == (reply, False)
        assert sum(tracer.results().counts.values()) < limit


def test_incr_from_many_threads(monkeypatch):
    """INCR loses nothing. Nor is a SET undone by an INCR that began before."""

    def slow_int(text):
        time.sleep(0.0001)  # others have their turn in the middle of an INCR
        return int(text)

    def work(number):
        """Count in `a`. Set a key that a neighbour increments meanwhile."""
        session, counted = module.Session({}), []
        lines = b"INCR a\nINCR %d\nDEBUG SLEEP 0.001\nSET %d %d000\nINCR %d\n"
        for step in range(1001, 1101):
            numbers = number + 1, number, step, number
            replies = answer(session, lines % numbers)[0].split(b"\r\n")
            assert replies[4].startswith(b":%d" % step)
            counted.append(int(replies[0][1:]))
        assert counted == sorted(counted)
        return counted

    monkeypatch.setattr(module, "int", slow_int)
    values.clear()
    counted = sum(together(work, *range(4)), [])
    assert sorted(counted) == list(range(1, 4 * 100 + 1))


COMMANDS = b"PING|PING ?|GET ?|INCR ?|SET ? ?|INCRBY ? ?".split(b"|")
WORDS = [b"a", b"b"] * 6 + [b"0", b"1", b"-1", b"42", MAX, MIN, TOP] * 2
WORDS += [b"x", b"1.5", b"+1"]
ODD_WORDS = [b"1_0", b" 10 ", b"010", b"-0", b"", ANY, ANY * 20]


def random_conversation(rng):
    """Return requests of all kinds, that differ from Redis's in no way."""
    requests = [b"\r\n", b"\n", b"*0\r\n", b" \t\r\n"]
    for _ in range(rng.randint(1, 15)):
        name, *more = rng.choice(COMMANDS).split()
        name = rng.choice([name, name.lower(), name.title()])
        words = [name, *rng.choices(WORDS, k=len(more))]
        line = rng.choice([b" ", b"\t", b"  "]).join(words)
        line += rng.choice([b"\r\n", b"\n", b" \r\n"])
        words = [name, *rng.choices(WORDS + ODD_WORDS, k=len(more))]
        requests.append(rng.choice([line, array(*words), array(*words)]))
    rng.shuffle(requests)
    return b"".join(requests)


def test_the_same_as_redis(monkeypatch, tmp_path):
    """As redis-server 7: the table, and 500 random ones, cut anywhere."""
    needs("redis-server")
    if "v=7." not in run("redis-server", "--version")[1]:
        pytest.skip("compares with redis-server 7, here is another one")
    rng, pairs = random.Random(20240229), list(TABLE)
    for _ in range(500):
        data = random_conversation(rng)
        cuts = sorted(rng.choices(range(len(data)), k=rng.randint(0, 6)))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, None])]
        reply, finished = answer(new(), *filter(None, pieces))
        assert not finished, data
        pairs.append((data, reply))
    replies = b"".join(reply for _, reply in pairs[len(TABLE) :])
    for kind in PONG, OK, NIL, NOT_INTEGER, OVERFLOW, bulk(MAX), b":1\r\n":
        assert replies.count(kind) >= 3
    monkeypatch.chdir(tmp_path)  # the name of a UNIX socket may not be long
    line = "redis-server --port 0 --unixsocket here --logfile /dev/null --save"
    end = b"that was all, said the real one"
    process = subprocess.Popen([*line.split(), ""])
    with process, socket.socket(socket.AF_UNIX) as sock:
        try:
            wait_for(lambda: not sock.connect_ex("here"), "Redis listens")
            sock.settimeout(PATIENCE)
            for request, reply in pairs:
                request += array(b"ECHO", end) + b"FLUSHALL\r\n"
                talk(sock, request, reply + bulk(end) + OK)
        finally:
            process.terminate()


MARK = "\n# ---- The application"
MODULES = "argparse contextlib io re resource select socket sys threading time"
LIMITS = dict(zip(SCRIPTS, [(245, 45), (245, 46), (285, 80), (360, 156)]))


def test_what_is_the_same():
    """The application in all, Client in 3 and 4, nearly all in 1 and 2."""
    texts = [text_of(name) for name in SCRIPTS]
    assert [text.count(MARK) for text in texts] == [1, 1, 1, 1]
    assert len({text.partition(MARK)[2] for text in texts}) == 1
    find = re.compile(r"\nclass Client:\n.*?\n\n\n", re.DOTALL).search
    assert len({find(text)[0] for text in texts[2:]}) == 1
    code = [text.partition("import argparse")[2] for text in texts[:2]]
    diff = list(difflib.ndiff(*[part.splitlines() for part in code]))
    assert 0 < sum(line[:2] in ("- ", "+ ") for line in diff) <= 16


def test_each_text(name):
    """Short, a statement a line; it stands alone; it can be imported."""
    text = text_of(name)
    pattern = text.partition("\nclass ")[2].partition(MARK)[0]
    assert text.count("\n") <= LIMITS[name][0]
    assert pattern.count("\n") + 1 <= LIMITS[name][1]
    assert not re.search(r".{80}|[ \t]$", text, re.MULTILINE)
    assert "epoll." not in pattern.partition("# ---- kqueue on Linux")[0]
    tree = ast.parse(text, feature_version=(3, 9))
    assert f"python3 {SCRIPTS[name]}" in ast.get_docstring(tree)
    nodes = list(ast.walk(tree))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    imported = re.findall(r"^\s*(?:import|from) (\S+)", text, re.M)
    assert set(imported) <= used & set(MODULES.split())
    statements = [n.lineno for n in nodes if isinstance(n, ast.stmt)]
    assert len(statements) == len(set(statements))  # one a line
    # A TCPServer works when another program imports the file.
    server = load(name).TCPServer("127.0.0.1", 0)
    threading.Thread(target=server.start, daemon=True).start()
    with socket.create_connection(server.listener.getsockname(), 10) as sock:
        talk(sock, b"PING\r\nQUIT\r\n", PONG + OK)
        assert sock.recv(1) == b""
    server.accept = threading.Event().wait  # else 3 would spin on in here
