"""Writes the generated pages of the docs: cli.md from the help of the commands, configuration.md from the settings,
metrics.md from the types of the records, and tasks.md from the synthetic tasks. sample-report.html keeps its figures,
and gets template, style and script of the page as they are now.

    make docs

`tests/test_docs.py` fails where a page differs from what this would write.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tempfile
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from cda_cli.config import preset_purpose, preset_values
from cda_cli.console.settings import default_words
from cda_cli.data import TASKS
from cda_cli.page.page import in_template
from cda_cli.runs.records import KINDS, VERSION, HeadAlarm, LayerRecord
from cda_cli.settings import SECTIONS, preset_names
from cda_cli.settings_table import TABLE

FOLDER = Path(__file__).parent


def pages() -> dict[str, str]:
    """Name and text of each generated page."""
    return {
        "cli.md": commands(),
        "configuration.md": configuration(),
        "metrics.md": metrics(),
        "tasks.md": tasks(),
        "sample-report.html": sample_report(),
    }


def commands() -> str:
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "cli.md"
        arguments = ["cda_cli.main", "utils", "docs", "--name", "cda", "--output", str(page)]
        subprocess.run([sys.executable, "-m", "typer", *arguments], check=True, stdout=subprocess.DEVNULL)
        return page.read_text(encoding="utf-8")


CONFIGURATION = """\
# Configuration

A run is described by four sections. The layers, the later winning: preset, model and tokenizer of `--init-from`,
`--config FILE.yaml`, `--set section.key=value`, flags. Of two `--set` with the same key the later wins. An
unknown key is an error that names the nearest one, and a key that a file gives twice is an error too. The
resolved configuration is written to `config.yaml` in the run folder, and `--config` reads it back. A default
stands where neither file nor `--set` nor flag gives a value; where the presets differ, the tables below name each.

`cda config` shows this page for the settings at hand: it takes the options of `cda train` and says of each value where
it comes from. `cda config optim dropout` shows what these words name, `cda config RUN` what a run had and how that
differs from the preset that it began from. `cda config --yaml > mine.yaml` writes a file to start from, and
`cda config --schema` the JSON Schema of such a file, by which an editor completes and checks it.

The setting decides what its text means. Numbers are decimal: `010` is ten, and `1e3` and `1_000` are a
thousand, for whole numbers too; switches are `true` and `false`. `null` takes away an optional value.
`--set` takes a text, such as a path, as it is: `#`, `:`, quotes and spaces are part of it."""

CACHE = """\
## The cache

A cache keeps what is prepared from a text, so that the next run on the same text begins at once: tokens, trained
tokenizers and downloads. It is the folder that `CDA_CACHE` names, else `cda` in `$XDG_CACHE_HOME`, else `~/.cache/cda`.
`cda doctor` shows which folder it is and how much it holds. Each entry is written whole and found by its content
([training.md](training.md#the-text-of-a-run)), a download by its address. If a run has several processes, the first
one fills the cache and the others wait.

To empty the cache, remove the folder: `cda` makes again what it needs. Two kinds of run need it meanwhile and may end
with an error: one that is preparing its text, and one with `--streaming` from an address, which opens its download anew
in each epoch. `--streaming` puts no tokens into the cache. Hugging Face keeps its datasets and tokenizers in a cache of
its own, which `HF_HOME` moves."""


def table_row(*cells: str) -> str:
    """Returns a row of a table. A cell may hold the sign that parts cells, as in |x|."""
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def configuration() -> str:
    lines = [CONFIGURATION, "", "## Presets", "", "`cda presets` lists them, and `cda presets NAME` prints one.", ""]
    lines += ["| preset | parameters | purpose |", "|---|---|---|"]
    lines += [f"| `{name}` | {' | '.join(preset_purpose(name))} |" for name in preset_names()]
    lines += ["", CACHE]
    values = preset_values()
    for section, settings in SECTIONS.items():
        lines += ["", f"## {section}", "", f"{settings.__doc__}", ""]
        lines += ["| key | flag | allowed | default | meaning |", "|---|---|---|---|---|"]
        for row in TABLE.values():
            if row.section == section:
                spellings = [row.setting.short, *row.setting.flag.split("/")]
                flag = " ".join(f"`{spelling}`" for spelling in spellings if spelling)
                default = default_words({name: values[name][row.key] for name in values})
                lines.append(table_row(f"`{row.key}`", flag, row.allowed, default, row.setting.help))
    return "\n".join(lines) + "\n"


RECORDS = f"""\
# Metrics

`RUN/metrics.jsonl` holds the records of a run, oldest first. Each line is a JSON object in UTF-8 with at least a `step`
and a `kind`. This page is version {VERSION} of the schema. [training.md](training.md) says how speed, utilisation and
bits per byte are counted.

- A number that is not finite is `null`, and a field that may be missing is left out where a run has no such thing.
- A record is on the disk at once. A kill can cut the last line short: pass over it.
- A run that goes on from a checkpoint first drops the records of the steps that it does again.
- Only a newline ends a record: a text may hold U+2028 and its like.
- A later version may add kinds and fields: ignore those that you do not know. A name keeps its meaning and its unit.

`Run.metrics` reads them so:

```python
from pathlib import Path

from cda_cli.runs.folder import Run
from cda_cli.runs.records import ValidationRecord

for record in Run(Path("runs/tiny")).metrics():
    if isinstance(record, ValidationRecord):
        print(record.step, record.loss)
```"""

TYPES = {int: "integer", float: "number", str: "string", tuple: "array", NoneType: "null"}


def metrics() -> str:
    lines = [RECORDS]
    for kind, record in KINDS.items():
        lines += ["", f"## {kind}", "", *record_table(record)]
    for name, record in (("layers", LayerRecord), ("alarms", HeadAlarm)):
        lines += ["", f"## {name} of a train record", "", *record_table(record)]
    return "\n".join(lines) + "\n"


def record_table(record: type[Any]) -> list[str]:
    lines = [inspect.cleandoc(str(record.__doc__)), "", "| field | type | unit | meaning |", "|---|---|---|---|"]
    hints = get_type_hints(record, include_extras=True)
    for field in fields(record):
        hint, about = get_args(hints[field.name])
        kinds = [get_origin(hint) or hint] if get_origin(hint) in (None, tuple) else get_args(hint)
        if field.default is MISSING:
            words = " or ".join(TYPES[kind] for kind in kinds)
        else:
            words = f"{TYPES[kinds[0]]}, may be missing"
        lines.append(table_row(f"`{field.name}`", words, about.unit, about.meaning))
    return lines


SYNTHETIC = """\
# Synthetic tasks

`--data task:NAME` trains on examples that are made from a seed, without any file, each with an exact answer:

```console
$ cda train --data 'task:sort?length=32..64&vocab=32' --seq-len 131 --out runs/sort
$ cda sample runs/sort --prompt "<bos> 3 1 2 <sep>" --temperature 0
```

Parameters follow a `?`, with `&` between them; quote them, so that the shell leaves them to `cda`. A `length` is a
number, or a range from which each example draws its own. The defaults are the published settings that each task names.

- **Tokens.** The symbols are the numbers from 0 to `vocab` − 1. Every task has the same special tokens behind them, so
  a model that was trained on one can start another, or be evaluated on it, if both have the same `vocab`.
- **Rows.** Each sequence of a batch is one example, padded with `<pad>` to `seq_len`. The loss is that of the answer
  alone. Padding counts as tokens in the speed, and bits per byte spread the loss over the digits of the answer.
- **Seed.** The seed of the run and the number of an example decide it, on every machine, so a run resumes on the
  examples that it would have seen. There is no end, and no example is seen twice but by chance.
- **Validation.** Its examples are the same for every run, and drawn apart from those of training. Of a task with few
  examples, some are by chance the same. `cda eval` takes the first 1,024 of them.

## Scores by length

```console
$ cda eval runs/sort --tasks task:sort --lengths 64,128,256 --plot lengths.png
$ cda eval runs/softmax runs/entmax --tasks task:sort,task:copy --lengths 64,128,256
```

`--tasks task:NAME` scores one or several checkpoints at each length, in the first 1,000 examples of validation or the
first `--limit`. The figures, with their names in `--json`:

- **exact match** (`exact_match`): the share of examples whose whole answer is right, with its 95 % interval (`_lo`,
  `_hi`; Wilson, JASA 22, 1927) and standard error (`_stderr`);
- **token accuracy** (`token_accuracy`): the share of the tokens of the answers that are right, `<eos>` and the other
  special tokens included, with its standard error over examples (`_stderr`);
- **solver** (`solver_exact_match`): the exact match of an exact algorithm. It is 100 %, or the examples would be
  ambiguous;
- **shuffled** (`shuffled_exact_match`, `shuffled_token_accuracy`): both shares if each example gets the answer to
  another. They are chance, which for the tokens of sorted answers is far above that of single symbols.

A token is right if it is the likeliest after the right ones before it, so one pass of the model scores an answer. The
exact match is that of free greedy decoding, which gives the whole answer if and only if each of its tokens is the
likeliest after the right ones. The token accuracy is not, as free decoding goes on from its own mistakes.

What a name leaves out is as in the task of the run: all parameters of the same task, and `vocab` of another. With
`model.position` `rotary`, `nape` or `none`, lengths may exceed the context of training; learned positions end with it.
Each length is kept as it ends, and the same command goes on ([evaluation-tasks.md](evaluation-tasks.md))."""


def tasks() -> str:
    lines = [SYNTHETIC]
    for name, task in TASKS.items():
        lines += ["", f"## {name}", "", inspect.cleandoc(str(task.__doc__)), ""]
        lines += ["| parameter | default | meaning |", "|---|---|---|"]
        for parameter, field in task.model_fields.items():
            lines.append(f"| `{parameter}` | {field.default} | {field.description} |")
    return "\n".join(lines) + "\n"


# Where a page has what its report fills in (cda_cli/page/template.html).
PARTS = {
    "title": "<title>(.*?)</title>",
    "verdict": '<ul id="verdict">(.*?)</ul>',
    "source": "<footer>\n<p>(.*?)</p>",
    "kept": "<footer>\n<p>.*?</p>\n<p>(.*?)</p>",
    "report": '<script type="application/json" id="report">(.*?)</script>',
    "streams": '(<script type="text/plain".*</script>)\n<script type="module">',
}


def sample_report() -> str:
    sample = (FOLDER / "sample-report.html").read_text(encoding="utf-8")
    return in_template(**{part: re.findall(place, sample, re.DOTALL)[0] for part, place in PARTS.items()})


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
