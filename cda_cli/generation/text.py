"""Generates texts: samples and the tokens of their prompts → tokens → pieces of text, each as soon as it is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cda_cli.data import Tokenizer
from cda_cli.errors import ConfigError
from cda_cli.generation.generate import Generation, Reason
from cda_cli.generation.prompts import Sample
from cda_cli.generation.requests import Generated, Request
from cda_cli.generation.stop_strings import StopStrings
from cda_cli.model import KeyReads, KeySelection
from cda_cli.restore import Restored
from cda_cli.signals import StopRequest


class SampledText:
    """A sample as far as it is known: `text`, the ids of the tokens that were drawn, and why it ended.

    `prompt` are the tokens of its prompt. An end token is not among the ids, and a stop string not in the text.
    """

    def __init__(self, sample: Sample, prompt: list[int], tokenizer: Tokenizer, seq_len: int) -> None:
        self.sample, self.prompt = sample, prompt
        self.text = ""
        self.ids: list[int] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason: Reason | None = None
        self._tokenizer, self._seq_len = tokenizer, seq_len
        self._decoder = tokenizer.stream(prompt)
        self._stop = StopStrings(sample.prompt.settings.stop)

    def request(self) -> Request:
        """What is asked of the model. It reads no more of a prompt than the context holds."""
        settings = self.sample.prompt.settings
        read = self.prompt[-self._seq_len :]
        return Request(read, settings.max_new_tokens, settings.sampling, self.sample.seed, settings.logprobs or 0)

    @property
    def has_stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop.found is not None

    @property
    def is_truncated(self) -> bool:
        """Whether prompt and text are longer than the context, so that the model did not see all of them."""
        return len(self.prompt) + max(0, len(self.ids) - 1) > self._seq_len  # The last token is not read.

    @property
    def has_ended(self) -> bool:
        return self.finish_reason is not None

    def take(self, generated: Generated) -> None:
        """Adds a token, and the text that is known with it."""
        self.ids.append(generated.token)
        if generated.logprob is not None:
            before = self.ids[-2:-1] or self.prompt
            likeliest = [self._described(*each, before) for each in generated.alternatives]
            drawn = self._described(generated.token, generated.logprob, before)
            self.logprobs.append({**drawn, "top_logprobs": likeliest})
        self.text += self._stop.push(self._decoder.push(generated.token))

    def finish(self, reason: Reason) -> None:
        """Adds the text that was held back, once no more tokens come."""
        self.text += self._stop.push(self._decoder.flush()) + self._stop.flush()
        self.finish_reason = "stop" if self.has_stopped else reason

    def as_dict(self) -> dict[str, Any]:
        """What the output says of the sample, after the fields that its prompt carries."""
        prompt = self.sample.prompt
        return {
            **prompt.fields,
            "prompt": prompt.text,
            "seed": self.sample.seed,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": len(self.prompt),
            "completion_tokens": len(self.ids),
            "truncated": self.is_truncated,
            **({"logprobs": self.logprobs} if prompt.settings.logprobs else {}),
        }

    def _described(self, token: int, logprob: float, before: list[int]) -> dict[str, Any]:
        return {"token": token_text(self._tokenizer, token, before), "token_id": token, "logprob": logprob}


class TextGeneration:
    """The texts of several samples, in batches: iterate once over it, until the texts end or a stop is asked for.

    It yields the sample that has one more token, and once more when that has ended. `prompts` are the tokens of each
    sample's prompt (see `encode_prompts`). A text ends after its number of tokens, before an end token, or before a
    stop string. Where the context is full, the model goes on with its newer half, or without `slide` the text ends.
    `dtype` is that of the matrix products. Each token reads the keys of `selection`, or all.
    """

    def __init__(
        self,
        restored: Restored,
        samples: Sequence[Sample],
        prompts: Sequence[list[int]],
        *,
        dtype: torch.dtype,
        stop: StopRequest,
        batch_size: int = 1,
        slide: bool = True,
        selection: KeySelection | None = None,
    ) -> None:
        tokenizer, seq_len = restored.tokenizer, restored.model.config.seq_len
        pairs = zip(samples, prompts, strict=True)
        self.samples = [SampledText(sample, prompt, tokenizer, seq_len) for sample, prompt in pairs]
        self._stop = stop
        self._generation = Generation(
            restored.model,
            [each.request() for each in self.samples],
            batch_size=batch_size,
            dtype=dtype,
            end_tokens=(tokenizer.separator,),
            slide=slide,
            selection=selection,
        )

    def reads(self) -> KeyReads | None:
        """What was read of the keys so far, if not all."""
        return self._generation.reads()

    def __iter__(self) -> Iterator[SampledText]:
        reasons, finished = self._generation.reasons, 0
        for generated in self._generation:
            if self._stop:
                return
            sampled = self.samples[generated.request]
            sampled.take(generated)
            yield sampled
            if sampled.has_stopped:
                self._generation.end(generated.request)
            if len(reasons) > finished:  # An end token is no token of its text, so others may have ended too.
                yield from self._finished(list(reasons)[finished:])
                finished = len(reasons)
        yield from self._finished(list(reasons)[finished:])

    def _finished(self, requests: Sequence[int]) -> Iterator[SampledText]:
        for request in requests:
            self.samples[request].finish(self._generation.reasons[request])
            yield self.samples[request]


def encode_prompts(restored: Restored, samples: Sequence[Sample], *, slide: bool = False) -> list[list[int]]:
    """Returns the tokens of each sample's prompt, after the one that begins each document, if there is one.

    Raises ConfigError for a prompt that is empty, and without `slide` for one that is longer than the context.
    """
    tokenizer, seq_len = restored.tokenizer, restored.model.config.seq_len
    texts = {sample.place: sample.prompt.text for sample in samples}
    prompts: dict[int, list[int]] = {}
    for place, text in texts.items():
        name = "the prompt" if len(texts) == 1 else f"prompt {place}"
        prompts[place] = [*map(int, tokenizer.beginning.ids), *map(int, tokenizer.encode(text))]
        if not prompts[place]:
            raise ConfigError(f"{name} is empty; give it at least one character")
        if len(prompts[place]) > seq_len and not slide:
            raise ConfigError(
                f"{name} has {len(prompts[place])} tokens and the model's context {seq_len}; shorten it to fit, or let "
                "the model read the newest of them by --context-shift"
            )
    return [prompts[sample.place] for sample in samples]


def token_text(tokenizer: Tokenizer, token: int, before: Sequence[int]) -> str:
    """The text of one token after the tokens `before`, which decide whether it begins with a space."""
    decoder = tokenizer.stream(before[-1:])
    return decoder.push(token) + decoder.flush()
