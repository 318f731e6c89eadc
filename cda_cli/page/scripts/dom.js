// Elements and numbers.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

// Makes an element. Attributes that start with "on" are listeners; null and false ones are left out.
export function element(name, attributes = {}, ...children) {
  return furnish(document.createElement(name), attributes, children);
}

export function svgElement(name, attributes = {}, ...children) {
  return furnish(document.createElementNS(SVG, name), attributes, children);
}

function furnish(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false || value === undefined) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

// Waits until what was changed so far is on the screen.
export const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));

// A function that gives the width of an element. It is observed: asking the element each time would lay the page out in
// the midst of drawing. What `draw` makes may change the size of the element, so it waits for the next frame.
export function widthOf(node, draw) {
  let width = 0;
  new ResizeObserver(([box]) => {
    if (width === box.contentRect.width) return;
    width = box.contentRect.width;
    if (width) requestAnimationFrame(draw);
  }).observe(node);
  return () => (width ||= node.clientWidth);
}

// Three significant digits, and a dash for what has no value.
export function short(number) {
  if (number === null || number === undefined || !Number.isFinite(number)) return "–";
  if (number === 0) return "0";
  if (Math.abs(number) < 0.001) return number.toExponential(1).replace("-", "−");
  const digits = Math.abs(number) >= 100 ? 0 : Math.abs(number) >= 10 ? 1 : Math.abs(number) >= 1 ? 2 : 3;
  return number.toFixed(digits).replace("-", "−");
}

// At most four characters, for a cell of the grid.
export function tiny(number) {
  if (number === null || !Number.isFinite(number)) return "–";
  const size = Math.abs(number);
  if (size >= 9950) return `${Math.round(number / 1000)}k`;
  if (size >= 995) return `${(number / 1000).toFixed(1)}k`;
  return number.toFixed(size >= 99.5 ? 0 : size >= 9.95 ? 1 : 2);
}

export function percent(share) {
  if (!Number.isFinite(share)) return "–";
  return share === 0 ? "0" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;
}

export const counted = (number, one, several = `${one}s`) =>
  `${number.toLocaleString("en")} ${number === 1 ? one : several}`;

// The words of the page for a measure, of which JSON has the name.
export const words = (name) => name.replaceAll("_", " ");
