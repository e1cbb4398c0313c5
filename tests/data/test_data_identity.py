"""Shards are recognised by their content: when a run resumes, and where it is evaluated."""

import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zstandard
from tiny import tiny_plan

from bipe_jax import checkpoint, plan
from bipe_jax.config.spec import parse_source
from bipe_jax.data import identity, prepare, reframe
from bipe_jax.data import shards as files
from bipe_jax.data.held_out import check
from bipe_jax.data.sources import Policy, open_source
from bipe_jax.errors import UserError
from bipe_jax.training.trainer import train


def write(path: Path, texts) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def data(tmp_path, texts):
    """A directory of three shards of eight documents each."""
    for i in range(3):
        write(tmp_path / "data" / f"{i}.jsonl", [text[:900] for text in texts[8 * i : 8 * i + 8]])
    return tmp_path / "data"


@pytest.fixture
def begun(config, data, tmp_path):
    """The config of a run that has trained 4 of 8 steps, and a function that resumes it."""
    config.data.train, config.steps, config.checkpoint.every = f"{data}/*.jsonl", 8, 4
    config.evaluation.lengths = ()
    train(config, str(tmp_path / "run"), stop_at=4)

    def resume(**changes) -> dict:
        """Returns the step and loss of each line of its metrics."""
        workdir = tmp_path / "resumed"
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(tmp_path / "run", workdir)
        with config.unlocked():
            changed = config.copy_and_resolve_references()
        for name, value in changes.items():
            changed.data[name] = value
        assert train(changed, str(workdir))
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return {line["step"]: line["loss"] for line in map(json.loads, lines)}

    return resume


def test_a_run_resumes_with_its_data_elsewhere(begun, data, tmp_path):
    """Also if the shards have other names, and so another order."""
    undisturbed = begun()
    assert len(undisturbed) == 8
    moved = tmp_path / "moved"
    moved.mkdir()
    for i, name in enumerate(("z", "a", "m")):
        (data / f"{i}.jsonl").rename(moved / f"{name}.jsonl")
    assert begun(train=f"{moved}/*.jsonl") == undisturbed
    meta, _ = checkpoint.load(tmp_path / "resumed")
    assert [shard.path for shard in meta.config.shards[0]] == [f"{moved}/{n}.jsonl" for n in "zam"]
    with pytest.raises(UserError, match=r"config\.data\.train=.* was started with"):
        begun(train=f"{moved}/z.jsonl@1; {moved}/[am].jsonl@1")
    with pytest.raises(UserError, match=r"config\.data\.train=.* was started with"):
        begun(train=f"{moved}/*.jsonl#A")


def rename(data):
    (data / "1.jsonl").rename(data / "other.txt")


def swap(data):
    """Reorders the documents of a shard, which keeps its size."""
    lines = (data / "1.jsonl").read_text().splitlines(keepends=True)
    (data / "1.jsonl").write_text("".join(lines[::-1]))


CHANGES = {
    "removed": (rename, r"1 of 3 shards are missing \(1\.jsonl\)"),
    "added": (lambda data: write(data / "3.jsonl", ["new"]), r"1 of 3 shards are new \(3\.jsonl\)"),
    "appended to": (
        lambda data: write(data / "2.jsonl", [(data / "2.jsonl").read_text(), "more"]),
        r"1 of 3 shards are changed \(2\.jsonl\)",
    ),
    "reordered": (swap, r"1 of 3 shards are changed \(1\.jsonl\)"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_data_is_refused_or_accepted_by_choice(begun, data, change, message):
    change(data)
    with pytest.raises(UserError, match=message) as caught:
        begun()
    assert "config.data.on_change='continue'" in str(caught.value)
    losses = begun(on_change="restart")
    assert len(losses) == 8 and np.isfinite(list(losses.values())).all()
    if "changed" in message:
        assert len(begun(on_change="continue")) == 8
    else:
        with pytest.raises(UserError, match=message):
            begun(on_change="continue")


def test_a_shard_that_was_repaired(begun, data, tmp_path):
    """What was damaged when the run was started may be put right, by choice."""
    undisturbed = begun()
    good = (data / "1.jsonl").read_bytes()
    (data / "1.jsonl").write_bytes(good + b"\n")
    with pytest.raises(UserError, match=r"1 of 3 shards are changed"):
        begun()
    assert begun(on_change="continue") == undisturbed
    (data / "1.jsonl").unlink()
    (data / "1.jsonl").mkdir()
    with pytest.raises(UserError, match=r"1 of 3 shards are missing \(1\.jsonl\)"):
        begun()


def test_a_missing_shard_is_a_fault_that_may_be_skipped(begun, data):
    undisturbed = begun()
    rename(data)
    losses = begun(on_error="skip", max_bad_share=0.5)
    assert [losses[i] for i in range(1, 5)] == [undisturbed[i] for i in range(1, 5)]


@pytest.mark.slow
def test_another_preparation_in_the_same_place_is_seen(config, data, tokenizer_file, tmp_path):
    def prepared(name):
        shutil.rmtree(tmp_path / "p", ignore_errors=True)
        prepare.prepare(f"{data}/{name}.jsonl", str(tmp_path / "p"), tokenizer_file, 32, workers=1)

    prepared(0)
    config.data.train, config.sequence_length = f"prepared:{tmp_path}/p", 32
    train(config, str(tmp_path / "run"), stop_at=4)
    shutil.move(tmp_path / "p", tmp_path / "q")
    config.data.train = f"prepared:{tmp_path}/q"
    train(config, str(tmp_path / "run"), stop_at=8)
    prepared(1)
    config.data.train = f"prepared:{tmp_path}/p"
    with pytest.raises(UserError, match=r"have changed: .* shards are changed"):
        train(config, str(tmp_path / "run"))


def test_numbered_shards_that_are_missing(tmp_path):
    for i in (0, 2, 3):
        write(tmp_path / f"a-0000{i}-of-00005.jsonl", [str(i)])
    write(tmp_path / "b-00000-of-00001.jsonl", ["b"])
    names = [Path(path).name for path in files.find(f"{tmp_path}/*.jsonl")]
    assert names == [f"a-0000{i}-of-00005.jsonl" for i in range(5)] + ["b-00000-of-00001.jsonl"]
    source = parse_source(f"{tmp_path}/*.jsonl")
    with pytest.raises(UserError, match=r"2 of 6 shards are missing, such as .*a-00001-of-00005"):
        open_source(source)
    assert len(open_source(source, policy=Policy("skip", 0.5)).shards) == 6
    # A glob of some shards means those alone.
    assert len(open_source(parse_source(f"{tmp_path}/a-0000[023]-of-*.jsonl")).shards) == 3


def test_pieces_of_large_files_are_compared(tmp_path):
    data = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(data)
    a, b = identity.of_source(parse_source(f"{tmp_path}/*"))
    assert a == b and (a.size, a.path) == (3_000_000, f"{tmp_path}/a")
    for at in (0, 65_535, 1_000_000, 2_000_000, 2_999_999):
        other = bytearray(data)
        other[at] ^= 1
        (tmp_path / "b").write_bytes(other)
        assert identity.of_source(parse_source(f"{tmp_path}/b"))[0] != a


def held_out_of(train: str, evaluation: str, **changes) -> None:
    config = tiny_plan(data__train=train, data__evaluation=evaluation, **changes)
    check(config.with_shards(tuple(map(identity.of_source, config.training.sources))))


def as_compressed(path: Path, directory: Path) -> str:
    (directory / "c.jsonl.zst").write_bytes(zstandard.compress(path.read_bytes()))
    return f"{directory}/c.jsonl.zst"


def as_gzip(path: Path, directory: Path) -> str:
    (directory / "c.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    return f"{directory}/c.jsonl.gz"


def as_copy(path: Path, directory: Path) -> str:
    return str(shutil.copy(path, directory / "copy.jsonl"))


def as_link(path: Path, directory: Path) -> str:
    os.symlink(path, directory / "link.jsonl")
    return f"{directory}/link.jsonl"


def as_other_spelling(path: Path, directory: Path) -> str:
    return os.path.relpath(path)


def as_reframed(path: Path, directory: Path) -> str:
    reframe.reframe(str(path), str(directory / "reframed"), shards=3)
    return f"{directory}/reframed/*"


def as_other_json(path: Path, directory: Path) -> str:
    documents = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [json.dumps({"id": 1, "meta": None, **d}, ensure_ascii=False) for d in documents]
    (directory / "o.jsonl").write_text("\n".join(lines))
    return f"{directory}/o.jsonl"


@pytest.mark.parametrize(
    "named",
    [as_compressed, as_gzip, as_copy, as_link, as_other_spelling, as_reframed, as_other_json],
)
def test_held_out_text_is_recognised_however_it_is_named(data, tmp_path, named):
    other = named(data / "1.jsonl", tmp_path)
    for sources in ((f"{data}/*.jsonl", other), (other, f"{data}/*.jsonl")):
        with pytest.raises(UserError, match=r"config\.data\.evaluation=.* shares .*held out"):
            held_out_of(*sources)
    (data / "1.jsonl").rename(data / "1.txt")
    if named is not as_link:
        held_out_of(f"{data}/*.jsonl", as_copy(data / "1.txt", tmp_path))


def test_prepared_text_is_recognised(data, tmp_path, tokenizer_file):
    prepare.prepare(f"{data}/[01].jsonl", str(tmp_path / "p"), tokenizer_file, 32, workers=1)
    held_out_of(f"prepared:{tmp_path}/p", f"{data}/2.jsonl")
    for evaluation in (f"{data}/1.jsonl", as_compressed(data / "1.jsonl", tmp_path)):
        with pytest.raises(UserError, match="held out"):
            held_out_of(f"prepared:{tmp_path}/p", evaluation)
    prepare.prepare(f"{data}/1.jsonl", str(tmp_path / "q"), tokenizer_file, 32, workers=1)
    with pytest.raises(UserError, match="held out"):
        held_out_of(f"{data}/*.jsonl", f"prepared:{tmp_path}/q")


def test_a_few_repeated_documents_are_chance(tmp_path):
    """A licence is in every corpus."""
    licence = "Permission is hereby granted, free of charge, to any person obtaining a copy. "
    train = write(tmp_path / "t.jsonl", [licence, *(f"{licence}{i}" for i in range(40))])
    held = write(tmp_path / "e.jsonl", [*(f"{licence}{i}" for i in range(100, 140)), licence])
    held_out_of(str(train), str(held))


def test_the_plan_keeps_its_shards(data):
    config = tiny_plan(data__train=f"{data}/*.jsonl")
    config = config.with_shards(tuple(map(identity.of_source, config.training.sources)))
    saved = json.loads(json.dumps(checkpoint.meta_to_json(config)))
    assert checkpoint.plan_from_json(saved).shards == config.shards
    del saved["shards"]
    assert checkpoint.plan_from_json(saved).shards == ()
    assert isinstance(config.replace({"steps": 3}), plan.Plan)
    assert config.replace({"steps": 3}).shards == config.shards
