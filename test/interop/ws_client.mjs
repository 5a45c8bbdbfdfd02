// A client in Node with the `ws` module: a task on stdin, its result on stdout.

import { json } from "node:stream/consumers";

import WebSocket from "ws";

import { exchange } from "./exchange.mjs";

const task = await json(process.stdin);
const result = await exchange(new WebSocket(task.url), task);
process.stdout.write(JSON.stringify(result));
