"""Every kind that acts in attention: formulas, and what each must do wherever it is used."""

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest

from bipe_jax import positions

# What an entry says -> options and parameters that are unlike the initial ones.
RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return RNG.normal(size=shape) * scale


def perceptron(inputs, hidden, outputs):
    return {
        "first_kernel": normal(inputs, hidden),
        "first_bias": normal(hidden),
        "second_kernel": normal(hidden, outputs),
        "second_bias": normal(outputs),
    }


# Four heads of 8, two key heads, a width of 32.
CASES = {
    "kerple-power": ("kerple-power", {}, {"p": normal(4), "a": 2 * normal(4)}),
    "fire": (
        "fire",
        {"threshold": 20.0},
        perceptron(1, 32, 4) | {"c": np.float64(-0.3), "threshold_scale": np.float64(0.7)},
    ),
    "rope": ("rope", {}, {}),
    "rope of some pairs": ("rope", {"pairs": (1, 3), "theta": 50.0}, {}),
    "rope with its own spectrum": ("rope", {"pairs": (0, 3), "spectrum": "own"}, {}),
    "xpos": ("xpos", {"base": 40.0}, {}),
    "pope": ("pope", {"theta": 100.0}, {"delta": normal(2, 8, scale=4)}),
    "ssmax": ("ssmax", {}, {"s": normal(4)}),
    "ssmax with a bias": ("ssmax", {"bias": True}, {"s": normal(4), "b": normal(4)}),
    "temperature": ("temperature", {"unit": 7.0, "beta": 0.5}, {}),
    "temperature of Ministral": ("temperature", {"unit": 16.0, "first": 0}, {}),
    "window": ("window", {"size": 5}, {}),
    "chunks": ("window", {"size": 6, "chunked": True}, {}),
    "fox": ("fox", {}, {"gate_kernel": normal(32, 4, scale=0.3), "gate_bias": normal(4)}),
    "cope": ("cope", {"positions": 6}, {"table": normal(6, 8)}),
    "cope divided": ("cope", {"positions": 9, "divided": True}, {"table": normal(9, 8)}),
    "dape": ("dape", {}, perceptron(8, 32, 4) | {"base/p": normal(4), "base/a": normal(4)}),
    "dape of alibi": ("dape", {"bias": "alibi", "hidden": 5}, perceptron(8, 5, 4)),
}
DOCUMENTS = np.repeat([[3, 1, 1], [2, 2, 5]], [30, 20, 20], axis=1)


def entry(case, coordinate):
    kind, options, _ = CASES[case]
    return (kind, coordinate, *options.items())


def arrays(L=70, N=4, K=2, H=8, documents=None):
    """Two rows with different segments; coordinates restart at documents."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(2, L, heads, H)) for heads in (N, K, K))
    x = rng.normal(size=(2, L, N * H))
    starts = rng.random((2, L)) < 0.3
    position, segment = np.zeros((2, L), int), np.zeros((2, L), int)
    for row in range(2):
        for i in range(1, L):
            if documents is not None and documents[row, i] != documents[row, i - 1]:
                continue
            position[row, i] = position[row, i - 1] + 1
            segment[row, i] = segment[row, i - 1] + starts[row, i]
    return q, k, v, x, {"position": position, "segment": segment}


def attended(case, coordinate, q, k, v, x, coordinates, documents=None, params=None):
    kind, _, own = CASES[case]
    params = own if params is None else params
    return positions.attend(
        (entry(case, coordinate),), coordinates, q, k, v,
        params={f"{kind}_{coordinate}": params} if params else {},
        x=x, document_ids=documents,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("coordinate", ["position", "segment"])
@pytest.mark.parametrize("case", CASES)
def test_attend_equals_the_formula_in_float64(case, coordinate, documents, dtype):
    kind, options, params = CASES[case]
    q, k, v, x, coordinates = arrays(documents=documents)
    with jax.enable_x64(dtype == "float64"):
        cast = [jnp.asarray(a, dtype) for a in (q, k, v, x)]
        own = {name: jnp.asarray(a, dtype) for name, a in params.items()}
        got = attended(case, coordinate, *cast, coordinates, documents, own)
        assert got["output"].dtype == dtype
    logits, output, visible = kinds.attend(
        kinds.FORMULAS[kind], q, k, v, coordinates[coordinate], params, x, documents, **options
    )
    error = np.abs(np.where(visible, np.asarray(got["logits"]) - np.where(visible, logits, 0), 0))
    size = np.abs(np.where(visible, logits, 0)).max()
    assert error.max() < {"float32": 5e-6, "float64": 1e-11}[dtype] * max(size, 1)
    tolerance = {"float32": 5e-6, "float64": 1e-11}[dtype]
    np.testing.assert_allclose(got["output"], output, atol=tolerance)
