# The smallest backend in Flask: it answers each message in the response.
#
#     .venv/bin/python -m pip install flask
#     .venv/bin/python -m flask --app examples/reply_flask.py run --port=8000
#     .venv/bin/socketdock --backend=http --messageuri=http://127.0.0.1:8000/message
from typing import Any

from flask import Flask, request

app = Flask(__name__)


@app.post("/message")
def message() -> tuple[dict[str, Any], dict[str, str]]:
    commands = [{"send": f"you said: {request.get_json()['message']}"}]
    return {"commands": commands}, {"Content-Type": "application/vnd.socketdock+json"}
