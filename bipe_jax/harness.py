"""Runs tasks of EleutherAI's lm-evaluation-harness on a checkpoint:

python -m bipe_jax.harness --checkpoint=runs/x --tasks=piqa,hellaswag [--num_fewshot=5]

Prints the harness's table and writes harness.json. Needs the extra `eval`; most tasks download their data.
"""

import argparse
import json
import os
import sys

import numpy as np
from tqdm import tqdm

from bipe_jax import checkpoint, cli, decode, inference, scoring
from bipe_jax.compiling import enable_cache
from bipe_jax.errors import UserError
from bipe_jax.evaluate import make_output, write_json
from bipe_jax.perplexity import check_lengths
from bipe_jax.protocols import Window

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise UserError(
        "the lm-evaluation-harness is not installed: pip install 'bipe-jax[eval]'"
    ) from None

MULTIPLE = 4  # of the training length, that --max_length is by default
_NEW_TOKENS = 256  # where a task does not say; the harness's own number


class Harness(TemplateLM):
    """A model as the harness wants it.

    Texts begin with BOS; what is longer than `max_length` loses its beginning, as in the harness's own
    models. Requests are answered in an order of their lengths, but each by itself: the others in its
    batch do not change it.

    Args:
      placed: the model.
      max_length: tokens that it is given at most.

    Raises:
      UserError: the model cannot be run at that length, or its tokenizer has neither BOS nor EOS.
    """

    def __init__(self, placed: inference.Placed, max_length: int):
        super().__init__()
        check_lengths(placed.config, (max_length,))
        self.placed, self.max_length = placed, max_length
        self._scorer = scoring.Scorer(placed)
        self._generators: dict[int, decode.Generator] = {}
        if not placed.tokenizer.ends:
            raise UserError("the tokenizer has neither BOS nor EOS, which texts would begin with")

    @property
    def eot_token_id(self) -> int:
        return self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        tokenizer = self.placed.tokenizer
        return tokenizer.bos_id if tokenizer.bos_id >= 0 else max(tokenizer.ends)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        tokens = self.placed.tokenizer.encode(string).tolist()
        bos = self.placed.tokenizer.bos_id >= 0
        return tokens[1:] if bos and add_special_tokens is False else tokens

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_):
        """Of (texts, context, continuation) each: (log-probability of the continuation, is greedy)."""
        documents, windows = [], []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"--max_length={self.max_length:,} is less than a continuation of "
                    f"{len(continuation):,} tokens that a task scores at once"
                )
            text = np.array([*context, *continuation], np.int32)[-(self.max_length + 1) :]
            windows.append(Window(len(documents), 0, len(text) - 1, len(continuation)))
            documents.append(text)
        buckets: dict[int, list[Window]] = {}
        for window in sorted(windows, key=lambda w: -w.end):
            size = min(decode.bucket(window.end), self.max_length)
            buckets.setdefault(size, []).append(window)
        answers = [(0.0, True)] * len(requests)
        with tqdm(total=len(windows), disable=disable_tqdm, desc="Log-likelihoods") as bar:
            for size, some in buckets.items():
                scored = [w for w in some if w.scored]  # an empty continuation is certain
                found = self._scorer(self.placed.params, documents, scored, size) if scored else []
                for window, (log_probs, likeliest) in zip(scored, found, strict=True):
                    total = float(log_probs.sum(dtype=np.float64))
                    answers[window.document] = (total, bool(likeliest.all()))
                bar.update(len(some))
        for (texts, *_), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Each token of the texts once, in windows of `max_length` that overlap by one token."""
        parts, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            found = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, found):
                parts.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(parts, disable_tqdm)
        for owner, (total, _) in zip(owners, scored, strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, cut before the first of its stop strings."""
        groups: dict[tuple, list[int]] = {}
        settings = [normalize_gen_kwargs(r.args[1], _NEW_TOKENS) for r in requests]
        contexts = []
        for number, (request, given) in enumerate(zip(requests, settings, strict=True)):
            count = given["max_gen_toks"]
            if count >= self.max_length:
                raise UserError(
                    f"--max_length={self.max_length:,} has no room for max_gen_toks={count:,} and a text"
                )
            contexts.append(np.array(self.tok_encode(request.args[0]))[count - self.max_length :])
            sampling = decode.Sampling(
                given["temperature"] if given["do_sample"] else 0.0,
                given.get("top_k", 0),
                given.get("top_p", 1.0),
            )
            size = decode.bucket(len(contexts[-1]) + count)
            groups.setdefault((-size, count, sampling, tuple(given["until"])), []).append(number)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Generating") as bar:
            for size, count, sampling, until in sorted(groups, key=lambda group: group[:2]):
                numbers = groups[size, count, sampling, until]
                rows = self._scorer.batch_rows(-size, len(numbers))
                for start in range(0, len(numbers), rows):
                    some = numbers[start : start + rows]
                    texts = [contexts[i] for i in some]
                    found = self._continue(texts, -size, count, sampling, until)
                    for i, answer in zip(some, found, strict=True):
                        answers[i] = answer
                        self.cache_hook.add_partial("generate_until", requests[i].args, answer)
                    bar.update(len(some))
        return answers

    def _continue(self, contexts, size: int, count: int, sampling, until) -> list[str]:
        if size not in self._generators:
            self._generators[size] = decode.Generator(self.placed, size)
        decoded, ends = self.placed.tokenizer.decode, self.placed.tokenizer.ends
        before = [decoded(context) for context in contexts]
        held = [context.tolist() for context in contexts]
        answers = [""] * len(contexts)
        open_rows = set(range(len(contexts)))
        stream = self._generators[size].stream(contexts, count, sampling=sampling, stop=ends)
        for tokens in stream:
            for row in list(open_rows):
                if tokens[row] is None:
                    open_rows.remove(row)
                    continue
                held[row].append(tokens[row])
                text = decoded(held[row])[len(before[row]) :]
                places = [place for stop in until if stop and (place := text.find(stop)) >= 0]
                answers[row] = text[: min(places)] if places else text
                if places:
                    open_rows.remove(row)
            if not open_rows:
                break
        stream.close()
        return answers

    @property
    def tokenizer_name(self) -> str:
        return f"bipe_jax-{self.placed.tokenizer.vocab_size}"


def run(path: str, tasks: list[str], *, max_length=0, include_path=None, num_fewshot=None,
        limit=None, output="") -> dict:  # fmt: skip
    """Runs tasks and writes OUTPUT/harness.json.

    Args:
      path: a checkpoint, see `checkpoint.load`.
      tasks: names. include_path: a directory of tasks of one's own.
      max_length: tokens; 0 takes MULTIPLE times the training length, or what a learned table allows.
      num_fewshot, limit: as the harness has them. output: "" takes `path`.

    Returns:
      What `lm_eval.simple_evaluate` does.

    Raises:
      UserError: an unknown task, data that cannot be had, or a wrong checkpoint.
    """
    from lm_eval.tasks import TaskManager

    meta_path = include_path and os.path.isdir(include_path)
    if include_path and not meta_path:
        raise UserError(f"--include_path={include_path}: there is no such directory")
    manager = TaskManager(include_path=include_path)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise UserError(
            f"--tasks: {', '.join(unknown)} is unknown to lm_eval {lm_eval.__version__}: `lm_eval ls "
            "tasks` lists all; --include_path=DIR adds your own"
        )
    placed = inference.load(path)
    model = Harness(placed, max_length or default_length(placed.config))
    cli.say(
        f"Texts are cut at {model.max_length:,} tokens (--max_length); the model was trained at "
        f"{placed.config.sequence_length:,}"
    )
    output = output or path
    make_output(output)
    try:
        results = lm_eval.simple_evaluate(
            model,
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except UserError:
        raise
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--tasks={','.join(tasks)}: {type(error).__name__}: {reason}") from None
    kept = {name: results[name] for name in ("results", "groups", "versions", "n-shot", "n-samples")
            if name in results}  # fmt: skip
    write_json(
        {
            "kind": "harness",
            "name": os.path.basename(os.path.abspath(output)),
            "step": placed.step,
            "training_length": placed.config.sequence_length,
            "max_length": model.max_length,
            "lm_eval": lm_eval.__version__,
            **json.loads(json.dumps(kept, default=str)),
        },
        os.path.join(output, "harness.json"),
    )
    return results


def default_length(config) -> int:
    """MULTIPLE times the training length; less where a learned table of position ends."""
    try:
        check_lengths(config, (MULTIPLE * config.sequence_length,))
    except UserError:
        return config.sequence_length
    return MULTIPLE * config.sequence_length


def main():
    parser = argparse.ArgumentParser(prog="python -m bipe_jax.harness", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a run's workdir, or one step's directory"
    )
    parser.add_argument("--tasks", required=True, help="names, such as piqa,hellaswag")
    parser.add_argument("--include_path", help="a directory of tasks of your own (YAML)")
    parser.add_argument("--num_fewshot", type=int, help="examples in front (the task's)")
    parser.add_argument("--limit", type=float, help="examples a task, or a share of them (all)")
    parser.add_argument(
        "--max_length", type=int, default=0, help="tokens of a text (4 times the training's)"
    )
    parser.add_argument("--output", default="", help="directory to write to (--checkpoint)")
    args = parser.parse_args()
    checkpoint.quiet()
    enable_cache()
    tasks = [name for name in args.tasks.split(",") if name]
    results = run(
        args.checkpoint,
        tasks,
        max_length=args.max_length,
        include_path=args.include_path,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        output=args.output,
    )
    print(lm_eval.utils.make_table(results))
    if results.get("groups"):
        print(lm_eval.utils.make_table(results, "groups"))
    sys.stdout.flush()


if __name__ == "__main__":
    with cli.user_errors():
        main()
