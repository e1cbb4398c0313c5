"""Spikes: what counts as one, what a skipped step leaves untouched, and the policies end to end."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from paths import ROOT

from bipe_jax import checkpoint, plan, segments, sharding
from bipe_jax.data import tokenizer
from bipe_jax.data.batches import Batches
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded
from bipe_jax.training import finetune, observing, spikes, step
from bipe_jax.training.trainer import train
from tests.training.test_train import assert_same_run, random_batch, read_checkpoint, read_metrics


def draws(count=300, seed=0):
    """(count, 2) losses and norms, some of them spikes: not finite, or far above the others."""
    generator = np.random.default_rng(seed)
    x = generator.normal([3.0, 0.5], [0.2, 0.05], (count, 2)).astype(np.float32)
    x[[3, 40], 0] = np.nan, np.inf
    x[[7, 90], 1] = -np.inf, np.nan
    x[[60, 150, 290], 0] = 30.0, 9.0, 8.0
    x[[100, 151], 1] = 9.0, 0.9
    x[[20, 31], 0] = 5.0, 4.8  # among the first, which are too few to judge by
    return x


def expected(x, threshold):
    """Which rows are spikes, and mean and variance at the end, by weights written out in float64."""
    spikes_, rows, weights = [], np.zeros((0, 2)), np.zeros(0)
    mean = variance = np.zeros(2)
    for row in x.astype(np.float64):
        spike = not np.isfinite(row).all()
        if threshold and len(rows) >= 32:
            spike |= bool((row > mean + threshold * np.sqrt(variance)).any())
        spikes_.append(spike)
        if spike:
            continue
        newest = max(1 / (len(rows) + 1), 1 / 128)
        rows, weights = np.vstack([rows, row]), np.append(weights * (1 - newest), newest)
        mean = weights @ rows
        variance = weights @ (rows - mean) ** 2
    return np.array(spikes_), mean, variance


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_spikes_are_those_of_the_formula_and_change_nothing(threshold):
    x = draws()
    guard = spikes.guard(optax.adam(0.1), threshold)
    update = jax.jit(lambda g, s, p, loss, norm: guard.update(g, s, p, loss=loss, norm=norm))
    params = {"w": np.ones(3, np.float32)}
    state, found = guard.init(params), []
    for row in x:
        grads = {"w": row[0] * np.arange(1, 4, dtype=np.float32)}
        updates, new = update(grads, state, params, *row)
        spike = int(new.skipped) - int(state.skipped)
        found.append(spike == 1)
        if spike:
            jax.tree.map(np.testing.assert_array_equal, new, state._replace(skipped=new.skipped))
            assert not np.asarray(updates["w"]).any()
        state = new
    wanted, mean, variance = expected(x, threshold)
    assert found == wanted.tolist()
    assert wanted.sum() == (9 if threshold else 4)
    assert int(state.skipped) == wanted.sum() and int(state.steps) == len(x) - wanted.sum()
    np.testing.assert_allclose(state.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(state.variance, variance, rtol=2e-4)
    assert np.isfinite(state.inner[0].mu["w"]).all()


def test_a_skipped_step_leaves_no_trace_but_its_count(config):
    """Three steps with a spike between are the three steps: parameters, moments, learning rates."""
    config.spikes.policy = "skip"
    config = plan.make(config)
    batches = [random_batch(config, seed=seed) for seed in range(3)]
    poisoned = batches[0] | {"weights": batches[0]["weights"] * np.nan}
    update = jax.jit(lambda s, b: step.train_step(config, s, b))

    def run(batches):
        state, rates = step.init_state(config, jax.random.key(0)), []
        for batch in batches:
            state, values = update(state, batch)
            if not values["spike"]:
                rates.append(float(values["learning_rate"]))
        return state, rates, values

    plain, rates, _ = run(batches)
    skipped, rates_too, values = run([batches[0], poisoned, *batches[1:]])
    assert rates == rates_too and len(set(rates)) == 3
    assert int(values["skipped_updates"]) == 1
    assert int(skipped["step"]) == 4
    jax.tree.map(np.testing.assert_array_equal, plain["params"], skipped["params"])
    a, b = plain["optimizer"], skipped["optimizer"]
    jax.tree.map(np.testing.assert_array_equal, a, b._replace(skipped=a.skipped))


def test_watch_gives_up_where_spikes_do_not_end():
    spike = {"spike": 1, "loss": np.nan, "gradient_norm": 2.5, "skipped_updates": 3}
    usual = spike | {"spike": 0}
    with pytest.raises(UserError, match=r"^step 7: loss is nan, .* 2\.5; no checkpoint yet: lower"):
        spikes.Watch("stop")(7, spike, None)
    watch = spikes.Watch("skip")
    for number in range(1, 25):
        assert not watch(number, spike, 4)
    assert not watch(25, usual, 4)
    for number in range(26, 50):
        assert not watch(number, spike, 4)
    with pytest.raises(UserError, match=r"step 50: .*25 steps in a row .* checkpoint is step 4: "):
        watch(50, spike, 4)
    watch = spikes.Watch("rewind")
    for latest in (4, 8):
        assert [watch(number, spike, latest) for number in (9, 10, 11)] == [True] * 3
    assert not watch(12, usual, 8)
    with pytest.raises(UserError, match=r"step 13: .*after 3 rewinds to one checkpoint"):
        watch(13, spike, 8)


# End to end. A batch is poisoned by what it holds, so that every start of a run meets it again.


def fingerprint(batch) -> str:
    return hashlib.sha256(np.ascontiguousarray(batch["tokens"])).hexdigest()


def poison(bad: set, change, on_batch=lambda key: None):
    """Changes the batches whose fingerprints are `bad`. Returns what undoes it."""
    ordinary = Batches.__next__

    def poisoned(self):
        batch = ordinary(self)
        key = fingerprint(batch)
        on_batch(key)
        return change(batch) if key in bad else batch

    Batches.__next__ = poisoned
    return lambda: setattr(Batches, "__next__", ordinary)


def with_nan(batch):
    return batch | {"weights": batch["weights"] * np.float32(np.nan)}


def with_nonsense(batch):
    return batch | {"targets": (batch["targets"] + 251) % 512}


def first_batches(config, tokenizer_file, count) -> list:
    tokens = tokenizer.load(tokenizer_file)
    rule = segments.resolve(config.segments.rule, tokens.pieces())
    batches = Batches(plan.make(config).with_rule(rule), tokens)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def trained(config, batches, rule) -> dict:
    """The state after one step for each batch, by a plain loop over the compiled step."""
    config = plan.make(config).with_rule(rule)
    mesh = sharding.make_mesh(config)
    with jax.set_mesh(mesh):
        init, update, _ = step.compile_on(config, mesh)
        state = init(jax.random.key(config.seed))
        for batch in batches:
            state, _ = update(state, sharding.place_batch(mesh, batch))
    return jax.device_get(state)


def assert_state(state, saved):
    jax.tree.map(np.testing.assert_array_equal, state["params"], saved["params"])
    flat = [np.asarray(leaf) for leaf in jax.tree.leaves(state["optimizer"].inner)]
    inner = jax.tree.leaves(saved["optimizer"]["inner"])
    # Orbax gives dicts in place of optax's tuples: leaves in another order, of the same values.
    as_bytes = [
        sorted((x.shape, x.tobytes()) for x in map(np.asarray, some)) for some in (flat, inner)
    ]
    assert as_bytes[0] == as_bytes[1]


@pytest.fixture
def batches(config, tokenizer_file):
    return first_batches(config, tokenizer_file, 20)


@pytest.fixture
def poisoned(request):
    def start(bad, change):
        request.addfinalizer(poison({fingerprint(batch) for batch in bad}, change))

    return start


def rule_of(workdir) -> segments.Rule:
    return checkpoint.describe(workdir)[0].config.segment_rule


def test_policy_stop_ends_the_run_and_saves_nothing_behind_the_spike(
    config, batches, poisoned, tmp_path
):
    poisoned(batches[5:6], with_nan)
    with pytest.raises(
        UserError, match=r"^step 6: loss is nan, .*last good checkpoint is step 4: "
    ):
        train(config, str(tmp_path))
    assert os.listdir(tmp_path / "checkpoints") == ["4"]
    assert [line["loss"] is None for line in read_metrics(tmp_path)] == [False] * 5 + [True]


def test_policy_skip_trains_as_though_the_batch_had_not_been(config, batches, poisoned, tmp_path):
    config.spikes.policy = "skip"
    poisoned(batches[5:7] + batches[9:10], with_nan)
    assert train(config, str(tmp_path))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    counted = {line["step"]: line["skipped_updates"] for line in lines if "skipped_updates" in line}
    assert counted == {3: 0, 6: 1, 7: 2, 9: 2, 10: 3, 12: 3}
    good = batches[:5] + batches[7:9] + batches[10:12]
    saved = read_checkpoint(tmp_path, 12)
    assert int(saved["optimizer"]["skipped"]) == 3
    assert_state(trained(config, good, rule_of(tmp_path)), saved)


def test_a_loss_far_above_the_others_is_a_spike(config, tokenizer_file, poisoned, tmp_path):
    config.steps, config.checkpoint.every = 60, 30
    config.spikes.policy, config.spikes.threshold = "skip", 4.0
    batches = first_batches(config, tokenizer_file, 60)
    poisoned(batches[49:50], with_nonsense)
    assert train(config, str(tmp_path))
    lines = read_metrics(tmp_path)
    assert lines[49]["loss"] > lines[48]["loss"] + 1
    assert lines[-1]["skipped_updates"] == 1 and lines[49]["spike"] == 1
    good = batches[:49] + batches[50:]
    assert_state(trained(config, good, rule_of(tmp_path)), read_checkpoint(tmp_path, 60))


def test_policy_rewind_goes_on_from_the_checkpoint_with_the_data_behind_the_spike(
    config, batches, poisoned, tmp_path
):
    """The step that was dispatched before the spike was seen has used up a batch too."""
    config.spikes.policy = "rewind"
    poisoned(batches[5:6], with_nan)
    assert train(config, str(tmp_path))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["rewinds"] for line in lines if "rewinds" in line] == [0, 1, 1, 1]
    saved = read_checkpoint(tmp_path, 12)
    assert saved["data"]["rewinds"] == 1
    assert_state(trained(config, batches[:4] + batches[7:15], rule_of(tmp_path)), saved)


def test_rewind_before_the_first_checkpoint_begins_anew(config, batches, poisoned, tmp_path):
    config.spikes.policy = "rewind"
    poisoned(batches[1:2], with_nan)
    assert train(config, str(tmp_path))
    saved = read_checkpoint(tmp_path, 12)
    assert_state(trained(config, batches[3:15], rule_of(tmp_path)), saved)


_PROGRAM = """
import json, os, signal, sys
from bipe_jax import cli
from bipe_jax.training.trainer import train
from tests.training.test_spikes import poison, with_nan
config, workdir, bad, last = json.loads(sys.argv[1])
cli.log_to_terminal()
cli.quiet()
seen = []

def on_batch(key):
    seen.append(key)
    if key == last and seen.count(bad):
        # Behind the rewind; the step that this batch is for is never made.
        os.kill(os.getpid(), signal.SIGKILL)

poison({bad}, with_nan, on_batch)
train(config, workdir)
"""


@pytest.mark.slow
def test_killed_behind_a_rewind_and_before_the_next_save(config, batches, poisoned, tmp_path):
    config.spikes.policy = "rewind"
    poisoned(batches[5:6], with_nan)
    assert train(config, str(tmp_path / "whole"))
    workdir = tmp_path / "killed"
    # Batches 8, 9 and 10 are those of steps 5, 6 and 7 of the second time.
    arguments = [config.to_dict(), str(workdir), fingerprint(batches[5]), fingerprint(batches[9])]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    line = [sys.executable, "-c", _PROGRAM, json.dumps(arguments)]
    killed = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(os.listdir(workdir / "checkpoints"))[0] == "4"
    assert "rewinding to step 4" in killed.stderr
    assert train(config, str(workdir))
    assert_same_run(tmp_path / "whole", workdir, 12)
    assert [line.get("rewinds") for line in read_metrics(workdir)] == [
        line.get("rewinds") for line in read_metrics(tmp_path / "whole")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("spike", [6, 7, 8])
@pytest.mark.parametrize("how", ["stop_at", "SIGTERM"])
def test_what_a_rewind_skips_does_not_depend_on_a_stop(
    config, batches, request, tmp_path, spike, how
):
    """At the step of the spike, the one before a save, and that of a save."""
    config.spikes.policy = "rewind"
    key = fingerprint(batches[spike - 1])
    stops: list[int] = []

    def stop(of_batch):
        if of_batch == key and stops:
            signal.raise_signal(stops.pop())

    request.addfinalizer(poison({key}, with_nan, stop))
    assert train(config, str(tmp_path / "whole"))
    if how == "SIGTERM":
        stops.append(signal.SIGTERM)
    assert not train(config, str(tmp_path / "stopped"), spike if how == "stop_at" else None)
    assert train(config, str(tmp_path / "stopped"))
    assert not stops
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", 12)


def test_finetuning_rewinds_to_what_it_started_from(config, batches, poisoned, run, tmp_path):
    config.spikes.policy, config.initial_checkpoint = "rewind", run
    poisoned(batches[1:2], with_nan)
    begun = []
    ordinary = finetune.start
    finetune.start = lambda *args: begun.append(args) or ordinary(*args)
    try:
        assert train(config, str(tmp_path))
    finally:
        finetune.start = ordinary
    assert len(begun) == 2


def ruin(monkeypatch, at: int) -> None:
    """The update of a step makes a parameter infinite, though its loss and gradient are usual."""
    ordinary = observing.Observer.step

    def ruined(self, number, function, state, *arguments):
        state, values = ordinary(self, number, function, state, *arguments)
        if number == at:
            scale = state["params"]["norm"]["scale"]
            state["params"]["norm"]["scale"] = scale * np.float32(np.inf)
        return state, values

    monkeypatch.setattr(observing.Observer, "step", ruined)


@pytest.mark.parametrize("at", [8, 9])
def test_ruined_parameters_push_out_no_good_checkpoint(config, tmp_path, monkeypatch, at):
    """At the step of a save they are not saved; after it, no step is saved while all are skipped."""
    config.spikes.policy, config.steps, config.checkpoint.keep = "skip", 60, 2
    ruin(monkeypatch, at)
    message = (
        "step 8: the parameters are not finite" if at == 8 else "25 steps in a row were skipped"
    )
    with pytest.raises(UserError, match=message):
        train(config, str(tmp_path))
    good = [4] if at == 8 else [4, 8]
    assert checkpoint.steps(tmp_path) == good
    for number in good:
        assert loaded.load(str(tmp_path), step=number).step == number


def test_parameters_that_are_not_finite_are_refused(config, tmp_path):
    train(config, str(tmp_path / "run"), stop_at=4)
    meta, params = checkpoint.load(tmp_path / "run")
    params["norm"]["scale"] = params["norm"]["scale"] * np.float32(np.nan)
    checkpoint.save_model(tmp_path / "nan", meta.config, params, meta.tokenizer)
    with pytest.raises(UserError, match="the parameters of step 0 are not finite"):
        loaded.load(str(tmp_path / "nan"))
