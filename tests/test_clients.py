"""Clients that people have: redis-cli, redis-benchmark, nc."""

import re

import pytest
from conftest import MANY, bulk, needs, run

TYPED = b'SET k "a b"\nGET k\nGET nothing\nINCRBY n 42\nINFO\nQUIT\n'
SHOWN = r"OK\na b\n\n42\n.*role:master.*"
BY_HAND = b"SET a 1\nINCR a\nGET a\nnonsense\nQUIT\n"
BENCHMARK = "redis-benchmark -h {} -p {} -c {} -n 1600 -t ping,set,get,incr -q"
FIVE = r"(.*requests per second.*){5,}"


@pytest.mark.parametrize(
    "line, data, shown",
    [
        ("redis-cli -2 -h {} -p {}", TYPED, SHOWN),
        ("redis-cli -3 -h {} -p {}", TYPED, SHOWN),
        ("nc {} {}", BY_HAND, r"\+OK\r\n:2\r\n\$1\r\n2\r\n-ERR .*\+OK\r\n"),
        (BENCHMARK, b"", FIVE),
        (BENCHMARK + " -P 16", b"", FIVE),
    ],
)
def test_client(server, line, data, shown):
    """It talks to a server, and comes to its end."""
    clients = 20 if server.name in MANY else 1
    words = line.format(server.host, server.port, clients).split()
    needs(words[0])
    status, out, err = run(*words, data=data)
    assert status == 0 and re.fullmatch(shown, out, re.S), out + err
    if words[0] == "redis-benchmark":
        counted = server.ask(b"GET counter:__rand_int__\r\n")
        assert counted == bulk(b"1600")
