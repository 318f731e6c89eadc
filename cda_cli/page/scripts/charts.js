// Charts of a few points, as SVG. Every chart has a table of the same figures beside it or as CSV.

import { element, short, svgElement } from "./dom.js";
import { palette } from "./theme.js";

const EDGE = { left: 60, right: 12, top: 10, bottom: 38 };
const MARKERS = ["circle", "square", "triangle", "diamond", "plus", "cross", "star"];

// Loss against keys, or any other lines over numbers that double. A line is {name, points: [{x, y, low, high}]}. The y
// axis is linear up to `linear`, on either side of 0, and logarithmic beyond; without it, linear from 0.
export function lineChart({ width, height, lines, xLabel, yLabel, linear = null, label }) {
  const { ink, quiet, line, series } = palette();
  const points = lines.flatMap((each) => each.points);
  const xs = [...new Set(points.map((point) => point.x))].sort((one, other) => one - other);
  const ys = points.flatMap((point) => [point.y, point.low ?? point.y, point.high ?? point.y]).filter(Number.isFinite);
  const bend = linear === null ? (y) => y : (y) => Math.sign(y) * Math.log1p(Math.abs(y) / linear);
  const [low, high] = [Math.min(0, ...ys.map(bend)), Math.max(...ys.map(bend), bend(linear ?? 1e-9))];
  const inner = { width: width - EDGE.left - EDGE.right, height: height - EDGE.top - EDGE.bottom };
  const logs = xs.map(Math.log2);
  const spread = logs.at(-1) - logs[0] || 1;
  const toX = (x) => EDGE.left + (inner.width * (Math.log2(x) - logs[0])) / spread;
  const toY = (y) => EDGE.top + (inner.height * (high - bend(y))) / (high - low || 1);
  const drawing = frame(width, height, label);
  for (const y of linear === null ? steps(0, high) : bentSteps(low, high, bend, linear)) {
    drawing.append(
      svgElement("line", {
        x1: EDGE.left,
        x2: width - EDGE.right,
        y1: toY(y),
        y2: toY(y),
        stroke: y === 0 ? quiet : line,
      }),
      text(short(y), EDGE.left - 6, toY(y) + 4, quiet, "end"),
    );
  }
  let free = -Infinity;
  for (const x of xs) {
    if (toX(x) - free < 26) continue;
    free = toX(x);
    drawing.append(text(String(x), toX(x), height - EDGE.bottom + 16, quiet, "middle"));
  }
  lines.forEach((each, number) => {
    const [colour, marker] = [series[number % series.length], MARKERS[number % MARKERS.length]];
    const banded = each.points.filter((point) => Number.isFinite(point.low) && Number.isFinite(point.high));
    if (banded.length > 1) {
      const upper = banded.map((point) => `${toX(point.x)},${toY(point.high)}`);
      const lower = banded.map((point) => `${toX(point.x)},${toY(point.low)}`).reverse();
      drawing.append(svgElement("polygon", { points: [...upper, ...lower].join(" "), fill: colour, opacity: 0.16 }));
    }
    const path = each.points.map((point) => `${toX(point.x)},${toY(point.y)}`).join(" ");
    drawing.append(svgElement("polyline", { points: path, fill: "none", stroke: colour, "stroke-width": 1.6 }));
    for (const point of each.points) {
      const mark = shape(marker, toX(point.x), toY(point.y), colour);
      const interval = Number.isFinite(point.low) ? ` (${short(point.low)} to ${short(point.high)})` : "";
      mark.append(svgElement("title", {}, `${each.name}, ${point.x}: ${short(point.y)}${interval}`));
      drawing.append(mark);
    }
  });
  drawing.append(text(xLabel, EDGE.left + inner.width / 2, height - 6, ink, "middle"));
  drawing.append(text(yLabel, 12, EDGE.top + inner.height / 2, ink, "middle", -90));
  return drawing;
}

// The names of lines with their colours and markers, as a list.
export function legend(lines) {
  const { series } = palette();
  const entries = lines.map((each, number) => {
    const mark = svgElement("svg", { viewBox: "0 0 14 14", width: 14, height: 14, "aria-hidden": "true" });
    mark.append(shape(MARKERS[number % MARKERS.length], 7, 7, series[number % series.length]));
    return element("li", {}, mark, each.name);
  });
  return element("ul", { class: "legend" }, ...entries);
}

// Bars of one figure for each range of positions or distances. `values` may hold null.
export function barChart({ width, height, labels, values, xLabel, format = short, label }) {
  const { ink, quiet, line, series } = palette();
  const high = Math.max(...values.filter(Number.isFinite), 0) || 1;
  const inner = { width: width - EDGE.left - EDGE.right, height: height - EDGE.top - EDGE.bottom };
  const step = inner.width / values.length;
  const drawing = frame(width, height, label);
  for (const y of steps(0, high)) {
    const at = EDGE.top + inner.height * (1 - y / high);
    drawing.append(
      svgElement("line", { x1: EDGE.left, x2: width - EDGE.right, y1: at, y2: at, stroke: line }),
      text(format(y), EDGE.left - 6, at + 4, quiet, "end"),
    );
  }
  let free = -Infinity;
  values.forEach((value, index) => {
    const left = EDGE.left + step * index;
    const tall = Number.isFinite(value) ? Math.max(0, (inner.height * value) / high) : 0;
    const place = { x: left + 1, width: Math.max(step - 2, 1), y: EDGE.top + inner.height - tall, height: tall };
    const bar = svgElement("rect", { ...place, fill: series[0] });
    bar.append(svgElement("title", {}, `${labels[index]}: ${format(value)}`));
    drawing.append(bar);
    const room = 6.2 * labels[index].length + 4;
    if (left + step / 2 - room / 2 >= free) {
      drawing.append(text(labels[index], left + step / 2, height - EDGE.bottom + 16, quiet, "middle"));
      free = left + step / 2 + room / 2;
    }
  });
  drawing.append(text(xLabel, EDGE.left + inner.width / 2, height - 6, ink, "middle"));
  return drawing;
}

export function frame(width, height, label) {
  return svgElement("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, "font-size": 11 });
}

// What a canvas shows, as a square part of an SVG.
export function image(canvas, x, y, size) {
  const place = { x, y, width: size, height: size, preserveAspectRatio: "none" };
  return svgElement("image", { ...place, href: canvas.toDataURL(), "image-rendering": "pixelated" });
}

export function text(content, x, y, fill, anchor = "start", turned = 0) {
  const transform = turned ? `rotate(${turned} ${x} ${y})` : null;
  return svgElement("text", { x, y, fill, "text-anchor": anchor, transform }, content);
}

function shape(marker, x, y, colour) {
  const filled = (points) => svgElement("polygon", { points, fill: colour });
  const stroked = (d) => svgElement("path", { d, stroke: colour, "stroke-width": 2, fill: "none" });
  switch (marker) {
    case "circle":
      return svgElement("circle", { cx: x, cy: y, r: 3.6, fill: colour });
    case "square":
      return svgElement("rect", { x: x - 3.3, y: y - 3.3, width: 6.6, height: 6.6, fill: colour });
    case "triangle":
      return filled(`${x},${y - 4.4} ${x + 4.2},${y + 3.4} ${x - 4.2},${y + 3.4}`);
    case "diamond":
      return filled(`${x},${y - 4.8} ${x + 4.8},${y} ${x},${y + 4.8} ${x - 4.8},${y}`);
    case "plus":
      return stroked(`M${x - 4} ${y}h8M${x} ${y - 4}v8`);
    case "cross":
      return stroked(`M${x - 3.4} ${y - 3.4}l6.8 6.8M${x + 3.4} ${y - 3.4}l-6.8 6.8`);
    default:
      return stroked(`M${x - 4} ${y}h8M${x} ${y - 4}v8M${x - 3} ${y - 3}l6 6M${x + 3} ${y - 3}l-6 6`);
  }
}

// Some three round numbers from `low` to `high`.
function steps(low, high) {
  const rough = (high - low) / 3 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const numbers = [];
  for (let at = Math.ceil(low / step); at * step <= high * 1.0001; at++) numbers.push(at * step);
  return numbers;
}

function bentSteps(low, high, bend, linear) {
  const numbers = [0];
  for (let size = linear; size < 1e6; size *= 10) {
    if (bend(size) <= high) numbers.push(size);
    if (bend(-size) >= low) numbers.push(-size);
  }
  return numbers;
}
