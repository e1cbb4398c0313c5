"""Decoding with a cache that drops what cannot count: the answers of a cache that holds everything."""

import jax.numpy as jnp
import numpy as np
import pytest

from bipe_jax.evaluation import decode, dropping, loaded
from bipe_jax.evaluation.decode import Generator
from bipe_jax.evaluation.sampling import Sampling
from tests.model.test_model import draw, draw_tokens
from tests.positions.test_encodings import config_of

FIRST, LONGEST = 64, 300
PROMPTS = [draw_tokens(i, 1, n)[0].astype(np.int32) for i, n in enumerate((230, 33, 130))]

# With steep biases, so that 64 tokens are enough.
CASES = {
    "alibi": (("alibi", "segment", ("slope_scale", 900.0)),),
    "alibi, turned": (
        ("alibi", "position", ("slope_scale", 400.0)),
        ("rope", "segment"),
        ("alibi", "segment", ("slope_scale", 96.0)),
    ),
    "window": (("window", "segment", ("size", 5)), ("t5", "position"), ("rope", "position")),
    "chunks": (("window", "position", ("size", 30), ("chunked", True)),),
    "fox": (("fox", "position"),),
    "layers that differ": (
        ("fox", "position", ("layers", "0/2")),
        ("rope", "segment", ("layers", "0/2")),
        ("window", "segment", ("size", 5), ("layers", "1/2")),
    ),
    "kerple-power": (("kerple-power", "position"),),
}


USUAL = ("alibi, turned", "layers that differ")
ALL = [case if case in USUAL else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setattr(dropping, "FIRST", FIRST)
    monkeypatch.setattr(decode, "PIECE", 16)


def model_of(relative, **overrides):
    shape = {"model__kv_heads": 2, "segments__rule": "fixed:5", "position__absolute": ()}
    config = config_of(relative, **shape, **overrides)
    params = draw(config)
    for layer in (params.get("relative", {}), params["layers"].get("relative", {})):
        if "fox_position" in layer:
            layer["fox_position"]["gate_bias"] -= 3.0  # forgets 3 nats a token
        if "kerple-power_position" in layer:
            layer["kerple-power_position"] = {
                "p": jnp.full(4, 3.0),
                "a": jnp.array([0.9, 1.0, 1.5, 2.0]),
            }
    return loaded.on_all_devices(config, params)


def logits_of_steps(generator, tokens):
    """After the prompts, and after each further token of theirs, (steps, rows, V)."""
    model = generator._model
    logits, cache = generator._prefill(PROMPTS)
    found = [logits]
    for of_rows in tokens:
        logits, cache = generator._step(model.params, model.rule, cache, jnp.asarray(of_rows))
        found.append(logits)
    return np.array(found), cache


@pytest.mark.parametrize("case", ALL)
def test_a_cache_of_constant_size_gives_what_a_whole_one_gives(case, monkeypatch):
    model = model_of(CASES[case])
    small = Generator(model, LONGEST)
    answers = small(PROMPTS, 60)
    tokens = np.array(answers).T
    found, cache = logits_of_steps(small, tokens)
    assert small.size == cache["layers"]["key"].shape[3] == FIRST
    assert cache["exact"].all()

    monkeypatch.setattr(dropping, "FIRST", 1000)
    whole = Generator(model, LONGEST)
    wanted, cache = logits_of_steps(whole, tokens)
    assert whole.size == cache["layers"]["key"].shape[3] == 384
    np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=2e-5)
    for one, other in zip(answers, whole(PROMPTS, 60), strict=True):
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize(
    "sampling",
    [pytest.param(Sampling(), marks=pytest.mark.slow), Sampling(1.0, 20)],
    ids=["likeliest", "sampled"],
)
def test_a_cache_that_is_too_small_grows_until_the_answer_is_exact(sampling, monkeypatch):
    """Whether it is so while a prompt is read, or while tokens are added."""
    # In 64 tokens such a bias falls by little, in 128 by enough but for the flattest head.
    model = model_of((("alibi", "position", ("slope_scale", 40.0)),))
    longer, shorter = [np.resize(p, 200) for p in PROMPTS[:2]], [p[:33] for p in PROMPTS[:2]]
    for prompts, count in ((longer, 20), (shorter, 200)):
        generator = Generator(model, LONGEST)
        assert generator.size == FIRST
        answers = generator(prompts, count, sampling=sampling, seed=5)
        assert generator.size > FIRST
        with monkeypatch.context() as patch:
            patch.setattr(dropping, "FIRST", 1000)
            wanted = Generator(model, LONGEST)(prompts, count, sampling=sampling, seed=5)
        assert [a.tolist() for a in answers] == [a.tolist() for a in wanted]


def test_one_large_key_far_away_is_not_dropped():
    """A key that outweighs the bias: its length is known when it has left the cache."""
    model = model_of((("alibi", "position", ("slope_scale", 900.0)),), model__layers=1)
    prompt = np.resize(PROMPTS[0], 200)
    generator = Generator(model, LONGEST)
    generator([prompt], 2)
    assert generator.size == FIRST
    large, token = 3000.0, 63
    model.params["embed"]["table"] = model.params["embed"]["table"].at[token].set(0.0)
    prompt = np.where(prompt == token, 5, prompt)
    marked = np.append(token, prompt[1:]).astype(np.int32)
    # The norm of zeros is zeros: a key of its own comes with an embedding that no other token has.
    params = model.params
    width = params["embed"]["table"].shape[1]
    params["embed"]["table"] = (
        params["embed"]["table"].at[token, 0].set(width).at[:token, 0].set(0.0)
    )
    params["layers"]["attention"]["key"] = params["layers"]["attention"]["key"].at[:, 0].set(large)
    for text, grows in ((prompt, False), (marked, True)):
        generator = Generator(model, LONGEST)
        generator([text], 2)
        assert (generator.size > FIRST) == grows


def test_kinds_that_prove_nothing_keep_all_keys():
    for relative in (
        (("rope", "position"),),
        (("t5", "position"), ("alibi", "position")),
        (("window", "position", ("size", 4), ("layers", "0")),),
        (("xpos", "position"), ("alibi", "position")),
    ):
        generator = Generator(model_of(relative), LONGEST)
        assert generator.size == 384 and not generator._drops
