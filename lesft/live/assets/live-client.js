// The edge client, for its owner: phase, curve, bytes by kind.

import { bytes, count, duration, MISSING, nats, rate } from "./live-format.js";
import { moodOf, reveal, showCurve, showFigures } from "./live-sections.js";
import { element, table } from "./live-table.js";

export function showClient({ status, curve }) {
  const progress = `round ${status.round}/${status.rounds}`;
  const ended = status.phase === "finished";
  showFigures(
    [
      ["Rounds done", { text: count(status.round), note: ` of ${count(status.rounds)}` }, "lead"],
      ["Time left", ended ? MISSING : duration(status.seconds_left), "lead"],
      ["Loss", nats(status.loss), "lead"],
      ["−log P per token", nats(curve.nll.at(-1)), "lead"],
      ["Speed", rate(status.tokens_per_second, "tokens/s"), "lead"],
      ["Client", status.client_id],
      ["Run", status.run_id || MISSING],
      ["Adapter version", count(status.adapter_version)],
      ["Samples", { text: count(status.num_samples), note: status.skipped_samples ? `, ${count(status.skipped_samples)} skipped` : "" }],
      ["Tokens", count(status.tokens)],
      ["Reconnected", status.reconnects ? status.reconnects === 1 ? "once" : `${count(status.reconnects)} times` : "never"],
    ],
    status.round,
    status.rounds,
  );
  showCurve(curve);
  showWire(status);
  const training = status.phase === "training";
  return {
    line: training ? `training, ${progress}` : status.phase,
    detail: status.waiting_for && `Waits for ${status.waiting_for}`,
    title: training ? progress : status.phase,
    mood: moodOf(ended, !training),
  };
}

function showWire({ wire, bytes_up: up, bytes_down: down }) {
  reveal("wire");
  const columns = [
    { name: "Kind" },
    { name: "Up", kind: "number" },
    { name: "Down", kind: "number" },
  ];
  const rows = Object.keys(wire.up).map((kind) => [
    kind.replaceAll("_", ", "),
    wire.up[kind] ? bytes(wire.up[kind]) : MISSING,
    wire.down[kind] ? bytes(wire.down[kind]) : MISSING,
  ]);
  rows.push(["in all", bytes(up), bytes(down)]);
  table(element("wire-table"), "Bytes on the wire by kind and direction", columns, rows);
}
