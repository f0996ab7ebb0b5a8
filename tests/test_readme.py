"""The README and the lecture show the code that is there, and true names."""

import re
import subprocess
import textwrap

from conftest import HERE, SCRIPTS

PROJECT = HERE.parent
PAGES = PROJECT / "README.md", PROJECT / ".github" / "LECTURE.md"
README, LECTURE = (page.read_text(encoding="utf-8") for page in PAGES)
SOURCES = [(PROJECT / script).read_text() for script in SCRIPTS.values()]


def blocks(language):
    """Return the README's blocks in a language, "" for those without."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    return [block for name, block in found if name == language]


def stands_in_a_server(piece):
    """Return whether a piece of text stands in a server, however indented."""
    return any(
        textwrap.indent(piece, " " * spaces) in source
        for source in SOURCES
        for spaces in range(0, 24, 4)
    )


def test_length():
    assert len(README.splitlines()) <= 320
    assert len((PROJECT / "client.py").read_text().splitlines()) <= 460


def test_code_is_the_code():
    """Each piece of Python, and each small picture, stands in a server."""
    pieces = blocks("python")
    pieces += [block for block in blocks("") if "--" in block[:400]]
    for piece in pieces:
        assert stands_in_a_server(piece), piece
    assert len(pieces) == 10  # a picture of each; two, none, three and one


def test_diff_is_the_diff():
    """The diff is the real one, hunk headers included, but for the top."""
    command = ["diff", SCRIPTS["single"], SCRIPTS["multi"]]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=PROJECT)
    hunks = re.split(r"(?m)^(?=\d)", done.stdout.decode())[1:]
    top = SOURCES[0].splitlines().index("import argparse")
    rest = [hunk for hunk in hunks if int(re.match(r"\d+", hunk)[0]) > top]
    assert blocks("diff") == ["".join(rest)]


def test_table_is_that_of_compare():
    """The table has the rows and the sentences of tests/bench/compare.py."""
    (table,) = [block for block in blocks("") if "1 single" in block]
    source = (PROJECT / "tests" / "bench" / "compare.py").read_text()
    lines = [line for line in table.splitlines() if line.strip()]
    assert len(lines) > 20
    for line in lines[1:]:
        words = line.strip().replace("500 ", "", 1)
        name = re.split(r"\s{2,}", words)[0]
        known = name in source or re.sub(r"\b500\b", "{CROWD}", name) in source
        assert known or "500" in line, line


def test_options_are_the_options():
    """The options of a server, with their defaults."""
    shown = dict(re.findall(r"`(--[a-z-]+) ([0-9.]+)`", README))
    real = re.findall(r'"(--[a-z-]+)".*?default="?([0-9.]+)', SOURCES[0])
    wanted = {"--host": "127.0.0.1", "--port": "6380"}
    assert shown == dict(real) == wanted


def test_targets_are_there():
    """Every make target that is named stands in the Makefile."""
    makefile = (PROJECT / "Makefile").read_text()
    named = set(re.findall(r"`?make ([a-z-]+)", README + LECTURE))
    targets = set(re.findall(r"^([a-z -]+):", makefile, re.M))
    targets = {word for line in targets for word in line.split()}
    assert {"demo", "trace", "compare", "test"} <= named
    prose = {"one", "it", "a", "them", "the", "sure", "an", "no"}
    assert named - targets - prose == set()


def test_links_to_files():
    """Every link and picture that is a file is there."""
    for page, text in zip(PAGES, (README, LECTURE)):
        for link in re.findall(r"\]\(([^)#]+)", text):
            if "://" not in link:
                assert (page.parent / link).exists(), link


def test_answers_typed_by_hand(server):
    """What one types into nc is answered as shown."""
    (session,) = [block for block in blocks("") if "$ nc" in block]
    lines = session.splitlines()[1:]
    asked = [line for line in lines if re.match("[A-Z]{3}", line)]
    answers = server.ask("".join(f"{line}\n" for line in asked).encode())
    rest = [line for line in lines if line not in asked]
    assert answers.decode().splitlines() == rest
