"""The document of the callbacks, compared with the relay by schemathesis."""

import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import jsonschema_rs
import pytest
import websockets
from functions import RecordingFunction
from reply_backends import ReplyBackend
from service import DEADLINE, RecordingBackend, Service

from backends.commands import CommandError, parse_commands
from handlers.callbacks.openapi import openapi_document
from socketdock import __version__

pytestmark = pytest.mark.gen_test(timeout=300)

TOKEN = "0123456789abcdef"
RUN_DEADLINE = 240.0  # seconds; it takes 6, and 60 on a busy machine
EACH = 6  # connections for each operation, of which some are closed by it
METHODS = ("get", "post", "delete", "head")

# To a valid request: 410 where the one before has closed the connection, 422 where it
# had the same key and another body, 400 to
# what no schema can express, such as a body that is not UTF-8 where `type` is text.
SETTINGS = """\
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 401, 403, 410, 422, 429, 504]
"""
# With AWS's callbacks nearly everything can be the id of a connection.
UNKNOWN_IS_GONE = """\
[checks.negative_data_rejection]
expected-statuses = [400, 405, 410]
"""


async def document(backend, service, *, headers=None):
    """What is served at /openapi.json."""
    answer = await backend.call(
        f"{service.callback_url}/openapi.json", "GET", headers=headers or {}
    )
    assert answer.code == 200
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    return json.loads(answer.body)


async def drop_frames(client):
    """Read all frames, so that the relay does not close a slow client."""
    with suppress(websockets.ConnectionClosed):
        async for _ in client:
            pass


@pytest.mark.long
async def test_relay_does_what_its_document_says(io_loop, tmp_path):
    """schemathesis finds no difference, with valid and invalid requests."""
    async with AsyncExitStack() as stack:
        backend = await stack.enter_async_context(RecordingBackend())
        flags = (*backend.flags("message"), f"--callback_token={TOKEN}")
        service = await stack.enter_async_context(Service(*flags))
        spoken = await document(backend, service)
        paths = spoken["paths"]
        operations = [
            operation
            for path, item in paths.items()
            for method, operation in item.items()
            if method in METHODS and path.startswith("/socket/")
        ]
        assert len(operations) == 5
        clients = {}
        for operation in operations:
            for _ in range(EACH):
                client = await stack.enter_async_context(
                    websockets.connect(service.ws_url)
                )
                await client.send(operation["operationId"])
                clients.setdefault(operation["operationId"], []).append(client)
        ids = {}
        for event in await backend.wait_for("message", EACH * len(operations)):
            ids.setdefault(event["message"], []).append(event["meta"]["connection_id"])
        for operation in operations:
            own = ids[operation["operationId"]]
            operation.setdefault("parameters", []).append(
                {
                    "name": "connection_id",
                    "in": "path",
                    "required": True,
                    "schema": {"type": "string", "enum": own},
                    "example": own[0],
                }
            )
        (tmp_path / "openapi.json").write_text(json.dumps(spoken))
        (tmp_path / "schemathesis.toml").write_text(SETTINGS)
        readers = [
            asyncio.create_task(drop_frames(client))
            for of_operation in clients.values()
            for client in of_operation
        ]
        said = await schemathesis(
            "openapi.json",
            f"--url={service.callback_url}",
            f"--header=Authorization: Bearer {TOKEN}",
            "--phases=examples,coverage,fuzzing",
            "--max-examples=20",
            "--seed=1",
            cwd=tmp_path,
        )
        total = sum(method in path for path in paths.values() for method in METHODS)
        assert total >= 13
        assert f"{total} selected / {total} total" in said
        assert f"Tested: {total}" in said
        closed = {
            name: [c.close_code for c in of_operation if c.close_code is not None]
            for name, of_operation in clients.items()
        }
        assert not closed["send"] and not closed["getConnection"]
        assert set(closed["deleteConnection"]) == {1000}
        assert closed["disconnect"]
    await asyncio.wait_for(asyncio.gather(*readers), DEADLINE)


async def schemathesis(*words, cwd):
    """Run it; it must find nothing. Returns what it printed."""
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("schemathesis"),
        "run",
        *words,
        "--no-color",
        cwd=cwd,
        env={**os.environ, "NO_PROXY": "*"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said, _ = await asyncio.wait_for(process.communicate(), RUN_DEADLINE)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, said.decode()
    return said.decode()


async def test_document_is_for_everybody_and_has_the_relays_version(io_loop):
    """It contains no secret, and needs no token."""
    flags = (f"--callback_token={TOKEN}", "--callbackport=0")
    async with RecordingBackend() as backend, Service(*flags) as service:
        spoken = await document(backend, service)
        wrong = {"Authorization": "Bearer fedcba9876543210"}
        assert await document(backend, service, headers=wrong) == spoken
        assert spoken["openapi"].startswith("3.1.")
        assert spoken["info"]["version"] == __version__
        url = service.ws_url.replace("ws:", "http:").replace("/ws", "/openapi.json")
        assert (await backend.call(url, "GET")).code == 404  # not for clients


async def test_document_requires_a_token_if_tokens_are_set(io_loop):
    """Without tokens, generated clients must not require one."""
    for flags, needed in (((), False), ((f"--callback_token={TOKEN}",), True)):
        async with RecordingBackend() as backend, Service(*flags) as service:
            spoken = await document(backend, service)
        operations = [
            operation
            for item in spoken["paths"].values()
            for method, operation in item.items()
            if method in METHODS
        ]
        assert ("securitySchemes" in spoken["components"]) == needed
        assert any("security" in operation for operation in operations) == needed
        assert any("401" in o["responses"] for o in operations) == needed
        assert ("Unauthorized" in spoken["components"]["responses"]) == needed


async def test_document_has_every_documented_callback(io_loop):
    """And no other path below /socket/."""
    page = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text("utf-8")
    rows = [line.split("`")[1] for line in page.splitlines()
            if line.startswith(("| `POST /", "| `GET /", "| `DELETE /"))]
    async with RecordingBackend() as backend, Service() as service:
        paths = (await document(backend, service))["paths"]
    documented = {
        f"{method.upper()} {path.replace('{connection_id}', '<id>')}"
        for path, item in paths.items()
        for method in METHODS
        if method in item and method != "head" and path.startswith("/socket/")
    }
    assert {row for row in rows if "/socket/" in row} == documented


async def test_bulk_callback_is_documented_if_it_exists(io_loop):
    """With a token; a key opens one connection only."""
    for flags, exists in (
        ((f"--callback_token={TOKEN}",), True),
        (("--callback_capability=on",), False),
        ((), False),
    ):
        async with RecordingBackend() as backend, Service(*flags) as service:
            spoken = await document(backend, service)
            answer = await backend.call(f"{service.callback_url}/commands")
        assert ("/commands" in spoken["paths"]) == exists
        assert (answer.code == 401) == exists


def test_document_names_the_limits_of_bulk_callbacks():
    """They have a larger body than others, of one media type."""
    spoken = openapi_document("1.0", {"token"})
    responses = spoken["paths"]["/commands"]["post"]["responses"]
    described = {
        status: spoken["components"]["responses"][each["$ref"].split("/")[-1]]
        for status, each in responses.items()
        if "$ref" in each
    }
    assert "--max_bulk_size" in described["413"]["description"]
    assert "application/json" in described["415"]["description"]
    assert "memory" in described["503"]["description"]


@pytest.mark.parametrize(("flags", "security", "others"), [
    ((), None, True),
    (("--callback_token={token}",), [{"token": []}], True),
    (("--sigv4_keys_file={keys}",), [{"sigv4": []}], False),
    (("--sigv4_keys_file={keys}", "--callback_token={token}"),
     [{"token": []}, {"sigv4": []}], True),
])
async def test_callbacks_of_sdks_are_documented_for_their_backend(
    io_loop, tmp_path, flags, security, others
):
    """As they may be used; other callbacks only if they can be used."""
    keys = tmp_path / "keys"
    keys.write_text(f"AKIDEXAMPLE {'s' * 40}\n")
    given = [flag.format(token=TOKEN, keys=keys) for flag in flags]
    async with RecordingBackend() as backend, RecordingFunction() as function:
        chosen = ("--backend=apigateway", f"--functionuri={function.url}")
        async with Service(*chosen, "--stage=prod", *given) as service:
            spoken = await document(backend, service)
            url = f"{service.callback_url}/prod/@connections/{'0' * 32}"
            status = (await backend.call(url)).code
    operations = spoken["paths"]["/prod/@connections/{connectionId}"]
    for method in ("post", "get", "delete"):
        assert operations[method].get("security") == security
        refused = {"401", "403"} & operations[method]["responses"].keys()
        assert str(status) in refused if security else status == 410
    assert ("/socket/{connection_id}/send" in spoken["paths"]) == others
    schemes = spoken["components"].get("securitySchemes", {})
    assert sorted(schemes) == sorted(name for each in security or () for name in each)


@pytest.mark.long
async def test_callbacks_of_sdks_are_as_documented(io_loop, tmp_path):
    """schemathesis finds no difference."""
    async with RecordingBackend() as backend, RecordingFunction() as function:
        chosen = ("--backend=apigateway", f"--functionuri={function.url}")
        async with Service(*chosen) as service:
            spoken = await document(backend, service)
            paths = spoken["paths"]
            path = "/local/@connections/{connectionId}"
            spoken["paths"] = {path: paths[path]}
            async with websockets.connect(service.ws_url) as client:
                reader = asyncio.create_task(drop_frames(client))
                event = await function.event("CONNECT")
                own = event["requestContext"]["connectionId"]
                (id_parameter,) = paths[path].pop("parameters")
                for method in ("post", "get", "delete"):
                    # The only connection must not be closed.
                    first = "0" * 32 if method == "delete" else own
                    schema = {"enum": [first, "L0SM9cOFvHcCIhw="]}
                    given = {**id_parameter, "example": first, "schema": schema}
                    paths[path][method].setdefault("parameters", []).append(given)
                (tmp_path / "openapi.json").write_text(json.dumps(spoken))
                settings = SETTINGS + UNKNOWN_IS_GONE
                (tmp_path / "schemathesis.toml").write_text(settings)
                said = await schemathesis(
                    "openapi.json",
                    f"--url={service.callback_url}",
                    "--phases=examples,coverage,fuzzing",
                    "--max-examples=20",
                    "--seed=1",
                    cwd=tmp_path,
                )
                assert "3 selected / 3 total" in said and "Tested: 3" in said
                assert client.close_code is None
            await asyncio.wait_for(reader, DEADLINE)


def matches(spoken, *path, value):
    """Check a value against the schema at this path of the document."""
    pointer = "/".join(part.replace("/", "~1") for part in path)
    schema = {"$ref": f"#/{pointer}/schema", **spoken}
    jsonschema_rs.Draft202012Validator(schema).validate(value)


def event_path(kind):
    return "webhooks", kind, "post", "requestBody", "content", "application/json"


def documented(spoken, name):
    """Return the members of `meta` of an event's schema."""
    schema = spoken["components"]["schemas"][name]
    return set(schema["properties"]["meta"]["properties"])


async def test_document_describes_the_events(io_loop):
    """Each event matches its webhook, which names all members of its `meta`."""
    events = {}
    async with ReplyBackend() as backend:
        backend.commands({"state": 1}, {"send": "x"})
        async with Service(*backend.flags()) as service:
            spoken = await document(backend, service)
            async with websockets.connect(service.ws_url) as client:
                for message in ("text", b"text", b"\xff"):
                    await client.send(message)
                    await client.recv()
            await backend.wait_for("disconnect", 1)
        for kind in ("connect", "message", "disconnect"):
            events[kind] = backend.of(kind)
    assert [len(of_kind) for of_kind in events.values()] == [1, 3, 1]
    for kind, of_kind in events.items():
        members = set()
        for event in of_kind:
            matches(spoken, *event_path(kind), value=event)
            members.update(event["meta"])
        assert members == documented(spoken, f"{kind.capitalize()}Event")
        with pytest.raises(jsonschema_rs.ValidationError):
            matches(spoken, *event_path(kind), value={"meta": {}})
    batch = {
        "events": [
            {"event": kind, "id": "x-1", "traceparent": "00", **event}
            for kind in ("message", "disconnect")
            for event in events[kind]
        ]
    }
    matches(spoken, *event_path("batch"), value=batch)
    batch["events"][0]["event"] = "disconnect"
    with pytest.raises(jsonschema_rs.ValidationError):
        matches(spoken, *event_path("batch"), value=batch)


async def test_document_describes_the_replies(io_loop):
    """What is documented works: the examples, and no malformed command."""
    async with RecordingBackend() as backend, Service() as service:
        spoken = await document(backend, service)
    examples = 0
    for kind, item in spoken["webhooks"].items():
        content = item["post"]["responses"]["2XX"].get("content", {})
        for media_type, described in content.items():
            path = "webhooks", kind, "post", "responses", "2XX", "content", media_type
            if "example" in described:
                examples += 1
                reply = described["example"]
                assert parse_commands(reply["commands"])
                matches(spoken, *path, value=reply)
                both = {"connection_id": "a", "connection_ids": ["b"]}
                for command in (
                    {}, {"send": 1}, {"send": "x", "close": True}, {"send": "x", **both}
                ):
                    with pytest.raises(CommandError):
                        parse_commands([command])
                    reply = {"commands": [command]}
                    with pytest.raises(jsonschema_rs.ValidationError):
                        matches(spoken, *path, value=reply)
    assert examples == 3
