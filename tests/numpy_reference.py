"""The decoder in plain float64 NumPy: slow, clear, and sharing no code with the package.

Llama's architecture (RMSNorm, SwiGLU, grouped-query attention) with the encodings of the paper:
learned or sinusoidal vectors added to the embedding; RoPE, ALiBi, T5 and KERPLE in attention.
"""

import itertools

import numpy as np


def attend(q, k, v, bias=None, document_ids=None):
    """Causal attention, one query of one head at a time.

    q: (B, L, N, H). k, v: (B, L, K, H). bias: (B, N, L, L) or None. Returns (B, L, N, H) float64.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, L, N, H = q.shape
    group = N // k.shape[2]  # consecutive query heads share one key/value head
    out = np.zeros_like(q)
    for b in range(B):
        for n in range(N):
            for i in range(L):
                logits = k[b, : i + 1, n // group] @ q[b, i, n] / np.sqrt(H)
                if bias is not None:
                    logits = logits + bias[b, n, i, : i + 1]
                if document_ids is not None:
                    same = document_ids[b, : i + 1] == document_ids[b, i]
                    logits = np.where(same, logits, -np.inf)
                weights = np.exp(logits - logits.max())
                out[b, i, n] = weights @ v[b, : i + 1, n // group] / weights.sum()
    return out


def rope_angles(
    coordinate, width, theta=10000.0, scaling="", factor=None, original=None, long=None, short=None
):
    """How far the pairs of a head are turned: (B, L) -> (B, L, H/2); and the factor sqrt(1/t).

    "linear" moves the coordinate, as Chen et al. (2023) do; "ntk" and "dynamic-ntk" change the base,
    as bloc97's post and Hugging Face's code do; "yarn" follows Peng et al. (2023), equations 17-22,
    "yarn-released", "llama3" and "longrope" the code released with the models.
    """
    coordinate = np.asarray(coordinate, np.float64)
    angles = np.empty((*coordinate.shape, width // 2))
    for row, values in enumerate(coordinate):
        base, seen = theta, max(values) + 1
        if scaling == "ntk":
            base = theta * factor ** (width / (width - 2))
        if scaling == "dynamic-ntk" and seen > original:
            stretch = (factor * seen / original) - (factor - 1)
            base = theta * stretch ** (width / (width - 2))
        for d in range(width // 2):
            frequency = base ** (-2 * d / width)
            m = values / factor if scaling == "linear" else values
            if scaling == "yarn":
                wavelength = 2 * np.pi * theta ** (2 * d / width)
                r, alpha, beta = original / wavelength, 1, 32
                gamma = 0 if r < alpha else 1 if r > beta else (r - alpha) / (beta - alpha)
                frequency = (1 - gamma) * frequency / factor + gamma * frequency
            if scaling == "yarn-released":
                low, high = (
                    width * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(theta))
                    for turns in (32, 1)
                )
                low, high = max(np.floor(low), 0), min(np.ceil(high), width - 1)
                ramp = min(max((d - low) / (high - low if high > low else 1e-3), 0), 1)
                frequency = frequency * (1 - ramp) + frequency / factor * ramp
            if scaling == "llama3":
                wavelength = 2 * np.pi / frequency
                if wavelength > original:
                    frequency = frequency / factor
                elif wavelength > original / 4:
                    smooth = (original / wavelength - 1) / 3
                    frequency = (1 - smooth) * frequency / factor + smooth * frequency
            if scaling == "longrope":
                frequency = frequency / (long if seen > original else short or [1] * width)[d]
            angles[row, :, d] = m * frequency
    magnitude = 1.0
    if scaling in ("yarn", "yarn-released"):
        magnitude = 0.1 * np.log(factor) + 1
    if scaling == "longrope":
        magnitude = np.sqrt(1 + np.log(factor) / np.log(original))
    return angles, magnitude


def rope(x, coordinate, theta=10000.0, **scaling):
    """Turns the complex number x_i + i x_{i+H/2} by coordinate * theta^(-2i/H). x: (B, L, N, H)."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    angles, magnitude = rope_angles(coordinate, 2 * half, theta, **scaling)
    turned = (x[..., :half] + 1j * x[..., half:]) * magnitude * np.exp(1j * angles[:, :, None])
    return np.concatenate([turned.real, turned.imag], axis=-1)


def alibi_slopes(heads):
    """The recursion of the code that Press et al. (2022) released."""
    power = 1
    while 2 * power <= heads:
        power *= 2
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + (alibi_slopes(2 * power)[::2][: heads - power] if power < heads else [])


def alibi(coordinate, heads, slope_scale=1.0):
    """(B, L) -> (B, N, L, L): -slope * (coordinate of the query - coordinate of the key)."""
    c = np.asarray(coordinate, np.float64)
    slopes = slope_scale * np.array(alibi_slopes(heads))
    return -slopes[:, None, None] * (c[:, None, :, None] - c[:, None, None, :])


def t5(coordinate, table, buckets=32, distance=128):
    """(B, L) and (buckets, N) -> (B, N, L, L): the formula, one pair of tokens at a time."""
    c = np.asarray(coordinate)
    bias = np.zeros((len(c), table.shape[1], c.shape[1], c.shape[1]))
    half = buckets // 2
    for b, row in enumerate(c.tolist()):
        for i, j in itertools.product(range(len(row)), repeat=2):
            d = max(row[i] - row[j], 0)
            bucket = d
            if d >= half:
                ratio = np.log(d / half) / np.log(distance / half)
                bucket = min(buckets - 1, half + int(ratio * half + 1e-9))
            bias[b, :, i, j] = table[bucket]
    return bias


def kerple_log(coordinate, p, a):
    """(B, L) and (N,) each -> (B, N, L, L): -p ln(1 + a d), parameters clamped from below at 0.01."""
    c = np.asarray(coordinate, np.float64)
    d = np.maximum(c[:, None, :, None] - c[:, None, None, :], 0)
    p, a = (np.maximum(x, 0.01)[:, None, None] for x in (p, a))
    return -p * np.log(1 + a * d)


BIASES = {"t5": t5, "kerple-log": kerple_log}


def sinusoidal(coordinate, width, scale, theta=10000.0):
    """Sines in the first half, cosines in the second. (B, L) -> (B, L, D)."""
    angles = np.asarray(coordinate)[..., None] * theta ** (-np.arange(0, width, 2) / width)
    return scale * np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def rms_norm(x, scale, epsilon):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * scale


def swiglu(x, gate, up, down):
    gated = x @ gate
    return (gated / (1 + np.exp(-gated)) * (x @ up)) @ down


def _float64(tree):
    if isinstance(tree, dict):
        return {name: _float64(leaf) for name, leaf in tree.items()}
    return np.asarray(tree, np.float64)


def _of_layer(tree, i):
    if isinstance(tree, dict):
        return {name: _of_layer(stacked, i) for name, stacked in tree.items()}
    return tree[i]


def layers_of(text, layers):
    """The layers of the option `layers`."""
    if not text:
        return list(range(layers))
    numbers, slash, period = text.partition("/")
    wanted = [int(number) for number in numbers.split(",")]
    return [i for i in range(layers) if (i % int(period) if slash else i) in wanted]


def logits(config, params, inputs, factors=(1, 1, 1)):
    """(B, L, V) float64. `inputs`: tokens, coordinates and, if documents are apart, their ids.

    factors: of the embedding, and of what attention and SwiGLU of each layer add.
    """
    m = config.model
    params = _float64(params)
    inputs = {name: np.asarray(x) for name, x in inputs.items()}

    x = params["embed"]["table"][inputs["tokens"]]
    for kind, coordinate, *options in config.position.absolute:
        values = inputs[coordinate]
        if kind == "learned":
            table = params["absolute"][f"learned_{coordinate}"]["table"]
            x = x + table[np.minimum(values, len(table) - 1)]
        else:
            x = x + sinusoidal(values, m.width, **{"scale": m.init_std, **dict(options)})

    x = x * factors[0]
    for i in range(m.layers):
        layer = {
            group: _of_layer(params["layers"][group], i)
            for group in params["layers"]
            if group != "relative"
        }
        w = layer["attention"]
        y = rms_norm(x, layer["attention_norm"]["scale"], m.norm_epsilon)
        q, k, v = (np.einsum("bld,dnh->blnh", y, w[name]) for name in ("query", "key", "value"))
        if m.qk_norm:
            q, k = (
                rms_norm(z, w[f"{name}_norm"]["scale"], m.norm_epsilon)
                for z, name in ((q, "query"), (k, "key"))
            )
        bias = 0
        for kind, coordinate, *options in config.position.relative:
            values, options = inputs[coordinate], dict(options)
            having = layers_of(options.pop("layers", ""), m.layers)
            shared = options.pop("shared", True)
            if i not in having:
                continue
            name = f"{kind}_{coordinate}"
            if kind == "rope":
                q, k = (rope(z, values, **options) for z in (q, k))
            elif kind == "alibi":
                bias = bias + alibi(values, m.heads, **options)
            elif shared:
                bias = bias + BIASES[kind](values, **params["relative"][name], **options)
            else:
                own = params["layers"]["relative"][name]
                own = {p: stacked[having.index(i)] for p, stacked in own.items()}
                bias = bias + BIASES[kind](values, **own, **options)
        bias = np.broadcast_to(bias, (len(x), m.heads, x.shape[1], x.shape[1]))
        mixed = attend(q, k, v, bias, inputs.get("document_ids"))
        x = x + np.einsum("blnh,nhd->bld", mixed, w["output"]) * factors[1]
        y = rms_norm(x, layer["feed_forward_norm"]["scale"], m.norm_epsilon)
        x = x + swiglu(y, **layer["feed_forward"]) * factors[2]

    x = rms_norm(x, params["norm"]["scale"], m.norm_epsilon)
    x = x @ (params["embed"]["table"].T if m.tied_output else params["output"]["kernel"])
    return m.logit_softcap * np.tanh(x / m.logit_softcap) if m.logit_softcap else x
