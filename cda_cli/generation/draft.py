"""A text that a person and a model write in turn, of which each addition can be taken back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from cda_cli.errors import ConfigError
from cda_cli.generation.prompts import Prompt, PromptSettings, Sample
from cda_cli.generation.text import SampledText, TextGeneration, token_text
from cda_cli.restore import Restored
from cda_cli.runtime import autocast
from cda_cli.signals import StopRequest


class TokenProbabilities(NamedTuple):
    """A token of a text and the likeliest ones in its place, with their probabilities.

    Tokens are written as Python would write them; one that ends a document is `eos`. The probabilities are those of the
    model, before temperature, filters and penalties.
    """

    number: int
    token: str
    probability: float
    likeliest: list[tuple[str, float]]


class Draft:
    """The tokens of a text so far. They are numbered from its end: 1 is the last.

    Each draw takes the next seed, from `seed` on. `dtype` is that of the matrix products.
    """

    def __init__(self, restored: Restored, dtype: torch.dtype, settings: PromptSettings, seed: int) -> None:
        self.restored, self.dtype, self.settings = restored, dtype, settings
        self._seeds = itertools.count(seed)
        self._beginning = [*map(int, restored.tokenizer.beginning.ids)]
        self._additions: list[tuple[list[int], bool]] = []  # tokens, and whether the model drew them

    @property
    def tokens(self) -> list[int]:
        """Those of the text, and before them the one that begins each document, if there is one."""
        return [*self._beginning, *itertools.chain.from_iterable(tokens for tokens, _ in self._additions)]

    @property
    def text(self) -> str:
        return self.restored.tokenizer.decode(self.tokens)

    def write(self, text: str) -> None:
        """Adds a text."""
        self._additions.append(([*map(int, self.restored.tokenizer.encode(text))], False))

    def draw(self, stop: StopRequest) -> Iterator[SampledText]:
        """Adds what the model draws, until it ends or a stop is asked for; yields what there is of it with each token.

        A stop string stays in the text. Raises ConfigError if there is nothing to go on from.
        """
        tokens = self.tokens
        if not tokens:
            raise ConfigError("the text is empty; write at least one character")
        sample = Sample(Prompt("", self.settings), 1, 1, next(self._seeds))
        generation = TextGeneration(self.restored, [sample], [tokens], dtype=self.dtype, stop=stop)
        [sampled] = generation.samples
        self._additions.append((sampled.ids, True))
        yield from generation
        if not sampled.ids:
            self._additions.pop()

    def undo(self) -> None:
        """Takes the last addition back. Raises ConfigError if there is none."""
        if not self._additions:
            raise ConfigError("the text is empty; there is nothing to take back")
        self._additions.pop()

    def undo_draw(self) -> None:
        """Takes the last addition back, if the model drew it; otherwise raises ConfigError."""
        if not self._additions or not self._additions[-1][1]:
            raise ConfigError("the model did not add the last of the text; press Enter to draw")
        self._additions.pop()

    def before(self, number: int) -> list[int]:
        """The tokens that the model sees in front of token `number`: the newest that the context holds.

        Raises ConfigError if there is no such token, or if it is the first, which is drawn from nothing.
        """
        tokens = self.tokens
        if not 1 <= number < len(tokens):
            raise ConfigError(f"there is no token {number} that follows another; the text has {len(tokens)}")
        return tokens[:-number][-self.restored.model.config.seq_len :]

    def names(self, number: int) -> list[str]:
        """The tokens `before(number)`, as TokenProbabilities has them."""
        before = self.before(number)
        return [self._name(token, before[:place]) for place, token in enumerate(before)]

    @torch.inference_mode()
    def probabilities(self, number: int, most: int) -> TokenProbabilities:
        """Tells what might have stood in the place of a token: the `most` likeliest. Raises as `before` does."""
        before, token, device = self.before(number), self.tokens[-number], self.restored.device
        with autocast(device, self.dtype):
            logits = self.restored.model(torch.tensor([before], device=device))[0, -1]
        probabilities = logits.float().softmax(-1)
        likeliest = probabilities.topk(min(most, len(probabilities)))
        pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        named = [(self._name(other, before), share) for other, share in pairs]
        return TokenProbabilities(number, self._name(token, before), probabilities[token].item(), named)

    def _name(self, token: int, before: list[int]) -> str:
        tokenizer = self.restored.tokenizer
        return "eos" if token == tokenizer.separator else repr(token_text(tokenizer, token, before))
