"""JSON of anybody: each command that reads a file answers whatever it contains, or says in a line why not."""

import contextlib
import copy
import json
import math
import os
import sys
from pathlib import Path

import pytest
from tiny import tiny

import tests.report.test_report as made
from bipe_jax import config, goodput, plan, plot
from bipe_jax.config.spec import parse_source
from bipe_jax.convert import authors, from_hf, incoming, llama
from bipe_jax.data import prepared
from bipe_jax.errors import DONE, LOST, PREEMPTED, UserError
from bipe_jax.report import comparing, page, pictures, results
from bipe_jax.workdir import Workdir, events, files, heartbeat, json_files, metrics
from launch import collect, jobs, local, points, restart, supervise, worker
from launch.table import Table
from launch.tpu_vm import worker as tpu_vm

DEEP = b"[" * 100_000
CONTENTS = {
    "object": b"{}",
    "list": b"[]",
    "number": b"3",
    "null": b"null",
    "text": b'"x"',
    "empty": b"",
    "half": b'{"results": [{"set": "a", "le',
    "binary": b"\xff\xfe\x00\x01{",
    "deep list": DEEP + b"]" * 100_000,
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "too deep": b'{"a":' * 200 + b"1" + b"}" * 200,
    "only open": DEEP,
    "large number": b'{"results": ' + b"9" * 10_000 + b"}",
    "wrong types": json.dumps({
        "results": 3, "step": {}, "position": [], "weight_map": [], "format": "x", "config": 1,
        "bipe_jax": {"config": 3, "separators": "x"}, "model_type": 3, "rpe_type": {}, "kind": 7,
        "time": "x", "seconds": [], "since": {}, "event": 3, "phase": [], "steps": "x", "data": 1,
        "crashes": [], "training_length": -1, "model": {"layers": 10**9},
    }).encode(),
}  # fmt: skip


# Parsing.


@pytest.mark.parametrize("content", [c for c in CONTENTS if "deep" in c or c == "only open"])
def test_deep_nesting_is_a_value_error(content):
    with pytest.raises(ValueError, match=r"nested more than 64 deep|Expecting value"):
        json_files.parse(CONTENTS[content])


def test_what_is_nested_as_deep_as_it_may_be():
    value = 1
    for _ in range(64):
        value = [value]
    assert json_files.parse(json.dumps(value)) == value
    with pytest.raises(ValueError, match="64 deep"):
        json_files.parse(json.dumps([value]))
    loop = []
    loop += [loop, loop]
    with pytest.raises(ValueError, match="64 deep"):
        json_files.check_depth({"a": (loop,)})


# What cannot be read, not even by root.
NO_FILES = {
    "fifo": os.mkfifo,
    "device": lambda path: os.symlink("/dev/zero", path),
    "directory": lambda path: os.makedirs(path / "inside"),
    "link to nothing": lambda path: os.symlink("nothing", path),
    "loop": lambda path: os.symlink(path.name, path),
    "unreadable": lambda path: os.symlink("/proc/self/mem", path),  # opened, but not read
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_only_regular_files_are_read(kind, tmp_path):
    path = tmp_path / "x.json"
    NO_FILES[kind](path)
    with pytest.raises(UserError, match=r"x\.json cannot be read: ") as raised:
        json_files.read(path)
    assert "\n" not in str(raised.value) and files.read_json(path) is None


# Every command.


def argv(patch, *arguments):
    patch.setattr(sys, "argv", ["command", *map(str, arguments)])


def _plot(directory, patch):
    argv(patch, directory, f"--output={directory}/x.png")
    plot.main()


def _goodput(directory, patch):
    argv(patch, directory)
    goodput.main()


def _collect(directory, patch):
    (directory / "point").mkdir()
    for name in os.listdir(directory):
        if name != "point":
            os.rename(directory / name, directory / "point" / name)
    collect.collect(str(directory))


def _collect_point(directory, patch):
    (directory / "point.json").write_text(json.dumps(config.to_json(config.parse(tiny()))))
    _collect(directory, patch)
    assert (directory / "sweep.csv").exists()


def _train(directory, patch):
    recorded = Workdir(directory).read_config()
    if recorded is not None:
        config.from_json(recorded)


def _finished(directory, patch):
    os.makedirs(directory / "checkpoints/4/params")
    assert not points.finished(str(directory), plan.make(tiny()))


def _supervise(directory, patch):
    command = [sys.executable, "-c", f"raise SystemExit({PREEMPTED})"]
    supervisor = supervise.Supervisor(command, str(directory), pause=0)
    supervisor._train(os.open(directory, os.O_RDONLY))


def _worker(directory, patch):
    assert worker.attempt(str(directory), [sys.executable, "-c", "raise SystemExit(7)"]) == LOST
    assert worker.attempt(str(directory), [sys.executable, "-c", ""]) == DONE


def _status(directory, patch):
    patch.setattr(tpu_vm, "_UNIT", str(directory / "unit"))
    (directory / "unit").write_text(f'ExecStart="x" "--workdir={directory}"\n')
    assert tpu_vm.progress() == "no heartbeat yet"


def _table(directory, patch):
    assert Table([local.Run(_point(directory))]).lines(10, 200)


def _point(directory):
    job = jobs.Job("configs/smoke.py", str(directory), name="x")
    return points.Checked(job, plan.make(tiny()))


COMMANDS = {
    "plot": (_plot, "evaluation.json"),
    "report": (lambda d, _: page.build([str(d)]), "evaluation.json"),
    "report of tasks": (lambda d, _: page.build([str(d)]), "tasks.json"),
    "report of attention": (lambda d, _: page.build([str(d)]), "attention.json"),
    "picture of tasks": (lambda d, _: results.read_file(str(d), results.Tasks), "tasks.json"),
    "goodput": (_goodput, "events.jsonl"),
    "heartbeat": (lambda d, _: heartbeat.read_alive(d), "heartbeat.json"),
    "metrics": (lambda d, _: metrics.latest(d), "metrics.jsonl"),
    "events": (lambda d, _: events.read(d), "events.jsonl"),
    "collect, point": (_collect, "point.json"),
    "collect, config": (_collect, "config.json"),
    "finished": (_finished, "evaluation.json"),
    "restart": (lambda d, _: restart.decide(str(d), 137), "restarts.json"),
    "supervise": (_supervise, "heartbeat.json"),
    "train": (_train, "config.json"),
    "prepared": (lambda d, _: prepared.open_prepared(parse_source(f"prepared:{d}")), "bipe.json"),
    "local sweep": (lambda d, _: local.Run(_point(d)).shown, "heartbeat.json"),
    "from-authors": (lambda d, _: incoming.convert(str(d), f"{d}/o", authors), "config.json"),
    "from-llama": (lambda d, _: incoming.convert(str(d), f"{d}/o", llama), "config.json"),
    "from-hf": (lambda d, _: incoming.convert(str(d), f"{d}/o", from_hf), "config.json"),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers_or_says_what_is_wrong(
    command, content, tmp_path, monkeypatch, capsys
):
    run, name = COMMANDS[command]
    (tmp_path / name).write_bytes(CONTENTS[content])
    try:
        run(tmp_path, monkeypatch)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        assert str(tmp_path) in str(error) or command == "train"


BOOKKEEPING = [
    "metrics.jsonl",
    "events.jsonl",
    "heartbeat.json",
    "restarts.json",
    "failed",
    "running",
]
READERS = {
    "goodput": _goodput,
    "sweep --collect": _collect_point,
    "local sweep": lambda d, _: local.Run(_point(d)).shown,
    "table of a sweep": _table,
    "finished": _finished,
    "restart": lambda d, _: restart.decide(str(d), 137),
    "restart, of a host": lambda d, _: restart.decide(str(d), 137, "h"),
    "supervise": _supervise,
    "worker": _worker,
    "status of a TPU VM": _status,
    "report": lambda d, _: page.build([str(d)]),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_a_line_at_most(reader, kind, tmp_path, monkeypatch, capfd):
    for name in [*BOOKKEEPING, "restarts-h.json"]:
        directory = tmp_path / name.replace(".", "-")
        directory.mkdir()
        NO_FILES[kind](directory / name)
        with (
            contextlib.suppress(UserError)
            if reader in ("goodput", "report")
            else contextlib.nullcontext()
        ):
            READERS[reader](directory, monkeypatch)
        said = capfd.readouterr().err.splitlines()
        assert sum(name in line for line in said) <= 1 and "Traceback" not in said
        aside = any(path.name == f"{name}.unreadable-1" for path in directory.rglob("*"))
        expected = {
            "restart": {"restarts.json"},
            "restart, of a host": {"restarts-h.json"},
            "worker": {"restarts.json", "running", "failed"},
        }
        assert aside == (name in expected.get(reader, ())), name


@pytest.mark.parametrize("kind", NO_FILES)
def test_goodput_of_what_is_no_file_names_it(kind, tmp_path, monkeypatch):
    NO_FILES[kind](tmp_path / "events.jsonl")
    with pytest.raises(
        UserError, match=r"events\.jsonl (cannot be read: |does not exist)"
    ) as raised:
        _goodput(tmp_path, monkeypatch)
    assert "\n" not in str(raised.value)


def test_an_index_of_tensors(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for content in CONTENTS.values():
        (tmp_path / "model.safetensors.index.json").write_bytes(content)
        with pytest.raises(UserError, match=r"index\.json"):
            incoming.files.Tensors(str(tmp_path), {})


@pytest.mark.parametrize("content", ["object", "deep object", "binary", "number"])
def test_the_commands_themselves(command, content, tmp_path):
    for name in ("evaluation.json", "config.json", "events.jsonl"):
        (tmp_path / name).write_bytes(CONTENTS[content])
    for line in (
        ("plot", str(tmp_path)),
        ("goodput", str(tmp_path)),
        ("convert", "from-llama", str(tmp_path), f"{tmp_path}/ours"),
    ):
        done = command(*line)
        assert done.returncode == 1 and not done.stdout
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


# Every value of a file.

BAD = ({}, [], 3, None, "x", -1, math.inf, math.nan, 10**30, 10**400, True, "", [[3]], 1e300,
       [["a", "b", 3]], "\ud800\0\x1b$_{")  # fmt: skip


def paths(value, path=()):
    """The paths of all parts of a value; of a list, those of the first two items."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = list(enumerate(value))[:2] if isinstance(value, list) else items
    for key, item in items:
        yield from paths(item, (*path, key))


def put(value, path, item):
    if not path:
        return item
    changed = copy.deepcopy(value)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = item
    return changed


def small_evaluation():
    value = made.evaluation(sets=("a",))
    return value | {"breakdowns": value["breakdowns"][:1], "unseen": value["unseen"][:1]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluation", "tasks", "attention"])
@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # of matplotlib, for numbers that are hard to draw
def test_every_value_of_a_report(name, tmp_path):
    value = {"evaluation": small_evaluation, "tasks": made.tasks, "attention": made.attention}[
        name
    ]()
    for number, path in enumerate(paths(value)):
        # Every fifth one each time, so that the test stays short.
        for item in BAD[number % 5 :: 5]:
            made.save(tmp_path, **{name: put(value, path, item)})
            try:
                page.build([str(tmp_path)])
                if name == "evaluation":
                    read = results.read_file(str(tmp_path), results.Evaluation)
                    pictures.perplexity(comparing.alone([("a", read)]), f"{tmp_path}/x.png")
            except UserError as error:
                assert "\n" not in str(error), (path, item)


def test_every_value_of_a_config():
    saved = json.loads(json.dumps(config.to_json(config.parse(tiny()))))
    entries = [["rope"], ["rope", "segment", 3], ["rope", "segment", ["theta"]],
               ["rope", "segment", ["theta", 10**400]], ["rope", "segment", ["layers", "9" * 5000]],
               ["learned", "offset", ["size", 10**400]], [3, 4]]  # fmt: skip
    for path in list(paths(saved))[1:]:
        for item in (*BAD, *([entry] for entry in entries), 10**9, -(10**12)):
            changed = put(saved, path, item)
            try:
                plan.of(config.from_json(changed))
            except UserError as error:
                assert "\n" not in str(error), (path, item)


def test_every_value_of_an_event(tmp_path):
    seconds = {"step": 1.0, "starting": 1.0}
    beat = {"time": 15.0, "since": 10.0, "step": 2, "phase": "training", "seconds": seconds}
    first = {"event": "started", "time": 10.0, "since": 10.0, "step": 1, "seconds": seconds}
    slow = {"step": 2, "took": 3.0, "usual": 1.0, "phase": "data"}
    recorded = [
        first,
        first | {"before": beat},
        first | {"event": "rewound", "to": 0},
        first | {"event": "slow", "slow": slow, "step": None},
    ]
    for path in paths(recorded):
        for item in BAD:
            changed = put(recorded, path, item)
            lines = changed if isinstance(changed, list) else [changed]
            text = "\n".join(map(json.dumps, [*lines, first]))
            Path(Workdir(tmp_path).events).write_text(text + "\n")
            kept = [event for event in events.read(tmp_path) if goodput.is_record(event)]
            assert goodput.table("w", goodput.account(kept, beat))
