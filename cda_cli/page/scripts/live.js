// Rows of a live head for any ε and k: computed here from queries and keys in 8 bits, so approximately.

import { byId, short } from "./dom.js";
import { state, update } from "./state.js";
import { inflate, levelOf, report, T } from "./store.js";
import { CAPPED } from "./theme.js";

const MOST_KEYS = 200; // of a row that is shown
const MASS = 0.999; // of the mass of a row that is shown
const EPS_OCTAVES = 4; // ε goes from the model's own / 2⁴ to its own · 2⁴
const LARGEST_K = 16;

const lives = new Map(); // promises of LiveHead by the name of the head

export const isLive = (name) => name in report.live;

export function liveHead(name) {
  if (!lives.has(name))
    lives.set(
      name,
      inflate(`live-${name}`).then((bytes) => new LiveHead(bytes, report.live[name])),
    );
  return lives.get(name);
}

class LiveHead {
  constructor(bytes, width) {
    const keys = T + report.rows.null_keys;
    this.width = width;
    this.queries = new Int8Array(bytes.buffer, 0, T * width);
    this.keys = new Int8Array(bytes.buffer, T * width, keys * width);
    // The scales may lie at any byte, where an array of floats cannot begin.
    const scales = new Float32Array(bytes.slice((T + keys) * width).buffer);
    this.queryScales = scales.subarray(0, T);
    this.keyScales = scales.subarray(T);
  }

  // The row of a query in the form of HeadRows.row.
  row(query, eps, k) {
    const count = query + 1 + report.rows.null_keys;
    const scores = new Float64Array(count);
    for (let key = 0; key < count; key++) {
      let sum = 0;
      for (let at = 0; at < this.width; at++) {
        sum += this.queries[query * this.width + at] * this.keys[key * this.width + at];
      }
      scores[key] = sum * this.queryScales[query] * this.keyScales[key];
    }
    const { weights, order, capped } = softTopK(scores, eps, k);
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    const keys = [];
    let kept = 0;
    for (const [rank, key] of order.entries()) {
      if (rank >= MOST_KEYS || kept >= MASS * total) break;
      const level = rank < capped ? CAPPED : levelOf(weights[key]);
      keys.push({ position: key - report.rows.null_keys, level, weight: weights[key] });
      kept += weights[key];
    }
    return { keys, k, rest: Math.max(0, total - kept), approximate: true };
  }
}

// The weights min(1, exp((s + a)/ε)) that sum to k, exactly: with the m largest scores capped, the others share k − m
// as a softmax, and m is the smallest number for which none of them exceeds 1 (docs/operator.md).
function softTopK(scores, eps, k) {
  const order = [...scores.keys()].sort((one, other) => scores[other] - scores[one]);
  const weights = new Float64Array(scores.length);
  if (k >= scores.length) return { weights: weights.fill(1), order, capped: scores.length };
  // Sums of exp((s − s_m)/ε) from each rank m on, from the smallest score up, so that none overflows.
  const sums = new Float64Array(scores.length);
  let sum = 0;
  for (let rank = scores.length - 1; rank >= 0; rank--) {
    const lower = rank + 1 < scores.length ? scores[order[rank + 1]] : scores[order[rank]];
    sum = sum * Math.exp((lower - scores[order[rank]]) / eps) + 1;
    sums[rank] = sum;
  }
  let capped = 0;
  while (capped < k && (k - capped) / sums[capped] > 1) capped++;
  const [largest, mass] = [scores[order[capped]], (k - capped) / sums[capped]];
  for (const [rank, key] of order.entries()) {
    weights[key] = rank < capped ? 1 : mass * Math.exp((scores[key] - largest) / eps);
  }
  return { weights, order, capped };
}

const toEps = (slider) => Number((report.eps * 2 ** Number(slider)).toPrecision(4));
const toK = (slider) => Number((2 ** Number(slider)).toPrecision(4));

export function openLive() {
  const [eps, k] = [byId("live-eps"), byId("live-k")];
  [eps.min, eps.max, k.min, k.max] = [-EPS_OCTAVES, EPS_OCTAVES, -2, Math.log2(LARGEST_K)];
  eps.addEventListener("input", () => update({ eps: toEps(eps.value) }));
  k.addEventListener("input", () => update({ k: toK(k.value) }));
  byId("live-reset").addEventListener("click", () => update({ eps: null, k: null }));
}

export const isChanged = () => isLive(state.head) && (state.eps !== null || state.k !== null);

// Sets the sliders by the address; `ownK` is the k that the model gives the row that is shown.
export function showLive(ownK) {
  byId("live").hidden = !isLive(state.head);
  if (!isLive(state.head)) return;
  const [eps, k] = [state.eps ?? report.eps, state.k ?? ownK];
  byId("live-eps").value = Math.log2(eps / report.eps);
  byId("live-k").value = Math.log2(k);
  byId("live-eps-said").textContent = `${short(eps)}${state.eps === null ? " (the model’s)" : ""}`;
  byId("live-k-said").textContent = `${short(k)}${state.k === null ? " (the row’s own)" : ""}`;
  byId("live-eps").setAttribute("aria-valuetext", byId("live-eps-said").textContent);
  byId("live-k").setAttribute("aria-valuetext", byId("live-k-said").textContent);
  byId("live-reset").disabled = !isChanged();
}
