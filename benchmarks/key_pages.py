"""Measures what decoding gains and loses by reading some pages of keys, with trained models.

    python benchmarks/key_pages.py runs/pages --steps 500          # trains two models there first, unless it did
    python benchmarks/key_pages.py RUN RUN --data TEXT             # of trained runs

A model reads 8 k, 32 k and 128 k tokens of its validation text, or of TEXT, into its cache, in chunks. It goes on with
the 32 tokens that follow, one at a time: with all keys, with at most N of them, and with as many as a tolerance of the
mass left out takes. Each way reads the same tokens, after the same cache.

- keys read: the share of the cache, as a median over heads and tokens and as the 95th percentile, also by layer;
- mass left out: the largest share of a row's weight, as the bound says and as it is;
- output error: ‖o − o_all‖/‖o_all‖ of attention, over all heads, tokens and layers, with the queries of all keys;
- loss: that of the 32 tokens, in nats, and its difference to that with all keys;
- concentration, in a table of its own: the fewest keys, and the fewest pages, that hold 90 and 99 % of a row's weight,
  and those with any, as a median and as the 95th percentile. A choice that knew all weights would read so many.
- time: the median of a step of one row, and of several that all have this text, beside that with all keys. On a GPU it
  is that of a CUDA graph, but with a tolerance, whose steps cannot be one. The steps draw no token.

Entmax and hard top-k read N keys by the same choice of pages, but no bound of what they leave out is known. They thus
have no tolerance, and `cda sample --max-keys` refuses them. The new models are trained with 8,192 tokens. What lies
behind the length of training is beyond it, with all keys too; with --yarn YaRN stretches the rotary positions of the
runs to the longest length, without any training.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from synthetic import cda, header, row
from torch import Tensor

from cda_cli.generation.decoder import with_matrices
from cda_cli.model import KeySelection, StaticCache, Transformer
from cda_cli.model.key_pages import KeyPages
from cda_cli.model.page_choice import PAGE, Read, take_slots
from cda_cli.model.rotary import RotaryPositions
from cda_cli.model.rules import AttentionRule
from cda_cli.restore import Restored, open_side, restore
from cda_cli.runtime import autocast, pick_dtype
from cda_cli.signals import StopRequest

LENGTHS = (8192, 32768, 131072)
FOLLOWING = 32
CHUNK = 2048
TIMED = 5
HELD = (0.9, 0.99)  # of a row's weight
SELECTIONS = {
    "N = 256": KeySelection(256),
    "N = 1024": KeySelection(1024),
    "N = 4096": KeySelection(4096),
    "τ = 0.1": KeySelection(None, 0.1),
}
# Small models of 6 layers with 8 heads, whose positions turn slowly, so that texts longer than those of training serve.
MODEL = ("model.seq_len=8192", "model.depth=6", "model.rotary_base=1000000", "optim.batch_size=4", "optim.grad_accum=1")
QUIET = ("run.eval_every=0", "run.save_every=0", "run.compile=false", "optim.warmup_steps=50")
ARMS = {
    "softmax": ("--attention", "softmax", "--set", "model.learned_k=false"),
    "soft-topk": (
        "--attention", "coordinate-descent", "--set", "model.attn_eps=0.1", "--set", "model.eps_anneal_start=1.0",
    ),
}  # fmt: skip


class WatchedPages(KeyPages):
    """While `is_watching`, also compares the output and the weights of each layer with those of all keys.

    After `begin_prefill` it reads all keys, and watches how many of them hold the weight.
    """

    is_watching = False

    def watch(self, layers: int) -> None:
        self.is_watching = True
        self.read: list[list[Tensor]] = [[] for _ in range(layers)]  # shares of the keys, a tensor [K] for each token
        self.mass_left_out: list[Tensor] = []  # the bound, and the true share
        self.squares: list[Tensor] = []  # of o − o_all, and of o_all
        self.holding: list[Tensor] = []  # keys and pages that hold the weight, [2, H, shares] for each layer and token

    def decode(
        self,
        layer: int,
        rows: slice | Tensor,
        rule: AttentionRule,
        query_BHTD: Tensor,
        key_BKSD: Tensor,
        value_BKSD: Tensor,
        budget: float | Tensor,
        visible_B: Tensor | None,
    ) -> Tensor:
        if not self.is_watching:
            return super().decode(layer, rows, rule, query_BHTD, key_BKSD, value_BKSD, budget, visible_B)
        assert visible_B is not None
        if self._reads_all:
            with torch.autocast(query_BHTD.device.type, enabled=False):
                weights = _all_weights(rule, query_BHTD.float(), key_BKSD.float(), budget, visible_B)
            self.holding.append(torch.stack((_holding(weights), _holding(_of_pages(weights)))))
            return rule.decode(query_BHTD, key_BKSD, value_BKSD, budget, visible_B)
        read = self.choose(layer, rows, rule, query_BHTD, key_BKSD, budget, visible_B)
        of_all = rule.decode(query_BHTD, key_BKSD, value_BKSD, budget, visible_B)
        if read is None:
            self.read[layer].append(torch.ones(key_BKSD.shape[1], device=of_all.device))
            return of_all
        with torch.autocast(of_all.device.type, enabled=False):
            values = take_slots(value_BKSD, read.slots).float()
            output = (read.weights @ values).view(query_BHTD.shape)
            left_out = _left_out(read, rule, query_BHTD.float(), key_BKSD.float(), budget, visible_B)
        self.read[layer].append((read.seen.sum(-1) / visible_B.unsqueeze(1)).flatten())
        self.mass_left_out.append(torch.stack((read.mass_left_out.amax(), left_out)))
        self.squares.append(torch.stack(((output - of_all).square().sum(), of_all.float().square().sum())))
        return output.to(of_all.dtype)


def _all_weights(
    rule: AttentionRule, query_BHTD: Tensor, key_BKSD: Tensor, budget: float | Tensor, visible_B: Tensor
) -> Tensor:
    """The weights of all keys, [1, K, R, S], for the R queries of the group of a key head."""
    K, S, D = key_BKSD.shape[1:]
    scores = rule.scale * query_BHTD.view(1, K, -1, D) @ key_BKSD.mT
    seen = torch.arange(S, device=scores.device) < visible_B.view(-1, 1, 1, 1)
    budgets = torch.as_tensor(budget, dtype=scores.dtype, device=scores.device).expand(query_BHTD.shape[:3])
    return rule.weights(scores, budgets.reshape(scores.shape[:3]), seen.expand_as(scores))


def _of_pages(weights: Tensor) -> Tensor:
    return F.pad(weights, (0, -weights.shape[-1] % PAGE)).unflatten(-1, (-1, PAGE)).sum(-1)


def _holding(weights: Tensor) -> Tensor:
    """The fewest that hold each share of a row's weight, and those with any, [H, shares]."""
    sums = weights.flatten(0, 2).double().sort(-1, descending=True).values.cumsum(-1)
    fewest = [(sums < share * sums[:, -1:]).sum(-1) + 1 for share in HELD]
    return torch.stack((*fewest, (weights > 0).sum(-1).flatten()), -1)


def _left_out(
    read: Read, rule: AttentionRule, query_BHTD: Tensor, key_BKSD: Tensor, budget: float | Tensor, visible_B: Tensor
) -> Tensor:
    """The largest share of a row's weight, among those of all keys, that is on keys that are not read."""
    weights = _all_weights(rule, query_BHTD, key_BKSD, budget, visible_B)
    kept = (weights.take_along_dim(read.slots.unsqueeze(2), 3) * read.seen.unsqueeze(2)).sum(-1)
    return (1 - kept / weights.sum(-1)).clamp(min=0).amax()


class Line(NamedTuple):
    """How a model goes on: the losses [FOLLOWING], and the milliseconds of a step of one row and of all rows."""

    losses: Tensor
    one: float
    several: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="trained runs, or with --steps a folder for two new ones")
    parser.add_argument("--steps", type=int, help="train softmax and soft top-k so long, unless they are there")
    parser.add_argument("--data", help="text; the run's own validation text where not given")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="keys in the cache")
    parser.add_argument("--yarn", action="store_true", help="stretch the rotary positions to the longest length")
    parser.add_argument("--rows", type=int, default=16, help="rows of the second time of a step")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="of new runs")
    asked = parser.parse_args()
    runs = asked.runs
    if asked.steps:
        with ThreadPoolExecutor(len(ARMS)) as pool:
            runs = list(pool.map(lambda name: trained(name, asked.runs[0], asked), ARMS))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for run in runs:
        header(f"Decoding that reads some pages of keys: {name_of(run)}", "keys, way", "keys read, median / 95 %",
               "mass left out, bound / true", "output error", "loss", "Δ loss", "step, ms", "× all keys",
               f"{asked.rows} rows, ms", "× all keys")  # fmt: skip
        holding: dict[int, Tensor] = {}
        of_layers = list(measured(run, device, asked, holding))
        header(
            f"Concentration, median / 95 %: {name_of(run)}",
            "keys",
            *(f"{what}, {share}" for what in ("keys", "pages") for share in (*map("{:.0%}".format, HELD), "any")),
        )
        for length, counts in holding.items():
            row(f"{length:,}", *(spread(each, "{:.0f}") for of_kind in counts for each in of_kind.unbind(-1)))
        layers = [f"layer {n}" for n in range(len(of_layers[0][1]))]
        header(f"Keys read by layer, median / 95 %: {name_of(run)}", "keys, way", *layers)
        for name, read in of_layers:
            row(name, *(spread(torch.stack(of_layer)) for of_layer in read))


def name_of(run: Path) -> str:
    """The arm of a run of a sweep with its seed, or the name of another run."""
    return f"{run.parent.name}/{run.name}" if run.name.startswith("seed-") else run.name


def trained(name: str, folder: Path, asked: argparse.Namespace) -> Path:
    """Trains one arm, unless it is trained, and returns its run."""
    run: Path = folder / name
    if not run.exists():
        sets = [part for each in (*MODEL, *QUIET, *asked.set) for part in ("--set", each)]
        data = ("--data", asked.data) if asked.data else ()
        cda("train", "--preset", "small", "--out", run, "--steps", asked.steps, *data, *ARMS[name], *sets)
        print(f"{name} is trained", file=sys.stderr, flush=True)
    return run


@torch.inference_mode()
def measured(
    run: Path, device: torch.device, asked: argparse.Namespace, holding: dict[int, Tensor]
) -> Iterator[tuple[str, list[list[Tensor]]]]:
    """Prints a line for each length and way. Yields the name of each, and what was read by layer.

    `holding` gets, of each length, the keys and pages that hold the weight, [2, rows, shares].
    """
    longest = max(asked.lengths) + FOLLOWING + 1
    restored, dtype = restore(run, device, context=longest), pick_dtype("auto", device)
    if asked.yarn:
        stretch(restored.model, longest)
    model = with_matrices(restored.model, dtype)
    has_bound = model.attention_rule.has_threshold
    ways = {way: each for way, each in SELECTIONS.items() if has_bound or each.max_keys is not None}
    tokens = text_of(restored, asked.data, longest)
    cache = StaticCache(model, asked.rows, dtype, longest)
    pages, start = WatchedPages(KeySelection(None), cache.keys), 0
    for length in sorted(asked.lengths):
        cache.pages = pages
        for first in range(start, length, CHUNK):
            stop = min(length, first + CHUNK)
            with autocast(device, dtype):
                model(tokens[:, first:stop], cache.rows(slice(0, 1), first), wanted_B=tokens.new_zeros(1))
        for other in range(1, asked.rows):
            cache.move_row(0, other)
        start, following = length, tokens[0, length : length + FOLLOWING + 1]
        pages.selection = KeySelection(longest)
        pages.begin_prefill()
        pages.watch(model.config.depth)
        dense = line(model, cache, dtype, length, following)
        holding[length] = torch.cat(pages.holding, 1)
        pages.begin_step(1)
        row(f"{length:,}, all keys", "100 %", "0", "0", *figures(dense, dense))
        for way, selection in ways.items():
            pages.selection = selection
            pages.watch(model.config.depth)
            name, found = f"{length:,}, {way}", line(model, cache, dtype, length, following)
            read = torch.stack([each for of_layer in pages.read for each in of_layer])
            masses = torch.stack(pages.mass_left_out).amax(0).tolist() if pages.mass_left_out else [0.0, 0.0]
            squares = torch.stack(pages.squares).sum(0).tolist() if pages.squares else [0.0, 1.0]
            bound, mass = (f"{each:.2g}" for each in masses)
            error = f"{(squares[0] / squares[1]) ** 0.5:.1e}"
            row(name, spread(read), f"{bound if has_bound else '–'} / {mass}", error, *figures(found, dense))
            yield name, pages.read


def stretch(model: Transformer, longest: int) -> None:
    """Stretches the rotary positions to `longest` tokens by YaRN."""
    for module in model.modules():
        if isinstance(module, RotaryPositions):
            factor = max(1.0, longest / module.config.rotary_trained_len)
            module.config = module.config.model_copy(update={"rotary_scaling": "yarn", "rotary_factor": factor})
            module.fill_buffers()


def line(model: Transformer, cache: StaticCache, dtype: torch.dtype, length: int, following: Tensor) -> Line:
    """Reads the tokens that follow, with the keys that the pages of the cache select, and then times a step."""

    def step(place: int = 0, rows: int = 1) -> Tensor:
        with autocast(following.device, dtype):
            logits = model(following[place].expand(rows, 1), cache.step(rows, length + FOLLOWING + 1))
        return F.cross_entropy(logits[:1, 0].float(), following[place + 1].view(1))

    def step_time(rows: int) -> float:
        cache.lengths_B.fill_(length)
        one_step = partial(step, rows=rows)
        one_step()
        if not (model.fits_cuda_graph and (pages is None or pages.fits_cuda_graph)):
            return milliseconds(one_step, following.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one_step()
        return milliseconds(graph.replay, following.device)

    pages = cache.pages
    cache.lengths_B.fill_(length)
    losses = torch.stack([step(place) for place in range(FOLLOWING)])
    if isinstance(pages, WatchedPages):
        pages.is_watching = False
    return Line(losses, step_time(1), step_time(len(cache.lengths_B)))


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(TIMED):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def figures(found: Line, dense: Line) -> list[object]:
    difference = (found.losses - dense.losses).mean().item()
    one, several = f"{found.one / dense.one:.2f}", f"{found.several / dense.several:.2f}"
    return [found.losses.mean().item(), f"{difference:+.4f}", found.one, one, found.several, several]


def spread(shares: Tensor, form: str = "{:.1%}") -> str:
    median, most = shares.float().flatten().quantile(torch.tensor([0.5, 0.95], device=shares.device)).tolist()
    return f"{form.format(median)} / {form.format(most)}"


def text_of(restored: Restored, data: str | None, count: int) -> Tensor:
    """The first tokens of the text, [1, count]."""
    with StopRequest() as stop:
        side = open_side(restored, data, None, stop, show_progress=False).sides[0]
    if len(side) < count:
        sys.exit(f"the text has {len(side):,} tokens, and {count:,} are read; give --data a longer one")
    return torch.as_tensor(side.ids[:count].astype("int64"), device=restored.device).unsqueeze(0)


if __name__ == "__main__":
    main()
