"""Google Kubernetes Engine: a JobSet with a job for each slice (or node), a pod for each host, one process in each pod.

Who restarts what: a process that crashes is restarted in its pod by `gpt-jax supervise`, which counts. A pod that Kubernetes
takes away ends with 42, or is gone; its job fails, and the JobSet makes all jobs anew, `preemptions` times. Any other end of a
pod means that there is no use in going on: the pod failure policy fails its job for that reason, and the JobSet with it.

Sources: "JobSet API v1alpha2" and its failure policy; "Job" and "Pod failure policy" (Kubernetes documentation); "Deploy TPU
workloads in GKE", "Deploy TPU Multislices in GKE" and "Cloud Storage FUSE CSI driver" (Google Cloud documentation).
"""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import Any

from gpt_jax.errors import UserError, require

from .accelerators import smallest_of_several_hosts
from .job import (
    KUBERNETES_NAME,
    PORT,
    RESTART_CODE,
    Checked,
    Job,
    buckets,
    mounted,
    require_reachable,
    require_tool,
    to_yaml,
    volumes,
)

WORKERS = "workers"
USER = 1000
"""The container's user (Dockerfile), who must own what is mounted."""
MEGASCALE_PORT = 8080
TPU_PORT = 8471
BUCKET_OPTIONS = f"implicit-dirs,uid={USER},gid={USER},file-system:rename-dir-limit:200000"
"""Of Cloud Storage FUSE. Sealing a checkpoint renames a folder, which it refuses beyond so many files, by default beyond none."""
KILLED = (137, 143)
"""Exit codes of a container that was killed from outside: 128 + SIGKILL, 128 + SIGTERM."""


def render(job: Job, checked: Checked) -> str:
    """The manifest, opened by the commands that use it.

    Raises:
      UserError: there is no image, the workers cannot reach a path, or the job asks for what GKE does not have.
    """
    require_reachable(job, checked, "gke", volumes=True)
    _require_possible(job, checked)
    require(bool(job.image), "image", "say which container image; docs/launch.md shows how to build and push one")
    first = f"jobset.sigs.k8s.io/jobset-name={job.name},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    comments = [
        "create:        kubectl apply -f -   (this file is its input)",
        f"what it says:  kubectl logs -f -c train -l {first}",
        f"take it away:  kubectl delete jobset {job.name}   (needed, too, before it can be created again)",
    ]
    if checked.accelerator.kind == "tpu":
        comments += ["on a cluster that xpk made, CLUSTER, these do in place of this file:", *_xpk(job, checked)]
    return "".join(f"# {comment}\n" for comment in comments) + to_yaml(_manifest(job, checked))


def submit(job: Job, checked: Checked) -> int:
    """Creates the JobSet in the cluster and namespace of kubectl's current context; returns kubectl's exit code.

    Raises:
      UserError: as `render`; or there is no kubectl.
    """
    manifest = render(job, checked)
    require_tool("kubectl", "install it with `gcloud components install kubectl`, or from kubernetes.io")
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=manifest, text=True).returncode


def _require_possible(job: Job, checked: Checked) -> None:
    accelerator = checked.accelerator
    if accelerator.kind != "tpu":
        require(not job.project, "project", "leave it out: kubectl's current context decides")
    elif job.slices > 1 and accelerator.hosts == 1:  # node pools of several such hosts are not what Multislice connects
        least = smallest_of_several_hosts(accelerator.family).name
        raise UserError(f"--slices: GKE joins only slices of several hosts, and {accelerator.name} has one; {least} would do")
    sound = not job.queue or (re.fullmatch(KUBERNETES_NAME, job.queue) is not None and len(job.queue) <= 63)
    require(sound, "queue", f"'{job.queue}' is no LocalQueue's name: at most 63 of a-z, 0-9, '-' and '.'")


def _manifest(job: Job, checked: Checked) -> dict[str, Any]:
    hosts = checked.accelerator.hosts
    # Only a pod's disruption and these exit codes may lead to a restart. The first rule that fits a failed pod decides.
    rules = [
        {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "train", "operator": "NotIn", "values": [RESTART_CODE, *KILLED]},
        },
    ]
    job_spec = {
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        "backoffLimit": 0,  # A counted failure fails the job for the reason BackoffLimitExceeded: no rule below, so a restart.
        "podFailurePolicy": {"rules": rules},
        "template": _pod(job, checked),
    }
    metadata: dict[str, Any] = {"name": job.name}
    if job.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": job.queue}
    if checked.accelerator.kind == "tpu":  # The pods of a slice must lie on the hosts of one slice, which are a node pool.
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": job.name, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": job.preemptions,
                "restartStrategy": "BlockingRecreate",  # no pod of the last attempt may meet one of the next
                "rules": [{"name": "gaveUp", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": WORKERS, "replicas": job.slices, "template": {"spec": job_spec}}],
        },
    }


def _pod(job: Job, checked: Checked) -> dict[str, Any]:
    accelerator = checked.accelerator
    resource = {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu", "cpu": "cpu"}[accelerator.kind]
    ports = {"jax": PORT} | ({"tpu": TPU_PORT} if accelerator.kind == "tpu" else {})
    if accelerator.kind == "tpu" and job.slices > 1:
        ports["megascale"] = MEGASCALE_PORT
    # Kubernetes leaves $((...)) to the shell, as it names no variable.
    number = f'export JAX_PROCESS_ID=$((SLICE_INDEX * {accelerator.hosts} + JOB_COMPLETION_INDEX)); exec "$@"'
    words = job.supervised()
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    sources: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]  # libtpu and NCCL need more than 64 MiB
    for index, bucket in enumerate(buckets(words)):
        mounts.append({"name": f"bucket-{index}", "mountPath": f"/gcs/{bucket}"})
        attributes = {"bucketName": bucket, "mountOptions": BUCKET_OPTIONS}
        csi = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": False, "volumeAttributes": attributes}
        sources.append({"name": f"bucket-{index}", "csi": csi})
    for index, claim in enumerate(volumes(words)):
        mounts.append({"name": f"claim-{index}", "mountPath": f"/mnt/{claim}"})
        sources.append({"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": claim}})
    container = {
        "name": "train",
        "image": job.image,
        "command": ["/bin/sh", "-c", number, "sh", *mounted(words)],
        "env": _environment(job, checked),
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "resources": {"requests": {resource: accelerator.chips_per_host}, "limits": {resource: accelerator.chips_per_host}},
        "volumeMounts": mounts,
    }
    tolerations: list[dict[str, Any]] = [  # What a lost host leaves behind waits for five minutes otherwise.
        {"key": f"node.kubernetes.io/{state}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}
        for state in ("not-ready", "unreachable")
    ]
    if job.spot:
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"})
    spec = {
        "restartPolicy": "Never",  # as pod failure policies demand
        "terminationGracePeriodSeconds": job.grace_seconds,
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER},
        "nodeSelector": _nodes(job, checked),
        "tolerations": tolerations,
        "containers": [container],
        "volumes": sources,
    }
    if not spec["nodeSelector"]:
        del spec["nodeSelector"]
    if buckets(words):
        # The sidecar that mounts buckets may take what it needs: its defaults are smaller than a checkpoint.
        limits = {f"gke-gcsfuse/{name}-limit": "0" for name in ("cpu", "memory", "ephemeral-storage")}
        return {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true", **limits}}, "spec": spec}
    return {"spec": spec}


def _environment(job: Job, checked: Checked) -> list[dict[str, Any]]:
    """What `distributed.start` and the TPU runtime read. SLICE_INDEX is ours, for the process's number."""
    accelerator = checked.accelerator
    first = f"{job.name}-{WORKERS}-0-0.{job.name}"  # the JobSet's headless service has its name
    slice_index = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/job-index']"}}
    variables = {
        # Named, so that a broken driver is an error and not a training on the CPU.
        "JAX_PLATFORMS": {"tpu": "tpu,cpu", "gpu": "cuda,cpu", "cpu": "cpu"}[accelerator.kind],
        "JAX_COORDINATOR_ADDRESS": f"{first}:{PORT}",
        "JAX_NUM_PROCESSES": str(job.slices * accelerator.hosts),
    }
    if accelerator.kind == "cpu":
        variables["JAX_NUM_CPU_DEVICES"] = str(accelerator.devices_per_host)
    environment: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in variables.items()]
    environment.append({"name": "SLICE_INDEX", "valueFrom": slice_index})
    if accelerator.kind == "tpu" and job.slices > 1:
        environment += [
            {"name": "MEGASCALE_COORDINATOR_ADDRESS", "value": f"{first}:{MEGASCALE_PORT}"},
            {"name": "MEGASCALE_NUM_SLICES", "value": str(job.slices)},
            {"name": "MEGASCALE_SLICE_ID", "valueFrom": slice_index},
        ]
    return environment


def _nodes(job: Job, checked: Checked) -> dict[str, str]:
    accelerator = checked.accelerator
    labels = {}
    if accelerator.kind == "tpu":
        labels["cloud.google.com/gke-tpu-accelerator"] = accelerator.gke
        labels["cloud.google.com/gke-tpu-topology"] = accelerator.topology
    if accelerator.kind == "gpu":
        labels["cloud.google.com/gke-accelerator"] = accelerator.gke
    if job.spot:
        labels["cloud.google.com/gke-spot"] = "true"
    if job.zone:
        labels["topology.kubernetes.io/zone"] = job.zone
    return labels


def _xpk(job: Job, checked: Checked) -> list[str]:
    """The same through xpk, which brings its own manifest: a command for each bucket, and one for the workload."""
    place = ["--cluster=CLUSTER"]
    place += [f"--{name}={value}" for name, value in (("project", job.project), ("zone", job.zone)) if value]
    names = buckets(job.command())
    attach = [
        [
            *("xpk", "storage", "attach", name, *place, "--type=gcsfuse", f"--bucket={name}", f"--mount-point=/gcs/{name}"),
            *("--readonly=false", "--auto-mount=false", "--size=1", f"--mount-options={BUCKET_OPTIONS}"),
        ]
        for name in names
    ]
    create = [
        *("xpk", "workload", "create", f"--workload={job.name}", *place, f"--tpu-type={checked.accelerator.gcloud}"),
        *(f"--num-slices={job.slices}", f"--docker-image={job.image}", *(f"--storage={name}" for name in names)),
        *(["--spot"] if job.spot else []),
        *(f"--max-restarts={job.preemptions}", f"--restart-on-exit-codes={RESTART_CODE}"),
        f"--termination-grace-period-seconds={job.grace_seconds}",
        f"--command={shlex.join(mounted(job.supervised()))}",
    ]
    return [shlex.join(words) for words in (*attach, create)]
