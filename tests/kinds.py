"""The kinds that act in attention, as float64 formulas of the papers, one row and one query at a time.

Each is a function (q, k, c, p, x, seen, **options) -> logits (N, L, L):

q, k: (L, N, H), keys repeated for the heads of their group. c: (L,) the coordinate. p: parameters by name.
x: (L, D), the layer's input. seen: (L, L) which keys each query sees.
"""

import numpy as np
import numpy_reference as reference


def products(q, k):
    return np.einsum("lnh,snh->nls", q, k) / np.sqrt(q.shape[-1])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def distances(c):
    return np.maximum(np.subtract.outer(c, c), 0).astype(np.float64)


def alibi(q, k, c, p, x, seen, slope_scale=1.0):
    return products(q, k) + reference.alibi(c[None], q.shape[1], slope_scale)[0]


def t5(q, k, c, p, x, seen, buckets=32, distance=128):
    return products(q, k) + reference.t5(c[None], p["table"], buckets, distance)[0]


def kerple_log(q, k, c, p, x, seen):
    return products(q, k) + reference.kerple_log(c[None], **p)[0]


def kerple_power(q, k, c, p, x, seen):
    P, A = np.maximum(p["p"], 0.01), np.clip(p["a"], 0.01, 2)
    return products(q, k) - P[:, None, None] * distances(c) ** A[:, None, None]


def fire(q, k, c, p, x, seen, threshold=512.0):
    z = products(q, k)
    limit = abs(p["threshold_scale"] * threshold)
    for i, m in enumerate(c):
        for j in np.flatnonzero(seen[i]):
            near = np.log(abs(p["c"]) * (m - c[j]) + 1)
            far = np.log(abs(p["c"]) * max(m, limit) + 1) + 1e-6
            hidden = np.maximum(near / far * p["first_kernel"][0] + p["first_bias"], 0)
            z[:, i, j] += hidden @ p["second_kernel"] + p["second_bias"]
    return z


def turned(q, k, c, theta, decay=None):
    """The products of the complex pairs (i, i + H/2), each turned by its distance, and decayed by it."""
    H = q.shape[2]
    half = H // 2
    frequency = theta ** (-np.arange(half) / half)
    d = np.subtract.outer(c, c)[..., None].astype(np.float64)
    a, b = (x[..., :half] + 1j * x[..., half:] for x in (q, k))
    pairs = np.einsum("lni,sni->nlsi", a, b.conj())
    scale = 1.0 if decay is None else decay ** np.maximum(d, 0)
    return (pairs * np.exp(1j * d * frequency) * scale).real.sum(axis=-1) / np.sqrt(H)


def rope(q, k, c, p, x, seen, theta=10000.0, pairs=None, spectrum="head"):
    H = q.shape[-1]
    if pairs is None:
        return turned(q, k, c, theta)
    first, last = pairs
    if spectrum == "own":  # a head of R features, and what is left
        R = 2 * last
        z = turned(q[..., :R], k[..., :R], c, theta) * np.sqrt(R)
        return (z + np.einsum("lnh,snh->nls", q[..., R:], k[..., R:])) / np.sqrt(H)
    of_pairs = np.r_[first:last, H // 2 + first : H // 2 + last]
    rest = np.setdiff1d(np.arange(H), of_pairs)
    only_q, only_k = np.zeros_like(q), np.zeros_like(k)
    only_q[..., of_pairs], only_k[..., of_pairs] = q[..., of_pairs], k[..., of_pairs]
    z = np.einsum("lnh,snh->nls", q[..., rest], k[..., rest]) / np.sqrt(H)
    return turned(only_q, only_k, c, theta) + z


def xpos(q, k, c, p, x, seen, theta=10000.0, base=512.0):
    H = q.shape[-1]
    zeta = (np.arange(0, H, 2) + 0.4 * H) / (1.4 * H)
    return turned(q, k, c, theta, zeta ** (1 / base))


def pope(q, k, c, p, x, seen, theta=10000.0):
    L, N, H = q.shape
    delta = np.repeat(np.clip(p["delta"], -2 * np.pi, 0), N // len(p["delta"]), axis=0)
    frequency = theta ** (-np.arange(H) / H)
    z = np.zeros((N, L, L))
    for i in range(L):
        for j in range(i + 1):
            angle = (c[i] - c[j]) * frequency - delta
            size = np.log1p(np.exp(q[i])) * np.log1p(np.exp(k[j]))
            z[:, i, j] = (size * np.cos(angle)).sum(axis=-1) / np.sqrt(H)
    return z


def ssmax(q, k, c, p, x, seen, bias=False):
    scale = p["s"][:, None] * np.log(c + 1) + (p["b"][:, None] if bias else 0)
    return products(q, k) * scale[:, :, None]


def temperature(q, k, c, p, x, seen, beta=0.1, unit=8192.0, first=1):
    scale = 1 + beta * np.log(1 + np.floor((c + first) / unit))
    return products(q, k) * scale[None, :, None]


def window(q, k, c, p, x, seen, size=0, chunked=False):
    far = np.subtract.outer(c, c) >= size
    if chunked:
        far = (c // size)[:, None] != (c // size)[None]
    return np.where(far, -np.inf, products(q, k))


def steps(c, first):
    """How much the coordinate grows at each token; `first` at the first and wherever it falls."""
    grown = np.diff(c)
    return np.concatenate([[first], np.where(grown < 0, first, grown)])


def fox(q, k, c, p, x, seen):
    z = products(q, k)
    forget = steps(c, 0)[:, None] * np.log(sigmoid(x @ p["gate_kernel"] + p["gate_bias"]))
    for i in range(len(c)):
        for j in range(i + 1):
            z[:, i, j] += forget[j + 1 : i + 1].sum(axis=0)
    return z


def cope(q, k, c, p, x, seen, positions=64, divided=False):
    z = products(q, k)
    scale = 1 / np.sqrt(q.shape[-1]) if divided else 1.0
    count = steps(c, 1)
    added = np.zeros_like(z)
    for n in range(len(z)):
        for i in range(len(c)):
            gates = np.where(seen[i], sigmoid(z[n, i]) * count, 0)
            for j in np.flatnonzero(seen[i]):
                position = min(gates[j : i + 1].sum(), positions - 1)
                low = int(np.floor(position))
                vectors = p["table"][[low, min(low + 1, positions - 1)]]
                lower, upper = vectors @ q[i, n]
                added[n, i, j] = scale * (lower + (position - low) * (upper - lower))
    return z + added


def dape(q, k, c, p, x, seen, bias="kerple-log", hidden=32):
    A, d, N = products(q, k), distances(c), q.shape[1]
    if bias == "alibi":
        B = -d * (2.0 ** (-8 * np.arange(1, N + 1) / N))[:, None, None]
    else:
        P, a = (np.maximum(p[f"base/{name}"], 0.01)[:, None, None] for name in "pa")
        B = -P * np.log(1 + a * d)
    z = A + B
    for i in range(len(c)):
        for j in np.flatnonzero(seen[i]):
            units = np.concatenate([A[:, i, j], B[:, i, j]]) @ p["first_kernel"] + p["first_bias"]
            units = np.where(units > 0, units, 0.01 * units)
            z[:, i, j] += units @ p["second_kernel"] + p["second_bias"]
    return z


FORMULAS = {
    "alibi": alibi,
    "t5": t5,
    "kerple-log": kerple_log,
    "kerple-power": kerple_power,
    "fire": fire,
    "rope": rope,
    "xpos": xpos,
    "pope": pope,
    "ssmax": ssmax,
    "temperature": temperature,
    "window": window,
    "fox": fox,
    "cope": cope,
    "dape": dape,
}


def attend(formula, q, k, v, c, p, x=None, document_ids=None, **options):
    """Causal attention under a kind: q (B, L, N, H), k and v (B, L, K, H) -> logits, output, seen."""
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    logits, outputs, visible = [], [], []
    for row in range(len(q)):
        seen = np.tri(q.shape[1], dtype=bool)
        if document_ids is not None:
            seen &= np.equal.outer(document_ids[row], document_ids[row])
        of_x = None if x is None else x[row]
        z = formula(q[row], k[row], c[row], p, of_x, seen, **options)
        weights = np.where(seen, np.exp(z - np.where(seen, z, -np.inf).max(-1, keepdims=True)), 0)
        weights /= weights.sum(axis=-1, keepdims=True)
        outputs.append(np.einsum("nls,snh->lnh", weights, v[row]))
        logits.append(z)
        visible.append(seen & np.isfinite(z))
    return np.array(logits), np.array(outputs), np.array(visible)


# Models of four layers that have several kinds each: what is tested of one program is tested of all of them.
MODELS = {
    "forgetting": (
        ("fox", "segment", ("layers", "1,3")),
        ("fox", "position", ("layers", "0")),
        ("rope", "position", ("layers", "0,1")),
        ("alibi", "segment"),
    ),
    "decays and temperatures": (
        ("xpos", "segment", ("base", 20.0), ("layers", "0/2")),
        ("xpos", "position", ("base", 40.0), ("layers", "1/2")),
        ("ssmax", "position", ("bias", True)),
        ("temperature", "segment", ("unit", 2.0), ("layers", "1")),
        ("window", "segment", ("size", 3), ("layers", "2")),
        ("window", "position", ("size", 8), ("chunked", True), ("layers", "3")),
    ),
    "polar and learned": (
        ("pope", "position", ("layers", "0/2")),
        ("rope", "offset", ("pairs", (0, 2)), ("layers", "1/2")),
        ("rope", "segment", ("pairs", (2, 4)), ("layers", "1/2")),
        ("kerple-power", "segment"),
        ("t5", "segment", ("buckets", 4), ("distance", 8), ("shared", False), ("layers", "2,3")),
        ("fire", "position", ("threshold", 10.0), ("layers", "0,1")),
    ),
    "counting": (
        ("cope", "segment", ("positions", 6), ("layers", "0/2")),
        ("cope", "position", ("divided", True), ("layers", "1/2")),
        ("rope", "position", ("pairs", (0, 3)), ("spectrum", "own")),
    ),
    "adapting": (("dape", "segment", ("layers", "0,3")), ("dape", "position", ("layers", "1"))),
}

# One model with a kind or more in each layer, for what is slow to compile.
TOGETHER = (
    ("fox", "segment", ("layers", "0")),
    ("rope", "position", ("pairs", (0, 3)), ("layers", "0")),
    ("xpos", "position", ("base", 40.0), ("layers", "1")),
    ("ssmax", "position", ("bias", True), ("layers", "1")),
    ("window", "segment", ("size", 3), ("layers", "1")),
    ("pope", "position", ("layers", "2")),
    ("kerple-power", "segment", ("layers", "2")),
    ("kerple-log", "position", ("layers", "1,2")),
    ("t5", "segment", ("layers", "2,3")),
    ("fire", "position", ("threshold", 10.0), ("layers", "2")),
    ("cope", "segment", ("positions", 6), ("layers", "3")),
    ("temperature", "position", ("unit", 3.0), ("layers", "3")),
)
