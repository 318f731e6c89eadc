"""A trained model as Python uses it: `cda_cli.load` returns a `LanguageModel`.

Shapes: N tokens of a text, V size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cda_cli.config import Config
from cda_cli.data import Encoded, Tokenizer, Tokens, evaluation_batches
from cda_cli.errors import ConfigError
from cda_cli.evaluation.evaluate import evaluate
from cda_cli.evaluation.loglikelihood import loglikelihoods
from cda_cli.generation.prompts import Prompt, PromptSettings, plan_samples
from cda_cli.generation.text import TextGeneration, encode_prompts
from cda_cli.interchange.import_model import restore_folder
from cda_cli.interchange.source import CONFIG
from cda_cli.model import Transformer
from cda_cli.plurals import counted
from cda_cli.restore import Restored, on_device, restore_on
from cda_cli.runtime import autocast
from cda_cli.signals import StopRequest

BATCH_SIZE = 16  # windows in a forward pass, as in `cda eval`


class LanguageModel:
    """A model with its tokenizer, in evaluation mode on its device.

    It takes plain text. No special token of the tokenizer is read out of it. Where the model was trained with a token
    that begins each document (`data.bos`), that token stands in front of each text.
    """

    def __init__(self, restored: Restored, dtype: torch.dtype) -> None:
        self._restored, self._dtype = restored, dtype

    @property
    def model(self) -> Transformer:
        """The module. Called with tokens [B, T], int64, it returns logits [B, T, V]."""
        return self._restored.model

    @property
    def tokenizer(self) -> Tokenizer:
        """Turns text into tokens (`encode`), and back (`decode`)."""
        return self._restored.tokenizer

    @property
    def config(self) -> Config:
        """The settings that the model was trained with; of an exported folder only those of model and tokenizer."""
        return self._restored.config

    @property
    def path(self) -> Path:
        """The folder of the checkpoint, or the exported folder."""
        return self._restored.path

    @property
    def restored(self) -> Restored:
        """All that was restored: the model, and what its checkpoint says."""
        return self._restored

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._restored.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the matrix products."""
        return self._dtype

    def __repr__(self) -> str:
        precision = str(self._dtype).removeprefix("torch.")
        size = counted(self.model.parameter_count(), "parameter")
        return f"<LanguageModel of {self.path}: {size}, {self.device}, {precision}>"

    @torch.no_grad()
    def logits(self, text: str) -> Tensor:
        """Returns the logits [N, V] of `text`, float32, on the device of the model.

        Row i is about the token that follows token i; `data.bos` is token 0, if there is one. Raises ConfigError if
        the text has no token, or more than the context of the model.
        """
        ids, context = self.encoded(text).ids, self.config.model.seq_len
        if not 0 < len(ids) <= context:
            raise ConfigError(
                f"the text has {counted(len(ids), 'token')}; give from one to the {context} of the model's context"
            )
        tokens = torch.from_numpy(ids.astype(np.int64)).to(self.device)
        with autocast(self.device, self.dtype):
            logits: Tensor = self.model(tokens[None])
        return logits[0].float()

    def loglikelihood(self, text: str | tuple[str, str], *, with_separator: bool = False) -> float:
        """Returns the natural logarithm of the probability of `text`, in nats, summed over its tokens.

        Of a string, each token but the first is predicted once, as `cda eval` does: a text that is longer than the
        context is cut into windows that do not overlap. Of a pair (context, continuation), the tokens of the
        continuation are predicted after as much of the context as the model can see. They begin where the tokens of
        the whole text depart from those of the context, since a token may span both.

        `with_separator` also predicts the separator, which ends each document in training. Losses are float32, and
        their sum is float64. Raises ConfigError if nothing stands before what is to be predicted, or if a continuation
        is longer than the model's context.
        """
        context, continuation = ("", text) if isinstance(text, str) else text
        encoded = self.encoded(context + continuation)
        first = _common_prefix(encoded, self.encoded(context)) if isinstance(text, tuple) else 1
        if with_separator:
            encoded = Encoded.join([encoded, self.tokenizer.ending])
        if not 0 < first <= len(encoded.ids):
            raise ConfigError("nothing stands before the text to predict it from; put at least one token there")
        if first == len(encoded.ids):
            return 0.0
        device = self.device
        if isinstance(text, tuple):
            ids = encoded.ids.tolist()
            return loglikelihoods(self.model, [(ids[:first], ids[first:])], 1, device, self._dtype)[0].nats
        batches = evaluation_batches(Tokens(*encoded, text_bytes=0), self.config.model.seq_len, BATCH_SIZE)
        result = evaluate(self.model, batches, device, self._dtype)
        return -result.loss * result.tokens

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
    ) -> str:
        """Returns the text that follows `prompt`: what `cda sample` writes with the same options and seed.

        Temperature 0 takes the likeliest token. `top_k` keeps that many tokens, `top_p` the likeliest that make up this
        share, `min_p` those above this share of the likeliest's probability. `repetition_penalty` divides the positive
        logits of tokens that the text has, prompt included, and multiplies the others; `presence_penalty` is subtracted
        from the logits of tokens that were drawn before. The text ends after `max_new_tokens`, before a separator, or
        before a string of `stop`. Where the context is full, the model goes on with its newer half. Raises ConfigError
        for a prompt that is empty or longer than the context of the model, and for a setting without meaning.
        """
        settings = PromptSettings.of(
            {
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "presence_penalty": presence_penalty,
                "stop": stop,
            }
        )
        samples = plan_samples([Prompt(prompt, settings)], seed)
        prompts = encode_prompts(self._restored, samples)
        generation = TextGeneration(self._restored, samples, prompts, dtype=self._dtype, stop=StopRequest())
        [*_, sampled] = generation
        return sampled.text

    def encoded(self, text: str) -> Encoded:
        """The tokens of a text, after the one that begins each document and each prompt, if there is one."""
        return Encoded.join([self.tokenizer.beginning, self.tokenizer.encode_sized(text)])


def load_language_model(
    path: str | Path, *, best: bool, ema: bool, device: str, dtype: str, backend: str
) -> LanguageModel:
    """Does what `cda_cli.load` says."""
    folder = Path(path).expanduser()
    if not (folder / CONFIG).is_file():
        return LanguageModel(*restore_on(folder, device, dtype, backend, best=best, ema=ema))
    if best or ema:
        raise ConfigError(f"{folder} holds one model, not a run; leave best and ema out")
    return LanguageModel(*on_device(device, dtype, backend, partial(restore_folder, folder)))


def _common_prefix(first: Encoded, second: Encoded) -> int:
    """Counts the tokens with which both begin."""
    length = min(len(first.ids), len(second.ids))
    differ = np.flatnonzero(first.ids[:length] != second.ids[:length])
    return int(differ[0]) if len(differ) else length
