# The smallest backend on AWS Lambda: it answers each message in the response.
# Deploy this file with the handler `reply_lambda.handler` and a function URL (auth type
# NONE: the relay has no AWS credentials), and give the relay this URL. Lambda takes at
# most 6 MB, so messages must be shorter: in JSON a byte may take six.
#
#     .venv/bin/socketdock --backend=http --max_message_size=950000 \
#         --messageuri=https://abc123.lambda-url.eu-central-1.on.aws/
import base64
import json
from typing import Any


def handler(event: dict[str, Any], context: object) -> dict[str, Any]:
    body = event["body"]
    if event.get("isBase64Encoded"):
        body = base64.b64decode(body)
    reply = {"commands": [{"send": f"you said: {json.loads(body)['message']}"}]}
    headers = {"content-type": "application/vnd.socketdock+json"}
    return {"statusCode": 200, "headers": headers, "body": json.dumps(reply)}
