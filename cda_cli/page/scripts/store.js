// The figures and the rows of heads that the page holds, which Python wrote (cda_cli/inspection/store.py).

import { byId } from "./dom.js";
import { CAPPED } from "./theme.js";

const STEPS = 254; // codes of weights, over OCTAVES; one more stands for exactly 1
const OCTAVES = 10;

export const report = JSON.parse(byId("report").textContent);
export const T = report.rows.queries; // tokens of the window that the page shows
export const heads = new Map(report.heads.map((head) => [`${head.layer}.${head.head}`, head]));
// The measures that some head has: not all models and inspections have all of them.
export const measures = Object.keys(report.meanings).filter((name) =>
  report.heads.some((head) => Number.isFinite(head[name])),
);
const stored = new Map(report.rows.heads.map((head) => [`${head.layer}.${head.head}`, head]));

// A level is what colours a weight: 1 for 2^−10 and less, 254 for almost 1, and CAPPED for exactly 1.
export const levelOf = (weight) => Math.min(Math.max(Math.round(STEPS * (1 + Math.log2(weight) / OCTAVES)), 1), STEPS);

// The bytes of a script element of the page, which has them as base64 of raw deflate.
export async function inflate(id) {
  const { readable, writable } = new DecompressionStream("deflate-raw");
  const writer = writable.getWriter();
  writer.write(fromBase64(byId(id).textContent));
  writer.close();
  return new Uint8Array(await new Response(readable).arrayBuffer());
}

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let at = 0; at < bytes.length; at++) bytes[at] = letters.charCodeAt(at);
  return bytes;
}

const opened = new Map(); // promises of HeadRows by the name of the head, the latest last
const KEPT = 12; // heads in memory

export function rowsOf(name) {
  const found = opened.get(name) ?? inflate(`rows-${name}`).then((bytes) => new HeadRows(bytes, stored.get(name)));
  opened.delete(name);
  opened.set(name, found);
  if (opened.size > KEPT) opened.delete(opened.keys().next().value);
  return found;
}

// The kept keys of all rows of a head, row after row (docs/inspection.md has the layout). A key is a position of the
// text, and null keys are negative.
class HeadRows {
  constructor(bytes, { smallest_k, largest_k }) {
    this.octaves = bytes.subarray(2 * T, 3 * T);
    this.k = Float32Array.from(bytes.subarray(0, T), (code) => smallest_k * (largest_k / smallest_k) ** (code / 255));
    this.rests = bytes.subarray(T, 2 * T);
    const numbers = new Varints(bytes, 3 * T);
    this.starts = new Uint32Array(T + 1); // of each row among the entries
    for (let query = 0; query < T; query++) this.starts[query + 1] = this.starts[query] + numbers.next();
    const total = this.starts[T];
    this.keys = new Int32Array(total);
    this.levels = new Uint8Array(total);
    for (let query = 0; query < T; query++) {
      let key = query + 1;
      for (let entry = this.starts[query]; entry < this.starts[query + 1]; entry++) {
        key -= numbers.next() + 1;
        this.keys[entry] = key;
      }
    }
    this.codes = bytes.subarray(numbers.at, numbers.at + total); // of the weights
    for (let query = 0; query < T; query++) {
      const lower = Math.round((this.octaves[query] * STEPS) / OCTAVES);
      for (let entry = this.starts[query]; entry < this.starts[query + 1]; entry++) {
        const code = this.codes[entry];
        this.levels[entry] = code === CAPPED ? CAPPED : Math.max(code - lower, 1);
      }
    }
  }

  // What a query reads: {keys: [{position, level, weight}], k, rest}; `rest` is what all other keys sum to.
  row(query) {
    const keys = [];
    for (let entry = this.starts[query]; entry < this.starts[query + 1]; entry++) {
      keys.push(this.entry(entry, query, this.keys[entry]));
    }
    const k = this.k[query];
    return { keys, k, rest: (this.rests[query] / 255) * Math.min(k, query + 1 + report.rows.null_keys) };
  }

  // Who reads the key at `position`, in the same form.
  readers(position) {
    const keys = [];
    for (let query = Math.max(position, 0); query < T; query++) {
      for (let entry = this.starts[query]; entry < this.starts[query + 1]; entry++) {
        if (this.keys[entry] === position) keys.push(this.entry(entry, query, query));
      }
    }
    return { keys, k: null, rest: null };
  }

  // An entry of the row of `query`, said of the token at `position`.
  entry(entry, query, position) {
    const [level, code] = [this.levels[entry], this.codes[entry]];
    return { position, level, weight: level === CAPPED ? 1 : WEIGHTS[code] * 2 ** -this.octaves[query] };
  }
}

const WEIGHTS = Float32Array.from({ length: 255 }, (_, code) => 2 ** (OCTAVES * (code / STEPS - 1)));

// Whole numbers as LEB128: seven bits a byte, the lowest first, and 128 on each byte but the last.
class Varints {
  constructor(bytes, at) {
    this.bytes = bytes;
    this.at = at;
  }

  next() {
    let number = 0;
    let shift = 0;
    let byte;
    do {
      byte = this.bytes[this.at++];
      number |= (byte & 127) << shift;
      shift += 7;
    } while (byte > 127);
    return number;
  }
}
