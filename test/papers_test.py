"""What the papers name is there: links, tests and modules."""

import ast
import re

import pytest
from service import PROJECT

PAPERS = sorted([*PROJECT.glob("*.md"), *PROJECT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", flags=re.MULTILINE)
TEST = re.compile(r"\btest_\w+…?")


def anchor(heading):
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: path.name)
def test_links_lead_somewhere(paper):
    """To a file or folder of ours, and to a heading in it."""
    for path, heading in LINK.findall(paper.read_text("utf-8")):
        target = paper.parent / path if path else paper
        assert target.exists(), path
        if heading:
            headings = HEADING.findall(target.read_text("utf-8"))
            assert heading in map(anchor, headings), f"{path}#{heading}"


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: path.name)
def test_tests_that_are_named_exist(paper):
    """A claim without its test is none."""
    sources = [path.read_text("utf-8") for path in (PROJECT / "test").glob("*_test.py")]
    there = set(re.findall(r"def (test_\w+)\(", "\n".join(sources)))
    for name in TEST.findall(paper.read_text("utf-8")):
        start = name.removesuffix("…")
        assert start in there or (
            start != name and any(test.startswith(start) for test in there)
        ), name


def test_architecture_has_every_module():
    """In its tree, under its folder's name."""
    text = (PROJECT / "ARCHITECTURE.md").read_text("utf-8")
    tree = text.partition("```")[2].partition("```")[0]
    modules = list(PROJECT.glob("socketdock*.py"))
    modules += [
        path
        for folder in ("handlers", "backends")
        for path in (PROJECT / folder).rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert len(modules) > 20
    for path in modules:
        assert re.search(rf"^ *{re.escape(path.name)} ", tree, flags=re.MULTILINE), path


def test_every_dependency_has_its_reason():
    """In docs/decisions, those of the tests and of the benchmark too."""
    decisions = (PROJECT / "docs" / "decisions").glob("*.md")
    reasons = "\n".join(path.read_text("utf-8") for path in decisions).lower()
    setup = (PROJECT / "setup.py").read_text("utf-8")
    setup = setup[setup.index("install_requires") :]
    names = re.findall(r'^ +"([\w-]+)[^":\n]*"(?!:)', setup, flags=re.MULTILINE)
    names += re.findall(r'\["([\w-]+)[^":]*"\]', setup)
    assert {"orjson", "uvloop", "types-setuptools", "py-spy"} < set(names)
    for name in names:
        assert f"**{name.lower()}**" in reasons, name


def said():
    """All that the source may say, `…` for what is not known before."""
    for pattern in ("socketdock*.py", "handlers/**/*.py", "backends/**/*.py"):
        for path in PROJECT.glob(pattern):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield re.sub(r"%[-.\d]*[a-z]", "…", node.value)


@pytest.mark.parametrize("paper", ["delivery.md", "troubleshooting.md"])
def test_lines_of_the_log_are_the_source_s(paper):
    """As the tables quote them, which may leave out the rest of a line."""
    text = (PROJECT / "docs" / paper).read_text("utf-8")
    table = re.split("^## .* log$", text, flags=re.MULTILINE)[1]
    lines = re.findall(r"^\| `(.+?)` \|", table, flags=re.MULTILINE)
    assert len(lines) > 10
    there = set(said())
    for line in lines:
        start = line.removesuffix("…")
        assert line in there or (
            start != line and any(words.startswith(start) for words in there)
        ), line
