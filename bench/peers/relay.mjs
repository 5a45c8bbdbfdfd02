// The relay that anybody could write in an afternoon: ws, undici, one POST per message.
//
//     node relay.mjs PORT BACKEND_URL [events]

import { randomBytes } from "node:crypto";
import { createServer, STATUS_CODES } from "node:http";
import { hostname } from "node:os";
import { Pool } from "undici";
import { WebSocketServer } from "ws";

const [port, backendUrl, events] = process.argv.slice(2);
const backend = new Pool(backendUrl);
const instance = `${hostname()}/${randomBytes(8).toString("hex")}`;
const sockets = new Map();

async function post(path, event) {
  const answer = await backend.request({
    path,
    method: "POST",
    headers: { "content-type": "application/json; charset=utf-8" },
    body: JSON.stringify(event),
  });
  await answer.body.dump();
  return answer.statusCode;
}

function callback(request, response) {
  const [, , id, action] = request.url.split("/");
  const end = (status) => {
    response.statusCode = status;
    response.end(STATUS_CODES[status]);
  };
  const chunks = [];
  request.on("data", (chunk) => chunks.push(chunk));
  request.on("end", () => {
    const socket = sockets.get(id);
    if (action !== "send" || request.method !== "POST") return end(404);
    if (socket === undefined) return end(410);
    const binary = !/^text\/|json/.test(request.headers["content-type"] ?? "");
    const body = chunks.length === 1 ? chunks[0] : Buffer.concat(chunks);
    socket.send(body, { binary }, (error) => end(error ? 410 : 200));
  });
}

const server = createServer({ keepAliveTimeout: 120_000 }, callback);
const clients = new WebSocketServer({ noServer: true, maxPayload: 4 * 2 ** 20 });

server.on("upgrade", async (request, stream, head) => {
  const id = randomBytes(16).toString("hex");
  const socketUrl = `http://127.0.0.1:${port}/socket/${id}`;
  const meta = {
    connection_id: id,
    send: `${socketUrl}/send`,
    disconnect: `${socketUrl}/disconnect`,
    instance,
  };
  if (events) {
    const { headers, url: path } = request;
    const status = await post("/connect", { meta: { ...meta, headers, path } });
    if (status >= 300) return stream.destroy();
  }
  clients.handleUpgrade(request, stream, head, (socket) => {
    sockets.set(id, socket);
    let last = Promise.resolve(); // each POST waits for the answer to the one before
    let number = 0;
    socket.on("message", (data) => {
      const message_id = `${id}-${++number}`;
      const event = { meta: { ...meta, message_id, type: "text" }, message: data.toString() };
      last = last.then(() => post("/message", event));
    });
    socket.on("close", (code) => {
      sockets.delete(id);
      const event = { connection_id: id, meta: { connection_id: id, instance, code } };
      if (events) last.then(() => post("/disconnect", event));
    });
  });
});

server.listen(Number(port), "127.0.0.1", 4096);
