"""The log: its two formats, its fields, its level, and floods of it."""

import asyncio
import contextlib
import json
import logging
import os
import pty
import re
import signal
import sys
import tempfile
from datetime import datetime, timedelta

import pytest
import websockets
import yaml
from faults import ScriptedBackend, send_raw
from service import DEADLINE, PROJECT, RecordingBackend, Service, eventually, refusal
from systemd_test import Systemd
from tornado.web import RequestHandler
from wire import TEXT as TEXT_FRAME
from wire import frame

from handlers.process import log_limit
from handlers.process.log_format import JSONFormatter, TextFormatter
from handlers.process.log_limit import LogLimit
from handlers.process.log_lines import MAX_LINE

pytestmark = pytest.mark.gen_test(timeout=60)

AUTO = {"SOCKETDOCK_LOG_FORMAT": "auto"}
TEXT = re.compile(
    r"\[[DIWEC] \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d [\w.]+\]"
)
LEVELS = ["debug", "info", "warning", "error", "critical"]
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
NOT_FOUND = b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"


def records(service, **fields):
    """The lines so far, as JSON; those that have these fields."""
    found = [json.loads(line) for line in service.log]
    return [record for record in found if fields.items() <= record.items()]


async def record_with(service, **fields):
    """The first line with these fields, once it is there."""
    await eventually(lambda: records(service, **fields))
    return records(service, **fields)[0]


# Formats and destinations.


@pytest.mark.parametrize(
    "flags, environment",
    [((), AUTO), (("--log_format=json",), {})],
    ids=["by-default", "by-option"],
)
async def test_lines_are_json_for_programs(io_loop, flags, environment):
    """One object per line, with the time in UTC."""
    async with Service(*flags, environment=environment) as service:
        async with websockets.connect(service.ws_url):
            pass
    for record in records(service):
        assert list(record)[:4] == ["time", "level", "logger", "message"]
        assert re.fullmatch(r"\d{4}(-\d\d){2}T\d\d(:\d\d){2}\.\d{3}Z", record["time"])
        age = datetime.now().astimezone() - datetime.fromisoformat(record["time"])
        assert timedelta(0) <= age < timedelta(minutes=5)
        assert record["level"] in LEVELS
    assert records(service, logger="socketdock", message="stopped", level="info")


async def test_lines_are_text_on_request(io_loop):
    """Without colors if there is no terminal."""
    async with Service("--log_format=text", environment=AUTO) as service:
        async with websockets.connect(service.ws_url):
            pass
    assert len(service.log) >= 4
    for line in service.log:
        assert TEXT.match(line)
        assert line.isprintable()


@pytest.mark.parametrize("flags", [(), ("--log_format=json",)], ids=["auto", "json"])
async def test_lines_are_text_in_colours_on_a_terminal(io_loop, flags):
    """A pseudo-terminal here; JSON only on request."""
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "socketdock.py", "--bindport=0", *flags,
        cwd=PROJECT,
        env={**os.environ, "TERM": "xterm", **AUTO},
        stdin=asyncio.subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    loop, line = asyncio.get_running_loop(), b""
    try:
        async with asyncio.timeout(DEADLINE):
            while b"\n" not in line:
                readable = asyncio.Event()
                loop.add_reader(ours, readable.set)
                await readable.wait()
                loop.remove_reader(ours)
                line += os.read(ours, 4096)
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()
        os.close(ours)
    if flags:
        assert "clients at" in json.loads(line.splitlines()[0])["message"]
    else:
        colour, text = re.match(rb"(\x1b\[\d+m)(.*)", line).groups()
        assert colour
        assert TEXT.match(text.decode())


async def test_log_file_is_json_or_text_by_log_format(io_loop, tmp_path):
    """Tornado's options of the file apply; it has no colors."""
    path = tmp_path / "log"
    for environment in (AUTO, {}):
        flags = (f"--log_file_prefix={path}", "--log_to_stderr")
        async with Service(*flags, environment=environment) as service:
            pass
        text = path.read_text()
        assert text.splitlines() == service.log
        assert (text[0] == "{") == (environment is AUTO)
        path.unlink()


async def test_log_file_is_rotated(io_loop, tmp_path):
    """Tornado rotates it by size."""
    flags = (f"--log_file_prefix={tmp_path / 'log'}", "--log_file_max_size=300",
             "--log_file_num_backups=50", "--log_to_stderr")
    async with Service(*flags, environment=AUTO) as service:
        for _ in range(5):
            async with websockets.connect(service.ws_url):
                pass
    files = sorted(tmp_path.iterdir(), key=lambda file: -len(file.name))
    assert len(files) > 3
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert sorted(lines) == sorted(service.log)


async def test_lines_are_utf8_in_every_locale(io_loop):
    """JSON is always UTF-8."""
    environment = {
        **AUTO, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0", "SOCKETDOCK_ÜBER": "1"
    }
    async with Service(environment=environment) as service:
        pass
    assert "Ignoring unknown variable SOCKETDOCK_ÜBER" in [
        record["message"] for record in records(service)
    ]


async def test_each_line_of_a_busy_log_is_json(io_loop):
    """At debug, with misbehaving peers and backends."""
    async with ScriptedBackend(lambda kind: NOT_FOUND) as backend:
        flags = ("--backend=http", "--logging=debug", "--http_server=tornado",
                 f"--messageuri={backend.url('message')}",
                 f"--disconnecturi={backend.url('disconnect')}")
        async with Service(*flags, environment=AUTO) as service:
            for path in (b"/\x85[I]", b"/\x9b2J\xc2\x9b", b"/%0a%1b[2J", b"/\xe2\x80"):
                request = b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path
                await send_raw(service.callback_url, request, answers=1)
            malformed = b"GET / HTTP/9.9\r\nHost: \n\r\n\x00\n\n"
            await send_raw(service.callback_url, malformed)
            for _ in range(5):
                async with websockets.connect(service.ws_url) as client:
                    await client.send("{}\n\x1b[2J")
                    await client.close(4000, "line\nline")
                async with websockets.connect(service.ws_url) as client:
                    client.transport.write(frame(TEXT_FRAME, b"\n\x1b", rsv=4))
                    await client.wait_closed()
            await backend.wait_for("disconnect", 10)
    found = records(service)
    assert len(found) > 30
    assert {record["level"] for record in found} >= {"debug", "info", "warning"}
    for line in service.log:
        assert line.isprintable()


# The content of lines.


async def test_open_and_close_have_a_line_each(io_loop):
    """With the connection's id and details."""
    async with Service(environment=AUTO) as service:
        async with websockets.connect(service.ws_url) as client:
            for message in ("ä", b"two"):
                await client.send(message)
                assert await client.recv() == message
            await client.close(4001, "our reason")
        closed = await record_with(service, event="close")
    (opened,) = records(service, event="open")
    identity = opened["connection_id"]
    assert re.fullmatch(r"[0-9a-f]{32}", identity)
    assert opened["level"] == closed["level"] == "info"
    assert opened["remote_ip"] == "127.0.0.1"
    assert opened["message"] == f"connection {identity} opened by 127.0.0.1"
    times = [datetime.fromisoformat(r["time"]) for r in (opened, closed)]
    seconds = closed.pop("seconds")
    assert 0 <= seconds < 60
    assert abs((times[1] - times[0]).total_seconds() - seconds) < 1
    message = re.fullmatch(
        rf"connection {identity} closed with 4001 by client after (\d+\.\d) s:"
        r" 2 messages in, 2 out",
        closed.pop("message"),
    )
    # Rounded separately: 0.0496 s is 0.05 in one field, and 0.0 in the text.
    assert abs(float(message[1]) - seconds) < 0.051
    del closed["time"]
    assert closed == {
        "level": "info",
        "logger": "handlers.clients.connection",
        "event": "close",
        "connection_id": identity,
        "code": 4001,
        "initiator": "client",
        "messages_in": 2,
        "messages_out": 2,
        "bytes_in": 5,
        "bytes_out": 5,
        "undelivered": 0,
        "waiting": 0,
    }
    assert not any("our reason" in line for line in service.log)


async def test_close_line_says_who_closed(io_loop):
    """The backend, the stopping relay, or a client that disappeared."""
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), environment=AUTO) as service:
            async with websockets.connect(service.ws_url) as client:
                (event,) = await backend.wait_for("connect", 1)
                await backend.call(event["meta"]["disconnect"])
                await client.wait_closed()
            ended = await record_with(service, initiator="backend")
            assert (ended["event"], ended["code"]) == ("close", 1000)
            async with websockets.connect(service.ws_url) as client:
                client.transport.abort()
            assert (await record_with(service, initiator="client"))["code"] == 1006
            stays = await websockets.connect(service.ws_url)
    assert (await record_with(service, initiator="relay"))["code"] == 1001
    await stays.wait_closed()
    assert len(records(service, event="close")) == 3


async def test_close_line_counts_what_was_not_delivered(io_loop):
    """It also counts what still waits; a later line may report more."""
    async def hold(handler: RequestHandler, event: dict) -> None:
        await decided.wait()
        handler.set_status(404)

    decided = asyncio.Event()
    async with RecordingBackend() as backend:
        backend.answers["message"] = hold
        flags = ("--order_wait=inf", "--backend_timeout=30")
        async with Service(*backend.flags(), *flags, environment=AUTO) as service:
            async with websockets.connect(service.ws_url) as client:
                for _ in range(3):
                    await client.send("x")
                await backend.wait_for("message", 1)
            closed = await record_with(service, event="close")
            decided.set()
            await backend.wait_for("disconnect", 1)
    counts = [closed[name] for name in ("messages_in", "waiting", "undelivered")]
    assert counts == [3, 3, 0]
    identity = closed["connection_id"]
    assert len(records(service, connection_id=identity, status=404)) == 3


# The level.


async def test_level_changes_on_sighup(io_loop, tmp_path):
    """To a lower and a higher one; the log reports it."""
    path = tmp_path / "options.conf"
    path.write_text("")
    async with Service(f"--config={path}", environment=AUTO) as service:

        async def at_level(name):
            path.write_text(f"log_level = {name!r}\n")
            service.process.send_signal(signal.SIGHUP)
            await eventually(
                lambda: any(f"level {name}, before" in x for x in service.log[-2:])
            )
            before = len(service.log)
            async with websockets.connect(service.ws_url) as client:
                await client.send("x")
                await client.recv()
            await send_raw(service.callback_url, LIVEZ, answers=1)
            return {record["level"] for record in records(service)[before:]}

        assert "debug" in await at_level("debug")
        assert await at_level("warning") <= {"warning"}
        assert await at_level("info") == {"info"}
        path.write_text("logging = 'loud'\n")
        service.process.send_signal(signal.SIGHUP)
        wrong = await record_with(service, level="error")
        assert "logging must be one of debug, info" in wrong["message"]
        assert "values stay" in wrong["message"]
        assert await at_level("debug") >= {"debug", "info"}


@pytest.mark.parametrize("source", ["flag", "environment"])
async def test_level_of_flag_or_environment_stays(io_loop, tmp_path, source):
    """It overrides the file, also at SIGHUP, which the log reports."""
    path = tmp_path / "options.conf"
    path.write_text("")
    flags = ("--log-level=info",) if source == "flag" else ()
    environment = {} if flags else {"SOCKETDOCK_LOGGING": "info"}
    async with Service(
        f"--config={path}", *flags, environment={**AUTO, **environment}
    ) as service:
        path.write_text("logging = 'debug'\n")
        service.process.send_signal(signal.SIGHUP)
        await eventually(lambda: "reloaded: " in service.log[-1])
        (line,) = [r for r in records(service) if "overridden" in r["message"]]
        place = flags[0].partition("=")[0] if flags else "SOCKETDOCK_LOGGING"
        assert line["message"] == (
            f"{path}, line 1: logging says debug, and is overridden: {place} says info"
        )
        async with websockets.connect(service.ws_url):
            pass
    assert not records(service, level="debug")


async def test_level_none_logs_nothing(io_loop, tmp_path):
    """Not even warnings, until SIGHUP changes the level."""
    path = tmp_path / "options.conf"
    path.write_text("bindport = 0\nlogging = 'none'\n")
    address = str(tmp_path / "notify")
    with Systemd(address) as systemd:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "socketdock.py", f"--config={path}",
            cwd=PROJECT,
            env={**os.environ, "NOTIFY_SOCKET": address, "SOCKETDOCK_NOTHING": "x"},
            stderr=asyncio.subprocess.PIPE,
        )
        await systemd.wait_for("READY=1")
        path.write_text("logging = 'info'\n")
        process.send_signal(signal.SIGHUP)
        line = await asyncio.wait_for(process.stderr.readline(), DEADLINE)
        assert json.loads(line)["message"] == "level info, before none"
        process.send_signal(signal.SIGTERM)
        await process.communicate()
    assert process.returncode == 0


# --log_config.

CONFIG = {
    "version": 1,
    "formatters": {
        "mine": {"format": "mine %(levelname)s %(name)s %(message)s"},
        "json": {"()": "handlers.process.logs.JSONFormatter"},
    },
    "handlers": {
        "stderr": {"class": "logging.StreamHandler", "formatter": "mine"},
        "file": {
            "class": "logging.FileHandler", "filename": "log", "formatter": "json"
        },
    },
    "root": {"level": "INFO", "handlers": ["stderr", "file"]},
}


def written(path, level="INFO", **more):
    """The configuration as a file of that name, in JSON or YAML."""
    root = {**CONFIG["root"], "level": level}
    handlers = {**CONFIG["handlers"]}
    handlers["file"] = {**handlers["file"], "filename": str(path.parent / "log")}
    config = {**CONFIG, "root": root, "handlers": handlers, **more}
    as_json = path.suffix == ".json"
    path.write_text(json.dumps(config) if as_json else yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("name", ["log.json", "log.yaml", "log.conf"])
async def test_log_config_sets_formats(io_loop, tmp_path, name):
    """For every module's lines, in each handler's format."""
    path = written(tmp_path / name)
    async with Service(f"--log_config={path}", environment=AUTO) as service:
        async with websockets.connect(service.ws_url):
            pass
    assert all(line.startswith("mine INFO ") for line in service.log)
    name = "handlers.clients.connection"
    assert any(f" {name} connection " in line for line in service.log)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["message"] for line in lines] == [
        line.split(" ", 3)[3] for line in service.log
    ]
    assert [line["event"] for line in lines if "event" in line] == ["open", "close"]


async def test_log_config_is_read_again_on_sighup(io_loop, tmp_path):
    """With its level; an invalid file changes nothing."""
    path = written(tmp_path / "log.json", "WARNING")
    flags = (f"--log_config={path}", "--callbackport=0")
    file = tmp_path / "log"

    def messages():
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line)["message"] for line in lines]

    async with quiet_service(*flags) as process:
        written(path, "INFO")
        process.send_signal(signal.SIGHUP)
        await eventually(lambda: any("reloaded: " in m for m in messages()))
        assert messages()[0] == "level info, before warning"
        for broken in (
            {"formatters": []},
            {"handlers": {"file": {"class": "no.such.Class"}}},
            {"root": {"level": "LOUD", "handlers": ["file"]}},
            {"root": {"level": "DEBUG", "handlers": ["nobody"]}},
        ):
            before = len(messages())
            written(path, **broken)
            process.send_signal(signal.SIGHUP)
            await eventually(lambda before=before: len(messages()) == before + 2)
            wrong, again = messages()[before:]
            assert "the previous values stay: --log_config=" in wrong
            assert again == "reloaded: everything else"
        written(path, "ERROR")
        process.send_signal(signal.SIGHUP)
        await eventually(lambda: messages()[-1] == "level error, before info")


@contextlib.asynccontextmanager
async def quiet_service(*flags):
    """A relay that has started, as it notified systemd: its log may be empty."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/notify"
        with Systemd(address) as systemd:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "socketdock.py", "--bindport=0", *flags,
                cwd=PROJECT,
                env={**os.environ, "NOTIFY_SOCKET": address},
                stderr=asyncio.subprocess.DEVNULL,
            )
            await systemd.wait_for("READY=1")
            yield process
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), DEADLINE) == 0


async def test_level_option_overrides_that_of_log_config(io_loop, tmp_path):
    """Like --log-level of the existing SocketDock; at SIGHUP, too."""
    path = written(tmp_path / "log.json", "ERROR")
    flags = (f"--log_config={path}", "--log-level=debug")
    async with Service(*flags, environment=AUTO) as service:
        for number, more in enumerate(({}, {"formatters": []}), start=1):
            written(path, "ERROR", **more)
            service.process.send_signal(signal.SIGHUP)
            await eventually(lambda: "reloaded: " in service.log[-1])
            await send_raw(service.callback_url, LIVEZ, answers=1)
            await eventually(
                lambda n=number: sum("mine DEBUG" in line for line in service.log) == n
            )


WRONG = {
    "missing": (None, "No such file"),
    "bytes": (b"\xff{}", "UTF-8"),
    "json": (b'{"version": 1,}', "not JSON"),
    "yaml": (b"version: [1\n", "not YAML"),
    "ini": (b"[loggers]\nkeys=root\n", "not YAML"),
    "list": (b"- version: 1\n", "not a mapping of names to values"),
    "empty": (b"", "not a mapping of names to values"),
    "version": (b'{"version": 2}', "version"),
    "class": (b'{"version": 1, "handlers": {"a": {"class": "no.such"}}}', "'a'"),
    "shape": (b'{"version": 1, "handlers": [1]}', ""),
    "deep": (b'{"a":' * 100000, "not JSON"),
    "file": (
        b'{"version": 1, "handlers": {"a":'
        b' {"class": "logging.FileHandler", "filename": "/no/such/log"}}}',
        "/no/such/log",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_log_config_exits_with_an_error(name, tmp_path):
    """One line, which names the file."""
    text, why = WRONG[name]
    path = tmp_path / "log-config"
    if text is not None:
        path.write_bytes(text)
    status = 1 if "No such file" in why or "/no/such" in why else 2
    line = refusal(f"--log_config={path}", status=status, **AUTO)
    assert f"--log_config={path}" in line
    assert why in line


def test_yaml_without_pyyaml_exits_with_an_error(tmp_path):
    """The error recommends JSON, which needs no library."""
    (tmp_path / "yaml.py").write_text("raise ImportError\n")
    path = written(tmp_path / "log.yaml")
    line = refusal(f"--log_config={path}", PYTHONPATH=str(tmp_path), **AUTO)
    assert "PyYAML" in line and "JSON" in line


@pytest.mark.parametrize(
    "flag", ["--log_format=json", "--log_to_stderr=false", "--log_file_prefix=/tmp/x"]
)
def test_log_config_excludes_other_log_options(flag, tmp_path):
    """An error names the other option."""
    path = written(tmp_path / "log.json")
    line = refusal(f"--log_config={path}", flag, **AUTO)
    assert "--log_config" in line and flag.partition("=")[0] in line


def test_invalid_format_exits_with_an_error():
    """The error lists the valid formats."""
    assert "auto, text, json" in refusal("--log_format=xml")


# Floods.


async def test_flood_of_peers_faults_is_counted(io_loop):
    """Twenty lines, and one for the others; open and close lines are not counted."""
    async with Service(environment=AUTO) as service:
        for _ in range(30):
            async with websockets.connect(service.ws_url) as client:
                client.transport.write(frame(TEXT_FRAME, b"x", rsv=4))
                await client.wait_closed()
    assert len(records(service, event="fail")) == 20
    (counted,) = records(service, event="repeat")
    assert counted["count"] == 10
    assert counted["level"] == "info"
    assert re.fullmatch(
        r"10 more like this in \d+ s: connection %s: %s \(%d\)", counted["message"]
    )
    assert len(records(service, event="open")) == 30
    assert len(records(service, event="close", code=1002)) == 30


async def test_flood_of_a_warning_is_counted(io_loop):
    """In text and with --log_config: here a backend that refuses."""
    async with ScriptedBackend(lambda kind: NOT_FOUND) as backend:
        flags = ("--backend=http", f"--messageuri={backend.url('message')}?key=s3cr3t")
        async with Service(*flags) as service:
            async with websockets.connect(service.ws_url) as client:
                for _ in range(50):
                    await client.send("x")
                await backend.wait_for("message", 50)
    assert sum("was refused by the backend" in line for line in service.log) == 21
    (counted,) = [line for line in service.log if "more like this" in line]
    assert " 30 more like this in " in counted
    assert counted.endswith("was refused by the backend with %d: POST %s%s")
    refused = next(line for line in service.log if "was refused by" in line)
    url = backend.url("message")
    assert refused.endswith(f"with 404: POST {url}; check that this path exists")


async def test_flood_is_counted_with_log_config_too(io_loop, tmp_path):
    """Before and after SIGHUP, which replaces all handlers."""
    path = written(tmp_path / "log.json")
    async with ScriptedBackend(lambda kind: NOT_FOUND) as backend:
        flags = ("--backend=http", f"--messageuri={backend.url('message')}",
                 f"--log_config={path}")
        async with Service(*flags, environment=AUTO) as service:
            async with websockets.connect(service.ws_url) as client:
                for number in range(50):
                    if number == 10:
                        service.process.send_signal(signal.SIGHUP)
                        await eventually(lambda: "reloaded: " in service.log[-1])
                    await client.send("x")
                    await backend.wait_for("message", number + 1)
    for lines in (service.log, (tmp_path / "log").read_text().splitlines()):
        assert sum("30 more like this in" in line for line in lines) == 1
        assert sum("was refused by the backend" in line for line in lines) == 21


def flood(book, number=50, level=logging.WARNING, message="%s is bad", **fields):
    """How many of `number` records pass."""
    passed = 0
    for _ in range(number):
        record = logging.LogRecord("here", level, "", 0, message, ("x",), None)
        record.__dict__.update(fields)
        passed += book.filter(record)
        assert book.filter(record) == book.filter(record)  # two handlers may ask
    return passed


async def test_repeats_are_counted_anew_in_each_interval(io_loop, caplog):
    """A timer logs the sum; then lines are logged again."""
    book = LogLimit(lines=2, interval=0.05)
    book.begin()
    try:
        assert flood(book) == 2
        await eventually(lambda: "48 more like this" in caplog.text)
        assert caplog.records[-1].levelno == logging.WARNING
        assert caplog.records[-1].name == "here"
        assert flood(book) == 2
    finally:
        book.close()
    assert caplog.text.count("48 more like this") == 2


def test_lines_without_a_limit_are_all_logged(caplog):
    """A connection's lines, lines at info, other templates, and debug."""
    book = LogLimit(lines=2)
    for event in (None, "open", "close"):
        assert flood(book, level=logging.INFO, event=event) == 50
    assert flood(book, level=logging.ERROR, event="disconnect_failed") == 50
    assert flood(book) == 2
    assert flood(book, level=logging.ERROR) == 2
    assert flood(book, message="%s is worse") == 2
    with caplog.at_level("DEBUG", "here"):
        assert flood(book) == 50


def test_table_of_templates_is_bounded(monkeypatch, caplog):
    """Above the limit all templates count as one."""
    monkeypatch.setattr(log_limit, "MAX_TEMPLATES", 10)
    book = LogLimit(lines=2)
    passed = sum(flood(book, 1, message=f"{n} {'x' * 9999}") for n in range(100))
    assert passed == 12
    assert len(book._seen) == 11
    assert all(len(template) <= 200 for _, _, template in book._seen)
    book.close()
    assert "88 more like this" in caplog.text


# One record, one line.

NASTY = {
    "newlines": "a\nb\r\nc\x85d\u2028e",
    "controls": "".join(map(chr, range(32))) + "\x7f\x9b2J",
    "surrogates": "half \ud800 and \udcff",
    "long": "x" * 10**6,
    "long-and-escaped": "\x01" * 10**5,
    "long-and-wide": "\U0001f600" * 10**5,
}


def record_of(text, /, **fields):
    try:
        raise ValueError(text)
    except ValueError:
        exc_info = sys.exc_info()
    record = logging.LogRecord("here", 30, "", 0, "of %s", (text,), exc_info)
    record.__dict__.update(fields)
    return record


@pytest.mark.parametrize("name", NASTY)
def test_json_line_is_one_line_of_bounded_length(name):
    """With text, traceback and fields of any kind."""
    text = NASTY[name]
    fields = {"text": text, "list": [text], "number": 10**30, "object": object()}
    line = JSONFormatter().format(record_of(text, **fields))
    assert len(line.encode()) <= MAX_LINE
    assert not set(line) & {chr(n) for n in range(32)}
    record = json.loads(line)
    assert record["message"].startswith("of ")
    assert record["exception"].startswith("Traceback")
    assert record["exception"].splitlines()[-1] or name == "newlines"
    assert {"text", "list", "number", "object"} <= set(record)


@pytest.mark.parametrize("name", NASTY)
def test_text_line_has_no_terminal_controls(name):
    """A traceback's lines are indented, so that none looks like a log line."""
    text = TextFormatter(color=False).format(record_of(NASTY[name]))
    first, *others = text.split("\n")
    assert TEXT.match(first)
    assert others and all(line.startswith("    ") for line in others)
    assert all(line.isprintable() for line in text.split("\n"))
    assert len(text) < 4 * MAX_LINE


def test_log_line_with_wrong_arguments_is_still_logged():
    """A bug in a logging call does not lose the line."""
    record = logging.LogRecord("here", 30, "", 0, "of %d %s", ("x",), None)
    for formatter in (JSONFormatter(), TextFormatter(color=False)):
        assert "of %d %s (can't be formatted)" in formatter.format(record)


@pytest.mark.gen_test
async def test_text_has_dates_of_iso_8601(io_loop):
    """With milliseconds and the offset of local time."""
    async with Service(environment={"TZ": "Asia/Kolkata"}) as service:
        pass
    stamp = r"\[I (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+05:30) [\w.]+\] "
    for line in service.log:
        assert re.match(stamp, line), line
