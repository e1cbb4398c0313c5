"""The JobSet of a job: one Job for each TPU slice, or one for all nodes with GPUs; one pod for each host.

The effect of a pod's end (launch/worker.py has the statuses):

| pod                               | JobSet                                                       |
|-----------------------------------|--------------------------------------------------------------|
| 44, a user's error or given up    | fails at once                                                |
| 42, preempted and saved           | restarts all pods, without limit                             |
| disrupted: evicted, drained, spot | restarts all pods, without limit                             |
| anything else: died, lost a peer  | restarts all pods, up to MAX_RESTARTS times; the worker      |
|                                   | applies the rule of launch/restart.py, which stops earlier   |

Needs JobSet 0.10, whose rules match messages, and Kubernetes 1.31, whose podFailurePolicy is stable.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from bipe_jax import hardware
from bipe_jax.errors import PREEMPTED
from launch import jobs, worker
from launch.machines import PORT, Machines

MAX_RESTARTS = 100
GRACE = 600  # seconds to save; a preempted spot node gives less (docs/how-to/gke.md)
_USER = 1000  # of launch/gke/Dockerfile
_CONTAINER = "train"
_WORKERS = "w"  # name of the replicated Job; short, since it is part of every pod's name
_MOST = 63  # letters of a pod's name, in the DNS


@dataclasses.dataclass(frozen=True)
class Settings:
    """What jobs of one launch share.

    Attributes:
      volumes: pairs (source, path) to mount: the name of a PersistentVolumeClaim, or gs://BUCKET.
      reservation: name of the one that the nodes are from, or "".
      account: the Kubernetes service account of the pods, or "".
      queue, priority: the local queue and the priority class of Kueue, or "".
      ttl: seconds after its end when the JobSet is deleted; None: never.
    """

    image: str
    volumes: tuple[tuple[str, str], ...]
    spot: bool = False
    flex_start: bool = False
    reservation: str = ""
    account: str = ""
    queue: str = ""
    priority: str = ""
    ttl: int | None = None


def longest_name(machines: Machines) -> int:
    """The largest length of a JobSet's name: its pods are NAME-w-JOB-POD-abcde."""
    replicas, hosts = _shape(machines)
    return _MOST - len(f"-{_WORKERS}-{replicas - 1}-{hosts - 1}-abcde")


def _shape(machines: Machines) -> tuple[int, int]:
    if machines.slice:
        return machines.slice.slices, machines.slice.hosts
    return 1, machines.nodes


def jobset(
    name: str,
    job: jobs.Job,
    machines: Machines,
    settings: Settings,
    secrets: Sequence[str] = (),
) -> dict:
    """The manifest of a job.

    Args:
      name: valid in the DNS, of at most longest_name(machines) letters.
      secrets: names of Secrets whose keys become variables of the run; of equal keys the last counts.
    """
    replicas, hosts = _shape(machines)
    metadata: dict = {"name": name}
    if machines.slice:
        # A slice is a node pool, and each Job gets its own. GKE sets each pod's TPU_* variables and,
        # with several slices, MEGASCALE_*.
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
    labels = {
        "kueue.x-k8s.io/queue-name": settings.queue,
        "kueue.x-k8s.io/priority-class": settings.priority,
    }
    if labels := {label: value for label, value in labels.items() if value}:
        metadata["labels"] = labels
    ends = {} if settings.ttl is None else {"ttlSecondsAfterFinished": settings.ttl}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            **ends,
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "failurePolicy": _failure_policy(),
            "replicatedJobs": [
                {
                    "name": _WORKERS,
                    "replicas": replicas,
                    "template": {
                        "spec": {
                            "parallelism": hosts,
                            "completions": hosts,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,
                            "podReplacementPolicy": "Failed",
                            "podFailurePolicy": {"rules": _pod_rules()},
                            "template": _pod(name, job, machines, settings, secrets),
                        }
                    },
                }
            ],
        },
    }


def _pod_rules() -> list[dict]:
    def exits(code):
        codes = {"containerName": _CONTAINER, "operator": "In", "values": [code]}
        return {"action": "FailJob", "onExitCodes": codes}

    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    return [
        exits(worker.STOP),
        exits(PREEMPTED),
        {"action": "FailJob", "onPodConditions": disrupted},
    ]


def _failure_policy() -> dict:
    """The policy for failed Jobs: rules match the message of the pod rule that failed the Job."""

    def rule(name, action, *messages):
        return {
            "name": name,
            "action": action,
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": list(messages),
        }

    return {
        "maxRestarts": MAX_RESTARTS,
        # All pods are deleted before one is created, so that attempts never overlap.
        "restartStrategy": "BlockingRecreate",
        "rules": [
            rule("GivenUp", "FailJobSet", f"failed with exit code {worker.STOP} "),
            rule(
                "Preempted",
                "RestartJobSetAndIgnoreMaxRestarts",
                f"failed with exit code {PREEMPTED} ",
                "has condition DisruptionTarget ",
            ),
        ],
    }


def secret(name: str, variables: Mapping[str, str]) -> dict:
    """A Secret, which unlike a JobSet is not for everybody to read."""
    metadata = {"name": name}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {**variables}}


def _pod(name, job, machines, settings: Settings, secrets: Sequence[str]) -> dict:
    selector, resource, count = _hardware(machines)
    # Node pools have a label for each way of getting nodes, and of some of them the same as a taint.
    tainted = {
        "cloud.google.com/gke-spot": settings.spot,
        "cloud.google.com/gke-flex-start": settings.flex_start,
    }
    tainted = [label for label, chosen in tainted.items() if chosen]
    selector |= dict.fromkeys(tainted, "true")
    if settings.reservation:
        selector["cloud.google.com/reservation-name"] = settings.reservation
        selector["cloud.google.com/reservation-affinity"] = "specific"
    mounts = [(f"volume-{i}", *volume) for i, volume in enumerate(settings.volumes)]
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "nodeSelector": selector,
        "securityContext": _security(machines),
        "containers": [
            {
                "name": _CONTAINER,
                "image": settings.image,
                # Without a shell the worker is process 1 and receives SIGTERM.
                "command": ["python", "-m", "launch.worker"],
                # Kubernetes replaces $(X), and makes $$ a $.
                "args": [argument.replace("$", "$$") for argument in job.arguments()],
                "env": _environment(name, machines),
                "resources": {"limits": {resource: count}},
                "volumeMounts": [{"name": n, "mountPath": path} for n, _, path in mounts],
            }
        ],
        "volumes": [{"name": n, **_source(source)} for n, source, _ in mounts],
    }
    if secrets:
        spec["containers"][0]["envFrom"] = [{"secretRef": {"name": name}} for name in secrets]
    if settings.account:
        spec["serviceAccountName"] = settings.account
    if tainted:
        taint = {"operator": "Equal", "value": "true", "effect": "NoSchedule"}
        spec["tolerations"] = [{"key": label, **taint} for label in tainted]
    if not machines.slice:  # NCCL's; a container has 64 MiB otherwise
        shared = {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}
        spec["volumes"].append(shared)
        mount = {"name": "shared-memory", "mountPath": "/dev/shm"}
        spec["containers"][0]["volumeMounts"].append(mount)
    pod = {"spec": spec}
    if any(source.startswith("gs://") for source, _ in settings.volumes):
        pod["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}
    return pod


def _security(machines: Machines) -> dict:
    """The security context: volumes belong to the group of the image's user, TPU devices to root."""
    return {"fsGroup": _USER, "runAsUser": 0 if machines.slice else _USER}


def _hardware(machines: Machines) -> tuple[dict, str, int]:
    """The node selector, the resource, and its count for each pod."""
    if slice_ := machines.slice:
        selector = {
            "cloud.google.com/gke-tpu-accelerator": slice_.chip.gke,
            "cloud.google.com/gke-tpu-topology": slice_.grid,
        }
        return selector, "google.com/tpu", slice_.host_chips
    selector = {"cloud.google.com/gke-accelerator": hardware.GPUS[machines.gpu].gke}
    return selector, "nvidia.com/gpu", machines.gpus


def _source(source: str) -> dict:
    if not source.startswith("gs://"):
        return {"persistentVolumeClaim": {"claimName": source}}
    bucket = {"bucketName": source.removeprefix("gs://"), "mountOptions": "implicit-dirs"}
    return {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": bucket}}


def _environment(name: str, machines: Machines) -> list[dict]:
    """The variables by which processes join, and from which the worker reads its rank."""

    def annotation(key):
        return {"valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{key}']"}}}

    # Kubernetes sets JOB_COMPLETION_INDEX. With TPUs, JAX reads the variables of GKE.
    index = annotation("jobset.sigs.k8s.io/job-global-index")
    replicas, hosts = _shape(machines)
    variables = [
        {"name": "PYTHONUNBUFFERED", "value": "1"},
        {"name": "PEERS", "value": f"{name}-{_WORKERS}-{{}}-{{}}.{name} {replicas} {hosts}"},
        {"name": "JOB_GLOBAL_INDEX", **index},
    ]
    if not machines.slice:
        process = annotation("batch.kubernetes.io/job-completion-index")
        first = f"{name}-{_WORKERS}-0-0.{name}:{PORT}"  # as JobSet names its pods
        variables += [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": first},
            {"name": "JAX_NUM_PROCESSES", "value": str(machines.nodes)},
            {"name": "JAX_PROCESS_ID", **process},
        ]
    return variables
