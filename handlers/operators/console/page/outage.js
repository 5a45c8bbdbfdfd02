/** Shows at a glance that the backend, or the relay itself, is unreachable. */

import { by, clock, count, duration, write } from "./text.js";

export class Outage {
  /** @param {import("./live.js").Live} live */
  constructor(live) {
    /** @type {number | null} */
    this.since = null; // seconds since 1970
    live.addEventListener("hello", ({ detail }) => this.show(detail.snapshot));
    live.addEventListener("snapshot", ({ detail }) => this.show(detail));
    live.addEventListener("lost", () => (document.body.dataset.relay = "lost"));
  }

  /** @param {any} now a snapshot */
  show(now) {
    document.body.dataset.relay = "live";
    const { away, cause } = now.backend;
    by("outage").hidden = away === null;
    if (away === null) {
      this.since = null;
      write(by("outage-heading"), "");
      return;
    }
    // Written once, since a screen reader says it each time.
    this.since ??= now.at - away;
    write(by("outage-heading"), `The backend is unreachable since ${clock(this.since).split(".")[0]}`);
    write(by("outage-cause"), cause ?? "");
    const oldest = duration(now.oldest_pending);
    const waits =
      now.pending > 1 ? `${count(now.pending)} events wait for it, the oldest for ${oldest}.`
        : now.pending ? `1 event waits for it, for ${oldest}.`
          : "Nothing waits for it.";
    write(by("outage-waiting"), `For ${duration(away)} now. ${waits}`);
  }
}
