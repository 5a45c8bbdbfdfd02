/** The open connections: some of them, and how many there are. */

import { ask } from "./api.js";
import { by, bytes, count, duration, make, write } from "./text.js";

const REFRESH = 2000; // ms
const TYPING = 200; // ms without a key
const NEAR = "50% 0px"; // of the window: then the list is kept up to date
const FEW = 10;
const MANY = 100;

export class Connections {
  /** @param {(id: string) => void} open shows a connection */
  constructor(open) {
    this.rows = new Map();
    this.limit = FEW;
    this.isSeen = true;
    this.asked = 0;
    this.timer = 0;
    this.isOn = false;
    const soon = () => this.later(TYPING);
    by("search").addEventListener("input", soon);
    by("sort").addEventListener("change", () => this.sorted(by("sort").value));
    by("table").tHead.addEventListener("click", (/** @type {any} */ event) => {
      const orders = event.target.closest("button")?.dataset.sort.split(" ");
      // A column with two orders changes between them.
      if (orders) this.sorted(orders[(orders.indexOf(by("sort").value) + 1) % orders.length]);
    });
    by("search-form").addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      this.later(0);
    });
    by("more").addEventListener("click", () => {
      this.limit = MANY;
      this.later(0);
    });
    by("rows").addEventListener("click", (/** @type {any} */ event) => {
      const button = event.target.closest("button");
      if (button) open(button.value);
    });
    const onSight = (/** @type {IntersectionObserverEntry[]} */ [entry]) => {
      this.isSeen = entry.isIntersecting;
      if (this.isSeen) this.later(0);
    };
    new IntersectionObserver(onSight, { rootMargin: NEAR }).observe(by("connections"));
    document.addEventListener("visibilitychange", () => this.later(0));
  }

  /** @param {string} order */
  sorted(order) {
    by("sort").value = order;
    for (const button of by("table").tHead.querySelectorAll("button")) {
      const isChosen = button.dataset.sort.split(" ").includes(order);
      if (isChosen) button.closest("th").ariaSort = order === "newest" ? "ascending" : "descending";
      else button.closest("th").ariaSort = null;
    }
    this.later(0);
  }

  /** The stream is there, or not. @param {boolean} isOn */
  turn(isOn) {
    this.isOn = isOn;
    if (isOn) this.later(0);
  }

  /** @param {number} ms */
  later(ms) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.refresh(), ms);
  }

  async refresh() {
    if (!this.isOn || !this.isSeen || document.hidden) return;
    const number = ++this.asked;
    const query = new URLSearchParams({
      search: by("search").value,
      sort: by("sort").value,
      limit: String(this.limit),
    });
    try {
      const found = await (await ask(`console/connections?${query}`)).json();
      if (number === this.asked) this.show(found);
    } catch (error) {
      if (number === this.asked) write(by("found"), `The list is not up to date: ${error.message}`);
    }
    if (number === this.asked) this.later(REFRESH);
  }

  /** @param {any} answer */
  show({ connections, found, total, now }) {
    const shown = new Set(connections.map((/** @type {any} */ c) => c.connection_id));
    for (const [id, row] of this.rows) {
      if (!shown.has(id)) {
        row.remove();
        this.rows.delete(id);
      }
    }
    let place = by("rows").firstElementChild;
    for (const connection of connections) {
      const row = this.row(connection, Date.parse(now));
      if (row === place) place = place.nextElementSibling;
      else by("rows").insertBefore(row, place);
    }
    by("table").hidden = !connections.length;
    by("no-connections").hidden = total > 0;
    by("more").hidden = this.limit === MANY || found <= connections.length;
    const rest = found - connections.length;
    write(
      by("found"),
      total === 0 ? ""
        : found === 0 ? `None of ${count(total)} matches.`
          : rest ? `${count(connections.length)} of ${count(found)}; search to see others.`
            : found < total ? `${count(found)} of ${count(total)} connections.`
              : found === 1 ? "1 connection." : `${count(found)} connections.`,
    );
  }

  /** A row, made or brought up to date. @param {any} connection @param {number} now in ms */
  row(connection, now) {
    const id = connection.connection_id;
    let row = this.rows.get(id);
    if (row === undefined) {
      const open = make("button", { className: "plain", textContent: id.slice(0, 8), value: id, title: id });
      row = make("tr", {}, make("td", {}, open));
      const names = Array.from(by("table").tHead.rows[0].cells, (cell) => cell.textContent);
      for (let cell = 1; cell < 7; cell++) {
        row.append(make("td", { className: cell > 2 ? "count" : "" }));
        row.lastElementChild.dataset.name = names[cell]; // for a phone
      }
      this.rows.set(id, row);
    }
    const client = [connection.user_agent, connection.subprotocol].filter(Boolean).join(", ");
    const texts = [
      connection.remote_ip,
      client || "–",
      duration((now - Date.parse(connection.connected_at)) / 1000),
      count(connection.messages_in),
      count(connection.messages_out),
      bytes(connection.bytes_in + connection.bytes_out),
    ];
    texts.forEach((text, number) => write(row.cells[number + 1], text));
    row.cells[2].title = client;
    return row;
  }
}
