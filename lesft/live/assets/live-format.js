// Numbers, sizes and times as people read them.

export const MISSING = "–";

const whole = new Intl.NumberFormat("en");
const UNITS = ["B", "kB", "MB", "GB", "TB"];

export function count(value) {
  return value === null || value === undefined ? MISSING : whole.format(Math.round(value));
}

export function nats(value) {
  return value === null || value === undefined ? MISSING : value.toFixed(4);
}

export function percent(share) {
  return `${(100 * share).toFixed(1)}%`;
}

export function rate(value, unit) {
  return value ? `${value < 10 ? value.toFixed(1) : count(value)} ${unit}` : MISSING;
}

// Powers of 1000, as the other displays of LESFT have them.
export function bytes(value) {
  if (value === null || value === undefined) return MISSING;
  let unit = 0;
  while (value >= 999.5 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  const digits = unit === 0 || value >= 99.95 ? 0 : 1;
  return `${value.toFixed(digits)} ${UNITS[unit]}`;
}

// 47 s, 12 min, 3 h 20 min, 2 d 4 h
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return MISSING;
  const minutes = Math.round(seconds / 60);
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (minutes < 90) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 36) return `${hours} h ${minutes % 60} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export function ago(seconds) {
  return seconds < 2 ? "now" : `${duration(seconds)} ago`;
}

// Of today only the time: the day is said where it is another one.
export function clock(date, seconds = true) {
  const time = date.toLocaleTimeString("en-GB", {
    hour: "2-digit",
    minute: "2-digit",
    ...(seconds && { second: "2-digit" }),
  });
  const today = new Date().toDateString() === date.toDateString();
  return today
    ? time
    : `${date.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${time}`;
}

export function capitalized(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
