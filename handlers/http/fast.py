"""Responses to requests that need no handler; see `Request.fast`."""

import asyncio
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar


class FastResponse:
    """A response that needs no handler."""

    status: int

    @property
    def start(self) -> bytes:
        """The status line."""
        raise NotImplementedError

    @property
    def rest(self) -> bytes:
        """The headers except `Date`, the empty line and the body."""
        raise NotImplementedError


R = TypeVar("R", bound=FastResponse)


class LaterResponse(Generic[R]):
    """A response that is not there yet; await it, or let it call `then`'s function.

    Unlike a future it calls at once, not in the next turn of the loop.
    """

    def __init__(self) -> None:
        self._response: R | None = None
        self._on_response: Callable[[R], None] | None = None

    def then(self, on_response: Callable[[R], None]) -> None:
        """Call `on_response` when it is there, unless it is cancelled before."""
        if self._response is not None:
            on_response(self._response)
        else:
            self._on_response = on_response

    def cancel(self) -> None:
        """Call nobody: the response is not needed."""
        self._on_response = None

    def respond(self, response: R) -> None:
        """It is there."""
        self._response = response
        on_response, self._on_response = self._on_response, None
        if on_response is not None:
            on_response(response)

    def __await__(self) -> Generator[Any, None, R]:
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()

        def on_response(response: R) -> None:
            if not future.done():  # who waited may be cancelled
                future.set_result(response)

        self.then(on_response)
        return (yield from future)
