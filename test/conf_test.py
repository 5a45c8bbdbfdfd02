"""conf/socketdock.conf and docs/options.md name every option, at its default."""

import ast
import asyncio
import re
import subprocess
import sys

import pytest
import websockets
from project import copy_project, installation, library
from service import DEADLINE, PROJECT, Service, ended

ROW = re.compile(r"^\| `--(\w+)` \| (.*?) \|", flags=re.MULTILINE)
OPTION = re.compile(r"^# (\w+) = (.+)$", flags=re.MULTILINE)
# Options of Tornado's log that have a line in the file; it has many more.
LOG = ("log_config", "log_file_prefix", "log_format", "logging")
UNITS = {"SECONDS": "seconds", "BYTES": "bytes", "COUNT": "number"}


def options_in_help():
    """Name, metavar and default of each option, in the order of --help."""
    text = subprocess.check_output(
        [sys.executable, "socketdock.py", "--help-all"],
        cwd=PROJECT,
        text=True,
        timeout=30,
    )
    for flag in re.split(r"^  --", text, flags=re.MULTILINE)[1:]:
        words = " ".join(flag.partition("\n\n")[0].split())
        name, metavar, help_text = re.match(
            r"(\w+)(?:=(\S+))?\s+(.*)", words
        ).groups()
        default = re.search(r" \[(\S+)\]$", help_text)
        yield name, metavar, default and default[1]


@pytest.fixture(scope="module")
def all_options():
    return list(options_in_help())


@pytest.fixture(scope="module")
def conf_options(all_options):
    """Those that have a line in the file."""
    return [
        option
        for option in all_options
        if option[0] in LOG or not option[0].startswith(("log_", "help", "config"))
    ]


@pytest.fixture(scope="module")
def conf():
    return (PROJECT / "conf" / "socketdock.conf").read_text("utf-8")


def test_conf_names_every_option_in_the_order_of_help(conf_options, conf):
    """With the same groups; each new option needs a line there."""
    names = [name for name, *_ in conf_options]
    assert [name for name, _ in OPTION.findall(conf)] == names
    assert len(conf_options) > 30


def test_conf_has_every_option_at_its_default(conf_options, conf):
    """None and [] mean that the value is empty."""
    values = {name: ast.literal_eval(value) for name, value in OPTION.findall(conf)}
    written = {
        name: None if value in (None, []) else str(value)
        for name, value in values.items()
    }
    assert written == {name: default for name, _, default in conf_options}


def test_conf_names_each_unit(conf_options, conf):
    """For example seconds, not milliseconds."""
    help_texts = {
        OPTION.search(paragraph)[1]: paragraph
        for paragraph in conf.split("\n\n")
        if OPTION.search(paragraph)
    }
    for name, metavar, _ in conf_options:
        assert UNITS.get(metavar, "") in help_texts[name].lower(), name


def test_conf_sets_nothing_as_it_ships(conf):
    """The relay reads this file by default: a line would change a default."""
    assert all(line == "" or line.startswith("#") for line in conf.splitlines())


@pytest.mark.gen_test
async def test_every_line_of_conf_can_be_uncommented(
    io_loop, conf, tmp_path
):
    """The relay starts with all options set to their defaults."""
    path = tmp_path / "all.conf"
    path.write_text(OPTION.sub(r"\1 = \2", conf))
    async with (
        Service(f"--config={path}") as service,
        websockets.connect(service.ws_url) as client,
    ):
        await client.send("hello")
        assert await asyncio.wait_for(client.recv(), DEADLINE) == "hello"


# What `socketdock config` prints.


@pytest.mark.once
@pytest.mark.parametrize("edited", [False, True])
def test_config_prints_the_file_as_it_ships(conf, tmp_path, edited):
    """Also if the default options file is edited; what it sets may be secret."""
    tree = copy_project(tmp_path / "tree")
    if edited:
        text = OPTION.sub(r"\1 = \2", conf)
        text = text.replace("callback_token = []", "callback_token = [\n  'hidden',\n]")
        (tree / "conf" / "socketdock.conf").write_text(text)
    printed = subprocess.check_output(
        [sys.executable, "socketdock.py", "config"], cwd=tree, text=True, timeout=30
    )
    assert printed == conf


@pytest.mark.once
def test_config_works_without_a_checkout(conf, tmp_path_factory):
    """The installation has the file in another folder."""
    prefix = installation(tmp_path_factory.getbasetemp())
    printed = subprocess.check_output(
        [prefix / "bin" / "socketdock", "config"],
        env={"PYTHONPATH": library(prefix)},
        text=True,
        timeout=30,
    )
    assert printed == conf


@pytest.mark.once
def test_config_takes_no_options():
    """An option would seem to change what it prints."""
    said = ended("config", "--bindport=1")
    assert said.returncode == 2
    assert said.stderr == (
        "socketdock: config takes no options; it prints all of them\n"
    )


def default_in(cell):
    """A default as --help prints it, of a table's cell; None where it has none.

    `20 s` and `0: forever` are numbers; words, such as `none: no TLS` and `the
    host's name`, say what happens without a value.
    """
    if (quoted := re.fullmatch(r"`([^-/][^/`]*|/\w+)`", cell)) is not None:
        return quoted[1]
    first = re.match(r"[\w.]*", cell)[0]
    return {"on": True, "off": False}.get(first, first if first[:1].isdigit() else None)


def as_value(default):
    """A number where it is one: 25.0 is 25; the only one of a list."""
    try:
        value = ast.literal_eval(default)
    except (ValueError, SyntaxError):
        return default
    return value[0] if isinstance(value, list) and len(value) == 1 else value


@pytest.mark.parametrize("path", ["docs/options.md", "README.md"])
def test_tables_have_options_at_their_defaults(all_options, path):
    """docs/options.md has each one once; README.md has some of them."""
    rows = ROW.findall((PROJECT / path).read_text("utf-8"))
    written = {name: as_value(default_in(cell)) for name, cell in rows}
    defaults = {name: as_value(default) for name, _, default in all_options}
    del defaults["help"]
    assert len(written) == len(rows) >= 10
    if path == "README.md":
        defaults = {name: defaults[name] for name in written}
    assert written == defaults
