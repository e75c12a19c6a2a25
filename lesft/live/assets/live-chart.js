// Curves by round, drawn as SVG, each on a scale of its own: by pointer, finger or arrow keys they
// say each round's values.

import { nats } from "./live-format.js";
import { make, setText } from "./live-table.js";

const SVG = "http://www.w3.org/2000/svg";
const PANEL = 120;
const GAP = 34; // between the panels, for the next one's title
const MARGIN = { top: 26, right: 14, bottom: 42, left: 58 };
const DOTS_UP_TO = 40;

// Round numbers between two values, about as many as wanted.
export function ticks(low, high, wanted, whole = false) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const factor = [1, 2, 5, 10].find((step) => step * power >= rough * 0.999);
  const step = whole ? Math.max(1, Math.round(factor * power)) : factor * power;
  const values = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index += 1) {
    values.push(index * step);
  }
  return { values, step };
}

export class Chart {
  // `series` are {key, name}: keys of the curve, which has `rounds` too.
  constructor(place, series) {
    this.series = series;
    this.curve = null;
    this.range = {};
    this.y = {};
    this.at = null; // index of the round that was chosen; none: the last
    this.bottom = MARGIN.top + series.length * (PANEL + GAP) - GAP;
    this.slider = place.appendChild(
      make("div", { class: "plot", role: "slider", tabindex: "0", "aria-label": "Round of the curve" }),
    );
    this.svg = this.slider.appendChild(svg("svg", { "aria-hidden": "true", height: this.bottom + MARGIN.bottom }));
    this.readout = place.appendChild(make("p", { class: "readout", "aria-hidden": "true" }));
    this.slider.addEventListener("keydown", (event) => this.onKey(event));
    this.slider.addEventListener("pointermove", (event) => this.onPointer(event));
    this.slider.addEventListener("pointerdown", (event) => this.onPointer(event));
    this.slider.addEventListener("pointerleave", () => this.choose(null));
    this.slider.addEventListener("blur", () => this.choose(null));
    new ResizeObserver(() => this.draw()).observe(this.slider);
  }

  show(curve) {
    if (curve === this.curve) return;
    this.curve = curve;
    if (this.at >= curve.rounds.length) this.at = null;
    this.draw();
  }

  draw() {
    const width = this.slider.clientWidth;
    if (!this.curve || !width) return;
    this.svg.setAttribute("width", width);
    this.svg.replaceChildren();
    this.rounds(width);
    this.series.forEach(({ key, name }, index) => {
      const top = MARGIN.top + index * (PANEL + GAP);
      this.label(MARGIN.left, top - 10, `${name}, nats per token`, "start", "title");
      this.scale(key, top);
      this.axis(key, width);
      this.line(key);
    });
    this.mark = this.svg.appendChild(svg("g", { class: "chosen" }));
    this.point();
  }

  // The scale of the rounds, which all panels share.
  rounds(width) {
    const { rounds } = this.curve;
    const [first, last] = [rounds[0], Math.max(rounds.at(-1), rounds[0] + 1)];
    const inner = width - MARGIN.left - MARGIN.right;
    this.x = (round) => MARGIN.left + ((round - first) / (last - first)) * inner;
    for (const round of ticks(first, last, Math.min(8, width / 80), true).values) {
      this.label(this.x(round), this.bottom + 18, String(round), "middle");
    }
    this.label(MARGIN.left + inner / 2, this.bottom + 38, "round", "middle");
  }

  scale(key, top) {
    const values = this.curve[key].filter((value) => value !== null);
    const [least, most] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
    const room = (most - least || Math.abs(most) || 1) * 0.08;
    const [low, high] = [least >= 0 ? Math.max(0, least - room) : least - room, most + room];
    this.range[key] = [low, high];
    this.y[key] = (value) => top + ((high - value) / (high - low)) * PANEL;
  }

  axis(key, width) {
    const { values, step } = ticks(...this.range[key], 4);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    for (const value of values) {
      const [y, x2] = [this.y[key](value), width - MARGIN.right];
      this.svg.append(svg("line", { x1: MARGIN.left, x2, y1: y, y2: y, class: "grid" }));
      this.label(MARGIN.left - 8, y + 4, value.toFixed(digits), "end");
    }
  }

  label(x, y, text, anchor, kind = "") {
    const attributes = { x, y, "text-anchor": anchor, class: kind };
    const node = this.svg.appendChild(svg("text", attributes));
    node.textContent = text;
    return node;
  }

  // A round without the figure is a gap.
  line(key) {
    const { rounds } = this.curve;
    const values = this.curve[key];
    let path = "";
    values.forEach((value, index) => {
      if (value === null) return;
      const open = index > 0 && values[index - 1] !== null;
      path += `${open ? "L" : "M"}${this.x(rounds[index]).toFixed(1)} ${this.y[key](value).toFixed(1)}`;
    });
    this.svg.append(svg("path", { d: path, class: `line ${key}` }));
    values.forEach((value, index) => {
      const alone = (values[index - 1] ?? null) === null && (values[index + 1] ?? null) === null;
      if (value === null || (rounds.length > DOTS_UP_TO && !alone)) return;
      this.svg.append(this.dot(rounds[index], value, key, 2.5));
    });
  }

  dot(round, value, key, r) {
    return svg("circle", { cx: this.x(round), cy: this.y[key](value), r, class: `dot ${key}` });
  }

  // Shows the chosen round, or else the last one.
  point() {
    const { rounds } = this.curve;
    const index = this.at ?? rounds.length - 1;
    const round = rounds[index];
    const values = this.series.map(({ key, name }) => `${name} ${nats(this.curve[key][index])}`);
    const text = `Round ${round}: ${values.join(", ")}`;
    setText(this.readout, text);
    const aria = { min: rounds[0], max: rounds.at(-1), now: round, text };
    for (const [name, value] of Object.entries(aria)) {
      this.slider.setAttribute(`aria-value${name}`, value);
    }
    this.mark.replaceChildren();
    if (this.at === null) return;
    const x = this.x(round);
    const ends = { x1: x, x2: x, y1: MARGIN.top, y2: this.bottom };
    this.mark.append(svg("line", { ...ends, class: "rule" }));
    for (const { key } of this.series) {
      const value = this.curve[key][index];
      if (value !== null) this.mark.append(this.dot(round, value, key, 4.5));
    }
  }

  choose(index) {
    if (!this.curve || index === this.at) return;
    this.at = index === null ? null : Math.min(this.curve.rounds.length - 1, Math.max(0, index));
    this.point();
  }

  onKey(event) {
    const last = this.curve.rounds.length - 1;
    const now = this.at ?? last;
    const page = Math.max(1, Math.round(last / 10));
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 };
    const jumps = { Home: 0, End: last, PageDown: now - page, PageUp: now + page };
    const to = event.key in steps ? now + steps[event.key] : jumps[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.choose(to);
  }

  onPointer(event) {
    const x = event.clientX - this.svg.getBoundingClientRect().left;
    const distances = this.curve.rounds.map((round) => Math.abs(this.x(round) - x));
    this.choose(distances.indexOf(Math.min(...distances)));
  }
}

function svg(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}
