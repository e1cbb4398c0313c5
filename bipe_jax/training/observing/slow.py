"""Slow steps: those that take much longer than the steps before, and the phase responsible."""

import collections
import statistics

_WINDOW = 128  # steps
_FEWEST = 20  # steps before the first judgement
_DEVIATIONS = 8.0
_RATIO = 1.5
_LEAST = 0.1  # seconds above the median
_TO_SIGMA = 1.4826  # of a normal distribution: standard deviation / median absolute deviation


class SlowSteps:
    """Judges each step by those before it.

    A step is slow if it takes more than 1.5 times the median of the last 128, more than that median plus
    0.1 s, and more than it plus 8 standard deviations, estimated as 1.4826 times the median absolute
    deviation. Slow steps among the 128 hardly change these limits.
    """

    def __init__(self):
        self._window = collections.deque(maxlen=_WINDOW)

    def median(self) -> float | None:
        """The median seconds of a step, or None before the first."""
        return statistics.median(map(_total, self._window)) if self._window else None

    def judge(self, seconds: dict[str, float]) -> dict | None:
        """Judges the next step.

        Args:
          seconds: by phase.

        Returns:
          None, or for a slow step {"took": its seconds, "usual": the median, "phase": the one that exceeds
          its own median most}.
        """
        slow = None
        if len(self._window) >= _FEWEST:
            totals = [_total(s) for s in self._window]
            median = statistics.median(totals)
            deviation = _TO_SIGMA * statistics.median(abs(t - median) for t in totals)
            limit = median + max((_RATIO - 1) * median, _LEAST, _DEVIATIONS * deviation)
            if _total(seconds) > limit:
                above = {
                    phase: value - statistics.median(s[phase] for s in self._window)
                    for phase, value in seconds.items()
                }
                slow = {
                    "took": _total(seconds),
                    "usual": median,
                    "phase": max(above, key=above.__getitem__),
                }
        self._window.append(seconds)
        return slow


def _total(seconds: dict[str, float]) -> float:
    return sum(seconds.values())
