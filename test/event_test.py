"""Events as the backend gets them, and their memory."""

import tracemalloc

import orjson
import pytest

from backends import Closure, Handshake, Observer, Relay
from backends.events import Ended, Event, EventWriter
from handlers.websocket.frames import CloseCode

ID = "0f6c" * 8


def writer() -> EventWriter:
    """The writer of a relay whose callback URL and name need quoting in JSON."""
    return EventWriter(Relay('http://h/"\\é', 'relay "1"/ab', "0.1", Observer(), None))


def message(size: int, kind: str) -> Event:
    """An event of a message of about `size` bytes."""
    text = "x" * size
    messages = {"text": text, "binary": text.encode(), "base64": b"\xff" * size}
    return writer().message(ID, 17, messages[kind], None)


def disconnect(size: int) -> Event:
    """An event of a close frame's reason of `size` bytes."""
    closure = Closure(1000, "x" * size, "client", 1.0)
    return writer().disconnect(Ended(ID, closure), 0, 0)


def connect(size: int) -> Event:
    """An event of a handshake with `size` bytes of query."""
    handshake = Handshake({"host": "h"}, "/ws", "x" * size, "127.0.0.1", ())
    return writer().connect(ID, handshake)


EVENTS = {
    "an empty text": lambda: message(0, "text"),
    "a text": lambda: message(20_000, "text"),
    "a large text": lambda: message(1_000_000, "text"),
    "a binary": lambda: message(20_000, "binary"),
    "a base64": lambda: message(20_000, "base64"),
    "a disconnect": lambda: disconnect(100),
    "a connect": lambda: connect(5_000),
}


@pytest.mark.parametrize("make", EVENTS.values(), ids=EVENTS)
def test_event_takes_no_more_memory_than_its_body(make):
    """Limits count the body's length, and thousands of events may wait."""
    make()  # made once, and not counted
    tracemalloc.start()
    try:
        event = make()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 1.1 * len(event.body) + 1_000


@pytest.mark.parametrize(
    "text", ["", "plain", 'quoted "\\/\n\0\x1f\x7f', "é€😀", "\u2028</script>"]
)
def test_message_event_is_the_json_of_its_members(text):
    """For each character that must be escaped."""
    for sent, kind in ((text, "text"), (text.encode(), "binary")):
        body = writer().message(ID, 17, sent, None).body
        socket = f'http://h/"\\é/socket/{ID}'
        expected = {
            "meta": {
                "connection_id": ID,
                "send": f"{socket}/send",
                "disconnect": f"{socket}/disconnect",
                "instance": 'relay "1"/ab',
                "message_id": f"{ID}-17",
                "type": kind,
            },
            "message": text,
        }
        assert body == orjson.dumps(expected)


def made_by(writer: EventWriter) -> list[bytes]:
    """The bodies of one event of each kind."""
    closure = Closure(1000, "", "client", 1.0)
    return [
        writer.connect(ID, Handshake({"host": "h"}, "/ws", "", "::1", ())).body,
        writer.message(ID, 17, "text", None).body,
        writer.message(ID, 18, b"\xff", None, b'{"step":1}').body,
        writer.disconnect(Ended(ID, closure), 0, 0).body,
    ]


def test_reply_is_all_that_a_broker_adds() -> None:
    """Byte for byte the event of the http backend, and `meta.reply`."""
    relay = Relay("http://h", "relay/ab", "0.1", Observer(), None)
    plain = made_by(EventWriter(relay))
    with_reply = made_by(EventWriter(relay, "s:{a}"))
    member = b',"reply":"s:{a}"'
    assert [body.count(member) for body in with_reply] == [1] * 4
    assert [body.replace(member, b"") for body in with_reply] == plain


def test_events_without_callbacks_have_no_urls() -> None:
    """Where no callback URL is known; all else is the same."""
    writers = [
        EventWriter(Relay(url, "relay/ab", "0.1", Observer(), None), "s")
        for url in ("http://h", None)
    ]
    for with_urls, without in zip(*map(made_by, writers), strict=True):
        found, expected = orjson.loads(without), orjson.loads(with_urls)
        expected["meta"].pop("send", None)
        expected["meta"].pop("disconnect", None)
        assert found == expected


@pytest.mark.parametrize("state", [None, b'{"step":1}'])
@pytest.mark.parametrize("instance", [None, 'dead "1"/ab'])
def test_disconnect_event_is_the_json_of_its_members(state, instance) -> None:
    """For a reason that must be escaped, and any instance."""
    reason = 'quoted "\\/\n\0\x1f\x7f é€😀'
    closure = Closure(CloseCode.GOING_AWAY, reason, "relay", 12.34567)
    ended = Ended(ID, closure, state=state, instance=instance)
    expected = {
        "connection_id": ID,
        "meta": {
            "connection_id": ID,
            "instance": instance or 'relay "1"/ab',
            "code": 1001,
            "reason": reason,
            "initiator": "relay",
            "duration": 12.346,
            "undelivered": 2,
            "refused": 1,
        },
    }
    if state is not None:
        expected["meta"]["state"] = {"step": 1}
    assert writer().disconnect(ended, 2, 1).body == orjson.dumps(expected)


def test_connect_event_is_the_json_of_its_members() -> None:
    """For values that must be escaped."""
    text = 'quoted "\\/\n\0\x1f\x7f é€😀'
    socket = f'http://h/"\\é/socket/{ID}'
    asked = {
        "headers": {"host": "h", "x": text},
        "path": text,
        "query": text,
        "remote_ip": "127.0.0.1",
        "subprotocols": [text, "b"],
    }
    meta = {
        "connection_id": ID,
        "send": f"{socket}/send",
        "disconnect": f"{socket}/disconnect",
        "instance": 'relay "1"/ab',
        **asked,
    }
    body = writer().connect(ID, Handshake(**asked)).body
    assert body == orjson.dumps({"meta": meta})
