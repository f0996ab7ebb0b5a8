"""Every server answers as redis-server 7 does, byte for byte."""

import random
import re
import shutil
import socket
import subprocess
import time

import pytest
from conftest import (
    MANY,
    PATIENCE,
    PROC,
    array,
    bulk,
    exchange,
    ping,
    read_exactly,
    read_to_end,
    talk,
    wait_for,
)

OK, PONG, NIL = b"+OK\r\n", b"+PONG\r\n", b"$-1\r\n"
NOT_INTEGER = b"-ERR value is not an integer or out of range\r\n"
OVERFLOW = b"-ERR increment or decrement would overflow\r\n"
SYNTAX = b"-ERR syntax error\r\n"
MAX, MIN = b"9223372036854775807", b"-9223372036854775808"
ALL_BYTES = bytes(range(256)) + b"\r\n\0\n\r" + bytes(range(255, -1, -1))

KIB, MIB = 1024, 1024 * 1024


def arity(command):
    text = b"-ERR wrong number of arguments for '%b' command\r\n"
    return text % command


def protocol_error(text):
    return b"-ERR Protocol error: %b\r\n" % text


NO_COUNT = protocol_error(b"invalid multibulk length")
NO_LENGTH = protocol_error(b"invalid bulk length")

# name: (request, reply). K stands for a key that nothing else uses; it has
# eight bytes. The real server must answer the same.
K = b"<a--key>"
TABLE = {
    "ping": (array(b"PING"), PONG),
    "ping message": (array(b"PING", b"hello"), bulk(b"hello")),
    "ping empty message": (array(b"PING", b""), bulk(b"")),
    "ping too much": (array(b"PING", b"a", b"b"), arity(b"ping")),
    "inline ping": (b"PING\r\n", PONG),
    "inline ping message": (b"PING hello\r\n", bulk(b"hello")),
    "echo": (array(b"ECHO", b"hello"), bulk(b"hello")),
    "echo empty": (array(b"ECHO", b""), bulk(b"")),
    "echo any bytes": (array(b"ECHO", ALL_BYTES), bulk(ALL_BYTES)),
    "echo looks like replies": (
        array(b"ECHO", b"+OK\r\n-ERR no\r\n:1\r\n"),
        bulk(b"+OK\r\n-ERR no\r\n:1\r\n"),
    ),
    "echo nothing": (array(b"ECHO"), arity(b"echo")),
    "echo too much": (array(b"ECHO", b"a", b"b"), arity(b"echo")),
    "get nothing": (array(b"GET"), arity(b"get")),
    "get too much": (array(b"GET", K, b"b"), arity(b"get")),
    "get unknown": (array(b"GET", K), NIL),
    "set get": (array(b"SET", K, b"v") + array(b"GET", K), OK + bulk(b"v")),
    "set again": (
        array(b"SET", K, b"v") + array(b"SET", K, b"w") + array(b"GET", K),
        OK + OK + bulk(b"w"),
    ),
    "set empty value": (
        array(b"SET", K, b"") + array(b"GET", K),
        OK + bulk(b""),
    ),
    "any bytes in a value": (
        array(b"SET", K, ALL_BYTES) + array(b"GET", K),
        OK + bulk(ALL_BYTES),
    ),
    "any bytes in a key": (
        array(b"SET", K + ALL_BYTES, b"v") + array(b"GET", K + ALL_BYTES),
        OK + bulk(b"v"),
    ),
    "keys differ behind a zero byte": (
        array(b"SET", K + b"\0a", b"1")
        + array(b"SET", K + b"\0b", b"2")
        + array(b"GET", K + b"\0a"),
        OK + OK + bulk(b"1"),
    ),
    "keys are not folded": (
        array(b"SET", K + b"a", b"1") + array(b"GET", K + b"A"),
        OK + NIL,
    ),
    "set nothing": (array(b"SET"), arity(b"set")),
    "set no value": (array(b"SET", K), arity(b"set")),
    "set nonsense option": (array(b"SET", K, b"v", b"nonsense"), SYNTAX),
    "set refused changes nothing": (
        array(b"SET", K, b"v", b"nonsense") + array(b"GET", K),
        SYNTAX + NIL,
    ),
    "incr nothing": (array(b"INCR"), arity(b"incr")),
    "incr too much": (array(b"INCR", K, b"1"), arity(b"incr")),
    "incr new key": (array(b"INCR", K) * 3, b":1\r\n:2\r\n:3\r\n"),
    "incr below zero": (
        array(b"SET", K, b"-2") + array(b"INCR", K) * 3,
        OK + b":-1\r\n:0\r\n:1\r\n",
    ),
    "incr is a string": (
        array(b"INCR", K) + array(b"GET", K),
        b":1\r\n" + bulk(b"1"),
    ),
    "incr text": (
        array(b"SET", K, b"v") + array(b"INCR", K),
        OK + NOT_INTEGER,
    ),
    "incr empty": (
        array(b"SET", K, b"") + array(b"INCR", K),
        OK + NOT_INTEGER,
    ),
    "incr to the top": (
        array(b"SET", K, b"9223372036854775806")
        + array(b"INCR", K) * 2
        + array(b"GET", K),
        OK + b":%b\r\n" % MAX + OVERFLOW + bulk(MAX),
    ),
    "incrby nothing": (array(b"INCRBY"), arity(b"incrby")),
    "incrby no amount": (array(b"INCRBY", K), arity(b"incrby")),
    "incrby too much": (array(b"INCRBY", K, b"1", b"2"), arity(b"incrby")),
    "incrby": (
        array(b"INCRBY", K, b"40") + array(b"INCRBY", K, b"-42"),
        b":40\r\n:-2\r\n",
    ),
    "incrby text": (
        array(b"SET", K, b"v") + array(b"INCRBY", K, b"v"),
        OK + NOT_INTEGER,
    ),
    "incrby to the bottom": (
        array(b"INCRBY", K, MIN)
        + array(b"INCRBY", K, b"-1")
        + array(b"GET", K),
        b":%b\r\n" % MIN + OVERFLOW + bulk(MIN),
    ),
    "incrby over the top": (
        array(b"INCRBY", K, MAX) * 2,
        b":%b\r\n" % MAX + OVERFLOW,
    ),
    "incrby from top to bottom": (
        array(b"INCRBY", K, MAX) + array(b"INCRBY", K, MIN),
        b":%b\r\n:-1\r\n" % MAX,
    ),
    "any case": (
        b"pInG\r\n"
        + array(b"sEt", K, b"v")
        + array(b"gEt", K)
        + b"eCHO E\r\n",
        PONG + OK + bulk(b"v") + bulk(b"E"),
    ),
    "any case in an error": (array(b"eChO"), arity(b"echo")),
    "inline": (
        b"SET %b v\r\nGET %b\r\n" % (K, K) + b"INCRBY %b x\r\n" % K,
        OK + bulk(b"v") + NOT_INTEGER,
    ),
    "inline blanks": (b" \t ECHO \t  hello \t \r\n", bulk(b"hello")),
    "inline with \\n alone": (
        b"PING\nECHO a\n\nPING\n",
        PONG + bulk(b"a") + PONG,
    ),
    "empty lines": (b"\r\n\r\n\n \t \r\nPING\r\n\r\n", PONG),
    "empty array": (b"*0\r\nPING\r\n", PONG),
    "negative array": (b"*-1\r\nPING\r\n*-10\r\nPING\r\n", PONG + PONG),
    "arrays and lines": (
        array(b"PING") + b"PING a\r\n" + array(b"PING", b"b") + b"PING\n",
        PONG + bulk(b"a") + bulk(b"b") + PONG,
    ),
    "no reply to half a request": (
        b"PING\r\n*2\r\n$4\r\nECHO\r\n$5\r\nhel",
        PONG,
    ),
    "no reply to half a line": (b"PING\r\nPIN", PONG),
    # From here on, the server closes: what stands behind is not answered.
    "count is text": (b"*x\r\nPING\r\n", NO_COUNT),
    "count is missing": (b"*\r\nPING\r\n", NO_COUNT),
    "count with a plus": (b"*+1\r\n$4\r\nPING\r\n", NO_COUNT),
    "count with a blank": (b"* 1\r\n$4\r\nPING\r\n", NO_COUNT),
    "count with a zero before": (b"*01\r\n$4\r\nPING\r\n", NO_COUNT),
    "count with an underscore": (b"*1_0\r\n$4\r\nPING\r\n", NO_COUNT),
    "count is huge": (b"*2147483648\r\nPING\r\n", NO_COUNT),
    "count is beyond 64 bits": (b"*9223372036854775808\r\nPING\r\n", NO_COUNT),
    "length is text": (b"*1\r\n$x\r\nPING\r\n", NO_LENGTH),
    "length is missing": (b"*1\r\n$\r\nPING\r\n", NO_LENGTH),
    "length is negative": (b"*1\r\n$-1\r\nPING\r\n", NO_LENGTH),
    "length with a plus": (b"*1\r\n$+4\r\nPING\r\n", NO_LENGTH),
    "length with a zero before": (b"*1\r\n$04\r\nPING\r\n", NO_LENGTH),
    "length with an underscore": (b"*1\r\n$1_0\r\nPINGPINGPI\r\n", NO_LENGTH),
    "length is huge": (b"*1\r\n$99999999999\r\nPING\r\n", NO_LENGTH),
    "no dollar": (
        b"*1\r\nPING\r\nPING\r\n",
        protocol_error(b"expected '$', got 'P'"),
    ),
    "no dollar but a line end": (
        b"*1\r\n\r\nPING\r\n",
        protocol_error(b"expected '$', got ' '"),
    ),
    "no dollar in the second word": (
        b"*2\r\n$4\r\nECHO\r\n:5\r\nPING\r\n",
        protocol_error(b"expected '$', got ':'"),
    ),
    "good requests in front": (
        b"PING\r\n"
        + array(b"SET", K, b"v")
        + array(b"GET", K)
        + b"*x\r\nPING\r\n",
        PONG + OK + bulk(b"v") + NO_COUNT,
    ),
}
for number, text in {
    "underscore": b"1_0",
    "blanks around": b" 10 ",
    "blank before": b" 10",
    "blank behind": b"10 ",
    "line end behind": b"10\n",
    "zero byte behind": b"10\0",
    "plus": b"+1",
    "zero before": b"010",
    "minus zero": b"-0",
    "two minuses": b"--1",
    "minus alone": b"-",
    "nothing": b"",
    "point": b"1.0",
    "exponent": b"1e3",
    "hexadecimal": b"0x10",
    "other digits": "\u0663".encode(),
    "2**63": b"9223372036854775808",
    "-2**63 - 1": b"-9223372036854775809",
    "30 digits": b"1" * 30,
    "5,000 digits": b"1" * 5000,
}.items():
    TABLE[f"incrby by a number with {number}"] = (
        array(b"INCRBY", K, text) + array(b"GET", K),
        NOT_INTEGER + NIL,
    )
    TABLE[f"incr of a number with {number}"] = (
        array(b"SET", K, text) + array(b"INCR", K) + array(b"GET", K),
        OK + NOT_INTEGER + bulk(text),
    )


def unknown(name):
    return b"-ERR unknown command '%b'\r\n" % name


def request_of(size):
    """Return an ECHO of `size` bytes in all, and its reply."""
    value = b"v" * (size - len(array(b"ECHO", b"")) - 6)
    request = array(b"ECHO", value)
    return request + b"\r\n" * ((size - len(request)) // 2), bulk(value)


# What is our own: the limits, and where the full text of Redis would differ.
OURS = {
    "request just below 1 MiB": request_of(MIB),
    "request just above 1 MiB": (array(b"ECHO", b"v" * MIB), NO_LENGTH),
    "request above 1 MiB in two words": (
        array(b"ECHO", b"v" * (MIB // 2), b"v" * (MIB // 2)),
        NO_LENGTH,
    ),
    "request above 1 MiB, from its length": (
        b"*2\r\n$4\r\nECHO\r\n$1048577\r\n",
        NO_LENGTH,
    ),
    "two requests just below 1 MiB": (
        request_of(MIB)[0] * 2,
        request_of(MIB)[1] * 2,
    ),
    "line just below 64 KiB": (
        b"ECHO " + b"v" * (64 * KIB - 7) + b"\r\n",
        bulk(b"v" * (64 * KIB - 7)),
    ),
    "line just above 64 KiB": (
        b"ECHO " + b"v" * (64 * KIB - 4) + b"\r\n",
        protocol_error(b"too big inline request"),
    ),
    "line without end": (
        b"v" * (64 * KIB + 1),
        protocol_error(b"too big inline request"),
    ),
    "count without end": (
        b"*" + b"1" * (64 * KIB),
        protocol_error(b"too big mbulk count string"),
    ),
    "length without end": (
        b"*1\r\n$" + b"1" * (64 * KIB),
        protocol_error(b"too big bulk count string"),
    ),
    "1,024 words": (array(b"ECHO", *[b"v"] * 1023), arity(b"echo")),
    "1,024 empty words": (array(b"ECHO", *[b""] * 1023), arity(b"echo")),
    "1,025 words": (array(b"ECHO", *[b"v"] * 1024), NO_COUNT),
    "1,025 words, from the count": (b"*1025\r\n", NO_COUNT),
    "line of 1,024 words": (b"ECHO" + b" v" * 1023 + b"\r\n", arity(b"echo")),
    "line of 1,025 words": (
        b"ECHO" + b" v" * 1024 + b"\r\n",
        protocol_error(b"too many words in inline request"),
    ),
    "unknown command": (
        array(b"Nonsense", b"a") + b"nonsense b\r\n",
        unknown(b"Nonsense") + unknown(b"nonsense"),
    ),
    "unknown command without a name": (array(b""), unknown(b"")),
    "unknown command with line ends": (
        array(b"a\r\n+OK\r\nb") + b"PING\r\n",
        unknown(b"a  +OK  b") + PONG,
    ),
    "unknown command that is long": (
        array(b"n" * 1000) + b"PING\r\n",
        unknown(b"n" * 128) + PONG,
    ),
    "quotes have no meaning": (b'ECHO "a\r\n', bulk(b'"a')),
    "debug alone": (b"DEBUG\r\n", arity(b"debug")),
    "debug sleep": (b"DEBUG SLEEP 0\r\ndebug sleep 0.01\r\n", OK + OK),
}
SUBCOMMAND = b"-ERR unknown subcommand or wrong number of arguments for "
SECONDS = b"-ERR SLEEP takes 0 to 10 seconds\r\n"
DEBUG_NONSENSE = {
    b"SLEEP": SUBCOMMAND + b"'SLEEP'",
    b"SLEEP 1 1": SUBCOMMAND + b"'SLEEP'",
    b"JUMP 1": SUBCOMMAND + b"'JUMP'",
    b"SLEEP x": SECONDS,
    b"SLEEP nan": SECONDS,
    b"SLEEP inf": SECONDS,
    b"SLEEP -1": SECONDS,
    b"SLEEP 10.01": SECONDS,
    b"SLEEP 1e300": SECONDS,
}


@pytest.mark.parametrize("case", TABLE)
def test_replies_of_redis(shared, key, case):
    """The reply is exactly this one."""
    request, reply = (part.replace(K, key) for part in TABLE[case])
    assert shared.ask(request) == reply


@pytest.mark.parametrize("case", OURS)
def test_replies_of_our_own(shared, case):
    """Limits hold just below and just above; the stream stays in step."""
    request, reply = OURS[case]
    got = shared.ask(request)
    assert got == reply, (got[:80], len(got), len(reply))


@pytest.mark.parametrize("words", DEBUG_NONSENSE)
def test_debug_nonsense(shared, words):
    """DEBUG with nonsense is refused in one line, and nobody sleeps."""
    reply = shared.ask(b"DEBUG " + words + b"\r\nPING\r\n")
    assert reply.startswith(DEBUG_NONSENSE[words])
    assert reply.endswith(b"\r\n" + PONG) and reply.count(b"\r\n") == 2


@pytest.mark.parametrize(
    "request_, reply",
    [
        (b"*2\r\n$4\r\nECHO\r\n$1048577\r\n", NO_LENGTH),
        (b"*1025\r\n", NO_COUNT),
        (b"v" * (64 * KIB + 1), protocol_error(b"too big inline request")),
    ],
    ids=["request", "words", "line"],
)
def test_limits_are_checked_at_once(shared, request_, reply):
    """Past a limit the reply comes, and the end, without another byte."""
    with shared.connect() as sock:
        sock.sendall(request_)
        assert read_to_end(sock) == reply


def test_protocol_error_closes(shared):
    """After a protocol error the server closes, though the client does not."""
    with shared.connect() as sock:
        sock.sendall(b"PING\r\n*x\r\n")
        assert read_to_end(sock) == PONG + NO_COUNT


@pytest.mark.parametrize(
    "beyond", [b"v", b"PING\r\n"], ids=["junk", "requests"]
)
def test_error_reply_arrives_while_client_sends(shared, beyond):
    """Who sends 2 MiB beyond the error gets every reply nevertheless."""
    request = b"PING\r\n*x\r\n" + beyond * (2 * MIB // len(beyond))
    with shared.connect() as sock:
        sock.sendall(request)
        assert read_to_end(sock) == PONG + NO_COUNT


def test_one_byte_at_a_time(shared, key):
    """Requests that come byte by byte get the same replies."""
    cases = "set get", "inline blanks", "empty lines", "good requests in front"
    request = b"".join(TABLE[case][0] for case in cases).replace(K, key)
    reply = b"".join(TABLE[case][1] for case in cases)
    pieces = [request[at : at + 1] for at in range(len(request))]
    assert shared.ask(*pieces) == reply


def test_bytes_come_one_after_the_other(shared, key):
    """A pause in a request, or in a line end, changes nothing."""
    with shared.connect() as sock:
        for piece in array(b"SET", key, b"1\r\n2").partition(b"1\r"):
            sock.sendall(piece)
            time.sleep(0.02)
        assert read_exactly(sock, len(OK)) == OK
        talk(sock, b"GET %b\r" % key + b"\n", bulk(b"1\r\n2"))


def test_many_requests_in_one_go(shared):
    """10,000 pipelined requests get their 10,000 replies, in order."""
    numbers = [b"%d" % number for number in range(10_000)]
    request = b"".join(array(b"ECHO", number) for number in numbers)
    assert shared.ask(request) == b"".join(map(bulk, numbers))


def test_half_closed_client_gets_every_reply(shared, key):
    """Who has shut down its sending side still gets all that it asked for."""
    value = bytes(range(256)) * 400
    request = array(b"SET", key, value) + array(b"GET", key) * 100
    with shared.connect() as sock:
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        time.sleep(0.05)  # the server has the end of file before we read
        reply = read_to_end(sock)
        assert len(reply) == len(OK) + 100 * len(bulk(value))
        assert reply == OK + bulk(value) * 100


@pytest.mark.parametrize("count", [1, 2000])
def test_send_and_close_is_carried_out(shared, key, count):
    """Who sends and closes at once has everything carried out."""
    for round_ in range(1, 6):
        with shared.connect() as sock:
            sock.sendall(array(b"INCR", key) * count)
        done = bulk(b"%d" % (count * round_))
        wait_for(
            lambda done=done: shared.ask(array(b"GET", key)) == done,
            f"{count * round_} times INCR are carried out",
        )


def test_big_replies_to_a_client_that_has_closed(shared, key):
    """What is sent is carried out, even if its replies find nobody."""
    shared.ask(array(b"SET", key, b"v" * 50_000))
    with shared.connect() as sock:
        request = array(b"GET", key) * 100 + array(b"SET", key, b"done")
        sock.sendall(request)
    wait_for(
        lambda: shared.ask(array(b"GET", key)) == bulk(b"done"),
        "the SET behind 100 GETs is carried out",
        patience=5,
    )


def test_store_is_shared(shared, key):
    """What one connection sets, the next one gets."""
    assert shared.ask(array(b"SET", key, b"v")) == OK
    assert shared.ask(array(b"GET", key)) == bulk(b"v")


def test_info(shared):
    """INFO is in Redis's format, and tells what the pattern costs."""
    with shared.connect() as sock:
        reply = exchange(sock, b"INFO\r\n")
    size, _, text = reply.partition(b"\r\n")
    assert size == b"$%d" % (len(text) - 2) and text.endswith(b"\r\n\r\n")
    lines = text.decode()[:-2].split("\r\n")
    assert lines[0].startswith("# ") and lines[-1] == ""
    assert all(re.match(r"# \w+$|\w+:.|$", line) for line in lines), lines

    info = shared.info()
    assert info["pattern"]
    assert int(info["process_id"]) == shared.pid
    assert int(info["connected_clients"]) == 1
    assert int(info["threads"]) == {"multi": 2, "kqueue": 2}.get(
        shared.name, 1
    )
    assert float(info["used_cpu_user"]) > 0
    assert float(info["used_cpu_sys"]) >= 0
    assert int(info["voluntary_context_switches"]) >= 0
    assert int(info["involuntary_context_switches"]) >= 0
    assert MIB < int(info["used_memory_peak"]) < 2048 * MIB
    tally = {"busy": ["polls_empty_handed"], "kqueue": ["wakeups", "events"]}
    for field in tally.get(shared.name, []):
        assert int(info[field]) > 0
    if PROC:
        assert abs(shared.cpu() - shared.proc_cpu()) < 0.5
        peak = shared.memory("VmHWM")
        assert peak / 1.5 < int(info["used_memory_peak"]) < peak * 1.5


def test_info_counts(shared):
    """Each connection is counted; INFO takes sections and ignores them."""
    received = "total_connections_received"
    before = int(shared.info()[received])
    shared.ping()
    with shared.connect() as sock:
        sock.sendall(b"INFO server\r\ninfo\r\n")
        sock.shutdown(socket.SHUT_WR)
        reply = read_to_end(sock)
    assert reply.count(b"process_id:%d\r\n" % shared.pid) == 2
    assert int(shared.info()[received]) == before + 3


def test_info_counts_clients(shared):
    """connected_clients is how many are connected at this moment."""
    if shared.name not in MANY:
        pytest.skip("takes in one client at a time")
    socks = [shared.connect() for _ in range(5)]
    for sock in socks:
        ping(sock)
    assert int(shared.info(socks[0])["connected_clients"]) == 5
    for sock in socks[1:]:
        sock.close()
    wait_for(
        lambda: int(shared.info(socks[0])["connected_clients"]) == 1,
        "4 of 5 clients are gone",
    )
    socks[0].close()


# ---- Beside the real one ----------------------------------------------------

CASES = 500  # random conversations
INTEGERS = [b"0", b"1", b"-1", b"42", MAX, MIN, b"9223372036854775806"]
TRAPS = [b"1_0", b" 10 ", b"+1", b"010", b"-0", b"", b"1.5", b"x", b"1" * 21]
TRAPS += [b"9223372036854775808", b"-9223372036854775809", b"10\n", b"\r\n"]
MALFORMED = [b"*x", b"*", b"*+1", b"* 1", b"*01", b"*1_0", b"*99999999999"]
MALFORMED += [
    b"*1\r\n$x",
    b"*1\r\n$",
    b"*1\r\n$-1",
    b"*1\r\n$04",
    b"*1\r\n$1_0",
]
MALFORMED += [
    b"*1\r\nPING",
    b"*1\r\n:4",
    b"*1\r\n\r\n",
    b"*1\r\n*1\r\n$1\r\na",
]
MALFORMED += [b"*2\r\n$4\r\nECHO\r\nx", b"*2\r\n$4\r\nECHO\r\n$99999999999"]
MALFORMED += [b"*2\r\n$4\r\nPINGPING\r\n$1\r\na", b"*3\r\n$3\r\nSET\r\n\n"]
SIZES = {
    b"PING": 1,
    b"ECHO": 1,
    b"GET": 1,
    b"SET": 2,
    b"INCR": 1,
    b"INCRBY": 2,
}


def random_conversation(rng, number):
    """Return requests of all kinds, and whether the last one is malformed.

    What differs by design stays out: quotes, options of SET, and the full
    text about unknown commands.
    """
    keys = [b"%d:%b" % (number, key) for key in (b"a", b"b", b"c")]

    def word(inline):
        kind = rng.random()
        if kind < 0.5:
            return rng.choice(keys)
        if kind < 0.75:
            return rng.choice(INTEGERS)
        if inline:
            return bytes(
                rng.choices(b"xyz019+-_.:$\xe9\xff", k=rng.randint(1, 9))
            )
        if kind < 0.9:
            return rng.choice(TRAPS)
        size = rng.choice([0, 1, 5, 100, rng.randint(0, 40_000)])
        return rng.getrandbits(8 * size + 1).to_bytes(size + 1, "big")

    def request():
        inline = rng.random() < 0.4
        name = rng.choice(list(SIZES))
        size = SIZES[name]
        if rng.random() < 0.15:
            size = rng.randint(0, 4)
        words = [rng.choice([name, name.lower(), name.title()])]
        words += [word(inline) for _ in range(size)]
        if size and name not in (b"PING", b"ECHO") and rng.random() < 0.8:
            words[1] = rng.choice(keys)
        if not inline:
            return array(*words)
        blanks = [b" ", b" ", b" ", b"\t", b"  ", b" \t ", b"\r"]
        line = b"".join(word + rng.choice(blanks) for word in words)
        return (
            rng.choice([b"", b"", b" "]) + line + rng.choice([b"\r\n", b"\n"])
        )

    nothing = [b"\r\n", b"\n", b"*0\r\n", b"*-1\r\n", b" \t\r\n"]
    parts = [
        request() if rng.random() < 0.9 else rng.choice(nothing)
        for _ in range(rng.randint(1, 15))
    ]
    malformed = rng.random() < 0.4
    if malformed:
        parts.append(rng.choice(MALFORMED) + b"\r\nPING\r\n")
    return b"".join(parts), malformed


def random_pieces(rng, data):
    """Cut the data into a few pieces, anywhere."""
    cuts = sorted(rng.randint(0, len(data)) for _ in range(rng.randint(0, 6)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]


class RealServer:
    """A redis-server on a free port, and what it replies."""

    END = b"that was all, said the real one"

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            self.port = sock.getsockname()[1]
        words = "redis-server --bind 127.0.0.1 --appendonly no --daemonize no"
        self.process = subprocess.Popen(
            [*words.split(), "--save", "", "--port", str(self.port)],
            cwd=folder,
            stdout=subprocess.DEVNULL,
        )
        wait_for(self.answers, "redis-server answers")

    def answers(self):
        assert self.process.poll() is None, "redis-server did not start"
        try:
            return self.ask(b"PING\r\n") == PONG
        except ConnectionRefusedError:
            return False

    def ask(self, *pieces, closes=False):
        """Return all replies, up to the close if it `closes` after them."""
        where = "127.0.0.1", self.port
        with socket.create_connection(where, PATIENCE) as sock:
            # In one go: it closes before it has read what comes later, and
            # the kernel makes a reset of that.
            end = b"" if closes else array(b"ECHO", self.END)
            sock.sendall(b"".join(pieces) + end)
            replies = b""
            while closes or not replies.endswith(bulk(self.END)):
                try:
                    data = sock.recv(1 << 16)
                except ConnectionResetError:
                    data = b""
                if not data:
                    assert b"-ERR Protocol error" in replies, replies
                    return replies
                replies += data
            return replies[: -len(bulk(self.END))]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real server, version 7."""
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed: nothing to compare with")
    version = subprocess.run(
        ["redis-server", "--version"], stdout=subprocess.PIPE
    ).stdout
    if b"v=7." not in version:
        pytest.skip(f"compares with redis-server 7, here is {version}")
    server = RealServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.process.terminate()
    server.process.wait(PATIENCE)


@pytest.fixture(scope="module")
def conversations(real):
    """Random conversations, and what the real server replies to each."""
    rng = random.Random(20240229)
    conversations = []
    for number in range(CASES):
        data, malformed = random_conversation(rng, number)
        pieces = random_pieces(rng, data)
        reply = real.ask(*pieces, closes=malformed)
        conversations.append((pieces, reply))
    return conversations


@pytest.mark.parametrize("case", TABLE)
def test_table_against_the_real_server(real, key, case):
    """The replies that the table expects are those of redis-server 7."""
    request, reply = (part.replace(K, key) for part in TABLE[case])
    closes = b"Protocol error" in reply
    if case.startswith("no reply to half"):
        pytest.skip("half a request would swallow the mark behind it")
    assert real.ask(request, closes=closes) == reply


def test_random_conversations(conversations, shared, note):
    """Random requests, cut anywhere, are answered as by redis-server 7."""
    for number, (pieces, reply) in enumerate(conversations):
        got = shared.ask(*pieces)
        assert got == reply, (number, b"".join(pieces), got, reply)
    note(f"conversations compared with redis-server, {shared.name}", CASES)


def test_random_conversations_are_worth_it(conversations):
    """Among the replies is every kind that there is."""
    replies = b"".join(reply for _, reply in conversations)
    kinds = [PONG, OK, NIL, NOT_INTEGER, OVERFLOW, SYNTAX, NO_COUNT, NO_LENGTH]
    kinds += [b":1\r\n", b"expected '$', got 'P'", bulk(MAX), bulk(b"")]
    kinds += [arity(name.lower()) for name in SIZES]
    assert [kind for kind in kinds if replies.count(kind) < 3] == []
