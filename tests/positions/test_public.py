"""Kinds beside the public implementations of others, in PyTorch: logits, outputs and gradients.

With the extra `public` and `pip install --no-deps torchscale`; each test is left out where its library is
missing.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_plan

from bipe_jax import positions
from bipe_jax.positions.rope import Rope
from tests.positions.test_kinds import arrays

torch = pytest.importorskip("torch")
L, N, K, H = 60, 4, 2, 16


@pytest.fixture
def x_transformers():
    return pytest.importorskip("x_transformers.x_transformers")


def attend(z, v):
    """Causal attention with logits (B, N, L, L)."""
    hidden = torch.ones(L, L, dtype=torch.bool).triu(1)
    return torch.einsum("bnls,bsnh->blnh", z.masked_fill(hidden, -torch.inf).softmax(-1), v)


def products(q, k):
    return torch.einsum("blnh,bsnh->bnls", q, k) * q.shape[-1] ** -0.5


def by_coordinate(table, c):
    """(n, M, M) indexed by the coordinates (B, L) of queries and keys -> (B, n, L, L)."""
    return table[:, c[:, :, None], c[:, None, :]].transpose(0, 1)


def compare(relative, coordinate, theirs, params, dtype="float64", of_gradients=2e-5):
    """`theirs`: (q, k, v, c, x) with keys for each head -> output; its parameters, by our names.

    Both compute in `dtype`; outputs differ by at most 5e-6, gradients by `of_gradients`.
    """
    q, k, v, x, coordinates = arrays(L, N, K, H)
    q, k, v, x = (a.astype(dtype) for a in (q, k, v, x))
    weights = np.random.default_rng(7).normal(size=q.shape).astype(dtype)
    name = f"{relative[0]}_{coordinate}"

    inputs = [torch.tensor(a, requires_grad=True) for a in (q, k, v, x)]
    wide = [a.repeat_interleave(N // K, dim=2) for a in inputs[1:3]]
    c = torch.tensor(coordinates[coordinate])
    output = theirs(inputs[0], *wide, c, inputs[3])
    (output * torch.tensor(weights)).sum().backward()

    with jax.enable_x64(dtype == "float64"):
        own = {n: jnp.asarray(of_torch(p.detach()).numpy()) for n, (p, of_torch) in params.items()}

        def loss(q, k, v, x, own):
            entry = (relative[0], coordinate, *relative[1:])
            found = positions.attend((entry,), coordinates, q, k, v, {name: own} if own else {}, x)
            return jnp.sum(found["output"] * weights), found["output"]

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))
        (_, ours), gradients = run(*map(jnp.asarray, (q, k, v, x)), own)
    np.testing.assert_allclose(ours, output.detach(), atol=5e-6)
    for a, gradient in zip(inputs, gradients, strict=False):
        wanted = np.zeros(a.shape) if a.grad is None else a.grad.numpy()
        np.testing.assert_allclose(gradient, wanted, atol=of_gradients)
    for n, (p, of_torch) in params.items():
        np.testing.assert_allclose(gradients[4][n], of_torch(p.grad), atol=of_gradients, err_msg=n)


def same(p):
    return p


@pytest.fixture(params=["position", "segment"])
def coordinate(request):
    return request.param


def test_t5(x_transformers, coordinate):
    module = x_transformers.RelativePositionBias(1.0, causal=True, heads=N).double()

    def theirs(q, k, v, c, x):
        return attend(products(q, k) + by_coordinate(module(L, L), c), v)

    weight = module.relative_attention_bias.weight
    compare(("t5",), coordinate, theirs, {"table": (weight, same)})


def test_t5_of_transformers(coordinate):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    table = torch.randn(32, N, dtype=torch.float64, requires_grad=True)

    def theirs(q, k, v, c, x):
        bucket = t5.T5Attention._relative_position_bucket(
            c[:, None, :] - c[:, :, None], bidirectional=False
        )
        return attend(products(q, k) + table[bucket].permute(0, 3, 1, 2), v)

    compare(("t5",), coordinate, theirs, {"table": (table, same)})


def test_alibi(x_transformers, coordinate):
    module = x_transformers.AlibiPositionalBias(heads=N, total_heads=N).double()

    def theirs(q, k, v, c, x):
        return attend(products(q, k) + by_coordinate(module(L, L), c), v)

    compare(("alibi",), coordinate, theirs, {})


def test_fox(x_transformers):
    module = x_transformers.DataDependentAlibi(N * H, N).double()

    def theirs(q, k, v, c, x):
        return attend(products(q, k) + module(x), v)

    linear = module.to_forget_gates[0]
    params = {"gate_kernel": (linear.weight, torch.t), "gate_bias": (linear.bias, same)}
    compare(("fox",), "position", theirs, params)


def test_cope(x_transformers):
    module = x_transformers.CoPE(H, N, 12).double()
    torch.nn.init.normal_(module.pos_emb)

    def theirs(q, k, v, c, x):
        hidden = torch.ones(L, L, dtype=torch.bool).triu(1)
        z = products(q, k).masked_fill(hidden, torch.finfo(q.dtype).min)
        return attend(z + module(q.transpose(1, 2), z), v)

    compare(("cope", ("positions", 12)), "position", theirs, {"table": (module.pos_emb, same)})


def test_pope(x_transformers, coordinate):
    module = x_transformers.PolarEmbedding(H, K).double()
    with torch.no_grad():
        module.learned_bias.uniform_(-6, -0.1)

    def theirs(q, k, v, c, x):
        angles, bias = module(c)
        bias = bias.repeat_interleave(N // K, dim=0)  # (N, 1, H)

        def polar(x, angle):
            size = torch.nn.functional.softplus(x)
            return torch.cat((size * angle.cos(), size * angle.sin()), dim=-1)

        q = polar(q, angles[:, :, None])
        k = polar(k, angles[:, :, None] + bias.transpose(0, 1)[None])
        return attend(torch.einsum("blnh,bsnh->bnls", q, k) * H**-0.5, v)

    compare(("pope",), coordinate, theirs, {"delta": (module.learned_bias, lambda p: p[:, 0])})


def interleaved(x):
    """Their pairs are neighbours; ours are (i, i + H/2)."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


def test_xpos(x_transformers, coordinate):
    module = x_transformers.RotaryEmbedding(H, use_xpos=True, scale_base=30).double()

    def theirs(q, k, v, c, x):
        frequencies, scale = module(c)
        q, k = (interleaved(a).transpose(1, 2) for a in (q, k))
        q = x_transformers.apply_rotary_pos_emb(q, frequencies, scale)
        k = x_transformers.apply_rotary_pos_emb(k, frequencies, scale**-1)
        return attend(torch.einsum("bnlh,bnsh->bnls", q.double(), k.double()) * H**-0.5, v)

    compare(("xpos", ("base", 30.0)), coordinate, theirs, {})


def test_xpos_of_torchscale():
    component = pytest.importorskip("torchscale.component.xpos_relative_position")
    module = component.XPOS(H, 40).double()

    def theirs(q, k, v, c, x):
        def turned(a, **options):
            flat = interleaved(a).transpose(1, 2).reshape(-1, L, H)
            return module(flat, **options).reshape(-1, N, L, H)

        z = torch.einsum("bnlh,bnsh->bnls", turned(q), turned(k, downscale=True)) * H**-0.5
        return attend(z, v)

    compare(("xpos", ("base", 40.0)), "position", theirs, {})


@pytest.fixture
def rotary_embedding_torch():
    return pytest.importorskip("rotary_embedding_torch.rotary_embedding_torch")


FLOAT32 = {"dtype": "float32", "of_gradients": 5e-6}


@pytest.mark.parametrize("options", [{}, {"theta": 50.0}, {"pairs": (0, 3), "spectrum": "own"}])
def test_rope_of_rotary_embedding_torch(rotary_embedding_torch, coordinate, options):
    R = 2 * options.get("pairs", (0, H // 2))[1]
    module = rotary_embedding_torch.RotaryEmbedding(R, theta=options.get("theta", 10000.0))

    def theirs(q, k, v, c, x):
        frequencies = module(c)[:, None]

        def turned(a):
            flat = torch.cat([interleaved(a[..., :R]), a[..., R:]], dim=-1).transpose(1, 2)
            return rotary_embedding_torch.apply_rotary_emb(frequencies, flat)

        return attend(torch.einsum("bnlh,bnsh->bnls", turned(q), turned(k)) * H**-0.5, v)

    compare(("rope", *options.items()), coordinate, theirs, {}, **FLOAT32)


def test_xpos_of_rotary_embedding_torch(rotary_embedding_torch, coordinate):
    module = rotary_embedding_torch.RotaryEmbedding(H, use_xpos=True, xpos_scale_base=30)

    def theirs(q, k, v, c, x):
        frequencies = module(c)[:, None]
        scale = torch.stack([module.get_scale(row) for row in c])[:, None]

        def turned(a, scale):
            flat = interleaved(a).transpose(1, 2)
            return rotary_embedding_torch.apply_rotary_emb(frequencies, flat, scale=scale)

        z = torch.einsum("bnlh,bnsh->bnls", turned(q, scale), turned(k, 1 / scale)) * H**-0.5
        return attend(z, v)

    compare(("xpos", ("base", 30.0)), coordinate, theirs, {}, **FLOAT32)


def test_pope_of_pope_pytorch(coordinate):
    pope = pytest.importorskip("PoPE_pytorch.pope")
    module = pope.PoPE(H, heads=K)
    with torch.no_grad():
        module.bias.uniform_(-6, -0.1, generator=torch.Generator().manual_seed(0))

    def theirs(q, k, v, c, x):
        angles, bias = module(c.float())
        embedded = pope.PolarEmbedReturn(angles, bias.repeat_interleave(N // K, dim=0))
        q, k = pope.apply_pope_to_qk(embedded, q.transpose(1, 2), k.transpose(1, 2))
        return attend(torch.einsum("bnlh,bnsh->bnls", q, k) * H**-0.5, v)

    compare(("pope",), coordinate, theirs, {"delta": (module.bias, same)}, **FLOAT32)


SCALINGS = {
    "yarn": (
        {"scaling": "yarn-released", "factor": 8.0, "original": 1024.0},
        {"factor": 8.0, "original_max_position_embeddings": 1024},
    ),
    "llama3": (
        {"scaling": "llama3", "factor": 8.0, "original": 8192.0},
        {
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    "longrope": (
        {"scaling": "longrope", "factor": 32.0, "original": 4096.0},
        {"factor": 32.0, "original_max_position_embeddings": 4096},
    ),
}
FACTORS = tuple(np.linspace(1.0, 40.0, 32).tolist())


@pytest.mark.parametrize("length", [2000, 100_000])
@pytest.mark.parametrize("kind", SCALINGS)
def test_scalings_are_those_of_transformers(kind, length):
    transformers = pytest.importorskip("transformers")
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    ours, theirs = SCALINGS[kind]
    if kind == "longrope":
        ours = ours | {"long": FACTORS, "short": FACTORS[::-1]}
        theirs = theirs | {"long_factor": list(FACTORS), "short_factor": list(FACTORS[::-1])}
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=131_072,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **theirs},
    )  # fmt: skip
    frequencies, magnitude = utils.ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    plan = tiny_plan(model__width=256, model__heads=4, model__kv_heads=4)
    rope = Rope(plan, "position", jax.random.key(0), **ours)
    with jax.enable_x64(True):
        cos, sin = rope.features(jnp.array([[0, 1, length - 1]]))
    wanted = frequencies.double().numpy()
    np.testing.assert_allclose(np.arctan2(sin, cos)[0, 1, 0], wanted, rtol=1e-6)
    np.testing.assert_allclose(np.hypot(sin, cos)[0, 0, 0], magnitude, rtol=1e-6)
