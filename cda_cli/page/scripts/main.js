// The page: one state, what draws it, and the keyboard.

import { byId } from "./dom.js";
import { drawGrid, drawSheet, focusHead, markHead, neighbour, openGrid } from "./grid.js";
import { openHeadPanel, query, redrawHead, showHead, showQuery } from "./head.js";
import { drawOverview, openOverview } from "./overview.js";
import { onChange, readAddress, state, update } from "./state.js";
import { heads, measures, report, T } from "./store.js";
import { chooseTheme, onThemeChange } from "./theme.js";

const help = byId("help");

function draw(before) {
  if (["by", "order", "show"].some((name) => state[name] !== before[name])) drawGrid();
  const open = state.head !== null;
  byId("head").hidden = !open;
  byId("overview").hidden = open;
  if (state.head !== before.head) {
    markHead();
    if (open) showHead();
  } else if (open) {
    if (state.by !== before.by) redrawHead();
    else if (["query", "view", "eps", "k"].some((name) => state[name] !== before[name])) showQuery();
  }
  if (open && before.head === null && byId("head").getBoundingClientRect().top > innerHeight * 0.6) {
    byId("head").scrollIntoView({ block: "start" });
  }
}

// What the address says, without what is not there.
function fromAddress() {
  const found = readAddress();
  if (!heads.has(found.head)) found.head = null;
  if (!(found.eps > 0)) found.eps = null;
  if (!(found.k > 0)) found.k = null;
  if (!measures.includes(found.by)) delete found.by;
  if (found.query !== null) found.query = Math.min(Math.max(Math.round(found.query), 0), T - 1);
  return found;
}

function redrawAll() {
  drawSheet();
  drawOverview();
  redrawHead();
}

let matches = []; // where the text that was looked for stands
function find(text, backwards) {
  const places = [];
  let joined = "";
  report.labels.slice(0, T).forEach((label) => {
    places.push(joined.length);
    joined += label;
  });
  matches = [];
  const [where, what] = [joined.toLowerCase(), text.toLowerCase()];
  for (let at = where.indexOf(what); what && at >= 0; at = where.indexOf(what, at + 1)) {
    const last = at + what.length - 1;
    matches.push(places.findLastIndex((place) => place <= last));
  }
  byId("found").textContent = text ? `${matches.length} found` : "";
  if (!matches.length) return;
  const after = matches.find((position) => position > query()) ?? matches[0];
  const earlier = matches.findLast((position) => position < query()) ?? matches.at(-1);
  update({ query: backwards ? earlier : after });
}

const KEYS = {
  "[": () => update({ query: Math.max(0, query() - 1) }),
  "]": () => update({ query: Math.min(T - 1, query() + 1) }),
  r: () => update({ view: state.view === "keys" ? "readers" : "keys" }),
  n: () => update({ show: state.show === "weights" ? "numbers" : "weights" }),
  "?": () => (help.open ? help.close() : help.showModal()),
  Escape: () => close(),
  "/": () => {
    if (state.head === null) update({ head: [...heads.keys()][0] });
    byId("find").focus();
    byId("find").select();
  },
};

function close() {
  const name = state.head;
  update({ head: null });
  if (name !== null) focusHead(name);
}

function walk(event) {
  const inText = event.target.closest?.("#text");
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (inText && step) return update({ query: Math.min(T - 1, Math.max(0, query() + step)) });
  if (inText) return false; // Up and down scroll the text.
  const focused = document.activeElement.dataset?.head;
  if (state.head === null && !focused) return false;
  const next = neighbour(state.head ?? focused, event.key);
  if (next === null) return undefined;
  if (state.head === null || focused) focusHead(next);
  if (state.head !== null) update({ head: next });
  return undefined;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  if (event.target.matches("input, select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const act = event.key.startsWith("Arrow") ? walk : KEYS[event.key];
  if (!act || (event.target.closest(".table") && act === walk)) return;
  if (act(event) !== false) event.preventDefault();
}

async function start() {
  Object.assign(state, fromAddress());
  await openGrid();
  openOverview();
  openHeadPanel();
  draw({ ...state, head: null });
  onChange(draw);
  addEventListener("hashchange", () => update(fromAddress()));
  addEventListener("resize", redrawHead);
  addEventListener("keydown", onKey);
  onThemeChange(redrawAll);
  byId("theme").addEventListener("change", (event) => {
    chooseTheme(event.target.value);
    redrawAll();
  });
  byId("find").addEventListener(
    "keydown",
    (event) => event.key === "Enter" && find(event.target.value, event.shiftKey),
  );
  for (const [id, key] of Object.entries({ back: "Escape", "show-help": "?", earlier: "[", later: "]" })) {
    byId(id).addEventListener("click", () => KEYS[key]());
  }
  document.documentElement.dataset.ready = "";
}

start();
