"""The way of the data, a module an arrow:

--data → files       sources     stdlib, local files, Hugging Face datasets (hub: its errors and its silence)
files → text         files       unpacked and decoded; fingerprint tells one text from another
text → documents     rows        what a text, JSON, CSV or Parquet file holds; documents: of several, from any place on
documents → sides    split       training and validation, by document
text → tokens        tokenizers  bytes, or a tokenizer.json
tokens → bytes       sizes       of the text that each stands for
tokens → disk        prepare     memory-mapped, cached, written whole
tokens → batches     batches     windows; iterators that can say and restore their position
documents → batches  streaming   the same without preparing
batches → ahead      prefetch    made in a thread, before they are asked for
"""

from cda_cli.data.batches import (
    Batch,
    TrainBatches,
    check_lengths,
    count_evaluation_windows,
    count_windows,
    evaluation_batches,
)
from cda_cli.data.fingerprint import digest
from cda_cli.data.prefetch import Prefetched
from cda_cli.data.prepare import (
    Corpus,
    PreparationStoppedError,
    Tokens,
    cache_folder,
    loss_of_text,
    prepare,
    prepare_whole,
)
from cda_cli.data.sources import Source, absolute_source, is_there, open_source
from cda_cli.data.streaming import StreamedBatches, streamed_identity, streamed_validation
from cda_cli.data.tokenizers import (
    ByteTokenizer,
    JsonTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_json,
    without_surrogates,
)
from cda_cli.targets import IGNORE

__all__ = [
    "IGNORE",
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "JsonTokenizer",
    "Prefetched",
    "PreparationStoppedError",
    "Source",
    "StreamDecoder",
    "StreamedBatches",
    "Tokenizer",
    "Tokens",
    "TrainBatches",
    "absolute_source",
    "cache_folder",
    "check_lengths",
    "count_evaluation_windows",
    "count_windows",
    "digest",
    "evaluation_batches",
    "is_there",
    "load_tokenizer",
    "loss_of_text",
    "open_source",
    "prepare",
    "prepare_whole",
    "streamed_identity",
    "streamed_validation",
    "tokenizer_from_json",
    "without_surrogates",
]
