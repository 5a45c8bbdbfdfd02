/** Counts, rates and charts, from the snapshots. */

import { Chart, Ring, SECONDS } from "./charts.js";
import { by, bytes, count, duration, milliseconds, rate, write } from "./text.js";

const LABEL_INTERVAL = 10; // snapshots between two texts of a chart for screen readers

const NAMES = ["open", "in", "out", "p50", "p95", "errors"];

export class Overview {
  /** @param {import("./live.js").Live} live */
  constructor(live) {
    this.rings = Object.fromEntries(NAMES.map((name) => [name, new Ring()]));
    const { open, in: received, out, p50, p95, errors } = this.rings;
    this.charts = [
      new Chart(by("chart-open"), [{ ring: open, color: "--in", filled: true }], count),
      new Chart(
        by("chart-messages"),
        [{ ring: received, color: "--in" }, { ring: out, color: "--out", dashed: true }],
        (value) => `${rate(value)}/s`,
      ),
      new Chart(
        by("chart-latency"),
        [{ ring: p50, color: "--in" }, { ring: p95, color: "--out", dashed: true }],
        milliseconds,
      ),
      new Chart(by("chart-errors"), [{ ring: errors, color: "--bad" }], (value) => `${rate(value)}/s`),
    ];
    this.before = null;
    this.first = null;
    this.seen = 0;
    live.addEventListener("hello", ({ detail }) => {
      if (this.instance !== detail.instance) this.first = null;
      this.instance = detail.instance;
      this.backend = detail.backend;
      write(by("instance"), detail.instance.split("/")[0]);
      by("instance").title = detail.instance;
      write(by("version"), detail.version);
      this.before = null;
      this.show(detail.snapshot);
    });
    live.addEventListener("snapshot", ({ detail }) => this.show(detail));
  }

  /** @param {any} now a snapshot */
  show(now) {
    const { before } = this;
    this.first ??= now;
    this.before = now;
    write(by("open"), count(now.open));
    write(by("total"), count(now.total));
    write(
      by("pending"),
      now.pending ? `${count(now.pending)} events, ${bytes(now.pending_bytes)}` : "nothing",
    );
    const { away, held } = now.backend;
    write(
      by("backend"),
      `${this.backend}${away === null ? "" : `, unreachable for ${duration(away)}`}${held ? `, ${count(held)} answers overdue` : ""}`,
    );
    by("backend").classList.toggle("bad", away !== null);
    if (before === null) return;
    const seconds = Math.max(now.at - before.at, 0.001);
    const per = (/** @type {string} */ name) => (now.counts[name] - before.counts[name]) / seconds;
    const values = {
      open: now.open,
      in: per("messages_in"),
      out: per("messages_out"),
      p50: now.latency.p50 ?? NaN,
      p95: now.latency.p95 ?? NaN,
      errors: (errors(now) - errors(before)) / seconds,
    };
    const missed = Math.min(SECONDS, Math.round(seconds) - 1);
    for (const name of NAMES) {
      for (let second = 0; second < missed; second++) this.rings[name].push(NaN);
      this.rings[name].push(values[name]);
    }
    write(by("opened"), `${rate(per("opened"))} opened/s, ${rate(per("closed"))} closed/s`);
    write(by("in"), rate(values.in));
    write(by("out"), rate(values.out));
    write(by("latency"), milliseconds(now.latency.p50));
    write(by("p95"), milliseconds(now.latency.p95));
    write(by("errors"), rate(values.errors));
    const total = errors(now) - errors(this.first);
    write(by("errors-total"), total ? `${count(total)} while you watched` : "none while you watched");
    if (this.seen++ % LABEL_INTERVAL === 0) this.label(values);
    if (!document.hidden) this.charts.forEach((chart) => chart.draw());
  }

  /** @param {Record<string, number>} values */
  label(values) {
    const { open, in: received, out, p95, errors: failed } = this.rings;
    const texts = {
      "chart-open": `Open connections: ${count(values.open)} now, at most ${count(open.max())}.`,
      "chart-messages": `Messages per second: ${rate(values.in)} from clients, ${rate(values.out)} to clients; at most ${rate(received.max())} and ${rate(out.max())}.`,
      "chart-latency": `Backend latency: 95th percentile at most ${milliseconds(p95.max())}.`,
      "chart-errors": `Errors per second: ${rate(values.errors)} now, at most ${rate(failed.max())}.`,
    };
    for (const [id, text] of Object.entries(texts)) by(id).setAttribute("aria-label", text);
  }
}

/** @param {any} snapshot */
const errors = ({ counts }) =>
  counts.failed_attempts + counts.refused + counts.given_up + counts.rejected;
