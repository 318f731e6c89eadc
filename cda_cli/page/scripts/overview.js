// What the report says of the whole model: loss against keys where that was measured, and the layers.

import { barChart, legend, lineChart } from "./charts.js";
import { byId, element, percent, short, widthOf } from "./dom.js";
import { exportButtons, standalone } from "./download.js";
import { measures, report } from "./store.js";

const LINEAR_BELOW = 0.01; // bits per byte, as in cda_cli/scales.py
const box = byId("curve");
const curveWidth = widthOf(box, drawOverview);

// A line for each choice of keys: {name, points}.
function lines() {
  const found = new Map();
  for (const cut of report.causal?.cuts ?? []) {
    const name = cut.drops ? `${cut.choice}, the rest dropped` : cut.choice;
    if (!found.has(name)) found.set(name, { name, points: [] });
    const [low, high] = cut.difference_interval;
    found.get(name).points.push({ x: cut.keys, y: cut.difference, low, high });
  }
  for (const line of found.values()) line.points.sort((one, other) => one.x - other.x);
  return [...found.values()];
}

const restNames = measures.filter((name) => /^rest_\d+$/.test(name));
const meanRest = (name) => report.heads.reduce((sum, head) => sum + head[name], 0) / report.heads.length;

export function openOverview() {
  byId("curve-tools").append(
    exportButtons(
      () => (lines().length ? "loss-by-keys" : "mass-left-out"),
      () => standalone(box.querySelector("svg")),
      curveTable,
    ),
  );
}

export function drawOverview() {
  const width = Math.max(280, Math.min(curveWidth(), 760));
  const height = Math.round(Math.min(360, width * 0.62));
  const found = lines();
  if (found.length) {
    byId("curve-title").textContent = "Loss against keys kept";
    const label = found
      .map((line) => `${line.name}: ${line.points.map((point) => `${point.x} keys ${short(point.y)}`).join(", ")}`)
      .join("; ");
    const axes = { xLabel: "keys kept for each query", yLabel: "bits per byte above all keys" };
    box.replaceChildren(
      lineChart({ width, height, lines: found, linear: LINEAR_BELOW, label, ...axes }),
      legend(found),
    );
  } else {
    byId("curve-title").textContent = "Mass that the largest keys leave out";
    const values = restNames.map(meanRest);
    const label = restNames
      .map((name, index) => `${name.slice(5)} keys leave out ${percent(values[index])}`)
      .join(", ");
    const labels = restNames.map((name) => name.slice(5));
    const hint = "How the loss depends on the keys was not measured: cda inspect-sparsity --causal does so.";
    const chart = barChart({
      width,
      height,
      labels,
      values,
      xLabel: "largest keys of each query",
      format: percent,
      label,
    });
    box.replaceChildren(chart, element("p", { class: "hint" }, hint));
  }
}

function curveTable() {
  const found = lines();
  if (!found.length) return [["keys", "mass_left_out"], restNames.map((name) => [name.slice(5), meanRest(name)])];
  const rows = found.flatMap((line) =>
    line.points.map((point) => [line.name, point.x, point.y, point.low, point.high]),
  );
  return [["choice", "keys", "difference", "difference_lo", "difference_hi"], rows];
}
