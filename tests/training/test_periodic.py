"""Evaluation during training: what it measures, and that it changes nothing of the training."""

import json
import math
import signal

import jax
import numpy as np
import pytest
import several
import tqdm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_plan

from bipe_jax import goodput, plan, sharding
from bipe_jax.data import tokenizer as tokenizers
from bipe_jax.data.batches import Batches
from bipe_jax.data.prepare import prepare
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded, periodic
from bipe_jax.evaluation.evaluator import evaluate
from bipe_jax.training import metrics
from bipe_jax.training.trainer import train
from bipe_jax.workdir import events
from tests.faults import comparing
from tests.training.test_spikes import fingerprint, first_batches, poison, with_nan
from tests.training.test_train import assert_same_run, read_metrics


@pytest.fixture
def config(config):
    config.evaluation.lengths = (64, 128)
    config.evaluation.tokens = 256
    return config


def evaluations(workdir) -> dict:
    """Step -> {name: value} of the lines that have an evaluation."""
    lines = {
        line["step"]: {k: v for k, v in line.items() if k.startswith("evaluation/")}
        for line in read_metrics(workdir)
    }
    return {step: values for step, values in lines.items() if values}


@pytest.mark.slow
def test_training_is_the_same_with_and_without_bit_for_bit(config, tmp_path):
    """Also across stops, one of which is at a step that is evaluated, and by SIGTERM."""
    assert train(config, str(tmp_path / "without"))
    config.evaluation.every = 5
    assert train(config, str(tmp_path / "with"))
    assert_same_run(tmp_path / "without", tmp_path / "with", config.steps)
    assert list(evaluations(tmp_path / "with")) == [5, 10, 12]

    cut = tmp_path / "cut"
    config.evaluation.every = 1
    assert not train(config, str(cut), stop_at=3)
    config.evaluation.every = 5
    assert not train(config, str(cut), stop_at=5)
    assert not train(config, str(cut), stop_at=6)
    assert train(config, str(cut))
    assert_same_run(tmp_path / "without", cut, config.steps)
    found = evaluations(cut)
    assert list(found) == [1, 2, 3, 5, 10, 12]
    assert evaluations(tmp_path / "with").items() <= found.items()


@pytest.mark.slow
def test_a_rewind_skips_the_same_data_with_and_without(config, tokenizer_file, request, tmp_path):
    """The step after the spike is in flight when the spike is seen, and its batch is used up."""
    config.spikes.policy = "rewind"
    bad = first_batches(config, tokenizer_file, 6)[5]
    request.addfinalizer(poison({fingerprint(bad)}, with_nan))
    assert train(config, str(tmp_path / "without"))
    config.evaluation.every = 3  # step 6 is the spike
    assert train(config, str(tmp_path / "with"))
    assert_same_run(tmp_path / "without", tmp_path / "with", config.steps)
    assert list(evaluations(tmp_path / "with")) == [3, 6, 9, 12]


def test_numbers_are_those_of_evaluate(config, tmp_path):
    """Of the parameters after the step, in metrics.jsonl and TensorBoard, on lines that are full."""
    config.evaluation.every, config.checkpoint.every = 4, 4
    assert train(config, str(tmp_path / "run"))
    found = evaluations(tmp_path / "run")
    assert list(found) == [4, 8, 12]
    for step, values in found.items():
        checkpoint = str(tmp_path / "run" / "checkpoints" / str(step))
        result = evaluate(checkpoint, output=str(tmp_path / "out"), lengths=(32, 64))
        expected = {}
        for row in result["results"]:
            for name in ("loss", "perplexity"):
                expected[f"evaluation/{row['set']}/{row['length']}/{name}"] = row[name]
        assert len(expected) == 2 * 2 * 2 and values == expected
    assert len({str(values) for values in found.values()}) == 3
    full = [line["step"] for line in read_metrics(tmp_path / "run") if "goodput" in line]
    assert full == [3, 4, 6, 8, 9, 12]
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    for name in found[4]:
        shown = {event.step: event.value for event in board.Scalars(name)}
        assert shown == pytest.approx({step: values[name] for step, values in found.items()})


def test_the_bar_shows_the_last_evaluation(config, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        tqdm.tqdm, "set_postfix_str", lambda self, text, refresh: shown.append(text)
    )
    config.evaluation.every = 6
    assert train(config, str(tmp_path))
    assert len(shown) == 4 and "held-out" not in shown[0]
    values = evaluations(tmp_path)[6]
    for length in (32, 64):
        # Both sets have as many targets.
        mean = np.mean([values[f"evaluation/{name}/{length}/loss"] for name in "ab"])
        assert f"{math.exp(mean):.2f} at {length}" in shown[1]
    assert shown[2].split("held-out")[1] == shown[1].split("held-out")[1]  # of step 9
    assert shown[3].split("held-out")[1] != shown[1].split("held-out")[1]


def test_its_time_is_evaluating_and_does_not_slow_the_rates(config, tmp_path, monkeypatch):
    config.evaluation.every, config.log.every = 5, 1
    clock, ordinary = [0.0], metrics.time.perf_counter
    score = periodic.PeriodicEvaluation.__call__

    def slowly(self, params):
        clock[0] += 1000.0
        return score(self, params)

    monkeypatch.setattr(periodic.PeriodicEvaluation, "__call__", slowly)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: ordinary() + clock[0])
    assert train(config, str(tmp_path))
    lines = {line["step"]: line for line in read_metrics(tmp_path)}
    usual = config.batch_size * config.sequence_length / 100  # tokens/s of steps of 100 s
    assert all(line["tokens_per_second"] > usual for step, line in lines.items() if step > 1)
    account = goodput.account(events.read(str(tmp_path)))
    assert account.seconds["evaluating"] > 0
    assert lines[6]["time/evaluating"] > 0 and lines[4]["time/evaluating"] == 0


def test_the_first_step_may_be_evaluated(config, tmp_path):
    """What is before its end is still the start of the run."""
    config.evaluation.every, config.steps, config.log.every = 1, 3, 1
    config.schedule.warmup_steps = 1
    assert train(config, str(tmp_path))
    lines = read_metrics(tmp_path)
    assert lines[0]["time/starting"] == pytest.approx(1)
    assert all(line["time/evaluating"] > 0 and line["time/step"] > 0 for line in lines[1:])
    kinds = [event["event"] for event in events.read(str(tmp_path))]
    assert kinds[:3] == ["started", "training", "first_step"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.evaluation": "none/*.jsonl"}, r"no file matches 'none/\*\.jsonl'"),
        ({"evaluation.lengths": (100_000,)}, "no document has 100,001 tokens"),
        ({"position.absolute": (("learned", "position"),)}, "table of position ends at 32 tokens"),
    ],
)
def test_a_wrong_source_is_refused_before_the_first_step(
    config, tmp_path, monkeypatch, change, message
):
    config.evaluation.every = 100
    config.update_from_flattened_dict(change)
    monkeypatch.setattr(Batches, "__next__", lambda self: pytest.fail("a step is trained"))
    with pytest.raises(UserError, match=message):
        train(config, str(tmp_path))


def test_it_is_left_out_where_the_run_is_asked_to_stop(config, tmp_path, monkeypatch):
    ordinary, seen = Batches.__next__, []

    def stops(self):
        seen.append(1)
        if len(seen) == 4:
            signal.raise_signal(signal.SIGTERM)
        return ordinary(self)

    monkeypatch.setattr(Batches, "__next__", stops)
    config.evaluation.every = 2
    assert not train(config, str(tmp_path))
    assert list(evaluations(tmp_path)) == [2]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_lengths_are_the_training_length_and_the_next():
    def lengths(*of_evaluation, **more):
        return periodic.lengths(tiny_plan(evaluation__lengths=of_evaluation, **more))

    assert lengths() == (16, 32)
    assert lengths(8, 16) == (16, 32)
    assert lengths(128, 16, 64, 32) == (16, 32)
    assert lengths(128, 20) == (16, 20)
    table = {"position__absolute": (("learned", "position"),), "position__relative": ()}
    assert lengths(**table) == (16,)
    assert lengths(8, **table) == (16,)
    with pytest.raises(UserError, match="ends at 16 tokens"):
        lengths(64, **table)


@pytest.fixture
def periodically(config, run):
    """An evaluation of a trained model, and its parameters."""
    config.evaluation.every = 1
    trained = loaded.load(run)
    made = plan.make(config).with_rule(trained.config.segment_rule)
    mesh = sharding.make_mesh(made)
    return periodic.PeriodicEvaluation(made, mesh, trained.tokenizer), trained.params


def test_it_compiles_once(periodically):
    evaluation, params = periodically
    first = evaluation(params)
    programs = evaluation._evaluation._scorer._run._cache_size()
    assert programs == 2  # one a length
    assert evaluation(params) == first
    assert evaluation._evaluation._scorer._run._cache_size() == programs
    assert [(row["set"], row["length"]) for row in first] == [
        ("a", 32), ("a", 64), ("b", 32), ("b", 64),
    ]  # fmt: skip


def test_parameters_that_have_diverged_are_no_numbers(config, periodically, tmp_path):
    evaluation, params = periodically
    rows = evaluation(jax.tree.map(lambda x: x * np.nan, params))
    assert all(math.isnan(value) for value in periodic.metrics(rows).values())
    tokens = tokenizers.load(config.tokenizer.path)
    zeros = {n: np.zeros((1, 4), np.int32) for n in ("segment", "offset", "targets", "weights")}
    with metrics.Log(config, str(tmp_path), 0, tokens, dict) as log:
        log.write(1, zeros, {"loss": 2.0}, True, rows)
    (line,) = evaluations(tmp_path).values()
    assert len(line) == 8 and set(line.values()) == {None}


# Eight devices: the state is cut over them, and stays where it is.
PROGRAM = """
import json, sys
import jax
from bipe_jax.errors import UserError
from bipe_jax.evaluation import periodic
from bipe_jax.training.trainer import train

score = periodic.PeriodicEvaluation.__call__

def guarded(self, params):
    with jax.transfer_guard_device_to_device("disallow"):
        return score(self, params)

periodic.PeriodicEvaluation.__call__ = guarded
directory, plain, meshes = json.loads(sys.argv[1])
for name, mesh in meshes.items():
    for every in (0, 5):
        plain["mesh"] |= mesh
        plain["evaluation"]["every"] = every
        train(plain, f"{directory}/{name}.{every}")
    plain["mesh"] |= dict.fromkeys(mesh, 1) | {"data": 0}
plain["mesh"] |= mesh
plain["evaluation"]["lengths"] = [50]
try:
    train(plain, f"{directory}/wrong")
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_eight_devices_train_the_same_with_and_without(config, tmp_path):
    config.evaluation.every = 5
    assert train(config, str(tmp_path / "one"))
    meshes = {"cut": {"fsdp": 2, "tensor": 2, "data": 2}, "context": {"fsdp": 2, "context": 4}}
    arguments = json.dumps([str(tmp_path), config.to_dict(), meshes])
    ((code, out, err),) = several.finish(several.start(1, 8, "-c", PROGRAM, arguments))
    assert code == 0, err
    for name in meshes:
        without, with_ = (str(tmp_path / f"{name}.{every}") for every in (0, 5))
        losses = [[line["loss"] for line in read_metrics(w)] for w in (without, with_)]
        assert losses[0] == losses[1] and len(losses[0]) == config.steps
        a, b = (comparing._last(workdir, config.steps) for workdir in (without, with_))
        jax.tree.map(np.testing.assert_array_equal, a, b)
        found, expected = evaluations(tmp_path / f"{name}.5"), evaluations(tmp_path / "one")
        assert found.keys() == expected.keys()
        for step, values in expected.items():
            assert found[step] == pytest.approx(values, rel=1e-5)
    assert "the length 50 must divide over config.mesh.context=4" in out


@pytest.mark.slow
def test_two_processes_evaluate_what_one_does(config, tmp_path):
    prepared = str(tmp_path / "prepared")  # a stream gives two processes other blocks than one
    prepare(config.data.train, prepared, config.tokenizer.path, 32, workers=1)
    config.data.train = f"prepared:{prepared}"
    config.evaluation.every, config.mesh.fsdp = 5, 2
    program = (
        "import json, sys\nfrom bipe_jax import processes\n"
        "from bipe_jax.training.trainer import train\nprocesses.start()\n"
        "plain, workdir, steps = json.loads(sys.argv[1])\n"
        "assert train(plain, workdir, steps) == (steps is None)\n"
    )

    def run(count, name, steps=None):
        arguments = json.dumps([config.to_dict(), str(tmp_path / name), steps])
        done = several.finish(several.start(count, 2 // count, "-c", program, arguments))
        assert [code for code, _, _ in done] == [0] * count, done

    run(1, "one")
    run(2, "two", 7)
    run(2, "two")
    losses = [[line["loss"] for line in read_metrics(tmp_path / n)] for n in ("one", "two")]
    assert losses[0] == losses[1] and len(losses[0]) == config.steps
    found, expected = evaluations(tmp_path / "two"), evaluations(tmp_path / "one")
    assert list(found) == list(expected) == [5, 10, 12]
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-6)
