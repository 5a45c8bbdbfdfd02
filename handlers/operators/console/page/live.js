/** The stream of what happens; it comes back by itself. */

import { ask, post, Refused } from "./api.js";

const SILENCE = 6000; // ms: a snapshot is due each second
const FIRST_WAIT = 500; // ms
const LONGEST_WAIT = 8000; // ms

/** Emits "hello", "snapshot", "events", "lost" and "refused". */
export class Live extends EventTarget {
  #viewer = "";
  #wishes = {};
  #telling = Promise.resolve();
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
  wish(change) {
    Object.assign(this.#wishes, change);
    const told = this.#telling.then(async () => {
      if (!this.#viewer) return false; // they are told after the next hello
      try {
        await post(`console/viewers/${this.#viewer}`, this.#wishes);
        return true;
      } catch {
        return false;
      }
    });
    this.#telling = told.then(() => {});
    return told;
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
          const told = JSON.parse(line);
          if (told.kind === "hello") {
            onHello();
            this.#viewer = told.viewer;
            this.#wishes.bodies = null; // whoever wants to see them asks again
            this.wish({});
          }
          this.#emit(told.kind, told);
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
