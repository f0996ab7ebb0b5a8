"""The benches run, at a small size; what they measure is not judged here."""

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import HERE, needs_proc

BENCH = HERE / "bench"
LIMIT = 120  # seconds, on a loaded machine


def run(script, *options, path=None):
    """Run a bench to its end; return its status, stdout and stderr."""
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    if path is not None:
        env["PATH"] = path
    result = subprocess.run(
        [sys.executable, str(BENCH / script), *map(str, options)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=LIMIT,
        env=env,
    )
    out, err = result.stdout.decode(), result.stderr.decode()
    assert "Traceback" not in err, err
    assert all(len(line) <= 79 for line in out.splitlines()), out
    return result.returncode, out, err


def test_bench():
    """redis-benchmark measures all servers, and the loop has the ratio 1."""
    if not shutil.which("redis-benchmark"):
        pytest.skip("redis-benchmark is not installed")
    status, out, err = run("bench.py", "--rounds", 1, "--requests", 300)
    assert status == 0, err
    for name in "1 single", "2 multi", "3 busy", "asyncio.Protocol":
        assert name in out
    loop = re.findall(r"^4 kqueue loop .*$", out, re.M)
    assert len(loop) == 2 and all("1.00" in line for line in loop)


@pytest.mark.parametrize("script", ["bench.py", "syscalls.py"])
def test_missing_tool(script, tmp_path):
    """Without its tool, it says in one sentence how to get it, and fails."""
    status, out, err = run(script, path=str(tmp_path))
    assert status != 0 and err.count("\n") == 1, err
    # Where there is no strace to be had at all, it says so.
    assert "install" in err or "Linux" in err


def test_scale(tmp_path):
    """The plot is drawn, as text and as SVG."""
    svg = tmp_path / "scale.svg"
    options = "--most", 20, "--seconds", 0.1, "--svg", svg
    status, out, err = run("scale.py", *options)
    assert status == 0, err
    assert "requests/s, all active" in out and "4 kqueue loop" in out
    root = ElementTree.parse(svg).getroot()
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "4 kqueue loop" in texts and "connections" in texts


@needs_proc
def test_syscalls():
    """Each pattern's fingerprint: what only it calls, and what it never does."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    status, out, err = run("syscalls.py")
    if status and "not permitted" in err:
        pytest.skip("strace is not permitted here")
    assert status == 0, err

    def row(name):
        line = re.search(rf"^ *{name}  +(.*)$", out, re.M)[1]
        return [int(n.replace(",", "")) if n != "-" else 0 for n in line.split()]

    assert row("send") == [20, 20, 20, 20]
    assert row("clone")[1] == 4 and row("clone")[0] == row("clone")[2] == 0
    assert row("epoll_wait")[:3] == [0, 0, 0] and row("epoll_wait")[3] > 0
    empty = re.findall(r"^ *EAGAIN  +(.*)$", out, re.M)[1].split()  # of recv
    assert empty[0] == empty[1] == empty[3] == "-" and empty[2] != "-"
