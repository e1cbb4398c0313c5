"""Silences the messages of Orbax and its libraries."""

import logging
import sys

from absl import logging as absl_logging


def quiet() -> None:
    """Silences Orbax, which warns of intended choices and prints errors that it also raises.

    asyncio prints one for every array of a failed save, some at the program's end; TensorStore's threads
    print one for every array of a failed read.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("orbax", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    ordinary = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            ordinary(unraisable)

    sys.unraisablehook = hook
