"""Runs that start from another run's parameters: other positions, longer blocks, resuming, errors."""

import gc
import os
import shutil

import jax
import numpy as np
import numpy_reference as reference
import pytest

from bipe_jax import checkpoint, errors, model, plan, positions
from bipe_jax.data import tokenizer
from bipe_jax.data.batches import Batches
from bipe_jax.errors import UserError
from bipe_jax.training import finetune, trainer
from bipe_jax.training.trainer import train
from tests.training.test_train import assert_same_run, read_checkpoint, read_metrics

ROPE = {"position.absolute": (), "position.relative": (("rope", "position"),)}
BIPE = {"position.absolute": (("learned", "offset"),), "position.relative": (("rope", "segment"),)}
OF_POSITION = {"position.absolute": (("learned", "position"),), "position.relative": ()}
NO_UPDATE = {"optimizer.learning_rate": 1e-30}  # float32 parameters stay as they are, bit for bit
LOUD = {"model.init_std": 0.2}  # attention is not uniform without much training
TABLE = "absolute/learned_offset/table"


@pytest.fixture(scope="module")
def new(tokenizer_file, shards, held_out):
    """Makes a config of blocks of 32 tokens."""
    from configs import smoke

    def make(*changes, **values):
        config = smoke.get_config("rope")
        config.tokenizer.path = tokenizer_file
        config.data.train, config.data.evaluation = shards, held_out
        config.data.shuffle_blocks, config.steps, config.checkpoint.every = 16, 6, 2
        for change in (*changes, values):
            config.update_from_flattened_dict(change)
        return config

    return make


@pytest.fixture(scope="module")
def source(new, tmp_path_factory):
    """The workdir of a trained model with the given positions."""
    made = {}

    def of(changes):
        key = str(changes)
        if key not in made:
            made[key] = str(tmp_path_factory.mktemp("source"))
            train(new(changes), made[key])
        return made[key]

    return of


def named(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
def test_a_rope_model_becomes_a_bipe_model(new, source, tmp_path, capsys):
    config = new(BIPE, NO_UPDATE, initial_checkpoint=source(ROPE))
    config.segments.rule, config.batch_size, config.seed = "newline", 4, 7
    train(config, str(tmp_path), stop_at=2)
    said = capsys.readouterr().err
    assert f"Starting from step 6 of {source(ROPE)}\n" in said
    assert f"Initialised, since the checkpoint has none: {TABLE}\n" in said
    assert "Not used" not in said
    before, after = read_checkpoint(source(ROPE), 6), read_checkpoint(tmp_path, 2)
    found, expected = named(after["params"]), named(before["params"])
    table = found.pop(TABLE)
    assert_equal(found, expected)
    # The table is the one that a run from scratch would draw, and that no update moved.
    drawn = named(model.init(plan.make(config), jax.random.key(7)))[TABLE]
    np.testing.assert_allclose(table, drawn, rtol=1e-5, atol=1e-8)
    # The optimizer is a new one: it has counted two steps, and the schedule starts again.
    counts = {int(x) for n, x in named(after["optimizer"]).items() if n.endswith("count")}
    assert counts == {2}
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    meta, _ = checkpoint.load(tmp_path)
    assert meta.config.segments.rule == "newline" and meta.config.initial_checkpoint


@pytest.mark.slow
def test_what_the_model_has_not_is_left_out_by_name(new, source, tmp_path, capsys):
    config = new(ROPE, NO_UPDATE, initial_checkpoint=f"{source(BIPE)}/checkpoints/4")
    train(config, str(tmp_path), stop_at=1)
    said = capsys.readouterr().err
    assert f"Starting from step 4 of {source(BIPE)}/checkpoints/4\n" in said
    assert f"Not used, since this model has none: {TABLE}\n" in said
    assert "Initialised" not in said
    found = named(read_checkpoint(tmp_path, 1)["params"])
    expected = named(read_checkpoint(source(BIPE), 4)["params"])
    assert expected.pop(TABLE).shape == (32, 32)
    assert_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "spec"), [(ROPE, "yarn:2"), (BIPE, "dynamic-ntk:2:4")])
def test_a_model_is_trained_on_with_scaled_angles(changes, spec, new, source, tmp_path):
    """The first loss is that of the checkpoint's parameters by the float64 reference."""
    config = new(changes, initial_checkpoint=source(changes))
    config.position.relative = positions.extend(plan.make(config), spec)
    config.sequence_length = 64
    if changes is BIPE:
        config.position.absolute = (("learned", "offset", ("size", 32)),)
    train(config, str(tmp_path), stop_at=1)
    assert first_loss(tmp_path) == pytest.approx(
        reference_loss(tmp_path, source(changes)), abs=2e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("changes", [ROPE | LOUD, BIPE | LOUD])
def test_a_rotation_is_dropped(changes, new, source, tmp_path):
    """DroPE: the first loss is that of the checkpoint's parameters without the rotary entry."""
    config = new(changes, initial_checkpoint=source(changes))
    config.position.relative = ()
    train(config, str(tmp_path), stop_at=1)
    expected = reference_loss(tmp_path, source(changes))
    assert first_loss(tmp_path) == pytest.approx(expected, abs=2e-5)
    train(new(changes, initial_checkpoint=source(changes)), str(tmp_path / "kept"), stop_at=1)
    assert abs(first_loss(tmp_path / "kept") - expected) > 1e-3


def first_loss(workdir) -> float:
    return read_metrics(workdir)[0]["loss"]


def reference_loss(workdir, source) -> float:
    """The loss of a run's first batch under its config with the parameters of a source, in float64."""
    meta, _ = checkpoint.load(workdir)
    _, params = checkpoint.load(source)
    batches = Batches(meta.config, meta.tokenizer)
    batch = next(batches)
    batches.close()
    inputs = {name: batch[name] for name in ("tokens", "position", "segment", "offset")}
    logits = reference.logits(meta.config, params, inputs)
    logits -= logits.max(axis=-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]
    return -(chosen * batch["weights"]).sum() / batch["weights"].sum()


def test_resuming_goes_on_from_the_runs_own_checkpoint(new, source, tmp_path, capsys):
    begun = shutil.copytree(source(ROPE), tmp_path / "begun")
    config = new(BIPE, initial_checkpoint=str(begun))
    assert train(config, str(tmp_path / "whole"))
    assert not train(config, str(tmp_path / "cut"), stop_at=3)
    shutil.rmtree(begun)
    capsys.readouterr()
    assert train(config, str(tmp_path / "cut"))
    said = capsys.readouterr().err
    assert "Resuming from step 3" in said and "Starting from" not in said
    assert_same_run(tmp_path / "whole", tmp_path / "cut", config.steps)
    first = read_metrics(tmp_path / "whole")[0]["loss"]
    assert first < read_metrics(source(ROPE))[0]["loss"] - 0.2  # it does not start anew


def test_the_tokenizer_is_the_checkpoints(new, source, texts, tmp_path):
    config = new(ROPE, initial_checkpoint=source(ROPE))
    config.tokenizer.path = ""
    train(config, str(tmp_path / "run"), stop_at=1)
    assert not (tmp_path / "run" / "tokenizer.model").exists()
    theirs, ours = (checkpoint.load(path)[0] for path in (source(ROPE), tmp_path / "run"))
    assert ours.tokenizer.model == theirs.tokenizer.model
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer.train(texts[:15], 512, 100_000).model)
    config.tokenizer.path = str(other)
    with pytest.raises(UserError, match=r"other\.model' is another one than the check"):
        train(config, str(tmp_path / "other"))


@pytest.fixture
def refuse(monkeypatch, tmp_path):
    """The line that a run is refused with, before anything is compiled."""

    def compiled(*_):
        pytest.fail("compiled")

    def line(config):
        plan.make(config)
        with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
            patch.setattr(trainer, "compile_on", compiled)
            train(config, str(tmp_path / "refused"))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return line


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.layers", 3),
        ("model.width", 64),
        ("model.heads", 4),
        ("model.kv_heads", 1),
        ("model.feed_forward", 32),
        ("model.vocab_size", 600),
        ("model.tied_output", True),
        ("model.norm_epsilon", 1e-6),
    ],
)
def test_another_model_is_refused_with_both_values(field, value, new, source, refuse):
    config = new(ROPE, {field: value}, initial_checkpoint=source(ROPE))
    if field == "model.heads":
        config.model.kv_heads = 2
    before = new(ROPE)
    for part in field.split("."):
        before = before[part]
    line = refuse(config)
    assert f"config.{field}={value!r}" in line and f"trained with {before!r}" in line
    assert f"config.initial_checkpoint={source(ROPE)}" in line


@pytest.mark.slow
def test_a_table_keeps_its_trained_size_only_if_the_config_says_so(new, source, refuse):
    longer = new(BIPE, sequence_length=64, initial_checkpoint=source(BIPE))
    line = refuse(longer)
    assert "table of offset has 64 rows" in line and "but 32 in config.initial_checkpoint=" in line
    assert "give that entry ('size', 32)" in line
    longer.position.absolute = (("learned", "offset", ("size", 32)),)
    assert finetune.source(plan.make(longer)).step == 6
    shorter = new(OF_POSITION, sequence_length=16, loss_chunk=16)
    shorter.initial_checkpoint = source(OF_POSITION)
    assert "give that entry ('size', 32)" in refuse(shorter)
    longer = new(OF_POSITION, sequence_length=64, initial_checkpoint=source(OF_POSITION))
    assert "set config.sequence_length to at most 32, or leave that table out" in refuse(longer)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_that_is_not_whole_is_refused(new, source, refuse, tmp_path):
    config = new(ROPE, initial_checkpoint=str(tmp_path / "none"))
    assert refuse(config) == f"checkpoint {tmp_path}/none: no such directory"
    (tmp_path / "none" / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir(parents=True)
    assert "none: no complete checkpoint" in refuse(config)
    for part in ("config", "tokenizer", "params/ocdbt.process_0", "params/_METADATA"):
        damaged = shutil.copytree(f"{source(ROPE)}/checkpoints", tmp_path / part / "checkpoints")
        for path in damaged.glob(f"*/{part}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        config.initial_checkpoint = str(tmp_path / part)
        with pytest.raises(
            UserError, match=f"checkpoint {tmp_path / part}: step 6 is damaged"
        ) as e:
            checkpoint.load(config.initial_checkpoint)
        assert "\n" not in str(e.value)
        del e
        gc.collect()  # here: Orbax leaves coroutines behind that complain as they go
    # Parameters that are not those of the config beside them.
    meta, params = checkpoint.load(source(ROPE))
    config.model.layers = 3
    state = {"step": np.int32(1), "params": params, "optimizer": {"count": np.int32(1)}}
    with checkpoint.Checkpoints(tmp_path / "odd", 1, 1) as checkpoints:
        checkpoints.save(state, {}, meta.config.replace({"model.layers": 3}), meta.tokenizer, {})
    config.initial_checkpoint = str(tmp_path / "odd")
    assert "layers/attention/key has the shape (2, 32, 2, 16), the model's has (3, " in refuse(
        config
    )


@pytest.mark.slow
def test_eight_devices_start_from_what_one_saved(new, source, command, tmp_path):
    config = new(BIPE, NO_UPDATE, initial_checkpoint=source(ROPE))
    arguments = {
        "config.position.absolute": "(('learned','offset'),)",
        "config.tokenizer.path": config.tokenizer.path,
        "config.data.train": config.data.train,
        "config.initial_checkpoint": source(ROPE),
        "config.optimizer.learning_rate": "1e-30",
        "config.mesh.fsdp": 2,
        "config.mesh.tensor": 2,
        "workdir": tmp_path,
        "stop_at": 1,
    }
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = command(
        "train",
        "--config=configs/smoke.py",
        *(f"--{name}={value}" for name, value in arguments.items()),
        env=os.environ | {"XLA_FLAGS": flags},
    )
    assert done.returncode == errors.PREEMPTED, done.stderr
    assert "Starting from step 6" in done.stderr
    found = named(checkpoint.load(tmp_path)[1])  # on one device, what eight saved
    assert found.pop(TABLE).shape == (32, 32)
    assert_equal(found, named(read_checkpoint(source(ROPE), 6)["params"]))
