"""A comparison of runs: a verdict, and sections that a terminal and a page show alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.text import Text

from cda_cli.console.base import count, duration, memory, out, plus_minus, print_pairs, print_trimmed, share, table
from cda_cli.console.charts import BOTH, COLOURS, Chart, draw_text
from cda_cli.console.cut_chart import cut_chart
from cda_cli.console.effects import TITLES, with_error
from cda_cli.console.evaluation import difference_columns
from cda_cli.console.text import heading, print_sentence, printable
from cda_cli.settings_table import as_written

if TYPE_CHECKING:
    from cda_cli.causal import Effect
    from cda_cli.comparison.comparable import Fact
    from cda_cli.comparison.curves import Axis, Equal
    from cda_cli.comparison.models import Models
    from cda_cli.comparison.overlap import HeadOverlap
    from cda_cli.comparison.result import Result
    from cda_cli.evaluation import Estimate
    from cda_cli.evaluation.intervals import Units

DASH = "–"
SAME = {True: "same", False: "differ", None: DASH}
MOST_PAIRS = 5  # aligned heads that are shown of those with the largest overlap, and of those with the smallest
FEWEST_BLOCKS = 30  # With fewer, the interval of a bootstrap is clearly too narrow.
MOST_ERRORS = 3  # runs for whose standard errors a line of 80 columns has room
# Measures of attention, by their names in JSON: what the table calls them, and how it writes them.
MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "sparsity_k": ("k", lambda value: f"{value:.3f}"),
    "effective_support": ("support", lambda value: f"{value:.2f}"),
    "keys_95": ("keys 95%", lambda value: f"{value:.1f}"),
    "gate_equivalent": ("gate-equivalent rows", share),
    "capped_share": ("capped/k", share),
    "sink_mass": ("sink", share),
    "median_distance": ("median distance", lambda value: f"{value:.0f}"),
}
RECORDED = ("sparsity_k", "effective_support", "capped_share")  # those that train records have too
FEED_FORWARD = ("model.ff", "optim.ff_l1")  # begin the names of the settings that change its units
BY_LAYER = ("effective_support", "gate_equivalent")


class Section(NamedTuple):
    """A part of a comparison: sentences, a table, a chart of lines and a curve of cuts, of which each may be missing.

    Columns but the first hold numbers, unless `has_words`. `curve` has, by the letters of the runs and the number of
    keys, what a cut costs.
    """

    title: str
    sentences: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    chart: Chart | None = None
    curve: Mapping[str, Mapping[int, Estimate]] | None = None
    has_words: bool = False


def show_comparison(result: Result) -> None:
    """Prints the runs, the verdict, and each section."""
    console = out()
    print_pairs(console, named_runs(result))
    console.print()
    for sentence in comparison_verdict(result):
        print_sentence(console, sentence)
    for section in sections(result):
        heading(console, section.title)
        for sentence in section.sentences:
            print_sentence(console, sentence)
        if section.rows:
            made = table(*section.columns)
            made.columns[0].no_wrap = True
            for column in made.columns[1:]:
                column.justify, column.overflow = ("left" if section.has_words else "right"), "fold"
            for row in section.rows:
                made.add_row(*row)
            print_trimmed(console, made)
        if section.chart:
            print_trimmed(console, draw_text(section.chart, console.width))
            print_trimmed(console, _legend(section.chart))
        if section.curve:
            print_trimmed(console, cut_chart(section.curve, console.width))


def _legend(chart: Chart) -> Text:
    marks = Text()
    for colour, letter in zip(COLOURS, chart.lines, strict=False):
        marks.append(f"{letter}  ", style=colour)
    return marks.append(f"{BOTH} several" if len(chart.lines) > 1 else "")


def named_runs(result: Result) -> dict[str, str]:
    """The letter of each run, with its folder and how far it came."""
    return {
        letter: f"{printable(str(run.path))}, {run.summary.state} at step {run.summary.step:,}"
        for letter, run in zip(result.letters, result.runs, strict=True)
    }


def sections(result: Result) -> list[Section]:
    """All that is found, but for the verdict."""
    models = result.models
    return [
        Section("Are they comparable?", (), ("", "", "what follows"), _facts(result.facts), has_words=True),
        _settings(result),
        *(_equal(result, axis) for axis in ("tokens", "seconds")),
        _speed(result),
        *([_recorded_attention(result)] if models is None else _of_models(result, models)),
        *([_feed_forward(result)] if any(key.startswith(FEED_FORWARD) for key in result.differing) else []),
    ]


def _facts(facts: Mapping[str, Fact]) -> list[tuple[str, ...]]:
    return [(name, SAME[fact.is_same], printable(fact.sentence)) for name, fact in facts.items()]


def _settings(result: Result) -> Section:
    rows = [
        (key, *(printable(as_written(run.summary.settings[key])) for run in result.runs)) for key in result.differing
    ]
    sentences = () if rows else ("All settings are the same.",)
    return Section("Settings that differ", sentences, ("", *result.letters), rows)


def _equal(result: Result, axis: Axis) -> Section:
    """Losses at equal tokens, or at equal time, as a table and as curves."""
    curves, in_tokens = result.curves, axis == "tokens"
    of = "validation" if curves.kind == "validation" else "training text"
    title = f"Bits per byte of the {of} at equal {'tokens' if in_tokens else 'time'}, during training"
    equal = curves.equal(axis)
    if not equal:
        return Section(title, ("A run has no records of it.",))
    words = count if in_tokens else seconds
    rows = [(words(each.at), *(_number(value) for value in each.bits_per_byte)) for each in equal]
    lines = {
        letter: [(getattr(point, axis), point.bits_per_byte) for point in points]
        for letter, points in zip(result.letters, curves.points, strict=True)
    }
    chart = Chart("tokens" if in_tokens else "time", "bits per byte", lines, words, lambda value: f"{value:.3g}")
    return Section(title, (), ("tokens" if in_tokens else "time", *result.letters), rows, chart)


def _speed(result: Result) -> Section:
    """Totals, and what the machine gave."""
    runs = result.runs
    rows = [
        ("tokens trained on", *(_written(count, run.tokens) for run in runs)),
        ("time of the steps", *(_written(seconds, run.seconds) for run in runs)),
        ("tokens per second", *(_written(count, run.tokens_per_second) for run in runs)),
        ("peak memory", *(_written(memory, run.memory_bytes) for run in runs)),
    ]
    return Section("Speed and memory", (), ("", *result.letters), rows)


def _recorded_attention(result: Result) -> Section:
    """What the newest train records have of the layers, for runs whose models are not opened."""
    title = "Attention in the newest train records, means over layers"
    rows = []
    for name in RECORDED:
        words, write = MEASURES[name]
        means = (_mean(write, [getattr(layer, name) for layer in run.layers]) for run in result.runs)
        rows.append((words, *means))
    return Section(title, (), ("", *result.letters), rows)


def _feed_forward(result: Result) -> Section:
    """What the newest train records have of the units, and of the blocks that a router chose."""
    rows = [("active units", *(_mean(share, [layer.active_units for layer in run.layers]) for run in result.runs))]
    blocks = [[each for layer in run.layers if (each := layer.active_blocks) is not None] for run in result.runs]
    if any(blocks):
        rows.append(("blocks of a token", *(_mean(lambda value: f"{value:.2f}", each) for each in blocks)))
    return Section("Feed-forward in the newest train records, means over layers", (), ("", *result.letters), rows)


def _of_models(result: Result, models: Models) -> list[Section]:
    means = models.attention
    attention = f"Attention over {models.inspected} windows, means over heads"
    return [
        _evaluated(result, models),
        Section(attention, (), ("", *result.letters), _attention(means)),
        *_causal(result, models),
        *_curves(result, models),
        *(_aligned(letter, overlap) for letter, overlap in zip(result.letters[1:], models.overlaps, strict=True)),
    ]


def _evaluated(result: Result, models: Models) -> Section:
    evaluation = models.evaluation
    comparison, text = evaluation.comparison, evaluation.readings[0].text
    units = comparison.units
    sentences = (
        f"{printable(text.description)}, {text.split}: {comparison.evaluation().tokens:,} tokens in windows of at most "
        f"{evaluation.context:,}; intervals are from {units.blocks:,} {units.resampled}, resampled.",
    )
    rows = []
    for number, letter in enumerate(result.letters):
        found = comparison.evaluation(number)
        difference = difference_columns(comparison.difference(number)) if number else ("", "")
        bits = plus_minus(found.bits_per_byte, found.bits_per_byte_error)
        step = evaluation.readings[number].saved.path.name.removeprefix("step-").lstrip("0") or "0"
        rows.append((letter, step, count(models.parameters[number]), f"{found.loss:.4f}", bits, *difference))
    columns = ("run", "step", "weights", "loss", "bits per byte", "difference", "95 % interval")
    return Section("Loss on the same text", sentences, columns, rows)


def _attention(means: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows = []
    for name, (words, write) in MEASURES.items():
        rows.append((words, *(_written(write, each[name]) for each in means)))
        depth = max(len(each["layers"]) for each in means) if name in BY_LAYER else 0
        for layer in range(depth if depth > 1 else 0):
            values = [each["layers"][layer][name] if layer < len(each["layers"]) else math.nan for each in means]
            rows.append((f"  layer {layer}", *(_written(write, value) for value in values)))
    return rows


def _causal(result: Result, models: Models) -> list[Section]:
    """A section for each kind of intervention: what it costs each run, in bits per byte."""
    found = []
    for kind, title in TITLES.items():
        of_runs = [[one for one in each.effects if one.intervention.kind == kind] for each in models.effects]
        described = {one.intervention.name: one.intervention.description for of_run in of_runs for one in of_run}
        if not described:
            continue
        by_name = [{one.intervention.name: one for one in of_run} for of_run in of_runs]
        few = len(of_runs) <= MOST_ERRORS
        rows = [(words, *(_cost(effects.get(name), few) for effects in by_name)) for name, words in described.items()]
        sentence = "Bits per byte more than the run as it is" + (", ± standard error." if few else ".")
        found.append(Section(title, (sentence,), ("", *result.letters), rows))
    return found


def _cost(effect: Effect | None, few: bool) -> str:
    if effect is None:
        return DASH
    return with_error(effect.difference) if few else difference_columns(effect.difference)[0]


def _curves(result: Result, models: Models) -> list[Section]:
    """The cost against the keys that are kept: a section for each series of cuts that has several numbers of them."""
    series: dict[str, dict[str, dict[int, Estimate]]] = {}
    for letter, effects in zip(result.letters, models.effects, strict=True):
        for name, curve in effects.curves().items():
            series.setdefault(name, {})[letter] = {keys: effect.difference for keys, effect in curve.items()}
    return [
        Section(f"Bits per byte more than with all keys: {name}", curve=of_runs)
        for name, of_runs in series.items()
        if any(len(curve) > 1 for curve in of_runs.values())
    ]


def _aligned(letter: str, overlap: HeadOverlap | None) -> Section:
    title = f"What aligned heads of A and {letter} read alike"
    if overlap is None:
        return Section(title, ("The runs have unlike tokens, or the text has a single window.",))
    same_layer = sum(pair.layer == pair.other_layer for pair in overlap.pairs)
    sentences = [
        f"Aligned heads share {overlap.aligned:.1%} of what they read, and any two heads {overlap.any_two:.1%}; "
        f"{same_layer} of {len(overlap.pairs)} pairs are of the same layer.",
    ]
    ordered = sorted(overlap.pairs, key=lambda pair: -pair.overlap)
    shown = ordered
    if len(ordered) > 2 * MOST_PAIRS:
        shown = [*ordered[:MOST_PAIRS], *ordered[-MOST_PAIRS:]]
        sentences.append(
            f"The table has the {MOST_PAIRS} pairs that share most, and the {MOST_PAIRS} that share least."
        )
    rows = [
        (f"{pair.layer}.{pair.head}", f"{pair.other_layer}.{pair.other_head}", share(pair.overlap)) for pair in shown
    ]
    return Section(title, sentences, ("head of A", f"head of {letter}", "overlap"), rows)


def comparison_verdict(result: Result) -> list[str]:
    """Says in sentences which run is better, by how much, and at what cost."""
    letters, models = result.letters, result.models
    found = []
    if models is None:
        found.append(f"No model was evaluated: {result.not_evaluated}.")
    else:
        comparison = models.evaluation.comparison
        like_first = next((group for group in result.seed_groups if letters[0] in group), "")
        found += [
            _difference(letter, comparison.difference(number), comparison.units, letter in like_first)
            for number, letter in enumerate(letters[1:], start=1)
        ]
        if result.facts["data"].is_same is False:
            found.append("They trained on different text, and this text may have trained one of them.")
        if result.facts["tokens"].is_same is False:
            found.append("They trained on unequal numbers of tokens, which may be a part of each difference.")
        found.append("The intervals are over the text; another seed of a training is not in them.")
        bits = {letter: comparison.bits_per_byte(number).value for number, letter in enumerate(letters)}
        found += _over_seeds(result.seed_groups, bits)
    curves = result.curves
    found += [_equal_words(result, f"{equal.at:,.0f} tokens", equal) for equal in curves.tokens[-1:] if equal.is_whole]
    found += [_equal_words(result, seconds(equal.at), equal) for equal in curves.seconds[-1:] if equal.is_whole]
    found += _speed_words(result)
    if models is not None:
        found.append(_attention_words(letters, models))
    return found


def _difference(letter: str, difference: Estimate, units: Units, is_seed: bool) -> str:
    value, _, low, high = difference
    if math.isnan(value):
        return f"{letter} has no bits per byte that A has too, as the text has no bytes."
    better = "better" if value < 0 else "worse"
    seed = " They differ in the seed alone: so much a seed does." if is_seed else ""
    if math.isnan(low):
        return f"{letter} is {abs(value):.4f} bits per byte {better} than A; one observation has no interval.{seed}"
    half = max(high - value, value - low)
    amount = f"{abs(value):.4f} ± {half:.4f} bits per byte {better} than A"
    missed = "1 in 20 such intervals would miss."
    if units.blocks < FEWEST_BLOCKS:
        missed = f"from {units.blocks} {units.resampled} more than {missed}"
    if half >= abs(value):
        return f"{letter} and A are not told apart: {letter} is {amount}; {missed}{seed}"
    return f"{letter} is {amount}; {missed}{seed}"


def _over_seeds(groups: Sequence[str], bits: Mapping[str, float]) -> list[str]:
    """Compares the means of runs that differ in their seeds alone, if there are two such groups."""
    if len(groups) < 2:
        return []
    of_groups = [[bits[letter] for letter in group] for group in groups]
    means = "; ".join(
        f"{' and '.join(group)} {sum(each) / len(each):.4f}" for group, each in zip(groups, of_groups, strict=True)
    )
    spread = max(max(each) - min(each) for each in of_groups)
    return [f"Means over seeds, in bits per byte: {means}. Seeds alone move them by up to {spread:.4f}."]


def _equal_words(result: Result, amount: str, equal: Equal) -> str:
    losses = zip(result.letters, equal.bits_per_byte, strict=True)
    figures = ", ".join(f"{letter} {_number(bits)}" for letter, bits in losses)
    return f"After {amount} of training each, the {result.curves.kind} loss is {figures} bits per byte."


def _speed_words(result: Result) -> list[str]:
    first, words = result.runs[0], []
    for letter, run in zip(result.letters[1:], result.runs[1:], strict=True):
        speed, size = run.tokens_per_second / first.tokens_per_second, run.memory_bytes / first.memory_bytes
        if math.isfinite(speed) and math.isfinite(size):
            words.append(f"{letter} trains {speed:.2f} times as fast as A, with {size:.2f} times its memory.")
    return words


def _attention_words(letters: str, models: Models) -> str:
    means = models.attention
    support = ", ".join(
        f"{letter} {each['effective_support']:.1f}" for letter, each in zip(letters, means, strict=True)
    )
    gated = [
        f"{letter} {each['gate_equivalent']:.1%}"
        for letter, each in zip(letters, means, strict=True)
        if math.isfinite(each["gate_equivalent"])
    ]
    rows = f"; gate-equivalent rows: {', '.join(gated)}" if gated else ""
    return f"Support, in keys for each row: {support}{rows}."


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 60 else duration(value)


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else DASH


def _written(write: Callable[[float], str], value: float) -> str:
    return write(value) if math.isfinite(value) else DASH


def _mean(write: Callable[[float], str], values: Sequence[float]) -> str:
    return _written(write, sum(values) / len(values)) if values else DASH
