"""Accuracy by length and depth as a picture."""

import textwrap

import matplotlib
import numpy as np

from bipe_jax.errors import UserError

_PANELS = 3  # in a row


def draw(result: dict, path: str) -> None:
    """One panel a task, a column a length, a row a depth; percent in each cell.

    Args:
      result: what tasks.json holds.
      path: the picture's file; its ending chooses the format.

    Raises:
      UserError: the file cannot be written.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["results"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    across = min(len(tasks), _PANELS)
    down = -(-len(tasks) // across)
    size = (
        max(1.6 + across * max(0.62 * len(lengths) + 0.9, 2.6), 4.5),
        1.1 + down * max(0.36 * len(depths) + 0.9, 1.8),
    )
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    for number, axis in enumerate(axes.flat):
        if number >= len(tasks):
            axis.remove()
            continue
        cells = np.full((len(depths), len(lengths)), np.nan)
        for row in rows:
            if row["task"] == tasks[number]:
                cells[depths.index(row["depth"]), lengths.index(row["length"])] = row["accuracy"]
        image = _panel(axis, cells, lengths, depths, result["training_length"])
        axis.set_title(tasks[number], fontsize=10)
        if number % across == 0:
            axis.set_ylabel("depth")
        if number + across >= len(tasks):
            axis.set_xlabel("length (tokens)")
    bar = figure.colorbar(image, ax=axes, label="accuracy (%)", aspect=30 if down > 1 else 15)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"])
    title = textwrap.fill(f"{result['name']}, haystack: {result['data']}", int(13 * size[0]))
    if lengths[0] <= result["training_length"] < lengths[-1]:
        title += "\nright of the dashed line: longer than in training"
    figure.suptitle(title, fontsize=10, parse_math=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    plt.close(figure)


def _panel(axis, cells: np.ndarray, lengths, depths, training_length: int):
    # Cividis looks the same to colour-blind readers (Nunez et al. 2018).
    image = axis.imshow(cells, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(cells):
        if not np.isnan(value):
            colour = "black" if value > 0.45 else "white"
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour,
                      fontsize=8)  # fmt: skip
    axis.set_xticks(range(len(lengths)), [_short(n) for n in lengths], fontsize=8)
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
    axis.tick_params(length=0)
    within = sum(length <= training_length for length in lengths)
    if 0 < within < len(lengths):  # to the right, lengths that training never saw
        axis.axvline(within - 0.5, color="white", linewidth=2.5)
        axis.axvline(within - 0.5, color="black", linewidth=1, linestyle=(0, (3, 2)))
    for side in axis.spines.values():
        side.set_visible(False)
    return image


def _short(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else f"{length:,}"
