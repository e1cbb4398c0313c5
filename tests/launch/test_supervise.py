"""The supervisor with real processes and signals; its trainer is a script that does as it is told."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from paths import ROOT

# Takes the next word of WORKDIR/plan at each start: a status to end with, or what to do.
TRAINER = """
import json, os, signal, sys, time
workdir = sys.argv[1]
with open(f"{workdir}/plan") as file:
    word, *rest = file.read().split() or ["1"]
with open(f"{workdir}/plan", "w") as file:
    file.write(" ".join(rest))
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1) if word != "ignore" else None)
with open(f"{workdir}/starts", "a") as file:
    file.write(f"{time.time()} {os.getpid()} {word}\\n")
def beat(phase="training"):
    with open(f"{workdir}/heartbeat.tmp", "w") as file:
        json.dump({"time": time.time(), "phase": phase, "step": 0, "since": 0, "seconds": {}}, file)
    os.replace(f"{workdir}/heartbeat.tmp", f"{workdir}/heartbeat.json")
def save():
    step = len(os.listdir(f"{workdir}/checkpoints"))
    os.makedirs(f"{workdir}/checkpoints/{step + 1}/params")
os.makedirs(f"{workdir}/checkpoints", exist_ok=True)
if word == "wrong":
    with open(f"{workdir}/failed", "w") as file:
        file.write("config.steps=0 must be at least 1\\n")
    sys.exit(1)
if word == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if word == "advance":
    save()
    sys.exit(134)
while word in ("beat", "slow"):  # until SIGTERM, then saves
    beat()
    time.sleep(0.05)
    if asked:
        time.sleep(1 if word == "slow" else 0)
        save()
        sys.exit(42)
if word == "hang":
    beat()
if word == "quiet":
    beat("evaluating")
    time.sleep(1.5)
    sys.exit(0)
while word in ("hang", "ignore"):  # a hung trainer does not heed SIGTERM either
    time.sleep(0.05)
sys.exit(int(word))
"""


@pytest.fixture
def supervise(tmp_path):
    """Starts the supervisor with a plan for its trainers; ends what is left."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    workdir = tmp_path / "run"
    workdir.mkdir()
    started = []

    def start(plan, *flags):
        (workdir / "plan").write_text(plan)
        line = [sys.executable, "-m", "launch.supervise", f"--workdir={workdir}", "--pause=0.1"]
        line += [*flags, "--", sys.executable, str(script), str(workdir)]
        process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    start.workdir = workdir
    yield start
    for process in started:
        process.kill()
        process.stderr.close()
        process.wait()
    for _, pid, _ in starts(workdir):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/cmdline") as file:
                mine = str(script) in file.read()
            if mine:
                os.kill(pid, signal.SIGKILL)


def starts(workdir):
    """(time, process id, what it was told) of each start of the trainer."""
    try:
        lines = (workdir / "starts").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [(float(t), int(pid), word) for t, pid, word in map(str.split, lines)]


def words(workdir):
    return [word for _, _, word in starts(workdir)]


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid):
    """A zombie that nobody waits for is dead, and holds no lock."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def beats(workdir):
    until((workdir / "heartbeat.json").exists)


def end(process, seconds=15):
    _, said = process.communicate(timeout=seconds)
    return process.returncode, said


def test_it_starts_again_until_all_steps_are_done(supervise):
    code, said = end(supervise("42 killed 134 0 unused"))
    assert code == 0
    assert words(supervise.workdir) == ["42", "killed", "134", "0"]
    assert "it died with code 137" in said and said.endswith("all steps are done\n")


def test_a_trainer_that_only_dies_is_given_up_but_not_one_that_advances(supervise):
    code, said = end(supervise("advance 137 137 advance 137 137 137 unused"))
    assert code == 1 and len(words(supervise.workdir)) == 7
    assert "4 times since the checkpoint of step 2" in said


def test_pauses_double_until_a_checkpoint_appears(supervise):
    code, said = end(supervise("42 42 42 advance 0", "--pause=0.3"))
    pauses = [float(seconds) for seconds in re.findall(r"restarting in (\S+) s", said)]
    assert code == 0 and pauses == [0.3, 0.6, 1.2, 0.3]
    times = [time for time, _, _ in starts(supervise.workdir)]
    for pause, (earlier, later) in zip(pauses, itertools.pairwise(times), strict=True):
        assert later - earlier > pause


def test_a_users_error_ends_it_with_the_line(supervise):
    code, said = end(supervise("wrong unused"))
    assert (code, words(supervise.workdir)) == (1, ["wrong"])
    assert "a wrong input: config.steps=0 must be at least 1" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_trainer_which_saves_first(supervise, number):
    process = supervise("slow unused")
    beats(supervise.workdir)
    process.send_signal(number)
    process.send_signal(number)
    assert end(process)[0] == 42
    assert words(supervise.workdir) == ["slow"]
    assert os.listdir(supervise.workdir / "checkpoints") == ["1"]


def test_a_signal_between_two_trainers_ends_it_at_once(supervise):
    process = supervise("42 unused", "--pause=60")
    until(lambda: words(supervise.workdir) == ["42"])
    time.sleep(0.5)
    process.terminate()
    assert end(process, 5)[0] == 42
    assert words(supervise.workdir) == ["42"]


def test_a_hung_trainer_is_killed_and_started_again(supervise):
    code, said = end(supervise("hang 0", "--stale=0.6", "--grace=0.5"))
    assert code == 0 and words(supervise.workdir) == ["hang", "0"]
    assert "the trainer hangs" in said and "SIGKILL" in said and "died with code 137" in said
    assert json.loads((supervise.workdir / "restarts.json").read_text())["crashes"] == 1


def test_a_trainer_that_beats_is_left_alone(supervise):
    process = supervise("beat", "--stale=0.6")
    time.sleep(2.5)
    assert process.poll() is None and words(supervise.workdir) == ["beat"]
    process.terminate()
    assert end(process)[0] == 42


def test_an_evaluation_may_be_quiet_for_longer(supervise):
    code, said = end(supervise("quiet", "--stale=0.6"))
    assert code == 0 and "hangs" not in said


def test_a_trainer_that_ignores_sigterm_is_killed_in_the_end(supervise):
    process = supervise("ignore unused", "--grace=0.5")
    until(lambda: words(supervise.workdir) == ["ignore"])
    process.terminate()
    assert end(process)[0] == 137
    assert words(supervise.workdir) == ["ignore"]


def test_there_is_one_supervisor_and_no_second_trainer_beside_an_orphan(supervise):
    first = supervise("beat beat")
    beats(supervise.workdir)
    assert end(supervise("beat"))[0] == 1
    first.kill()
    first.wait()
    code, said = end(supervise("beat"))
    assert code == 1 and "has a supervisor, or its trainer, on this machine already" in said
    (_, orphan, _) = starts(supervise.workdir)[-1]
    os.kill(orphan, signal.SIGTERM)
    until(lambda: not alive(orphan))
    code, _ = end(supervise("0"))
    assert code == 0 and words(supervise.workdir) == ["beat", "0"]


def test_hosts_of_one_workdir_do_not_lock_each_other_out(supervise):
    first = supervise("beat beat", "--host=a")
    beats(supervise.workdir)
    second = supervise("beat", "--host=b")
    until(lambda: len(words(supervise.workdir)) == 2)
    assert first.poll() is None and second.poll() is None


def test_a_program_that_is_not_there_is_one_line(tmp_path):
    line = [
        sys.executable,
        "-m",
        "launch.supervise",
        f"--workdir={tmp_path}",
        "--",
        "no-such-program",
    ]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "no-such-program" in done.stderr
    assert len(done.stderr.splitlines()) == 1
