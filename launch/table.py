"""The states of a sweep's runs: a live table on a terminal, plain lines elsewhere."""

import shutil
import sys
import time
from collections.abc import Sequence

from bipe_jax.report.text import table
from bipe_jax.workdir import metrics

_EVERY = 1.0  # seconds
_HEAD = ("point", "state", "step", "loss", "tokens/s", "elapsed")
_REST = 58  # characters of all columns but the first
_FIRST = ("running", "stopping", "failed", "elsewhere", "stopped", "waiting", "done", "done before")


class Table:
    """Shows runs on standard error, see `local.Run`."""

    def __init__(self, runs: Sequence):
        self._runs = runs
        self._live = sys.stderr.isatty()
        self._note = ""
        self._drawn, self._at = 0, -_EVERY  # lines on the terminal, and the time of drawing
        self._shown: dict[
            str, tuple
        ] = {}  # the last state that was shown, by run; of all runs by ""

    def note(self, text: str) -> None:
        """Shows a line below the table."""
        self._note = text
        if not self._live:
            print(text, file=sys.stderr, flush=True)

    def show(self) -> None:
        """Shows the current states, if they have changed."""
        if not self._live:
            return self._print_changes()
        states = [run.state for run in self._runs]
        now = (states, self._note)
        if time.monotonic() - self._at < _EVERY and now == self._shown.get(""):
            return None
        self._shown[""], self._at = now, time.monotonic()
        size = shutil.get_terminal_size()
        lines = [line[: size.columns - 1] for line in self.lines(size.lines - 2, size.columns)]
        up = f"\x1b[{self._drawn}F" if self._drawn else ""
        sys.stderr.write(up + "\x1b[J" + "\n".join(lines) + "\n")
        sys.stderr.flush()
        self._drawn = len(lines)

    def _print_changes(self) -> None:
        for run in self._runs:
            now = (run.state, run.why)
            if self._shown.get(run.name, ("waiting", "")) != now:
                self._shown[run.name] = now
                why = f" ({run.why})" if run.why else ""
                print(f"{run.name}: {run.state}{why}", file=sys.stderr, flush=True)

    def lines(self, height: int, width: int) -> list[str]:
        """The table in at most `height` lines; without room for all runs, active ones come first."""
        room = max(height - 3, 1)
        runs = self._runs
        if len(runs) > room:
            runs = sorted(runs, key=lambda run: _FIRST.index(run.state))[:room]
        lines = table(_HEAD, [_row(run, max(width - _REST, 20)) for run in runs]).splitlines()
        states = [run.state for run in self._runs]
        counts = [f"{states.count(state)} {state}" for state in _FIRST if state in states]
        return [
            *lines,
            f"{len(self._runs)} points: {', '.join(counts)}",
            *filter(None, [self._note]),
        ]


def _row(run, longest: int) -> tuple[str, ...]:
    """The cells of a run, with both ends of a name of more than `longest` characters."""
    now = metrics.latest(run.workdir)
    half = (longest - 1) // 2
    return (
        run.name if len(run.name) <= longest else f"{run.name[:half]}…{run.name[-half:]}",
        run.shown,
        f"{now.step:,}/{run.steps:,}",
        "" if now.loss is None else f"{now.loss:.3f}",
        "" if now.tokens_per_second is None else f"{now.tokens_per_second:,.0f}",
        _clock(run.elapsed) if run.elapsed else "",
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
