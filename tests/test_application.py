"""The application, once: its text is the same in all four files.

It is a Conversation without a socket; redis-server 7 must answer the same.
"""

import ast
import random
import re
import socket
import subprocess
import time

import pytest
from conftest import (
    PATIENCE, SCRIPTS, array, bulk, load, needs, text_of, wait_for,
)  # fmt: skip

MARK = "# ---- The application"
KIB, MIB = 1024, 1024 * 1024
OK, PONG, NIL = b"+OK\r\n", b"+PONG\r\n", b"$-1\r\n"
NOT_INTEGER = b"-ERR value is not an integer or out of range\r\n"
OVERFLOW = b"-ERR increment or decrement would overflow\r\n"
SYNTAX = b"-ERR syntax error\r\n"
MAX, MIN = b"9223372036854775807", b"-9223372036854775808"
ANY = bytes(range(256)) + b"\r\n\0\n\r*1\r\n$4\r\nPING\r\n"


@pytest.fixture(scope="module")
def module():
    return load("single")


@pytest.fixture
def new(module, monkeypatch):
    """Make conversations. They share a new store."""
    monkeypatch.setattr(module.Conversation, "values", {})
    return module.Conversation


def all_replies(conversation):
    """Return what it replies until it has no more to say, in lots."""
    lots = []
    conversation.room = 0
    while conversation.room <= 0 and not conversation.finished:
        lots.append(conversation.replies())
    return lots


def answer(conversation, *pieces):
    """Return what it replies to the pieces, and whether it is finished."""
    replies = b""
    for piece in pieces:
        if not conversation.finished:  # the pattern's promise
            conversation.receive(piece)
            replies += b"".join(all_replies(conversation))
    return replies, conversation.finished


def arity(command):
    return b"-ERR wrong number of arguments for '%b' command\r\n" % command


def asked(text):
    """Return the requests of a row: commands between |, as arrays."""
    return b"".join(array(*line.split()) for line in text.split(b"|"))


TOP = b"9223372036854775806"
ROWS = [
    (b"PING | pInG a", PONG + bulk(b"a")),
    (b"PING a b | eChO | ECHO a b", arity(b"ping") + arity(b"echo") * 2),
    (b"GET | GET a b | SET | SET a", arity(b"get") * 2 + arity(b"set") * 2),
    (b"INCR | INCR a 1", arity(b"incr") * 2),
    (b"INCRBY | INCRBY a | INCRBY a 1 2", arity(b"incrby") * 3),
    (b"GET a | SET a v nonsense | GET a", NIL + SYNTAX + NIL),
    (b"INCR a | INCR a | GET a", b":1\r\n:2\r\n" + bulk(b"2")),
    (b"SET a -2 | INCR a | INCR a | INCR a", OK + b":-1\r\n:0\r\n:1\r\n"),
    (b"SET a %b | INCR a | INCR a" % TOP, OK + b":%b\r\n" % MAX + OVERFLOW),
    (b"INCRBY a %b | INCRBY a -1" % MIN, b":%b\r\n" % MIN + OVERFLOW),
    (b"INCRBY a %b | INCRBY a %b" % (MAX, MIN), b":%b\r\n:-1\r\n" % MAX),
]
TABLE = {request.decode(): (asked(request), r) for request, r in ROWS}
both = array(b"ECHO", ANY) + array(b"echo", b"")
TABLE["bytes"] = both, bulk(ANY) + bulk(b"")
TABLE["any key"] = (
    array(b"SET", ANY, ANY) + array(b"GET", ANY) + array(b"GET", ANY.lower()),
    OK + bulk(ANY) + NIL,
)
TABLE["lines"] = (
    b"SET a 1\r\n \t ECHO \t  b \t \r\nincrby a x\nGET a\n\n \t \r\n",
    OK + bulk(b"b") + NOT_INTEGER + bulk(b"1"),
)
TABLE["nothing"] = b"\r\n\r\n\n*0\r\n*-1\r\n*-10\r\nPING\r\n\r\n", PONG
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
def test_replies(new, case):
    """The reply is exactly this one, wherever a read has ended."""
    request, reply = TABLE[case]
    assert answer(new(), request) == (reply, False)
    for at in range(1, min(len(request), 200)):
        new.values.clear()
        assert answer(new(), request[:at], request[at:]) == (reply, False), at
    new.values.clear()
    assert answer(new(), *(bytes([b]) for b in request)) == (reply, False)


def test_unknown_command(new):
    """It is named, in one line, and the stream goes on behind it."""
    for name in b"nonsense", b"", b"a\r\n+OK\r\nb", b"n" * 5000, b"DEBUG":
        replies, finished = answer(new(), array(name, b"x") + b"PING\r\n")
        assert replies.startswith(b"-ERR unknown command ")
        assert replies.endswith(b"\r\n" + PONG) and not finished
        assert replies.count(b"\r\n") == 2 and len(replies) < 800
        assert name[:1] in replies


def test_quit(new):
    """QUIT is the last thing that is carried out."""
    assert answer(new(), b"PING\r\nquit\r\nSET a 1\r\n") == (PONG + OK, True)
    assert new.values == {}


def test_hello(new):
    """HELLO agrees on a version, and that on the reply for nothing."""
    two, three = (b"*14\r\n", b":2\r\n", NIL), (b"%7\r\n", b":3\r\n", b"_\r\n")
    words = b"server redis version 7.0.0 mode standalone role master proto"
    texts = b"".join(map(bulk, words.split()))
    tail = bulk(b"id") + b":1\r\n" + bulk(b"modules") + b"*0\r\n"
    for request, (head, proto, nothing) in [
        (b"HELLO\r\n", two),
        (b"hello 2\r\n", two),
        (array(b"HELLO", b"3"), three),
        (b"HELLO 3\r\nHELLO 2 SETNAME x\r\n", two),
    ]:
        one, other = new(), new()
        replies, finished = answer(one, request)
        assert replies.endswith(head + texts + proto + tail) and not finished
        assert answer(one, b"GET none\r\n") == (nothing, False)
        assert answer(other, b"GET none\r\n") == (NIL, False)
        for version in b"1", b"4", b"x", b"03", b"":
            refusal = b"-NOPROTO unsupported protocol version\r\n"
            request = array(b"HELLO", version) + b"GET none\r\n"
            assert answer(one, request) == (refusal + nothing, False)


BREACHES = [
    b"*x", b"*", b"*+1", b"* 1", b"*01", b"*1_0", b"*99999999999", b"*1025",
    b"*9223372036854775808", b"*1\r\n$x", b"*1\r\n$", b"*1\r\n$-1", b" post",
    b"*1\r\n$+4", b"*1\r\n$04", b"*1\r\n$1_0", b"*1\r\nPING", b"*1\r\n",
    b"*1\r\n$99999999999", b"*2\r\n$4\r\nECHO\r\n:5", b"*1\r\n$1048577",
    b"*3\r\n$4\r\nECHO\r\n$600000\r\n%b\r\n$600000" % (b"v" * 600_000),
    b"POST / HTTP/1.1", b"Host: 127.0.0.1:6380", b"POST", b"a" + b" v" * 1024,
]  # fmt: skip
ENDLESS = [b"v" * 66_000, b"*" + b"1" * 66_000, b"*1\r\n$" + b"1" * 66_000]


@pytest.mark.parametrize(
    "breach",
    [line + b"\r\n" for line in BREACHES] + ENDLESS,
    ids=lambda breach: ascii(breach[:30].decode()),
)
def test_breaches(new, breach):
    """Good requests first; then a line about it; then nothing any more."""
    data = b"PING\r\nSET a 1\r\n" + breach + b"\r\nSET a 2\r\nPING\r\n"
    for pieces in [data], [data[:9], data[9:]], [data[:40], data[40:]]:
        replies, finished = answer(new(), *pieces)
        assert replies.startswith(PONG + OK + b"-ERR Protocol error: ")
        assert replies.count(b"\r\n") == 3 and replies.endswith(b"\r\n")
        assert finished and new.values == {b"a": b"1"}
    # Without the bytes behind it, as well.
    assert answer(new(), breach)[0].startswith(b"-ERR Protocol error: ")


def test_what_is_no_breach(new):
    """Just within the limits; and POST as a word among others."""
    value = b"v" * (MIB - len(b"ECHO"))
    long = b"v" * (64 * KIB - len(b"ECHO \r\n"))
    request = b"SET POST Host:\r\nhost:x 1\r\n" + array(b"POST")
    replies, finished = answer(new(), request)
    assert replies.startswith(OK + b"-ERR unknown command ") and not finished
    for request, reply in [
        (array(b"ECHO", value) * 2, bulk(value) * 2),
        (array(b"ECHO", *[b""] * 1023), arity(b"echo")),
        (b"ECHO" + b" v" * 1023 + b"\r\n", arity(b"echo")),
        (b"ECHO " + long + b"\r\n", bulk(long)),
    ]:
        assert answer(new(), request) == (reply, False)


@pytest.mark.parametrize(
    "begin", [b"", b"*", b"*1\r\n$", b"*1025\r\n", b"*1\r\n$1048577\r\n"]
)
def test_limits_are_checked_before_memory_is_spent(new, begin):
    """Of what goes beyond a limit, next to nothing is kept."""
    tracemalloc = pytest.importorskip("tracemalloc")  # PyPy has none
    pieces = [begin] + [b"1" * 64 * KIB] * 100
    tracemalloc.start()
    try:
        replies, finished = answer(new(), *pieces)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert replies.startswith(b"-ERR Protocol error: ") and finished
    assert peak < MIB


@pytest.mark.parametrize("size", [10, 1000, 500_000])
def test_replies_are_bounded(new, size):
    """replies() gives about 64 KiB and one reply at a time; none is lost.

    Requests wait, and change nothing, until their replies are taken.
    """
    value, count = b"v" * size, 20_000_000 // (1000 + size)
    conversation = new()
    answer(conversation, array(b"SET", b"a", value))
    conversation.receive((b"INCR b\r\n" + array(b"GET", b"a")) * count)
    lots = [conversation.replies()]
    assert 0 < int(new.values[b"b"]) < count // 2
    lots += all_replies(conversation)
    assert max(map(len, lots)) <= 64 * KIB + len(bulk(value))
    numbers = (b":%d\r\n" % (number + 1) for number in range(count))
    expected = b"".join(number + bulk(value) for number in numbers)
    assert b"".join(lots) == expected


def test_large_value_in_small_pieces(new, module, monkeypatch):
    """Until it has come, its words are looked for twice, not at each piece."""
    real, calls = module.next_request, []
    count = "next_request", lambda *a: calls.append(a) or real(*a)
    monkeypatch.setattr(module, *count)
    request = array(b"SET", b"a", b"v" * 1_000_000)
    parts = [request[i : i + 1460] for i in range(0, len(request), 1460)]
    assert answer(new(), *parts) == (OK, False) and 0 < len(calls) < 10


def test_one_handler_that_blocks_at_once(new):
    """replies() ends with a DEBUG SLEEP, and that takes its time."""
    conversation = new()
    sleep = b"DEBUG SLEEP 0.05\r\n"
    conversation.receive(b"PING\r\n" + sleep + array(*sleep.split()) + sleep)
    started = time.monotonic()
    assert conversation.replies() == PONG + OK
    assert conversation.replies() == OK
    assert 0.1 <= time.monotonic() - started
    assert all_replies(conversation) == [OK, b""]
    for seconds in b"x,nan,inf,-1,10.01,11,1e300,1_0,1 1,".split(b","):
        replies, _ = answer(new(), b"DEBUG SLEEP %b\r\nPING\r\n" % seconds)
        assert replies.startswith(b"-ERR ") and replies.endswith(PONG)


def test_how_long_a_handler_sleeps(new, module, monkeypatch):
    """DEBUG SLEEP takes up to 10 seconds, and parts of them."""
    slept = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    for seconds in b"0", b"5", b"0.25", b".5", b"9.99", b"10":
        assert answer(new(), b"debug Sleep %b\n" % seconds) == (OK, False)
    assert slept == [0, 5, 0.25, 0.5, 9.99, 10]


def test_nobody_takes_the_replies(new):
    """Once its client has gone, its changes are made, and no reply built."""
    conversation = new()
    big = b"v" * 500_000
    answer(conversation, array(b"SET", b"big", big))
    conversation.gone = True
    request = array(b"GET", b"big") * 100 + b"INCR a\r\nINCRBY b 5\r\n"
    replies, _ = answer(conversation, request * 30 + b"SET c 1\r\n")
    assert len(replies) < 1000
    assert new.values == {b"big": big, b"a": b"30", b"b": b"150", b"c": b"1"}


INTEGERS = [b"0", b"1", b"-1", b"42", MAX, MIN, b"9223372036854775806"]
SIZES = dict.fromkeys([b"PING", b"ECHO", b"GET", b"INCR"], 1)
SIZES.update({b"SET": 2, b"INCRBY": 2})


def random_conversation(rng):
    """Return requests of all kinds, that differ from Redis's in no way."""
    big = bytes(rng.getrandbits(8) for _ in range(5000))
    requests = [b"\r\n", b"\n", b"*0\r\n", b"*-1\r\n", b" \t\r\n"]
    for _ in range(rng.randint(1, 15)):
        name = rng.choice(list(SIZES))
        size = SIZES[name] if rng.random() < 0.85 else rng.randint(0, 4)
        words = [rng.choice([name, name.lower(), name.title()])]
        kinds = [[b"a", b"b"], INTEGERS, INTEGERS + [b"x", b"1.5", b"+1"]]
        if rng.random() < 0.4:
            words += [rng.choice(rng.choice(kinds)) for _ in range(size)]
            line = rng.choice([b" ", b"\t", b"  "]).join(words)
            requests.append(line + rng.choice([b"\r\n", b"\n", b" \r\n"]))
        else:
            kinds.append([b"1_0", b" 10 ", b"010", b"-0", b"", ANY, big])
            words += [rng.choice(rng.choice(kinds)) for _ in range(size)]
            requests.append(array(*words))
    rng.shuffle(requests)
    return b"".join(requests)


def pieces_of(rng, data):
    """Cut the data into a few pieces, anywhere."""
    cuts = sorted(rng.randint(0, len(data)) for _ in range(rng.randint(0, 6)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Return a function that asks redis-server 7, which has nothing stored."""
    needs("redis-server")
    version = subprocess.check_output(["redis-server", "--version"])
    if b"v=7." not in version:
        pytest.skip(f"compares with redis-server 7, here is {version}")
    path = tmp_path_factory.mktemp("redis")
    words = "redis-server --port 0 --appendonly no --daemonize no --unixsocket"
    line = [*words.split(), path / "socket", "--save", ""]
    process = subprocess.Popen(line, cwd=path, stdout=subprocess.DEVNULL)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    wait_for((path / "socket").exists, "redis-server is there")
    wait_for(lambda: sock.connect_ex(str(path / "socket")) == 0, "it listens")
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


def test_random_conversations(new, real):
    """500 random ones, cut anywhere, are answered as by redis-server 7."""
    rng, all_of_them = random.Random(20240229), b""
    for number in range(500):
        new.values.clear()
        data = random_conversation(rng)
        reply = real(data)
        assert answer(new(), *pieces_of(rng, data)) == (reply, False), data
        all_of_them += reply
    kinds = [PONG, OK, NIL, NOT_INTEGER, OVERFLOW, SYNTAX, bulk(MAX)]
    kinds += [b":1\r\n", *(arity(name.lower()) for name in SIZES)]
    assert [kind for kind in kinds if all_of_them.count(kind) < 3] == []


def parts_of(name):
    """Return the pattern's part of a script, and the application's."""
    pattern, mark, application = text_of(name).partition("\n" + MARK)
    assert mark and MARK not in application
    return pattern, application


def test_application_is_the_same():
    """From the mark to the end, all four files are equal to the letter."""
    (application,) = {parts_of(name)[1] for name in SCRIPTS}
    assert "class Conversation" in application and "def main(" in application


def test_application_never_touches_a_socket():
    """It makes no call of the network."""
    text = parts_of("single")[1]
    assert not re.search(r"\.(recv|send\w*|accept)\(|\bselect\b", text)


def test_imports(name):
    """What it may import; Python 3.9's syntax; a line has one statement."""
    modules, lines = set(), []
    for node in ast.walk(ast.parse(text_of(name), feature_version=(3, 9))):
        lines += [node.lineno] if isinstance(node, ast.stmt) else []
        if getattr(node, "name", "") == "hello":
            assert node.end_lineno - node.lineno < 12
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    allowed = """argparse collections contextlib errno io os re resource select
        signal socket struct sys threading time"""
    assert modules <= set(allowed.split())
    assert 250 < len(lines) == len(set(lines))
