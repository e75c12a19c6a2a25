// The parts of the page that several services have.

import { Chart } from "./live-chart.js";
import { clock, count, nats } from "./live-format.js";
import { element, make, pairs, setText, sized, table } from "./live-table.js";

let chart = null;

export function reveal(id, wanted = true) {
  element(id).hidden = !wanted;
}

export function moodOf(ended, waiting) {
  if (ended) return "ended";
  return waiting ? "waiting" : "good";
}

export function showFigures(entries, done, total) {
  reveal("figures");
  reveal("progress", total > 0);
  element("bar").max = Math.max(1, total);
  element("bar").value = done;
  pairs(element("figure-list"), entries);
}

export function showCurve(curve) {
  reveal("curve", curve.rounds.length > 0);
  if (!curve.rounds.length) return;
  chart ??= new Chart(element("chart"), [
    { key: "loss", name: "loss" },
    { key: "nll", name: "−log P" },
  ]);
  chart.show(curve);
  const thinned = curve.rounds.length < curve.total;
  reveal("curve-note", thinned);
  setText(element("curve-note"), `${count(curve.rounds.length)} of ${count(curve.total)} rounds are shown.`);
  const details = element("curve-table-details");
  const fillTable = () => details.open && showCurveTable(curve);
  details.ontoggle = fillTable;
  fillTable();
}

function showCurveTable({ rounds, loss, nll }) {
  const columns = [
    { name: "Round", kind: "number" },
    { name: "Loss", kind: "number" },
    { name: "−log P per token", kind: "number" },
  ];
  const rows = rounds.map((round, at) => [count(round), nats(loss[at]), nats(nll[at])]);
  table(element("curve-table"), "Loss by round, newest first", columns, rows.reverse());
}

export function showEvents(events) {
  reveal("events", events.length > 0);
  const lines = sized(element("event-list"), events.length, () => {
    const item = make("li");
    item.append(make("time"), make("b"), make("span"));
    return item;
  });
  events.forEach((event, index) => {
    const [time, level, message] = lines[index].children;
    const date = new Date(event.time * 1000);
    time.setAttribute("datetime", date.toISOString());
    setText(time, clock(date));
    level.hidden = event.level === "INFO";
    setText(level, level.hidden ? "" : event.level.toLowerCase());
    setText(message, event.message);
  });
}

export function none(id, number, text) {
  const place = element(id);
  let line = place.querySelector("p");
  line ??= place.appendChild(make("p", { class: "note" }));
  setText(line, number ? "" : text);
  line.hidden = number > 0;
  place.querySelector("table").hidden = number === 0;
}
