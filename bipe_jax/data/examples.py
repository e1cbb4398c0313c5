"""Examples: documents of which only some parts are learned.

A line of a shard of examples is a JSON object:

    {"prompt": "2 + 3 =", "completion": " 5"}

and perhaps "answer", the end of the completion that counts as its answer (the whole); "labels", an object of
what results are told apart by; and "segments", character offsets in prompt and completion together, as beside
a text. Prompt and completion are tokenised apart, so that a prompt has the same tokens whatever follows. EOS
follows the completion, and is learned too.

As a document an example is {"text", "set", "learned", "answer", "labels", perhaps "segments"}; "learned" are
ranges of the text's characters. A document with "sets" in place of them has labels of its tokens: for each
word of its text (words, where words are set) and (words that it is from), see `loss.sets_error_sum`. A
document with "limits" is cut when it is tokenised, see `scrolls.Limits`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError
from bipe_jax.loss import MOST_SETS


def of_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a record, without its set and segments; {} if it is no example."""
    prompt, completion = record.get("prompt"), record.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        return {}
    text = prompt + completion
    answer, labels = record.get("answer"), record.get("labels")
    ends_with_it = isinstance(answer, str) and answer and completion.endswith(answer)
    return {
        "text": text,
        "learned": [(len(prompt), len(text))],
        "answer": answer if ends_with_it else completion,
        "labels": {
            str(name): value
            for name, value in (labels.items() if isinstance(labels, dict) else ())
            if isinstance(value, (str, int, bool))
        },
    }


def is_example(document: Mapping[str, Any]) -> bool:
    return "learned" in document


def pieces_of(document: Mapping[str, Any]) -> list[tuple[int, int, bool]]:
    """(first character, last, whether it is learned) of the parts of an example's text."""
    pieces, at = [], 0
    for first, last in document["learned"]:
        pieces += [(at, first, False), (first, last, True)]
        at = last
    pieces.append((at, len(document["text"]), False))
    return [(first, last, learned) for first, last, learned in pieces if first < last]


def kept_of(document: Mapping[str, Any], learned: bool) -> tuple[int, int] | None:
    """What is kept of an example's prompt or output, see `marked.Part`; None: all."""
    if "limits" not in document:
        return None
    prompt, after, output = document["limits"]
    return (output, 0) if learned else (prompt, after)


def ends_with_eos(document: Mapping[str, Any]) -> bool:
    """Whether an example's last part is learned, and so is EOS after it."""
    learned = document.get("learned")
    return bool(learned) and learned[-1][1] == len(document["text"])


def sets_of(
    document: Mapping[str, Any], tokenizer: Tokenizer, tokens: np.ndarray
) -> dict[str, np.ndarray]:
    """The labels of a document's tokens: "sets" and "among", (L,) int32 each, whose bit k is of token id k.

    Raises:
      UserError: the text has other tokens than words, or a word that may be in sets has no small id.
    """
    ids = tokenizer.ids()

    def bits(words: Sequence[str]) -> int:
        return sum(1 << ids[word] for word in words)

    named = {word for _, among in document["sets"] for word in among}
    wrong = next((word for word in named if not 0 <= ids.get(word, -1) < MOST_SETS), None)
    before = int(tokenizer.bos_id >= 0)
    if wrong is not None or len(tokens) != before + len(document["sets"]):
        raise UserError(
            f"{tokenizer.name} does not fit the task"
            + (f": it has no word {wrong!r} among its first {MOST_SETS} ids" if wrong else "")
            + ": leave tokenizer.path out, and the task's own words are taken"
        )
    labels = np.zeros((2, len(tokens)), np.int32)
    for i, (words, among) in enumerate(document["sets"], before):
        labels[:, i] = bits(words), bits(among)
    return {"sets": labels[0], "among": labels[1]}
