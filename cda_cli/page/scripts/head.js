// The panel of a head: its map, its measures by position, its distances, its ablation, and a row of it.

import { barChart } from "./charts.js";
import { byId, element, painted, percent, short, widthOf, words } from "./dom.js";
import { exportButtons } from "./download.js";
import { neighbours } from "./grid.js";
import { isChanged, isLive, liveHead, openLive, showLive } from "./live.js";
import { drawMap, mapSvg, markMap, placeOf } from "./map.js";
import { state, update } from "./state.js";
import { heads, measures, report, rowsOf, T } from "./store.js";
import { openText, rowTable, scrollToToken, showRow } from "./text.js";

const FACTS = [
  "sparsity_k",
  "effective_support",
  "keys_95",
  "capped_share",
  "gate_equivalent",
  "sink_mass",
  "median_distance",
];

const LOOK = 400; // milliseconds without which the next head would be opened while others are unpacked
const whenIdle = window.requestIdleCallback ?? setTimeout; // which Safari lacks

let rows = null; // HeadRows of the head that is open
let live = null; // its LiveHead, if it has one
let drawn = { position: 0, row: { keys: [], k: null, rest: 0 }, view: "keys" };
const chartsWidth = widthOf(byId("head-charts"), () => rows && state.head !== null && drawCharts());

export function openHeadPanel() {
  openText(preview, (position) => update({ query: position }));
  const frameOfMap = byId("map-frame");
  frameOfMap.addEventListener("pointermove", (event) => {
    const place = placeOf(event);
    if (place.key <= place.query) preview(place.query, event.altKey, place.key);
  });
  frameOfMap.addEventListener("pointerleave", () => preview(null, false));
  frameOfMap.addEventListener("click", (event) => update({ query: placeOf(event).query }));
  openLive();
  byId("view").addEventListener("change", () => update({ view: byId("view").value }));
  byId("map-tools").append(
    exportButtons(
      () => `head-${state.head}-query-${drawn.position}`,
      () => mapSvg(`Head ${state.head}`),
      () => rowTable(drawn.position, drawn.row, drawn.view),
    ),
  );
}

export const query = () => Math.min(state.query ?? T - 1, T - 1);

// Opens the head that the address names: in one frame its map, which is looked at first, and in the next one the rest.
// Then it gets the neighbours ready.
export async function showHead() {
  const name = state.head;
  byId("head").setAttribute("aria-busy", "true");
  const found = await Promise.all([rowsOf(name), isLive(name) ? liveHead(name) : null]);
  if (state.head !== name) return; // Another head was opened meanwhile.
  [rows, live] = found;
  showFacts(name);
  showMap();
  await painted();
  if (state.head !== name) return;
  drawCharts();
  showQuery();
  byId("head").setAttribute("aria-busy", "false");
  unpackAhead(name);
}

// Unpacks the heads that are probably next, one at a time, while nothing else is to do and this one is looked at.
async function unpackAhead(name) {
  await new Promise((done) => setTimeout(done, LOOK));
  for (const next of neighbours(name)) {
    await new Promise((done) => whenIdle(done));
    if (state.head !== name) return;
    await rowsOf(next);
  }
}

function showFacts(name) {
  const head = heads.get(name);
  byId("head-name").textContent = `Head ${name}`;
  byId("head-reads").textContent = head.reads ? `reads: ${head.reads}` : "";
  byId("head-facts").replaceChildren(
    ...FACTS.filter((fact) => measures.includes(fact)).map((fact) =>
      pair(words(fact), short(head[fact]), report.meanings[fact]),
    ),
    ...ablation(name),
  );
}

export function redrawHead() {
  if (!rows || state.head === null) return;
  showMap();
  drawCharts();
  showQuery();
}

function showMap() {
  drawMap(rows);
  byId("map").setAttribute("aria-label", mapSummary(heads.get(state.head)));
}

// The row that the address names.
export function showQuery() {
  if (!rows) return;
  byId("view").value = state.view;
  showLive(rows.row(query()).k);
  drawRow(query(), state.view);
  scrollToToken(query());
}

function drawRow(position, view, key = null) {
  const row = rowAt(position, view);
  drawn = { position, row, view };
  showRow(position, row, view);
  if (view === "readers") markMap(null, position);
  else markMap(position, key);
}

// A row as the model has it, or as the sliders say. Who reads a token is known of the model alone.
function rowAt(position, view) {
  if (view === "readers") return rows.readers(position);
  const own = rows.row(position);
  return live && isChanged() ? live.row(position, state.eps ?? report.eps, state.k ?? own.k) : own;
}

let waiting = null; // what the next frame shows, so that a fast pointer costs one row a frame

// Shows a row while the pointer is on it; Alt swaps what it reads and who reads it.
function preview(position, alt, key = null) {
  if (!rows) return;
  if (waiting === null) {
    requestAnimationFrame(() => {
      const [at, view, column] = waiting;
      waiting = null;
      drawRow(at, view, column);
    });
  }
  const other = state.view === "keys" ? "readers" : "keys";
  waiting = position === null ? [query(), state.view, null] : [position, alt ? other : state.view, key];
}

function mapSummary(head) {
  const caps = `, ${percent(head.capped_share)} of the budget in capped keys`;
  const reads = head.reads ? `; reads mostly ${head.reads} keys` : "";
  return (
    `Map of the weights of head ${state.head}, queries down and keys across: 95% of the mass of a row on ` +
    `${short(head.keys_95)} keys, half of it within ${short(head.median_distance)} tokens` +
    `${measures.includes("capped_share") ? caps : ""}${reads}.`
  );
}

const rangeLabel = ([first, last]) => (first === last ? String(first) : `${first}–${last}`);

function charts() {
  const head = heads.get(state.head);
  const values = head.by_position[state.by] ?? head.by_position.effective_support;
  const name = state.by in head.by_position ? state.by : "effective_support";
  const labels = (of) => of.map((_, index) => rangeLabel(report.ranges[index]));
  return [
    { title: `${words(name)} by position`, values, labels: labels(values), xLabel: "position of the query" },
    {
      title: "mass by distance",
      values: head.distance_mass,
      labels: labels(head.distance_mass),
      xLabel: "tokens back",
      format: percent,
    },
  ];
}

function drawCharts() {
  const across = chartsWidth() > 540 ? 2 : 1;
  const width = Math.max(220, Math.floor(chartsWidth() / across) - 14);
  const made = charts().map((chart) => {
    const said = chart.values.map((value, index) => `${chart.labels[index]} ${(chart.format ?? short)(value)}`);
    const picture = barChart({ ...chart, width, height: 150, label: `${chart.title}: ${said.join(", ")}` });
    return element("figure", {}, element("figcaption", {}, chart.title), picture);
  });
  byId("head-charts").replaceChildren(...made);
}

// What the loss is without the head, where that was measured.
function ablation(name) {
  const found = report.causal?.ablations?.find((each) => `${each.layer}.${each.head}` === name);
  if (!found) return [];
  const [low, high] = found.difference_interval.map(short);
  return [
    pair("loss without it", `${short(found.difference)} (${low} to ${high})`, report.meanings.ablation_difference),
  ];
}

const pair = (name, value, title) => element("div", { title }, element("dt", {}, name), element("dd", {}, value));
