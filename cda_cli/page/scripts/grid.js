// The grid of all heads: layers down, heads across, or sorted by a measure.

import { frame, image, text } from "./charts.js";
import { byId, element, short, svgElement, tiny, words } from "./dom.js";
import { exportButtons, standalone } from "./download.js";
import { state, update } from "./state.js";
import { heads, inflate, measures, report } from "./store.js";
import { inkOn, measureColour, palette, weightColours } from "./theme.js";

const grid = byId("grid");
const across = new Set(report.heads.map((head) => head.head));
let thumbnails = null; // the bytes of all of them, one after another
let sheet = null; // a canvas with all of them
const sheetStyle = new CSSStyleSheet();
document.adoptedStyleSheets.push(sheetStyle);
let shown = []; // names of heads in the order of the grid

export async function openGrid() {
  thumbnails = await inflate("thumbnails");
  const by = byId("by");
  by.append(...measures.map((name) => element("option", { value: name }, name)));
  by.addEventListener("change", () => update({ by: by.value }));
  for (const id of ["order", "show"])
    byId(id).addEventListener("change", (event) => update({ [id]: event.target.value }));
  grid.addEventListener("click", (event) => choose(event.target.closest("[data-head]")));
  grid.addEventListener("keydown", (event) => event.key === "Enter" && choose(event.target.closest("[data-head]")));
  byId("heads-tools").append(exportButtons(() => `heads-${state.by}`, gridSvg, gridTable));
  drawSheet();
}

// Draws what depends on the theme, and then the grid.
export function drawSheet() {
  sheet = drawThumbnails();
  // A rule holds the picture once; a custom property would copy it into the style of every cell.
  const size = `${100 * sheetWidth}% ${(100 * sheet.height) / SIDE}%`;
  const picture = `background-image: url(${sheet.toDataURL()}); background-size: ${size}`;
  sheetStyle.replaceSync(`#grid [role="gridcell"] span { ${picture} }`);
  drawGrid();
}

function choose(cell) {
  if (cell) update({ head: cell.dataset.head });
}

function ordered() {
  const all = [...heads.keys()];
  if (state.order === "layer") return all;
  const figure = (name) => heads.get(name)[state.by] ?? NaN;
  const sign = state.order === "down" ? -1 : 1;
  // What has no value comes last, whichever way the rest is sorted.
  return all.sort((one, other) => {
    const [left, right] = [figure(one), figure(other)];
    if (Number.isNaN(left) || Number.isNaN(right)) return Number.isNaN(left) - Number.isNaN(right);
    return sign * (left - right);
  });
}

// Where the figure of each head lies from the lowest to the highest, 0 to 1; NaN where it has none.
function scale() {
  const figures = [...heads.values()].map((head) => head[state.by]).filter(Number.isFinite);
  const [low, high] = [Math.min(...figures), Math.max(...figures)];
  const share = (head) => (Number.isFinite(head[state.by]) ? (head[state.by] - low) / (high - low || 1) : NaN);
  return { low, high, share };
}

export function drawGrid() {
  byId("by").value = state.by;
  byId("order").value = state.order;
  byId("show").value = state.show;
  byId("meaning").textContent = report.meanings[state.by];
  const focused = document.activeElement?.dataset?.head;
  const { low, high, share } = scale();
  const columns = [...across];
  const sorted = state.order !== "layer";
  shown = ordered();
  grid.style.setProperty("--columns", columns.length);
  grid.setAttribute("aria-colcount", columns.length + 1);
  grid.dataset.sorted = sorted;
  const rows = [];
  if (!sorted) {
    const headings = columns.map((head) => element("span", { role: "columnheader" }, String(head)));
    rows.push(element("div", { role: "row" }, element("span", { role: "columnheader" }, "layer"), ...headings));
  }
  for (let start = 0; start < shown.length; start += columns.length) {
    const names = shown.slice(start, start + columns.length);
    const heading = sorted ? String(start + 1) : String(heads.get(names[0]).layer);
    const cells = names.map((name) => drawCell(name, share(heads.get(name))));
    rows.push(element("div", { role: "row" }, element("span", { role: "rowheader" }, heading), ...cells));
  }
  grid.replaceChildren(...rows);
  byId("scale-low").textContent = short(low);
  byId("scale-high").textContent = short(high);
  const stops = Array.from({ length: 9 }, (_, step) => measureColour(step / 8));
  byId("scale-bar").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  markHead();
  if (focused) cellOf(focused)?.focus();
}

function drawCell(name, share) {
  const head = heads.get(name);
  const figure = short(head[state.by]);
  const label = `head ${name}, ${words(state.by)} ${figure}`;
  const cell = element("div", { role: "gridcell", "data-head": name, tabindex: -1, "aria-label": label, title: label });
  if (state.show === "numbers") {
    cell.dataset.figure = tiny(head[state.by]); // which the style sheet shows
    cell.style.background = Number.isNaN(share) ? "" : measureColour(share);
    cell.style.color = Number.isNaN(share) ? "" : inkOn(share);
  } else {
    const bar = element("i");
    bar.style.width = Number.isNaN(share) ? "0" : `${4 + 96 * share}%`;
    bar.style.background = Number.isNaN(share) ? "" : measureColour(0.25 + 0.75 * share);
    cell.append(thumbnail(name), bar);
  }
  return cell;
}

// All thumbnails are one picture, of which each cell shows a part: 144 canvases would be drawn anew at every click.
function drawThumbnails() {
  const colours = weightColours().pixels;
  const names = [...heads.keys()];
  const picture = element("canvas", { width: SIDE * sheetWidth, height: SIDE * Math.ceil(names.length / sheetWidth) });
  const context = picture.getContext("2d");
  const part = new ImageData(SIDE, SIDE);
  const pixels = new Uint32Array(part.data.buffer);
  for (let number = 0; number < names.length; number++) {
    const start = number * SIDE * SIDE;
    for (let at = 0; at < pixels.length; at++) pixels[at] = colours[thumbnails[start + at]];
    context.putImageData(part, ...placeInSheet(number));
  }
  return picture;
}

const SIDE = report.rows.thumbnail_side;
const sheetWidth = Math.ceil(Math.sqrt(heads.size)); // in thumbnails
const placeInSheet = (number) => [SIDE * (number % sheetWidth), SIDE * Math.floor(number / sheetWidth)];

function thumbnail(name) {
  const [x, y] = placeInSheet([...heads.keys()].indexOf(name));
  const part = element("span");
  const share = (at, size) => (size > SIDE ? (100 * at) / (size - SIDE) : 0);
  part.style.backgroundPosition = `${share(x, sheet.width)}% ${share(y, sheet.height)}%`;
  return part;
}

// One thumbnail alone, for a figure.
function thumbnailCanvas(name) {
  const canvas = element("canvas", { width: SIDE, height: SIDE });
  const place = placeInSheet([...heads.keys()].indexOf(name));
  canvas.getContext("2d").drawImage(sheet, ...place, SIDE, SIDE, 0, 0, SIDE, SIDE);
  return canvas;
}

const cellOf = (name) => grid.querySelector(`[data-head="${CSS.escape(name)}"]`);

// Marks the head that is open. It, or else the first, is the one tab stop of the grid.
export function markHead() {
  const stop = state.head ?? shown[0];
  for (const cell of grid.querySelectorAll("[data-head]")) {
    const [selected, tabIndex] = [String(cell.dataset.head === state.head), cell.dataset.head === stop ? 0 : -1];
    if (cell.getAttribute("aria-selected") !== selected) cell.setAttribute("aria-selected", selected);
    if (cell.tabIndex !== tabIndex) cell.tabIndex = tabIndex;
  }
}

// The head that an arrow key leads to from `name`, or null at the edge.
export function neighbour(name, key) {
  const place = shown.indexOf(name ?? shown[0]);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across.size, ArrowDown: across.size }[key];
  return shown[place + step] ?? null;
}

// Heads that are probably next: those beside `name`.
export const neighbours = (name) =>
  ["ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp"].map((key) => neighbour(name, key)).filter(Boolean);

export function focusHead(name) {
  const cell = cellOf(name);
  for (const each of grid.querySelectorAll("[data-head]")) each.tabIndex = each === cell ? 0 : -1;
  cell?.focus();
}

function gridTable() {
  const rows = [...heads.values()].map((head) => [head.layer, head.head, ...measures.map((name) => head[name])]);
  return [["layer", "head", ...measures], rows];
}

// The grid as a figure: a picture of each head in its place, with the measure as a bar under it.
function gridSvg() {
  const [size, edge, top] = [48, 30, 34];
  const { ink } = palette();
  const { share } = scale();
  const sorted = state.order !== "layer";
  const title = `${words(state.by)}: ${sorted ? "sorted" : "layers down, heads across"}`;
  const drawing = frame(
    Math.max(size * across.size + edge, 300),
    size * Math.ceil(shown.length / across.size) + top,
    title,
  );
  drawing.append(text(title, 4, 16, ink));
  shown.forEach((name, place) => {
    const [x, y] = [edge + size * (place % across.size), top + size * Math.floor(place / across.size)];
    const fraction = share(heads.get(name));
    const hasFigure = !Number.isNaN(fraction);
    if (state.show === "numbers") {
      const fill = hasFigure ? measureColour(fraction) : "none";
      drawing.append(svgElement("rect", { x, y, width: size - 3, height: size - 3, fill }));
      drawing.append(text(tiny(heads.get(name)[state.by]), x + 4, y + 28, hasFigure ? inkOn(fraction) : ink));
    } else {
      const bar = { x, y: y + size - 7, width: (size - 8) * (hasFigure ? fraction : 0), height: 4 };
      drawing.append(image(thumbnailCanvas(name), x, y, size - 9));
      drawing.append(svgElement("rect", { ...bar, fill: measureColour(0.25 + 0.75 * (hasFigure ? fraction : 0)) }));
    }
    if (sorted) drawing.append(text(name, x + 2, y + 10, ink));
    else if (place % across.size === 0) drawing.append(text(String(heads.get(name).layer), 8, y + 26, ink));
  });
  return standalone(drawing);
}
