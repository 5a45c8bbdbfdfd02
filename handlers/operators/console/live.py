"""Streams what the tail saw to the page, as lines of JSON in one long response.

The page reads it by `fetch`, since an EventSource cannot send a token.
"""

import asyncio
import json
import re
from http import HTTPStatus
from typing import Any

from tornado.iostream import StreamClosedError

from backends.deadlines import RunningTime
from handlers.operators.console.assets import Clients
from handlers.operators.console.guarded import GuardedHandler
from handlers.operators.console.tail import (
    KINDS,
    MAX_FOLLOWED,
    MAX_VIEWERS,
    SHOWN_OF_BODY,
    Tail,
    Viewer,
    ViewerFilter,
)
from handlers.operators.guard import OperatorGuard
from handlers.owners import SHARED_ID

TAKE_TIMEOUT = 30.0  # seconds that a viewer may take nothing
RETRY_AFTER = 5  # seconds

CONNECTION_ID = re.compile(SHARED_ID)
BEGINNING_OF_ID = re.compile(r"[0-9a-f]{0,84}")


class TailHandler(GuardedHandler):
    """A route that uses the tail."""

    def initialize(  # type: ignore[override] # each route's own keywords
        self, guard: OperatorGuard, tail: Tail
    ) -> None:
        super().initialize(guard)
        self.tail = tail


class LiveHandler(TailHandler):
    """`GET /console/live`: a `hello`, then `snapshot` and `events`, each a line."""

    def initialize(  # type: ignore[override] # each route's own keywords
        self, guard: OperatorGuard, tail: Tail, clients: Clients
    ) -> None:
        super().initialize(guard, tail)
        self.clients = clients
        self._viewer: Viewer | None = None

    async def get(self) -> None:
        self._viewer = viewer = self.tail.join()
        if viewer is None:
            self.set_header("Retry-After", str(RETRY_AFTER))
            self.problem(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"{MAX_VIEWERS} pages are open already, or the relay stops.",
            )
            return
        self.set_header("Content-Type", "application/x-ndjson; charset=utf-8")
        # A proxy that buffers the response would never forward it.
        self.set_header("X-Accel-Buffering", "no")
        try:
            await self._pass_on(json.dumps(self._hello(viewer)).encode() + b"\n")
            while not viewer.ended and self._is_allowed_still():
                await self._pass_on(await viewer.next())
            self.finish()
        except StreamClosedError:
            pass  # the page was closed
        except TimeoutError:
            self._abort()
        finally:
            viewer.leave()

    def _hello(self, viewer: Viewer) -> dict[str, Any]:
        return {
            "kind": "hello",
            "viewer": viewer.id,
            "bodies": self.tail.may_show_bodies,
            "shown_of_body": SHOWN_OF_BODY,
            "clients": self.clients.origin(self.request),
            "path": self.clients.path,
            **self.tail.named,
            "snapshot": self.tail.snapshot(),
        }

    async def _pass_on(self, lines: bytes) -> None:
        """Send lines when the client has taken the previous ones."""
        self.write(lines)
        async with RunningTime(asyncio.get_running_loop(), TAKE_TIMEOUT):
            await self.flush()

    def _is_allowed_still(self) -> bool:
        """Whether its token is still valid."""
        given = self.request.headers.get_list("Authorization")
        return self.guard.tokens.challenge(given) is None

    def _abort(self) -> None:
        """Close the connection; `finish` would wait for a peer that reads nothing."""
        connection: Any = self.request.connection
        stream = getattr(connection, "stream", None)
        if stream is not None:
            stream.close()
        else:
            connection.abort()

    def on_connection_close(self) -> None:
        super().on_connection_close()
        if self._viewer is not None:
            self._viewer.leave()


class ViewerHandler(TailHandler):
    """`POST /console/viewers/<id>`: sets the filter of that viewer.

    JSON with any of `kinds`, `connection`, `failures`, `followed` and `bodies`, as in
    `ViewerFilter`; a member that is absent has its default.
    """

    def post(self, viewer_id: str) -> None:
        wanted = self.take_json()
        if wanted is None:
            return
        viewer = self.tail.viewer(viewer_id)
        if viewer is None:
            self.problem(HTTPStatus.NOT_FOUND, "Unknown viewer.")
            return
        try:
            viewer_filter = parse_filter(wanted)
        except ValueError as error:
            self.problem(HTTPStatus.BAD_REQUEST, str(error))
            return
        if viewer_filter.bodies is not None and not self.tail.may_show_bodies:
            self.problem(
                HTTPStatus.FORBIDDEN, "Bodies are hidden by --console_bodies=off."
            )
            return
        viewer.filter = viewer_filter
        self.clear_header("Content-Type")
        self.set_status(HTTPStatus.NO_CONTENT)
        self.finish()


def parse_filter(wanted: dict[str, Any]) -> ViewerFilter:
    """Parse a filter. Raises `ValueError` with the detail of the 400."""
    kinds = wanted.get("kinds", sorted(KINDS))
    beginning = wanted.get("connection", "")
    failures = wanted.get("failures", False)
    followed = wanted.get("followed", [])
    bodies = wanted.get("bodies")
    if not isinstance(kinds, list) or not all(
        isinstance(kind, str) and kind in KINDS for kind in kinds
    ):
        raise ValueError(f"kinds is a list of {', '.join(sorted(KINDS))}.")
    if not isinstance(beginning, str) or not BEGINNING_OF_ID.fullmatch(beginning):
        raise ValueError("connection is the beginning of an id, in hex.")
    if not isinstance(failures, bool):
        raise ValueError("failures is true or false.")
    if (
        not isinstance(followed, list)
        or len(followed) > MAX_FOLLOWED
        or not all(map(_is_id, followed))
    ):
        raise ValueError(f"followed is a list of up to {MAX_FOLLOWED} ids.")
    if bodies is not None and not _is_id(bodies):
        raise ValueError("bodies is the id of one connection, or null.")
    return ViewerFilter(
        frozenset(kinds), beginning, failures, frozenset(followed), bodies
    )


def _is_id(value: object) -> bool:
    return isinstance(value, str) and CONNECTION_ID.fullmatch(value) is not None
