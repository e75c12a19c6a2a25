// The central server: run, curve, clients, generation, settings.

import { bytes, count, duration, MISSING, nats, percent } from "./live-format.js";
import { moodOf, none, reveal, showCurve, showFigures } from "./live-sections.js";
import { element, pairs, table } from "./live-table.js";

export function showServer({ run, clients, curve, generation }) {
  const { rounds } = run.spec;
  const there = clients.filter((client) => client.connected).length;
  const progress = `round ${run.rounds_done}/${rounds}`;
  const ended = run.state === "finished" || run.state === "stopped";
  showFigures(
    [
      ["Rounds done", { text: count(run.rounds_done), note: ` of ${count(rounds)}` }, "lead"],
      ["Time left", ended ? MISSING : duration(run.seconds_left), "lead"],
      ["Loss", nats(curve.loss.at(-1)), "lead"],
      ["−log P per token", nats(curve.nll.at(-1)), "lead"],
      ["Clients connected", { text: count(there), note: ` of ${count(run.spec.clients)}` }, "lead"],
      ["Model", `${run.spec.model_name}, cut at layer ${run.spec.cut_layer}`],
      ["Run", run.spec.run_id],
      ["Steps applied", count(run.steps_applied)],
      ["Adapters averaged", every(run.spec)],
      ["Spec fingerprint", run.spec_fingerprint.replace("sha256:", "").slice(0, 12)],
    ],
    run.rounds_done,
    rounds,
  );
  showCurve(curve);
  showServerClients(clients);
  showGeneration(generation);
  showSettings(run.spec);
  const paused = run.paused && !ended;
  return {
    line: paused ? "paused" : run.state === "training" ? `training, ${progress}` : run.state,
    detail: run.reason || (run.waiting_for ? `Waits for ${run.waiting_for}` : !ended && "Takes a step"),
    title: paused ? `paused, ${progress}` : run.state === "training" ? progress : run.state,
    mood: moodOf(ended, paused || run.state !== "training" || there < clients.length),
  };
}

function every({ aggregate, aggregation_interval: interval }) {
  if (aggregate === false) return "not in this run";
  return interval === 1 ? "after every round" : `every ${interval} rounds`;
}

function showServerClients(clients) {
  reveal("clients");
  const columns = [
    { name: "Client" },
    { name: "State", kind: "wide" },
    { name: "Share", kind: "number" },
    { name: "Samples", kind: "number" },
    { name: "Round, step", kind: "number" },
    { name: "Last seen", kind: "number" },
    { name: "Received", kind: "number" },
    { name: "Sent", kind: "number" },
    { name: "Came back", kind: "number" },
  ];
  const rows = clients.map((client) => [
    client.client_id,
    client.connected
      ? { text: "connected", mark: "good" }
      : { text: "away", note: `: ${client.away_because}`, mark: "away" },
    percent(client.share),
    count(client.num_samples),
    `${client.next_round + 1}, ${client.next_micro + 1}`,
    { since: client.last_seen * 1000 },
    bytes(client.bytes_received),
    bytes(client.bytes_sent),
    client.resumed ? `${count(client.resumed)}×` : MISSING,
  ]);
  table(element("clients-table"), "Clients of the run", columns, rows);
  none("clients-table", rows.length, "No client has joined yet.");
}

function showGeneration(generation) {
  reveal("generation");
  pairs(element("generation-list"), [
    ["Texts being written", { text: count(generation.sequences), note: ` of ${count(generation.max_sequences)}` }],
    ["Tokens through the back", count(generation.tokens)],
    ["Mean batch", generation.batches ? generation.mean_batch.toFixed(2) : MISSING],
    ["Cache reserved", { text: bytes(generation.cache_bytes_reserved), note: ` of ${bytes(generation.cache_bytes)}` }],
  ]);
}

function showSettings(spec) {
  reveal("settings");
  const entries = Object.entries(spec).map(([name, value]) => [
    name.replaceAll("_", " "),
    value !== null && typeof value === "object" ? listed(value) : String(value),
  ]);
  pairs(element("settings-list"), entries);
}

function listed(value) {
  if (Array.isArray(value)) return value.length ? value.join(", ") : "none";
  return Object.entries(value)
    .map(([name, part]) => `${name.replaceAll("_", " ")} ${Array.isArray(part) ? part.join(", ") : part}`)
    .join("; ");
}
