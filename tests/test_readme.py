"""The README and the lecture show the code that is there, and true names."""

import difflib
import re
import subprocess
import sys
import textwrap

from conftest import HERE, PATIENCE, SCRIPTS, SERVERS_DIR

PROJECT = HERE.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")
SOURCES = {
    script: (SERVERS_DIR / script).read_text() for script in SCRIPTS.values()
}


def blocks(language):
    """Return the README's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def dedented_pieces(block):
    """Return the pieces of a block between lines that say `...`."""
    return [piece.strip("\n") for piece in block.split("\n...\n")]


def stands_in_a_server(piece):
    """Return whether a piece of code stands in a server, but for indenting."""
    for source in SOURCES.values():
        for spaces in range(0, 24, 4):
            if textwrap.indent(piece, " " * spaces) in source:
                return True
    return False


def test_code_is_the_code():
    """Each piece of Python in the README stands in one of the servers."""
    found = 0
    for block in blocks("python"):
        if "import asyncio" in block:
            continue  # that one is run, below
        for piece in dedented_pieces(block):
            assert stands_in_a_server(piece), piece
            found += 1
    assert found >= 6


def test_diff_is_the_diff():
    """The diff in the README is the end of the real one."""
    (shown,) = blocks("diff")
    one, two = (SOURCES[SCRIPTS[n]].splitlines() for n in ("single", "multi"))
    real = [line for line in difflib.ndiff(one, two) if line[0] in "+-"]
    sign = {"<": "-", ">": "+"}
    lines = [
        sign[line[0]] + line[1:]
        for line in shown.splitlines()
        if line[0] in "<>"
    ]
    changed = [line.rstrip() for line in real]
    for line in lines:
        assert line.rstrip() in changed, line
    docstring = [line for text in (one, two) for line in text[1:17]]
    missing = [
        line
        for line in changed
        if line not in [shown.rstrip() for shown in lines]
        and line[2:] not in docstring
    ]
    assert not missing


def test_asyncio_example(tmp_path):
    """The asyncio server of the README runs, and echoes."""
    (code,) = [block for block in blocks("python") if "import asyncio" in block]
    code = code.replace("6380)", "0)").replace(
        "    await server.serve_forever()",
        "    host, port = server.sockets[0].getsockname()\n"
        "    reader, writer = await asyncio.open_connection(host, port)\n"
        "    writer.write(b'hello')\n"
        "    print((await reader.readexactly(5)).decode())\n",
    )
    path = tmp_path / "echo.py"
    path.write_text(code)
    output = subprocess.check_output([sys.executable, path], timeout=PATIENCE)
    assert output == b"hello\n"


def test_targets_are_there():
    """Every make target that is named stands in the Makefile."""
    makefile = (PROJECT / "Makefile").read_text()
    lecture = PROJECT / ".github" / "LECTURE.md"
    text = README + (lecture.read_text() if lecture.exists() else "")
    for target in set(re.findall(r"`make ([a-z-]+)", text)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_links_to_files():
    """Every link and picture that is a file is there."""
    for name in ["README.md", ".github/LECTURE.md"]:
        page = PROJECT / name
        if not page.exists():
            continue
        for link in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), link


def test_what_stands_at_the_top():
    """The four servers, the client, Makefile, README, tests; nothing else."""
    allowed = {*SCRIPTS.values(), "client.py", "Makefile", "README.md", "tests"}
    seen = {p.name for p in PROJECT.iterdir() if not p.name.startswith(".")}
    assert seen - {"build", "__pycache__"} == allowed
