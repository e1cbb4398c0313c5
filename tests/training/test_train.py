"""Training: exact resume, accumulation, metrics, and failures that lose nothing."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bipe_jax
from bipe_jax import checkpoint, model, plan, segments
from bipe_jax.data.batches import annotate
from bipe_jax.errors import UserError
from bipe_jax.flops import flops_per_token
from bipe_jax.training import metrics, step
from bipe_jax.training.trainer import train
from configs import bipe_rope_151m


def read_metrics(workdir):
    with open(f"{workdir}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def read_checkpoint(workdir, number):
    """Parameters and optimizer state as they lie on disk, read by Orbax alone."""
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(f"{workdir}/checkpoints", options=options) as manager:
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(),
            optimizer=ocp.args.StandardRestore(),
            data=ocp.args.JsonRestore(),
        )
        return dict(manager.restore(number, args=items).items())


def assert_same_run(one, other, number):
    losses = [[(line["step"], line["loss"]) for line in read_metrics(w)] for w in (one, other)]
    assert losses[0] == losses[1]
    assert [n for n, _ in losses[0]] == list(range(1, number + 1))
    a, b = read_checkpoint(one, number), read_checkpoint(other, number)
    assert a["data"] == b["data"]
    jax.tree.map(np.testing.assert_array_equal, a, b)


def random_batch(config, rule=None, seed=0):
    generator = np.random.default_rng(seed)
    shape = (config.batch_size, config.sequence_length + 1)
    tokens = generator.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    return annotate(tokens, rule or segments.Rule(length=5))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"accumulation": 2, "data.separate_documents": True, "model.dropout": 0.1, "z_loss": 1e-4},
        {"optimizer.name": "muon"},
    ],
)
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(config, tmp_path, change):
    config.update_from_flattened_dict(change)
    assert train(config, str(tmp_path / "whole"))
    assert not train(config, str(tmp_path / "cut"), stop_at=5)  # not a multiple of checkpoint.every
    assert not train(config, str(tmp_path / "cut"), stop_at=7)
    assert train(config, str(tmp_path / "cut"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut", config.steps)


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_end(
    config, command, tokenizer_file, shards, held_out, tmp_path
):
    arguments = [
        "--config=configs/smoke.py",
        f"--config.tokenizer.path={tokenizer_file}",
        f"--config.data.train={shards}",
        f"--config.data.evaluation={held_out}",
        "--config.steps=100",
        "--config.evaluation.lengths=(32,64)",
    ]
    workdir = tmp_path / "killed"
    line = [sys.executable, "-m", "bipe_jax.train", *arguments, f"--workdir={workdir}"]
    with subprocess.Popen(line, stderr=subprocess.DEVNULL) as process:
        while not (workdir / "checkpoints" / "20").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = command("train", *arguments, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert "Resuming from step" in done.stderr
    assert "extrapolation.png" in done.stdout
    whole = command("train", *arguments, f"--workdir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    assert_same_run(tmp_path / "whole", workdir, 100)


def test_first_loss_is_pinned(config):
    """Near ln(V), as logits of a small random model are; the digits guard against silent changes."""
    parsed = plan.make(config)
    state = step.init_state(parsed, jax.random.key(0))
    _, values = jax.jit(lambda s, b: step.train_step(parsed, s, b))(state, random_batch(config))
    assert abs(float(values["loss"]) - math.log(config.model.vocab_size)) < 0.02
    assert float(values["loss"]) == pytest.approx(PINNED_LOSS, abs=1e-5)


PINNED_LOSS = 6.23384


def test_accumulation_equals_the_big_batch(config):
    """Parts with unequal numbers of targets: a mean of means would differ."""
    batch = random_batch(config)
    batch["weights"][:3] = 0
    batch["weights"][5, 3:] = 0
    state = step.init_state(plan.make(config), jax.random.key(0))

    def update(parts):
        in_parts = plan.make(config).replace({"accumulation": parts})
        return jax.jit(lambda s, b: step.train_step(in_parts, s, b))(state, batch)

    (whole, one), (parts, four) = update(1), update(4)
    for name in one:
        np.testing.assert_allclose(one[name], four[name], rtol=2e-6)
    # Adam divides by the gradient's size: compare its first moment, which is linear in the gradient.
    for a, b in zip(
        jax.tree.leaves(whole["optimizer"]), jax.tree.leaves(parts["optimizer"]), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-8)


def test_a_tiny_model_overfits(config):
    config.steps, config.optimizer.learning_rate, config.batch_size = 150, 0.01, 4
    config = plan.make(config)
    batch = random_batch(config)
    parsed = plan.make(config)
    update = jax.jit(lambda s, b: step.train_step(parsed, s, b))
    state = step.init_state(parsed, jax.random.key(0))
    for _ in range(config.steps):
        state, values = update(state, batch)
    assert float(values["loss"]) < 0.05


def test_metrics_are_those_of_the_step(config, tmp_path, capfd):
    config.log.peak_flops = 1e9
    train(config, str(tmp_path))
    lines = read_metrics(tmp_path)
    shown = capfd.readouterr().err  # what nobody watches is a line each time, such as the last
    assert "\r" not in shown and f"| {config.steps}/{config.steps} [" in shown.splitlines()[-1]
    full = [line for line in lines if "perplexity" in line]
    assert [line["step"] for line in full] == [3, 6, 9, 12]
    for line in full:
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
        assert line["learning_rate"] == pytest.approx(
            config.optimizer.learning_rate
            * (
                line["step"] / 5
                if line["step"] <= 5
                else 0.1 + 0.9 * (1 + math.cos(math.pi * (line["step"] - 6) / 7)) / 2
            ),
            rel=1e-5,
        )
        flops = flops_per_token(config)
        assert line["mfu"] == pytest.approx(
            line["tokens_per_second"] * flops / 1e9 / jax.device_count()
        )
        assert line["bad_lines"] == 0
        assert 1 < line["bits_per_byte"] < 12
        assert line["segment_tokens_mean"] * line["segments_per_block"] == pytest.approx(
            config.sequence_length
        )
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    board = {event.step: event.value for event in events.Scalars("loss")}
    assert board == pytest.approx({line["step"]: line["loss"] for line in full})


def test_bits_per_byte_counts_the_bytes_of_the_text(config, tokenizer_file, tmp_path):
    from bipe_jax.data import tokenizer

    tokens = tokenizer.load(tokenizer_file)
    text = "Naïve café — 3.14 \U0001f600\n\tindented   text.\n"
    ids = tokens.encode(text)
    assert tokens.byte_lengths()[ids].sum() == len(text.encode())


def test_flops_of_the_authors_model():
    """6 FLOPs a weight of a matrix product, plus causal attention; written out for 151M."""
    config = bipe_rope_151m.get_config()
    layer = 4 * 768 * 768 + 3 * 768 * 3072
    expected = 6 * (12 * layer + 768 * 32000) + 12 * 6 * 1024 * 768
    assert flops_per_token(config) == expected


def test_peak_of_known_and_unknown_devices(config):
    assert metrics.peak_flops(config, "TPU v5 lite") == 197e12
    assert metrics.peak_flops(config, "TPU v5p") == 459e12
    assert metrics.peak_flops(config, "NVIDIA H100 80GB HBM3") == 989e12
    assert metrics.peak_flops(config, "NVIDIA H100 PCIe") == 756e12
    assert metrics.peak_flops(config, "cpu") is None
    config.log.peak_flops = 5e10
    assert metrics.peak_flops(config, "cpu") == 5e10


def test_a_checkpoint_directory_is_self_contained(config, tmp_path):
    train(config, str(tmp_path / "run"), stop_at=4)
    shutil.move(tmp_path / "run" / "checkpoints" / "4", tmp_path / "4")
    shutil.rmtree(tmp_path / "run")
    meta, params = checkpoint.load(tmp_path / "4")
    assert meta.step == 4
    text = "To be, or not to be.\nThat is"
    assert meta.tokenizer.decode(meta.tokenizer.encode(text)) == text
    config_again, params_again = bipe_jax.load(tmp_path / "4")
    assert config_again.position.relative == config.position.relative
    assert config_again.segment_rule.separators
    jax.tree.map(np.testing.assert_array_equal, params, params_again)
    tokens = meta.tokenizer.encode(text)[None]
    rule = segments.resolve("sentence", meta.tokenizer.pieces())
    expected = model.apply(
        config_again, params, {"tokens": tokens, **segments.coordinates(tokens, rule)}
    )
    np.testing.assert_array_equal(bipe_jax.apply(config_again, params, tokens), expected)


def test_only_the_trainer_removes_what_a_killed_save_left(config, tmp_path):
    train(config, str(tmp_path), stop_at=4)
    unfinished = tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert checkpoint.load(tmp_path)[0].step == 4
    assert unfinished.exists()
    train(config, str(tmp_path), stop_at=5)
    assert not unfinished.exists()


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(config, tmp_path):
    train(config, str(tmp_path), stop_at=4)
    before = read_checkpoint(tmp_path, 4)
    config.optimizer.learning_rate = 1e30
    config.optimizer.clip_norm = 0.0
    with pytest.raises(UserError, match=r"step \d+: loss is .*last good checkpoint is step 4: "):
        train(config, str(tmp_path))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["4"]
    jax.tree.map(np.testing.assert_array_equal, before, read_checkpoint(tmp_path, 4))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.width": 64}, r"config.model.width=64, but the run in .* started with 32"),
        ({"position.relative": (("rope", "position"),)}, "config.position.relative="),
        ({"segments.rule": "newline"}, "config.segments.rule='newline'"),
        ({"sequence_length": 64}, "config.sequence_length=64"),
        ({"optimizer.name": "lion"}, "config.optimizer.name='lion'"),
        ({"seed": 1}, "config.seed=1"),
    ],
)
def test_resuming_with_another_model_is_refused(config, tmp_path_factory, change, message):
    workdir = tmp_path_factory.getbasetemp() / "to_resume"
    if not workdir.exists():
        train(config, str(workdir), stop_at=4)
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        train(config, str(workdir))


def test_another_vocabulary_is_refused(config, texts, tmp_path):
    from bipe_jax.data import tokenizer

    train(config, str(tmp_path / "run"), stop_at=2)
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer.train(texts[:15], config.model.vocab_size, 100_000).model)
    config.tokenizer.path = str(other)
    with pytest.raises(UserError, match=r"other\.model' is another one than the checkpoint"):
        train(config, str(tmp_path / "run"))
    config.model.vocab_size = 600
    with pytest.raises(UserError, match=r"config.model.vocab_size=600, but .* has 512 pieces"):
        train(config, str(tmp_path / "new"))


@pytest.mark.slow
def test_disk_full_while_saving_loses_nothing(config, tmp_path):
    """A limit on the size of files makes every larger write fail, as a full disk does."""
    program = (
        "import resource, signal, sys\n"
        "from bipe_jax import checkpoint, cli\n"
        "from bipe_jax.training.trainer import train\n"
        "from bipe_jax.workdir import files\n"
        ""
        "from bipe_jax.training.trainer import train\n"
        "import json\n"
        "config = json.loads(sys.argv[1])\n"
        "cli.quiet()\n"
        "files.PAUSES = (0.1, 0.1)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "with cli.user_errors():\n"
        "    train(config, sys.argv[2], stop_at=4)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "    train(config, sys.argv[2])\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    line = [sys.executable, "-c", program, json.dumps(config.to_dict()), str(tmp_path / "full")]
    failed = subprocess.run(line, capture_output=True, text=True)
    assert failed.returncode == 1, failed.stderr
    message = failed.stderr.splitlines()[-1]
    assert message.startswith("error: saving a checkpoint to ")
    assert "the last complete one is step 4" in message
    train(config, str(tmp_path / "whole"))
    train(config, str(tmp_path / "full"))
    assert_same_run(tmp_path / "whole", tmp_path / "full", config.steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/none.py"], "configs/none.py"),
        (["--config=configs/smoke.py:rotary"], "'rotary'|rotary is unknown"),
        (["--config=configs/smoke.py", "--config.stepz=3"], "'stepz'"),
        (["--config=configs/smoke.py", "--config.steps=many"], "config.steps=many"),
        (["--config=configs/smoke.py", "--config.data.train=none/*.jsonl"], "none/*.jsonl"),
        (["--config=configs/smoke.py", "--config.tokenizer.path=none.model"], "none.model"),
        (["--config=configs/smoke.py", "--config.batch_size=3"], "config.batch_size=3"),
        (["--config=configs/smoke.py", "--workdir=/proc/none"], "/proc/none"),
        (["--config=configs/smoke.py", "--stop=3"], "did you mean '--stop_at'?"),
        (["--config=configs/smoke.py", "--config.segments.rule=word"], "segments.rule='word'"),
    ],
)
def test_wrong_input_is_one_line_and_a_non_zero_exit(command, tmp_path, arguments, message):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = command("train", f"--workdir={tmp_path}", *arguments, env=environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert any(part in last for part in message.split("|")), last
    assert len(done.stderr.splitlines()) <= 3
