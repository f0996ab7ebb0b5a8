"""Clients that people have: redis-cli, redis-benchmark, nc."""

import pytest
from conftest import MANY, bulk, needs, run


def output_of(program, *words, data=b""):
    """Run a client from the system, if it is there; return its output."""
    needs(program)
    status, out, err = run(program, *words, data=data)
    assert status == 0, out + err
    return out


@pytest.mark.parametrize("version", ["-2", "-3"])
def test_redis_cli(server, version):
    """redis-cli talks to it, in both versions of the protocol."""
    address = version, "-h", server.host, "-p", server.port
    typed = b'SET k "a b"\nGET k\nGET nothing\nINCRBY n 42\nINFO\nQUIT\n'
    output = output_of("redis-cli", *address, data=typed)
    assert output.startswith("OK\na b\n\n42\n") and "role:master" in output


def test_redis_benchmark(server):
    """redis-benchmark finishes, with and without pipelining."""
    clients = 20 if server.name in MANY else 1
    address = "-h", server.host, "-p", server.port, "-c", clients
    words = "-n", 1600, "-t", "ping,set,get,incr", "-q"
    for more in [], ["-P", 16]:
        output = output_of("redis-benchmark", *address, *words, *more)
        assert output.count("requests per second") >= 5
    assert server.ask(b"GET counter:__rand_int__\r\n") == bulk(b"3200")


def test_nc(server):
    """nc is enough for a person, who leaves with QUIT."""
    data = b"SET a 1\nINCR a\nGET a\nnonsense\nQUIT\n"
    output = output_of("nc", server.host, server.port, data=data)
    begin = "+OK\r\n:2\r\n$1\r\n2\r\n-ERR "
    assert output.startswith(begin) and output.endswith("\r\n+OK\r\n")
