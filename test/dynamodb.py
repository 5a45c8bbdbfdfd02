"""A DynamoDB with one table of connection ids, as an HTTP server.

It knows what the chat in `examples/apigateway_chat` asks for.
"""

import json
from typing import Any, Self

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler


class Table:
    """The server, during the block; `ids` are the keys of its items."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ids: list[str] = []

    async def __aenter__(self) -> Self:
        table = self

        class Operation(RequestHandler):
            def post(self) -> None:
                name = self.request.headers["X-Amz-Target"].partition(".")[2]
                given = json.loads(self.request.body)
                assert given["TableName"] == table.name
                self.set_header("Content-Type", "application/x-amz-json-1.0")
                self.finish(json.dumps(getattr(table, name)(given)))

        sockets = bind_sockets(0, "127.0.0.1")
        self.url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        application = Application([("/", Operation)], log_function=lambda _: None)
        self._server = HTTPServer(application)
        self._server.add_sockets(sockets)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.stop()
        await self._server.close_all_connections()

    def PutItem(self, given: Any) -> Any:
        self.ids.append(given["Item"]["connectionId"]["S"])
        return {}

    def DeleteItem(self, given: Any) -> Any:
        connection_id = given["Key"]["connectionId"]["S"]
        self.ids = [each for each in self.ids if each != connection_id]
        return {}

    def Scan(self, given: Any) -> Any:
        assert given["ProjectionExpression"] == "connectionId"
        items = [{"connectionId": {"S": each}} for each in self.ids]
        return {"Items": items, "Count": len(items), "ScannedCount": len(items)}
