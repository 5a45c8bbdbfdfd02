# The smallest backend in FastAPI: it answers each message in the response.
#
#     .venv/bin/python -m pip install fastapi uvicorn
#     .venv/bin/python -m uvicorn --app-dir=examples reply_fastapi:app --port=8000
#     .venv/bin/socketdock --backend=http --messageuri=http://127.0.0.1:8000/message
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

app = FastAPI()


@app.post("/message")
async def message(event: dict[str, Any]) -> JSONResponse:
    commands = [{"send": f"you said: {event['message']}"}]
    return JSONResponse(
        {"commands": commands}, media_type="application/vnd.socketdock+json"
    )
