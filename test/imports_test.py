"""Imports have one direction."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from service import PROJECT

import backends

# The packages and modules of `handlers`: each may import those before it.
LAYERS = (
    "process",
    "http",
    "websocket",
    "telemetry",
    "owners",
    "rates",
    "backlog",
    "admission",
    "connections",
    "probes",
    "clients",
    "callbacks",
    "operators",
    "program",
)
# Backends that are built on another one.
BASES = {"apigateway": "http", "redis": "http"}
FOLDERS = ("backends", "handlers", "examples", "bench", "test")
SOURCES = sorted(
    [
        *PROJECT.glob("*.py"),
        *(file for folder in FOLDERS for file in (PROJECT / folder).rglob("*.py")),
    ]
)


def imported_by(file: Path) -> Iterator[str]:
    """Return full names of all that a file imports: modules and their members."""
    package = file.relative_to(PROJECT).parent.parts
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                start = package[: len(package) - level + 1] if level else ()
                path = ".".join([*start, module] if module else start)
                yield path
                yield from (f"{path}.{alias.name}" for alias in names)


def of_package(name: str) -> list[Path]:
    """The sources below a package."""
    return [file for file in SOURCES if file.is_relative_to(PROJECT / name)]


def is_module(name: str) -> bool:
    """Whether a full name is one of the project's own modules."""
    path = PROJECT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


@pytest.mark.parametrize(
    "file",
    [file for file in SOURCES if file.parent.name != "test"],
    ids=lambda file: file.name,
)
def test_no_module_imports_socketdock(file):
    """It is `__main__`: a second import would define its options twice.

    A test may, in whose process pytest is `__main__`.
    """
    assert "socketdock" not in {name.split(".")[0] for name in imported_by(file)}


def test_options_are_set_by_socketdock_alone():
    """Everybody else reads them, and only where something is made."""
    name = "handlers.process.options"
    importers = {
        file.stem
        for file in SOURCES
        if file.parent.name != "test" and name in imported_by(file)
    }
    assert importers == {"socketdock"}


@pytest.mark.parametrize("file", of_package("handlers"), ids=lambda file: file.name)
def test_handlers_import_downwards_only(file):
    """No package of `handlers` knows those above it, not even their types."""
    own = layer_of(file)
    above = {
        name
        for name in imported_by(file)
        if name.startswith("handlers.") and is_module(name)
        if LAYERS.index(name.split(".")[1]) > own
    }
    assert not above


def layer_of(file: Path) -> int:
    first = file.relative_to(PROJECT / "handlers").with_suffix("").parts[0]
    return -1 if first == "__init__" else LAYERS.index(first)


@pytest.mark.parametrize("file", of_package("handlers"), ids=lambda file: file.name)
def test_handlers_import_no_particular_backend(file):
    """They know the interface, and what backends share."""
    assert not set(map(backend_of, imported_by(file))) - {None}


@pytest.mark.parametrize("file", of_package("backends"), ids=lambda file: file.name)
def test_backends_import_no_handlers(file):
    """A backend knows the interface, not the relay's ends."""
    assert "handlers" not in {name.split(".")[0] for name in imported_by(file)}


@pytest.mark.parametrize("file", of_package("backends"), ids=lambda file: file.name)
def test_backends_do_not_import_each_other(file):
    """It knows the interface, what backends share, its own modules, and its base."""
    own = backend_of(".".join(file.relative_to(PROJECT).with_suffix("").parts))
    assert set(map(backend_of, imported_by(file))) <= {own, BASES.get(own), None}


def backend_of(name: str) -> str | None:
    """The built-in backend that a module belongs to; None for shared ones."""
    package, _, rest = name.partition(".")
    first = rest.partition(".")[0]
    return first if package == "backends" and first in backends.names() else None
