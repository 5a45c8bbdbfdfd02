/** The view of one connection: its state and events; sends to it, and closes it. */

import { ask, hasToken, post } from "./api.js";
import { Editor } from "./editor.js";
import { Tail } from "./tail.js";
import { by, bytes, copy, count, describe, duration, fromHex, make, write } from "./text.js";

const REFRESH = 2000; // ms
const MOST = 200; // rows

/** @param {any} connection @returns {string} what the backend keeps with it */
const stateOf = ({ backend_state_size: size, backend_state: state }) =>
  size === 0 ? "none" : `${bytes(size)}${state === undefined ? "" : `: ${state}`}`;

/** @param {any} connection @param {number} now in ms */
const factsOf = (connection, now) => ({
  Address: connection.remote_ip,
  Client: connection.user_agent || "–",
  Subprotocol: connection.subprotocol ?? "none",
  Age: duration((now - Date.parse(connection.connected_at)) / 1000),
  "From the client": `${count(connection.messages_in)} messages, ${bytes(connection.bytes_in)}`,
  "To the client": `${count(connection.messages_out)} messages, ${bytes(connection.bytes_out)}`,
  "Backend's state": stateOf(connection),
});

/** @param {string} id @returns {string} a command that sends a frame to the client */
function curl(id) {
  const url = new URL(`socket/${id}/send`, document.baseURI).href;
  // The token itself must not be copied by accident.
  const token = hasToken() ? ` -H "Authorization: Bearer $TOKEN"` : "";
  return `curl -H 'Content-Type: text/plain'${token} --data-raw 'Hello' '${url}'`;
}

export class One {
  /**
   * @param {import("./live.js").Live} live
   * @param {(id: string | null) => void} follow asks for all events of a connection
   * @param {(id: string) => any[]} recent returns the latest events of a connection
   */
  constructor(live, follow, recent) {
    this.live = live;
    this.recent = recent;
    this.follow = follow;
    this.dialog = by("one");
    this.tail = new Tail(by("one-tail"), MOST);
    this.editor = new Editor("one-frame", "one-format", "one-note");
    /** @type {any} */
    this.known = null; // the facts, when it was last open
    this.ended = ""; // how, once it is closed
    this.id = "";
    this.timer = 0;
    this.mayShowBodies = false;
    this.shownOfBody = 0;
    live.addEventListener("hello", ({ detail }) => {
      this.mayShowBodies = detail.bodies;
      this.shownOfBody = detail.shown_of_body;
      this.sayBodies(false);
    });
    live.addEventListener("events", ({ detail }) => {
      if (!this.dialog.open) return;
      const own = detail.events.filter((/** @type {any} */ event) => event.id === this.id);
      this.keep(own);
    });
    by("one-leave").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => this.leave());
    by("one-send").addEventListener("submit", (/** @type {Event} */ event) => this.act(event, () => this.send()));
    by("one-close").addEventListener("submit", (/** @type {Event} */ event) => this.act(event, () => this.close()));
    by("bodies").addEventListener("click", () => this.turnBodies());
    by("copy-id").addEventListener("click", () => this.copied(this.id, "The id"));
    by("copy-curl").addEventListener("click", () => this.copied(by("one-curl").textContent, "The command"));
  }

  /** @param {string} id */
  open(id) {
    this.id = id;
    this.known = null;
    this.ended = "";
    write(by("one-curl"), curl(id));
    write(by("one-heading"), `Connection ${id.slice(0, 8)}`);
    write(by("one-answer"), "");
    this.tail.clear();
    this.show(undefined, Date.now());
    this.keep(this.recent(id));
    this.sayBodies(false);
    this.follow(id);
    if (!this.dialog.open) this.dialog.showModal();
    this.refresh();
  }

  /** Add events of this connection. @param {any[]} events */
  keep(events) {
    const closed = events.find((event) => event.kind === "closed");
    if (closed) this.ended = describe(closed).text;
    this.tail.add(events);
  }

  /** @param {string} text @param {string} name of what is copied */
  async copied(text, name) {
    write(by("one-answer"), (await copy(text)) ? `${name} was copied.` : "This browser does not permit copying here.");
  }

  leave() {
    clearTimeout(this.timer);
    this.tail.clear();
    if (this.areBodiesOn) this.live.set({ bodies: null });
    this.sayBodies(false);
    this.follow(null);
  }

  async refresh() {
    clearTimeout(this.timer);
    const { id } = this;
    try {
      const state = this.areBodiesOn ? "&state=1" : "";
      const answer = await ask(`console/connections?limit=1&search=${id}${state}`);
      const { connections, now } = await answer.json();
      if (id !== this.id || !this.dialog.open) return;
      this.show(connections[0], Date.parse(now));
    } catch {
      // The page reports that the relay is unreachable; this is retried later.
    }
    if (this.dialog.open) this.timer = setTimeout(() => this.refresh(), REFRESH);
  }

  /** @param {any} connection undefined if it is closed @param {number} now in ms */
  show(connection, now) {
    const isOpen = connection !== undefined;
    if (isOpen) this.known = { connection, now };
    const facts = {
      State: isOpen ? connection.state : `closed ${this.ended}`.trim(),
      ...(this.known && factsOf(this.known.connection, this.known.now)),
      Id: this.id,
    };
    for (const form of ["one-send", "one-close"]) {
      for (const element of by(form).elements) element.disabled = !isOpen;
    }
    const list = by("one-facts");
    const names = Array.from(list.querySelectorAll("dt"), (dt) => dt.textContent);
    if (names.join() !== Object.keys(facts).join()) {
      list.replaceChildren(
        ...Object.keys(facts).map((name) => make("div", {}, make("dt", { textContent: name }), make("dd"))),
      );
    }
    const cells = list.querySelectorAll("dd");
    Object.values(facts).forEach((text, number) => write(cells[number], text));
    cells[cells.length - 1].className = "mono";
  }

  /** @param {Event} event @param {() => Promise<string>} action */
  async act(event, action) {
    event.preventDefault();
    try {
      write(by("one-answer"), await action());
    } catch (error) {
      write(by("one-answer"), error.message);
    }
    this.refresh();
  }

  async send() {
    const type = by("one-type").value;
    const { text } = this.editor;
    const body = type === "text" ? text : fromHex(text);
    await ask(`console/connections/${this.id}/send?type=${type}`, { method: "POST", body });
    this.editor.text = "";
    return "The frame was sent.";
  }

  async close() {
    const code = Number(by("code").value);
    await post(`console/connections/${this.id}/close`, { code, reason: by("reason").value });
    return `Closed with ${code}.`;
  }

  async turnBodies() {
    const isOn = !this.areBodiesOn;
    const isSet = await this.live.set({ bodies: isOn ? this.id : null });
    this.sayBodies(isOn && isSet);
    this.refresh();
  }

  /** @param {boolean} isOn */
  sayBodies(isOn) {
    this.areBodiesOn = isOn;
    const button = by("bodies");
    button.disabled = !this.mayShowBodies;
    button.setAttribute("aria-pressed", String(isOn));
    write(button, isOn ? "Hide bodies" : "Show bodies");
    const state = by("bodies-state");
    state.className = isOn ? "notice" : "line-text";
    write(
      state,
      !this.mayShowBodies
        ? "This relay shows no bodies (--console_bodies=off)."
        : isOn
          ? `Bodies of this connection's messages are shown from now on, the first ${count(this.shownOfBody)} characters or bytes of each. They are not kept.`
          : "Bodies of messages are not shown.",
    );
  }
}
