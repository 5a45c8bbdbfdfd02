"""A chat on a WebSocket API of API Gateway: a Lambda function, unchanged.

Routes `$connect`, `$disconnect` and `sendmessage`, and a DynamoDB table of connection
ids. docs/api-gateway.md says how to run it on one's own machine. Clients send
{"action": "sendmessage", "data": "hello"}.
"""

import json
import os
from typing import Any

import boto3

Event = dict[str, Any]
Answer = dict[str, Any]

table = boto3.resource("dynamodb").Table(os.environ["TABLE_NAME"])


def handler(event: Event, context: object) -> Answer:
    """Answer one event of a connection."""
    return ROUTES[event["requestContext"]["routeKey"]](event)


def connect(event: Event) -> Answer:
    """Remember a connection. Any other status than 200 would refuse it."""
    table.put_item(Item={"connectionId": event["requestContext"]["connectionId"]})
    return {"statusCode": 200}


def disconnect(event: Event) -> Answer:
    """Forget a connection."""
    table.delete_item(Key={"connectionId": event["requestContext"]["connectionId"]})
    return {"statusCode": 200}


def send_message(event: Event) -> Answer:
    """Send the data to all connections, and forget those that have ended."""
    context = event["requestContext"]
    endpoint = f"https://{context['domainName']}/{context['stage']}"
    api = boto3.client("apigatewaymanagementapi", endpoint_url=endpoint)
    data = json.loads(event["body"])["data"]
    for item in table.scan(ProjectionExpression="connectionId")["Items"]:
        try:
            api.post_to_connection(ConnectionId=item["connectionId"], Data=data)
        except api.exceptions.GoneException:
            table.delete_item(Key={"connectionId": item["connectionId"]})
    return {"statusCode": 200}


ROUTES = {
    "$connect": connect,
    "$disconnect": disconnect,
    "sendmessage": send_message,
}
