"""Answers plain bulk callbacks without a Tornado handler."""

import asyncio
import re
from collections.abc import Awaitable

from backends.media_types import media_type_of
from handlers.callbacks.bulk import JSON, PATH, Bulk
from handlers.callbacks.fast_send import plain_headers_of
from handlers.callbacks.responses import Response
from handlers.callbacks.tokens import CallbackTokens
from handlers.http.request import FastHandler, Request


class FastBulk:
    """Answers a plain bulk callback by the rules of `BulkHandler`, but without it.

    It exists only if there are tokens.
    """

    def __init__(
        self, prefix: str, tokens: CallbackTokens, bulk: Bulk, max_bulk_size: int
    ) -> None:
        self._target = re.compile(
            rb"(?:%b)?%b" % (re.escape(prefix.encode()), PATH.encode())
        )
        self._tokens = tokens
        self._bulk = bulk
        self._max_bulk_size = max_bulk_size
        # Stored, since asking for it is a system call (getpid) before Python 3.12.
        self._loop = asyncio.get_running_loop()
        # Kept until they are done, also if their callers disconnect.
        self._running: set[asyncio.Task[Response]] = set()

    def __call__(self, request: Request) -> FastHandler | None:
        """Return the function that receives the body; None if it is not plain."""
        if self._target.fullmatch(request.target) is None or request.chunked:
            return None
        plain = plain_headers_of(request, self._max_bulk_size)
        if plain is None:
            return None
        content_type, credentials = plain
        if media_type_of(content_type) != JSON:
            return None
        return None if self._tokens.challenge(credentials) else self._answer

    def _answer(self, body: bytes) -> Awaitable[Response]:
        task = self._loop.create_task(self._bulk.answer(body))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return asyncio.shield(task)
