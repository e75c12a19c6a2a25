// Puts figures into the page as text, and changes only what has changed: focus and selection stay.

import { ago } from "./live-format.js";

export function element(id) {
  return document.getElementById(id);
}

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function make(tag, attributes = {}, text = null) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}

// Makes the children of `parent` as many as `count`.
export function sized(parent, count, create) {
  while (parent.children.length > count) parent.lastElementChild.remove();
  while (parent.children.length < count) parent.append(create());
  return [...parent.children];
}

// A cell's content: a text, or {text, mark, note}, {since: ms} or {text, href, download}.
export function fill(node, content) {
  const cell = typeof content === "string" ? { text: content } : content;
  if (cell.since !== undefined) {
    node.dataset.since = cell.since;
    return;
  }
  if (cell.href) {
    const link = node.querySelector("a") ?? node.appendChild(make("a"));
    if (link.getAttribute("href") !== cell.href) {
      link.setAttribute("href", cell.href);
      link.setAttribute("download", cell.download);
    }
    setText(link, cell.text);
    return;
  }
  const value = node.firstElementChild ?? node.appendChild(make("span"));
  if (cell.mark) value.dataset.mark = cell.mark;
  const parts = [cell.text, ...(cell.note ? [cell.note] : [])];
  const spans = sized(value, parts.length, () => make("span"));
  spans.forEach((span, index) => setText(span, parts[index]));
}

// `columns` are {name, kind}; kind "number" is right-aligned, "wide" may wrap. Each row is one cell
// content by column, the first of them its header. The roles stay where CSS stacks the cells.
export function table(place, caption, columns, rows) {
  const root = place.querySelector("table") ?? place.appendChild(framed(caption, columns));
  const lines = sized(root.tBodies[0], rows.length, () => line(columns));
  rows.forEach((row, index) => row.forEach((cell, at) => fill(lines[index].cells[at], cell)));
}

function framed(caption, columns) {
  const root = make("table", { role: "table" });
  root.append(make("caption", { class: "unseen" }, caption));
  const head = root.appendChild(make("thead", { role: "rowgroup" }));
  const titles = head.appendChild(make("tr", { role: "row" }));
  for (const { name, kind } of columns) {
    const attributes = { role: "columnheader", scope: "col", class: kind ?? "" };
    titles.append(make("th", attributes, name));
  }
  root.append(make("tbody", { role: "rowgroup" }));
  return root;
}

function line(columns) {
  const row = make("tr", { role: "row" });
  columns.forEach(({ name, kind }, at) => {
    const role = at ? "cell" : "rowheader";
    const attributes = { role, class: kind ?? "", "data-label": name };
    row.append(make(at ? "td" : "th", at ? attributes : { ...attributes, scope: "row" }));
  });
  return row;
}

// `pairs` are [term, cell content, class], as a list of term and description.
export function pairs(list, entries) {
  const groups = sized(list, entries.length, () => {
    const group = make("div");
    group.append(make("dt"), make("dd"));
    return group;
  });
  entries.forEach(([term, content, kind], index) => {
    const [title, value] = groups[index].children;
    groups[index].className = kind ?? "";
    setText(title, term);
    fill(value, content);
  });
}

// Brings all ages up to date; `now` is the service's clock in milliseconds, 0 while it is unknown.
export function tick(now) {
  if (!now) return;
  for (const node of document.querySelectorAll("[data-since]")) {
    const since = Number(node.dataset.since);
    setText(node, since ? ago(Math.max(0, now - since) / 1000) : "never");
  }
}
