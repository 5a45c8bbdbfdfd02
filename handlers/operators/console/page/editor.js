/** A text area for a frame: Enter sends, Shift+Enter starts a line, JSON is formatted. */

import { by, write } from "./text.js";

const MOST_LINES = 12; // that are visible at once

/** @param {string} text @returns {any} undefined if it is not JSON */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

export class Editor {
  /** @param {string} area @param {string} format its button @param {string} note ids of elements */
  constructor(area, format, note) {
    this.area = by(area);
    this.format = by(format);
    this.note = by(note);
    this.area.addEventListener("input", () => this.changed());
    this.area.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.area.form.requestSubmit();
    });
    this.format.addEventListener("click", () => {
      const value = parsed(this.text);
      if (value === undefined) write(this.note, "This is not JSON.");
      else this.text = JSON.stringify(value, null, 2);
    });
    this.changed();
  }

  get text() {
    return this.area.value;
  }

  set text(value) {
    this.area.value = value;
    this.changed();
  }

  changed() {
    const lines = this.text.split("\n").length;
    this.area.rows = Math.min(lines, MOST_LINES);
    const looksLikeJSON = /^\s*[[{]/.test(this.text);
    write(
      this.note,
      !looksLikeJSON ? "" : parsed(this.text) === undefined ? "Not JSON yet." : "JSON. Shift+Enter starts a line.",
    );
  }
}
