"""Observers are called, also for backends that call none (ObservedBackend)."""

import pytest
from tornado.concurrent import Future

from backends import (
    Backend,
    BackendAway,
    BackendError,
    Closure,
    Condition,
    ConnectionRefused,
    Handshake,
    Observer,
)
from backends.wrapper import BackendWrapper
from handlers.telemetry.observers import ObservedBackend, Observers

HANDSHAKE = Handshake({}, "/ws", "", "127.0.0.1", ())
CLOSURE = Closure(1000, "", "client", 1.0)


class Watcher(Observer):
    """Records the attempts and ends that are reported to it."""

    def __init__(self):
        self.attempts = []
        self.ends = []

    def attempted(self, attempt):
        self.attempts.append(attempt)

    def ended(self, event, connection_id, outcome, count=1):
        self.ends.append((event, connection_id, outcome, count))


class Opened(Observer):
    """Overrides one method only."""

    def __init__(self):
        self.seen = []

    def opened(self, connection):
        self.seen.append(connection)


class OneConnection:
    """The part of a connection that `ObservedBackend` uses."""

    id = "0123"
    trace = None


class Scripted(Backend):
    """Returns or raises what the test has set."""

    descriptors = 7

    def __init__(self, outcome=None):
        self.outcome = outcome
        self.calls = []

    def do(self, *call):
        self.calls.append(call)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    async def connect(self, connection, handshake):
        return self.do("connect", connection, handshake)

    def message(self, connection, message):
        return self.do("message", connection, message)

    async def disconnect(self, connection, closure):
        self.do("disconnect", connection, closure)

    def called_back(self, connection):
        self.calls.append(("called_back", connection))

    def condition(self):
        return Condition(held=3)

    def reload(self):
        self.calls.append(("reload",))

    async def close(self):
        self.calls.append(("close",))


def observed(outcome=None):
    """An observed backend, and its observer."""
    watcher, backend = Watcher(), Scripted(outcome)
    return ObservedBackend(backend, watcher), backend, watcher


# Observers.


def test_observers_are_optional():
    """Without observers nothing is stored."""
    observers = Observers()
    observers.opened(OneConnection())
    observers.ended("message", "x", "failed", 2)
    observers.ended("message", "x", outcome="failed", count=2)


def test_a_single_observer_is_called_directly():
    """Without a second call."""
    watcher = Watcher()
    observers = Observers(watcher)
    assert observers.ended == watcher.ended
    observers.ended("message", "x", "failed", 2)
    observers.opened(OneConnection())  # a method that it does not override
    assert watcher.ends == [("message", "x", "failed", 2)]


def test_observers_are_called_in_order():
    """Each is called for the methods that it overrides."""
    first, second, other = Watcher(), Watcher(), Opened()
    order = []
    first.ended = lambda *end: order.append("first")
    second.ended = lambda *end: order.append("second")
    observers = Observers(first, second)
    observers.add(other)
    observers.ended("message", "x", "failed")
    assert order == ["first", "second"]
    observers.opened("connection")
    assert other.seen == ["connection"]
    observers.attempted("attempt")
    assert first.attempts == second.attempts == ["attempt"]


def test_observers_can_be_removed():
    """A removed one is not called; one that was never added can be removed."""
    first, second = Watcher(), Watcher()
    observers = Observers()
    observers.add(first)
    observers.ended("message", "1", "failed")
    observers.add(second)
    observers.ended("message", "2", "failed")
    observers.remove(first)
    observers.ended("message", "3", "failed")
    observers.remove(Watcher())
    observers.remove(second)
    observers.ended("message", "4", "failed")
    assert [end[1] for end in first.ends] == ["1", "2"]
    assert [end[1] for end in second.ends] == ["2", "3"]


def test_late_observers_are_notified():
    """A `Relay` is made before there are observers."""
    observers, watcher = Observers(), Watcher()
    backend = ObservedBackend(Scripted(), observers)
    observers.add(watcher)
    assert backend.message(OneConnection(), "x") is None
    assert watcher.ends == [("message", "0123", "delivered", 1)]


def test_every_observer_method_is_passed_on():
    """Each method of the interface."""
    names = [name for name in vars(Observer) if not name.startswith("_")]
    called = []

    class All(Observer):
        pass

    for name in names:
        def method(self, *seen, name=name):
            called.append((name, seen))

        setattr(All, name, method)
    for watchers in ([All()], [All(), All()]):
        called.clear()
        observers = Observers(*watchers)
        for name in names:
            getattr(observers, name)(1, 2)
        assert called == [(name, (1, 2)) for name in names for _ in watchers]
    assert len(names) >= 8


# ObservedBackend.


def test_wrapped_backend_is_asked_for_everything():
    """A wrapper has each member of the interface, and that of its backend."""

    class Inner(Scripted):
        descriptors, observes, takes_many, wants_fields = 7, True, True, True

    inner = Inner()
    wrapper = BackendWrapper(inner)
    for name in vars(Backend):
        if name.startswith("_"):
            continue
        if callable(getattr(Backend, name)):
            assert name in {**vars(BackendWrapper), **vars(wrapper)}, name
        else:
            assert getattr(wrapper, name) == getattr(inner, name), name


@pytest.mark.gen_test
async def test_accepted_messages_are_delivered(io_loop):
    """Each event has one attempt and one end, immediately or later."""
    backend, inner, watcher = observed()
    connection = OneConnection()
    assert await backend.connect(connection, HANDSHAKE) is None
    assert backend.message(connection, "now") is None
    later = inner.outcome = Future()
    waiting = backend.message(connection, "later")
    assert [end[0] for end in watcher.ends] == ["connect", "message"]
    later.set_result(None)
    assert await waiting is None
    inner.outcome = None
    await backend.disconnect(connection, CLOSURE)
    assert watcher.ends == [
        (event, "0123", "delivered", 1)
        for event in ("connect", "message", "message", "disconnect")
    ]
    assert [(a.event, a.outcome, a.status) for a in watcher.attempts] == [
        (event, "delivered", None)
        for event in ("connect", "message", "message", "disconnect")
    ]
    assert all(a.connection_id == "0123" and a.seconds >= 0 for a in watcher.attempts)
    assert [call[0] for call in inner.calls] == [
        "connect", "message", "message", "disconnect"
    ]


@pytest.mark.gen_test
async def test_chosen_subprotocol_is_returned(io_loop):
    """The wrapper returns the backend's value."""
    backend, _, _ = observed("chat")
    assert await backend.connect(OneConnection(), HANDSHAKE) == "chat"


@pytest.mark.gen_test
async def test_refused_handshake_is_observed_and_raised(io_loop):
    """The observer gets its status."""
    backend, _, watcher = observed(ConnectionRefused(403))
    with pytest.raises(ConnectionRefused):
        await backend.connect(OneConnection(), HANDSHAKE)
    assert watcher.ends == [("connect", "0123", "refused", 1)]
    ((outcome, status),) = [(a.outcome, a.status) for a in watcher.attempts]
    assert (outcome, status) == ("refused", 403)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(BackendError("no"), "error"), (BackendAway("no"), "unreachable")],
)
@pytest.mark.gen_test
async def test_failures_are_observed_and_raised(io_loop, error, outcome):
    """For messages only the attempt: the relay reports those given up."""
    backend, inner, watcher = observed(error)
    connection = OneConnection()
    with pytest.raises(BackendError):
        await backend.connect(connection, HANDSHAKE)
    with pytest.raises(BackendError):
        backend.message(connection, "now")
    with pytest.raises(BackendError):
        await backend.disconnect(connection, CLOSURE)
    inner.outcome = Future()
    inner.outcome.set_exception(error)
    with pytest.raises(BackendError):
        await backend.message(connection, "later")
    assert watcher.ends == [
        ("connect", "0123", "failed", 1), ("disconnect", "0123", "failed", 1)
    ]
    assert [(a.event, a.outcome) for a in watcher.attempts] == [
        (event, outcome) for event in ("connect", "message", "disconnect", "message")
    ]


@pytest.mark.gen_test
async def test_observed_backend_delegates_other_calls(io_loop):
    """The wrapper is transparent for the relay."""
    backend, inner, watcher = observed()
    connection = OneConnection()
    backend.called_back(connection)
    backend.reload()
    await backend.close()
    assert inner.calls == [("called_back", connection), ("reload",), ("close",)]
    assert backend.condition() == Condition(held=3)
    assert backend.descriptors == 7
    assert backend.observes
    assert watcher.attempts == watcher.ends == []
