"""The data sets of SCROLLS (Shaham et al. 2022) as examples, from SCROLLS' own files.

scrolls:DIR/TASK(split=train, tokens=8192) reads DIR/TASK/train.jsonl, or that file of DIR/TASK.zip. A line
has "id", "input" and "output"; lines of one id have the same input, and their outputs are references. Input
and output are cut as by BiPE's authors, whose rows have 8192 tokens; of other rows the output has the same
share. Data sets of this project have the same form, see `TASKS`.
"""

import dataclasses
import json
import re
import zipfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from etils import epath

from bipe_jax.config.spec import Source
from bipe_jax.data.datasets import ReadShard
from bipe_jax.errors import UserError
from bipe_jax.suggest import did_you_mean

SPLITS = ("train", "validation", "test")
ROUGE, F1, EXACT = "rouge", "f1", "exact_match"
LABELS = ("Entailment", "Contradiction", "Not mentioned")  # of ContractNLI
_AUTHORS_TOKENS = 8192
LEAST = 32  # tokens of a row
_FORM = re.compile(r"(.+?)(?:\((.*)\))?", re.DOTALL)
_OPTION = re.compile(r"\(([A-Z])\)[ \t]*")


class Task(NamedTuple):
    """A data set.

    Attributes:
      metric: of its outputs. output: the most tokens of one, in a row of 8192.
      before, after: what is put around the input. Where the prompt is cut, `after` is kept.
      options: the outputs that are compared by their probability; "input": the input lists them.
    """

    metric: str
    output: int
    before: str = ""
    after: str = "\n Answer:"
    options: tuple[str, ...] | str = ()


# The authors keep the last 7 tokens, which in Llama's are the instruction. They put nothing after questions,
# since that tokenizer begins each output with BOS; here 3 tokens of Llama's say that the answer follows.
_SUMMARY = Task(ROUGE, 1000, "Context:\n", "\n Please summarize this report:")
_ANSWER = Task(F1, 200)
TASKS = {
    "gov_report": _SUMMARY,
    "summ_screen_fd": _SUMMARY,
    "qmsum": _SUMMARY,
    "qasper": _ANSWER,
    "narrative_qa": _ANSWER,
    "quality": Task(EXACT, 200, options="input"),
    "contract_nli": Task(EXACT, 200, options=LABELS),
    # Of this project, see `scrolls.making`.
    "outlines": _SUMMARY,
    "lines": _ANSWER._replace(output=1000),
    "neighbours": Task(EXACT, 1000, options="input"),
    "orders": Task(EXACT, 200, options=LABELS),
}


class Limits(NamedTuple):
    """What is kept of an example.

    Attributes:
      prompt: the most tokens of its prompt. after: the characters at the prompt's end that are among them.
      output: the most tokens of its output, without EOS.
    """

    prompt: int
    after: int
    output: int


@dataclasses.dataclass(frozen=True)
class DataSet:
    """What a source names.

    Attributes:
      path: DIR/TASK. name: of the task. split: "train", "validation" or "test".
      tokens: of a row, with EOS.
    """

    path: str
    name: str
    split: str = "train"
    tokens: int = _AUTHORS_TOKENS

    @property
    def task(self) -> Task:
        return TASKS[self.name]

    @property
    def limits(self) -> Limits:
        output = max(self.tokens * self.task.output // _AUTHORS_TOKENS, 1)
        return Limits(self.tokens - output - 1, len(self.task.after), output)

    @property
    def file(self) -> str:
        """The file that holds the split: JSONL, or a ZIP file."""
        plain, packed = f"{self.path}/{self.split}.jsonl", f"{self.path}.zip"
        return packed if epath.Path(packed).exists() and not epath.Path(plain).exists() else plain


class Record(NamedTuple):
    """A line of a file; the output of a test split is None."""

    id: str
    input: str
    output: str | None


def parse(source: Source) -> DataSet:
    """The data set that a source names. Raises UserError: there is no such task, split or option."""
    form = _FORM.fullmatch(source.path.strip())
    path = form[1].rstrip("/") if form else ""
    name = path.rpartition("/")[2]
    if name not in TASKS:
        raise UserError(
            f"{source.text}: {name!r} is no data set of SCROLLS{did_you_mean(name, TASKS)}: name DIR/TASK, "
            f"with one of {', '.join(TASKS)}"
        )
    made = DataSet(path, name)
    for part in filter(None, (part.strip() for part in ((form and form[2]) or "").split(","))):
        key, _, value = (word.strip() for word in part.partition("="))
        if key == "split" and value in SPLITS:
            made = dataclasses.replace(made, split=value)
        elif key == "tokens" and value.isdecimal() and int(value) >= LEAST:
            made = dataclasses.replace(made, tokens=int(value))
        else:
            raise UserError(
                f"{source.text}: {part!r} must be split=train, validation or test, or tokens=N of at least "
                f"{LEAST}"
            )
    return made


def of_source(source: Source) -> tuple[list[str], ReadShard]:
    """A data set as examples: its shard, and what reads it, see `sources.Opened`. Raises UserError."""
    data = parse(source)

    def read(shard, cursor):
        for record, after in _records(data, cursor or 0):
            if record.output:
                yield to_example(data, record.input, record.output), after

    return [data.file], read


def records(data: DataSet) -> Iterator[Record]:
    """Yields all lines of a data set. Raises UserError: it cannot be read, or a line is malformed."""
    return (record for record, _ in _records(data, 0))


def to_example(data: DataSet, text: str, output: str) -> dict[str, Any]:
    """An example, see `data.examples`, with "limits": those of its tokens."""
    prompt = f"{data.task.before}{text}{data.task.after}"
    whole = prompt + output
    return {
        "text": whole,
        "set": data.name,
        "learned": [(len(prompt), len(whole))],
        "answer": output,
        "labels": {"task": data.name},
        "limits": data.limits,
    }


def options(data: DataSet, text: str) -> tuple[str, ...]:
    """The outputs that an input allows; () if it allows any."""
    if data.task.options != "input":
        return tuple(data.task.options)
    return listed_options(text)


def listed_options(text: str) -> tuple[str, ...]:
    """The options that an input of QuALITY lists as "(A) ...", "(B) ..." after its question.

    They follow the first empty line, and end before the next one after the last of them.
    """
    marks: list[re.Match] = []
    for mark in _OPTION.finditer(text, max(text.find("\n\n"), 0)):
        if mark[1] == chr(ord("A") + len(marks)):
            marks.append(mark)
        if len(marks) == 4:
            break
    if not marks:
        return ()
    end = text.find("\n\n", marks[-1].end())
    ends = [mark.start() for mark in marks[1:]] + [end if end >= 0 else len(text)]
    found = (text[mark.end() : to] for mark, to in zip(marks, ends, strict=True))
    return tuple(" ".join(option.split()) for option in found)


def _records(data: DataSet, start: int) -> Iterator[tuple[Record, int]]:
    """Yields (line, offset after it) from an offset on."""
    try:
        with _opened(data) as file:
            file.seek(start)
            while line := file.readline():
                if not line.isspace():
                    yield _record(data, line), file.tell()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{data.file} cannot be read: {error}: SCROLLS' files are TASK.zip, or TASK/train.jsonl, "
            "validation.jsonl and test.jsonl"
        ) from None


def _opened(data: DataSet) -> IO[bytes]:
    path = epath.Path(data.file)
    if path.suffix != ".zip":
        return path.open("rb")
    archive = zipfile.ZipFile(path.open("rb"))
    names = (
        name for name in archive.namelist() if name.rpartition("/")[2] == f"{data.split}.jsonl"
    )
    name = next(names, None)
    if name is None:
        raise KeyError(f"it has no {data.split}.jsonl")
    return archive.open(name)


def _record(data: DataSet, line: bytes) -> Record:
    try:
        value = json.loads(line)
        made = Record(str(value["id"]), value["input"], value.get("output"))
    except (ValueError, LookupError, TypeError, AttributeError):
        made = None
    if made is None or not isinstance(made.input, str) or not isinstance(made.output, str | None):
        shown = line[:60].decode(errors="replace").strip()
        raise UserError(f"{data.file}: {shown!r}... is no line with id, input and output")
    return made
