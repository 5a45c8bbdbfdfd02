/** The stream of events and snapshots from the relay; reconnects by itself. */

import { ask, post, Refused } from "./api.js";

const SILENCE = 6000; // ms: a snapshot is due each second
const FIRST_WAIT = 500; // ms
const LONGEST_WAIT = 8000; // ms

/** Emits "hello", "snapshot", "events", "lost" and "refused". */
export class Live extends EventTarget {
  #viewer = "";
  #filter = {};
  #sending = Promise.resolve();
  #again = () => {};

  /** Read for as long as the page is open. */
  async run() {
    for (let failed = 0; ; failed++) {
      try {
        await this.#read(() => (failed = 0));
      } catch (error) {
        if (error instanceof Refused && error.status !== 503) {
          this.#emit("refused", error);
          await new Promise((resolve) => (this.#again = resolve));
          continue;
        }
        if (error instanceof Refused) this.#emit("lost", error.message);
      }
      this.#viewer = "";
      this.#emit("lost", "");
      const wait = Math.min(LONGEST_WAIT, FIRST_WAIT * 2 ** failed);
      await new Promise((resolve) => setTimeout(resolve, wait * (0.5 + Math.random() / 2)));
    }
  }

  /** Try once more, after "refused". */
  retry() {
    this.#again();
  }

  /**
   * What to see from now on; resolves when the relay knows, false where it refused.
   * @param {object} change of `kinds`, `connection`, `failures`, `followed`, `bodies`
   * @returns {Promise<boolean>}
   */
  set(change) {
    Object.assign(this.#filter, change);
    const sent = this.#sending.then(async () => {
      if (!this.#viewer) return false; // sent after the next hello
      try {
        await post(`console/viewers/${this.#viewer}`, this.#filter);
        return true;
      } catch {
        return false;
      }
    });
    this.#sending = sent.then(() => {});
    return sent;
  }

  /** @param {() => void} onHello */
  async #read(onHello) {
    const abort = new AbortController();
    let watch = setTimeout(() => abort.abort(), SILENCE);
    try {
      const response = await ask("console/live", { signal: abort.signal });
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        clearTimeout(watch);
        watch = setTimeout(() => abort.abort(), SILENCE);
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const line of lines) {
          const item = JSON.parse(line);
          if (item.kind === "hello") {
            onHello();
            this.#viewer = item.viewer;
            this.#filter.bodies = null; // must be requested again
            this.set({});
          }
          this.#emit(item.kind, item);
        }
      }
    } finally {
      clearTimeout(watch);
      abort.abort();
    }
  }

  /** @param {string} name @param {unknown} detail */
  #emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}
