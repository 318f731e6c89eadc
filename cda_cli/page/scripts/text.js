// The text, on which a row shows as colours and outlines, and the same row as a table and in words.

import { byId, counted, element, percent, short } from "./dom.js";
import { report, T } from "./store.js";
import { CAPPED, weightColours } from "./theme.js";

const textBox = byId("text");
const tableBody = byId("row-table").tBodies[0];
const spans = [];
const ROWS = 200; // of the table
const SPOKEN = 3; // keys that the summary names

export function openText(onHover, onChoose) {
  for (const [position, label] of report.labels.entries()) {
    // A line break is a mark too, so that it can be coloured.
    const shown = label.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t");
    spans.push(element("span", { "data-position": position }, shown));
  }
  textBox.append(...spans);
  const position = (event) => event.target.dataset.position ?? null;
  textBox.addEventListener("pointerover", (event) => position(event) && onHover(Number(position(event)), event.altKey));
  textBox.addEventListener("pointerleave", () => onHover(null, false));
  textBox.addEventListener("click", (event) => position(event) && onChoose(Number(position(event))));
}

// A token as a table shows it: what cannot be seen is escaped.
function quoted(position) {
  if (position < 0) return `null key ${-position}`;
  return JSON.stringify(report.labels[position]).slice(1, -1).replaceAll('\\"', '"').replaceAll(" ", "␣");
}

let coloured = [];

// Shows `row` of the token at `position`: what it reads, or who reads it.
export function showRow(position, row, view) {
  for (const span of coloured) {
    span.className = "";
    span.style.cssText = "";
  }
  const colours = weightColours();
  coloured = row.keys
    .filter((key) => key.position >= 0)
    .map((key) => {
      const span = spans[key.position];
      span.className = key.level === CAPPED ? "capped" : "free";
      span.style.background = colours.css[key.level];
      span.style.color = colours.inks[key.level];
      return span;
    });
  const own = spans[position];
  own.classList.add("own");
  coloured.push(own);
  const keys = row.keys.toSorted((one, other) => other.weight - one.weight);
  const total = keys.reduce((sum, key) => sum + key.weight, row.rest ?? 0);
  fillTable(position, keys, total, view);
  showMass(keys, row, total, view);
  byId("row-summary").textContent = summary(position, keys, row, total, view);
}

// Brings a token into view, without moving the page.
export function scrollToToken(position) {
  const [span, box] = [spans[position], textBox].map((each) => each.getBoundingClientRect());
  if (span.top < box.top || span.bottom > box.bottom) textBox.scrollTop += span.top - box.top - box.height / 2;
}

const tableRows = []; // which get other words with each row that is shown, since new ones would take longer

function tableRow(place) {
  const cell = (_, column) => element("td", { class: column === 1 && "token" }, "–");
  tableRows[place] ??= element("tr", {}, ...Array.from({ length: 6 }, cell));
  return tableRows[place];
}

const kind = (key) => (key.level === CAPPED ? "■ capped" : "● free");

function fillTable(position, keys, total, view) {
  byId("row-caption").textContent =
    view === "readers" ? `who reads ${position} “${quoted(position)}”` : `what ${position} “${quoted(position)}” reads`;
  keys.slice(0, ROWS).forEach((key, place) => {
    const row = tableRow(place);
    row.className = key.level === CAPPED ? "capped" : "free";
    const texts = [
      key.position < 0 ? "∅" : String(key.position),
      quoted(key.position),
      key.position < 0 ? "–" : String(Math.abs(position - key.position)),
      short(key.weight),
      view === "readers" ? "–" : percent(key.weight / total),
      kind(key),
    ];
    texts.forEach((text, column) => (row.cells[column].firstChild.data = text));
  });
  tableBody.append(...tableRows.slice(0, keys.length).filter((row) => !row.isConnected));
  for (const row of tableRows.slice(keys.length)) row.remove();
}

// The mass of a row as a bar: capped, free, and the rest that the page does not hold.
function showMass(keys, row, total, view) {
  const bar = byId("row-mass");
  bar.hidden = view === "readers";
  if (bar.hidden) return;
  const capped = keys.filter((key) => key.level === CAPPED).reduce((sum, key) => sum + key.weight, 0) / total;
  const rest = row.rest / total;
  const shares = { capped, free: Math.max(0, 1 - capped - rest), rest };
  for (const [name, share] of Object.entries(shares)) {
    const part = bar.querySelector(`.${name}`);
    part.style.flexGrow = share;
    part.hidden = share < 0.0005;
    part.textContent = share > 0.12 ? `${name} ${percent(share)}` : "";
    part.title = `${name}: ${percent(share)} of the mass`;
  }
}

function summary(position, keys, row, total, view) {
  const token = `token ${position} “${quoted(position)}”`;
  if (!keys.length) return view === "readers" ? `No kept row reads ${token}.` : `No key of ${token} is kept.`;
  const named = keys.slice(0, SPOKEN).map((key) => {
    const which = `${key.position < 0 ? "" : `${key.position} `}“${quoted(key.position)}”`;
    return `${which} ${short(key.weight)}${key.level === CAPPED ? " capped" : ""}`;
  });
  const most = `${named.join(", ")}${keys.length > SPOKEN ? ", …" : ""}`;
  if (view === "readers")
    return `${counted(keys.length, "query", "queries")} of ${T - position} read ${token}: ${most}`;
  const capped = keys.filter((key) => key.level === CAPPED).length;
  const figures = [`${capped} of them capped`];
  if (row.k !== null) figures.push(`k = ${short(row.k)}`);
  if (row.approximate) figures.push("approximate");
  if (row.rest / total >= 0.0005) figures.push(`${percent(row.rest / total)} of the mass on other keys`);
  return `${token} reads ${counted(keys.length, "kept key")} (${figures.join(", ")}): ${most}`;
}

export function rowTable(position, row, view) {
  const rows = row.keys.map((key) => [
    ...(view === "readers" ? [key.position, position] : [position, key.position]),
    key.position < 0 ? "" : report.labels[key.position],
    key.position < 0 ? "" : Math.abs(position - key.position),
    key.weight.toPrecision(4),
    key.level === CAPPED ? 1 : 0,
  ]);
  return [["query", "key", "token", "distance", "weight", "capped"], rows];
}
