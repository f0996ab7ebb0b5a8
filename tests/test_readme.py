"""The README and the lecture show the code that is there, and true names."""

import re
import textwrap

from conftest import HERE, SCRIPTS, run

PROJECT = HERE.parent
PAGES = PROJECT / "README.md", PROJECT / ".github" / "LECTURE.md"
README, LECTURE = (page.read_text(encoding="utf-8") for page in PAGES)
SOURCES = [(PROJECT / script).read_text() for script in SCRIPTS.values()]


def blocks(language, word=""):
    """Return the README's blocks in a language, "" for those without."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    return [text for name, text in found if name == language and word in text]


def test_length():
    assert len(README.splitlines()) <= 320
    assert len((PROJECT / "client.py").read_text().splitlines()) <= 350


def test_code_is_the_code():
    """Each piece of Python, and each small picture, stands in a server."""
    pieces = blocks("python")
    pieces += [block for block in blocks("") if "--" in block[:400]]
    assert len(pieces) == 8  # a picture of each; two, none, three and one
    for piece in pieces:
        indented = [textwrap.indent(piece, " " * n) for n in range(0, 24, 4)]
        assert any(text in source for text in indented for source in SOURCES)


def test_diff_is_the_diff():
    """The diff is the real one, hunk headers included, but for the top."""
    scripts = SCRIPTS["single"], SCRIPTS["multi"]
    hunks = re.split(r"(?m)^(?=\d)", run("diff", *scripts, cwd=PROJECT)[1])
    top = SOURCES[0].splitlines().index("import argparse")
    rest = [hunk for hunk in hunks[1:] if int(re.match(r"\d+", hunk)[0]) > top]
    assert blocks("diff") == ["".join(rest)]


def test_table_is_that_of_compare():
    """The table has the rows and the sentences of tests/bench/compare.py."""
    (table,) = blocks("", "1 single")
    source = (PROJECT / "tests" / "bench" / "compare.py").read_text()
    lines = [line.strip() for line in table.splitlines() if line.strip()]
    assert len(lines) > 20
    for line in lines[1:]:
        name = re.split(r"\s{2,}", line.replace("500 ", "", 1))[0]
        known = name in source or re.sub(r"\b500\b", "{CROWD}", name) in source
        assert known or "500" in line, line


def test_options_and_targets():
    """A server's options, with their defaults; each target of the Makefile."""
    shown = dict(re.findall(r"`(--[a-z-]+) ([0-9.]+)`", README))
    real = re.findall(r'"(--[a-z-]+)".*?default="?([0-9.]+)', SOURCES[0])
    assert shown == dict(real) == {"--host": "127.0.0.1", "--port": "6380"}
    makefile = (PROJECT / "Makefile").read_text()
    named = set(re.findall(r"`?make ([a-z-]+)", README + LECTURE))
    targets = " ".join(re.findall(r"^([a-z -]+):", makefile, re.M)).split()
    assert {"demo", "trace", "compare", "test"} <= named
    prose = {"one", "it", "a", "them", "the", "sure", "an", "no"}
    assert named - set(targets) - prose == set()


def test_links_to_files():
    """Every link and picture that is a file is there."""
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
            assert "://" in link or (page.parent / link).exists(), link


def test_answers_typed_by_hand(server):
    """What one types into nc is answered as shown."""
    (session,) = blocks("", "$ nc")
    lines = session.splitlines()[1:]
    asked = [line for line in lines if re.match("[A-Z]{3}", line)]
    answers = server.ask("".join(f"{line}\n" for line in asked).encode())
    rest = [line for line in lines if line not in asked]
    assert answers.decode().splitlines() == rest
