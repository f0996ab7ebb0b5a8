"""The tools of tests/bench run, at a small size; figures are not judged."""

import re
import sys
from xml.etree import ElementTree

import pytest
from conftest import (
    HERE, PROC, SCRIPTS, SERVERS_DIR, needs, run, text_of, together,
)  # fmt: skip

PATHS = {name: SERVERS_DIR / script for name, script in SCRIPTS.items()}
OPTIONS = {
    "compare, single": [f"--server={PATHS['single']}"],
    "compare, kqueue": [f"--server={PATHS['kqueue']}"],
    "pictures": ["--svg", "demo.svg"],
    "scale": "--most 20 --seconds 0.1 --svg scale.svg".split(),
    "bench": "--rounds 1 --requests 300 --only k --only P".split(),
    "syscalls": [],
    "measure": [PATHS["kqueue"], 20],
    "late": [PATHS["kqueue"]],
    "late, wrong": ["never_waits.py"],
}


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """All tools, run at the same time: they spend most of it waiting."""
    folder = tmp_path_factory.mktemp("tools")
    text = text_of("kqueue").replace("wants != watched and", "False and")
    (folder / "never_waits.py").write_text(text)
    # Without what is installed, and with no more files than on a Mac.
    shell = "sh", "-c", 'ulimit -Sn 256; exec "$0" -S "$@"', sys.executable

    def run_tool(tool):
        path = HERE / "bench" / f"{tool.partition(',')[0]}.py"
        return run(*shell, path, *OPTIONS[tool], cwd=folder)

    ended = dict(zip(OPTIONS, together(run_tool, *OPTIONS)))
    for _, out, _ in ended.values():
        assert max(map(len, out.splitlines()), default=0) <= 79
    return {"folder": folder, **ended}


def test_compare(tools):
    """Who is held up and who is not; what the figures of a crowd count."""
    each = r"\S+ KiB" if sys.implementation.name == "pypy" else r"[01]\.\d KiB"
    for row, *cells in [
        ("time elapsed", r"\d\.\d\d s", r"\d\.\d\d s"),
        ("first reply, worst", r"\d+ ms", r"\d+ ms"),
        ("another's PING", "must wait", r"\d+ ms"),
        ("another's PING then", "must wait", r"\d{3} ms"),
        ("CPU in use", r"\d%", r"\d%"),
        ("threads meanwhile", "1", "2"),
        ("memory for each", None, each if PROC else None),
        ("all answered after", "only 1 of 500", r"\d+ ms"),
        ("context switches", r"[\d,]+", r"[\d,]+"),
        ("wake-ups for PINGs", None, r"\d+"),
        ("events per wake-up", None, r"[\d.]+"),
    ]:
        for name, cell in zip(["single", "kqueue"], cells):
            status, out, err = tools[f"compare, {name}"]
            assert status == 0 and err == "", err
            found = re.search(f"^  {row} +({cell})$", out, re.M)
            assert bool(found) == bool(cell), (row, out)
    assert "\n  The PING came 50 ms after the handler began" in out
    assert "\nChoose  1 single" in out and "\n        4 kqueue" in out


def test_pictures(tools):
    """The pictures are XML, their text is text, and they hold no script."""
    trees = []
    for tool, name in ("pictures", "demo"), ("scale", "scale"):
        status, out, err = tools[tool]
        assert status == 0 and f"{name}.svg" in out, err
        trees.append(ElementTree.parse(tools["folder"] / f"{name}.svg"))
        assert not trees[-1].findall(".//{*}script")
    demo, scale = ([e.text for e in t.findall(".//{*}text")] for t in trees)
    assert f"{SCRIPTS['kqueue']}: " in " ".join(demo)
    bars = [bar.get("class") for bar in trees[0].findall(".//{*}rect")]
    # Of each client of each server, and one more in the legend.
    assert bars.count("talks") == 4 * 8 + 1
    assert bars.count("waits") == 4 * 8 * 4 + 1
    assert "4 kqueue loop" in scale and "connections" in scale
    assert "requests/s, all active" in out and "4 kqueue loop" in out


def test_bench(tools):
    """The loop and its comparison are measured; the loop has the ratio 1."""
    needs("redis-benchmark")
    status, out, err = tools["bench"]
    assert status == 0, err
    loop = re.findall(r"^4 kqueue loop .*$", out, re.M)
    assert len(loop) == 2 and all("1.00" in line for line in loop)
    assert len(re.findall(r"^asyncio.Protocol .*\d$", out, re.M)) == 2


def test_syscalls(tools):
    """Each pattern's fingerprint: what only it calls, what it never does."""
    status, out, err = tools["syscalls"]
    if status and ("strace" in err or "Linux" in err):
        pytest.skip(err)
    assert status == 0, err

    def row(name):
        cells = re.search(rf"^ *{name}  +(.*)$", out, re.M)[1].split()
        return [int(cell.replace(",", "").replace("-", "0")) for cell in cells]

    assert row("send") == [20, 20, 20, 20]
    assert row("clone")[:3] == [0, 4, 0]
    assert row("epoll_wait")[:3] == [0, 0, 0] and row("epoll_wait")[3] > 0
    in_vain = row(r"recv .*\n +EAGAIN")
    assert in_vain[2] > 0 and in_vain[0] == in_vain[1] == in_vain[3] == 0


def test_scripts_of_the_lecture(tools):
    """measure.py says what a PING costs; late.py finds who never waits."""
    missing = "bytes of the replies are missing\n"
    cost = "idle: #% of a core\na PING takes # us\nthe server's CPU .*: # us\n"
    for tool, text in [
        ("late", f"0 {missing}"),
        ("late, wrong", rf"[1-9]\d+ {missing}"),
        ("measure", cost.replace("#", r"[\d.]+")),
    ]:
        status, out, err = tools[tool]
        assert (status, err) == (0, "") and re.fullmatch(text, out), out
