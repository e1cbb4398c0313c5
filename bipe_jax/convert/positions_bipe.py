"""The positional encodings in torch, which `modeling_bipe.py` reads; bipe_jax writes this file beside it.

An encoding is a *kind* (learned, sinusoidal, rope, alibi) applied to a *coordinate* of each token. `entry` is
a dict with "kind", "coordinate" and the kind's options.

Shape letters: B batch, L new tokens, S new and cached tokens, N heads, H head width, D model width.
"""

import math

import torch


def learned(table, coordinate, entry):
    """Rows of a table. Beyond the table, the last row; for `position`, an error."""
    rows = table.num_embeddings
    if entry["coordinate"] == "position" and coordinate.max() >= rows:
        raise ValueError(
            f"the learned table of position ends at {rows} tokens: the model has nothing for "
            f"{int(coordinate.max()) + 1} tokens"
        )
    return table(coordinate.clamp(max=rows - 1)).float()


def sinusoidal(width, coordinate, entry):
    """Sines in the first half, cosines in the second: (B, L) -> (B, L, D) float32."""
    exponents = -torch.arange(0, width, 2, dtype=torch.float64) / width
    frequencies = (entry["theta"] ** exponents).float().to(coordinate.device)
    angles = coordinate[..., None].float() * frequencies
    return entry["scale"] * torch.cat([angles.sin(), angles.cos()], dim=-1)


def rope_frequencies(width, seen, entry):
    """Angles of the pairs of a head per unit of the coordinate, and the magnitude of the rotation.

    Args:
      width: H. seen: (B, 1, 1, 1) float64 on the CPU, the coordinate's largest value plus 1.
      entry: "theta" and, with scaling, "scaling", "factor" and "original".

    Returns:
      (H/2,) float64, with "dynamic-ntk" (B, 1, 1, H/2); the magnitude.
    """
    theta, scaling, factor = entry["theta"], entry.get("scaling", ""), entry.get("factor")
    pairs = torch.arange(width // 2, dtype=torch.float64)
    frequencies = theta ** (-2 * pairs / width)
    if not scaling:
        return frequencies, 1.0
    if scaling == "linear":
        return frequencies / factor, 1.0
    if scaling == "ntk":
        return frequencies * factor ** (-pairs / (width // 2 - 1)), 1.0
    original = entry["original"]
    if scaling == "dynamic-ntk":
        stretch = 1 + factor * (seen - original).clamp(min=0) / original
        return frequencies * stretch ** (-pairs / (width // 2 - 1)), 1.0
    if scaling == "yarn":  # Peng et al. 2023: NTK by parts, and a temperature
        turns = original * frequencies / (2 * math.pi)
        unscaled = ((turns - 1) / 31).clamp(0, 1)
        return (1 - unscaled) * frequencies / factor + unscaled * frequencies, 0.1 * math.log(
            factor
        ) + 1
    raise ValueError(f"the rope scaling {scaling!r} is unknown to modeling_bipe.py")


def rotation_of(width, coordinate, real, new, entry):
    """Cosines and sines of the last `new` of all coordinates (B, S), (B, 1, L, H/2) float32 each."""
    seen = coordinate.masked_fill(~real, 0).amax(-1)[:, None, None, None] + 1
    frequencies, magnitude = rope_frequencies(width, seen.cpu().double(), entry)
    angles = coordinate[:, None, -new:, None].float() * frequencies.float().to(coordinate.device)
    return magnitude * angles.cos(), magnitude * angles.sin()


def turn(x, cos, sin):
    """Rotates the pairs (i, i + H/2) of x, (B, N, L, H), in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def alibi_slopes(heads):
    """Press et al. 2022: 2^(-8i/N), with the released code's rule where N is no power of two."""
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * i / below) for i in range(1, below + 1)]
    return slopes + [2.0 ** (-4.0 * i / below) for i in range(1, 2 * (heads - below), 2)]


def alibi(heads, coordinate, new, entry):
    """-slope * (coordinate of the query - that of the key): (B, S) -> (B, N, L, S) float32."""
    distance = (coordinate[:, -new:, None] - coordinate[:, None, :]).float()
    slopes = entry["slope_scale"] * torch.tensor(alibi_slopes(heads), dtype=torch.float64)
    return -slopes.float().to(coordinate.device)[:, None, None] * distance[:, None]
