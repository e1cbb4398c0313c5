"""Launching on TPU VMs: with a gcloud that plays Google, and the real one, which checks its flags."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from paths import ROOT

from bipe_jax.errors import UserError
from bipe_jax.hardware import parse_slice
from bipe_jax.workdir import Workdir
from launch import machines
from launch.tpu_vm import __main__ as program
from launch.tpu_vm import actions, gcloud, watching, worker

# Plays Google. A queued resource moves on by one state each time that it is described; a VM is a home
# directory in which commands are really run, with a sudo, systemctl, hostname and python3 that play along.
GCLOUD = """
import json, os, shutil, subprocess, sys
root, arguments = os.environ["FAKE_ROOT"], sys.argv[1:]
with open(f"{root}/calls", "a") as file:
    file.write(json.dumps(arguments) + "\\n")
words = [word for word in arguments if not word.startswith("-")]
flags = dict(word[2:].partition("=")[::2] for word in arguments if word.startswith("--"))
group, action, name = words[words.index("tpus") + 1:][:3]
path = f"{root}/resources.json"
resources = json.load(open(path)) if os.path.exists(path) else {}
def save():
    json.dump(resources, open(path, "w"))
def homes(node):
    with open(f"{root}/hosts") as file:
        return [f"{root}/{node}-w-{i}" for i in range(int(file.read()))]
if os.path.exists(f"{root}/broken"):
    sys.exit("ERROR: (gcloud) PERMISSION_DENIED: no")
if group == "queued-resources" and action != "create" and name not in resources:
    sys.exit("ERROR: (gcloud) NOT_FOUND: Resource was not found")
if action == "create":
    if name in resources:
        sys.exit("ERROR: (gcloud) ALREADY_EXISTS")
    states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    resources[name] = {"states": states, "type": flags.get("accelerator-type")}
    count = int(flags.get("node-count", 1))
    nodes = [flags["node-id"]] if count == 1 else [f"{flags['node-prefix']}-{i}" for i in range(count)]
    save()
    for home in [home for node in nodes for home in homes(node)]:
        os.makedirs(home)
        if script := flags.get("metadata-from-file"):
            pairs = dict(pair.split("=") for pair in flags["metadata"].split(","))
            json.dump(pairs, open(f"{home}/metadata", "w"))
            its_own = os.environ | {"HOME": home, "STATE_DIRECTORY": f"{home}/state"}
            subprocess.run(["bash", script.removeprefix("startup-script=")], env=its_own, check=True)
elif action == "describe":
    if os.path.exists(f"{root}/no-role") and os.environ["HOME"].startswith(root):
        sys.exit("ERROR: (gcloud) PERMISSION_DENIED: tpu.nodes.get")
    state = resources[name]["states"][0]
    resources[name]["states"] = resources[name]["states"][1:] or [state]
    save()
    node = {"acceleratorType": resources[name]["type"]}
    print(json.dumps({"state": {"state": state}, "tpu": {"nodeSpec": [{"node": node}]}}))
elif action == "delete":
    if "force" not in flags and resources[name]["states"] != ["SUSPENDED"]:
        sys.exit("ERROR: (gcloud) FAILED_PRECONDITION: it has nodes")
    del resources[name]
    for entry in os.listdir(root):
        if entry.startswith(name) and "-w-" in entry:
            shutil.rmtree(f"{root}/{entry}")
    save()
elif action == "scp":
    *files, node = words[words.index("scp") + 1:]
    for home in homes(node.rstrip(":")):
        for file in files:
            shutil.copy(file, home)
elif action == "ssh":
    if os.path.exists(f"{root}/unreachable"):
        sys.exit("ssh: connect to host: Connection refused")
    all_of_it = homes(name)
    chosen = all_of_it if flags["worker"] == "all" else [all_of_it[int(flags["worker"])]]
    codes = [
        subprocess.run(["bash", "-c", flags["command"]], cwd=home, env=os.environ | {"HOME": home}).returncode
        for home in chosen
    ]
    sys.exit(max(codes))
"""
# The service's state is in ~/service: "ActiveState ExecMainStatus".
SYSTEMCTL = """
import os, sys
path = os.path.expanduser("~/service")
action = sys.argv[1]
active, code = open(path).read().split() if os.path.exists(path) else ("none", "0")
if action == "show":
    print(f"LoadState={'not-found' if active == 'none' else 'loaded'}")
    print(f"ActiveState={active}\\nExecMainStatus={code}\\nExecMainStartTimestampMonotonic=5")
elif action == "is-active":
    timer = sys.argv[-1].endswith(".timer")
    sys.exit(not os.path.exists(os.path.expanduser("~/timer")) if timer else active != "active")
elif action in ("restart", "stop"):
    open(path, "w").write("active 0" if action == "restart" else "inactive 42")
    open(os.path.expanduser("~/started"), "a").write(action + "\\n")
"""
SUDO = """
import os, sys
if sys.argv[1] != "cp":
    os.execvp(sys.argv[1], sys.argv[1:])
"""
# The metadata server of a VM, and what systemd was asked to do later.
CURL = """
import json, os, sys
key = sys.argv[-1].removeprefix("http://metadata.google.internal/computeMetadata/v1/")
known = {"instance/zone": "projects/1/zones/us-west4-a", "project/project-id": "p"}
own = json.load(open(os.path.expanduser("~/metadata")))
print(known.get(key) or own[key.removeprefix("instance/attributes/")])
"""
SYSTEMD_RUN = """
import json, os, sys
json.dump(sys.argv[1:], open(os.path.expanduser("~/timer"), "w"))
"""
HOSTNAME = "import os; print(os.path.basename(os.path.expanduser('~')))"
# `python3 -m pip install --target=DIR uv`: a uv whose environments are this Python.
PYTHON3 = f"""
import os, sys
if sys.argv[1:3] != ["-m", "pip"]:
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
(target,) = [word[9:] for word in sys.argv if word.startswith("--target=")]
os.makedirs(target + "/bin")
with open(target + "/bin/uv", "w") as file:
    file.write('''#!/bin/bash
set -e
if [ "$1" = venv ]; then mkdir -p "${{@: -1}}/bin"; ln -s {sys.executable} "${{@: -1}}/bin/python"; fi
if [ -e "$FAKE_ROOT/no-network" ]; then exit 1; fi
''')
os.chmod(target + "/bin/uv", 0o755)
"""


class World:
    def __init__(self, root):
        self.root = root
        self.hosts(1)

    def hosts(self, count):
        (self.root / "hosts").write_text(str(count))

    def calls(self):
        """(group, action) of each call of gcloud, and forgets them."""
        path = self.root / "calls"
        rows = [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return [tuple(row[row.index("tpus") + 1 :][:2]) for row in rows]

    def becomes(self, name, *states):
        path = self.root / "resources.json"
        resources = json.loads(path.read_text())
        resources[name]["states"] = list(states)
        path.write_text(json.dumps(resources))

    def services(self, text=None):
        """Of each VM, "ActiveState ExecMainStatus"; sets them if there is a text."""
        found = sorted(self.root.glob("*-w-*/service"))
        if text:
            for path in found:
                path.write_text(text)
        return [path.read_text() for path in found]

    def starts(self):
        return [path.read_text().split() for path in sorted(self.root.glob("*-w-*/started"))]


@pytest.fixture
def world(tmp_path, monkeypatch):
    root, programs = tmp_path / "world", tmp_path / "bin"
    root.mkdir()
    programs.mkdir()
    scripts = {"gcloud": GCLOUD, "systemctl": SYSTEMCTL, "sudo": SUDO, "hostname": HOSTNAME}
    scripts |= {"curl": CURL, "systemd-run": SYSTEMD_RUN}
    for name, script in (scripts | {"python3": PYTHON3}).items():
        path = programs / name
        path.write_text(f"#!{sys.executable} -S\n{script}")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_ROOT", str(root))
    monkeypatch.setattr(actions, "_POLL", 0.0)
    monkeypatch.setattr(watching, "_POLL", 0.0)
    return World(root)


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """A repository with one commit of what the launcher sends, whatever state this one is in."""
    path = tmp_path_factory.mktemp("clone") / "repository"
    path.mkdir()
    for name in ("bipe_jax", "configs", "launch"):
        shutil.copytree(
            os.path.join(ROOT, name),
            path / name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    git = ["git", "-C", str(path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    return path


@pytest.fixture(autouse=True)
def in_clone(clone, monkeypatch):
    monkeypatch.chdir(clone)


def call(action, *more, name="x", topology="v5e:2x2", workdir=None):
    line = [action, name, "--zone=us-west4-a", f"--slice={topology}"]
    if action in program.OF_A_JOB:
        line += [
            "--config=configs/smoke.py",
            f"--workdir={workdir or '/mnt/bipe/x'}",
            "--skip-preflight",
            "--yes",
        ]
    program.main([*line, *more])


# Slices. (type, chips, VMs) as cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} have them in their tables.
TABLE = {
    "v4:2x2x1": ("v4-8", 4, 1),
    "v4:2x2x2": ("v4-16", 8, 2),
    "v4:2x2x4": ("v4-32", 16, 4),
    "v4:2x4x4": ("v4-64", 32, 8),
    "v4:4x4x4": ("v4-128", 64, 16),
    "v5e:2x2": ("v5litepod-4", 4, 1),
    "v5e:2x4": ("v5litepod-8", 8, 1),
    "v5e:4x4": ("v5litepod-16", 16, 4),
    "v5e:16x16": ("v5litepod-256", 256, 64),
    "v5p:2x2x1": ("v5p-8", 4, 1),
    "v5p:4x4x8": ("v5p-256", 128, 32),
    "v5p:16x16x16": ("v5p-8192", 4096, 1024),
    "v6e:2x4": ("v6e-8", 8, 1),
    "v6e:8x16": ("v6e-128", 128, 32),
}


@pytest.mark.parametrize("topology", TABLE)
def test_a_slice_in_the_words_of_gcloud(topology):
    found = parse_slice(topology)
    assert (found.accelerator_type, found.chips, found.hosts) == TABLE[topology]
    assert gcloud.slice_flags(found) == [f"--accelerator-type={TABLE[topology][0]}"]


def test_a_grid_that_its_type_does_not_stand_for_is_named():
    v4, v5p = parse_slice("v4:4x4x16"), parse_slice("v5p:4x4x12*3")
    assert gcloud.slice_flags(v4) == ["--type=v4", "--topology=4x4x16"]
    assert gcloud.slice_flags(v5p) == ["--type=v5p", "--topology=4x4x12"]
    assert (gcloud.track(v4), gcloud.track(v5p)) == ([], ["alpha"])


@pytest.mark.parametrize(
    "wrong, says",
    [
        (["--slice=v5e:3x3"], "--slice=v5e:3x3 is unknown"),
        (["--slice=v5e:2x8"], "unknown"),
        (["--slice=v4:16x16"], "unknown"),
        (["--slice=v4:4x4x6"], "unknown"),
        (["--slice=v5e:4x4*0"], "unknown"),
        (["--slice=v5e:4x4*"], "unknown"),
        (["--slice=v7:4x4"], "unknown"),
        (["--slice=tpu7x:2x2x1"], "only in GKE"),
        (["--zone=us-west4"], "--zone=us-west4 does not have the form of a zone"),
        (["--zone=mars"], "--zone=mars"),
        (["--nfs=/share"], "--nfs=/share must be SERVER"),
        (["--workdir=s3://bucket/x"], "must be a local directory or gs://"),
        (["--workdir=runs/x"], "absolute path"),
        (["--config.optimizer.learning_rat=1"], "learning_rat"),
        (["--config.steps"], "unexpected argument '--config.steps'"),
        (["--spott"], "unrecognized arguments: --spott"),
        (["--spot", "--reserved"], "--reserved: not allowed with argument --spot"),
        (["--config=configs/no.py"], "configs/no.py"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_launched(world, wrong, says):
    for action in ("create", "watch"):
        with pytest.raises(UserError) as caught:
            call(action, *wrong)
        assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not world.calls()


def test_a_name_that_google_refuses(world):
    with pytest.raises(UserError, match="'My_run' is not a valid name"):
        call("create", name="My_run")


def test_nothing_is_launched_that_does_not_fit(world, monkeypatch):
    def too_large(job, topology, skip):
        assert (job.overrides, topology, skip) == (
            (("model.width", "64"), ("mesh.devices", 4)),
            "v5e:2x2",
            False,
        )
        raise UserError("the step needs 27 GiB of 15.75")

    monkeypatch.setattr(machines.jobs, "preflight", too_large)
    line = [
        "--zone=us-west4-a",
        "--slice=v5e:2x2",
        "--config=configs/smoke.py",
        "--workdir=/mnt/x",
    ]
    for action in ("create", "run", "watch"):
        with pytest.raises(UserError, match="27 GiB"):
            program.main([action, "x", *line, "--config.model.width=64"])
    assert not world.calls()


def test_only_what_is_committed_is_launched(world, clone):
    config = clone / "configs" / "mine.py"
    shutil.copy(clone / "configs" / "smoke.py", config)
    with pytest.raises(UserError, match=r"configs/mine.py is not in the repository"):
        call("run", "--config=configs/mine.py")
    config.unlink()
    before = (clone / "configs" / "smoke.py").read_text()
    try:
        (clone / "configs" / "smoke.py").write_text(before + "\n")
        with pytest.raises(UserError, match=r"^configs/smoke.py is not committed"):
            call("run")
    finally:
        (clone / "configs" / "smoke.py").write_text(before)
    assert not world.calls()


# A life of a slice.


def test_all_can_be_repeated(world, tmp_path, capsys):
    world.hosts(2)
    workdir = tmp_path / "shared"
    call("delete")
    assert "x does not exist" in capsys.readouterr().err
    assert world.calls() == [("queued-resources", "describe")]

    call("create")
    assert world.calls() == [("queued-resources", "describe"), ("queued-resources", "create")]
    call("create")
    assert "x exists already: WAITING_FOR_RESOURCES" in capsys.readouterr().err
    assert world.calls() == [("queued-resources", "describe")]
    with pytest.raises(
        UserError, match="x is there in us-west4-a as v5litepod-4, not v5litepod-16"
    ):
        call("create", topology="v5e:4x4")
    world.becomes("x", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")

    world.calls()
    call("bootstrap")  # waits until it is there
    said = capsys.readouterr().err
    assert said.count("x is WAITING_FOR_RESOURCES: waiting") == 1 and said.count(" ready ") == 2
    assert [pair[1] for pair in world.calls()] == ["describe"] * 4 + ["scp", "ssh"]
    call("bootstrap")
    assert capsys.readouterr().err.count("was installed already") == 2

    call("run", workdir=workdir)
    assert capsys.readouterr().err.count(" running started") == 2
    call("run", workdir=workdir)
    assert capsys.readouterr().err.count(" running it runs already") == 2
    assert world.starts() == [["restart"], ["restart"]]
    with pytest.raises(UserError, match="another run exists: stop it first"):
        call("run", "--config.steps=7", workdir=workdir)
    assert world.starts() == [["restart"], ["restart"]]

    (workdir / "heartbeat.json").write_text(
        json.dumps({"step": 7, "phase": "training", "time": 1e9, "since": 1e8, "seconds": {}})
    )
    call("status")
    assert capsys.readouterr().err.count(" running step 7, training, ") == 2
    call("stop")
    assert world.services() == ["inactive 42"] * 2
    call("run", "--config.steps=7", workdir=workdir)
    assert world.services() == ["active 0"] * 2

    call("delete")
    call("delete")
    assert world.services() == [] and "x does not exist" in capsys.readouterr().err
    call("status")
    assert "x: absent" in capsys.readouterr().err
    with pytest.raises(UserError, match="x is absent: create it first"):
        call("run")


def test_a_bootstrap_that_broke_off_goes_on(world):
    call("create")
    (world.root / "no-network").touch()
    with pytest.raises(UserError, match="x-w-0: bootstrap failed at line"):
        call("bootstrap")
    with pytest.raises(UserError):
        call("run")
    (world.root / "no-network").unlink()
    call("bootstrap")
    commit = world.root / "x-w-0" / "bipe_jax" / "commit"
    commit.write_text("0123456789abcdef\n")  # of an earlier day, of which half is replaced now
    (world.root / "no-network").touch()
    with pytest.raises(UserError):
        call("bootstrap")
    assert not commit.exists()


def test_another_commit_is_not_run_unasked(world, clone, tmp_path):
    call("create")
    call("bootstrap")
    (world.root / "x-w-0" / "bipe_jax" / "commit").write_text("0123456789abcdef\n")
    with pytest.raises(UserError, match=r"has commit 0123456789ab, not .*: bootstrap it again"):
        call("run", workdir=tmp_path / "shared")
    world.becomes("x", "ACTIVE")
    (world.root / "x-w-0" / "service").write_text("active 0")
    with pytest.raises(
        UserError, match="a run of another commit or other extras exists: stop it first"
    ):
        call("bootstrap")


def test_gcloud_that_fails_is_told(world):
    (world.root / "broken").touch()
    for action in ("create", "status", "delete"):
        with pytest.raises(UserError, match="PERMISSION_DENIED") as caught:
            call(action)
        assert "\n" not in str(caught.value)


def test_vms_that_do_not_answer_are_told(world):
    call("create")
    call("bootstrap")
    with pytest.raises(UserError, match="1 of 4 hosts of x answered"):
        world.becomes("x", "ACTIVE")
        (world.root / "resources.json").write_text(
            (world.root / "resources.json").read_text().replace("v5litepod-4", "v5litepod-16")
        )
        call("status", topology="v5e:4x4")


def test_several_slices(world, capsys):
    call("create", topology="v5e:2x2*2")
    call("bootstrap", topology="v5e:2x2*2")
    said = capsys.readouterr().err
    assert "x-0-w-0 ready" in said and "x-1-w-0 ready" in said
    assert [pair[1] for pair in world.calls()][-4:] == ["scp", "scp", "ssh", "ssh"]


@pytest.fixture
def days(world, monkeypatch):
    """Runs `watch`, with something that happens at each of its pauses."""

    def start(events, *more, **places):
        events = list(events)
        monkeypatch.setattr(actions.time, "sleep", lambda _: events.pop(0)())
        call("watch", *more, **places)
        assert not events

    return start


def nothing():
    pass


@pytest.mark.slow
def test_watch_brings_a_preempted_slice_back_until_the_run_is_done(world, days, tmp_path, capsys):
    def preempted():
        assert world.services() == ["active 0"]
        world.becomes("x", "SUSPENDED")

    def unreachable():
        (world.root / "unreachable").touch()

    def reachable():
        (world.root / "unreachable").unlink()

    days(
        [
            nothing,  # asked for
            nothing,  # waiting
            nothing,  # provisioning
            nothing,  # active: bootstrapped, run
            preempted,
            nothing,  # deleted, asked for again
            nothing,
            nothing,
            unreachable,
            reachable,
            lambda: world.services("failed 143"),  # a shutdown that came before it had saved
            lambda: world.services("inactive 0"),
        ],
        workdir=tmp_path / "shared",
    )
    did = [pair[1] for pair in world.calls()]
    assert did.count("create") == 2 and did.count("delete") == 1 and did.count("scp") == 3
    said = capsys.readouterr().err
    assert "Connection refused; trying again" in said and "x: done" in said
    assert "x still exists, and costs money" in said

    call("watch", "--delete=done")
    assert not world.services()


def test_watch_waits_for_the_last_host(world, days, tmp_path):
    world.hosts(2)
    call("create")
    call("bootstrap")
    first, last = (world.root / f"x-w-{i}" / "service" for i in range(2))
    first.write_text("inactive 0")
    last.write_text("active 0")
    days([lambda: last.write_text("inactive 0")], workdir=tmp_path / "shared")
    assert world.starts() == []


def test_watch_leaves_a_run_that_failed(world, days, tmp_path):
    with pytest.raises(UserError, match=r"not to be restarted: see .*/shared/failed"):
        days([nothing] * 4 + [lambda: world.services("failed 1")], workdir=tmp_path / "shared")
    assert "delete" not in [pair[1] for pair in world.calls()]


def test_watch_gives_up_what_google_refuses(world, days):
    with pytest.raises(UserError, match="x is FAILED"):
        days([lambda: world.becomes("x", "FAILED")])
    with pytest.raises(UserError, match="x is FAILED and will not recover"):
        call("create")


def test_watch_tries_again_but_not_for_ever(world, days):
    (world.root / "broken").touch()
    with pytest.raises(UserError, match="PERMISSION_DENIED"):
        days([nothing] * 9)


# Money.


@pytest.fixture
def any_disk(monkeypatch):
    """Workdirs on this machine's disk, which would go with a slice."""
    ask = gcloud.Resource.ask
    monkeypatch.setattr(
        gcloud.Resource,
        "ask",
        lambda self, command, verbose=False: ask(self, command.replace(" --shared", ""), verbose),
    )


@pytest.mark.parametrize(
    "delete, state, gone",
    [
        ("never", "failed 1", False),
        ("done", "failed 1", False),
        ("always", "failed 1", True),
        ("never", "inactive 0", False),
        ("done", "inactive 0", True),
        ("always", "inactive 0", True),
    ],
)
def test_the_slice_is_deleted_as_asked(world, any_disk, days, tmp_path, delete, state, gone):
    call("create")
    world.becomes("x", "ACTIVE")
    days_of = [lambda: world.services(state)]
    expected = pytest.raises(UserError, match="not to be restarted")
    with expected if state == "failed 1" else contextlib.nullcontext():
        days(days_of, f"--delete={delete}", workdir=tmp_path / "shared")
    assert ("delete" in [pair[1] for pair in world.calls()]) == gone


def test_a_slice_that_this_watch_made_and_cannot_use_is_deleted(
    world, any_disk, days, tmp_path, monkeypatch
):
    monkeypatch.setattr(watching, "_MOST", 1)
    (world.root / "no-network").touch()
    with pytest.raises(UserError, match="bootstrap failed"):
        days([nothing] * 3, "--delete=always", workdir=tmp_path / "shared")
    assert [pair[1] for pair in world.calls()][-1] == "delete"
    # One that was there before may have somebody else's run.
    call("create")
    world.becomes("x", "ACTIVE")
    world.calls()
    with pytest.raises(UserError, match="bootstrap failed"):
        days([], "--delete=always", workdir=tmp_path / "shared")
    assert "delete" not in [pair[1] for pair in world.calls()]


def test_the_deadline_is_the_vms_own(world, any_disk, tmp_path, capsys):
    workdir = tmp_path / "shared"
    call("create", "--max-hours=2.5", "--spot")
    said = capsys.readouterr().err
    assert "4 chips x $1.20 = $4.80 an hour" in said and "at most $12.00 in 2.5 h" in said
    home = world.root / "x-w-0"
    asked = json.loads((home / "timer").read_text())
    (left,) = [word for word in asked if word.startswith("--on-active=")]
    assert 8900 < int(left.removeprefix("--on-active=").rstrip("s")) <= 9000
    deadline = (home / "state" / "deadline").read_text()
    # A reboot runs the script again, and moves nothing.
    (home / "state" / "deadline").write_text(str(int(deadline) - 8000))
    script = os.path.join(os.path.dirname(gcloud.__file__), "deadline.sh")
    own = os.environ | {"HOME": str(home), "STATE_DIRECTORY": str(home / "state")}
    subprocess.run(["bash", script], env=own, check=True)
    asked = json.loads((home / "timer").read_text())
    assert any(re.fullmatch(r"--on-active=(9\d\d|1000)s", word) for word in asked)

    world.becomes("x", "ACTIVE")
    call("bootstrap")
    (world.root / "no-role").touch()
    with pytest.raises(UserError, match=r"the role TPU Admin \(.*PERMISSION_DENIED"):
        call("run", "--max-hours=2.5", workdir=workdir)
    (world.root / "no-role").unlink()
    call("run", "--max-hours=2.5", workdir=workdir)
    assert world.services() == ["active 0"]
    # Its time is over: the run is stopped, which saves, and the queued resource goes.
    command = asked[asked.index("bash") :]
    subprocess.run(command, env=own, check=True)
    assert world.starts() == [] and "x" not in json.loads(
        (world.root / "resources.json").read_text()
    )

    call("create")
    world.becomes("x", "ACTIVE")
    call("bootstrap")
    with pytest.raises(
        UserError, match="no deadline is set: was the slice created with --max-hours"
    ):
        call("run", "--max-hours=2.5", workdir=workdir)


def test_watch_does_not_rent_again_after_the_deadline(world, days, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: clock[0])

    def created():
        rows = [json.loads(row) for row in (world.root / "calls").read_text().splitlines()]
        return [word for row in rows for word in row if word.startswith("--metadata=")]

    def preempted():
        clock[0] = 3600.0
        world.becomes("x", "SUSPENDED")

    def over():
        clock[0] = 7201.0
        (world.root / "resources.json").write_text("{}")
        shutil.rmtree(world.root / "x-w-0")

    monkeypatch.setattr(actions, "start", lambda *_: None)
    monkeypatch.setattr(actions, "install", lambda *_: None)
    with pytest.raises(UserError, match="--max-hours=2 are over"):
        days(
            [nothing, nothing, nothing, preempted, nothing, nothing, nothing, over],
            "--max-hours=2",
            workdir=tmp_path / "shared",
        )
    assert created() == [
        "--metadata=bipe-name=x,bipe-seconds=7200",
        "--metadata=bipe-name=x,bipe-seconds=3600",
    ]


# The whole life of a slice, with the real trainer, supervisor and checkpoints: what systemd does is this.
SERVICE = """
import os, re, shlex, signal, subprocess, sys, time
def command():
    text = open(os.path.expanduser("~/bipe_jax/bipe_jax.service")).read()
    (line,) = [line for line in text.splitlines() if line.startswith("ExecStart=")]
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line[10:])]
pid = os.path.expanduser("~/pid")
action = sys.argv[1]
def alive():
    try:
        os.kill(int(open(pid).read()), 0)
    except (OSError, ValueError):
        return False
    return True
if action == "show":
    there = os.path.exists(os.path.expanduser("~/bipe_jax/bipe_jax.service")) and os.path.exists(pid)
    code = open(os.path.expanduser("~/code")).read() if there and not alive() else "0"
    print(f"LoadState={'loaded' if there else 'not-found'}")
    print(f"ActiveState={'active' if alive() else 'inactive'}")
    print(f"ExecMainStatus={code or 1}\\nExecMainStartTimestampMonotonic=5")
elif action == "is-active":
    timer = os.path.exists(os.path.expanduser("~/timer"))
    sys.exit(not (timer if sys.argv[-1].endswith(".timer") else alive()))
elif action in ("restart", "stop"):
    if alive():
        os.kill(int(open(pid).read()), signal.SIGTERM)
        while alive():
            time.sleep(0.05)
    if action == "restart":
        program = "import os,signal,subprocess,sys;c=subprocess.Popen(sys.argv[1:]);" \\
            "signal.signal(15,lambda *_:c.terminate());" \\
            "open(os.path.expanduser('~/code'),'w').write(str(c.wait()))"
        child = subprocess.Popen(
            [sys.executable, "-c", program, *command()], cwd=os.path.expanduser("~/bipe_jax/source"),
            start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env=os.environ | {"JAX_NUM_PROCESSES": "1", "JAX_PLATFORMS": "cpu"},
        )
        open(pid, "w").write(str(child.pid))
"""


@pytest.mark.slow
def test_smoke_trains_restarts_resumes_deletes_and_bills(world, tmp_path, monkeypatch, capsys):
    """With the real trainer; a service is a process."""
    systemctl = tmp_path / "bin" / "systemctl"
    systemctl.write_text(f"#!{sys.executable} -S\n{SERVICE}")
    monkeypatch.setenv(
        "PYTHONPATH", sysconfig.get_path("purelib")
    )  # the VM's Python has no packages
    monkeypatch.setattr(watching, "_POLL", 0.5)
    workdir = tmp_path / "workdir"
    line = ["smoke", "x", "--zone=us-west4-a", "--skip-preflight", f"--workdir={workdir}"]
    line += ["--config.evaluation.lengths=(32,)"]
    program.main([*line, "--yes", "--config.mesh.devices=1"])
    said = capsys.readouterr().err
    assert "v5e:1x1: 1 chips x $1.20 = $1.20 an hour" in said
    assert re.search(r"running restarted at step ([5-9]|1\d)\n", said)
    assert "done step 20 in 2 starts" in said
    assert re.search(r"The bill: v5e:1x1 for [0-9.]+ min, \$0\.\d\d", said)
    assert json.loads((world.root / "resources.json").read_text()) == {}
    assert Workdir(workdir).last_start() == 2 and Workdir(workdir).latest_step() == 20
    with pytest.raises(UserError, match="exists: smoke makes a slice"):
        call("create", topology="v5e:1x1")
        program.main([*line, "--yes"])


def test_a_smoke_test_that_fails_leaves_no_slice(world, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(watching, "_MOST", 1)
    (world.root / "no-network").touch()
    line = ["smoke", "x", "--zone=us-west4-a", "--skip-preflight", "--yes"]
    with pytest.raises(UserError, match="bootstrap failed"):
        program.main(line)
    assert [pair[1] for pair in world.calls()][-1] == "delete"
    assert re.search(r"The bill: v5e:1x1 for [0-9.]+ min, \$", capsys.readouterr().err)


def test_nothing_is_rented_without_a_yes(world, monkeypatch):
    line = ["create", "x", "--zone=us-west4-a", "--slice=v6e-1", "--skip-preflight"]
    line += ["--config=configs/smoke.py", "--workdir=/mnt/bipe/x"]
    with pytest.raises(UserError, match="--yes is needed to rent where nobody can be asked"):
        program.main(line)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "n")
    with pytest.raises(UserError, match="the answer was no"):
        program.main(line)
    assert "create" not in [pair[1] for pair in world.calls()]
    monkeypatch.setattr("builtins.input", lambda text: "yes")
    program.main(line)
    assert [pair[1] for pair in world.calls()] == ["describe", "create"]


@pytest.mark.parametrize(
    "wrong, says",
    [
        (["--max-hours=0"], "--max-hours=0 must be above 0"),
        (["--flex-start", "--max-hours=169"], "at most 168"),
        (["--max-hours=1", "--", "--metadata=a=b"], "--metadata after -- is not possible"),
        (["--price=-1"], "--price=-1 must be dollars"),
        (["--reservation=A/b"], "--reservation=A/b must be a name"),
        (["--delete=sometimes"], "'sometimes' is unknown"),
        (["--flex-start", "--spot"], "--spot: not allowed with argument --flex-start"),
    ],
)
def test_wrong_flags_of_renting(world, wrong, says):
    with pytest.raises(UserError, match=says):
        call("create", *wrong)
    assert not world.calls()


def test_the_ways_to_rent_in_the_words_of_gcloud(world, capsys):
    for more, words in {
        "--flex-start": "--provisioning-model=flex-start --max-run-duration=604800s",
        "--reservation=r": "--reservation=r",
    }.items():
        call("create", more, "--dry-run", "--price=2")
        shown = capsys.readouterr()
        assert words in shown.out and shown.out.count("gcloud alpha compute tpus") == 1
        assert "x $2.00 = $8.00 an hour (--price" in shown.err


# Variables and logs.


def test_variables_reach_the_service_and_nothing_else(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", 'se"cr$et\\')
    (tmp_path / "env").write_text("# mine\nexport HF_TOKEN='to ken'\n\nWANDB_API_KEY=old\n")
    variables = ["--env=WANDB_API_KEY", f"--env-file={tmp_path}/env"]
    call("create", "--config.log.wandb=p", *variables)
    call("bootstrap", "--config.log.wandb=p")
    assert (
        world.root / "x-w-0" / "bipe_jax" / "extras"
    ).read_text() == "gcs,quickstart,tpu,wandb\n"
    call("run", "--config.log.wandb=p", *variables, workdir=tmp_path / "shared")
    home = world.root / "x-w-0"
    unit = (home / "bipe_jax" / "bipe_jax.service").read_text()
    sent = home / "bipe_jax.environment"
    assert f"EnvironmentFile={sent}\n" in unit and sent.stat().st_mode & 0o777 == 0o600
    # As systemd reads it, which is as a shell does in double quotes.
    program_ = '. "$1"; printf "%s\\0" "$HF_TOKEN" "$WANDB_API_KEY"'
    done = subprocess.run(["bash", "-c", program_, "bash", sent], capture_output=True, check=True)
    assert done.stdout.decode().split("\0") == ["to ken", 'se"cr$et\\', ""]
    shown = capsys.readouterr()
    calls = (world.root / "calls").read_text()
    for secret in ("cr$et", "to ken"):
        assert not any(secret in text for text in (unit, calls, shown.out, shown.err))
    with pytest.raises(UserError, match=r"--env=NO: NO is not set on this machine"):
        call("run", "--env=NO")
    with pytest.raises(UserError, match="the run would have no key"):
        call("create", "--config.log.wandb=p")


def test_the_log_is_in_the_workdir(tmp_path):
    """And goes on at each start; the file of another host is another."""
    workdir = tmp_path / "w"
    text = worker.unit(str(workdir), ["--config=x"], hosts=1)
    (word,) = re.findall(r'"--log=([^"]+)"', text)
    assert os.path.dirname(word) == str(workdir) and word == worker.log_of(str(workdir))
    for _ in range(2):
        line = [sys.executable, "-m", "launch.supervise", f"--workdir={workdir}", f"--log={word}"]
        line += ["--", sys.executable, "-c", "print('trained')"]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    said = Path(word).read_text()
    assert said.count("trained\n") == 2 and said.count("not restarting: all steps are done") == 2


# On the VM.


def test_the_service_file_holds_for_systemd(tmp_path, monkeypatch):
    arguments = ["--config=a b.py", "--config.x=(('rope', \"segment\"),)", "--config.y=$HOME%h\\n;"]
    text = worker.unit(str(tmp_path / "w %n"), arguments, hosts=4)
    path = tmp_path / "bipe_jax.service"
    path.write_text(text)
    if shutil.which("systemd-analyze"):
        done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    (line,) = [line for line in text.splitlines() if line.startswith("ExecStart=")]
    words = shlex.split(line.removeprefix("ExecStart="))
    assert [word.replace("%%", "%").replace("$$", "$") for word in words[-3:]] == arguments
    assert words[-1] == "--config.y=$$HOME%%h\\n;"  # else systemd would expand them
    assert "KillMode=mixed" in text and "WantedBy=multi-user.target" in text
    assert any(word.startswith("--host=") for word in words) and "--pause=90" in words
    assert "--host" not in worker.unit("/mnt/w", [], hosts=1)


# A process on a TPU VM outside GKE, where no metadata server answers.
ON_A_VM = """
import os
from jax._src.clusters import cloud_tpu_cluster
def asked(key): raise SystemExit(f"asked for {key}")
cloud_tpu_cluster.running_in_cloud_tpu_vm = True
cloud_tpu_cluster.get_metadata = asked
os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # which JAX sets where there is no TPU
import jax
from bipe_jax import processes
processes.start()
assert jax.process_count() == 1 and not jax.distributed.is_initialized()
"""


@pytest.mark.parametrize("hosts", [1, 4])
def test_the_only_host_coordinates_itself_with_nobody(hosts):
    """Without a question to the metadata server, which only one of several hosts needs."""
    lines = worker.unit("/mnt/w", [], hosts).splitlines()
    found = [line.removeprefix("Environment=") for line in lines if line.startswith("Environment=")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    environment |= dict(line.split("=") for line in found) | {"PYTHONPATH": ROOT}
    environment.pop("JAX_PLATFORMS", None)
    line = [sys.executable, "-c", ON_A_VM]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == (hosts > 1), done.stderr
    assert ("asked for agent-worker-number" in done.stderr) == (hosts > 1)


def test_a_disk_of_the_vm_is_not_shared(world, tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda1 / ext4 rw 0 0\n10.0.0.2:/share /mnt/bipe nfs4 rw 0 0\ntmpfs /mnt tmpfs rw 0 0\n"
    )
    assert worker.filesystem("/mnt/bipe/x/y", mounts) == "nfs4"
    assert worker.filesystem("/mnt/bipes", mounts) == "tmpfs"
    assert worker.filesystem("/home/x", mounts) == "ext4"
    if worker.filesystem(str(tmp_path)) not in worker._LOCAL_DISKS:
        pytest.skip("the tests' directory is on no common disk")
    call("create", "--spot")
    call("bootstrap")
    with pytest.raises(UserError, match=r"is on a disk of this VM .*--nfs=SERVER:/EXPORT"):
        call("run", "--spot", workdir=tmp_path / "run")
    with pytest.raises(UserError, match="is on a disk of this VM"):
        call("watch", "--delete=done", workdir=tmp_path / "run")  # at once, and deletes nothing
    call("run", workdir=tmp_path / "run")


# The real gcloud checks flags before it asks who is calling, and nobody is.


@pytest.mark.slow
def test_the_real_gcloud_takes_each_call(tmp_path, capsys):
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    flags = ["--dry-run", "--project=p", "--nfs=10.0.0.2:/share", "--delete=done", "--env=A=b"]
    for action in program.ALL:
        call(action, *flags, "--spot", "--", "--network=n", "--internal-ips")
    call("create", "--dry-run", "--project=p", "--flex-start", "--max-hours=3")
    call("create", "--dry-run", "--project=p", "--reservation=r", "--max-hours=3")
    for topology in ("v4:2x2x2*2", "v5p:4x4x12*2", "v4:4x4x16"):
        call("create", *flags, "--reserved", topology=topology)
    printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    printed = [words for words in printed if words[0] == "gcloud"]
    # One of each that has the same flags.
    lines = list({re.sub(r"=\S+( |$)", " ", " ".join(words)): words for words in printed}.values())
    assert {words[words.index("tpus") + 2] for words in lines} == {
        "create", "delete", "describe", "scp", "ssh",
    }  # fmt: skip
    misspelt = [*lines[0], "--zoned=x"]
    with ThreadPoolExecutor(2) as pool:
        *said, last = pool.map(lambda words: really(tmp_path, words), [*lines, misspelt])
    for words, answer in zip(lines, said, strict=True):
        assert "do not currently have an active account" in answer, (words, answer)
    assert "unrecognized arguments: --zoned=x" in last


def really(directory, words):
    """What the real gcloud says, of an account that it has not and with no way to the network."""
    nowhere = {"CLOUDSDK_PROXY_TYPE": "http", "CLOUDSDK_PROXY_ADDRESS": "127.0.0.1"}
    nowhere |= {"CLOUDSDK_PROXY_PORT": "9", "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false"}
    nowhere |= {"CLOUDSDK_CONFIG": str(directory), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CLOUDSDK", "GOOGLE"))}
    done = subprocess.run(
        words, env=environment | nowhere, capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode
    return done.stderr


def test_as_a_program(world):
    """One line, and status 1."""
    line = [
        sys.executable,
        "-m",
        "launch.tpu_vm",
        "create",
        "x",
        "--zone=us-west4",
        "--slice=v5e:2x2",
    ]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: --zone=us-west4 does not have the form of a zone, such as us-west4-a"
    ]
    with contextlib.suppress(FileNotFoundError):
        assert not world.calls()
