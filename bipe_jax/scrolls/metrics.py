"""SCROLLS' metrics of one prediction, 0 ... 1, and of a data set, 0 ... 100.

Of several references the best counts, of ROUGE for each of its kinds. Sources of the formulas: Rajpurkar et
al. 2016 (SQuAD's normalisation, F1 and exact match); Lin 2004 (ROUGE, by the package rouge-score, without a
stemmer); Shaham et al. 2022 (the geometric mean of ROUGE-1, ROUGE-2 and ROUGE-L over a data set).
"""

import collections
import functools
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence

from bipe_jax.data.scrolls import EXACT, F1, ROUGE
from bipe_jax.errors import UserError

_KINDS = ("rouge1", "rouge2", "rougeL")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """A text in small letters, without punctuation, articles and double spaces."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """1 if two texts are the same after `normalised`, else 0."""
    return float(normalised(prediction) == normalised(reference))


def f1(prediction: str, reference: str) -> float:
    """The harmonic mean of precision and recall of words, which count as often as they occur."""
    own, other = normalised(prediction).split(), normalised(reference).split()
    common = (collections.Counter(own) & collections.Counter(other)).total()
    return 2 * common / (len(own) + len(other)) if common else 0.0


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """The F measures of ROUGE-1, ROUGE-2 and ROUGE-L. Raises UserError: rouge-score is not installed."""
    scores = _rouge_scorer().score(reference, prediction)
    return {kind: scores[kind].fmeasure for kind in _KINDS}


@functools.cache
def _rouge_scorer():
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError(
            f"the metric of summaries needs rouge-score: pip install 'bipe-jax[eval]' ({error})"
        ) from None
    return RougeScorer(_KINDS, use_stemmer=False)


def check(metric: str) -> None:
    """Raises UserError if a metric's package is not installed."""
    if metric == ROUGE:
        _rouge_scorer()


def scores(metric: str, prediction: str, references: Sequence[str]) -> dict[str, float]:
    """The best scores of a prediction over its references, by name: the metric's, or ROUGE's kinds."""
    if metric == ROUGE:
        of_references = [rouge(prediction, reference) for reference in references]
        return {kind: max(of[kind] for of in of_references) for kind in _KINDS}
    of: Mapping[str, Callable[[str, str], float]] = {F1: f1, EXACT: exact_match}
    return {metric: max(of[metric](prediction, reference) for reference in references)}


def summary(of_predictions: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The means of a data set in percent, and its "score": SCROLLS' number of it."""
    count = len(of_predictions)
    means = {
        name: 100 * sum(of[name] for of in of_predictions) / count for name in of_predictions[0]
    }
    return {**means, "score": math.prod(means.values()) ** (1 / len(means))}
