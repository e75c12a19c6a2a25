// Reads the service's events. With fetch() and not EventSource, which can send no Authorization.

const TOKEN = "lesft.token";
const QUIET_MS = 40_000; // the service says something every 15 s
const SHORTEST_MS = 1000; // a stream that ends sooner is a failure
const LONGEST_PAUSE_MS = 30_000;

export function token() {
  return sessionStorage.getItem(TOKEN);
}

export function setToken(text) {
  if (text) sessionStorage.setItem(TOKEN, text);
  else sessionStorage.removeItem(TOKEN);
}

export function get(path, options = {}) {
  const headers = token() ? { Authorization: `Bearer ${token()}` } : {};
  return fetch(path, { headers, cache: "no-store", credentials: "omit", ...options });
}

// `on` has: event(name, data), lost(why, retryAt), refused(status, message).
export class Connection {
  constructor(path, on) {
    this.path = path;
    this.on = on;
    this.firstPause = 1000;
    this.failures = 0;
    this.attempt = null;
    this.timer = 0;
    addEventListener("online", () => this.hurry());
    document.addEventListener("visibilitychange", () => document.hidden || this.hurry());
  }

  // Connects, or does so anew, say with another token.
  start() {
    clearTimeout(this.timer);
    this.timer = 0;
    this.attempt?.abort();
    this.attempt = new AbortController();
    this.run(this.attempt);
  }

  hurry() {
    if (this.timer) this.start();
  }

  async run(attempt) {
    const began = Date.now();
    let why = "the service has ended the stream";
    try {
      const response = await get(this.path, { signal: attempt.signal });
      if (response.status === 401 || response.status === 403) {
        return this.on.refused(response.status, await messageOf(response));
      }
      if (response.ok) {
        await this.read(response.body.getReader(), attempt);
        // Streams end once a minute, so that a token that was revoked is noticed.
        if (attempt === this.attempt && Date.now() - began > SHORTEST_MS) return this.start();
      } else why = await messageOf(response);
    } catch {
      why = "the service does not answer";
    }
    if (attempt !== this.attempt) return; // another one has taken over
    const pause = Math.min(this.firstPause * 2 ** this.failures, LONGEST_PAUSE_MS);
    const jittered = pause * (0.8 + 0.4 * Math.random());
    this.failures += 1;
    this.timer = setTimeout(() => this.start(), jittered);
    this.on.lost(why, Date.now() + jittered);
  }

  async read(reader, attempt) {
    const decoder = new TextDecoder();
    let text = "";
    for (;;) {
      const quiet = setTimeout(() => attempt.abort(), QUIET_MS);
      const { done, value } = await reader.read().finally(() => clearTimeout(quiet));
      if (done) return;
      const blocks = (text + decoder.decode(value, { stream: true })).split("\n\n");
      text = blocks.pop();
      if (attempt !== this.attempt) return;
      for (const block of blocks) this.take(block);
    }
  }

  take(block) {
    const fields = {};
    for (const line of block.split("\n")) {
      const colon = line.indexOf(": ");
      if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 2);
    }
    if (fields.retry) this.firstPause = Number(fields.retry);
    if (!fields.data) return;
    this.failures = 0;
    this.on.event(fields.event, JSON.parse(fields.data));
  }
}

async function messageOf(response) {
  try {
    return (await response.json()).message;
  } catch {
    return `the service answers with status ${response.status}`;
  }
}
