"""A model with the interface of EleutherAI's lm-evaluation-harness (extra `eval`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from bipe_jax import segments
from bipe_jax.data import marked
from bipe_jax.errors import UserError
from bipe_jax.evaluation import caching, decode, loaded, scoring
from bipe_jax.evaluation.perplexity import check_lengths
from bipe_jax.evaluation.protocols import Window
from bipe_jax.evaluation.sampling import Sampling, check_sampling

_NEW_TOKENS = 256  # the harness's default


class Harness(TemplateLM):
    """Answers the harness's requests.

    Texts begin with BOS; texts longer than `max_length` lose their beginning, as in the harness's own
    models. Requests are sorted by length; the others in a batch do not change an answer. Segmenters read
    the whole text of a request: the context with its continuation, where that is scored.

    Args:
      max_length: the largest number of tokens of a text.

    Raises:
      UserError: the model cannot be run at that length, its segments come from the data, or its tokenizer
        has neither BOS nor EOS.
    """

    def __init__(self, loaded_model: loaded.LoadedModel, max_length: int):
        super().__init__()
        check_lengths(loaded_model.config, (max_length,))
        self.loaded_model, self.max_length = loaded_model, max_length
        self._segmenters = segments.segmenters_of_text(loaded_model.config)
        self._scorer = scoring.Scorer(loaded_model)
        self._generators: dict[int, decode.Generator] = {}
        if not loaded_model.tokenizer.ends:
            raise UserError("the tokenizer has neither BOS nor EOS, which texts would begin with")

    @property
    def eot_token_id(self) -> int:
        return self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        tokenizer = self.loaded_model.tokenizer
        return tokenizer.bos_id if tokenizer.bos_id >= 0 else max(tokenizer.ends)

    @property
    def tokenizer_name(self) -> str:
        return f"bipe_jax-{self.loaded_model.tokenizer.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        tokens = self.loaded_model.tokenizer.encode(string).tolist()
        bos = self.loaded_model.tokenizer.bos_id >= 0
        return tokens[1:] if bos and add_special_tokens is False else tokens

    def _row(self, text: str, tokens: Sequence[int]) -> dict[str, np.ndarray]:
        """{"tokens": (T,) int32, with segmenters also "starts"}; the last tokens are the text's."""
        row = {"tokens": np.array(tokens, np.int32)}
        starts = marked.starts_of(self.loaded_model.tokenizer, text, self._segmenters)
        if starts is not None:
            row["starts"] = np.pad(starts, (len(tokens) - len(starts), 0))
        return row

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of context and continuation, as the harness splits them.

        If the continuation has merged into the context's last token, that token is scored: an empty
        continuation would be certain.
        """
        context_tokens, tokens = super()._encode_pair(context, continuation)
        if not tokens and (whole := self.tok_encode(context + continuation)) != context_tokens:
            return whole[:-1], whole[-1:]
        return context_tokens, tokens

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_):
        """(Log-probability, is greedy) of the continuation of each (texts, context, continuation)."""
        rows = []
        for texts, context, continuation in requests:
            tokens = [*(context or [self.prefix_token_id]), *continuation]
            rows.append((self._row("".join(texts), tokens), len(continuation)))
        answers = self._score(rows, disable_tqdm)
        for (texts, *_), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _score(
        self, rows: Sequence[tuple[dict, int]], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """(Log-probability, is greedy) of the last tokens of each (row, how many)."""
        documents, starts, windows = [], [], []
        for row, scored in rows:
            if scored > self.max_length:
                raise UserError(
                    f"--max_length={self.max_length:,} is less than a continuation of {scored:,} tokens that "
                    "a task scores at once"
                )
            row = _cut(row, slice(-(self.max_length + 1), None))
            windows.append(Window(len(documents), 0, len(row["tokens"]) - 1, scored))
            documents.append(row["tokens"])
            starts.append(row.get("starts"))
        buckets: dict[int, list[Window]] = {}
        for window in sorted(windows, key=lambda w: -w.end):
            size = min(caching.bucket(window.end), self.max_length)
            buckets.setdefault(size, []).append(window)
        answers = [(0.0, True)] * len(rows)
        with tqdm(total=len(windows), disable=disable_tqdm, desc="Log-likelihoods") as bar:
            for size, some in buckets.items():
                scored = [w for w in some if w.scored]  # an empty continuation is certain
                params = self.loaded_model.params
                scores = self._scorer(params, documents, scored, size, starts) if scored else []
                for window, (log_probs, likeliest) in zip(scored, scores, strict=True):
                    total = float(log_probs.sum(dtype=np.float64))
                    if np.isnan(total):  # the harness would choose the first answer
                        raise UserError("log-probabilities are no numbers: the model has diverged")
                    answers[window.document] = (total, bool(likeliest.all()))
                bar.update(len(some))
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Scores each token of the texts once, in windows of `max_length` that overlap by one token."""
        rows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            tokens = [self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False)]
            row, indices = self._row(text, tokens), list(range(len(tokens)))
            windows = get_rolling_token_windows(indices[1:], indices[0], self.max_length, 1)
            for context, continuation in map(make_disjoint_window, windows):
                rows.append((_cut(row, [*context, *continuation]), len(continuation)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._score(rows, disable_tqdm), strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, cut before the first of its stop strings."""
        groups: dict[tuple, list[int]] = {}
        settings = [normalize_gen_kwargs(r.args[1], _NEW_TOKENS) for r in requests]
        contexts = []
        for number, (request, options) in enumerate(zip(requests, settings, strict=True)):
            count = options["max_gen_toks"]
            if not 0 < count < self.max_length:
                raise UserError(
                    f"--max_length={self.max_length:,} has no room for max_gen_toks={count:,} and a text"
                )
            tokens = self.tok_encode(request.args[0]) or [self.prefix_token_id]
            row = _cut(self._row(request.args[0], tokens), slice(count - self.max_length, None))
            contexts.append(row)
            sampling = Sampling(
                # The default is to sample from the model's own probabilities.
                float(options.get("temperature", 1)) if options["do_sample"] else 0.0,
                int(options.get("top_k", 0)),
                float(options.get("top_p", 1)),
            )
            check_sampling(sampling)
            size = min(caching.bucket(len(row["tokens"]) + count), self.max_length)
            groups.setdefault((-size, count, sampling, tuple(options["until"])), []).append(number)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Generating") as bar:
            for size, count, sampling, until in sorted(groups, key=lambda group: group[:2]):
                numbers = groups[size, count, sampling, until]
                rows = self.loaded_model.batch_rows(-size, len(numbers))
                for start in range(0, len(numbers), rows):
                    some = numbers[start : start + rows]
                    texts = [contexts[i] for i in some]
                    # The seed differs between batches: a task that repeats a request wants
                    # different answers.
                    batch = self._continue(texts, -size, count, sampling, until, seed=some[0])
                    for i, answer in zip(some, batch, strict=True):
                        answers[i] = answer
                        self.cache_hook.add_partial("generate_until", requests[i].args, answer)
                    bar.update(len(some))
        return answers

    def _continue(self, contexts, size: int, count: int, sampling, until, seed: int) -> list[str]:
        if size not in self._generators:
            self._generators[size] = decode.Generator(self.loaded_model, size)
        tokenizer = self.loaded_model.tokenizer
        rows = [context["tokens"].tolist() for context in contexts]
        prompts = [tokenizer.decode(row) for row in rows]
        answers = [""] * len(contexts)
        open_rows = set(range(len(contexts)))
        stream = self._generators[size].stream(
            [context["tokens"] for context in contexts],
            count,
            sampling=sampling,
            stop=tokenizer.ends,
            seed=seed,
            starts=[context.get("starts") for context in contexts],
        )
        for tokens in stream:
            for row in list(open_rows):
                if tokens[row] is None:
                    open_rows.remove(row)
                    continue
                rows[row].append(tokens[row])
                text = tokenizer.decode(rows[row])[len(prompts[row]) :]
                stops = [index for stop in until if stop and (index := text.find(stop)) >= 0]
                answers[row] = text[: min(stops)] if stops else text
                if stops:
                    open_rows.remove(row)
            if not open_rows:
                break
        stream.close()
        return answers


def _cut(row: dict[str, np.ndarray], index: Any) -> dict[str, np.ndarray]:
    """Some tokens of a row, by a slice or by their indices, with what else it has of them."""
    return {name: array[index] for name, array in row.items()}
