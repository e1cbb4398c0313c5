import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import largest_array

from bipe_jax import loss
from bipe_jax.loss import cross_entropy_sum, score
from bipe_jax.output import Output

B, L, D, V = 2, 12, 8, 40
CHUNKS = [1, 4, 12, 100]  # the last is longer than the sequence


def draw(dtype="float32", scale=1.0):
    """hidden, kernel, targets, weights; some weights are 0, as those of padding are."""
    rng = np.random.default_rng(0)
    hidden = (scale * rng.normal(size=(B, L, D))).astype(jnp.dtype(dtype))
    kernel = rng.normal(size=(D, V)).astype(jnp.dtype(dtype))
    targets = rng.integers(0, V, (B, L)).astype(np.int32)
    weights = (rng.random((B, L)) * (rng.random((B, L)) < 0.7)).astype(np.float32)
    return hidden, kernel, targets, weights


def by_hand(hidden, kernel, targets, weights, softcap=0.0, z_loss=0.0):
    """In float64: log-probabilities (B, L), the loss, its gradients to hidden, kernel and logits."""
    hidden, kernel, weights = (np.asarray(x, np.float64) for x in (hidden, kernel, weights))
    logits = hidden @ kernel
    if softcap:
        cosine = np.cosh(logits / softcap)
        logits = softcap * np.tanh(logits / softcap)
    largest = logits.max(axis=-1, keepdims=True)
    all_log_probs = logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    picked = np.take_along_axis(all_log_probs, targets[..., None], axis=-1)[..., 0]
    error = weights[..., None] * (np.exp(all_log_probs) - np.eye(V)[targets])
    if z_loss:
        log_z = np.log(np.exp(logits).sum(-1))
        error += (z_loss * weights * 2 * log_z)[..., None] * np.exp(logits - log_z[..., None])
    if softcap:
        error /= cosine**2
    kernel_gradient = np.einsum("bld,blv->dv", hidden, error)
    return picked, -(weights * picked).sum(), error @ kernel.T, kernel_gradient, error


def check(actual, expected, relative):
    """Within `relative` of the largest entry."""
    actual = np.asarray(actual, np.float64)
    np.testing.assert_allclose(actual, expected, atol=relative * np.abs(expected).max(), rtol=0)


def gradients(chunk, factor=1.0, softcap=0.0, z_loss=0.0):
    def loss(hidden, kernel, targets, weights):
        layer = Output(kernel, softcap)
        return factor * cross_entropy_sum(hidden, layer, targets, weights, chunk, z_loss)[0]

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


@pytest.mark.parametrize(
    "tokens, logits, size", [(2, 1e9, 1), (7, 1e9, 4), (7, 160, 2), (100, 1e9, 12)]
)
def test_on_tpus_few_sequences_have_larger_chunks(tokens, logits, size, monkeypatch):
    hidden, kernel, targets, weights = draw()
    monkeypatch.setattr(loss, "platform", lambda mesh: "tpu")
    monkeypatch.setattr(loss, "_TOKENS", tokens)
    monkeypatch.setattr(loss, "_LOGITS", int(logits))
    monkeypatch.setattr(loss, "_chunks", seen := Recorded(loss._chunks))
    value, grads = gradients(1)(hidden, kernel, targets, weights)
    assert seen.chunks == {size}
    _, expected, hidden_gradient, kernel_gradient, _ = by_hand(hidden, kernel, targets, weights)
    check(value, expected, 1e-6)
    check(grads[0], hidden_gradient, 1e-5)
    check(grads[1], kernel_gradient, 1e-5)


class Recorded:
    """`loss._chunks`, and the chunks it was called with."""

    def __init__(self, function):
        self.function, self.chunks = function, set()

    def __call__(self, x, chunk):
        self.chunks.add(chunk)
        return self.function(x, chunk)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_and_log_probs_equal_float64(chunk):
    hidden, kernel, targets, weights = draw()
    picked, loss, *_ = by_hand(hidden, kernel, targets, weights)

    @jax.jit
    def both(hidden, kernel, targets, weights):
        return (
            score(hidden, Output(kernel), targets, chunk)[0],
            cross_entropy_sum(hidden, Output(kernel), targets, weights, chunk)[0],
        )

    each, total = both(hidden, kernel, targets, weights)
    assert each.dtype == total.dtype == jnp.float32
    assert each.shape == (B, L) and total.shape == ()
    check(each, picked, 1e-6)
    check(total, loss, 1e-6)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_gradients_equal_float64(chunk):
    arguments = draw()
    _, loss, to_hidden, to_kernel, _ = by_hand(*arguments)
    # A factor stands for whatever the sum is divided by afterwards.
    value, (hidden_gradient, kernel_gradient) = gradients(chunk, factor=-0.3)(*arguments)
    check(value, -0.3 * loss, 1e-6)
    check(hidden_gradient, -0.3 * to_hidden, 1e-6)
    check(kernel_gradient, -0.3 * to_kernel, 1e-6)


@pytest.mark.parametrize(("softcap", "z_loss"), [(3.0, 0.0), (0.0, 0.05), (3.0, 0.05)])
def test_a_soft_cap_and_a_z_loss_equal_float64(softcap, z_loss):
    hidden, kernel, targets, weights = draw()
    plain = by_hand(hidden, kernel, targets, weights)
    picked, loss, to_hidden, to_kernel, _ = by_hand(*draw(), softcap, z_loss)
    capped = softcap * np.tanh(hidden @ kernel / softcap) if softcap else hidden @ kernel
    z = z_loss * (weights * np.log(np.exp(capped.astype(np.float64)).sum(-1)) ** 2).sum()
    layer = Output(kernel, softcap)
    check(layer.logits(hidden), capped, 1e-6)
    check(score(hidden, layer, targets, 4)[0], picked, 1e-6)
    total, terms = cross_entropy_sum(hidden, layer, targets, weights, 4, z_loss)
    check(total, loss + z, 1e-6)
    if z_loss:
        check(terms["loss"], loss, 1e-6)
        check(terms["z_loss"], z, 1e-6)
    else:
        assert not terms
    value, (hidden_gradient, kernel_gradient) = gradients(4, 0.5, softcap, z_loss)(*draw())
    check(value, 0.5 * (loss + z), 1e-6)
    check(hidden_gradient, 0.5 * to_hidden, 1e-6)
    check(kernel_gradient, 0.5 * to_kernel, 1e-6)
    assert np.abs(to_kernel - plain[3]).max() > 0.02 * np.abs(to_kernel).max()


def test_a_token_of_weight_zero_has_no_gradient():
    hidden, kernel, targets, weights = draw()
    _, (hidden_gradient, _) = gradients(4)(hidden, kernel, targets, weights)
    nothing = (np.asarray(hidden_gradient) == 0).all(axis=-1)
    np.testing.assert_array_equal(nothing, weights == 0)


@pytest.mark.parametrize("chunk", [4, 12])
def test_bfloat16_hidden_states_give_a_float32_loss(chunk):
    arguments = draw("bfloat16")
    picked, loss, to_hidden, to_kernel, error = by_hand(*arguments)
    hidden, kernel, targets, _ = arguments
    hidden64, kernel64 = hidden.astype(np.float64), kernel.astype(np.float64)
    # Products of bfloat16 are exact in float32, so that nothing is lost.
    check(score(hidden, Output(kernel), targets, chunk)[0], picked, 1e-6)
    value, (hidden_gradient, kernel_gradient) = gradients(chunk)(*arguments)
    assert value.dtype == jnp.float32
    check(value, loss, 1e-6)
    assert hidden_gradient.dtype == kernel_gradient.dtype == jnp.bfloat16
    for gradient, exact, terms in (
        (hidden_gradient, to_hidden, np.abs(error) @ np.abs(kernel64.T)),
        (kernel_gradient, to_kernel, np.einsum("bld,blv->dv", np.abs(hidden64), np.abs(error))),
    ):
        # Each logit's error, and then their sum, are rounded to bfloat16: by up to 2^-8 each.
        bound = 1.01 * 2**-8 * (terms + np.abs(exact))
        assert (np.abs(np.asarray(gradient, np.float64) - exact) <= bound).all()


def test_the_kernels_gradient_is_summed_over_chunks_in_float32():
    """4096 terms of 2^-9 on top of 1: in bfloat16 the sum would never leave 1."""
    length = 4097
    hidden = np.full((1, length, 1), 2.0**-9)
    hidden[0, 0] = 1
    # Two logits that are always equal: the gradient of the first is half of each hidden state.
    kernel, targets = np.zeros((1, 2)), np.ones((1, length), np.int32)
    _, (_, kernel_gradient) = gradients(1)(
        hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), targets, np.ones((1, length))
    )
    np.testing.assert_allclose(np.asarray(kernel_gradient, np.float64), [[4.5, -4.5]], rtol=2**-8)


def test_huge_logits_do_not_overflow():
    arguments = draw(scale=1e4)
    picked, loss, to_hidden, to_kernel, _ = by_hand(*arguments)
    assert picked.min() < -1e4
    hidden, kernel, targets, _ = arguments
    check(score(hidden, Output(kernel), targets, 4)[0], picked, 1e-6)
    value, (hidden_gradient, kernel_gradient) = gradients(4)(*arguments)
    check(value, loss, 1e-6)
    check(hidden_gradient, to_hidden, 1e-6)
    check(kernel_gradient, to_kernel, 1e-6)


def test_all_logits_are_never_held_at_once():
    arguments = draw()
    functions = {
        "score": lambda chunk: lambda h, k, t, w: score(h, Output(k), t, chunk)[0],
        "loss": lambda chunk: lambda h, k, t, w: cross_entropy_sum(h, Output(k), t, w, chunk)[0],
        "gradient": lambda chunk: gradients(chunk).__wrapped__,
    }
    for name, of_chunk in functions.items():
        assert largest_array(of_chunk(L), *arguments) == B * L * V, name
        assert largest_array(of_chunk(4), *arguments) == max(B * 4 * V, D * V), name


def test_a_length_that_is_no_multiple_of_the_chunk_is_refused():
    with pytest.raises(ValueError, match="length 12 is no multiple of the loss chunk 5"):
        hidden, kernel, targets, _ = draw()
        score(hidden, Output(kernel), targets, 5)


def test_score_says_whether_no_token_is_more_probable():
    hidden, kernel, _, _ = draw()
    best = np.einsum("bld,dv->blv", hidden, kernel).argmax(axis=-1)
    targets = best.copy()
    targets[:, ::2] = (best[:, ::2] + 1) % V
    assert (np.asarray(score(hidden, Output(kernel), targets, 4)[1]) == (targets == best)).all()
