"""Looks up addresses of names, in daemon threads.

`getaddrinfo` blocks while DNS does not answer, and cannot be cancelled. The threads of
an executor, and those of libuv, are joined at exit, which would delay it; daemon
threads are not.
"""

import asyncio
import socket
import threading
from collections.abc import Sequence
from functools import partial

import aiohappyeyeballs

MAX_LOOKUPS = 16  # threads at once, one per name


class Resolver:
    """Looks up names; concurrent requests for the same name share one look-up."""

    def __init__(self) -> None:
        self._pending: dict[
            tuple[str, int], asyncio.Future[Sequence[aiohappyeyeballs.AddrInfoType]]
        ] = {}

    async def resolve(
        self, host: str, port: int
    ) -> Sequence[aiohappyeyeballs.AddrInfoType]:
        """Return the addresses of `host`.

        Raises `OSError`, or `UnicodeError` if `host` is not a DNS name. Cancellation
        does not end the look-up; the next call for the same name shares it.
        """
        try:
            return socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
            )
        except (OSError, UnicodeError):
            pass  # it is no IP address
        name = (host, port)
        found = self._pending.get(name)
        if found is None:
            if len(self._pending) >= MAX_LOOKUPS:
                raise OSError(f"DNS has not answered {MAX_LOOKUPS} look-ups so far")
            found = asyncio.get_running_loop().create_future()
            look_up = threading.Thread(
                target=self._look_up, args=(found, *name), daemon=True
            )
            try:
                look_up.start()
            except RuntimeError as error:  # the system allows no more threads
                raise OSError(str(error)) from error
            self._pending[name] = found
            found.add_done_callback(lambda _: self._pending.pop(name))
        return await asyncio.shield(found)

    @staticmethod
    def _look_up(
        found: asyncio.Future[Sequence[aiohappyeyeballs.AddrInfoType]],
        host: str,
        port: int,
    ) -> None:
        """Runs in a thread."""
        loop = found.get_loop()
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except Exception as error:
            report = partial(found.set_exception, error)
        else:
            report = partial(found.set_result, addresses)
        try:
            loop.call_soon_threadsafe(report)
        except RuntimeError:
            pass  # the loop was closed meanwhile
