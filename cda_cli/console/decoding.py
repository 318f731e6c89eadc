"""The speeds of `cda bench-decode`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cda_cli.console.base import memory, out, print_pairs, share, table
from cda_cli.console.text import section

if TYPE_CHECKING:
    from cda_cli.generation.benchmark import DecodeSpeed


def show_decode_speed(about: Mapping[str, str], speeds: Sequence[DecodeSpeed]) -> None:
    """Shows a line for each batch size, in at most 80 columns."""
    print_pairs(out(), about)
    found = table("batch", "prompt", "new", "first token", "step", "tokens/s", "read", "GB/s", "of ceiling")
    for speed in speeds:
        found.add_row(
            f"{speed.batch_size:,}",
            f"{speed.prompt_length:,}",
            f"{speed.new_tokens:,}",
            f"{speed.time_to_first_token_ms:.3g} ms",
            f"{speed.step_ms:.3g} ms",
            f"{speed.tokens_per_second:,.0f}",
            memory(speed.step_bytes),
            f"{speed.bandwidth_gb_per_s:,.3g}",
            share(speed.bandwidth_utilization),
        )
    section("Decoding: the time of a step, and the bytes that it must read", found)
    of_units = table("batch", "read")
    for speed in speeds:
        if speed.ff_weights_read < 1:
            of_units.add_row(f"{speed.batch_size:,}", share(speed.ff_weights_read))
    if of_units.rows:
        section("Weights of the feed-forward that a step read: those of units that are 0 are left out", of_units)
    of_keys = table("batch", "keys", "read", "mass left out")
    for speed in speeds:
        if speed.keys is not None and speed.keys_read is not None and speed.mass_left_out is not None:
            read = f"{speed.keys_read:,.0f} ({share(speed.keys_read / speed.keys)})"
            of_keys.add_row(f"{speed.batch_size:,}", f"{speed.keys:,.0f}", read, f"≤ {share(speed.mass_left_out)}")
    if of_keys.rows:
        section("Keys that a head reads for a token, and the share of a row's weight on the others", of_keys)
