// A backend in Node: it sends each message back.
//
//     node node_backend.mjs
//
// Prints its port, then each disconnect event as one line.

import http from "node:http";
import { json } from "node:stream/consumers";

const CALLBACK_TIMEOUT = 15_000; // milliseconds

async function sendBack({ send, type, encoding }, message) {
  const answer = await fetch(send, {
    method: "POST",
    headers: {
      "Content-Type":
        type === "text" ? "text/plain; charset=utf-8" : "application/octet-stream",
    },
    body: Buffer.from(message, encoding ?? "utf8"),
    signal: AbortSignal.timeout(CALLBACK_TIMEOUT),
  });
  if (!answer.ok) throw new Error(`POST ${send}: answered ${answer.status}`);
}

const server = http.createServer(async (request, response) => {
  const event = await json(request);
  if (request.url === "/message") await sendBack(event.meta, event.message);
  if (request.url === "/disconnect") console.log(JSON.stringify(event));
  response.writeHead(204).end();
});

server.listen(0, "127.0.0.1", () => console.log(server.address().port));
