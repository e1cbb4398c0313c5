"""Runs everywhere: in directories, and by the answers of clouds and clusters."""

import json
import os
import sys
import time
from datetime import UTC, datetime

import pytest

from launch import list as lister


def run(directory, phase=None, age=5, steps=100, step=40, failed="", **beat):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"steps": steps, "position": {}}))
    (directory / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": 1.0}) + "\n")
    if phase:
        known = {"time": time.time() - age, "phase": phase, "pid": os.getpid(), "host": "other"}
        known |= {"step": step, "since": 0, "seconds": {}} | beat
        (directory / "heartbeat.json").write_text(json.dumps(known))
    if failed:
        (directory / "failed").write_text(failed)


def ago(seconds):
    return datetime.fromtimestamp(time.time() - seconds, UTC).isoformat().replace("+00:00", "Z")


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts programs on an otherwise empty PATH that print a text, or fail with one."""
    path = tmp_path / "programs"
    path.mkdir()
    monkeypatch.setenv("PATH", str(path))

    def add(name, text, code=0):
        stream = "stderr" if code else "stdout"
        script = f"import sys; open({str(tmp_path)!r} + '/calls', 'a').write(' '.join(sys.argv[1:]) + '\\n')"
        (path / name).write_text(
            f"#!{sys.executable} -S\n{script}\nsys.{stream}.write({text!r}); sys.exit({code})\n"
        )
        (path / name).chmod(0o755)

    return add


def rows(capsys, *arguments, status=0):
    assert lister.main(list(arguments)) == status
    shown = capsys.readouterr()
    return [line.split() for line in shown.out.splitlines()[1:]], shown.err


def test_runs_in_directories(tmp_path, programs, capsys):
    root = tmp_path / "runs"
    run(root / "a", "training")
    run(root / "sweep" / "b", "training", age=7200)
    run(root / "sweep" / "c", "done", age=3 * 86400, step=100)
    run(root / "sweep" / "d", "failed", failed="config.steps=0")
    run(root / "sweep" / "e", step=0)
    (root / "a" / "checkpoints" / "40" / "params").mkdir(parents=True)
    (root / "a" / "checkpoints" / "40" / "config.json").write_text("{}")  # is no run of its own
    found, said = rows(capsys, str(root), f"{tmp_path}/gone", status=1)
    assert [(line[0].removeprefix(f"{root}/"), *line[2:]) for line in found] == [
        ("a", "training", "40/100", "5", "s"),
        ("sweep/b", "dead", "40/100", "2", "h"),
        ("sweep/c", "done", "100/100", "3", "d"),
        ("sweep/d", "failed", "40/100", "5", "s"),
        ("sweep/e", "not", "started", "0/100"),
    ]
    assert said == f"{tmp_path}/gone: no such directory\n"


def test_runs_of_clouds_and_clusters(tmp_path, programs, capsys):
    resource = {
        "name": "projects/p/locations/us-west4-a/queuedResources/mine",
        "createTime": ago(7200),
        "state": {"state": "ACTIVE"},
        "tpu": {"nodeSpec": [{"node": {"acceleratorType": "v6e-1"}}]},
    }
    programs("gcloud", json.dumps([resource]))
    metadata = {"name": "sets", "creationTimestamp": ago(90000)}
    jobsets = [
        {"metadata": metadata, "spec": {}, "status": {"restarts": 2}},
        {"metadata": {"name": "queued"}, "spec": {"suspend": True}},
        {"metadata": {"name": "over"}, "spec": {}, "status": {"terminalState": "Completed"}},
    ]
    programs("kubectl", json.dumps({"items": jobsets}))
    submitted = datetime.fromtimestamp(time.time() - 120).strftime("%Y-%m-%dT%H:%M:%S")
    programs("squeue", f"17_3|RUNNING|{submitted}|/shared/a b\n18|PENDING|{submitted}|(null)\n")
    programs("sky", json.dumps([{"job_name": "cloudy", "status": "RECOVERING", "submitted_at": 1}]))
    found, said = rows(capsys, "--zone=us-west4-a", "--zone=eu-west4-b", "--project=p")
    assert said == ""
    assert [" ".join(line) for line in found] == [
        "mine tpu_vm v6e-1 ACTIVE 2 h",
        "mine tpu_vm v6e-1 ACTIVE 2 h",
        "sets gke Running, 2 restarts 1 d",
        "queued gke Suspended",
        "over gke Completed",
        "17_3 /shared/a b slurm RUNNING 2 min",
        "18 slurm PENDING 2 min",
        f"cloudy sky RECOVERING {time.time() / 86400:.0f} d",
    ]
    calls = (tmp_path / "calls").read_text()
    assert "--zone=us-west4-a" in calls and "--zone=eu-west4-b" in calls and "--project=p" in calls


def test_a_program_that_fails_keeps_no_other_from_answering(programs, capsys):
    programs("gcloud", "ERROR: no account\nmore\n", code=1)
    programs("kubectl", "[]")
    programs("sky", json.dumps([{"job_name": "cloudy"}]))
    found, said = rows(capsys)
    assert [line[:2] for line in found] == [["cloudy", "sky"]]
    first, second = said.splitlines()
    assert first.endswith("ERROR: no account") and "kubectl get jobsets" in second
    assert "unexpected answer" in second
