"""`cda sample`."""

from __future__ import annotations

import sys
from time import perf_counter

from cda_cli.commands import sample_options
from cda_cli.commands.key_options import MaxKeysOption, ToleranceOption, checked_selection
from cda_cli.commands.options import (
    BackendOption,
    BestOption,
    CheckpointArgument,
    DeviceOption,
    DtypeOption,
    EmaOption,
    JsonOption,
)
from cda_cli.commands.sample_checks import check_output, checked_batch_size


def sample(
    checkpoint: CheckpointArgument,
    texts: sample_options.TextsArgument = None,
    best: BestOption = False,
    ema: EmaOption = False,
    prompt: sample_options.PromptOption = None,
    prompts: sample_options.PromptsOption = None,
    num_samples: sample_options.NumSamplesOption = 1,
    context_shift: sample_options.ContextShiftOption = None,
    max_new_tokens: sample_options.MaxNewTokensOption = 256,
    temperature: sample_options.TemperatureOption = 0.8,
    top_k: sample_options.TopKOption = None,
    top_p: sample_options.TopPOption = None,
    min_p: sample_options.MinPOption = None,
    repetition_penalty: sample_options.RepetitionPenaltyOption = 1.0,
    presence_penalty: sample_options.PresencePenaltyOption = 0.0,
    stop: sample_options.StopOption = None,
    seed: sample_options.SeedOption = 0,
    stream: sample_options.StreamOption = True,
    null: sample_options.NullOption = False,
    as_json: JsonOption = False,
    json_lines: sample_options.JsonLinesOption = False,
    logprobs: sample_options.LogprobsOption = None,
    batch_size: sample_options.BatchSizeOption = sample_options.AUTO,
    max_keys: MaxKeysOption = None,
    tolerance: ToleranceOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
) -> None:
    """Text from a model. The prompt comes from an argument, --prompt, a file, or stdin where none of these is given.

    On a terminal without a prompt it is a line editor: you and the model write in turn, and it shows what else the
    model might have drawn, and which keys each head read.

    A pipe or a file gets the prompt and the text exactly, and a newline after each sample; a terminal gets marks for
    control characters. Several samples have a heading each, which gives the seed that makes this sample alone. A
    program that takes samples apart reads --null, --json or --jsonl. A character that the encoding of stdout lacks is
    written as an escape such as \\u3042.
    """
    from functools import partial

    from cda_cli.commands.sample_editor import edit
    from cda_cli.console import SampleDocument, SampleLines, SampleText, progress, show_sampling
    from cda_cli.errors import ConfigError
    from cda_cli.generation.batch_size import auto_batch_size
    from cda_cli.generation.prompts import PromptSettings, plan_samples, read_prompts
    from cda_cli.generation.text import TextGeneration, encode_prompts
    from cda_cli.restore import restore_on
    from cda_cli.signals import StopRequest

    rows, given = checked_batch_size(batch_size), [*(texts or ()), *(prompt or ())]
    selection = checked_selection(max_keys, tolerance)
    settings = PromptSettings(
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        stop=tuple(stop or ()),
        logprobs=logprobs,
    )
    settings.check()
    load = partial(restore_on, checkpoint, device, dtype, backend, best=best, ema=ema)
    if not given and prompts is None and sys.stdin.isatty():
        if null or as_json or json_lines or selection or not sys.stdout.isatty():
            raise ConfigError("there is no prompt; give --prompt TEXT, --prompts FILE, or text on stdin")
        edit(load, settings, seed)
        return
    planned = plan_samples(read_prompts(given, prompts, sys.stdin, settings), seed)
    has_logprobs = any(each.prompt.settings.logprobs for each in planned)
    check_output({"--null": null, "--json": as_json, "--jsonl": json_lines}, has_logprobs)
    with StopRequest() as stopping:
        restored, precision = load()
        tokens = encode_prompts(restored, planned, slide=context_shift is True)
        generation = TextGeneration(
            restored, planned, tokens, dtype=precision, stop=stopping, slide=context_shift is not False,
            batch_size=rows or auto_batch_size(restored.model, precision, len(planned)), selection=selection,
        )  # fmt: skip
        output: SampleDocument | SampleLines | SampleText
        if as_json:
            output = SampleDocument(generation.samples, str(restored.path))
        elif json_lines:
            output = SampleLines(generation.samples)
        else:
            end, headings = ("\0", False) if null else ("\n", len(planned) > 1)
            output = SampleText(generation.samples, stream=stream, headings=headings, end=end)
        start, shows_samples = perf_counter(), not as_json and sys.stdout.isatty()
        with progress("sampling", len(planned), quiet=len(planned) == 1 or shows_samples) as advance:
            for sampled in generation:
                output.update()
                advance(sampled.has_ended)
        seconds = perf_counter() - start
        output.finish(stopping)
    show_sampling(generation.samples, seconds, generation.reads())
