// The map of a head: queries down, keys across, one pixel for each or for a block of them, which shows its maximum.

import { frame, image, text } from "./charts.js";
import { byId, svgElement, widthOf } from "./dom.js";
import { standalone } from "./download.js";
import { levelOf, T } from "./store.js";
import { CAPPED, palette, weightColours } from "./theme.js";

const canvas = byId("map");
const frameOfMap = byId("map-frame");
const [lineOfQuery, lineOfKey] = ["map-query", "map-key"].map(byId);

const frameWidth = widthOf(frameOfMap, () => mapped && drawMap(mapped));
let mapped = null; // HeadRows of the head that is drawn
let surface = { side: 0 }; // what a map is drawn on, the same for all heads

// A level for each pixel, the pixels, and the place of each position among them.
function surfaceOf(side) {
  if (surface.side !== side) {
    canvas.width = canvas.height = side;
    const place = Int32Array.from({ length: T }, (_, position) => Math.floor((position * side) / T));
    surface = { side, levels: new Uint8Array(side * side), picture: new ImageData(side, side), place };
  }
  surface.levels.fill(0);
  return surface;
}

// Draws `rows` (HeadRows). Where several rows and keys share a pixel, the largest weight of them counts.
export function drawMap(rows) {
  mapped = rows;
  const room = Math.floor(frameWidth() * devicePixelRatio) || T;
  const { side, levels, picture, place } = surfaceOf(Math.min(T, room));
  for (let query = 0; query < T; query++) {
    const start = place[query] * side;
    for (let entry = rows.starts[query]; entry < rows.starts[query + 1]; entry++) {
      const key = rows.keys[entry];
      if (key < 0) continue; // A null key is no position of the text.
      const at = start + place[key];
      if (rows.levels[entry] >= levels[at]) levels[at] = Math.max(rows.levels[entry], 1);
    }
  }
  const colours = weightColours().pixels;
  const pixels = new Uint32Array(picture.data.buffer);
  for (let at = 0; at < pixels.length; at++) pixels[at] = colours[levels[at]];
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

// Where the pointer is: {query, key}.
export function placeOf(event) {
  const box = canvas.getBoundingClientRect();
  // A click has whole pixels where a move has parts of them, and both shall mean the same place.
  const position = (at, start, size) => Math.min(T - 1, Math.max(0, Math.floor((T * (Math.floor(at) - start)) / size)));
  return { query: position(event.clientY, box.top, box.height), key: position(event.clientX, box.left, box.width) };
}

// The lines of the query that is shown, and of the key, if any.
export function markMap(query, key = null) {
  lineOfQuery.hidden = query === null;
  lineOfKey.hidden = key === null;
  if (query !== null) lineOfQuery.style.top = `${(100 * (query + 0.5)) / T}%`;
  if (key !== null) lineOfKey.style.left = `${(100 * (key + 0.5)) / T}%`;
}

export function mapSvg(title) {
  const [size, left, top] = [480, 56, 28];
  const { ink, quiet, line } = palette();
  const drawing = frame(left + size + 12, top + size + 84, title);
  drawing.append(text(title, left, 18, ink), image(canvas, left, top, size));
  drawing.append(svgElement("rect", { x: left, y: top, width: size, height: size, fill: "none", stroke: line }));
  for (let step = 0; step <= 4; step++) {
    const at = Math.min(T - 1, Math.round((T * step) / 4));
    const place = ((at + 0.5) * size) / T;
    drawing.append(text(String(at), left - 5, top + place + 4, quiet, "end"));
    drawing.append(text(String(at), left + place, top + size + 14, quiet, "middle"));
  }
  drawing.append(text("key", left + size / 2, top + size + 30, ink, "middle"));
  drawing.append(text("query", 14, top + size / 2, ink, "middle", -90));
  drawing.append(...scaleOfMap(left, top + size + 46));
  return standalone(drawing);
}

// The colours of free weights, on a log scale, and that of capped ones.
function scaleOfMap(left, y) {
  const { ink, quiet } = palette();
  const { css } = weightColours();
  const [wide, levels] = [240, CAPPED - 1];
  const at = (level) => left + (wide * (level - 1)) / levels;
  const parts = [];
  for (let level = 1; level < CAPPED; level++) {
    parts.push(svgElement("rect", { x: at(level), y, width: wide / levels + 0.5, height: 10, fill: css[level] }));
  }
  for (const weight of [0.001, 0.01, 0.1, 1]) {
    parts.push(text(String(weight), at(levelOf(weight)), y + 24, quiet, "middle"));
  }
  const capped = { x: left + wide + 70, y, width: 10, height: 10, fill: css[CAPPED], stroke: ink };
  parts.push(text("λ, free", left + wide + 12, y + 9, ink), svgElement("rect", capped));
  parts.push(text("λ = 1, capped", left + wide + 88, y + 9, ink));
  return parts;
}
