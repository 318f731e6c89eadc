// Copies and downloads: a picture as PNG or SVG, figures as CSV.

import { byId, element, svgElement } from "./dom.js";
import { palette } from "./theme.js";

const SCALE = 2; // pixels of a PNG for each of the screen
const FONT = "system-ui, sans-serif";

function say(message) {
  byId("status").textContent = message;
}

function save(name, content, type) {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
  say(`saved ${name}`);
}

// Fields that hold a comma, a quote or a line break are quoted (RFC 4180).
function csv(header, rows) {
  const field = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [header, ...rows].map((row) => row.map(field).join(",")).join("\r\n") + "\r\n";
}

// A whole SVG file of a chart on the page: with its size, its font and a background.
export function standalone(chart) {
  const copy = chart.cloneNode(true);
  const [, , width, height] = copy.getAttribute("viewBox").split(" ");
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  copy.setAttribute("font-family", FONT);
  copy.prepend(svgElement("rect", { width, height, fill: palette().paper }));
  return new XMLSerializer().serializeToString(copy);
}

async function toPng(svg) {
  const picture = new Image();
  const url = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
  try {
    picture.src = url;
    await picture.decode();
    const canvas = element("canvas", { width: SCALE * picture.width, height: SCALE * picture.height });
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    return await new Promise((done) => canvas.toBlob(done, "image/png"));
  } finally {
    URL.revokeObjectURL(url);
  }
}

// Puts a PNG into the clipboard, or saves it where the browser keeps pages from the clipboard.
async function copyPng(name, svg) {
  const png = await toPng(svg);
  try {
    await navigator.clipboard.write([new ClipboardItem({ "image/png": png })]);
    say(`copied ${name}`);
  } catch {
    save(name, png);
  }
}

// The three buttons of a figure. `figure()` gives its SVG, and `table()` its header and rows.
export function exportButtons(name, figure, table) {
  const file = (ending) => `${name()}.${ending}`;
  const button = (label, title, act) => element("button", { type: "button", title, onclick: act }, label);
  return element(
    "span",
    { class: "exports", role: "group", "aria-label": "copy and save" },
    button("Copy PNG", "Copy the figure as a picture", () => copyPng(file("png"), figure())),
    button("SVG", "Save the figure as SVG", () => save(file("svg"), figure(), "image/svg+xml")),
    button("CSV", "Save its figures as CSV", () => save(file("csv"), csv(...table()), "text/csv")),
  );
}
