/** Five minutes of numbers, and small drawings of them. */

import { duration } from "./text.js";

export const SECONDS = 300;
const SHORTEST = 60; // seconds that a drawing has, before there is more to draw
const AXIS = 15; // pixels above and below the lines, for the scale's texts

/** The newest `SECONDS` values; NaN where nothing is known. */
export class Ring {
  #values = new Float64Array(SECONDS).fill(NaN);
  #next = 0;

  /** @param {number} value */
  push(value) {
    this.#values[this.#next] = value;
    this.#next = (this.#next + 1) % SECONDS;
  }

  /** @param {number} age 0 for the oldest */
  at(age) {
    return this.#values[(this.#next + age) % SECONDS];
  }

  /** How many of the newest there are, from the oldest that is known. */
  get length() {
    for (let age = 0; age < SECONDS; age++) if (!Number.isNaN(this.at(age))) return SECONDS - age;
    return 0;
  }

  max() {
    let max = 0;
    for (const value of this.#values) if (value > max) max = value;
    return max;
  }
}

/** One canvas: a line for each ring, in the color that its variable names. */
export class Chart {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {{ring: Ring, color: string, dashed?: boolean, filled?: boolean}[]} lines
   * @param {(value: number) => string} unit formats the highest value
   */
  constructor(canvas, lines, unit) {
    this.canvas = canvas;
    this.lines = lines;
    this.unit = unit;
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    document.addEventListener("theme", () => this.draw());
  }

  draw() {
    const { canvas } = this;
    const { clientWidth: width, clientHeight: height } = canvas;
    if (!width) return;
    const scale = devicePixelRatio;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    const pen = canvas.getContext("2d");
    const style = getComputedStyle(canvas);
    const color = (/** @type {string} */ name) => style.getPropertyValue(name);
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const max = Math.max(...this.lines.map(({ ring }) => ring.max()));
    const bottom = height - AXIS;
    const top = AXIS;
    const span = Math.max(SHORTEST, ...this.lines.map(({ ring }) => ring.length));
    const x = (/** @type {number} */ age) => width - 2 - ((SECONDS - 1 - age) / (span - 1)) * (width - 2);
    const y = (/** @type {number} */ value) => bottom - 1 - (max ? value / max : 0) * (bottom - 1 - top);
    // The scale: 0 and the highest value of all lines, and the time from then to now.
    pen.fillStyle = color("--line");
    pen.fillRect(0, bottom, width, 1);
    if (max) pen.fillRect(0, top, width, 1);
    pen.fillStyle = color("--muted");
    pen.font = "11px system-ui, sans-serif";
    if (max) pen.fillText(this.unit(max), 0, top - 4);
    pen.fillText(`${duration(span).replace(" 0 s", "")} ago`, 0, height - 2);
    pen.textAlign = "right";
    pen.fillText("now", width, height - 2);
    pen.textAlign = "left";
    for (const { ring, color: name, dashed, filled } of this.lines) {
      const line = new Path2D();
      const area = new Path2D();
      let from = -1;
      for (let age = 0; age <= SECONDS; age++) {
        const value = age < SECONDS ? ring.at(age) : NaN;
        if (Number.isNaN(value)) {
          if (from >= 0) {
            area.lineTo(x(age - 1), bottom);
            area.lineTo(x(from), bottom);
          }
          from = -1;
        } else if (from < 0) {
          from = age;
          line.moveTo(x(age), y(value));
          area.moveTo(x(age), y(value));
        } else {
          line.lineTo(x(age), y(value));
          area.lineTo(x(age), y(value));
        }
      }
      if (filled) {
        pen.fillStyle = color("--fill");
        pen.fill(area);
      }
      pen.strokeStyle = color(name);
      pen.lineWidth = 1.75;
      pen.lineJoin = "round";
      pen.setLineDash(dashed ? [4, 3] : []);
      pen.stroke(line);
    }
  }
}
