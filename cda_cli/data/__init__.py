"""The way of the data. Each arrow is a module:

--data → files       sources     standard library, local files, downloads, Hugging Face datasets (hub: its errors)
folder → files       folders     which files hold text; the files of a saved dataset
address → file       download    into the cache, once
files → text         files       unpacks and decodes; fingerprint tells one text from another
text → documents     row_readers reads text, JSON, CSV, Parquet and Arrow; documents joins files and keeps positions
documents → sides    split       training and validation, by document
text → tokens        tokenizers  bytes, or a tokenizer.json; bpe trains one on the training side
tokens → bytes       sizes       of the text that each token stands for
tokens → disk        prepare     memory-mapped; cache writes each entry whole
tokens → batches     batches     windows; iterators that save and restore their position
tokens → windows     windows     in which a text is evaluated, each token once
documents → batches  streaming   the same without preparing
--data → examples    tasks       of a synthetic task, made from a seed
examples → batches   task_rows   one example a row
batches → ahead      prefetch    a thread makes them before they are asked for
"""

from cda_cli.data.batches import (
    Batch,
    Share,
    TrainBatches,
    check_lengths,
    count_windows,
    share_of,
    to_batch,
)
from cda_cli.data.bpe import bpe_size
from cda_cli.data.cache import Preparation, PreparationStoppedError, cache_folder
from cda_cli.data.fingerprint import digest
from cda_cli.data.hub import hub_folder
from cda_cli.data.prefetch import Prefetched
from cda_cli.data.prepare import Corpus, Tokens, loss_of_text, prepare, prepare_whole
from cda_cli.data.sources import Source, absolute_source, is_there, open_source
from cda_cli.data.streaming import StreamedBatches, streamed_source, streamed_validation
from cda_cli.data.task_rows import TaskBatches, check_task_tokenizer, task_examples, task_tokenizer, task_tokens
from cda_cli.data.tasks import TASKS, Task, is_task, parse_task, task_of_length
from cda_cli.data.tokenizers import (
    ByteTokenizer,
    Encoded,
    JsonTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_json,
    without_surrogates,
)
from cda_cli.data.windows import Windows, count_words, document_windows, evaluation_batches, whole_windows
from cda_cli.targets import IGNORE

__all__ = [
    "IGNORE",
    "TASKS",
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "Encoded",
    "JsonTokenizer",
    "Prefetched",
    "Preparation",
    "PreparationStoppedError",
    "Share",
    "Source",
    "StreamDecoder",
    "StreamedBatches",
    "Task",
    "TaskBatches",
    "Tokenizer",
    "Tokens",
    "TrainBatches",
    "Windows",
    "absolute_source",
    "bpe_size",
    "cache_folder",
    "check_lengths",
    "check_task_tokenizer",
    "count_windows",
    "count_words",
    "digest",
    "document_windows",
    "evaluation_batches",
    "hub_folder",
    "is_task",
    "is_there",
    "load_tokenizer",
    "loss_of_text",
    "open_source",
    "parse_task",
    "prepare",
    "prepare_whole",
    "share_of",
    "streamed_source",
    "streamed_validation",
    "task_examples",
    "task_of_length",
    "task_tokenizer",
    "task_tokens",
    "to_batch",
    "tokenizer_from_json",
    "whole_windows",
    "without_surrogates",
]
