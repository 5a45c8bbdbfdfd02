/** Finds and makes elements, and formats values as text. */

/** @param {string} id @returns {any} the element, which must exist */
export const by = (id) => document.getElementById(id);

/**
 * @param {string} name of the element
 * @param {object} properties as `className`, `textContent`
 * @param {(Node | string)[]} children
 */
export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

/** Set the text of a node, if it has changed. @param {Node} node @param {string} text */
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** @param {string} text @returns {Promise<boolean>} whether it is on the clipboard */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text); // absent without TLS on other machines
    return true;
  } catch {
    return false;
  }
}

const whole = new Intl.NumberFormat("en");
const UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB"];

/** @param {number} value */
export const count = (value) => whole.format(value);

/** @param {number} value per second */
export const rate = (value) =>
  value >= 10 || value === 0 ? count(Math.round(value)) : value.toFixed(1);

/** @param {number} size in bytes */
export function bytes(size) {
  let unit = 0;
  for (; size >= 1024 && unit < UNITS.length - 1; unit++) size /= 1024;
  if (unit === 0) return size === 1 ? "1 byte" : `${size} bytes`;
  return `${size < 10 ? size.toFixed(1) : Math.round(size)} ${UNITS[unit]}`;
}

/** @param {number | null} ms */
export function milliseconds(ms) {
  if (ms === null) return "–";
  if (ms >= 1000) return `${(ms / 1000).toFixed(1)} s`;
  return `${ms >= 10 ? Math.round(ms) : ms.toFixed(ms >= 1 ? 1 : 2)} ms`;
}

/** @param {number} seconds */
export function duration(seconds) {
  seconds = Math.max(0, Math.floor(seconds));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

/** @param {number} at seconds since 1970 */
export const clock = (at) => {
  const date = new Date(at * 1000);
  const two = (/** @type {number} */ value) => String(value).padStart(2, "0");
  const ms = String(date.getMilliseconds()).padStart(3, "0");
  return `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}.${ms}`;
};

/** @param {string} text digits in hex, with spaces @returns {Uint8Array} */
export function fromHex(text) {
  const digits = text.replace(/\s+/g, "");
  if (digits.length % 2 || /[^0-9a-f]/i.test(digits)) {
    throw new Error("Binary is written in hex, two digits for each byte, such as 48 69.");
  }
  return Uint8Array.from(digits.match(/../g) ?? [], (pair) => parseInt(pair, 16));
}

/** @param {Uint8Array} data */
export const toHex = (data) => Array.from(data, (byte) => byte.toString(16).padStart(2, "0")).join(" ");

const HANDSHAKES = {
  refused: "refused by the backend",
  rejected: "rejected by the relay",
  no_decision: "no decision of the backend",
  left: "the client left",
};
const OUTCOMES = {
  delivered: "delivered",
  refused: "refused by the backend",
  error: "failed",
  unreachable: "failed, the backend is unreachable",
  timeout: "failed, no response in time",
  abandoned: "abandoned, its response was overdue",
};

const SOURCES = {
  response: "in a response",
  batch: "in the response to a batch",
  callback: "in a callback",
  broker: "from a broker",
};
const COMMANDED = {
  done: "done",
  gone: "dropped, the connection is not open",
  full: "dropped, the send buffer is full",
  invalid: "malformed",
};

/**
 * Describe an event of the tail.
 * @param {any} event
 * @returns {{label: string, text: string, failed: boolean}}
 */
export function describe(event) {
  switch (event.kind) {
    case "handshake":
      return {
        label: "refused",
        text: `handshake from ${event.remote_ip || "?"}: ${HANDSHAKES[event.outcome]}, ${event.status}, ${milliseconds(event.ms)}`,
        failed: true,
      };
    case "opened":
      return { label: "opened", text: "the WebSocket is open", failed: false };
    case "closed":
      return {
        label: "closed",
        text: `with ${event.code}, by ${event.operator ? "an operator" : `the ${event.initiator}`}, after ${event.duration < 10 ? `${event.duration.toFixed(1)} s` : duration(event.duration)}`,
        failed: false,
      };
    case "received":
      return { label: "received", text: `${event.type}, ${bytes(event.size)}, from the client`, failed: false };
    case "sent":
      return { label: "sent", text: `${event.type}, ${bytes(event.size)}, to the client`, failed: false };
    case "attempt": {
      const status = event.status === null ? "" : `, ${event.status}`;
      const attempt = event.attempt > 1 || event.outcome !== "delivered" ? `, attempt ${event.attempt}` : "";
      return {
        label: "backend",
        text: `${event.event} event ${OUTCOMES[event.outcome]}${status}${attempt}, ${milliseconds(event.ms)}${event.place ? `, as ${event.place}` : ""}`,
        failed: !["delivered", "abandoned"].includes(event.outcome),
      };
    }
    case "command":
      return {
        label: "command",
        text:
          event.command === "none"
            ? "a reply that cannot be used"
            : `${event.command}, ${SOURCES[event.source]}: ${COMMANDED[event.outcome]}`,
        failed: event.outcome !== "done",
      };
    case "forwarded":
      return {
        label: "forwarded",
        text: `callback to ${event.owner}: ${event.outcome}, ${event.status}`,
        failed: event.outcome !== "answered",
      };
    default:
      return { label: "given up", text: `${event.event} event${event.count > 1 ? `s: ${event.count}` : ""}, not delivered`, failed: true };
  }
}
