"""Prints the wall time of a run by part, over all its starts: python -m bipe_jax.goodput WORKDIR.

Goodput is the share of the time since the first start in which the devices ran steps whose work was kept.
"""

import time

from bipe_jax import cli, commands
from bipe_jax.errors import UserError
from bipe_jax.training.observing.account import Account, account, is_record
from bipe_jax.workdir import Workdir, events, heartbeat

_SHOWN = 5  # slow steps

# The parts: the phases of a process, "again" and "down".
_MEANING = {
    "step": "running steps whose work was kept",
    "again": "running steps that were repeated after a kill or a rewind",
    "starting": "imports, restoring, compiling, first steps",
    "data": "the devices waited for a batch",
    "saving": "the devices waited for a save",
    "evaluating": "evaluation, during and after training",
    "other": "anything else: metrics, traces, ...",
    "down": "between the end of a process and the next start",
}


def table(workdir: str, run: Account) -> str:
    """The account as text."""

    def date(moment):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))

    total = run.end - run.begin
    lines = [
        f"{workdir}: {run.starts} start{'s' * (run.starts > 1)}, "
        f"{date(run.begin)} to {date(run.end)}, step {run.step}, {run.last}",
        "",
    ]
    for part, meaning in _MEANING.items():
        spent = run.seconds[part]
        lines.append(f"{part:11}{_span(spent):>13} {spent / max(total, 1e-9):7.1%}  {meaning}")
        if part == "starting" and any(run.starting.values()):
            lines += [f"  {name:9}{_span(took):>13}" for name, took in run.starting.items()]
    lines += [f"{'all':11}{_span(total):>13}", "", f"goodput {run.goodput:.1%}"]
    for slow in sorted(run.slow, key=lambda slow: -slow["took"])[:_SHOWN]:
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
    workdir = commands.parser("goodput").parse_args().workdir
    try:
        recorded = events.read(workdir)
    except OSError as error:
        path = Workdir(workdir).events
        raise UserError(f"{path} cannot be read: {error.strerror}: name a run's workdir") from None
    recorded = [event for event in recorded if is_record(event)]
    if not recorded:
        raise UserError(
            f"{Workdir(workdir).events} does not exist or is empty: name a run's workdir"
        )
    beat = heartbeat.read(workdir)
    print(table(workdir, account(recorded, beat if is_record(beat) else None)))
    cli.check_printed()


if __name__ == "__main__":
    with cli.user_errors():
        main()
