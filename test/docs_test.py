"""The docs name only what exists: links, tests, modules and log lines."""

import ast
import re

import pytest
from service import PROJECT

PAGES = sorted([*PROJECT.glob("*.md"), *PROJECT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", flags=re.MULTILINE)
TEST = re.compile(r"\btest_\w+…?")


def anchor(heading):
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_have_targets(page):
    """A file or folder of the project, and a heading in it."""
    for path, heading in LINK.findall(page.read_text("utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), path
        if heading:
            headings = HEADING.findall(target.read_text("utf-8"))
            assert heading in map(anchor, headings), f"{path}#{heading}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_tests_that_are_named_exist(page):
    """A named test is defined in test/*_test.py."""
    sources = [path.read_text("utf-8") for path in (PROJECT / "test").glob("*_test.py")]
    there = set(re.findall(r"def (test_\w+)\(", "\n".join(sources)))
    for name in TEST.findall(page.read_text("utf-8")):
        start = name.removesuffix("…")
        assert start in there or (
            start != name and any(test.startswith(start) for test in there)
        ), name


def test_architecture_has_every_module():
    """In its tree of modules."""
    text = (PROJECT / "ARCHITECTURE.md").read_text("utf-8")
    tree = text.partition("## The tree")[2].split("```")[1]
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
    """In docs/decisions; this includes those of the tests and the benchmark."""
    decisions = (PROJECT / "docs" / "decisions").glob("*.md")
    reasons = "\n".join(path.read_text("utf-8") for path in decisions).lower()
    setup = (PROJECT / "setup.py").read_text("utf-8")
    _, required, settings = re.split(r"^(?:REQUIRED =|setup\()", setup, flags=re.M)
    setup = required + settings.partition("entry_points")[2]
    names = re.findall(r'^ +"([\w-]+)[^":\n]*"(?!:)', setup, flags=re.MULTILINE)
    names += re.findall(r'\["([\w-]+)[^":]*"\]', setup)
    assert {"orjson", "uvloop", "types-setuptools", "py-spy"} < set(names)
    for name in names:
        assert f"**{name.lower()}**" in reasons, name


def source_strings():
    """Yield every string of the source, with `…` for each placeholder."""
    for pattern in ("socketdock*.py", "handlers/**/*.py", "backends/**/*.py"):
        for path in PROJECT.glob(pattern):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield re.sub(r"%[-.\d]*[a-z]", "…", node.value)


@pytest.mark.parametrize("page", ["delivery.md", "troubleshooting.md"])
def test_quoted_log_lines_exist_in_the_source(page):
    """A table may quote only the start of a line, followed by `…`."""
    text = (PROJECT / "docs" / page).read_text("utf-8")
    table = re.split("^## .* log$", text, flags=re.MULTILINE)[1]
    lines = re.findall(r"^\| `(.+?)` \|", table, flags=re.MULTILINE)
    assert len(lines) > 10
    there = set(source_strings())
    for line in lines:
        start = line.removesuffix("…")
        assert line in there or (
            start != line and any(words.startswith(start) for words in there)
        ), line
