"""The settings of the data."""

# Annotations are evaluated here: pydantic before 2.10 would look for their names in the module of the subclass.

from typing import Annotated

from cda_cli.settings.setting import Setting, Table


class DataSettings(Table):
    """Text and tokens."""

    source: Annotated[
        str,
        Setting(
            "stdlib, a file, glob or folder (any text, .jsonl .json .csv .parquet, also packed: .gz .bz2 .xz .zst "
            ".lz4; a folder of save_to_disk), http(s)://ADDRESS, also with #sha256=HEX, hf:OWNER/NAME[:CONFIG], or a "
            "synthetic task: task:NAME[?PARAMETERS].",
            flag="--data",
        ),
    ] = "stdlib"
    split: Annotated[str, Setting("Split of a dataset that is trained on.", flag="--data-split")] = "train"
    text_column: Annotated[str, Setting("Column that holds the text.", flag="--text-column")] = "text"
    encoding: Annotated[
        str,
        Setting("Encoding of local text, JSON and CSV files, such as utf-8, utf-16 or cp1252.", flag="--encoding"),
    ] = "utf-8"
    streaming: Annotated[
        bool, Setting("Tokenise while training; prepare and cache no tokens.", flag="--streaming/--no-streaming")
    ] = False
    tokenizer: Annotated[
        str, Setting("bytes, bpe:N (trained on the training text), a tokenizer.json, or a hub id.", flag="--tokenizer")
    ] = "bytes"
    bos: Annotated[
        str | None,
        Setting("Special token of the tokenizer.json that begins each document and each prompt; null: none."),
    ] = None
    eos: Annotated[
        str | None,
        Setting(
            "Special token of the tokenizer.json that ends each document and each sample; null: the first that it has "
            "of <|endoftext|>, </s> and their like, or else one of its own."
        ),
    ] = None
    validation_fraction: Annotated[float, Setting("Share of the text that is held out for validation.", gt=0, lt=1)] = (
        0.1
    )
    shift_windows: Annotated[
        bool,
        Setting("Begin the windows of each pass at another place, so that a text read many times is overfitted later."),
    ] = False
