"""What a config needs, and what launchers refuse since a run would lack it."""

import os
import re
import subprocess
import sys

import pages
import pytest
from paths import ROOT

from bipe_jax import cli, plan
from bipe_jax.config import needs
from bipe_jax.errors import UserError
from launch import buckets, gke, inputs, jobs, machines, sky, slurm, sweep
from launch.inputs import LOCAL, Place
from launch.tpu_vm import __main__ as tpu_vm

BIG = "configs/bipe_rope_1b6.py"


def config_of(*overrides, config="configs/smoke.py"):
    return plan.make(cli.read_config([f"--config={config}", *overrides]))


def test_needs_of_a_config():
    found = needs.of(
        config_of(
            "--config.data.train=a/*.jsonl,gs://b/*.zst@0.5; s3://c/x.jsonl#Github|ArXiv@0.5",
            "--config.data.evaluation=tfds:/disk/pg19:test",
            "--config.tokenizer.path=llama.model",
            "--config.initial_checkpoint=gs://b/run",
            "--config.segments.rule=pysbd:en",
            "--config.log.wandb=project",
        )
    )
    assert [(file.field.removeprefix("config."), file.path) for file in found.files] == [
        ("data.train", "a/*.jsonl"),
        ("data.train", "gs://b/*.zst"),
        ("data.train", "s3://c/x.jsonl"),
        ("data.evaluation", "/disk/pg19"),
        ("tokenizer.path", "llama.model"),
        ("initial_checkpoint", "gs://b/run"),
    ]
    assert found.extras == ("gcs", "pysbd", "s3", "wandb")
    assert "WANDB_API_KEY" in found.variables and not found.tokenizer

    found = needs.of(config_of())
    assert (found.files, found.extras, found.variables) == ((), ("quickstart",), ())
    found = needs.of(
        config_of("--config.data.train=prepared:gs://b/p/", "--config.data.evaluation=x")
    )
    assert found.files[0].path == "gs://b/p/tokenizer.model"
    assert needs.of(config_of("--config.data.train=tfds:lm1b")).files == ()


def test_extras_are_those_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("[tool")[0]
    assert set(needs._MODULES) <= set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))


@pytest.mark.parametrize(
    "overrides, refused",
    [
        ([], True),  # 32000 pieces of 4 MB
        (["--config.tokenizer.train_bytes=6_400_000"], False),
        (["--config.tokenizer.path=x.model"], False),
        (["--config.initial_checkpoint=runs/x"], False),
        (["--config.data.train=prepared:p"], False),
        (["--config.model.vocab_size=20000"], False),
    ],
)
def test_a_large_vocabulary_needs_a_tokenizer_or_text(overrides, refused):
    said = needs.of(config_of(*overrides, config=BIG)).tokenizer
    assert ("train_bytes to at least 6400000" in said) == refused


def test_a_run_that_has_its_tokenizer_needs_no_other(tmp_path):
    text = tmp_path / "a.jsonl"
    text.touch()
    config = config_of(
        f"--config.data.train={text}", f"--config.data.evaluation={text}", config=BIG
    )
    with pytest.raises(UserError, match=r"tokenizer\.path is empty"):
        inputs.check(config, LOCAL, {}, str(tmp_path))
    (tmp_path / "tokenizer.model").touch()
    inputs.check(config, LOCAL, {}, str(tmp_path))
    with pytest.raises(UserError, match=r"tokenizer\.path is empty"):  # of a disk that is not here
        inputs.check(config, Place("the commit"), {}, str(tmp_path))


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A gcloud and an aws that list what is in TMP/gs and TMP/s3, by their documented answers."""
    buckets.look.cache_clear()
    path = tmp_path / "programs"
    path.mkdir()
    (path / "gcloud").write_text(
        f"""#!{sys.executable} -S
import glob, os, sys
assert sys.argv[1:3] == ["storage", "ls"], sys.argv
if os.path.exists({str(tmp_path / "offline")!r}):
    sys.exit("ERROR: (gcloud.storage.ls) You do not currently have an active account selected.")
url = sys.argv[3]
found = glob.glob({str(tmp_path)!r} + "/gs/" + url.removeprefix("gs://"))
if not found:
    sys.exit("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
print(*found, sep="\\n")
"""
    )
    (path / "aws").write_text(
        f"""#!{sys.executable} -S
import os, sys
assert sys.argv[1:3] == ["s3", "ls"], sys.argv
bucket, _, prefix = sys.argv[3].removeprefix("s3://").partition("/")
if not os.path.isdir({str(tmp_path)!r} + "/s3/" + bucket):
    sys.exit("An error occurred (NoSuchBucket) when calling the ListObjectsV2 operation")
directory, _, begin = (bucket + "/" + prefix).rpartition("/")
root = {str(tmp_path)!r} + "/s3/" + directory
names = [n for n in os.listdir(root) if n.startswith(begin)] if os.path.isdir(root) else []
for name in names:
    inside = os.path.isdir(os.path.join(root, name))
    print(f"{{'':27}}PRE {{name}}/" if inside else f"2026-01-01 00:00:00 {{7:10}} {{name}}")
sys.exit(0 if names else 1)
"""
    )
    for name in ("gcloud", "aws"):
        (path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{path}{os.pathsep}{os.environ['PATH']}")
    for file in ("gs/b/pile/00.zst", "gs/b/llama.model", "s3/b/pile/00 a.zst", "s3/b/pile/01.gz"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    return tmp_path


@pytest.mark.parametrize(
    "path, there",
    [
        ("gs://b/pile/*.zst", True),
        ("gs://b/pile/*.gz", False),
        ("gs://c/x", False),
        ("s3://b/pile/*.zst", True),
        ("s3://b/pile/0*.gz", True),
        ("s3://b/pile/0*.jsonl", False),
        ("s3://b/pile/00 a.zst", True),
        ("s3://b/pile/00", False),  # a prefix is not a file
        ("s3://b/pile", True),
        ("s3://b/piles", False),
        ("s3://c/x", False),
    ],
)
def test_buckets_are_looked_into(programs, path, there):
    assert buckets.look(path) == there


def test_what_cannot_be_seen_is_said_and_not_refused(programs, caplog, monkeypatch):
    (programs / "offline").touch()
    config = config_of(
        "--config.data.train=gs://b/no.jsonl", "--config.tokenizer.path=/disk/x.model"
    )
    inputs.check(config, Place("the commit", lambda path: False), {}, "/nowhere")
    assert "config.data.train=gs://b/no.jsonl cannot be seen from here: not checked" in caplog.text
    assert "config.tokenizer.path=/disk/x.model cannot be seen" in caplog.text
    buckets.look.cache_clear()
    monkeypatch.setenv("PATH", str(programs))  # without the programs
    assert buckets.look("gs://b/no.jsonl") is None and buckets.look("s3://b/no") is None


def test_each_place_has_its_own_files(programs, monkeypatch, tmp_path):
    work = tmp_path / "work"
    for file in ("texts/a.jsonl", "runs/b.jsonl", "new/c.jsonl", "old.jsonl", ".hidden/d.jsonl"):
        (work / file).parent.mkdir(parents=True, exist_ok=True)
        (work / file).touch()
    (work / ".gitignore").write_text("runs/\n")
    monkeypatch.chdir(work)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "texts", "old.jsonl", ".gitignore"], check=True)

    def seen(place):
        paths = [
            "texts/*.jsonl",
            "./texts",
            "runs/*.jsonl",
            "new/c.jsonl",
            "old.jsonl",
            "gone.jsonl",
        ]
        return [place.look(path) for path in [*paths, ".hidden/d.jsonl", "../work/old.jsonl"]]

    assert seen(LOCAL) == [True] * 5 + [False] + [True] * 2
    assert seen(Place(gets=inputs.commit())) == [
        True,
        True,
        False,
        False,
        True,
        False,
        False,
        False,
    ]
    assert seen(Place(gets=inputs.not_ignored())) == [True] * 2 + [False] + [True] * 2 + [
        False, True, False,
    ]  # fmt: skip
    assert seen(Place(gets=inputs.image())) == [True] * 2 + [False] + [True] * 2 + [False] * 3
    mounted = Place("x", volumes=[("gs://b", "/runs"), ("claim", "/disk")], others=False)
    paths = ["/runs/pile/*.zst", "/runs/no", "/disk/x", "/runsx/y", "/elsewhere"]
    assert [mounted.look(path) for path in paths] == [True, False, None, False, False]
    assert LOCAL.look(f"{work}/old.jsonl") and LOCAL.look(f"{work}/new.jsonl") is False
    assert LOCAL.look("/no-such-disk/x") is None  # of the nodes, perhaps


def test_wandb_needs_a_key(monkeypatch, tmp_path):
    config = config_of("--config.log.wandb=p")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("BIPE_PYTHON", "other")  # whose packages are not known
    for name in needs.of(config).variables:
        monkeypatch.delenv(name, raising=False)
    far = Place("the commit")
    for place in (far, LOCAL):
        with pytest.raises(
            UserError, match=r"log\.wandb='p': the run would have no key: .*--env=WANDB"
        ):
            inputs.check(config, place, {"OTHER": "1"}, "/nowhere")
        inputs.check(config, place, {"WANDB_MODE": "offline"}, "/nowhere")
    inputs.check(config, far, None, "/nowhere")  # a Secret of the cluster
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    inputs.check(config, LOCAL, {}, "/nowhere")
    monkeypatch.setenv("WANDB_API_KEY", "key")
    with pytest.raises(UserError, match="no key"):  # it stays on this machine
        inputs.check(config, far, {}, "/nowhere")


# Every launcher.

TPU = ["--slice=v5e:16x16", "--skip-preflight"]
LAUNCHERS = {
    "gke": lambda job: gke.submit([job], [*TPU, "--volume=v:/mnt/x", "--image=x"], dry_run=True),
    "sky": lambda job: sky.submit([job], [*TPU, "--volume=v:/mnt/x"], dry_run=True),
    "slurm": lambda job: slurm.submit_one(job, [], {}, dry_run=True),
    "tpu_vm": lambda job: tpu_vm.main(
        ["create", "x", "--zone=us-west4-a", *TPU, "--dry-run", *job.arguments()]
    ),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    "overrides, says",
    [
        ({}, r"config\.data\.train=pile/train/\*\.jsonl\.zst: "),
        ({"data.train": "gs://b/no*"}, r"config\.data\.train=gs://b/no\*: there is no such object"),
        (
            {"data.train": "gs://b/pile/*", "data.evaluation": "gs://b/pile/*"},
            r"config\.tokenizer\.path is empty",
        ),
    ],
)
def test_every_launcher_refuses_a_job_that_cannot_run(
    launcher, overrides, says, programs, monkeypatch, capsys
):
    monkeypatch.setattr(sys.modules["launch.tpu_vm.actions"], "commit_of", lambda config: "0")
    job = jobs.Job(BIG, "/mnt/x/run", tuple(overrides.items()), "run")
    with pytest.raises(UserError, match=says + ".*nothing was launched"):
        LAUNCHERS[launcher](job)
    assert not capsys.readouterr().out


def test_a_local_sweep_refuses_it_too(tmp_path):
    (tmp_path / "sweep.py").write_text("def get_sweep():\n  return [{'seed': 0}, {'seed': 1}]\n")
    line = [f"--config={BIG}", f"--sweep={tmp_path}/sweep.py", f"--output={tmp_path}/out"]
    with pytest.raises(UserError, match=r"config\.data\.train=.*there is no such file"):
        sweep.main(line)
    assert not (tmp_path / "out").exists()


COMMANDS = [
    command.words[2:]
    for command in pages.commands()
    if command.words[2:3] in (("launch.tpu_vm",), ("launch.gke",), ("launch.sky",))
    and any(word.startswith("--config=") for word in command.words)
]


def test_the_docs_have_commands_of_all_launchers_for_clouds():
    assert {launcher for launcher, *_ in COMMANDS} == {"launch.tpu_vm", "launch.gke", "launch.sky"}
    assert len(COMMANDS) > 5


@pytest.mark.parametrize("words", COMMANDS)
def test_the_commands_of_the_docs_name_all_that_their_runs_need(words):
    job = machines.job_of([word for word in words if re.match("--(config|workdir)", word)])
    needed = needs.of(plan.make(cli.read_config(job.config_arguments())))
    assert needed.files and all(file.path.startswith("gs://") for file in needed.files)
    assert not needed.tokenizer


def test_the_trainer_asks_for_extras_before_anything_else(monkeypatch):
    monkeypatch.setitem(needs._MODULES, "quickstart", "no_such_module")
    monkeypatch.setitem(needs._MODULES, "wandb", "no_such_module")
    with pytest.raises(
        UserError, match=r"'quickstart', 'wandb': pip install 'bipe-jax\[quickstart,wandb\]'"
    ):
        needs.check_installed(config_of("--config.log.wandb=p"))
    needs.check_installed(config_of("--config.data.train=a", "--config.data.evaluation=a"))
