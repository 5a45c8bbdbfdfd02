"""The service as a process: its options from every source, its start and its stop."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import websockets
from programs import leave_out
from project import copy_project, installation, library
from service import (
    AS_NOBODY,
    DEADLINE,
    PROJECT,
    SOCKETDOCK,
    RecordingBackend,
    Service,
    ended,
    eventually,
    refusal,
    withhold,
)
from tornado.httpclient import AsyncHTTPClient

HTTP = ("--backend=http", "--messageuri=http://127.0.0.1:1/message")


@pytest.fixture(autouse=True)
def no_options_of_whoever_runs_the_tests(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SOCKETDOCK_")]:
        monkeypatch.delenv(name)


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return f"--config={path}"


# Sources of options.


async def largest_message(service: Service) -> int:
    """The service's effective `--max_message_size`, from 1 to 5 bytes."""
    for size in range(1, 6):
        async with websockets.connect(service.ws_url, compression=None) as client:
            await client.send("x" * size)
            try:
                await asyncio.wait_for(client.recv(), DEADLINE)
            except websockets.ConnectionClosed:
                assert client.close_code == 1009
                return size - 1
    return size


@pytest.mark.parametrize(
    ("file", "environment", "flag", "expected"),
    [
        (None, None, None, 5),  # or more
        (1, None, None, 1),
        (1, 2, None, 2),
        (1, 2, 3, 3),
        (2, None, 1, 1),
        (None, 3, 2, 2),
    ],
)
@pytest.mark.gen_test
async def test_flag_overrides_environment_overrides_file_overrides_default(
    io_loop, tmp_path, file, environment, flag, expected
):
    """Measured from outside, by the largest message that is accepted."""
    flags = [written(tmp_path / "conf", f"max_message_size = {file}")] if file else []
    flags += [f"--max_message_size={flag}"] if flag else []
    given = {"SOCKETDOCK_MAX_MESSAGE_SIZE": str(environment)} if environment else {}
    async with Service(*flags, environment=given) as service:
        assert await largest_message(service) == expected


@pytest.mark.parametrize(
    "flags",
    [
        ("--max_message_size=3",),
        ("--max_message_size", "3"),
        ("--max-message-size=3",),
        ("--max-message-size", "3"),
        ("--max_message_size=1", "--max-message-size", "2", "--max_message_size=3"),
        ("--max_message_size=1", "--compression", "--max_message_size", "3"),
    ],
)
@pytest.mark.gen_test
async def test_flags_have_equals_or_space_and_the_last_one_counts(io_loop, flags):
    """`--name=value` and `--name value`; dashes and underscores are equal."""
    async with Service(*flags) as service:
        assert await largest_message(service) == 3


@pytest.mark.parametrize(
    "lines",
    [
        "max_message_size = 3",
        "max-message-size=3",
        "# a comment\nbackend='http'\n\nbackend = 'loopback'  # wins\n"
        "max_message_size = 3",
    ],
)
@pytest.mark.gen_test
async def test_file_may_be_named_in_the_environment(io_loop, tmp_path, lines):
    """Its names may have dashes; the last of repeated lines counts."""
    written(tmp_path / "conf", lines)
    environment = {"SOCKETDOCK_CONFIG": str(tmp_path / "conf")}
    async with Service(environment=environment) as service:
        assert await largest_message(service) == 3


@pytest.mark.gen_test
async def test_lists_are_set_by_flag_and_file(io_loop, tmp_path):
    """Separated by commas on the command line, a list in the file."""
    conf = written(tmp_path / "conf", "subprotocols = ['b', 'c']")
    for flags in ([conf], ["--subprotocols=b,c"]):
        async with Service(*flags, *HTTP) as service:
            async with websockets.connect(
                service.ws_url, subprotocols=["a", "c", "b"]
            ) as client:
                assert client.subprotocol == "c"


@pytest.mark.parametrize("separator", ["-", "_"])
@pytest.mark.parametrize("source", ["flags", "environment", "file"])
@pytest.mark.gen_test
async def test_spellings_of_the_existing_socketdock(
    io_loop, tmp_path, source, separator
):
    """With dashes or underscores, in flags, environment and file."""
    async with RecordingBackend() as backend:
        given = {
            "message-uri": backend.url("message"),
            "disconnect-uri": backend.url("disconnect"),
            "connect-uri": backend.url("connect"),
            "endpoint": "http://relay.example:8765",
            "log-level": "DEBUG",
        }
        given = {name.replace("-", separator): value for name, value in given.items()}
        flags, environment = ["--backend=http"], {}
        if source == "flags":
            flags += [f"--{name}={value}" for name, value in given.items()]
        elif source == "environment":
            environment = {
                f"SOCKETDOCK_{name.upper()}": value for name, value in given.items()
            }
        else:
            lines = [f"{name} = {value!r}\n" for name, value in given.items()]
            flags += [written(tmp_path / "conf", "".join(lines))]
        async with Service(*flags, environment=environment) as service:
            await exchange(service.ws_url, backend, "http://relay.example:8765")
            await AsyncHTTPClient().fetch(f"{service.callback_url}/livez")
            await eventually(lambda: any("GET /livez" in line for line in service.log))
            assert not [line for line in service.log if "unknown variable" in line]


@pytest.mark.gen_test
async def test_command_line_of_an_existing_deployment_works(io_loop):
    """Unchanged, except for the port."""
    async with RecordingBackend() as backend:
        flags = ["--bindip", "0.0.0.0", "--bindport", "0", "--backend", "http"]
        for kind in ("message", "disconnect", "connect"):
            flags += [f"--{kind}-uri", backend.url(kind)]
        flags += ["--endpoint", "http://relay.example:8765", "--log-level", "INFO"]
        async with Service(*flags) as service:
            url = service.ws_url.replace("0.0.0.0", "127.0.0.1")
            await exchange(url, backend, "http://relay.example:8765")


async def exchange(url: str, backend: RecordingBackend, callbacks: str) -> None:
    """Each of the three URIs gets its event."""
    async with websockets.connect(url) as client:
        await client.send("hello")
        (event,) = await backend.wait_for("message", 1)
    assert event["message"] == "hello"
    assert event["meta"]["send"].startswith(f"{callbacks}/socket/")
    await backend.wait_for("disconnect", 1)
    assert [kind for kind, *_ in backend.events] == [
        "connect",
        "message",
        "disconnect",
    ]


@pytest.mark.gen_test
async def test_unknown_variable_is_one_warning(io_loop):
    """It names the nearest variable, and the relay starts."""
    environment = {"SOCKETDOCK_BINDPROT": "1", "SOCKETDOCK_PORT": "9000"}
    async with Service(environment=environment) as service:
        assert await largest_message(service) == 5
    (line,) = [line for line in service.log if "BINDPROT" in line]
    assert line.startswith("[W")
    assert line.endswith(
        "Ignoring unknown variable SOCKETDOCK_BINDPROT; did you mean"
        " SOCKETDOCK_BINDPORT?"
    )
    assert len([line for line in service.log if "SOCKETDOCK_PORT" in line]) == 1


def injected(
    service: str, host: str, ports: dict[str, int], protocol: str = "tcp"
) -> dict[str, str]:
    """The variables that Kubernetes injects for a service with ports of these names."""
    name = service.upper().replace("-", "_")
    address = f"[{host}]" if ":" in host else host
    first = next(iter(ports.values()))
    environment = {
        f"{name}_SERVICE_HOST": host,
        f"{name}_SERVICE_PORT": str(first),
        f"{name}_PORT": f"{protocol}://{address}:{first}",
    }
    for port_name, port in ports.items():
        if port_name:
            suffix = port_name.upper().replace("-", "_")
            environment[f"{name}_SERVICE_PORT_{suffix}"] = str(port)
        link = f"{name}_PORT_{port}_{protocol.upper()}"
        environment |= {
            link: f"{protocol}://{address}:{port}",
            f"{link}_PROTO": protocol,
            f"{link}_PORT": str(port),
            f"{link}_ADDR": host,
        }
    return environment


@pytest.mark.gen_test
async def test_variables_injected_by_kubernetes_are_ignored(io_loop):
    """Of services whose names begin with socketdock; no value is shown."""
    environment = {}
    for service in (
        "socketdock", "socketdock-metrics", "socketdock-reuse", "socketdock-bindip",
        "socketdock-message", "socketdock-backend", "socketdock-max-pending",
        "socketdock-service", "socketdock-port",
    ):
        environment |= injected(
            service, "fd00::1", {"http": 8765, "callbacks-2": 8766}
        )
    environment |= injected("socketdock-udp", "10.0.0.1", {"": 53}, "udp")
    environment |= injected("socketdock-sctp", "10.0.0.1", {"": 53}, "sctp")
    assert "SOCKETDOCK_REUSE_PORT" in environment  # there is an option of that name
    async with Service(environment=environment) as service:
        assert await largest_message(service) == 5
    assert not [line for line in service.log if any(v in line for v in environment)]


@pytest.mark.gen_test
async def test_empty_variable_counts_as_not_set(io_loop, tmp_path):
    """For each option: the file or the default applies."""
    names = re.findall(r"^  --(\w+)", ended("--help-all").stdout, flags=re.MULTILINE)
    assert {"bindip", "max_message_size", "backend_connection_age"} < set(names)
    environment = {
        f"SOCKETDOCK_{name.upper()}": " " if name == "bindip" else ""
        for name in names
        if name != "log_format"  # the tests' own
    }
    conf = written(tmp_path / "conf", "max_message_size = 3\nbindip = '127.0.0.2'\n")
    async with Service(conf, environment=environment) as service:
        assert service.ws_url.startswith("ws://127.0.0.2:")
        assert await largest_message(service) == 3
    assert not [line for line in service.log if "unknown variable" in line]


@pytest.mark.parametrize(
    "address",
    ["[::1]", "127.0.0.1:8765", "127.0.0.1,127.0.0.2", "http://x", "fe80::x", "a b"],
)
@pytest.mark.parametrize("name", ["bindip", "callbackip"])
def test_invalid_bind_address_exits_with_2(name, address):
    """Not 1, since a retry cannot succeed."""
    line = refusal("--callbackport=0", f"--{name}={address}")
    assert f"--{name} must be an address, such as 127.0.0.1" in line


@pytest.mark.parametrize("source", ["flag", "file"])
def test_empty_bind_address_is_rejected(tmp_path, source):
    """To listen at every address, use a wildcard address."""
    flag = {"flag": "--bindip=", "file": written(tmp_path / "conf", "bindip = ''")}
    assert "bindip must be an address, such as 127.0.0.1" in refusal(flag[source])


@pytest.mark.parametrize(
    "given", ["fd00:10::5:8766", "http://fd00:10::5:8766", "[fd00:10::5]:8766"]
)
@pytest.mark.gen_test
async def test_external_ipv6_address_gets_brackets(io_loop, given):
    """`$(POD_IP):8766` works for both families."""
    async with RecordingBackend() as backend:
        environment = {"SOCKETDOCK_EXTERNALHOSTANDPORT": given}
        async with Service(*backend.flags(), environment=environment) as service:
            await exchange(service.ws_url, backend, "http://[fd00:10::5]:8766")


@pytest.mark.gen_test
async def test_external_address_of_an_international_name_is_encoded(io_loop):
    """As in the URLs of backends."""
    flag = "--externalhostandport=B\u00dcCHER.example:8766"
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), flag) as service:
            url = "http://xn--bcher-kva.example:8766"
            await exchange(service.ws_url, backend, url)


@pytest.mark.parametrize("name", ["stra\u00dfe.example:80", "http://\u00fc..x/sd"])
def test_external_address_with_an_ambiguous_encoding_is_rejected(name):
    """The error says what to write instead."""
    line = refusal(*HTTP, f"--externalhostandport={name}")
    assert "--externalhostandport" in line
    assert "with xn--" in line


@pytest.mark.parametrize(
    "given",
    [
        "host:0", "host:", ":8766", "host:65536", "http://h/?", "http://h/#", "h\\x:1",
        "fd00::5", "fd00::1:abcd", "1:2:3:4:5:6:7:8", "fd00::1:0", "fe80::1%eth0:80",
        "[fd00::1", "[fd00::zz]:80", "0.0.0.0:8766", "[::]:8766", "0:8766", "a b:80",
        "tcp://10.0.0.1:8766", "user@host:80",
    ],
)
def test_invalid_external_address_is_rejected(given):
    """One line, which shows no password."""
    line = refusal(*HTTP, f"--externalhostandport={given}")
    assert "--externalhostandport" in line
    assert given in line or "@" in given


@pytest.mark.parametrize(
    "address",
    ["0", "0.0.0.0", "0x0", "00.0", "::", "::0", "0:0:0:0:0:0:0:0", "::ffff:0.0.0.0"],
)
@pytest.mark.parametrize("name", ["bindip", "callbackip"])
def test_wildcard_address_is_recognized_in_every_spelling(name, address):
    """A URL with it would be useless for a backend."""
    also = ["--callbackport=0"] if name == "callbackip" else []
    line = refusal(*HTTP, *also, f"--{name}={address}")
    assert "needs --externalhostandport" in line


@pytest.mark.parametrize(
    ("bindip", "callbackip"),
    [("127.0.0.1", None), ("0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0"),
     ("localhost", "::ffff:127.0.0.1")],
)
def test_one_port_for_both_listeners_exits_with_2(bindip, callbackip):
    """Although the kernel reports that it is in use, which would be 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    flags = [f"--bindip={bindip}", f"--bindport={port}", f"--callbackport={port}"]
    flags += [f"--callbackip={callbackip}"] if callbackip else []
    assert "--callbackport is --bindport" in refusal(*flags)


@pytest.mark.parametrize("backend", ["redis", "backends.redis.worker", "apigateway"])
def test_option_of_the_http_backend_is_a_warning_with_others(backend):
    """The heartbeat is one of that backend; a worker belongs to that of Redis."""
    name = backend.removeprefix("backends.").removesuffix(".worker")
    check = ended(
        "check", f"--backend={backend}", "--bindport=0",
        "--instanceuri=http://127.0.0.1:9/instance",
    )
    unused = f"warning: --backend={name} does not use --instanceuri; did you mean"
    assert f"{unused} --backend=http?" in check.stdout.splitlines()


@pytest.mark.gen_test
async def test_options_of_another_backend_are_a_warning(io_loop):
    """In the log and by `check`: an echo was probably not intended."""
    flags = (
        "--messageuri=http://127.0.0.1:1/", "--webhook_secret_file=x",
        "--breaker_window=5", "--state_dir=x",
    )
    said = (
        "--backend=loopback does not use --messageuri, --webhook_secret_file,"
        " --breaker_window, --state_dir; did you mean --backend=http?"
    )
    environment = {"SOCKETDOCK_ORDER_WAIT": "1"}  # the default changes nothing
    async with Service(*flags, environment=environment) as service:
        pass
    assert [line for line in service.log if line.endswith(said)]
    checked = ended("check", "--bindport=0", *flags)
    assert f"warning: {said}" in checked.stdout


# Errors at the start.


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--bindprot=1", ("--bindprot", "--bindport")),
        ("--message-url=http://x", ("--message-url", "--message-uri")),
        ("--no_such_thing_at_all", ("--no_such_thing_at_all",)),
        ("--log-file=x", ("--log-file", "--log_file_prefix")),
        ("-v", ("-v",)),
        ("http", ("http",)),
    ],
)
def test_unknown_flag_names_the_nearest(flag, named):
    """One line with both, exit status 2."""
    line = refusal(flag)
    assert all(name in line for name in named)


def test_unknown_option_in_the_file_names_the_nearest(tmp_path):
    """With the file and the line."""
    conf = written(tmp_path / "conf", "bindip = '127.0.0.1'\nbindprot = 1\n")
    line = refusal(conf)
    assert "bindprot" in line
    assert "bindport" in line
    assert f"{tmp_path / 'conf'}, line 2" in line


@pytest.mark.parametrize(
    ("flag", "must"),
    [
        ("--bindport=eighty", "a whole number"),
        ("--bindport=80.5", "a whole number"),
        ("--bindport=", "a whole number"),
        ("--bindport=65536", "a port"),
        ("--callbackport=-1", "a port"),
        ("--drain_timeout=soon", "a number"),
        ("--drain_timeout=-1", "seconds"),
        ("--drain_timeout=nan", "seconds"),
        ("--drain_timeout=inf", "finite"),
        ("--drain_timeout=1e400", "finite"),
        ("--delivery_timeout=Infinity", "finite"),
        ("--delivery_timeout=\uff11\uff12", "a number"),
        ("--max_pending=\u0663", "a whole number"),
        ("--max_pending=1e3", "a whole number"),
        ("--max_pending=0x10", "a whole number"),
        (f"--max_pending={2**48 + 1}", "at most"),
        ("--messages_per_second=inf", "0.01"),
        ("--breaker_share=nan", "above 0"),
        ("--header_timeout=1e-300", "more than 0"),
        ("--max_message_size=0", "at least 1"),
        ("--max_header_size=10", "at least 1024"),
        ("--header_timeout=0", "more than 0"),
        ("--body_timeout=0", "more than 0"),
        ("--send_timeout=0", "more than 0"),
        ("--handshake_timeout=0", "more than 0"),
        ("--backend_connect_timeout=0", "more than 0"),
        ("--backend_dead_after=0", "more than 0"),
        ("--breaker_first_probe=0", "more than 0"),
        ("--breaker_window=0", "more than 0"),
        ("--breaker_share=0", "above 0"),
        ("--log_file_max_size=-1", "at least 0"),
        ("--log_file_num_backups=-1", "at least 0"),
        ("--log_rotate_interval=0", "at least 1"),
        ("--compression=perhaps", "true or false"),
        ("--compression_level=10", "1 to 9"),
        ("--log-level=loud", "info"),
    ],
)
def test_invalid_value_names_the_option_and_valid_values(flag, must):
    """With the option's name as it was spelt."""
    line = refusal(flag)
    name, _, value = flag.partition("=")
    assert name in line
    assert must in line
    assert repr(value) in line or value in line


def test_long_invalid_value_is_shortened():
    """The error stays a readable line."""
    line = refusal(f"--max_pending={'9' * 5000}")
    assert "--max_pending must be a whole number, not '999" in line
    assert len(line) < 200


def test_option_without_its_value_is_rejected():
    """An option without a value as the last argument."""
    assert "--bindip needs a value" in refusal("--bindip")


def test_invalid_value_in_the_environment_names_the_variable():
    """The error names the variable, not the flag, which was not used."""
    line = refusal(SOCKETDOCK_MAX_MESSAGE_SIZE="large")
    assert "SOCKETDOCK_MAX_MESSAGE_SIZE must be a whole number" in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bindip = 127", "bindip must be text"),
        ("drain_timeout = None", "drain_timeout must be a number"),
        ("bindport = True", "bindport must be a whole number"),
        ("compression = 1", "compression must be True or False"),
        ("subprotocols = [1]", "subprotocols must be text"),
        ("bindip = localhost", "bindip is not a plain value"),
        ("bindip = {[]: 1}", "bindip is not a plain value"),
        ("import os", "line 1: not name = value"),
        ("bindip 127.0.0.1", "line 1: not name = value"),
    ],
)
def test_invalid_line_of_the_file_is_rejected(tmp_path, text, said):
    """The error names file and line; the file is not executed."""
    line = refusal(written(tmp_path / "conf", text))
    assert said in line
    assert f"{tmp_path / 'conf'}, line 1" in line


def test_unreadable_options_file_is_rejected(tmp_path):
    """Missing, a folder, a pipe: status 1; not UTF-8: status 2."""
    (tmp_path / "latin").write_bytes(b"bindip = '\xe9'")
    os.mkfifo(tmp_path / "pipe")
    for name, status in (("missing", 1), ("", 1), ("pipe", 1), ("latin", 2)):
        path = tmp_path / name
        line = refusal(f"--config={path}", status=status)
        assert f"can't read {path}: " in line


def test_options_file_of_another_user_is_not_ignored(tmp_path):
    """The one that is read without --config."""
    if os.getuid():
        leave_out("another user to be takes root")
    tree = copy_project(tmp_path / "tree")
    (tree / "conf").chmod(0o700)
    line = refusal(cwd=tree, command=AS_NOBODY, status=1)
    path = tree / "conf" / "socketdock.conf"
    assert line == f"socketdock: can't read {path}: Permission denied"


def test_port_in_use_is_status_1():
    """If any process listens there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(f"--bindport={port}", status=1)
        assert f"can't listen at port {port} of 127.0.0.1: " in line
        line = refusal(f"--callbackport={port}", status=1)
        assert f"can't listen at port {port} of 127.0.0.1: " in line


@pytest.mark.parametrize(
    ("address", "status"), [("192.0.2.1", 1), ("not-an-ip.invalid", 1), ("no..host", 2)]
)
def test_address_of_another_machine_is_rejected(address, status):
    """Status 1, since that may change; 2 if it cannot be an address."""
    assert f"of {address}: " in refusal(f"--bindip={address}", status=status)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--backend=http"], "--messageuri"),
        ([*HTTP, "--messageuri=ftp://127.0.0.1/"], "--messageuri=ftp://127.0.0.1/"),
        ([*HTTP, "--messageuri=127.0.0.1:8000"], "--messageuri=127.0.0.1:8000"),
        ([*HTTP, "--messageuri=http://"], "--messageuri=http://"),
        ([*HTTP, "--messageuri=http://[::1"], "--messageuri=http://[::1"),
        ([*HTTP, "--messageuri=http://x:99999/"], "--messageuri=http://x:99999/"),
        ([*HTTP, "--connecturi=x"], "--connecturi=x"),
        ([*HTTP, "--disconnecturi=//x/"], "--disconnecturi=//x/"),
        ([*HTTP, "--endpoint=ws://x"], "--externalhostandport=ws://x"),
        ([*HTTP, "--bindip=0.0.0.0"], "--externalhostandport"),
        ([*HTTP, "--bindip=::"], "--externalhostandport"),
        ([*HTTP, "--callbackport=0", "--callbackip=0.0.0.0"], "--externalhostandport"),
        ([*HTTP, "--order_wait=inf"], "--backend_timeout"),
        ([*HTTP, "--breaker_first_probe=6"], "--breaker_last_probe"),
        (["--max_queued_bytes=1000"], "--max_message_size"),
        (["--max_message_size=300000000"], "--max_queued_bytes"),
        (["--subprotocols=a b"], "--subprotocols"),
        (["--callbackip=127.0.0.1"], "--callbackport"),
        ([*HTTP, "--reuse_port"], "--reuse_port needs --callbackport"),
        (["--allowed_origins=app.example.com"], "--allowed_origins"),
        (["--log_file_prefix=x", "--log_rotate_mode=never"], "log_rotate_mode"),
    ],
)
def test_contradicting_options_name_the_option(flags, said):
    """One line, exit status 2."""
    assert said in refusal(*flags)


def test_unusable_log_file_is_status_1():
    """Its folder may be created later."""
    path = "/no/such/folder/log"
    assert path in refusal(f"--log_file_prefix={path}", status=1)


def test_log_fifo_without_a_reader_is_rejected(tmp_path):
    """Opening a FIFO would block until another process reads it."""
    path = tmp_path / "log"
    os.mkfifo(path)
    assert str(path) in refusal(f"--log_file_prefix={path}", status=1)


def test_log_config_fifo_without_a_reader_is_rejected(tmp_path):
    """Under any name of the handler's argument."""
    path, config = tmp_path / "log", tmp_path / "log.json"
    os.mkfifo(path)
    file = {"class": "logging.FileHandler", "filename": str(path)}
    config.write_text(json.dumps(
        {"version": 1, "handlers": {"file": file}, "root": {"handlers": ["file"]}}
    ))
    error = refusal(f"--log_config={config}", status=1)
    assert str(path) in error and "no process reads this FIFO" in error


# --help.


HEADINGS = [
    "Service",
    "Delivery to the backend",
    "Client connections and limits",
    "Listeners and TLS",
    "Callbacks, operators and console",
    "Metrics, tracing and probes",
    "Log",
    "Help",
]


def test_help_all_lists_every_option_by_purpose():
    """Each option of a module once, under a heading; and Tornado's."""
    help_text = ended("--help-all")
    assert help_text.returncode == 0
    assert help_text.stderr == ""
    groups: dict[str, list[str]] = {}
    for line in help_text.stdout.partition("--config names")[2].splitlines():
        if heading := re.fullmatch(r"([A-Z].*):", line):
            group = groups.setdefault(heading[1], [])
        elif option := re.match(r"  --(\w+)", line):
            group.append(option[1])
    assert list(groups) == HEADINGS
    defined: list[str] = []
    for file in (
        PROJECT / "socketdock.py",
        *(PROJECT / "backends").rglob("*.py"),
        *(PROJECT / "handlers").rglob("*.py"),
    ):
        defined += re.findall(r'^define\("(\w+)"', file.read_text(), flags=re.M)
    listed = [name for names in groups.values() for name in names]
    assert sorted(n for n in listed if n in defined) == sorted(defined)
    of_tornado = [name for name in listed if name not in defined]
    assert all(n == "help" or n.startswith("log") for n in of_tornado)
    for heading, name in (
        ("Service", "drain_timeout"),
        ("Delivery to the backend", "messageuri"),
        ("Client connections and limits", "ping_interval"),
        ("Listeners and TLS", "tls_cert"),
        ("Callbacks, operators and console", "callback_token"),
        ("Metrics, tracing and probes", "metrics"),
        ("Log", "log_format"),
    ):
        assert name in groups[heading], name
    assert not re.search(r"=(BYTES|COUNT)0", help_text.stdout)


def test_help_shows_what_most_relays_need():
    """Two examples, existing options, and where the others are."""
    everyday, complete = ended("--help"), ended("--help-all")
    assert everyday.returncode == 0
    shown = re.findall(r"^  --(\w+)", everyday.stdout, flags=re.MULTILINE)
    assert set(shown) < set(re.findall(r"^  --(\w+)", complete.stdout, re.MULTILINE))
    assert {"backend", "messageuri", "bindport"} < set(shown)
    assert everyday.stdout.count("\n    socketdock ") == 2
    assert "--help-all" in everyday.stdout
    assert len(everyday.stdout.splitlines()) < 80


@pytest.mark.parametrize("words", [["--help"], ["--help-all"], ["--version"],
                                   ["check", "--bindport=0"]])
def test_closed_or_full_output_gives_no_traceback(words):
    """`| head` and a full disk: no traceback."""
    command = [*SOCKETDOCK, *words]
    piped = subprocess.run(
        ["sh", "-c", '"$@" | true', "sh", *command],
        cwd=PROJECT, capture_output=True, text=True, timeout=DEADLINE, check=False,
    )
    assert piped.stderr == ""
    with open("/dev/full", "w") as full:
        printed = subprocess.run(
            command, cwd=PROJECT, stdout=full, stderr=subprocess.PIPE, text=True,
            timeout=DEADLINE, check=False,
        )
    assert printed.returncode == 1
    for line in printed.stderr.splitlines():
        assert line.startswith("socketdock: ") and "No space left on device" in line


# Start and stop.


@pytest.mark.gen_test
async def test_start_is_one_line_with_addresses_and_backend(io_loop):
    """The first line of the log."""
    async with Service("--callbackport=0", *HTTP) as service:
        assert await accepts(service.ws_url)
    line = service.log[0]
    assert service.ws_url in line
    assert service.callback_url in line
    assert line.endswith("backend http")
    assert service.ws_url.removesuffix("/ws")[5:] != service.callback_url[7:]


async def accepts(url: str) -> bool:
    async with websockets.connect(url):
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.gen_test
async def test_signal_closes_clients_with_1001_and_exits_0(io_loop, number):
    """Well before `--drain_timeout`."""
    async with Service() as service:
        client = await websockets.connect(service.ws_url)
        service.process.send_signal(number)
        await asyncio.wait_for(client.wait_closed(), DEADLINE)
        assert client.close_code == 1001
        assert await asyncio.wait_for(service.process.wait(), DEADLINE) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.gen_test
async def test_second_signal_exits_at_once(io_loop, number):
    """Although the drain waits for the response to a disconnect event."""
    async with RecordingBackend() as backend:
        answered = withhold(backend, "disconnect")
        async with Service(*backend.flags("message", "disconnect")) as service:
            async with websockets.connect(service.ws_url):
                service.process.send_signal(signal.SIGTERM)
                await backend.wait_for("disconnect", 1)
            assert service.process.returncode is None
            service.process.send_signal(number)
            assert await asyncio.wait_for(service.process.wait(), DEADLINE) != 0
        answered.set()
        await eventually(lambda: "second signal" in service.log[-1])


# The console script.


@pytest.fixture
def script(tmp_path_factory):
    """The installed `socketdock`, and what it needs to find itself."""
    prefix = installation(tmp_path_factory.getbasetemp())
    return str(prefix / "bin" / "socketdock"), {"PYTHONPATH": library(prefix)}


@pytest.mark.parametrize(
    "flags",
    [
        ("--help",),
        ("--version",),
        ("--bindprot=1",),
        ("--backend=http", "--bindport=0"),
        ("--backend=nothing",),
        ("--config=/no/such/file",),
    ],
)
def test_console_script_prints_the_same(script, flags):
    """Byte for byte, with the same exit status; it is installed in pure form."""
    command, environment = script
    installed = ended(*flags, command=(command,), **environment)
    module = ended(*flags)
    module.stdout = module.stdout.replace("(compiled)", "(pure)")
    assert installed.returncode == module.returncode
    assert installed.stderr == module.stderr
    assert installed.stdout == module.stdout


@pytest.mark.gen_test
async def test_console_script_serves_and_stops(io_loop, script, tmp_path):
    """From any folder."""
    command, environment = script
    async with Service(
        "--max_message_size=3", command=[command], environment=environment, cwd=tmp_path
    ) as service:
        assert await largest_message(service) == 3
        service.process.terminate()
        assert await asyncio.wait_for(service.process.wait(), DEADLINE) == 0
