// Which view fills the page. `show` returns what the page's head says: {line, detail, title, mood};
// the mood is "good", "waiting" or "ended" and never the only sign.

import { showAggregator } from "./live-aggregator.js";
import { showClient } from "./live-client.js";
import { showServer } from "./live-server.js";
import { showEvents } from "./live-sections.js";

const VIEWS = { server: showServer, aggregator: showAggregator, client: showClient };

export function show(figures) {
  const state = VIEWS[figures.service](figures);
  showEvents(figures.events);
  return state;
}
