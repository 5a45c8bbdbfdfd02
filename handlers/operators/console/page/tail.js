/** Lists of events, the newest first, of bounded length. */

import { by, clock, count, make, describe, write } from "./text.js";

const MOST = 500; // rows
const GROUPS = {
  all: ["handshake", "opened", "closed", "received", "sent", "command", "forwarded", "attempt", "given_up"],
  connections: ["handshake", "opened", "closed"],
  frames: ["received", "sent"],
  backend: ["attempt", "command", "forwarded", "given_up"],
};

export class Tail {
  /**
   * @param {HTMLElement} list
   * @param {number} most rows
   */
  constructor(list, most = MOST) {
    this.list = list;
    this.most = most;
  }

  /** @param {any[]} events in their order */
  add(events) {
    const rows = events.slice(-this.most).map(row).reverse();
    this.#put(rows);
  }

  /** Add a line that is not an event. @param {string} text */
  note(text) {
    this.#put([make("li", { className: "note", textContent: text })]);
  }

  /** @param {Node[]} rows */
  #put(rows) {
    this.list.prepend(...rows);
    while (this.list.childElementCount > this.most) this.list.lastElementChild.remove();
  }

  clear() {
    this.list.replaceChildren();
  }
}

/** @param {any} event */
function row(event) {
  const { label, text, failed } = describe(event);
  const item = make(
    "li",
    { className: failed ? "failed" : "" },
    make("time", { textContent: clock(event.at) }),
    make("span", { className: "label", textContent: label }),
    event.id
      ? make("button", { className: "plain", textContent: event.id.slice(0, 8), value: event.id, title: event.id })
      : make("span"),
    make("span", { className: "text", textContent: text }),
  );
  if (event.body !== undefined) {
    item.append(make("pre", { textContent: `${event.body}${event.cut ? " … (cut)" : ""}` }));
  }
  return item;
}

/** The page's own tail, with its filter. */
export class Events {
  /**
   * @param {import("./live.js").Live} live
   * @param {(id: string) => void} open shows a connection
   */
  constructor(live, open) {
    this.tail = new Tail(by("tail"));
    /** @type {any[]} */
    this.recent = []; // of all connections, also while paused
    this.missed = 0; // while paused
    this.skipped = 0;
    this.instance = "";
    live.addEventListener("events", ({ detail }) => this.show(detail));
    live.addEventListener("hello", ({ detail }) => {
      if (this.instance && this.instance !== detail.instance) {
        this.tail.note("The relay was started again.");
      } else if (this.instance) {
        this.tail.note("The stream was interrupted; the events in between are missing.");
      }
      this.instance = detail.instance;
    });
    const onChange = () => {
      this.tail.clear();
      this.skipped = 0;
      this.said();
      const of = by("of").value.trim().toLowerCase();
      const wrong = /[^0-9a-f]/.test(of);
      by("of").setAttribute("aria-invalid", String(wrong));
      this.filter = {
        kinds: GROUPS[by("kinds").value],
        connection: wrong ? "" : of,
        failures: by("failures").checked,
      };
      live.set(this.filter);
    };
    this.filter = { kinds: GROUPS.all, connection: "", failures: false };
    by("filter").addEventListener("input", onChange);
    by("filter").addEventListener("submit", (/** @type {Event} */ event) => event.preventDefault());
    by("pause").addEventListener("click", () => {
      const paused = by("pause").getAttribute("aria-pressed") !== "true";
      by("pause").setAttribute("aria-pressed", String(paused));
      write(by("pause"), paused ? "Continue" : "Pause");
      this.missed = 0;
      this.said();
    });
    by("tail").addEventListener("click", (/** @type {any} */ event) => {
      const button = event.target.closest("button");
      if (button) open(button.value);
    });
  }

  /** @param {string} id @returns {any[]} the latest events of a connection */
  of(id) {
    return this.recent.filter((event) => event.id === id);
  }

  /** @param {{events: any[], skipped: number}} batch */
  show({ events, skipped }) {
    // Bodies are shown only in the view of the connection for which they were requested.
    events = events.map(({ body, ...rest }) => rest);
    this.recent = this.recent.concat(events).slice(-MOST);
    const { kinds, connection, failures } = this.filter;
    const wanted = events.filter(
      (event) =>
        kinds.includes(event.kind) && event.id.startsWith(connection) && (!failures || describe(event).failed),
    );
    by("no-events").hidden ||= wanted.length > 0;
    if (by("pause").getAttribute("aria-pressed") === "true") {
      this.missed += wanted.length + skipped;
    } else {
      this.tail.add(wanted);
      this.skipped += skipped;
    }
    this.said();
  }

  said() {
    const parts = [];
    if (this.missed) parts.push(`${count(this.missed)} since you paused.`);
    if (this.skipped) parts.push(`${count(this.skipped)} more events came too fast to be shown; use a filter.`);
    write(by("skipped"), parts.join(" "));
  }
}
