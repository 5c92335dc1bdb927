"""Google Kubernetes Engine: a JobSet with one Job for each slice or node, one pod for each host, and one process in each pod.

There are two levels of restarts. If a process crashes, `gpt-jax supervise` restarts it in its pod and counts the crashes. If
Kubernetes evicts a pod, the pod ends with 42 or disappears; its Job fails, and the JobSet creates all Jobs again, up to
`preemptions` times. A pod that ends in any other way would only fail again, so the pod failure policy fails its Job and the
JobSet.

Sources: "JobSet API v1alpha2" and its failure policy; "Job" and "Pod failure policy" (Kubernetes documentation); "Deploy TPU
workloads in GKE", "Deploy TPU Multislices in GKE" and "Cloud Storage FUSE CSI driver" (Google Cloud documentation).
"""

import re
import shlex
import subprocess
from typing import Any

from gpt_jax.errors import require
from gpt_jax.runtime.accelerators import smallest_multi_host_slice

from .checks import KUBERNETES_NAME, require_google_zone
from .job import BUCKETS, CLAIMS, PORT, RESTART_CODE, Job, mount_names, require_tool, to_mount_paths
from .manifest import write_manifest

MOUNTS = (BUCKETS, CLAIMS)
UNSUPPORTED: dict[str, str] = {}

WORKERS = "workers"
"""Name of the JobSet's group of Jobs."""
USER = 1000
"""User id in the container (launch/Dockerfile). This user must own the mounted files."""
MEGASCALE_PORT = 8080
TPU_PORT = 8471
BUCKET_OPTIONS = f"implicit-dirs,uid={USER},gid={USER},file-system:rename-dir-limit:200000,metadata-cache:ttl-secs:10"
"""Mount options of Cloud Storage FUSE. A checkpoint is completed by renaming its folder, which fails if it has too many files.
The lock of a run's folder needs a file's changes to be seen within seconds; the default is a minute.
"""
KILLED = (137, 143)
"""Exit codes of a container that was killed from outside: 128 + SIGKILL and 128 + SIGTERM."""


def check(job: Job) -> None:
    """Checks the options that GKE restricts.

    Raises:
      UserError: there is no image, or the job requests something that GKE does not support.
    """
    accelerator = job.accelerator
    require_google_zone(job.zone)
    if accelerator.kind != "tpu":
        require(not job.project, "project", "leave it out; kubectl's current context selects the project")
    if job.is_multislice:  # GKE connects node pools of multi-host slices only.
        fault = f"GKE connects only slices with several hosts; use {smallest_multi_host_slice(accelerator.family).name} or larger"
        require(accelerator.hosts > 1, "slices", fault)
    valid = not job.queue or (re.fullmatch(KUBERNETES_NAME, job.queue) is not None and len(job.queue) <= 63)
    require(valid, "queue", f"'{job.queue}' cannot be a LocalQueue's name, which has at most 63 characters a-z, 0-9, '-' and '.'")
    require(bool(job.image), "image", "name a container image; docs/launch.md describes how to build and push one")


def render(job: Job) -> str:
    """Returns the manifest, after comments with the commands that use it."""
    first = f"jobset.sigs.k8s.io/jobset-name={job.name},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    comments = [
        "create:    kubectl apply -f -   (with this file as its input)",
        f"show log:  kubectl logs -f -c train -l {first}",
        f"delete:    kubectl delete jobset {job.name}   (required before it can be created again)",
    ]
    if job.accelerator.kind == "tpu":
        comments += ["on a cluster CLUSTER created by xpk, use these commands instead of this file:", *_xpk_commands(job)]
    return write_manifest(comments, _jobset(job))


def submit(job: Job) -> int:
    """Creates the JobSet in the cluster and namespace of kubectl's current context; returns kubectl's exit code.

    Raises:
      UserError: kubectl is not installed.
    """
    require_tool("kubectl", "install it with `gcloud components install kubectl`, or from kubernetes.io")
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=render(job), text=True).returncode


def _jobset(job: Job) -> dict[str, Any]:
    hosts = job.accelerator.hosts
    # Only a pod's disruption and these exit codes lead to a restart. The first rule that matches a failed pod applies.
    exit_codes = {"containerName": "train", "operator": "NotIn", "values": [RESTART_CODE, *KILLED]}
    disruption = {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    job_spec = {
        **{"completionMode": "Indexed", "completions": hosts, "parallelism": hosts},
        "backoffLimit": 0,  # A counted failure fails the Job with BackoffLimitExceeded, and the JobSet restarts.
        "podFailurePolicy": {"rules": [disruption, {"action": "FailJob", "onExitCodes": exit_codes}]},
        "template": _pod(job),
    }
    metadata: dict[str, Any] = {"name": job.name}
    if job.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": job.queue}
    if job.accelerator.kind == "tpu":  # All pods of a Job run on the hosts of one slice, which form a node pool.
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    failure_policy = {
        "maxRestarts": job.preemptions,
        "restartStrategy": "BlockingRecreate",  # so that pods of two attempts never run at the same time
        "rules": [{"name": "gaveUp", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    spec = {
        "network": {"enableDNSHostnames": True, "subdomain": job.name, "publishNotReadyAddresses": True},
        "failurePolicy": failure_policy,
        "replicatedJobs": [{"name": WORKERS, "replicas": job.slices, "template": {"spec": job_spec}}],
    }
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}


def _pod(job: Job) -> dict[str, Any]:
    tolerations: list[dict[str, Any]] = [  # By default, pods stay on a lost host for five minutes.
        {"key": f"node.kubernetes.io/{state}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}
        for state in ("not-ready", "unreachable")
    ]
    if job.spot:
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"})
    spec = {
        "restartPolicy": "Never",  # required by pod failure policies
        "terminationGracePeriodSeconds": job.grace_seconds,
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER},
        **({"nodeSelector": labels} if (labels := _node_labels(job)) else {}),
        "tolerations": tolerations,
        "containers": [_container(job)],
        "volumes": [{"name": name, **source} for name, (_, source) in _volumes(job).items()],
    }
    if not mount_names(job.command(), BUCKETS):
        return {"spec": spec}
    # The sidecar that mounts buckets has no limits, because its default limits are smaller than a checkpoint.
    limits = {f"gke-gcsfuse/{name}-limit": "0" for name in ("cpu", "memory", "ephemeral-storage")}
    return {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true", **limits}}, "spec": spec}


def _volumes(job: Job) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns the path and the source of each volume, by the name of the volume."""
    volumes: dict[str, tuple[str, dict[str, Any]]] = {}
    volumes["shm"] = "/dev/shm", {"emptyDir": {"medium": "Memory"}}  # libtpu and NCCL need more than the default 64 MiB.
    for number, bucket in enumerate(mount_names(job.command(), BUCKETS)):
        attributes = {"bucketName": bucket, "mountOptions": BUCKET_OPTIONS}
        csi = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": False, "volumeAttributes": attributes}
        volumes[f"bucket-{number}"] = f"{BUCKETS}{bucket}", {"csi": csi}
    for number, claim in enumerate(mount_names(job.command(), CLAIMS)):
        volumes[f"claim-{number}"] = f"{CLAIMS}{claim}", {"persistentVolumeClaim": {"claimName": claim}}
    return volumes


def _container(job: Job) -> dict[str, Any]:
    accelerator = job.accelerator
    resource = {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu", "cpu": "cpu"}[accelerator.kind]
    ports = {"jax": PORT} | ({"tpu": TPU_PORT} if accelerator.kind == "tpu" else {})
    if job.is_multislice:
        ports["megascale"] = MEGASCALE_PORT
    # Kubernetes leaves $((...)) to the shell, because it does not contain the name of a variable.
    script = f'export JAX_PROCESS_ID=$((SLICE_INDEX * {accelerator.hosts} + JOB_COMPLETION_INDEX)); exec "$@"'
    return {
        "name": "train",
        "image": job.image,
        "command": ["/bin/sh", "-c", script, "sh", *to_mount_paths(job.supervised_command())],
        "env": _environment(job),
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "resources": {kind: {resource: accelerator.chips_per_host} for kind in ("requests", "limits")},
        "volumeMounts": [{"name": name, "mountPath": path} for name, (path, _) in _volumes(job).items()],
    }


def _environment(job: Job) -> list[dict[str, Any]]:
    """Returns the variables that `distributed.start` and the TPU runtime read, and SLICE_INDEX for the number of the process."""
    first = f"{job.name}-{WORKERS}-0-0.{job.name}"  # The JobSet's headless service has the JobSet's name.
    values, indexes = job.environment, ["SLICE_INDEX"]
    values |= {"JAX_COORDINATOR_ADDRESS": f"{first}:{PORT}", "JAX_NUM_PROCESSES": str(job.slices * job.accelerator.hosts)}
    if job.is_multislice:
        values |= {"MEGASCALE_COORDINATOR_ADDRESS": f"{first}:{MEGASCALE_PORT}", "MEGASCALE_NUM_SLICES": str(job.slices)}
        indexes.append("MEGASCALE_SLICE_ID")
    label = "metadata.labels['jobset.sigs.k8s.io/job-index']"
    variables: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in values.items()]
    return variables + [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": label}}} for name in indexes]


def _node_labels(job: Job) -> dict[str, str]:
    accelerator = job.accelerator
    labels = {
        "cloud.google.com/gke-tpu-accelerator": accelerator.gke if accelerator.kind == "tpu" else "",
        "cloud.google.com/gke-tpu-topology": accelerator.topology,
        "cloud.google.com/gke-accelerator": accelerator.gke if accelerator.kind == "gpu" else "",
        "cloud.google.com/gke-spot": "true" if job.spot else "",
        "topology.kubernetes.io/zone": job.zone,
    }
    return {name: value for name, value in labels.items() if value}


def _xpk_commands(job: Job) -> list[str]:
    """Returns the xpk commands for the same job: one for each bucket, and one for the workload. xpk writes its own manifest."""
    place = ["--cluster=CLUSTER"]
    place += [f"--{name}={value}" for name, value in (("project", job.project), ("zone", job.zone)) if value]
    buckets = mount_names(job.command(), BUCKETS)
    attach = [
        [
            *("xpk", "storage", "attach", name, *place, "--type=gcsfuse", f"--bucket={name}", f"--mount-point={BUCKETS}{name}"),
            *("--readonly=false", "--auto-mount=false", "--size=1", f"--mount-options={BUCKET_OPTIONS}"),
        ]
        for name in buckets
    ]
    create = [
        *("xpk", "workload", "create", f"--workload={job.name}", *place, f"--tpu-type={job.accelerator.gcloud}"),
        *(f"--num-slices={job.slices}", f"--docker-image={job.image}", *(f"--storage={name}" for name in buckets)),
        *(["--spot"] if job.spot else []),
        *(f"--max-restarts={job.preemptions}", f"--restart-on-exit-codes={RESTART_CODE}"),
        f"--termination-grace-period-seconds={job.grace_seconds}",
        f"--command={shlex.join(to_mount_paths(job.supervised_command()))}",
    ]
    return [shlex.join(words) for words in (*attach, create)]
