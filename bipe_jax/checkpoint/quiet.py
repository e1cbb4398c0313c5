"""What Orbax and its libraries print, kept off the terminal."""

import logging
import sys

from absl import logging as absl_logging


def quiet() -> None:
    """Orbax warns of choices that are ours on purpose, and prints each error that it also raises.

    asyncio does so for every array of a failed save, some only when the program ends, and TensorStore's
    threads for every array of a failed read.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("orbax", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    ordinary = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            ordinary(unraisable)

    sys.unraisablehook = hook
