"""Observing: where time went, over kills and rewinds; slow steps, memory, traces, heartbeats, W&B."""

import glob
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from paths import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bipe_jax import goodput, plan
from bipe_jax.errors import PREEMPTED, UserError
from bipe_jax.training import metrics, spikes
from bipe_jax.training.observing import (
    evaluation_boards,
    heartbeat_writer,
    process_start,
    tensorboard,
    trace,
    wandb_board,
)
from bipe_jax.training.observing import observer as observer_module
from bipe_jax.training.observing.clock import PHASES, STARTING, Clock
from bipe_jax.training.observing.observer import Observer
from bipe_jax.training.observing.slow import SlowSteps
from bipe_jax.training.trainer import train
from bipe_jax.workdir import events, heartbeat


def lines_of(path) -> list[dict]:
    with open(path) as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("seed", range(5))
def test_every_second_belongs_to_the_devices_or_else_to_what_the_host_did(seed):
    """A loop like the trainer's on a made-up machine, against a count second by second."""
    generator = np.random.default_rng(seed)

    def spans(most):
        return generator.integers(0, most + 1, 40)

    data, steps, logs, saves = spans(9), spans(12) + 1, spans(3), spans(20)
    since, now, free, first = 1000, 1007, 0, None
    clock, host, busy, ends = Clock(since), [("other", since)], set(), []

    def enter(phase):
        clock.enter(phase, now)
        host.append((phase, now))

    def complete(n):
        nonlocal now, first
        now = max(now, ends[n])
        clock.completed(ends[n])
        first = first or ends[n]
        now += logs[n]

    pending = None
    for n in range(40):
        enter("data")
        now += data[n]
        enter("other")
        clock.dispatched(now)
        begin = max(now, free)
        free = begin + steps[n]
        busy |= set(range(begin, free))
        ends.append(free)
        if pending is not None:
            complete(pending)
        pending = n
        if n % 7 == 6:
            complete(n)
            pending = None
            enter("saving")
            now += saves[n]
            enter("other")
    complete(pending)

    expected = dict.fromkeys(PHASES, 0)
    for second in range(since, now):
        phase = [name for name, begin in host if begin <= second][-1]
        phase = "starting" if second < first else "step" if second in busy else phase
        expected[phase] += 1
    assert clock.seconds(now) == expected
    assert clock.seconds(now) == expected  # looking changes nothing
    assert all(expected[phase] for phase in PHASES if phase != "evaluating")


def test_a_start_is_split_by_what_the_host_did_until_the_first_step():
    clock = Clock(100)
    for phase, at in (
        ("other", 107), ("data", 108), ("tokenizer", 112), ("data", 113), ("restore", 119), ("other", 130),
        ("data", 131), ("compile", 134), ("other", 150),
    ):  # fmt: skip
        clock.enter(phase, at)
    clock.dispatched(151)
    clock.completed(160)
    clock.enter("data", 161)
    wanted = {"import": 7, "tokenizer": 1, "data": 4 + 6 + 3, "restore": 11, "compile": 16}
    assert clock.starting() == wanted
    assert clock.seconds(170)["starting"] == 60 and clock.seconds(170)["data"] == 9
    assert clock.starting() == wanted


class Later:
    """A step's metric that the devices have not computed yet."""

    def __init__(self):
        self.ready = threading.Event()

    def block_until_ready(self):
        self.ready.wait(10)
        return self

    def __array__(self, *_, **__):
        return np.float32(self.block_until_ready() is None)


def test_a_wait_for_data_counts_from_when_the_devices_had_nothing_to_do(monkeypatch, tmp_path):
    now = [100.0]
    monkeypatch.setattr(Observer, "_now", lambda self: now[0])
    monkeypatch.setattr(jax, "device_get", lambda values: [v.block_until_ready() for v in values])
    with Observer() as observer:
        observer.open(str(tmp_path))
        values = [Later() for _ in range(4)]

        def finish(number, at):
            now[0] = at
            values[number].ready.set()
            until = time.monotonic() + 10
            while observer._completions._times.empty() and time.monotonic() < until:
                time.sleep(0.001)

        def dispatch(number):
            assert observer.step(number, lambda v: ("state", v), [values[number]])[0] == "state"

        dispatch(1)
        finish(1, 130.0)
        observer.complete(1, [values[1]])
        with observer.phase("data"):
            now[0] = 135.0
        dispatch(2)
        with observer.phase("data"):  # step 2 runs until 141, the data come at 160
            finish(2, 141.0)
            now[0] = 160.0
        dispatch(3)
        observer.complete(2, [values[2]])
        now[0] = 162.0
        finish(3, 170.0)
        observer.complete(3, [values[3]])
        with observer.phase("saving"):
            now[0] = 171.0
        report = observer.report()
        assert observer._clock.seconds(171.0) == {
            "starting": 30, "step": 6 + 10, "data": 5 + 19, "saving": 1, "evaluating": 0, "other": 0,
        }  # fmt: skip
    assert report["goodput"] == pytest.approx(16 / 70)
    assert report["time/data"] == pytest.approx(24 / 70)
    assert sum(report[f"time/{phase}"] for phase in PHASES) == pytest.approx(1)


def test_a_slow_step_is_on_a_full_line_and_among_the_events(monkeypatch, tmp_path):
    now = [50.0]
    monkeypatch.setattr(Observer, "_now", lambda self: now[0])
    with Observer() as observer:
        observer.open(str(tmp_path))
        for number in range(1, 61):
            with observer.phase("data"):
                now[0] += {40: 9.0, 50: 30.0}.get(number, 1.0)
            observer.step(number, lambda: (None, np.float32(1)))
            now[0] += 20.0 if number == 45 else 4.0
            observer.complete(number, np.float32(1))
            if number == 30:
                assert observer.report()["slow_steps"] == 0
        with observer.saving():
            now[0] += 100.0  # expected, and so not slow
        report = observer.report()
        assert observer.report()["slow_steps"] == 3
        assert "slow/step" not in observer.report()
    assert report["slow_steps"] == 3
    # On this clock a step is complete at some time after it was dispatched.
    assert report["slow/step"] == 50 and 30 <= report["slow/took"] <= 35
    assert report["slow/usual"] == 5 and report["slow/phase"] == "data"
    happened = events.read(str(tmp_path))
    (event,) = [event for event in happened if event["event"] == "slow"]
    slow = {name.partition("/")[2]: value for name, value in report.items() if "slow/" in name}
    assert event["slow"] == slow
    assert "slow: step 50 took " in goodput.table("w", goodput.account(happened))


def process(since, *signs):
    """Events of one process; each sign is (name, time since its start, step, seconds of steps)."""
    made = []
    for name, after, step, steps, *more in signs:
        # What is not in steps is starting, as far as this fixture cares.
        seconds = dict.fromkeys(PHASES, 0.0) | {"step": steps, "starting": after - steps}
        event = {"event": name, "time": since + after, "since": since, "step": step}
        made.append(event | {"seconds": seconds} | (more[0] if more else {}))
    return made


def test_goodput_over_kills_and_rewinds():
    beat = process(1000, ("heartbeat", 150, 27, 104.0))[0] | {"phase": "training"}
    happened = [
        *process(
            1000,
            ("started", 5, None, 0.0),
            ("training", 20, 0, 0.0),
            ("first_step", 30, 1, 0.0),
            ("saving", 70, 10, 30.0),
            ("saving", 120, 20, 75.0),  # killed at step 27, as the heartbeat knows: 29 s are lost
        ),
        *process(
            1200,  # 50 s later
            ("started", 5, None, 0.0, {"before": beat}),
            ("training", 10, 20, 0.0),
            ("saving", 60, 30, 40.0),
            ("saving", 80, 34, 55.0),
            ("rewound", 100, 36, 60.0, {"to": 30}),  # 20 s are lost
            ("saving", 140, 40, 90.0),
            ("preempted", 145, 40, 90.0),
        ),
        *process(
            1400, ("started", 1, None, 0.0), ("training", 10, 30, 0.0), ("done", 70, 50, 50.0)
        ),
    ]  # 55 s later; the checkpoint of step 40 was damaged: 30 s are lost
    found = goodput.account(happened)
    assert found.begin, found.end == (1000, 1470)
    assert found.seconds["down"] == 50 + 55
    assert found.seconds["again"] == 29 + 20 + 30
    assert found.seconds["step"] == 75 + (90 - 20 - 30) + 50
    assert found.goodput == pytest.approx(165 / 470)
    assert sum(found.seconds.values()) == pytest.approx(470)
    assert (found.starts, found.step, found.last) == (3, 50, "done")
    # Of a run that is still going the heartbeat knows most.
    running = goodput.account(happened[:5], beat)
    assert (running.end, running.step, running.last) == (1150, 27, "training")
    assert running.seconds["step"] == 104 and running.seconds["again"] == 0


def test_a_line_that_a_kill_cut_off_costs_no_other(tmp_path):
    first, second, third = process(
        5.0, ("started", 1, None, 0.0), ("saving", 2, 10, 1.0), ("done", 3, 20, 2.0)
    )
    events.append(tmp_path, first)
    whole = (tmp_path / "events.jsonl").read_bytes()
    events.append(tmp_path, second)
    long = (tmp_path / "events.jsonl").read_bytes()
    for cut in range(len(whole), len(long) + 1):
        (tmp_path / "events.jsonl").write_bytes(long[:cut])
        kept = [first] if cut < len(long) - 1 else [first, second]
        assert events.read(tmp_path) == kept
        events.append(tmp_path, third)
        assert events.read(tmp_path) == [*kept, third]
    (tmp_path / "events.jsonl").write_bytes(b'[1]\n{"event": "saving"}\n\xff\xfe\n' + whole)
    assert events.read(tmp_path) == [first]
    assert events.read(tmp_path / "none") == []


def test_slow_steps_are_named_with_the_phase_they_waited_in():
    generator = np.random.default_rng(0)

    def seconds(**more):
        usual = {"data": 0.01, "step": 0.2 * generator.normal(1, 0.05), "other": 0.02}
        return {phase: value + more.get(phase, 0) for phase, value in usual.items()}

    slow = SlowSteps()
    assert slow.median() is None
    assert not any(slow.judge(seconds(step=1)) for _ in range(3))  # too early to say
    assert not any(slow.judge(seconds()) for _ in range(1000))
    found = slow.judge(seconds(data=3.0))
    assert found["phase"] == "data"
    assert found["took"] == pytest.approx(3.23, abs=0.05)
    assert found["usual"] == pytest.approx(0.23, abs=0.01)
    assert slow.judge(seconds(step=0.3))["phase"] == "step"
    assert slow.judge(seconds(other=0.3))["phase"] == "other"
    assert not slow.judge(seconds())
    # Slow steps do not become usual while they are few, whatever their size.
    assert all(slow.judge(seconds(data=1000.0)) for _ in range(30))
    # A run whose steps all take the same time has no deviation: what is a little longer is not slow.
    even = SlowSteps()
    assert not any(even.judge({"step": 1.0}) for _ in range(50))
    assert not even.judge({"step": 1.4})
    assert even.judge({"step": 1.6})
    quick = SlowSteps()
    assert not any(quick.judge({"step": 0.005}) for _ in range(50))
    assert not quick.judge({"step": 0.09})


def test_memory_is_that_of_the_fullest_device():
    class Device:
        def __init__(self, **stats):
            self.stats = stats

        def memory_stats(self):
            return self.stats or None

    one = Device(bytes_in_use=5, peak_bytes_in_use=9, bytes_limit=20, num_allocs=3)
    two = Device(bytes_in_use=7, peak_bytes_in_use=8, bytes_limit=20, num_allocs=3)
    expected = {"memory/in_use": 7, "memory/peak": 9, "memory/limit": 20}
    assert observer_module.memory([one, two]) == expected
    assert observer_module.memory([Device(), Device()]) == {}
    assert observer_module.memory([Device(bytes_in_use=3)]) == {"memory/in_use": 3}
    assert observer_module.memory(jax.local_devices()) == {}  # of CPUs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("15:10", "must go from a step, 1 or later"),
        ("0:3", "must go from a step, 1 or later"),
        ("a:b", "must be FIRST:LAST"),
        ("10", "must be FIRST:LAST"),
        ("-1:3", "must be FIRST:LAST"),
        ("1:2:3", "must be FIRST:LAST"),
        ("", "must be FIRST:LAST"),
        ("18:21", "reaches beyond the last step, 20"),
    ],
)
def test_steps_to_trace_are_checked(text, message):
    with pytest.raises(UserError, match=f"--profile={text} {message}"):
        trace.parse(text, 20)


def test_wrong_steps_to_trace_are_one_line_before_training(command, tmp_path):
    done = command(
        "train", "--config=configs/smoke.py", f"--workdir={tmp_path / 'w'}", "--profile=15:30"
    )
    assert done.returncode == 1
    assert done.stderr == "error: --profile=15:30 reaches beyond the last step, 20\n"
    assert not (tmp_path / "w").exists()
    assert trace.parse("15:20", 20) == (15, 20) and trace.parse(None, 20) is None


def traced(workdir) -> list[int]:
    """Steps that the traces of a run hold, as TensorBoard would find them."""
    files = glob.glob(f"{workdir}/profile/process_0/plugins/profile/*/*.xplane.pb")
    planes = [p for f in files for p in jax.profiler.ProfileData.from_file(f).planes]
    found = [e for plane in planes for line in plane.lines for e in line.events]
    return sorted(dict(e.stats)["step_num"] for e in found if e.name == "train")


@pytest.fixture(scope="module")
def watched(tmp_path_factory, tokenizer_file, shards, held_out):
    """A run that is preempted at step 7 and goes on to 12, and the heartbeats seen meanwhile."""
    from configs import smoke

    c = smoke.get_config()
    c.tokenizer.path, c.data.train, c.data.evaluation = tokenizer_file, shards, held_out
    c.data.shuffle_blocks, c.steps, c.checkpoint.every, c.log.every = 16, 12, 4, 3
    workdir = str(tmp_path_factory.mktemp("watched"))
    seen, stop = [], threading.Event()

    def look():
        while True:
            last = stop.wait(0.002)
            if (beat := heartbeat.read(workdir)) and beat not in seen:
                seen.append(beat)
            if last:
                return

    looker = threading.Thread(target=look)
    looker.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heartbeat_writer, "_PAUSE", 0.01)
        patch.setattr(observer_module, "_BEAT", 0.0)
        with Observer(profile=(2, 4)) as observer:
            assert not train(c, workdir, stop_at=7, observer=observer)
        first = traced(workdir)
        with Observer(profile=(2, 4)) as observer:
            assert train(c, workdir, observer=observer)
            with observer.phase("evaluating"):
                time.sleep(0.2)
    stop.set()
    looker.join()
    return workdir, seen, first


def test_events_of_a_preempted_and_resumed_run(watched):
    workdir, _, _ = watched
    happened = [e for e in events.read(workdir) if e["event"] != "slow"]
    assert [(e["event"], e["step"]) for e in happened] == [
        ("started", None), ("training", 0), ("first_step", 1), ("saving", 4), ("saving", 7),
        ("preempted", 7),
        ("started", None), ("training", 7), ("first_step", 8), ("saving", 8), ("saving", 12),
        ("done", 12),
    ]  # fmt: skip
    for event in happened:
        assert sum(event["seconds"].values()) == pytest.approx(
            event["time"] - event["since"], abs=1e-4
        )
    assert happened[6]["before"]["phase"] == "preempted"
    found = goodput.account(happened)
    assert found.starts == 2 and found.last == "done"
    assert found.seconds["again"] == 0
    assert found.seconds["evaluating"] >= 0.2
    assert found.seconds["step"] > 0 and found.seconds["saving"] > 0
    assert sum(found.seconds.values()) == pytest.approx(found.end - found.begin, abs=1e-3)


def test_heartbeats_tell_the_phase_and_the_step(watched):
    workdir, seen, _ = watched
    phases = [beat["phase"] for beat in seen]
    order = [p for i, p in enumerate(phases) if phases[:i].count(p) == 0]
    assert order[0] == "starting"
    assert {"training", "saving", "preempted", "evaluating", "done"} <= set(order)
    assert order.index("training") < order.index("preempted") < order.index("evaluating")
    assert phases[-1] == "done" and seen[-1]["step"] == 12
    assert all(b["pid"] == os.getpid() and b["host"] and b["time"] <= time.time() for b in seen)
    times = [beat["time"] for beat in seen]
    assert times == sorted(times)
    assert not glob.glob(f"{workdir}/*.tmp")


def test_full_lines_say_where_the_time_went(watched):
    lines = lines_of(f"{watched[0]}/metrics.jsonl")
    full = [line for line in lines if "goodput" in line]
    assert [line["step"] for line in full] == [3, 6, 7, 9, 12]
    for line in full:
        assert 0 < line["goodput"] < 1
        assert sum(line[f"time/{phase}"] for phase in PHASES) == pytest.approx(1)
        assert line["slow_steps"] == 0  # too few steps to say
    assert full[0]["time/starting"] > 0.5 and full[1]["time/starting"] == 0
    assert full[3]["time/starting"] > 0.5  # step 8 is the first of its process
    saving = [line["time/saving"] > 0 for line in full]
    assert saving == [False, True, False, True, False]  # of the steps 4 and 8


def test_the_chosen_steps_are_traced_and_named(watched):
    workdir, _, first = watched
    assert first == [2, 3, 4]  # 4 is saved, so 5 is not dispatched before it is complete
    assert traced(workdir) == first  # what a later process does not make is not traced again


def test_the_table_of_a_run(watched, capsys, monkeypatch):
    workdir, _, _ = watched
    monkeypatch.setattr(sys, "argv", ["goodput", workdir])
    goodput.main()
    out = capsys.readouterr().out
    assert f"{workdir}: 2 starts, " in out and "step 12, done" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert {"step", "again", "down", "goodput", *PHASES, *STARTING} <= rows.keys()
    found = goodput.account(events.read(workdir))
    assert all(found.starting.values())
    assert sum(found.starting.values()) < found.seconds["starting"]
    assert found.starting["compile"] > found.starting["tokenizer"]
    shares = [
        float(row.split("%")[0].split()[-1])
        for name, row in rows.items()
        if "  " in row and "%" in row
    ]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    monkeypatch.setattr(sys, "argv", ["goodput", "no/such/run"])
    with pytest.raises(UserError, match=r"no/such/run/events.jsonl does not exist or is empty"):
        goodput.main()


KILLED = """
import json, os, signal, sys, time
from bipe_jax.training.trainer import train
from bipe_jax.training.observing import heartbeat_writer, observer
from bipe_jax.workdir import heartbeat

heartbeat_writer._PAUSE, observer._BEAT = 0.0, 0.0
complete = observer.Observer.complete

def killed(self, number, values):
    values = complete(self, number, values)
    if number == 7:
        saved = os.path.join(sys.argv[2], "checkpoints", "4")
        while heartbeat.read(sys.argv[2])["step"] != 7 or not os.path.exists(saved):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return values

observer.Observer.complete = killed
train(json.loads(sys.argv[1]), sys.argv[2])
"""


def test_steps_that_a_kill_has_made_in_vain_are_no_goodput(config, tmp_path):
    program = [sys.executable, "-c", KILLED, json.dumps(config.to_dict()), str(tmp_path)]
    killed = subprocess.run(program, capture_output=True, cwd=ROOT, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["step"], beat["phase"]) == (7, "training")
    assert train(config, str(tmp_path))
    happened = events.read(str(tmp_path))
    saved = [e for e in happened if e["event"] == "saving"]
    assert [e["step"] for e in saved] == [4, 8, 12]
    assert [e["step"] for e in happened if e["event"] == "training"] == [0, 4]
    lost = beat["seconds"]["step"] - saved[0]["seconds"]["step"]
    found = goodput.account(happened, heartbeat.read(str(tmp_path)))
    assert lost > 0
    assert found.seconds["again"] == pytest.approx(lost)
    assert found.seconds["step"] == pytest.approx(
        saved[0]["seconds"]["step"] + happened[-1]["seconds"]["step"]
    )
    begun = [e["since"] for e in happened if e["event"] == "started"][1]
    assert found.seconds["down"] == pytest.approx(begun - beat["time"])
    assert found.starts == 2 and found.last == "done"


def test_a_rewind_is_an_event_and_its_steps_are_no_goodput(config, tmp_path, monkeypatch):
    spiked = []

    def at_step_6(self, number, values, latest):
        return number == 6 and not spiked and not spiked.append(number)

    monkeypatch.setattr(spikes.Watch, "__call__", at_step_6)
    assert train(config, str(tmp_path))
    happened = [e for e in events.read(str(tmp_path)) if e["event"] != "slow"]
    assert [(e["event"], e["step"]) for e in happened[3:]] == [
        ("saving", 4), ("rewound", 6), ("saving", 8), ("saving", 12), ("done", 12),
    ]  # fmt: skip
    assert happened[4]["to"] == 4
    lost = happened[4]["seconds"]["step"] - happened[3]["seconds"]["step"]
    found = goodput.account(happened)
    assert 0 < lost == pytest.approx(found.seconds["again"])
    assert found.seconds["step"] == pytest.approx(happened[-1]["seconds"]["step"] - lost)
    assert found.starts == 1 and found.step == 12


def test_how_a_run_ended(tmp_path, monkeypatch, capsys):
    def run(workdir, error=None):
        try:
            with Observer() as observer:
                observer.open(str(workdir))
                if error:
                    raise error
        except BaseException as raised:
            assert raised is error
        return heartbeat.read(str(workdir))["phase"], events.read(str(workdir))[-1]

    for name in "abcd":
        (tmp_path / name).mkdir()
    assert run(tmp_path / "a")[0] == "done"
    assert run(tmp_path / "b", SystemExit(PREEMPTED))[0] == "preempted"
    phase, event = run(tmp_path / "c", UserError("no\nroom"))
    assert (phase, event["reason"]) == ("failed", "UserError: no room")
    with pytest.raises(KeyError), Observer() as observer:  # while what was preempted is closed
        observer.open(str(tmp_path / "c"))
        observer.preempted()
        raise KeyError
    assert heartbeat.read(str(tmp_path / "c"))["phase"] == "failed"
    # Other processes than the first write nothing.
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Observer() as observer:
        observer.open(str(tmp_path / "d"))
        observer.event("saving")
    assert os.listdir(tmp_path / "d") == []
    assert capsys.readouterr().err == ""


def test_what_cannot_be_written_ends_nothing(tmp_path, capsys):
    with Observer() as observer:
        observer.open(str(tmp_path / "vanished"))
        observer.event("saving")
    assert (
        "vanished/events.jsonl cannot be written (No such file or directory)"
        in capsys.readouterr().err
    )
    heart = heartbeat_writer.HeartbeatWriter(str(tmp_path / "vanished"))
    heart.beat({"step": 1})
    until = time.monotonic() + 10
    while heart._newest and time.monotonic() < until:
        time.sleep(0.001)
    (tmp_path / "vanished").mkdir()  # there is room again
    heart.beat({"step": 2})
    heart.close()
    assert json.loads((tmp_path / "vanished" / "heartbeat.json").read_text()) == {"step": 2}
    for content in ("", "{", "[]", '{"time": 1}'):
        (tmp_path / "heartbeat.json").write_text(content)
        assert heartbeat.read(str(tmp_path)) is None


def test_a_run_that_hangs_beats_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat_writer, "_PAUSE", 0.0)
    (tmp_path / "run").mkdir()
    with Observer() as observer:
        observer.open(str(tmp_path / "run"))
        time.sleep(0.1)
        before = os.stat(tmp_path / "run" / "heartbeat.json").st_mtime_ns
        time.sleep(0.3)  # the main thread hangs
        assert os.stat(tmp_path / "run" / "heartbeat.json").st_mtime_ns == before


def test_time_since_the_process_was_started():
    before = time.time()
    program = (
        "import time; time.sleep(0.5); from bipe_jax.training.observing import process_start; "
        "print(process_start())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert before - 0.05 <= float(done.stdout) <= before + 0.45
    assert process_start() < before


def wandb_records(path):
    """Records of a .wandb file: LevelDB's log format, parts of records in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = Path(path).read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(part)
            part = b""


def test_weights_and_biases_keeps_every_line_of_a_run_that_goes_back(config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    config.log.wandb = "a-project"
    logged = [(3, 1.5), (6, float("inf")), (3, 1.25), (6, 1.0)]  # rewound to step 0
    for part in (logged, [(6, 0.5), (9, 0.25)]):
        board = wandb_board.WandbBoard(plan.make(config), str(tmp_path))
        for step, loss in part:
            board.add(step, {"loss": loss if np.isfinite(loss) else None, "time/data": 0.5})
        board.close(failed=False)
        time.sleep(1.1)  # directories are named by the second
    files = sorted(glob.glob(f"{tmp_path}/wandb/offline-run-*/run-*.wandb"))
    records = [r for file in files for r in wandb_records(file)]
    runs = [r.run for r in records if r.HasField("run")]
    assert len(files) == 2 and len({run.run_id for run in runs}) == 1
    assert runs[0].project == "a-project" and runs[0].display_name == tmp_path.name
    settings = {u.key: json.loads(u.value_json) for u in runs[0].config.update}
    assert settings["optimizer.name"] == config.optimizer.name
    found = [
        {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    assert [(f["step"], f.get("loss")) for f in found] == [
        (3, 1.5), (6, None), (3, 1.25), (6, 1.0), (6, 0.5), (9, 0.25),
    ]  # fmt: skip
    defined = [r.metric for r in records if r.HasField("metric")]
    assert any(m.glob_name == "*" and m.step_metric == "step" for m in defined)
    config.log.wandb = "a/b"
    with pytest.raises(UserError, match=r"config.log.wandb='a/b': Invalid project name"):
        wandb_board.WandbBoard(plan.make(config), str(tmp_path))


def test_the_log_goes_to_weights_and_biases_too(config, tmp_path, tokenizer_file, monkeypatch):
    from bipe_jax.data import tokenizer

    config.log.wandb = "a-project"
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name)
    )
    with pytest.raises(
        UserError, match=r"needs the extra 'wandb': pip install 'bipe-jax\[wandb\]'"
    ):
        wandb_board.WandbBoard(plan.make(config), str(tmp_path))
    with pytest.raises(UserError, match="needs a local --workdir"):
        wandb_board.check(plan.make(config), "gs://bucket/run")

    class Board:
        def __init__(self, config, workdir):
            self.added, self.failed = [], None

        def add(self, step, values):
            self.added.append((step, values["loss"], values["slow/phase"]))

        def close(self, failed):
            self.failed = failed

    monkeypatch.setattr(metrics, "WandbBoard", Board)
    tokens = tokenizer.load(tokenizer_file)
    batch = {
        name: np.zeros((2, 4), np.int32) for name in ("segment", "offset", "targets", "weights")
    }
    values = {"loss": np.float32(2.0), "targets": np.float32(8)}
    with (
        pytest.raises(KeyError),
        metrics.Log(config, str(tmp_path), 0, tokens, lambda: {"slow/phase": "data"}) as log,
    ):
        log.write(1, batch, values, full=False)
        log.write(2, batch, values, full=True)
        raise KeyError
    assert log._wandb.added == [(2, 2.0, "data")]
    assert log._wandb.failed
    assert lines_of(tmp_path / "metrics.jsonl")[1]["slow/phase"] == "data"


def test_tensorboard_reads_the_event_files_and_checks_their_sums(tmp_path):
    """Its own reader, whose records have checksums; numbers to float32, and a session that starts anew."""
    values = {"loss": 2.5, "time/data": 1e-9, "Größe": -3e7, "tokens": 2**40 + 1, "huge": 1e300}
    first = tensorboard.TensorBoard(str(tmp_path), 1)
    for step in (1, 200, 70_000):
        first.add(step, values | {"step": step})
    first.close()
    again = tensorboard.TensorBoard(str(tmp_path), 200)
    again.add(300, {"step": 300.0})
    again.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [event.step for event in read.Scalars("step")] == [1, 300]
    for name, value in values.items():
        (event,) = read.Scalars(name)
        stored = np.inf if name == "huge" else np.float32(value)
        assert event.value == stored and event.step == 1
        assert abs(event.wall_time - time.time()) < 600
    path = min(tmp_path.iterdir(), key=lambda path: -path.stat().st_size)
    path.write_bytes(path.read_bytes().replace(b"loss", b"lost"))
    read = EventAccumulator(str(path))
    read.Reload()
    assert read.Tags()["scalars"] == []


def test_importing_the_library_does_not_import_torch_where_it_is_installed(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    program = (
        "import sys, bipe_jax; bipe_jax.load, bipe_jax.train, bipe_jax.evaluate, bipe_jax.Generator\n"
        "import bipe_jax.train, bipe_jax.generate; assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_follower_continues_without_wandb_where_it_is_missing(
    config, tmp_path, monkeypatch, caplog
):
    config.log.wandb = "a-project"
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name)
    )
    (tmp_path / "evaluations").mkdir()
    rows = [{"set": "a", "length": 16, "loss": loss} for loss in (2.0, float("nan"), None)]
    with evaluation_boards.EvaluationBoards(str(tmp_path)) as boards:
        for step in (2, 4):
            boards.add(plan.make(config), {"step": step, "results": rows})
    assert caplog.text.count("needs the extra 'wandb'") == 1
    assert len(list((tmp_path / "evaluations" / "tensorboard").iterdir())) == 1


def test_a_follower_has_a_run_of_its_own_in_wandb(config, tmp_path, monkeypatch):
    made = []

    class Board:
        def __init__(self, config, workdir, name):
            made.append([workdir, name])

        def add(self, step, values):
            made.append((step, values["evaluation/a/16/loss"]))

        def close(self, failed):
            made.append(failed)

    monkeypatch.setattr(evaluation_boards, "WandbBoard", Board)
    config.log.wandb = "a-project"
    (tmp_path / "evaluations").mkdir()
    with evaluation_boards.EvaluationBoards(str(tmp_path)) as boards:
        rows = [{"set": "a", "length": 16, "loss": 2.0}]
        boards.add(plan.make(config), {"step": 3, "results": rows})
    directory = str(tmp_path / "evaluations")
    assert made == [[directory, f"{tmp_path.name}-evaluations"], (3, 2.0), False]
