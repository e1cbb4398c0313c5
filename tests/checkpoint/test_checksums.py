"""Checksums of checkpoints: written, verified, set aside when wrong, and agreed with by sha256sum."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from paths import ROOT

from bipe_jax import checkpoint
from bipe_jax.checkpoint import Checkpoints, checksums
from bipe_jax.errors import UserError
from bipe_jax.training.trainer import train
from tests.training.test_train import assert_same_run

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer_file, shards, held_out):
    """A workdir with the checkpoints 5, 10 and 15, to be copied."""
    from configs import smoke

    config = smoke.get_config()
    config.tokenizer.path = tokenizer_file
    config.data.train, config.data.evaluation = shards, held_out
    config.data.shuffle_blocks = 16
    config.checkpoint.every = 5
    workdir = tmp_path_factory.mktemp("trained")
    train(config, str(workdir), stop_at=15)
    return config, workdir


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained[1], tmp_path / "run"))


def files(directory) -> list[str]:
    found = [
        os.path.relpath(os.path.join(d, name), directory)
        for d, _, names in os.walk(directory)
        for name in names
    ]
    return sorted(found)


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def verify(path):
    line = [sys.executable, "-m", "bipe_jax.checkpoint", "verify", str(path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_sha256sum_agrees_and_nothing_of_the_model_is_left_out(copy):
    step = copy / "checkpoints" / "15"
    subprocess.run(
        ["sha256sum", "--quiet", "--strict", "--check", checksums.NAME], cwd=step, check=True
    )
    named = {name for name, _ in checksums.read(step)}
    left_out = set(files(step)) - named
    assert {os.path.basename(name) for name in left_out} <= {
        checksums.NAME, "_CHECKPOINT_METADATA", "commit_success.txt",
    }  # fmt: skip
    assert any(name.startswith("params/") for name in named)
    assert any(name.startswith("data/") for name in named)


@pytest.mark.slow
def test_verify_says_of_each_checkpoint_whether_it_is_intact_and_nothing_else(copy):
    assert verify(copy) == (0, "step 5: intact\nstep 10: intact\nstep 15: intact\n", "")
    steps = copy / "checkpoints"
    flip(steps / "10" / "params" / "_METADATA")
    (steps / "15" / "data" / "metadata").unlink()
    (steps / "5" / checksums.NAME).unlink()
    (steps / "7.orbax-checkpoint-tmp").mkdir()  # a save under way
    code, out, err = verify(copy)
    assert code == 1
    assert out.splitlines() == [
        "step 5: intact, without checksums.sha256",
        "step 10: damaged",
        "  params/_METADATA is not what was written",
        "step 15: damaged",
        "  data/metadata is missing",
    ]
    assert err == f"error: {steps}: 2 of 3 checkpoints are damaged\n"
    assert verify(steps / "5")[0] == 0
    assert verify(steps / "15")[1:2] == ("step 15: damaged\n  data/metadata is missing\n",)
    assert (steps / "7.orbax-checkpoint-tmp").exists()


@pytest.mark.parametrize("path", ["none", "."])
def test_verify_of_what_holds_no_checkpoint_is_one_line(tmp_path, path):
    code, out, err = verify(tmp_path / path)
    assert (code, out) == (1, "")
    assert err.startswith("error: checkpoint ") and len(err.splitlines()) == 1


def test_every_flipped_bit_and_every_missing_byte_is_seen(copy):
    step = copy / "checkpoints" / "15"
    for name in files(step):
        if os.path.basename(name) in checksums._LEFT_OUT:
            continue
        path = step / name
        good = path.read_bytes()
        if good:
            flip(path)
            assert checksums.verify(step) == [f"{name} is not what was written"]
            path.write_bytes(good[:-1])
            assert checksums.verify(step) == [f"{name} is not what was written"]
        path.unlink()
        assert checksums.verify(step) == [f"{name} is missing"]
        path.write_bytes(good)
    assert checksums.verify(step) == []


def test_every_cut_of_the_checksums_is_seen(copy):
    step = copy / "checkpoints" / "15"
    path = step / checksums.NAME
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        assert checksums.verify(step) == [f"{checksums.NAME} is cut off or damaged"], length
    path.write_bytes(b"\xff" + good[1:])
    assert checksums.verify(step)


@pytest.mark.parametrize("harm", ["flip", *map(slow, ("cut", "delete")), "cut the checksums"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_gone_on_from(
    trained, copy, harm, capsys, tmp_path
):
    config, workdir = trained
    step = copy / "checkpoints" / "15"
    path = max((step / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    if harm == "flip":
        flip(path)
    elif harm == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif harm == "delete":
        path.unlink()
    else:
        os.truncate(step / checksums.NAME, 300)
    assert train(config, str(copy))
    said = capsys.readouterr().err
    assert f"{step} is damaged (" in said and "set aside as 15.damaged" in said
    assert "Resuming from step 10 of" in said
    assert (copy / "checkpoints" / "15.damaged").is_dir()
    whole = shutil.copytree(workdir, tmp_path / "whole")
    assert train(config, str(whole))
    assert_same_run(whole, copy, config.steps)


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "commit_success.txt", checksums.NAME])
@pytest.mark.parametrize("harm", ["flip", *map(slow, ("empty", "delete"))])
def test_files_that_have_no_checksum_are_not_needed_to_go_on(trained, copy, name, harm, tmp_path):
    path = copy / "checkpoints" / "15" / name
    if not path.exists():
        pytest.skip("Orbax does not write it here")
    if harm == "delete":
        path.unlink()
    elif harm == "empty":
        path.write_bytes(b"")
    else:
        flip(path) if path.stat().st_size else path.write_bytes(b"x")
    config, workdir = trained
    assert train(config, str(copy))
    whole = shutil.copytree(workdir, tmp_path / "whole")
    assert train(config, str(whole))
    assert_same_run(whole, copy, config.steps)


def test_when_all_are_damaged_the_run_says_so_and_deletes_nothing(trained, copy):
    steps = copy / "checkpoints"
    for step in (5, 10, 15):
        flip(steps / str(step) / "config" / "metadata")
    with pytest.raises(
        UserError, match=r"all checkpoints in .* are damaged: look at .*15\.damaged"
    ):
        train(trained[0], str(copy))
    assert sorted(os.listdir(steps)) == ["10.damaged", "15.damaged", "5.damaged"]


def test_a_model_without_checksums_is_read(trained, copy):
    """As those of other projects are, and of earlier versions."""
    for step in (5, 10, 15):
        (copy / "checkpoints" / str(step) / checksums.NAME).unlink()
    assert checkpoint.load(copy)[0].step == 15
    assert train(trained[0], str(copy))


def test_verify_restores_also_what_has_no_checksums(copy):
    step = copy / "checkpoints" / "5"
    (step / checksums.NAME).unlink()
    flip(step / "optimizer" / "_METADATA")
    code, out, _ = verify(step)
    assert code == 1 and out.splitlines()[0] == "step 5: damaged, without checksums.sha256"


@pytest.mark.parametrize("every", [5, slow(1000)])
def test_the_first_checkpoint_of_a_run_is_read_back(trained, tmp_path, monkeypatch, every):
    """On a disk that keeps something else than what was written: the largest file is empty there."""
    config, _ = trained
    with config.unlocked():
        config = config.copy_and_resolve_references()
    config.checkpoint.every = every
    written = Checkpoints._add_checksums

    def ruin(self):
        written(self)
        (unfinished,) = (found.get() for found in ocp.utils.tmp_checkpoints(self.directory))
        arrays = [path for path in Path(unfinished).rglob("d/*") if path.parts[-3] != "data"]
        largest = max(arrays, key=lambda path: path.stat().st_size)
        largest.write_bytes(b"")

    monkeypatch.setattr(Checkpoints, "_add_checksums", ruin)
    with pytest.raises(UserError, match="first checkpoint cannot be read back"):
        train(config, str(tmp_path), stop_at=12)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["5" if every == 5 else "12"]
    monkeypatch.undo()
    other = tmp_path / "other"
    assert not train(config, str(other), stop_at=12)


STRAY = {
    "empty": lambda path: path.mkdir(),
    "of some file": lambda path: (path.mkdir(), (path / "x").write_text("x")),
    "a file": lambda path: path.write_text("x"),
}


@pytest.mark.parametrize("name", ["99999", "007", "\u0663\u0660"])
@pytest.mark.parametrize("make", STRAY.values(), ids=STRAY)
def test_what_is_only_called_as_a_step_is_no_checkpoint(trained, copy, name, make, caplog):
    config, _ = trained
    steps = copy / "checkpoints"
    make(steps / name)
    assert checkpoint.steps(copy) == [5, 10, 15]
    assert checkpoint.load(copy)[0].step == 15
    with config.unlocked():
        config = config.copy_and_resolve_references()
    config.checkpoint.keep, config.steps = 3, 20
    assert train(config, str(copy))
    assert sorted(os.listdir(steps)) == sorted(["10", "15", "20", f"{name}.stray"])
    assert f"{name} is no checkpoint: set aside as {name}.stray" in caplog.text


@pytest.mark.parametrize("more", [False, True])
def test_what_is_left_of_a_checkpoint_that_was_being_deleted_is_removed(trained, copy, more):
    """Not what has other files, which nobody deleted for `keep`."""
    config, _ = trained
    with config.unlocked():
        config = config.copy_and_resolve_references()
    config.checkpoint.keep = 2
    steps = copy / "checkpoints"
    for item in ("params", "config"):
        shutil.rmtree(steps / "5" / item)
    if more:
        (steps / "5" / "notes.txt").write_text("mine")
    train(config, str(copy), stop_at=15)
    assert sorted(os.listdir(steps)) == sorted(["10", "15", *["5.stray"] * more])


@pytest.mark.parametrize("name", ["exp[lr=3e-4]", "a*", "a?", "a\\b"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused_at_once(trained, tmp_path, name):
    config, _ = trained
    with pytest.raises(UserError, match="choose another path"):
        train(config, str(tmp_path / name / "run"))
    assert not (tmp_path / name / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["a b", "{a,b}", "a#b%20\u00fc", "it's", "-x"])
def test_other_paths_can_be_saved_to_and_read(trained, tmp_path, name):
    meta, params = checkpoint.load(trained[1])
    checkpoint.save_model(tmp_path / name, meta.config, params, meta.tokenizer)
    assert checkpoint.load(tmp_path / name)[0].config == meta.config


@pytest.mark.slow
def test_a_copy_of_another_step_is_seen(trained, copy):
    config, _ = trained
    steps = copy / "checkpoints"
    shutil.copytree(steps / "10", steps / "60")
    code, out, _ = verify(copy)
    assert code == 1 and out.endswith("step 60: damaged\n  it is a copy of step 10\n")
    train(config, str(copy), stop_at=16)
    assert sorted(os.listdir(steps)) == ["10", "15", "16", "60.damaged"]
    # Lists of earlier versions do not name the step.
    listed = steps / "15" / checksums.NAME
    listed.write_text(listed.read_text().replace("# step: 15\n", ""))
    assert verify(steps / "15")[:2] == (0, "step 15: intact\n")
