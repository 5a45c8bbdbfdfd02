"""Carries out requests with the same `Idempotency-Key` once.

A repeat gets the answer of the first one. Handlers ask `Repeats` for it before they
look for the connection, which may have ended meanwhile.
"""

import asyncio
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

from handlers.callbacks.actions import Outcome

INSTANCE = ""  # the scope of requests that belong to no connection
HEADER = "Idempotency-Key"
REPLAYED = ("Idempotent-Replayed", "true")  # the header of a repeated answer
KEY = re.compile(r"[!-~]{1,255}")

PERIOD = 300.0  # seconds for which an answer is remembered
MAX_OF_CONNECTION = 1_000  # answers
MAX_IN_ALL = 100_000  # answers; each takes about 500 bytes, and its statuses
MAX_STATUSES = 10_000_000  # in answers to bulk callbacks; each takes two bytes
FORGOTTEN_PER_TURN = 1_000  # answers, which takes about 1 ms

REUSED = Outcome(
    HTTPStatus.UNPROCESSABLE_ENTITY,
    f"This {HEADER} was used for another request.",
)

# The scope, and a digest of route and key.
Name = tuple[str, bytes]


class Answer(Protocol):
    """What is remembered."""

    @property
    def status(self) -> int: ...

    @property
    def statuses(self) -> int:
        """Number of statuses of a bulk callback; 0 for others."""


A = TypeVar("A", bound=Answer)


class KeyReused(Exception):
    """The key belongs to another request; the answer is `REUSED`."""


@dataclass(frozen=True, slots=True)
class Keyed:
    """A request with a key.

    `scope` is the connection id, or `INSTANCE`. `digest` is the same for all requests
    that have the same effect.
    """

    scope: str
    route: str
    key: str
    digest: bytes

    @property
    def name(self) -> Name:
        """What a repeat has in common with the first request."""
        text = f"{self.route} {self.key}".encode()
        return self.scope, hashlib.blake2b(text, digest_size=16).digest()


def key_in(values: Sequence[str]) -> str | None:
    """Return the key in `Idempotency-Key` headers; None: there is none.

    Raises `ValueError` with the detail for a 400.
    """
    if not values:
        return None
    if len(values) > 1 or not KEY.fullmatch(values[0]):
        raise ValueError(f"{HEADER} must be 1 to 255 visible ASCII characters.")
    return values[0]


def digest_of(kind: str, body: bytes) -> bytes:
    """Return the digest of a request; `kind` is what the body is used for."""
    digest = hashlib.sha256(f"{kind}\n".encode())
    digest.update(body)
    return digest.digest()


class _Answered(NamedTuple):
    digest: bytes
    answer: Any
    forget_at: float  # on the loop's clock


class Repeats:
    """Remembers the answers to requests with a key, for all connections.

    Only answers below 300, and 504, are remembered: with any other the request had no
    effect, and a repeat is carried out. At the limits the oldest answers are
    forgotten; a request under way never is.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # Digest and answer of each request under way.
        self._under_way: dict[Name, tuple[bytes, asyncio.Task[Any]]] = {}
        self._answered: OrderedDict[Name, _Answered] = OrderedDict()  # oldest first
        # Its names by scope, oldest first.
        self._by_scope: dict[str, dict[Name, None]] = {}
        self._statuses = 0  # of all answers
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._answered)

    async def once(
        self, request: Keyed, act: Callable[[], Coroutine[Any, Any, A]]
    ) -> tuple[A, bool]:
        """Return the answer, and whether it is that of an earlier request.

        `act` is called for the first request only, and goes on if that is cancelled.
        Raises `KeyReused` if the key is known from another request.
        """
        name = request.name
        if (answered := self._answered.get(name)) is not None:
            self._compare(answered.digest, request)
            return answered.answer, True
        if (under_way := self._under_way.get(name)) is not None:
            self._compare(under_way[0], request)
            return await asyncio.shield(under_way[1]), True
        task = self._loop.create_task(act())
        self._under_way[name] = request.digest, task
        task.add_done_callback(partial(self._on_answer, name))
        return await asyncio.shield(task), False

    def check(self, request: Keyed) -> None:
        """Raise `KeyReused` if the key is known from another request."""
        name = request.name
        known = self._answered.get(name) or self._under_way.get(name)
        if known is not None:
            self._compare(known[0], request)

    @staticmethod
    def _compare(digest: bytes, request: Keyed) -> None:
        if digest != request.digest:
            raise KeyReused

    def _on_answer(self, name: Name, task: "asyncio.Task[Any]") -> None:
        digest, _ = self._under_way.pop(name)
        if task.cancelled() or task.exception() is not None:
            return
        answer: Answer = task.result()
        if answer.status < HTTPStatus.MULTIPLE_CHOICES or (
            answer.status == HTTPStatus.GATEWAY_TIMEOUT
        ):
            self._remember(name, digest, answer)

    def _remember(self, name: Name, digest: bytes, answer: Answer) -> None:
        self._answered[name] = _Answered(digest, answer, self._loop.time() + PERIOD)
        names = self._by_scope.setdefault(name[0], {})
        names[name] = None
        self._statuses += answer.statuses
        if name[0] != INSTANCE and len(names) > MAX_OF_CONNECTION:
            self._forget(next(iter(names)))
        while self._statuses > MAX_STATUSES:
            self._forget(next(iter(self._by_scope[INSTANCE])))
        if len(self._answered) > MAX_IN_ALL:
            self._forget(next(iter(self._answered)))
        self._watch()

    def _forget(self, name: Name) -> None:
        self._statuses -= self._answered.pop(name).answer.statuses
        names = self._by_scope[name[0]]
        del names[name]
        if not names:
            del self._by_scope[name[0]]

    def _watch(self) -> None:
        """Wait until the oldest answer is to be forgotten."""
        if self._timer is None and self._answered:
            oldest = next(iter(self._answered.values()))
            self._timer = self._loop.call_at(oldest.forget_at, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        now = self._loop.time()
        for name, answered in list(islice(self._answered.items(), FORGOTTEN_PER_TURN)):
            if answered.forget_at > now:
                break
            self._forget(name)
        self._watch()
