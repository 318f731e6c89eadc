"""The options of `cda sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PROMPTS, DRAWING, OUTPUT = "Prompts", "Drawing", "Output"
AUTO = "auto"

TextsArgument = Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to go on from.")]
PromptOption = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt", "-p", metavar="TEXT", help="A text to go on from; one for each --prompt.", rich_help_panel=PROMPTS
    ),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE|-",
        help='UTF-8 text, a prompt a line, or JSON lines such as {"prompt": "Once", "seed": 1, "top_k": 9}, with any '
        "of these settings; further fields go on to the output.",
        rich_help_panel=PROMPTS,
    ),
]
NumSamplesOption = Annotated[
    int, typer.Option(min=1, metavar="N", help="Samples for each prompt.", rich_help_panel=PROMPTS)
]
ContextShiftOption = Annotated[
    bool | None,
    typer.Option(
        "--context-shift/--no-context-shift",
        help="What is longer than the model's context: go on from the newest tokens, or end the text there.",
        show_default="refuse such a prompt, go on with such a text",
        rich_help_panel=PROMPTS,
    ),
]
MaxNewTokensOption = Annotated[
    int, typer.Option(min=1, help="Most tokens that are added to a prompt.", rich_help_panel=DRAWING)
]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the likeliest token.", rich_help_panel=DRAWING)]
TopKOption = Annotated[int | None, typer.Option(help="Only the k likeliest tokens.", rich_help_panel=DRAWING)]
TopPOption = Annotated[
    float | None, typer.Option(help="Only the likeliest tokens that make up this share.", rich_help_panel=DRAWING)
]
MinPOption = Annotated[
    float | None, typer.Option(help="Only tokens above this share of the likeliest's.", rich_help_panel=DRAWING)
]
RepetitionPenaltyOption = Annotated[
    float,
    typer.Option(
        help="Divides the positive logits of tokens that the text has, prompt included, and multiplies the others, as "
        "in transformers; 1: none.",
        rich_help_panel=DRAWING,
    ),
]
PresencePenaltyOption = Annotated[
    float,
    typer.Option(
        help="Is subtracted from the logits of tokens that were drawn before, as in OpenAI's API; 0: none.",
        rich_help_panel=DRAWING,
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated.", rich_help_panel=DRAWING),
]
SeedOption = Annotated[
    int,
    typer.Option(min=0, help="Same seed, same text; each further sample takes the next seed.", rich_help_panel=DRAWING),
]
LogprobsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="In JSON, the log-probability of each token and of the N likeliest, in nats: the model's, before "
        "penalties, temperature and filters.",
        rich_help_panel=OUTPUT,
    ),
]
StreamOption = Annotated[
    bool,
    typer.Option("--stream/--no-stream", help="Print text as it comes, or when it is whole.", rich_help_panel=OUTPUT),
]
NullOption = Annotated[
    bool,
    typer.Option(
        "--null",
        "-0",
        help="No headings, and a NUL character after each sample, not a newline.",
        rich_help_panel=OUTPUT,
    ),
]
JsonLinesOption = Annotated[
    bool,
    typer.Option(
        "--jsonl",
        help="A JSON object on a line for each sample, as soon as it and those before it have ended.",
        rich_help_panel=OUTPUT,
    ),
]
BatchSizeOption = Annotated[
    str,
    typer.Option(
        "--batch-size", metavar=f"{AUTO}|N", help="Samples that go on together; auto: as many as fit the memory."
    ),
]
