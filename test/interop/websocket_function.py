"""A function of a WebSocket API, and its authorizer, which do what clients ask for.

`websocket_function.mjs` does the same. A message is {"action", "data"}.
"""

import json
import time

import boto3

connected = set()


def handler(event, context):
    if event.get("type") == "REQUEST":
        return authorize(event)
    route = event["requestContext"]["routeKey"]
    return {"statusCode": 200, **(ROUTES[route](event) or {})}


def authorize(event):
    user = (event.get("queryStringParameters") or {}).get("user")
    statement = {
        "Action": "execute-api:Invoke",
        "Effect": "Deny" if user == "nobody" else "Allow",
        "Resource": event["methodArn"],
    }
    return {
        "principalId": user,
        "policyDocument": {"Version": "2012-10-17", "Statement": [statement]},
        "context": {"user": user},
    }


def connect(event):
    if event["requestContext"]["authorizer"]["user"] == "refused":
        return {"statusCode": 418, "body": "no"}
    connected.add(event["requestContext"]["connectionId"])
    return None


def disconnect(event):
    connected.discard(event["requestContext"]["connectionId"])


def echo(event):
    """Answer in the response: late, so that others come meanwhile."""
    time.sleep(0.1)
    return {"body": json.loads(event["body"])["data"]}


def own(event):
    context = event["requestContext"]
    own = {"id": context["connectionId"], "user": context["authorizer"]["user"]}
    return {"body": json.dumps(own)}


def broadcast(event):
    data = json.loads(event["body"])["data"]
    for connection_id in list(connected):
        try:
            call(event, "post_to_connection", ConnectionId=connection_id, Data=data)
        except gone(event):
            connected.discard(connection_id)


def kick(event):
    call(event, "delete_connection", ConnectionId=json.loads(event["body"])["data"])


def attempt(event):
    """Send as many bytes as `data` says to a connection; answer what happened."""
    data = json.loads(event["body"])["data"]
    try:
        call(
            event,
            "post_to_connection",
            ConnectionId=data["id"],
            Data=b"x" * data["size"],
        )
    except Exception as error:
        return {"body": type(error).__name__}
    return {"body": "sent"}


clients = {}


def api(event):
    context = event["requestContext"]
    endpoint = f"https://{context['domainName']}/{context['stage']}"
    if endpoint not in clients:
        clients[endpoint] = boto3.client(
            "apigatewaymanagementapi", endpoint_url=endpoint
        )
    return clients[endpoint]


def call(event, method, **arguments):
    return getattr(api(event), method)(**arguments)


def gone(event):
    return api(event).exceptions.GoneException


ROUTES = {
    "$connect": connect,
    "$disconnect": disconnect,
    "$default": attempt,
    "attempt": attempt,
    "broadcast": broadcast,
    "echo": echo,
    "kick": kick,
    "own": own,
}
