// The function of websocket_function.py as a plain HTTP service: prints its port.

import { once } from "node:events";
import { createServer } from "node:http";
import { json } from "node:stream/consumers";
import { setTimeout as sleep } from "node:timers/promises";

import {
  ApiGatewayManagementApiClient,
  DeleteConnectionCommand,
  GoneException,
  PostToConnectionCommand,
} from "@aws-sdk/client-apigatewaymanagementapi";

const connected = new Set();
const clients = new Map();

function authorize(event) {
  const user = event.queryStringParameters?.user;
  const statement = {
    Action: "execute-api:Invoke",
    Effect: user === "nobody" ? "Deny" : "Allow",
    Resource: event.methodArn,
  };
  return {
    principalId: user,
    policyDocument: { Version: "2012-10-17", Statement: [statement] },
    context: { user },
  };
}

function call({ requestContext: { domainName, stage } }, command) {
  const endpoint = `https://${domainName}/${stage}`;
  if (!clients.has(endpoint)) {
    clients.set(endpoint, new ApiGatewayManagementApiClient({ endpoint }));
  }
  return clients.get(endpoint).send(command);
}

const dataOf = (event) => JSON.parse(event.body).data;

const routes = {
  $connect({ requestContext }) {
    if (requestContext.authorizer.user === "refused") return { statusCode: 418, body: "no" };
    connected.add(requestContext.connectionId);
  },
  $disconnect({ requestContext }) {
    connected.delete(requestContext.connectionId);
  },
  async echo(event) {
    await sleep(100);
    return { body: dataOf(event) };
  },
  own({ requestContext: { connectionId, authorizer } }) {
    return { body: JSON.stringify({ id: connectionId, user: authorizer.user }) };
  },
  async broadcast(event) {
    for (const ConnectionId of [...connected]) {
      try {
        await call(event, new PostToConnectionCommand({ ConnectionId, Data: dataOf(event) }));
      } catch (error) {
        if (!(error instanceof GoneException)) throw error;
        connected.delete(ConnectionId);
      }
    }
  },
  async kick(event) {
    await call(event, new DeleteConnectionCommand({ ConnectionId: dataOf(event) }));
  },
  async attempt(event) {
    const { id, size } = dataOf(event);
    const input = { ConnectionId: id, Data: "x".repeat(size) };
    try {
      await call(event, new PostToConnectionCommand(input));
    } catch (error) {
      return { body: error.name };
    }
    return { body: "sent" };
  },
};

const server = createServer(async (request, response) => {
  const event = await json(request);
  const answer =
    event.type === "REQUEST"
      ? authorize(event)
      : { statusCode: 200, ...(await routes[event.requestContext.routeKey](event)) };
  response.setHeader("Content-Type", "application/json");
  response.end(JSON.stringify(answer));
});
server.listen(Number(process.argv[2] ?? 0), "127.0.0.1");
await once(server, "listening");
console.log(server.address().port);
