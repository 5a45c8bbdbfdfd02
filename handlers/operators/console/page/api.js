/** The relay's routes, with the token of this tab. */

const KEPT_AS = "socketdock-token";

let token = sessionStorage.getItem(KEPT_AS) ?? "";

/** An answer that is none of success; `message` is its sentence. */
export class Refused extends Error {
  /** @param {number} status @param {string} detail */
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/** @param {string} given the token from now on; empty: none */
export function useToken(given) {
  token = given;
  if (given) sessionStorage.setItem(KEPT_AS, given);
  else sessionStorage.removeItem(KEPT_AS);
}

/** @returns {boolean} whether there is a token to try */
export const hasToken = () => token !== "";

/**
 * Ask the relay; throws `Refused`, or a `TypeError` where it can't be reached.
 * @param {string} path relative to the page
 * @param {RequestInit} [options]
 */
export async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  if (token) headers.set("Authorization", `Bearer ${token}`);
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  throw new Refused(response.status, problem.detail ?? `It answered ${response.status}.`);
}

/** @param {string} path @param {object} document */
export const post = (path, document) =>
  ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(document),
  });
