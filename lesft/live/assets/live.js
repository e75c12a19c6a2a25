// The page: what comes in goes to the views; what is wrong with the connection is said.

import { Connection, setToken, token } from "./live-connection.js";
import { ago, capitalized, duration } from "./live-format.js";
import { element, setText, tick } from "./live-table.js";
import { show } from "./live-views.js";

const name = document.title;
let figures = {};
let received = 0; // by this device's clock
let lost = null;

const connection = new Connection("/v1/events", {
  event(kind, data) {
    figures = kind === "snapshot" ? data : { ...figures, ...data };
    received = Date.now();
    lost = null;
    ask(false);
    const state = show(figures);
    setText(element("state"), capitalized(state.line));
    const detail = element("detail");
    detail.hidden = !state.detail;
    setText(detail, state.detail || "");
    // Spoken when it changes, and round after round nothing is.
    setText(element("spoken"), state.mood === "good" ? "Running" : `${state.line}. ${state.detail || ""}`);
    document.body.dataset.mood = state.mood;
    document.title = `${state.title} · ${name}`;
    everySecond();
  },
  lost(why, retryAt) {
    lost = { why, retryAt };
    document.title = `connection lost · ${name}`;
    everySecond();
  },
  refused(status, message) {
    lost = { why: message, refused: status };
    document.title = `no access · ${name}`;
    ask(true);
    everySecond();
  },
});

// Ages grow by themselves. The spoken line changes only when there is something new to say.
function everySecond() {
  const stale = document.body.classList.toggle("stale", lost !== null);
  tick(received ? figures.now * 1000 + (Date.now() - received) : 0);
  element("forget").hidden = !token();
  const line = element("connection");
  line.dataset.state = stale ? "lost" : received ? "live" : "connecting";
  setText(line, spoken());
  const age = element("age");
  age.hidden = !(stale && !lost.refused);
  if (!age.hidden) setText(age, ageLine());
}

function spoken() {
  if (!lost) return received ? "Live" : "Connecting to the service";
  if (lost.refused === 401) {
    return token() ? "The service does not know this token" : "The service asks for an access token";
  }
  if (lost.refused) return `The role of this token is not enough: ${lost.why}`;
  return `Connection lost: ${lost.why}`;
}

function ageLine() {
  const soon = Math.max(0, Math.round((lost.retryAt - Date.now()) / 1000));
  const next = soon ? `next try in ${duration(soon)}` : "trying again";
  return received ? `Figures from ${ago((Date.now() - received) / 1000)}, ${next}` : capitalized(next);
}

function ask(wanted) {
  const form = element("access");
  const before = form.hidden;
  form.hidden = !wanted;
  if (wanted && before) element("token").focus();
  if (wanted && !received) setText(element("state"), "Locked");
}

element("access").addEventListener("submit", (event) => {
  event.preventDefault();
  setToken(element("token").value.trim());
  element("token").value = "";
  connection.start();
});

element("forget").addEventListener("click", () => {
  setToken(null);
  location.reload(); // the figures go, too
});

setInterval(everySecond, 1000);
connection.start();
