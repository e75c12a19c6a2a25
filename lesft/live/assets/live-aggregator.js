// The aggregation server: the open round, its clients, the published versions.

import { get, token } from "./live-connection.js";
import { bytes, clock, count, duration, MISSING } from "./live-format.js";
import { moodOf, none, reveal, showFigures } from "./live-sections.js";
import { element, make, setText, table } from "./live-table.js";

export function showAggregator({ run, clients, round, versions }) {
  const due = round.deadline && `Deadline ${clock(new Date(round.deadline))}`;
  showFigures(
    [
      ["Newest version", count(run.version), "lead"],
      ["Submitted", { text: count(round.client_ids.length), note: ` of ${count(run.clients)}` }, "lead"],
      ["Makes version", { text: count(round.version), note: `, ${round.state}` }, "lead"],
      ["Run", run.run_id],
      ["Deadline of a round", deadlineOf(run)],
      ["Protocol", `version ${run.protocol_version}`],
    ],
    round.client_ids.length,
    run.clients,
  );
  element("bar").setAttribute("aria-label", "Adapters submitted for the open round");
  showAggregatorClients(clients, new Set(round.client_ids));
  showVersions(run, versions);
  const ended = Boolean(run.ended);
  return {
    line: ended ? "ended" : `version ${run.version} is the newest`,
    detail: ended ? run.ended : [`Waits for ${run.waiting_for}`, due].filter(Boolean).join(". "),
    title: ended ? "ended" : `version ${run.version}`,
    mood: moodOf(ended, false),
  };
}

function deadlineOf({ deadline_seconds: seconds, quorum }) {
  return seconds ? `${duration(seconds)}, then ${count(quorum)} suffice` : "none";
}

function showAggregatorClients(clients, submitted) {
  reveal("clients");
  const columns = [
    { name: "Client" },
    { name: "This round", kind: "wide" },
    { name: "Samples", kind: "number" },
    { name: "Submitted last for", kind: "number" },
    { name: "Joined", kind: "number" },
  ];
  const rows = clients.map((client) => [
    client.client_id,
    submitted.has(client.client_id)
      ? { text: "submitted", mark: "good" }
      : { text: "awaited", mark: "open" },
    count(client.num_samples),
    client.last_base_version === null ? MISSING : `version ${client.last_base_version + 1}`,
    clock(new Date(client.joined), false),
  ]);
  table(element("clients-table"), "Clients of the run", columns, rows);
  none("clients-table", rows.length, "No client has joined yet.");
}

function showVersions(run, versions) {
  reveal("versions");
  const columns = [
    { name: "Version" },
    { name: "Published", kind: "number" },
    { name: "Clients", kind: "wide" },
    { name: "Samples", kind: "number" },
    { name: "Size", kind: "number" },
    { name: "SHA-256", kind: "code" },
    { name: "File" },
  ];
  const rows = versions.map((adapter) => [
    count(adapter.version),
    clock(new Date(adapter.created)),
    adapter.client_ids.join(", "),
    count(adapter.num_samples),
    bytes(adapter.num_bytes),
    adapter.sha256.slice(0, 12),
    {
      text: `Download version ${adapter.version}`,
      href: `/v1/adapters/${adapter.version}/file`,
      download: `adapter-${adapter.version}.safetensors`,
    },
  ]);
  table(element("versions-table"), "Published adapter versions, newest first", columns, rows);
  none("versions-table", rows.length, "Nothing was averaged yet.");
  const older = run.version - versions.length;
  reveal("versions-note", older > 0);
  setText(element("versions-note"), `The newest ${versions.length}; ${count(older)} older ones are in /v1/rounds.`);
}

// A link cannot carry the token, so with one the file is fetched and then saved.
element("versions-table").addEventListener("click", async (event) => {
  const link = event.target.closest("a");
  if (!link || !token()) return;
  event.preventDefault();
  const response = await get(link.getAttribute("href"));
  if (!response.ok) return;
  const address = URL.createObjectURL(await response.blob());
  make("a", { href: address, download: link.getAttribute("download") }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
});
