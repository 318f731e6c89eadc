"""Shows samples as they come: as text, the prompt dim and what the model adds plain, or as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from cda_cli.console.base import count, is_live, out, print_json, print_json_line, share
from cda_cli.console.text import note, print_sentence, write_text
from cda_cli.plurals import counted

if TYPE_CHECKING:
    from cda_cli.generation.text import SampledText
    from cda_cli.model import KeyReads
    from cda_cli.signals import StopRequest


class SampleText:
    """Writes samples to stdout as text, one after another in their order, whichever comes first.

    With `stream` the first that has not ended is written piece by piece, and otherwise each when it is whole.
    `headings` puts a line in front of each, as `head` does with several files. `end` follows each.
    """

    def __init__(self, samples: Sequence[SampledText], *, stream: bool, headings: bool, end: str = "\n") -> None:
        self._samples, self._stream, self._headings, self._end = samples, stream, headings, end
        self._console = out()
        self._current, self._written = -1, 0  # the sample that is written, and how many characters of it are
        self._begin_next()

    def update(self) -> None:
        """Writes what can be written, now that a sample has more text or has ended."""
        while self._is_going_on and self._samples[self._current].has_ended:
            self._write_current()
            self._begin_next()
        if self._stream and self._is_going_on:
            self._write_current()

    def finish(self, stop: StopRequest) -> None:
        """Writes the rest. Raises InterruptedRunError if a stop was asked for."""
        if self._is_going_on:
            self._write_current()
            write_text(self._console, self._end)
        stop.check("interrupted; the last text is not whole")
        of_all = f"of {counted(len(self._samples), 'sample')}"
        if truncated := sum(sample.is_truncated for sample in self._samples):
            note(f"{truncated} {of_all} grew beyond the model's context; the model went on from the newest tokens")
        if full := sum(sample.finish_reason == "context" for sample in self._samples):
            note(f"{full} {of_all} ended because the model's context was full")

    @property
    def _is_going_on(self) -> bool:
        return self._current < len(self._samples)

    def _begin_next(self) -> None:
        if self._current >= 0:
            write_text(self._console, self._end)
        self._current, self._written = self._current + 1, 0
        if self._is_going_on:
            sample = self._samples[self._current].sample
            if self._headings:
                heading = f"prompt {sample.place}, sample {sample.number}, seed {sample.seed}"
                write_text(self._console, f"{self._end if self._current else ''}==> {heading} <==\n", style="bold")
            write_text(self._console, sample.prompt.text, style="dim")

    def _write_current(self) -> None:
        text = self._samples[self._current].text[self._written :]
        self._written += len(text)
        if text:
            write_text(self._console, text)


class SampleLines:
    """Writes each sample to stdout as a JSON object on a line, as soon as it and those before it have ended."""

    def __init__(self, samples: Sequence[SampledText]) -> None:
        self._samples, self._written = samples, 0

    def update(self) -> None:
        """Writes the samples whose turn has come."""
        while self._written < len(self._samples) and self._samples[self._written].has_ended:
            print_json_line(self._samples[self._written].as_dict())
            self._written += 1

    def finish(self, stop: StopRequest) -> None:
        """Raises InterruptedRunError if a stop was asked for."""
        stop.check(f"interrupted; {self._written} of {counted(len(self._samples), 'sample')} were written")


class SampleDocument:
    """Writes one JSON document to stdout, in the end. `checkpoint` is where the model is from."""

    def __init__(self, samples: Sequence[SampledText], checkpoint: str) -> None:
        self._samples, self._checkpoint = samples, checkpoint

    def update(self) -> None:
        """Waits for the end."""

    def finish(self, stop: StopRequest) -> None:
        """Writes the document. Raises InterruptedRunError if a stop was asked for."""
        stop.check("interrupted; nothing was written")
        print_json({"checkpoint": self._checkpoint, "samples": [sample.as_dict() for sample in self._samples]})


def show_sampling(samples: Sequence[SampledText], seconds: float, reads: KeyReads | None) -> None:
    """Says on stderr, if that is a terminal, how fast samples came and why they ended.

    It always says what was read of the keys, if not all. The first token of a text follows from the prompt alone.
    """
    console, told = Console(stderr=True), []
    if is_live(console):
        tokens, reasons = sum(len(sample.ids) for sample in samples), Counter(each.finish_reason for each in samples)
        ended = ", ".join(f"{number} by {reason}" for reason, number in reasons.most_common())
        speed = f"{count(tokens / max(seconds, 1e-9))} tokens/s"
        told.append(f"{counted(tokens, 'token')}, {speed}; ended: {ended}")
    if reads is not None and reads.keys:
        told.append(
            f"a head read {reads.keys_read:,.0f} of {reads.keys:,.0f} keys for a token, and left out at most "
            f"{share(reads.mass_left_out)} of a row's weight"
        )
    if told:
        print_sentence(console, "; ".join(told), style="dim")
