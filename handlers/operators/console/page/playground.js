/** A WebSocket client in the page: shows its frames, and what the relay did with each. */

import { ask } from "./api.js";
import { Editor } from "./editor.js";
import { by, bytes, clock, describe, fromHex, make, toHex, write } from "./text.js";

const MOST = 200; // pairs
const MOST_EVENTS = 20; // beside one frame
const SHOWN = 2000; // characters of a frame
const ABNORMAL = 1006; // RFC 6455, section 7.4.1: there was no close frame
const BACKENDS = {
  loopback: "The backend of this relay is an echo: what you send comes back.",
  http: "Each message becomes an HTTP POST to your backend, which may answer by a callback.",
};

export class Playground {
  /**
   * @param {import("./live.js").Live} live
   * @param {(id: string | null) => Promise<boolean>} follow asks for all events of a connection
   */
  constructor(live, follow) {
    this.follow = follow;
    this.editor = new Editor("frame", "frame-format", "frame-note");
    /** @type {WebSocket | null} */
    this.socket = null;
    this.id = "";
    this.pairs = new Map();
    this.reset();
    live.addEventListener("hello", ({ detail }) => write(by("playground-backend"), BACKENDS[detail.backend] ?? ""));
    live.addEventListener("events", ({ detail }) => {
      for (const event of detail.events) if (event.id === this.id) this.onEvent(event);
    });
    by("connect").addEventListener("click", () => (this.socket ? this.socket.close(1000) : this.connect()));
    by("playground-form").addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      this.send();
    });
  }

  reset() {
    this.sent = this.received = this.delivered = 0;
    this.latest = this.answered = "opening"; // keys of pairs: the last frame to the client, the last answer
    this.pairs.clear();
    by("pairs").replaceChildren();
  }

  async connect() {
    write(by("playground-problem"), "");
    by("connect").disabled = true;
    try {
      const pass = await (await ask("console/playground", { method: "POST" })).json();
      this.id = pass.connection_id;
      this.reset();
      await this.follow(this.id);
      const url = new URL(`.${pass.path}`, pass.origin ? `${pass.origin}/` : document.baseURI);
      url.protocol = url.protocol.replace("http", "ws");
      const query = by("query").value.trim().replace(/^\?/, "");
      url.search = `console=${pass.ticket}${query && `&${query}`}`;
      url.hash = "";
      const offers = by("subprotocols").value.split(",").map((offer) => offer.trim()).filter(Boolean);
      this.begin(new WebSocket(url, offers), new URL(url.pathname, url).href);
    } catch (error) {
      write(by("playground-problem"), error.message);
      by("connect").disabled = false;
    }
  }

  /** @param {WebSocket} socket @param {string} address to be shown */
  begin(socket, address) {
    this.socket = socket;
    socket.binaryType = "arraybuffer";
    by("pairs").hidden = by("pairs-head").hidden = false;
    this.say(`Connecting to ${address} …`);
    this.pair("opening", line("→", `connect to ${address}`));
    socket.addEventListener("open", () => {
      const chosen = socket.protocol ? `, subprotocol ${socket.protocol}` : "";
      this.say(`Connected${chosen}.`, "Disconnect");
      by("frame-send").disabled = false;
      by("frame").focus();
      by("frame").select();
    });
    socket.addEventListener("message", ({ data }) => {
      this.pair(`received ${++this.received}`, frame("←", data));
    });
    socket.addEventListener("close", ({ code, reason }) => {
      this.socket = null;
      by("frame-send").disabled = true;
      const how = `${code}${reason && `: ${reason}`}`;
      const hint = code === ABNORMAL ? " The handshake was refused, or the connection was cut." : "";
      this.pair("closing", line("×", `closed with ${how}`));
      this.say(`Closed with ${how}.${hint}`, "Connect");
    });
  }

  send() {
    write(by("playground-problem"), "");
    if (this.socket === null) return;
    try {
      const { text } = this.editor;
      const data = by("frame-type").value === "text" ? text : fromHex(text);
      this.socket.send(data);
      this.pair(`sent ${++this.sent}`, frame("→", data));
      by("frame").select();
    } catch (error) {
      write(by("playground-problem"), error.message);
    }
  }

  /** @param {string} text @param {string} [button] what it does next */
  say(text, button) {
    write(by("playground-state"), text);
    if (button) {
      write(by("connect"), button);
      by("connect").disabled = false;
      by("connect").classList.toggle("primary", button === "Connect");
      by("frame-send").classList.toggle("primary", button !== "Connect");
    }
  }

  /** Put an event beside the frame that it belongs to. @param {any} event */
  onEvent(event) {
    const { text, label, failed } = describe(event);
    const time = make("time", { textContent: clock(event.at) });
    const item = make("li", { className: failed ? "bad" : "" }, time, ` ${label}: ${text}`);
    const list = this.pair(this.place(event)).querySelector("ul");
    list.append(item);
    if (list.childElementCount > MOST_EVENTS) list.firstElementChild.remove();
  }

  /** @param {any} event @returns {string} the pair's key */
  place(event) {
    if (event.kind === "received") return `sent ${event.number}`;
    if (event.kind === "sent") return (this.latest = `received ${event.number}`);
    if (event.kind === "command") {
      // A frame was sent just before its command is reported, and a message answered.
      return event.command === "send" && event.outcome === "done" ? this.latest : this.answered;
    }
    if (event.kind === "opened" || event.event === "connect") return "opening";
    if (event.kind === "closed" || event.event === "disconnect") return "closing";
    if (event.kind === "given_up") return `sent ${this.sent}`;
    // The id of a message's event ends with its number; an echo has no ids.
    return (this.answered = `sent ${/-(\d+)$/.exec(event.event_id)?.[1] ?? ++this.delivered}`);
  }

  /** The pair of that key; with its frame, once that is known. */
  pair(/** @type {string} */ key, /** @type {Node | null} */ what = null) {
    const list = by("pairs");
    let item = this.pairs.get(key);
    if (item === undefined) {
      item = make("li", {}, make("div"), make("ul"));
      this.pairs.set(key, item);
      list.append(item);
      if (this.pairs.size > MOST) {
        const [oldest] = this.pairs.keys();
        this.pairs.get(oldest).remove();
        this.pairs.delete(oldest);
      }
      list.scrollTop = list.scrollHeight;
    }
    if (what !== null) item.firstElementChild.replaceChildren(what);
    return item;
  }
}

/** A frame, as it is shown. @param {string} arrow @param {string | ArrayBuffer | Uint8Array} data */
function frame(arrow, data) {
  const isText = typeof data === "string";
  const size = isText ? new TextEncoder().encode(data).length : data.byteLength;
  const shown = isText ? data.slice(0, SHOWN) : toHex(new Uint8Array(data).subarray(0, SHOWN / 4));
  const element = line(arrow, shown);
  const details = `${isText ? "text" : "binary"}, ${bytes(size)}`;
  element.lastElementChild.append(make("span", { className: "size", textContent: details }));
  return element;
}

/** @param {string} arrow @param {string} text */
function line(arrow, text) {
  const mark = make("span", { className: "arrow", textContent: arrow });
  const body = make("span", { className: "body", textContent: text });
  return make("div", { className: `frame${arrow === "→" ? "" : " received"}` }, mark, body);
}
