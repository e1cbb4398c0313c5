"""Where segments end; "fixed:16" has nothing to do with the text, and so is the control."""

from launch.algebra import sweep


def get_sweep():
    return sweep("segments.rule", ["sentence", "newline", "newline-and-spaced-period", "fixed:16"])
