"""The JobSet: it is valid, its pods have what their processes need, and the right failures lead to a restart."""

import copy
import functools
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gpt_jax.errors import UserError
from gpt_jax.launch import checks, gke
from gpt_jax.launch.job import Job
from gpt_jax.runtime.accelerators import parse_accelerator
from gpt_jax.train import checkpoint_info
from tests.tiny import smoke_overrides

BUCKETS = ("--data.store", "gs://data/store")


def make(accelerator="v5e-16", **fields):
    defaults = {"verb": "pretrain", "config": "gpt1", "overrides": BUCKETS, "workdir": "gs://runs/a", "name": "a"}
    return Job(accelerator=parse_accelerator(accelerator), **defaults | {"image": "host/repository/gpt-jax:1"} | fields)


check = functools.cache(checks.check)  # A check takes a large part of a second.


def rendered(job):
    check(job, gke)
    return gke.render(job)


def manifest(**fields):
    return yaml.safe_load(rendered(make(**fields)))


def job_of(document):
    (replicated,) = document["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod_of(document):
    return job_of(document)["template"]["spec"]


def container_of(document):
    (container,) = pod_of(document)["containers"]
    return container


TWO_SLICES = {
    "config": "gpt1_1b5",
    "overrides": (*BUCKETS, "--mesh.slice", "2", "--mesh.fsdp", "16"),
    "slices": 2,
    "spot": True,
    "zone": "us-east5-a",
    "queue": "team",
}
KINDS = {
    "slice": {},
    "two slices": TWO_SLICES,
    "host": {"accelerator": "v6e-8"},
    "GPU nodes": {
        "accelerator": "h100-8",
        "slices": 2,
        "overrides": ("--mesh.slice", "2", "--data.store", "/mnt/disk/store"),
        "workdir": "/mnt/disk/a",
    },
    "CPUs": {"accelerator": "cpu-4", "slices": 2},
}


# -- the manifest -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_the_manifest_is_valid(fields, invalid):
    document = manifest(**fields)
    assert invalid(document, "jobset") == []
    # Rules of the API beyond its types.
    pod, container = pod_of(document), container_of(document)
    assert pod["restartPolicy"] == "Never"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    for rule in job_of(document)["podFailurePolicy"]["rules"]:
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container["name"]
            assert rule["onExitCodes"]["values"] == sorted(set(rule["onExitCodes"]["values"]))


def test_the_validator_detects_mistakes(invalid):
    document = manifest()
    for path, value in [
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
        (("spec", "replicatedJobs", 0, "replicas"), "2"),
        (("metadata", "name"), "Big"),
        (("metadata", "annotations", "a"), 1),
    ]:
        wrong = copy.deepcopy(document)
        inner = wrong
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        assert len(invalid(wrong, "jobset")) == 1, path
    del document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert invalid(document, "jobset") == ["$.spec.replicatedJobs[0].template.spec.template.spec: containers is missing"]


def test_two_slices_are_two_jobs_with_a_pod_for_each_host():
    document = manifest(**TWO_SLICES)
    (replicated,) = document["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    assert {name: job_of(document)[name] for name in ("completionMode", "completions", "parallelism", "backoffLimit")} == {
        "completionMode": "Indexed",
        "completions": 4,
        "parallelism": 4,
        "backoffLimit": 0,
    }
    assert pod_of(document)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
        "topology.kubernetes.io/zone": "us-east5-a",
    }
    assert container_of(document)["resources"]["limits"] == {"google.com/tpu": 4}
    assert document["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    assert document["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"] == "cloud.google.com/gke-nodepool"


def test_gpu_nodes_are_selected_by_their_label():
    document = manifest(**KINDS["GPU nodes"])
    assert pod_of(document)["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container_of(document)["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert "labels" not in document["metadata"]


def test_buckets_and_volumes_are_mounted_where_the_command_reads_them():
    document = manifest(overrides=(*BUCKETS, "--init.from", "/mnt/disk/run", "--data.source", "gs://data/text"))
    words = container_of(document)["command"]
    assert words[words.index("--workdir") + 1] == "/gcs/runs/a"
    assert words[words.index("--data.store") + 1] == "/gcs/data/store"
    mounts = {mount["mountPath"]: mount["name"] for mount in container_of(document)["volumeMounts"]}
    assert list(mounts) == ["/dev/shm", "/gcs/runs", "/gcs/data", "/mnt/disk"]
    volumes = {volume.pop("name"): volume for volume in pod_of(document)["volumes"]}
    assert volumes[mounts["/dev/shm"]] == {"emptyDir": {"medium": "Memory"}}
    assert volumes[mounts["/mnt/disk"]] == {"persistentVolumeClaim": {"claimName": "disk"}}
    csi = volumes[mounts["/gcs/data"]]["csi"]
    assert (csi["driver"], csi["volumeAttributes"]["bucketName"]) == ("gcsfuse.csi.storage.gke.io", "data")
    # Files belong to the user of the container, and folders with many files can be renamed.
    user = pod_of(document)["securityContext"]["runAsUser"]
    assert {f"uid={user}", f"gid={user}", "implicit-dirs"} < set(csi["volumeAttributes"]["mountOptions"].split(","))
    assert "rename-dir-limit" in csi["volumeAttributes"]["mountOptions"]
    assert job_of(document)["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    assert "metadata" not in job_of(manifest(workdir="/mnt/disk/a", overrides=("--data.source", "/mnt/disk/text")))["template"]


# -- failures ---------------------------------------------------------------------------------------------------------------


def jobset_action(document, code, disrupted=False):
    """Returns what the JobSet does after a pod ended with an exit code, by the rules of the controllers of Job and JobSet."""
    job = job_of(document)
    reason = "BackoffLimitExceeded" if job["backoffLimit"] == 0 else None
    for rule in job["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            listed = code in rule["onExitCodes"]["values"]
            matches = listed if rule["onExitCodes"]["operator"] == "In" else not listed
        else:
            matches = disrupted and {"type": "DisruptionTarget", "status": "True"} in rule["onPodConditions"]
        if matches and rule["action"] == "Ignore":
            return "replace this pod alone"
        if matches:
            reason = {"FailJob": "PodFailurePolicy", "Count": reason}[rule["action"]]
            break
    policy = document["spec"]["failurePolicy"]
    for rule in policy["rules"]:
        if reason in rule.get("onJobFailureReasons", [reason]):
            return rule["action"]
    return f"restart, at most {policy['maxRestarts']} times"


@pytest.mark.parametrize(
    ("code", "disrupted", "expected"),
    [
        (42, False, "restart, at most 7 times"),  # preempted after saving
        (42, True, "restart, at most 7 times"),
        (137, True, "restart, at most 7 times"),  # The node is gone.
        (137, False, "restart, at most 7 times"),  # killed from outside
        (1, True, "restart, at most 7 times"),
        (1, False, "FailJobSet"),  # `supervise` gave up.
        (2, False, "FailJobSet"),  # a user's mistake
        (127, False, "FailJobSet"),  # The image lacks the command.
    ],
)
def test_preemptions_restart_the_jobset_and_other_exit_codes_fail_it(code, disrupted, expected):
    assert jobset_action(manifest(preemptions=7), code, disrupted) == expected


def test_crashes_are_counted_in_the_pod_and_the_grace_period_is_kept():
    document = manifest(crashes=5, preemptions=7, grace_seconds=300)
    words = container_of(document)["command"]
    options = ["--preemptions=7", "--crashes=5", "--grace-seconds=300"]
    assert words[words.index("supervise") :][:5] == ["supervise", *options, "--"]
    assert pod_of(document)["terminationGracePeriodSeconds"] == 300


# -- processes --------------------------------------------------------------------------------------------------------------


def pods(document):
    """Yields the hostname and the environment of each pod, as the controllers of JobSet and Job and the kubelet make them."""
    name = document["metadata"]["name"]
    (replicated,) = document["spec"]["replicatedJobs"]
    for slice_index in range(replicated["replicas"]):
        for index in range(job_of(document)["completions"]):
            labels = {
                "jobset.sigs.k8s.io/jobset-name": name,
                "jobset.sigs.k8s.io/job-index": str(slice_index),
                "batch.kubernetes.io/job-completion-index": str(index),
            }
            environment = {"JOB_COMPLETION_INDEX": str(index), "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
            for variable in container_of(document)["env"]:
                path = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
                environment[variable["name"]] = labels[path.split("'")[1]] if path else variable["value"]
            yield f"{name}-{replicated['name']}-{slice_index}-{index}.{document['spec']['network']['subdomain']}", environment


def command_of(document, environment):
    """Returns the command of the container, with the references to variables that Kubernetes would resolve."""
    resolve = lambda match: environment.get(match[1], match[0])  # noqa: E731
    return [re.sub(r"\$\(([^)]*)\)", resolve, word) for word in container_of(document)["command"]]


@pytest.fixture
def reporter(tmp_path):
    """A PATH on which `gpt-jax` prints its arguments and its place among the processes."""
    program = tmp_path / "bin" / "gpt-jax"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: $*"\n')
    program.chmod(0o755)
    return f"{program.parent}:/usr/bin:/bin"


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_every_pod_has_its_number_and_the_address_of_the_first(fields, reporter):
    document = manifest(**fields)
    all_pods = list(pods(document))
    places = []
    for _, environment in all_pods:
        command = command_of(document, environment)
        result = subprocess.run(command, env={"PATH": reporter} | environment, capture_output=True, text=True, check=True)
        places.append(result.stdout.partition(": supervise ")[0])
    first = all_pods[0][0]
    assert places == [f"{number} of {len(all_pods)} at {first}:1234" for number in range(len(all_pods))]
    ports = {port["name"]: port["containerPort"] for port in container_of(document)["ports"]}
    assert ports["jax"] == 1234


def test_only_jobs_of_several_slices_have_the_variables_that_connect_slices():
    document = manifest(**TWO_SLICES)
    all_pods = list(pods(document))
    assert [environment["MEGASCALE_SLICE_ID"] for _, environment in all_pods] == ["0"] * 4 + ["1"] * 4
    assert {environment["MEGASCALE_NUM_SLICES"] for _, environment in all_pods} == {"2"}
    assert {environment["MEGASCALE_COORDINATOR_ADDRESS"] for _, environment in all_pods} == {f"{all_pods[0][0]}:8080"}
    assert {"name": "megascale", "containerPort": 8080} in container_of(document)["ports"]
    for kind in ("slice", "GPU nodes", "CPUs"):
        assert not any("MEGASCALE" in name for _, environment in pods(manifest(**KINDS[kind])) for name in environment)


def test_every_attempt_uses_the_same_compiled_programs():
    folders = {environment["JAX_COMPILATION_CACHE_DIR"] for _, environment in pods(manifest(**KINDS["two slices"]))}
    assert len(folders) == 1
    assert folders.pop().endswith("/compiled")


def test_the_platform_is_named_so_that_a_broken_driver_is_an_error():
    platforms = {kind: next(pods(manifest(**fields)))[1]["JAX_PLATFORMS"] for kind, fields in KINDS.items()}
    assert platforms == {"slice": "tpu,cpu", "two slices": "tpu,cpu", "host": "tpu,cpu", "GPU nodes": "cuda,cpu", "CPUs": "cpu"}


@pytest.mark.slow
def test_two_pods_train_together(tmp_path):
    """The command of the container runs in two processes that have only what Kubernetes gives them."""
    bucket = tmp_path / "gcs" / "data"
    bucket.mkdir(parents=True)
    train = {"duration": "4 steps", "save_every": "2 steps", "eval_every": "4 steps"}
    overrides = (*smoke_overrides(bucket, data={"source": "gs://data/text.jsonl"}, train=train), "--data.store", "")
    document = manifest(config="smoke", overrides=overrides, accelerator="cpu-2", slices=2, crashes=0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for host, environment in pods(document):
        assert environment["JAX_COORDINATOR_ADDRESS"] == "a-workers-0-0.a:1234"
        here = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path)} | environment
        here["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # those of the compiler
        here["JAX_COORDINATOR_ADDRESS"] = address  # No service resolves the name here,
        command = [
            word.replace("/gcs/", f"{tmp_path}/gcs/") for word in command_of(document, environment)
        ]  # and no bucket is mounted.
        with open(tmp_path / host, "wb") as log:
            processes.append(subprocess.Popen(command, env=here, stdout=log, stderr=log, start_new_session=True))
    try:
        codes = [process.wait(240) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, 9)
    logs = "\n".join((tmp_path / host).read_text(errors="replace") for host, _ in pods(document))
    assert codes == [0, 0], logs
    assert "4 x cpu | mesh data=4" in logs, logs
    assert [info.step for info in checkpoint_info.list_checkpoints(tmp_path / "gcs" / "runs" / "a") if info.state == "sound"] == [
        2,
        4,
    ], logs


# -- kubectl and xpk --------------------------------------------------------------------------------------------------------


def test_kubectl_gets_what_a_dry_run_prints(tmp_path, monkeypatch):
    program = tmp_path / "kubectl"
    program.write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/words\ncat > {tmp_path}/given\nexit 3\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    job = make()
    assert gke.submit(job) == 3
    assert (tmp_path / "words").read_text() == "apply -f -\n"
    assert (tmp_path / "given").read_text() == rendered(job)


def test_without_kubectl_nothing_is_submitted(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="kubectl is not installed on this machine: install"):
        gke.submit(make())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": ""}, "--image: name a container image"),
        ({"workdir": "runs/a"}, "--workdir: 'runs/a' cannot be reached from the workers"),
        ({"accelerator": "h100-8", "project": "mine"}, "--project: leave it out; kubectl's current context selects the project"),
        ({"accelerator": "cpu-4", "project": "mine"}, "--project: leave it out"),
        (
            {"accelerator": "v5e-8", "slices": 2, "overrides": (*BUCKETS, "--mesh.slice", "2")},
            "--slices: GKE connects only slices with several hosts; use v5e-16 or larger",
        ),
        ({"accelerator": "v5p-8", "slices": 2, "overrides": (*BUCKETS, "--mesh.slice", "2")}, "use v5p-16 or larger"),
        ({"queue": "Team"}, "--queue: 'Team' cannot be a LocalQueue's name"),
        ({"queue": "my_team"}, "--queue: "),
        ({"queue": "a" * 64}, "--queue: "),
        ({"workdir": "/mnt/My_disk/a"}, "--workdir: '/mnt/My_disk/a': 'My_disk' cannot be the name of a PersistentVolumeClaim"),
        ({"overrides": ("--data.store", "store")}, "--data.store: 'store' cannot be reached from the workers"),
    ],
)
def test_jobs_that_gke_cannot_run_are_refused_in_one_line(fields, message):
    with pytest.raises(UserError) as raised:
        check(make(**fields), gke)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_commands_of_xpk_describe_the_same_job():
    lines = [line.removeprefix("# ") for line in rendered(make(**TWO_SLICES, project="mine")).splitlines() if "xpk " in line]
    attach, create = [line for line in lines if "storage attach" in line], lines[-1]
    place = "--cluster=CLUSTER --project=mine --zone=us-east5-a"
    assert [line.split()[3] for line in attach] == ["runs", "data"]
    assert all(f"{place} --type=gcsfuse" in line and "--mount-point=/gcs/" in line for line in attach)
    assert create.startswith(f"xpk workload create --workload=a {place} --tpu-type=v5litepod-16 --num-slices=2 ")
    for flag in ("--spot", "--storage=runs --storage=data", "--max-restarts=100", "--restart-on-exit-codes=42"):
        assert f" {flag} " in create
    assert "--workdir /gcs/runs/a --data.store /gcs/data/store --mesh.slice 2" in create
    # Characters with a meaning in a shell are quoted.
    odd = {"project": "$(reboot)", "image": "host/image:1;reboot", "overrides": (*BUCKETS, "--data.text-field", "it's a `text`")}
    lines = [shlex.split(line.removeprefix("# ")) for line in rendered(make(**odd)).splitlines() if line[:6] == "# xpk "]
    assert all("--project=$(reboot)" in words for words in lines)
    assert "--docker-image=host/image:1;reboot" in lines[-1]
    assert shlex.split(lines[-1][-1].removeprefix("--command="))[-1] == "it's a `text`"
    assert "xpk" not in rendered(make(**KINDS["GPU nodes"]))
