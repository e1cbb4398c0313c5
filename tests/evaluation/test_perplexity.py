"""Perplexity at odd lengths against a plain loop over tokens, all of it in float64 NumPy."""

import dataclasses
import math

import jax
import numpy as np
import numpy_reference
import pytest
from tiny import changed

from bipe_jax.evaluation import loaded, perplexity, protocols
from tests.evaluation.test_evaluate import plain_coordinates, targets_of_documents


@pytest.mark.parametrize("name", ["same-tokens", "non-overlapping", "sliding:2"])
@pytest.mark.parametrize("lengths", [(3, 7), (31, 33, 61), (2, 97)])
def test_perplexity_at_odd_lengths_is_that_of_float64(run, name, lengths):
    """One token after the other, from the logits of NumPy's float64 decoder."""
    loaded_model = changed(loaded.load(run), {"model.dtype": "float32"})
    config, rule = loaded_model.config, loaded_model.rule
    generator = np.random.default_rng(2)
    held = [generator.integers(0, 512, n, dtype=np.int32) for n in (101, 127)]
    protocol = protocols.protocol(name, lengths, max(lengths))
    (of_set,) = targets_of_documents(loaded_model, held, protocol)
    # Two stretches of each document, as an evaluation of few tokens has them.
    documents = [dataclasses.replace(d, stretches=d.stretches[:2]) for d in of_set.documents]
    of_set = dataclasses.replace(of_set, documents=tuple(documents))
    found = perplexity.Evaluation(loaded_model, [of_set], lengths, protocol)(loaded_model.params)
    assert [row["length"] for row in found["results"]] == list(lengths)
    params = jax.device_get(loaded_model.params)
    for row in found["results"]:
        losses = []
        windows = (
            w
            for number, document in enumerate(documents)
            for first in document.stretches
            for w in protocol.windows(number, first, row["length"])
        )
        for w in windows:
            tokens = held[w.document]
            state = plain_coordinates(tokens[w.start : w.end], rule)
            inputs = {n: np.array([[at[n] for at in state]]) for n in state[0]}
            logits = numpy_reference.logits(
                config, params, {"tokens": tokens[None, w.start : w.end], **inputs}
            )[0]
            for t in range(w.end - w.scored + 1, w.end + 1):
                scores = logits[t - 1 - w.start]
                losses.append(math.log(sum(map(math.exp, scores))) - scores[tokens[t]])
        assert row["tokens"] == len(losses)
        assert row["perplexity"] == pytest.approx(
            math.exp(math.fsum(losses) / len(losses)), rel=1e-5
        )
