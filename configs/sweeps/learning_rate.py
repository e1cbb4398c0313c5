"""Learning rates half a decade apart, around the quickstart's and the authors'."""

from launch.algebra import sweep


def get_sweep():
    return sweep("optimizer.learning_rate", [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
