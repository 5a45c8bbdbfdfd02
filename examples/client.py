"""A client of SocketDock: sends one message, prints the answer, and leaves.

    .venv/bin/python examples/client.py Hello

A `--url` names another relay than ws://127.0.0.1:8765/ws.
"""

import argparse
import asyncio
import sys

from tornado.websocket import WebSocketError, websocket_connect

DEADLINE = 10.0  # seconds for the answer


async def exchange(url: str, message: str) -> str:
    """Send one message, and return the answer. Raises `OSError` if there is none."""
    async with asyncio.timeout(DEADLINE):
        connection = await websocket_connect(url)
        await connection.write_message(message)
        answer = await connection.read_message()
    connection.close()
    if answer is None:
        raise ConnectionError(f"closed with {connection.close_code}")
    return answer if isinstance(answer, str) else repr(answer)


def main() -> None:
    """Exit with 1 and one line if the relay or its backend does not answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("message")
    parser.add_argument("--url", default="ws://127.0.0.1:8765/ws")
    arguments = parser.parse_args()
    try:
        print(asyncio.run(exchange(arguments.url, arguments.message)))
    except (OSError, TimeoutError, WebSocketError) as error:
        sys.exit(f"no answer from {arguments.url}: {error or 'timed out'}")


if __name__ == "__main__":
    main()
