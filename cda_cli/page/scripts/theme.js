// Colours, light and dark. Canvases and charts take them from here, and the style sheet has the same ones.

const LIGHT = {
  ink: "#17181c",
  quiet: "#5b5f68",
  line: "#d5d8de",
  paper: "#ffffff",
  free: ["#ffffff", "#dce9f6", "#9ecae1", "#4292c6", "#08519c", "#062a5c"],
  capped: "#d55e00",
  measure: ["#f3ecd2", "#c9bd8c", "#8a8779", "#4f5f7f", "#00336f"],
  series: ["#0072b2", "#c24e00", "#00795a", "#a8478a", "#8f6400", "#2b7fa8", "#17181c"],
};
const DARK = {
  ink: "#e9eaee",
  quiet: "#a5a9b3",
  line: "#3b3f49",
  paper: "#15171c",
  free: ["#15171c", "#16304f", "#1f5a94", "#3f8fd0", "#8cc4f0", "#e6f3ff"],
  capped: "#ff9c42",
  measure: ["#1c2638", "#3a4f78", "#777a80", "#b9ac72", "#ffe873"],
  series: ["#56b4e9", "#ff9c42", "#2fc79a", "#e593c4", "#e8c34a", "#9fd8f5", "#e9eaee"],
};
export const CAPPED = 255; // the level of a weight that is exactly 1

const system = matchMedia("(prefers-color-scheme: dark)");
let chosen = "auto"; // or "light" or "dark"

const isDark = () => (chosen === "auto" ? system.matches : chosen === "dark");
export const palette = () => (isDark() ? DARK : LIGHT);

export function chooseTheme(name) {
  chosen = name;
  document.documentElement.style.colorScheme = name === "auto" ? "light dark" : name;
}

export function onThemeChange(listener) {
  system.addEventListener("change", listener);
}

function channels(colour) {
  return [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
}

function mixed(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const below = Math.min(Math.floor(place), stops.length - 2);
  const [one, other] = [channels(stops[below]), channels(stops[below + 1])];
  return one.map((value, index) => Math.round(value + (other[index] - value) * (place - below)));
}

// The colour of a figure that lies at `share` between the lowest and the highest.
export const measureColour = (share) => `rgb(${mixed(palette().measure, share).join(" ")})`;

// Black or white, whichever reads better on a colour of `measureColour`.
export const inkOn = (share) => readableOn(mixed(palette().measure, share));

// By the relative luminance of WCAG 2: at 0.179 black and white have the same contrast.
function readableOn(colour) {
  const [red, green, blue] = colour.map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "#000" : "#fff";
}

const tables = new Map(); // what weightColours made, by whether it is dark

// The colours of all levels of weights: one pixel each as ImageData has them, and as CSS. Level 0 is the paper.
export function weightColours() {
  const dark = isDark();
  if (!tables.has(dark)) tables.set(dark, tabulated(palette()));
  return tables.get(dark);
}

function tabulated({ free, capped }) {
  const colours = Array.from({ length: 256 }, (_, level) =>
    level === CAPPED ? channels(capped) : mixed(free, level / 254),
  );
  const pixels = new Uint8ClampedArray(256 * 4);
  colours.forEach((colour, level) => pixels.set([...colour, 255], 4 * level));
  const css = colours.map((colour) => `rgb(${colour.join(" ")})`);
  const inks = colours.map(readableOn);
  return { pixels: new Uint32Array(pixels.buffer), css, inks };
}
