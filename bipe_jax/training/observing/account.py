"""The account of a run's wall time by part, over all its starts, from its events."""

import dataclasses
from typing import Any

from bipe_jax.training.observing.clock import PHASES, STARTING

_LATEST = 1e11  # Unix time, of the year 5138: more is no time that can be shown

# Of the time of a run: the phases of a process; steps that were repeated; between two processes.
PARTS = (*PHASES, "again", "down")


@dataclasses.dataclass(frozen=True)
class Account:
    """The time of a run.

    Attributes:
      seconds: by part, "step", "again", "starting", ...; their sum is `end - begin`.
      begin, end: Unix times of the first start, and of the last event or heartbeat.
      starts: number of processes, one after the other.
      step: the last complete step; 0 if none.
      last: how the run ended, or the phase of the last heartbeat if it has not.
      slow: slow steps, the slowest of each full line of metrics.
      starting: seconds of "starting" by what the starts did whose first step was completed.
    """

    seconds: dict[str, float]
    begin: float
    end: float
    starts: int
    step: int
    last: str
    slow: list[dict]
    starting: dict[str, float]

    @property
    def goodput(self) -> float:
        """The share of the time in steps whose work was kept."""
        return self.seconds["step"] / max(self.end - self.begin, 1e-9)


def account(recorded: list[dict], beat: dict | None = None) -> Account:
    """The account of a run.

    Each event has the seconds of each phase of its process so far, so that only the last record of a
    process, an event or a heartbeat, counts. Time of steps after the one from which a later process resumes
    is moved to "again".

    Args:
      recorded: from `events.read`, not empty.
      beat: the heartbeat, if any, which may be later than the last event.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    steps = _Steps()
    processes = _by_process(recorded, beat)
    end = processes[0][0]["since"]
    for records in processes:
        seconds["down"] += max(records[0]["since"] - end, 0.0)
        with_step = [record for record in records if record["step"] is not None]
        for i, record in enumerate(with_step):
            move = steps.reach if i else steps.resume  # the first has the step that was restored
            move(record["step"], record["seconds"]["step"])
            if record["event"] == "rewound":
                steps.resume(record["to"], record["seconds"]["step"])
        for phase in PHASES:
            seconds[phase] += records[-1]["seconds"].get(phase, 0.0)
        end = max(end, records[-1]["time"])
    seconds["step"] -= steps.again
    seconds["again"] = steps.again
    last = processes[-1][-1]
    return Account(
        seconds,
        begin=processes[0][0]["since"],
        end=end,
        starts=len(processes),
        step=steps.step,
        last=last.get("phase", last["event"]),
        slow=[event["slow"] for event in recorded if event["event"] == "slow"],
        starting={
            part: sum(event["starting"].get(part, 0.0) for event in recorded if "starting" in event)
            for part in STARTING
        },
    )


def is_record(record: Any) -> bool:
    """Whether an event or a heartbeat has all that `account` and `table` read."""
    if not isinstance(record, dict) or not isinstance(record.get("seconds"), dict):
        return False
    kind, spans = record.get("event", ""), record["seconds"]
    times = [record.get("time"), record.get("since"), spans.get("step"), *spans.values()]
    texts, beats = [kind, record.get("phase", "")], []
    steps = [0 if record.get("step") is None else record["step"]]
    if kind == "rewound":
        steps.append(record.get("to"))
    if "starting" in record:
        if not isinstance(record["starting"], dict):
            return False
        times += record["starting"].values()
    if kind == "slow":
        slow = record.get("slow")
        slow = slow if isinstance(slow, dict) else {}
        times += [slow.get("took"), slow.get("usual")]
        texts.append(slow.get("phase"))
        steps.append(slow.get("step"))
    if record.get("before"):
        beats.append(record["before"])
    return (
        all(isinstance(x, (int, float)) and 0 <= x < _LATEST for x in times)
        and all(isinstance(x, str) for x in texts)
        and all(isinstance(x, int) for x in steps)
        and all(map(is_record, beats))
    )


class _Steps:
    """Seconds of steps, of which those that are repeated are moved to `again`."""

    def __init__(self):
        self.again, self.step = 0.0, 0
        self._parts = []  # (from a step, to a step, seconds), in order
        self._seconds = 0.0  # of this process until `step`

    def reach(self, step: int, seconds: float) -> None:
        self._parts.append((self.step, step, seconds - self._seconds))
        self.step, self._seconds = step, seconds

    def resume(self, step: int, seconds: float) -> None:
        while self._parts and self._parts[-1][1] > step:
            begin, end, spent = self._parts.pop()
            kept = max(step - begin, 0) / (end - begin) if end > begin else 0.0
            self.again += spent * (1 - kept)
            if kept:
                self._parts.append((begin, step, spent * kept))
        self.step, self._seconds = step, seconds


def _by_process(recorded: list[dict], beat: dict | None) -> list[list[dict]]:
    """Events by process, each followed by the process's last heartbeat if that is later."""
    processes: dict[float, list[dict]] = {}
    beats = [beat] if beat else []
    for event in recorded:
        processes.setdefault(event["since"], []).append(event)
        if event.get("before"):
            beats.append(event["before"])
    for beat in beats:
        records = processes.get(beat["since"]) if "since" in beat else None
        if records and records[-1]["time"] < beat["time"]:
            records.append({"event": "heartbeat"} | beat)
    return list(processes.values())
