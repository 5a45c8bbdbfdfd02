"""conf/socketdock.conf and README.md name every option."""

import ast
import asyncio
import re
import subprocess
import sys

import pytest
import websockets
from service import DEADLINE, PROJECT, Service

OPTION = re.compile(r"^# (\w+) = (.+)$", flags=re.MULTILINE)
# Of the many that tornado brings, these are worth a line.
TORNADO = ("log_file_prefix", "logging")
UNITS = {"SECONDS": "seconds", "BYTES": "bytes", "COUNT": "number"}


def options_in_help():
    """Name, metavar, default and help text of each option, in the order of --help."""
    text = subprocess.check_output(
        [sys.executable, "socketdock.py", "--help"], cwd=PROJECT, text=True, timeout=30
    )
    for flag in re.split(r"^  --", text, flags=re.MULTILINE)[1:]:
        words = " ".join(flag.partition("\n\n")[0].split())
        name, metavar, help_text = re.match(
            r"(\w+)(?:=(\S+))?\s+(.*)", words
        ).groups()
        if name in TORNADO or not name.startswith(("log_", "help", "config")):
            default = re.search(r" \[(\S+)\]$", help_text)
            yield name, metavar, default and default[1]


@pytest.fixture(scope="module")
def helped():
    return list(options_in_help())


@pytest.fixture(scope="module")
def conf():
    return (PROJECT / "conf" / "socketdock.conf").read_text("utf-8")


def test_conf_names_every_option_in_the_order_of_help(helped, conf):
    """Grouped as there; a new option needs its line here."""
    assert [name for name, _ in OPTION.findall(conf)] == [name for name, *_ in helped]
    assert len(helped) > 30


def test_conf_has_every_option_at_its_default(helped, conf):
    """None and [] stand for none."""
    values = {name: ast.literal_eval(value) for name, value in OPTION.findall(conf)}
    written = {
        name: None if value in (None, []) else str(value)
        for name, value in values.items()
    }
    assert written == {name: default for name, _, default in helped}


def test_conf_tells_each_unit_in_words(helped, conf):
    """Nobody has to guess whether a limit is in seconds or milliseconds."""
    told = {
        OPTION.search(paragraph)[1]: paragraph
        for paragraph in conf.split("\n\n")
        if OPTION.search(paragraph)
    }
    for name, metavar, _ in helped:
        assert UNITS.get(metavar, "") in told[name], name


def test_conf_sets_nothing_as_it_ships(conf):
    """It is found by default, so a line in it would change the defaults."""
    assert all(line == "" or line.startswith("#") for line in conf.splitlines())


@pytest.mark.gen_test
async def test_every_line_of_conf_can_be_uncommented_as_it_stands(
    io_loop, conf, tmp_path
):
    """The relay starts with all of them set to their defaults."""
    path = tmp_path / "all.conf"
    path.write_text(OPTION.sub(r"\1 = \2", conf))
    async with (
        Service(f"--config={path}") as service,
        websockets.connect(service.ws_url) as client,
    ):
        await client.send("hello")
        assert await asyncio.wait_for(client.recv(), DEADLINE) == "hello"


def test_readme_names_every_option(helped):
    """As `--name`."""
    named = set(re.findall(r"--(\w+)", (PROJECT / "README.md").read_text("utf-8")))
    assert {name for name, *_ in helped} - {*TORNADO} - named == set()
