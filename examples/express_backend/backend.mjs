// A chat in Express, behind SocketDock: all clients get what one of them sends.
//
//     npm ci
//     WEBHOOK_SECRET=whsec_... CALLBACK_TOKEN=... node backend.mjs
//
// and the relay as described in ../flask_backend.py, which is the same in Python.
// A production backend would store in a database what this one keeps in memory.

import { parseArgs } from "node:util";

import express from "express";
import { Webhook, WebhookVerificationError } from "standardwebhooks";

const CALLBACK_TIMEOUT = 15_000; // ms; a slow client is given up after 10 s by default
const MAX_BODY = "32mb"; // an event has at most some six times --max_message_size
const MAX_SEEN = 100_000; // ids of events; the relay repeats one for 5 minutes at most
const MAX_DEAD = 1_000; // instances

for (const name of ["WEBHOOK_SECRET", "CALLBACK_TOKEN"]) {
  if (!process.env[name]) {
    console.error(`${name} is not set: the relay has it, too`);
    process.exit(1);
  }
}
const webhook = new Webhook(process.env.WEBHOOK_SECRET);

// Where each client is reached, by the run of the relay that holds it.
//
// An instance is <name>/<boot id>: an event from another boot of the same name
// shows that the one before is dead, with all its connections. So each relay
// needs its own --instance_name.
class Connections {
  #urls = new Map(); // by instance and connection
  #dead = new Bounded(MAX_DEAD);

  // Record a connection, for which an event has arrived.
  add({ instance, connection_id, send }) {
    if (this.#dead.has(instance)) return; // a late event of a dead run
    for (const other of this.#urls.keys()) {
      if (other !== instance && nameOf(other) === nameOf(instance)) this.#bury(other);
    }
    if (!this.#urls.has(instance)) this.#urls.set(instance, new Map());
    this.#urls.get(instance).set(connection_id, send);
  }

  // A connection has ended; its instance may have, too.
  remove({ instance, connection_id }) {
    this.#urls.get(instance)?.delete(connection_id);
  }

  // The URLs of all open connections.
  urls() {
    return [...this.#urls.values()].flatMap((urls) => [...urls.values()]);
  }

  #bury(instance) {
    console.log(`dropped ${this.#urls.get(instance).size} connections of ${instance}`);
    this.#urls.delete(instance);
    this.#dead.add(instance);
  }
}

// A set that drops its oldest member when it is full.
class Bounded extends Set {
  #size;

  constructor(size) {
    super();
    this.#size = size;
  }

  add(value) {
    super.add(value);
    if (this.size > this.#size) this.delete(this.values().next().value);
    return this;
  }
}

const nameOf = (instance) => instance.slice(0, instance.lastIndexOf("/"));

const connections = new Connections();
const seen = new Bounded(MAX_SEEN); // ids of processed events

// Accept events from the relay only, and each of them once.
function verify(request, response, next) {
  try {
    // The signature is over the bytes as received, not over parsed JSON.
    request.event = webhook.verify(request.body ?? "", request.headers);
  } catch (error) {
    if (!(error instanceof WebhookVerificationError)) throw error;
    console.log(`refused: ${error.message}`);
    response.sendStatus(401);
    return;
  }
  if (request.event.meta.test) { // of `socketdock check --send`
    response.sendStatus(204);
    return;
  }
  const id = request.headers["webhook-id"];
  if (seen.has(id)) {
    console.log(`again: ${id}`);
    response.sendStatus(204); // processed already, but the relay did not get the response
    return;
  }
  seen.add(id);
  next();
}

// Send one client a text frame.
async function send(url, text) {
  try {
    const answer = await fetch(url, {
      method: "POST",
      headers: {
        Authorization: `Bearer ${process.env.CALLBACK_TOKEN}`,
        "Content-Type": "text/plain; charset=utf-8",
      },
      body: text,
      signal: AbortSignal.timeout(CALLBACK_TIMEOUT),
    });
    await answer.arrayBuffer();
    // 410: it has left; its disconnect event is on the way.
    if (!answer.ok && answer.status !== 410) {
      console.log(`callback answered ${answer.status}`);
    }
  } catch (error) {
    console.log(`callback failed: ${error.cause?.message ?? error.message}`);
  }
}

const app = express();
app.use(express.raw({ type: () => true, limit: MAX_BODY }), verify);

// Accept every client; meta.headers has its cookies and tokens.
app.post("/connect", (request, response) => {
  connections.add(request.event.meta);
  response.sendStatus(204);
});

// Send a message to all clients.
app.post("/message", async (request, response) => {
  const { meta, message } = request.event;
  connections.add(meta);
  await Promise.all(connections.urls().map((url) => send(url, message)));
  response.sendStatus(204);
});

// Remove a client. For the clients of a dead run, the next run sends this event.
app.post("/disconnect", (request, response) => {
  connections.remove(request.event.meta);
  response.sendStatus(204);
});

// Answer 500 if processing failed, so that the relay retries the event.
app.use((error, request, response, next) => {
  if (request.event) seen.delete(request.headers["webhook-id"]);
  console.log(`failed: ${error.message}`);
  response.sendStatus(error.status ?? 500);
});

const { values } = parseArgs({ options: { port: { type: "string", default: "8000" } } });
const server = app.listen(Number(values.port), "127.0.0.1", (error) => {
  if (error) throw error;
  console.log(`backend at http://127.0.0.1:${server.address().port}`);
});
