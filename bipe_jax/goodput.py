"""Where the wall time of a run went, over all its starts: python -m bipe_jax.goodput WORKDIR

Goodput is the share of the time since the first start in which the devices ran steps whose work was kept.
"""

import argparse
import dataclasses
import time

from bipe_jax import cli
from bipe_jax.errors import UserError
from bipe_jax.training.observing.clock import PHASES
from bipe_jax.workdir import Workdir, events, heartbeat

_SHOWN = 5  # slow steps

# What the table says of each part. "again" and "down" are no phases of a process.
_MEANING = {
    "step": "running steps whose work was kept",
    "again": "running steps that were made again, after a kill or a rewind",
    "starting": "imports, restoring, compiling, first steps",
    "data": "the devices waited for a batch",
    "saving": "the devices waited for a save",
    "evaluating": "the evaluation at the end",
    "other": "anything else: metrics, traces, ...",
    "down": "between the end of a process and the next start",
}


@dataclasses.dataclass(frozen=True)
class Account:
    """Where the time went.

    Attributes:
      seconds: by part, "step", "again", "starting", ...; they sum up to `end - begin`, as
        one process of a run begins after the other.
      begin, end: Unix times of the first start, and of the last sign of life.
      starts: processes, one after the other.
      step: the last that was complete; 0 if none was.
      last: how the run ended or, as it has not, what it was at: a phase of the heartbeat.
      slow: slow steps, the slowest of each full line of metrics.
    """

    seconds: dict[str, float]
    begin: float
    end: float
    starts: int
    step: int
    last: str
    slow: list[dict]

    @property
    def goodput(self) -> float:
        return self.seconds["step"] / max(self.end - self.begin, 1e-9)


def account(happened: list[dict], beat: dict | None = None) -> Account:
    """Sums up a run.

    Each event says how much of its process's time each phase has had so far, so that the last sign of life
    of a process, an event or a heartbeat, is all that is needed of it. Time of steps beyond the one that a
    later process goes on from is moved to "again".

    Args:
      happened: from `events.read`, not empty.
      beat: the heartbeat, if it is there: it knows more of a process that was killed, or still runs.
    """
    seconds = dict.fromkeys(_MEANING, 0.0)
    made = _Made()
    lives = _lives(happened, beat)
    end = lives[0][0]["since"]
    for life in lives:
        seconds["down"] += max(life[0]["since"] - end, 0.0)
        steps = [sign for sign in life if sign["step"] is not None]
        for i, sign in enumerate(steps):
            move = made.reach if i else made.go_on_from  # the first is where the process began
            move(sign["step"], sign["seconds"]["step"])
            if sign["event"] == "rewound":
                made.go_on_from(sign["to"], sign["seconds"]["step"])
        for phase in PHASES:
            seconds[phase] += life[-1]["seconds"].get(phase, 0.0)
        end = max(end, life[-1]["time"])
    seconds["step"] -= made.again
    seconds["again"] = made.again
    last = lives[-1][-1]
    return Account(
        seconds,
        begin=lives[0][0]["since"],
        end=end,
        starts=len(lives),
        step=made.step,
        last=last.get("phase", last["event"]),
        slow=[event["slow"] for event in happened if event["event"] == "slow"],
    )


class _Made:
    """Seconds of steps by the steps that they made, so that they can be taken back."""

    def __init__(self):
        self.again, self.step = 0.0, 0
        self._parts = []  # (from a step, to a step, seconds), in order
        self._seconds = 0.0  # of this process until `step`

    def reach(self, step: int, seconds: float) -> None:
        self._parts.append((self.step, step, seconds - self._seconds))
        self.step, self._seconds = step, seconds

    def go_on_from(self, step: int, seconds: float) -> None:
        while self._parts and self._parts[-1][1] > step:
            begin, end, spent = self._parts.pop()
            kept = max(step - begin, 0) / (end - begin) if end > begin else 0.0
            self.again += spent * (1 - kept)
            if kept:
                self._parts.append((begin, step, spent * kept))
        self.step, self._seconds = step, seconds


def _lives(happened: list[dict], beat: dict | None) -> list[list[dict]]:
    """Events by process, each followed by its last heartbeat where that is later."""
    lives, beats = {}, [beat] if beat else []
    for event in happened:
        lives.setdefault(event["since"], []).append(event)
        if event.get("before"):
            beats.append(event["before"])
    for sign in beats:
        life = lives.get(sign.get("since"))
        if life and life[-1]["time"] < sign["time"]:
            life.append({"event": "heartbeat"} | sign)
    return list(lives.values())


def table(workdir: str, account: Account) -> str:
    def date(moment):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))

    total = account.end - account.begin
    lines = [
        f"{workdir}: {account.starts} start{'s' * (account.starts > 1)}, "
        f"{date(account.begin)} to {date(account.end)}, step {account.step}, {account.last}",
        "",
    ]
    for part, meaning in _MEANING.items():
        spent = account.seconds[part]
        lines.append(f"{part:11}{_span(spent):>13} {spent / max(total, 1e-9):7.1%}  {meaning}")
    lines += [f"{'all':11}{_span(total):>13}", "", f"goodput {account.goodput:.1%}"]
    for slow in sorted(account.slow, key=lambda slow: -slow["took"])[:_SHOWN]:
        lines.append(
            f"slow: step {slow['step']} took {slow['took']:.1f} s, {slow['usual']:.1f} s are usual; it "
            f"waited in {slow['phase']}"
        )
    return "\n".join(lines)


def _span(seconds: float) -> str:
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours:.0f} h {minutes:02.0f} min"
    return f"{minutes:.0f} min {rest:02.0f} s" if minutes else f"{rest:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bipe_jax.goodput", description=__doc__)
    parser.add_argument("workdir", help="of a run, which may still be running")
    workdir = parser.parse_args().workdir
    happened = events.read(workdir)
    if not happened:
        raise UserError(
            f"{Workdir(workdir).events} is not there, or empty: name the workdir of a run"
        )
    print(table(workdir, account(happened, heartbeat.read(workdir))))


if __name__ == "__main__":
    with cli.user_errors():
        main()
