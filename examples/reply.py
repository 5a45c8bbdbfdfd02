# The smallest backend, in Python's standard library: one function answers each message
# in the response. Any WSGI server can run it.
#
#     python3 examples/reply.py
#     .venv/bin/socketdock --backend=http --messageuri=http://127.0.0.1:8000/message
import json
import os
from wsgiref.simple_server import make_server
from wsgiref.types import StartResponse, WSGIEnvironment


def message(request: WSGIEnvironment, start: StartResponse) -> list[bytes]:
    event = json.loads(request["wsgi.input"].read(int(request["CONTENT_LENGTH"])))
    reply = {"commands": [{"send": f"you said: {event['message']}"}]}
    start("200 OK", [("Content-Type", "application/vnd.socketdock+json")])
    return [json.dumps(reply).encode()]


server = make_server("127.0.0.1", int(os.environ.get("PORT", "8000")), message)
print(f"backend at http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
