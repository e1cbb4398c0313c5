"""Rules of segments; "fixed:16" ignores the text and is the control."""

from launch.algebra import sweep


def get_sweep():
    return sweep("segments.rule", ["sentence", "newline", "newline-and-spaced-period", "fixed:16"])
