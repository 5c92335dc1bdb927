"""A stand-in for gcloud. Queued resources are waited for, granted and taken away; their workers are folders on this machine.

    python fake_gcloud.py FOLDER compute tpus ...

FOLDER/script.json describes what happens, FOLDER/state.json holds the current state, FOLDER/commands.jsonl lists the commands.
The fields of the script:

    hosts           number of workers in a node
    lives           what happens to the first resource, to the second, and so on; the last entry applies to all later ones:
        states          the states that `describe` shows, one after the other, before `then`
        then            ACTIVE (the default), SUSPENDED, or FAILED with its `message`
        preempt         step of the run after which the machines are lost, two commands later, or immediately with `at_once`; the
                        resource shows it at the second `describe` after that
        hang            number of a worker whose ssh never ends, `hangs` times (default: always)
        lose            how many times the machines are lost at the next ssh although the resource stays ACTIVE
        vanish          number of the ssh at which someone else deletes the resource
    create_errors   errors of `create`, one after the other, before it succeeds
    create_silent   how many of the first `create` commands succeed but report UNAVAILABLE
    describe_errors errors of `describe` by the number of the call; "all" applies to every call
    delete_errors   errors of `delete`, one after the other, before it succeeds
    stop_errors     by node, how many ssh commands with `stop` fail
    metrics         metrics.jsonl of the run
    flags           flags of the Python that runs the training (default: flags with which it starts faster)
    environment     variables of every worker's processes; {worker}, {workers} and {port} are filled in
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

FLAGS = {
    "queued-resources create": {
        *("--node-id", "--node-count", "--node-prefix", "--accelerator-type", "--runtime-version", "--spot", "--labels")
    },
    "queued-resources describe": {"--format"},
    "queued-resources delete": {"--force"},
    "tpu-vm describe": {"--format"},
    "tpu-vm scp": {"--worker"},
    "tpu-vm ssh": {"--worker", "--command"},
}
"""The flags that `launch` uses, besides --quiet, --zone and --project. Any other flag is an error."""


def main(folder, words):
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(folder / "commands.jsonl", "a") as commands:
            commands.write(json.dumps(["gcloud", *words]) + "\n")
        script = json.loads((folder / "script.json").read_text())
        state_file = folder / "state.json"
        state = json.loads(state_file.read_text()) if state_file.exists() else {"created": 0, "described": 0, "resource": None}
        preempt(folder, script, state, commands=2)
        group, verb, *rest = words[2:]
        flags = {word for word in rest if word.startswith("--")}
        if unknown := flags - FLAGS[f"{group} {verb}"] - {"--quiet", "--zone", "--project"}:
            return fail(f"{group}.{verb}", f"unrecognized arguments: {' '.join(unknown)}")[0]
        code, jobs = {"queued-resources": run_resource_command, "tpu-vm": run_node_command}[group](
            folder, script, state, verb, rest
        )
        state_file.write_text(json.dumps(state))
    # Like the real gcloud, it waits for all workers, also for one that hangs.
    return max([code, *(job.wait() for job in jobs)])


def option(words, name, default=None):
    return words[words.index(name) + 1] if name in words else default


def fail(verb, message):
    print(f"ERROR: (gcloud.compute.tpus.{verb}) {message}", file=sys.stderr)
    return 1, []


def life(script, state):
    return script["lives"][min(state["created"], len(script["lives"])) - 1]


def run_resource_command(folder, script, state, verb, words):
    name, resource = words[0], state["resource"]
    missing = f"NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/{name}' was not found"
    if verb == "create":
        if resource:
            return fail("queued-resources.create", f"ALREADY_EXISTS: Resource '{name}' already exists")
        if errors := script.get("create_errors", [])[state.get("failed_creates", 0) :]:
            state["failed_creates"] = state.get("failed_creates", 0) + 1
            return fail("queued-resources.create", errors[0])
        state["created"] += 1
        count = int(option(words, "--node-count", "1"))
        nodes = [option(words, "--node-id", name)] if count == 1 else [f"{name}-{number}" for number in range(count)]
        plan = life(script, state)
        states = [*plan.get("states", []), plan.get("then", "ACTIVE")]
        labels = dict(pair.split("=") for pair in option(words, "--labels", "").split(",") if pair)
        state["resource"] = {"name": name, "nodes": nodes, "states": states, "state": "ACCEPTED", "port": free_port()}
        state["resource"]["labels"] = labels
        for node_name in nodes:
            for number in range(script["hosts"]):
                home(folder, node_name, number).mkdir(parents=True)
        if state["created"] <= script.get("create_silent", 0):
            return fail("queued-resources.create", "UNAVAILABLE: no answer")
        return 0, []
    if verb == "describe":
        state["described"] += 1
        errors = script.get("describe_errors", {})
        if error := errors.get(str(state["described"]), errors.get("all")):
            return fail("queued-resources.describe", error)
    if not resource:
        return fail(f"queued-resources.{verb}", missing)
    if verb == "delete":
        if errors := script.get("delete_errors", [])[state.get("failed_deletes", 0) :]:
            state["failed_deletes"] = state.get("failed_deletes", 0) + 1
            return fail("queued-resources.delete", errors[0])
        lose_machines(folder, resource)
        state["resource"] = None
        return 0, []
    resource["state"] = resource["states"].pop(0) if resource["states"] else resource["state"]
    if resource["state"] == "":  # The deletion is complete.
        lose_machines(folder, resource)
        state["resource"] = None
        return fail("queued-resources.describe", missing)
    spec = {"nodeId": resource["nodes"][0], "node": {"labels": resource["labels"]}}
    answer = {"name": name, "state": {"state": resource["state"]}, "tpu": {"nodeSpec": [spec]}}
    if resource["state"] == "FAILED" and (message := life(script, state).get("message")):
        answer["state"]["failedData"] = {"error": {"code": 8, "message": message}}
    print(json.dumps(answer))
    return 0, []


def run_node_command(folder, script, state, verb, words):
    resource, plan = state["resource"], life(script, state)
    if verb == "scp":
        *files, target = words[: words.index("--worker")]
        name, _, place = target.partition(":")
    else:
        name = words[0]
    if not resource or resource["state"] != "ACTIVE" or not home(folder, name, 0).exists():
        return fail(f"tpu-vm.{verb}", f"NOT_FOUND: Resource 'projects/p/locations/z/nodes/{name}' was not found")
    if verb == "describe":
        print("READY")
        return 0, []
    resource["ssh_commands"] = resource.get("ssh_commands", 0) + (verb == "ssh")
    if resource["ssh_commands"] == plan.get("vanish"):
        lose_machines(folder, resource)
        state["resource"] = None
        return fail("tpu-vm.ssh", "could not connect")
    if verb == "ssh" and resource.get("lost", 0) < plan.get("lose", 0):
        resource["lost"] = resource.get("lost", 0) + 1
        lose_machines(folder, resource)
        return fail("tpu-vm.ssh", "could not connect")
    failed_stops = state.setdefault("failed_stops", {})
    if " stop " in option(words, "--command", "") and failed_stops.get(name, 0) < script.get("stop_errors", {}).get(name, 0):
        failed_stops[name] = failed_stops.get(name, 0) + 1
        return fail("tpu-vm.ssh", "could not connect")
    if plan.get("at_once") and option(words, "--command", "").endswith("start"):
        subprocess.Popen([sys.executable, __file__, folder, "watch"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    jobs = []
    for number in range(script["hosts"]):
        if verb == "scp":
            for file in files:
                shutil.copy(file, home(folder, name, number) / place)
            continue
        if plan.get("hang") == number and resource.get("hung", 0) < plan.get("hangs", 1 << 30):
            resource["hung"] = resource.get("hung", 0) + 1
            jobs.append(subprocess.Popen(["sleep", "120"]))
            state["hanging"] = [*state.get("hanging", []), jobs[-1].pid]
            continue
        worker = resource["nodes"].index(name) * script["hosts"] + number
        places = {"worker": worker, "workers": len(resource["nodes"]) * script["hosts"], "port": resource["port"]}
        variables = {key: value.format(**places) for key, value in script.get("environment", {}).items()}
        variables |= {"HOME": str(home(folder, name, number)), "HOSTNAME": f"t1v-n-{name}-w-{number}", "WORKER": str(worker)}
        variables["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
        command = ["bash", "-c", option(words, "--command")]
        jobs.append(subprocess.Popen(command, cwd=home(folder, name, number), env=os.environ | variables))
    return 0, jobs


def home(folder, name, number):
    return folder / "workers" / name / str(number)


def preempt(folder, script, state, commands):
    """Takes the machines away `commands` commands after the run has reached the step in the script; returns whether it has."""
    resource, metrics = state["resource"], Path(script.get("metrics", "/nowhere"))
    due = life(script, state).get("preempt") if resource and resource["state"] == "ACTIVE" else None
    if due and not resource.get("preempted") and metrics.exists() and f'"step": {due},' in metrics.read_text():
        resource["commands_since"] = resource.get("commands_since", 0) + 1
        if resource["commands_since"] > commands:
            lose_machines(folder, resource)
            resource.update(states=["ACTIVE", "SUSPENDING", "SUSPENDED"], preempted=True)
    return bool(due and resource.get("preempted"))


def watch(folder):
    """Preempts as soon as the run reaches the step. This process is started beside the training."""
    script = json.loads((folder / "script.json").read_text())
    preempted = False
    while not preempted and (folder / "state.json").exists():
        time.sleep(0.01)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = json.loads((folder / "state.json").read_text())
            preempted = not state["resource"] or preempt(folder, script, state, commands=0)
            (folder / "state.json").write_text(json.dumps(state))


def lose_machines(folder, resource):
    """Kills the processes of the workers and removes their disks."""
    for name in resource["nodes"]:
        for pid in (folder / "workers" / name).glob("*/gpt-jax/*/pid"):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                os.killpg(int(pid.read_text().split()[1]), signal.SIGKILL)
        time.sleep(0.05)
        shutil.rmtree(folder / "workers" / name, ignore_errors=True)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


KEY = "AAAAB3"
PYTHON3 = """#!/bin/sh
[ "$1" = -m ] || exec {python} -SE "$@"
mkdir -p "$6/bin" && cp {bin}/uv "$6/bin/uv"  # pip install --quiet --target FOLDER uv
"""
UV = """#!/bin/sh
echo "$@" >> {folder}/uv.log
if [ "$1" = pip ] && [ -e {folder}/no-index ]; then echo "error: no index to install from"; exit 1; fi
[ "$1" = venv ] || exit 0
mkdir -p "$5/bin"  # venv --quiet --python 3.12 FOLDER
printf '#!/bin/sh\\nexec {training} "$@"\\n' > "$5/bin/python" && chmod +x "$5/bin/python"
"""


def install(folder, script):
    """Writes gcloud with its ssh-add, and the programs of the workers in `folder`/bin; returns the folder for PATH."""
    (folder / "bin").mkdir(parents=True)
    (folder / "gcloud").mkdir()
    (folder / "script.json").write_text(json.dumps(script))
    training = f"{sys.executable} {script.get('flags', '-SE')}"
    values = {"python": sys.executable, "training": training, "bin": folder / "bin", "folder": folder, "key": KEY}
    texts = {"bin/python3": PYTHON3, "bin/uv": UV}
    texts["gcloud/ssh-add"] = "#!/bin/sh\necho ssh-rsa {key} comment\n"
    texts["gcloud/gcloud"] = f'#!/bin/sh\nexec {sys.executable} -SE {__file__} {folder} "$@"\n'
    for name, text in texts.items():
        (folder / name).write_text(text.format(**values) if name != "gcloud/gcloud" else text)
        (folder / name).chmod(0o755)
    return folder / "gcloud"


if __name__ == "__main__":
    sys.exit(watch(Path(sys.argv[1])) if sys.argv[2:] == ["watch"] else main(Path(sys.argv[1]), sys.argv[2:]))
