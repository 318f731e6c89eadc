// What is looked at. It lives in the address, so that a link or a bookmark leads to the same view.

const DEFAULTS = {
  by: "effective_support", // the measure that colours and sorts the grid
  order: "layer", // or "down" or "up"
  show: "weights", // or "numbers"
  head: null, // "3.5"
  query: null, // a position of the text
  view: "keys", // or "readers"
  eps: null, // of a live head, where it is not the model's
  k: null,
};

// Browsers take no more than some hundred addresses in half a minute, so a key that is held down leaves one.
const QUIET = 150; // milliseconds without a change

export const state = { ...DEFAULTS };
const listeners = [];
let writing = null; // the timer that will write the address

export function onChange(listener) {
  listeners.push(listener);
}

// Takes what changed, tells everybody, and writes the address.
export function update(changes) {
  const before = { ...state };
  Object.assign(state, changes);
  if (Object.keys(state).every((name) => state[name] === before[name])) return;
  for (const listener of listeners) listener(before);
  clearTimeout(writing);
  writing = setTimeout(writeAddress, QUIET);
}

function writeAddress() {
  const address = addressOf(state);
  // In a notebook the page lies in a frame that has no address of its own.
  if (address !== location.hash && location.protocol !== "about:") history.replaceState(null, "", address || "#");
}

export function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const found = { ...DEFAULTS };
  for (const name of Object.keys(DEFAULTS)) if (given.has(name)) found[name] = given.get(name);
  for (const name of ["query", "eps", "k"]) {
    found[name] = found[name] !== null && Number.isFinite(Number(found[name])) ? Number(found[name]) : null;
  }
  return found;
}

function addressOf(values) {
  const kept = Object.entries(values).filter(([name, value]) => value !== null && value !== DEFAULTS[name]);
  return kept.length ? `#${new URLSearchParams(kept)}` : "";
}
