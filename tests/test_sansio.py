"""The application without a socket, and what holds for the text of a file."""

import ast
import importlib.util
import inspect
import io
import re
import shutil
import subprocess
import sys
import tokenize

import pytest
from conftest import (
    PATIENCE,
    SCRIPTS,
    SERVERS_DIR,
    array,
    bulk,
    run_to_end,
)

MARK = "# ---- The application"
KIB = 1024


def text_of(name):
    return (SERVERS_DIR / SCRIPTS[name]).read_text(encoding="utf-8")


def split(name):
    """Return the pattern's part of a script, and the application's."""
    lines = text_of(name).splitlines(keepends=True)
    marks = [at for at, line in enumerate(lines) if line.startswith(MARK)]
    assert len(marks) == 1, "one line begins the application"
    return "".join(lines[: marks[0]]), "".join(lines[marks[0] :])


def load(name):
    """Import a script, whose name begins with a digit, from its path."""
    path = SERVERS_DIR / SCRIPTS[name]
    spec = importlib.util.spec_from_file_location(f"server_{name}", path)
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


@pytest.fixture
def module(name):
    return load(name)


@pytest.fixture
def conversation(module):
    return module.Conversation(module.KeyValueStore())


def all_replies(conversation):
    """Return the replies there are, as a list of pieces."""
    return list(iter(conversation.replies, b""))


def answer(module, *pieces):
    """Return what a new store replies to the pieces."""
    conversation = module.Conversation(module.KeyValueStore())
    replies = b""
    for piece in pieces:
        conversation.receive(piece)
        replies += b"".join(all_replies(conversation))
    return replies, conversation.finished


# ---- The conversation -------------------------------------------------------

STREAM = (
    b"PING\r\n\r\n*0\r\n*-1\r\nSET a 1\n"
    + array(b"INCR", b"a")
    + array(b"SET", b"b\r\n", b"*1\r\n$4\r\nPING\r\n\0")
    + array(b"GET", b"b\r\n")
    + array(b"ECHO", b"")
    + b"  incrby a x \r\n"
    + array(b"\r\n")
)
REPLIES = (
    b"+PONG\r\n+OK\r\n:2\r\n+OK\r\n"
    + bulk(b"*1\r\n$4\r\nPING\r\n\0")
    + bulk(b"")
    + b"-ERR value is not an integer or out of range\r\n"
    + b"-ERR unknown command '  '\r\n"
)
ENDS = {
    "all is well": (b"PING\r\n", b"+PONG\r\n", False),
    "half a request": (b"*2\r\n$4\r\nECHO\r\n$1\r\n", b"", False),
    "count": (b"*x\r\nPING\r\n", b"invalid multibulk length", True),
    "length": (b"*1\r\n$-1\r\nPING\r\n", b"invalid bulk length", True),
    "dollar": (b"*1\r\n:1\r\nPING\r\n", b"expected '$', got ':'", True),
}


@pytest.mark.parametrize("end", ENDS)
def test_cut_at_every_position(module, end):
    """Wherever a read ends, the replies are the same."""
    tail, reply, finished = ENDS[end]
    if finished:
        reply = b"-ERR Protocol error: %b\r\n" % reply
    stream, expected = STREAM + tail, (REPLIES + reply, finished)
    assert answer(module, stream) == expected
    for at in range(len(stream)):
        assert answer(module, stream[:at], stream[at:]) == expected, at
    each = [stream[at : at + 1] for at in range(len(stream))]
    assert answer(module, *each) == expected
    threes = [stream[at : at + 3] for at in range(0, len(stream), 3)]
    assert answer(module, *threes) == expected


@pytest.mark.parametrize("step", [1000, 1024, 4096, 65536])
def test_long_words_in_pieces(module, step):
    """A word that takes many reads arrives as it was sent."""
    value = bytes(range(256)) * 2000
    stream = array(b"SET", b"a", value) + b"GET a\r\n"
    pieces = [stream[at : at + step] for at in range(0, len(stream), step)]
    assert answer(module, *pieces) == (b"+OK\r\n" + bulk(value), False)


@pytest.mark.parametrize("size", [0, 10, 1000, 500_000])
def test_replies_are_bounded(conversation, size):
    """replies() gives about 64 KiB and one reply at a time; none is lost."""
    value = b"v" * size
    count = 30 if size > 1000 else 5000
    conversation.receive(array(b"SET", b"a", value))
    assert all_replies(conversation) == [b"+OK\r\n"]
    conversation.receive(array(b"GET", b"a") * count)
    pieces = all_replies(conversation)
    assert max(map(len, pieces)) <= 64 * KIB + len(bulk(value))
    if size > 10:
        assert len(pieces) > 1
    assert b"".join(pieces) == bulk(value) * count


def test_unanswered_requests_are_not_carried_out(module):
    """Requests wait, and change nothing, until their replies are taken."""
    store = module.KeyValueStore()
    conversation = module.Conversation(store)
    conversation.receive(b"INCR a\r\n" * 100_000)
    conversation.replies()
    done = int(store.values[b"a"])
    assert 0 < done < 50_000
    all_replies(conversation)
    assert int(store.values[b"a"]) == 100_000


def test_nothing_to_do(conversation):
    """Without a complete request there is no reply, however often asked."""
    assert conversation.replies() == b""
    conversation.receive(b"*1\r\n$4\r\nPI")
    assert conversation.replies() == conversation.replies() == b""
    conversation.receive(b"")
    assert conversation.replies() == b""
    conversation.receive(b"NG\r\n")
    assert conversation.replies() == b"+PONG\r\n"
    assert conversation.replies() == b""


def test_conversations_do_not_mix(module):
    """Two clients share the keys, and not their half requests."""
    store = module.KeyValueStore()
    one, two = module.Conversation(store), module.Conversation(store)
    one.receive(b"*2\r\n$3\r\nGET\r\n")
    two.receive(b"SET a 1\r\n")
    assert two.replies() == b"+OK\r\n"
    assert one.replies() == b""
    one.receive(b"$1\r\na\r\n")
    assert one.replies() == bulk(b"1")
    two.receive(b"*x\r\n")
    assert two.replies().startswith(b"-ERR Protocol error")
    assert two.finished and not one.finished


@pytest.mark.parametrize(
    "begin",
    [
        b"",
        b"*",
        b"*1\r\n$",
        b"*1025\r\n",
        b"*1\r\n$1048577\r\n",
        b"*1\r\n$99999999999\r\n",
    ],
)
def test_limits_are_checked_before_memory_is_spent(module, begin):
    """Of what goes beyond a limit, next to nothing is kept."""
    tracemalloc = pytest.importorskip("tracemalloc")  # PyPy has none
    conversation = module.Conversation(module.KeyValueStore())
    chunk = b"1" * 64 * KIB
    conversation.receive(begin)
    tracemalloc.start()
    try:
        replies = b""
        for _ in range(100):
            conversation.receive(chunk)
            replies += conversation.replies()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert replies.startswith(b"-ERR Protocol error: ")
    assert replies.count(b"\r\n") == 1 and conversation.finished
    assert peak < KIB * KIB


def test_pieces_of_a_request_cost_no_more_each_time(module, monkeypatch):
    """A long word is not looked through again at every read."""
    looks = []
    look = module.next_request
    monkeypatch.setattr(
        module, "next_request", lambda stream: looks.append(1) or look(stream)
    )
    conversation = module.Conversation(module.KeyValueStore())
    stream = array(b"ECHO", b"v" * 100_000)
    for at in range(0, len(stream), 100):
        conversation.receive(stream[at : at + 100])
        replies = conversation.replies()
    assert replies == bulk(b"v" * 100_000)
    assert 2 <= len(looks) < 20


# ---- The text of the files --------------------------------------------------


def test_application_is_the_same():
    """From the mark to the end, all four files are equal to the letter."""
    texts = {split(name)[1] for name in SCRIPTS}
    assert len(texts) == 1
    application = texts.pop()
    assert application.count("\n") > 100 and "def main(" in application


def names_in(text):
    """Return the names in Python text; not those in comments and strings."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


def test_application_never_touches_a_socket(name):
    """The application's part names no module and no call of the network."""
    names = names_in(split(name)[1])
    modules = {"socket", "select", "ssl", "asyncio", "selectors"}
    calls = {"recv", "recv_into", "send", "sendall", "accept", "connection"}
    assert "Conversation" in names
    assert names & (modules | calls | {"socketserver"}) == set()


def test_pattern_never_looks_into_the_bytes(name):
    """The pattern's part has no bytes of the protocol, and no commands."""
    pattern = ast.parse(split(name)[0])
    constants = {
        node.value
        for node in ast.walk(pattern)
        if isinstance(node, ast.Constant) and isinstance(node.value, bytes)
    }
    assert constants <= {b"", b"!"}, constants  # b"!" wakes the loop


def imports(name):
    """Return the modules that a script imports, anywhere in it."""
    for node in ast.walk(ast.parse(text_of(name))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield node.module


def test_imports(name):
    """Only the standard library, and of it nothing that hides the pattern."""
    modules = {module.partition(".")[0] for module in imports(name)}
    hiding = {"asyncio", "selectors", "socketserver", "concurrent"}
    dynamic = {"importlib", "runpy", "imp"}
    assert modules & (hiding | dynamic) == set()
    assert "__import__" not in names_in(text_of(name))
    ours = {path.stem for path in SERVERS_DIR.glob("*.py")}
    assert modules & ours == set()
    if hasattr(sys, "stdlib_module_names"):  # since Python 3.10
        assert modules <= set(sys.stdlib_module_names)


def test_blocking_servers_do_not_use_settimeout():
    """settimeout makes a socket non-blocking: not in 1 and 2."""
    for name in "single", "multi":
        names = names_in(text_of(name))
        assert names & {"settimeout", "setblocking", "select", "poll"} == set()
        assert {"SO_RCVTIMEO", "SO_SNDTIMEO"} <= names


def test_lines_are_short(name):
    """No line has more than 80 columns, a tab, or blanks at its end."""
    for number, line in enumerate(text_of(name).split("\n"), 1):
        assert len(line) <= 80, number
        assert line == line.rstrip() and "\t" not in line, number


def test_order_of_a_script(name):
    """First the docstring, then the pattern, TCPServer before all."""
    tree = ast.parse(text_of(name))
    docstring = ast.get_docstring(tree)
    assert SCRIPTS[name] in docstring, "it says how to start it"
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    names = [node.name for node in classes]
    expected = {
        "single": ["TCPServer", "IncomingTCPConnection"],
        "multi": ["TCPServer", "IncomingTCPConnection"],
        "busy": ["TCPServer", "Client"],
        "kqueue": ["TCPServer", "EventLoop", "Client"],
    }[name]
    assert names[: len(expected)] == expected
    assert names.index("Conversation") >= len(expected)


def test_same_server_interface():
    """TCPServer has the same constructor, start() and stop() everywhere."""
    signatures = {
        tuple(
            str(inspect.signature(getattr(load(name).TCPServer, method)))
            for method in ("__init__", "start", "stop", "tally")
        )
        for name in SCRIPTS
    }
    assert len(signatures) == 1, signatures


def test_server_in_a_program(module):
    """TCPServer works in any program: it only gets told what it needs."""
    store = module.KeyValueStore()
    address = ("127.0.0.1", 0)
    server = module.TCPServer(address, lambda: module.Conversation(store), 5)
    try:
        assert server.listener.getsockname()[1] > 0
        assert server.tally()["connected_clients"] == 0
    finally:
        server.stop()


def test_defaults(module, monkeypatch):
    """Without options: 127.0.0.1, one port above Redis's, 60 seconds."""
    monkeypatch.setattr(sys, "argv", [SCRIPTS["single"]])
    options = module.command_line()
    assert (options.host, options.port) == ("127.0.0.1", 6380)
    assert (options.idle_timeout, options.verbose) == (60, False)


def test_help(name):
    """--help shows the picture and the options, and starts nothing."""
    ended = run_to_end(name, "--help")
    assert ended.returncode == 0 and ended.stderr == ""
    for word in "--host", "--port", "--idle-timeout", "-v", SCRIPTS[name]:
        assert word in ended.stdout
    assert "listening" not in ended.stdout


def test_alone_in_an_empty_folder(name, start, tmp_path):
    """A script needs nothing beside it, and leaves nothing behind."""
    shutil.copy(SERVERS_DIR / SCRIPTS[name], tmp_path)
    server = start(name, folder=tmp_path)
    assert server.ask(b"SET a 1\r\nINCR a\r\n") == b"+OK\r\n:2\r\n"
    server.stop().check()
    assert [path.name for path in tmp_path.iterdir()] == [SCRIPTS[name]]


def test_two_scripts_differ_by_little():
    """diff of 1 and 2 is something to show on a slide."""
    if not shutil.which("diff"):
        pytest.skip("diff is not installed")
    paths = [str(SERVERS_DIR / SCRIPTS[name]) for name in ("single", "multi")]
    diff = subprocess.run(
        ["diff", *paths],
        stdout=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
    )
    assert 0 < len(re.findall(r"^[<>]", diff.stdout, re.M)) < 60
