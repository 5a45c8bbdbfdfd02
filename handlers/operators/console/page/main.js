/** The page: shows its parts, or the form for a token. */

import { hasToken, useToken } from "./api.js";
import { Connections } from "./connections.js";
import { Live } from "./live.js";
import { One } from "./one.js";
import { Outage } from "./outage.js";
import { Overview } from "./overview.js";
import { Playground } from "./playground.js";
import { Events } from "./tail.js";
import { by, write } from "./text.js";
import { Theme } from "./theme.js";

const UNAUTHORIZED = 401;

const live = new Live();
const followed = { playground: null, one: null };

/** @param {"playground" | "one"} who @returns {(id: string | null) => Promise<boolean>} */
const follower = (who) => (id) => {
  followed[who] = id;
  return live.set({ followed: [...new Set(Object.values(followed).filter(Boolean))] });
};

new Theme();
new Outage(live);
new Overview(live);
new Playground(live, follower("playground"));
const events = new Events(live, (id) => one.open(id));
const one = new One(live, follower("one"), (id) => events.of(id));
const connections = new Connections((id) => one.open(id));

/** @param {"live" | "away" | "lost" | "waiting"} state @param {string} text */
function say(state, text) {
  by("status").dataset.state = state;
  write(by("status"), text);
}

/** @param {"inside" | "door" | "refused"} part */
function show(part) {
  for (const other of ["inside", "door", "refused"]) by(other).hidden = other !== part;
}

live.addEventListener("hello", ({ detail }) => {
  show("inside");
  report(detail.snapshot);
  // A browser sends no token with a link.
  by("data").hidden = hasToken();
  by("metrics").hidden = detail.metrics === "off";
  const clients = detail.clients ?? new URL(".", document.baseURI).href.replace(/^http/, "ws").replace(/\/$/, "");
  write(by("command"), `websocat ${clients}${detail.path}`);
  connections.turn(true);
});

live.addEventListener("snapshot", ({ detail }) => report(detail));

/** @param {any} snapshot */
function report({ state, backend }) {
  if (state === "draining") say("away", "The relay is stopping");
  else if (backend.away !== null) say("away", "The backend is unreachable");
  else say("live", "Live");
}

live.addEventListener("lost", ({ detail }) => {
  connections.turn(false);
  say("lost", detail || "The relay can't be reached; trying again …");
});

live.addEventListener("refused", ({ detail }) => {
  connections.turn(false);
  if (detail.status === UNAUTHORIZED) {
    write(by("token-problem"), hasToken() ? "That token is not accepted." : "");
    useToken("");
    show("door");
    say("waiting", "Token needed");
    by("token").focus();
  } else {
    write(by("refused-why"), detail.message);
    show("refused");
    say("waiting", "Refused");
  }
});

by("token-form").addEventListener("submit", (/** @type {Event} */ event) => {
  event.preventDefault();
  useToken(by("token").value.trim());
  by("token").value = "";
  live.retry();
});
by("refused-again").addEventListener("click", () => live.retry());

live.run();
