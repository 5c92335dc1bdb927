"""Stands in for gcloud: queued resources are waited for, given and taken away; their workers are folders of this machine.

    python fake_gcloud.py FOLDER compute tpus ...

FOLDER/script.json says what happens; FOLDER/state.json is where things stand; FOLDER/said.jsonl lists the commands. The script:

    hosts           workers of a node
    lives           what becomes of the first resource, of the second, ... (the last one stands for all later ones):
        states          what `describe` says, one after the other, before `then`
        then            ACTIVE (if it is not said), SUSPENDED or FAILED, with its `message`
        preempt         two commands after the run has made so many steps (`at_once`: at once), the machines are gone; the
                        resource says so two looks later
        hang            the number of a worker whose ssh never ends; `hangs`: how often (always, if it is not said)
        lose            how many times the machines are gone at the next ssh although the resource stays ACTIVE
        vanish          the number of the ssh at which somebody else deletes the resource
    create_errors   what `create` complains of, one after the other, before it succeeds
    create_silent   how many of the first `create` do what they should and then complain that they were UNAVAILABLE
    describe_errors what `describe` complains of, by the number of the call; under "all", whenever it is called
    delete_errors   what `delete` complains of, one after the other, before it succeeds
    stop_errors     how often an ssh with `stop` does not get through, by node
    metrics         the run's metrics.jsonl
    flags           of the Python that runs the training; without it, such as start faster
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
        *("--node-id", "--node-count", "--node-prefix", "--accelerator-type", "--runtime-version", "--spot", "--labels"),
    },
    "queued-resources describe": {"--format"},
    "queued-resources delete": {"--force"},
    "tpu-vm describe": {"--format"},
    "tpu-vm scp": {"--worker"},
    "tpu-vm ssh": {"--worker", "--command"},
}
"""Of those that the real one has, the ones that there is a use for here; and --quiet, --zone, --project."""


def main(folder, words):
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(folder / "said.jsonl", "a") as said:
            said.write(json.dumps(["gcloud", *words]) + "\n")
        script = json.loads((folder / "script.json").read_text())
        state_file = folder / "state.json"
        state = json.loads(state_file.read_text()) if state_file.exists() else {"created": 0, "described": 0, "resource": None}
        preempt(folder, script, state, commands=2)
        group, verb, *rest = words[2:]
        flags = {word for word in rest if word.startswith("--")}
        if unknown := flags - FLAGS[f"{group} {verb}"] - {"--quiet", "--zone", "--project"}:
            return complain(f"{group}.{verb}", f"unrecognized arguments: {' '.join(unknown)}")[0]
        code, jobs = {"queued-resources": resource, "tpu-vm": node}[group](folder, script, state, verb, rest)
        state_file.write_text(json.dumps(state))
    # Like the real one it waits for all workers, and a hanging one keeps it from coming back.
    return max([code, *(job.wait() for job in jobs)])


def option(words, name, default=None):
    return words[words.index(name) + 1] if name in words else default


def complain(verb, message):
    print(f"ERROR: (gcloud.compute.tpus.{verb}) {message}", file=sys.stderr)
    return 1, []


def life(script, state):
    return script["lives"][min(state["created"], len(script["lives"])) - 1]


def resource(folder, script, state, verb, words):
    name, known = words[0], state["resource"]
    missing = f"NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/{name}' was not found"
    if verb == "create":
        if known:
            return complain("queued-resources.create", f"ALREADY_EXISTS: Resource '{name}' already exists")
        if errors := script.get("create_errors", [])[state.get("refused", 0) :]:
            state["refused"] = state.get("refused", 0) + 1
            return complain("queued-resources.create", errors[0])
        state["created"] += 1
        count = int(option(words, "--node-count", "1"))
        nodes = [option(words, "--node-id", name)] if count == 1 else [f"{name}-{number}" for number in range(count)]
        plan = life(script, state)
        states = [*plan.get("states", []), plan.get("then", "ACTIVE")]
        labels = dict(pair.split("=") for pair in option(words, "--labels", "").split(",") if pair)
        state["resource"] = {"name": name, "nodes": nodes, "states": states, "state": "ACCEPTED", "port": free_port()}
        state["resource"]["labels"] = labels
        for each in nodes:
            for number in range(script["hosts"]):
                home(folder, each, number).mkdir(parents=True)
        if state["created"] <= script.get("create_silent", 0):
            return complain("queued-resources.create", "UNAVAILABLE: no answer")
        return 0, []
    if verb == "describe":
        state["described"] += 1
        errors = script.get("describe_errors", {})
        if error := errors.get(str(state["described"]), errors.get("all")):
            return complain("queued-resources.describe", error)
    if not known:
        return complain(f"queued-resources.{verb}", missing)
    if verb == "delete":
        if errors := script.get("delete_errors", [])[state.get("kept", 0) :]:
            state["kept"] = state.get("kept", 0) + 1
            return complain("queued-resources.delete", errors[0])
        lose_machines(folder, known)
        state["resource"] = None
        return 0, []
    known["state"] = known["states"].pop(0) if known["states"] else known["state"]
    if known["state"] == "":  # it was DELETING
        lose_machines(folder, known)
        state["resource"] = None
        return complain("queued-resources.describe", missing)
    spec = {"nodeId": known["nodes"][0], "node": {"labels": known["labels"]}}
    answer = {"name": name, "state": {"state": known["state"]}, "tpu": {"nodeSpec": [spec]}}
    if known["state"] == "FAILED" and (message := life(script, state).get("message")):
        answer["state"]["failedData"] = {"error": {"code": 8, "message": message}}
    print(json.dumps(answer))
    return 0, []


def node(folder, script, state, verb, words):
    known, plan = state["resource"], life(script, state)
    if verb == "scp":
        *files, target = words[: words.index("--worker")]
        name, _, place = target.partition(":")
    else:
        name = words[0]
    if not known or known["state"] != "ACTIVE" or not home(folder, name, 0).exists():
        return complain(f"tpu-vm.{verb}", f"NOT_FOUND: Resource 'projects/p/locations/z/nodes/{name}' was not found")
    if verb == "describe":
        print("READY")
        return 0, []
    known["asked"] = known.get("asked", 0) + (verb == "ssh")
    if known["asked"] == plan.get("vanish"):
        lose_machines(folder, known)
        state["resource"] = None
        return complain("tpu-vm.ssh", "could not connect")
    if verb == "ssh" and known.get("lost", 0) < plan.get("lose", 0):
        known["lost"] = known.get("lost", 0) + 1
        lose_machines(folder, known)
        return complain("tpu-vm.ssh", "could not connect")
    unheard = state.setdefault("unheard", {})
    if " stop " in option(words, "--command", "") and unheard.get(name, 0) < script.get("stop_errors", {}).get(name, 0):
        unheard[name] = unheard.get(name, 0) + 1
        return complain("tpu-vm.ssh", "could not connect")
    if plan.get("at_once") and option(words, "--command", "").endswith("start"):
        subprocess.Popen([sys.executable, __file__, folder, "watch"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    jobs = []
    for number in range(script["hosts"]):
        if verb == "scp":
            for file in files:
                shutil.copy(file, home(folder, name, number) / place)
            continue
        if plan.get("hang") == number and known.get("hung", 0) < plan.get("hangs", 1 << 30):
            known["hung"] = known.get("hung", 0) + 1
            jobs.append(subprocess.Popen(["sleep", "120"]))
            state["hanging"] = [*state.get("hanging", []), jobs[-1].pid]
            continue
        worker = known["nodes"].index(name) * script["hosts"] + number
        places = {"worker": worker, "workers": len(known["nodes"]) * script["hosts"], "port": known["port"]}
        variables = {key: value.format(**places) for key, value in script.get("environment", {}).items()}
        variables |= {"HOME": str(home(folder, name, number)), "HOSTNAME": f"t1v-n-{name}-w-{number}", "WORKER": str(worker)}
        variables["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
        command = ["bash", "-c", option(words, "--command")]
        jobs.append(subprocess.Popen(command, cwd=home(folder, name, number), env=os.environ | variables))
    return 0, jobs


def home(folder, name, number):
    return folder / "workers" / name / str(number)


def preempt(folder, script, state, commands):
    """Takes the machines away if the run has been where the script says for so many commands."""
    known, metrics = state["resource"], Path(script.get("metrics", "/nowhere"))
    due = life(script, state).get("preempt") if known and known["state"] == "ACTIVE" else None
    if due and not known.get("preempted") and metrics.exists() and f'"step": {due},' in metrics.read_text():
        known["seen"] = known.get("seen", 0) + 1
        if known["seen"] > commands:
            lose_machines(folder, known)
            known.update(states=["ACTIVE", "SUSPENDING", "SUSPENDED"], preempted=True)
    return bool(due and known.get("preempted"))


def watch(folder):
    """Preempts at once; started beside the training."""
    script = json.loads((folder / "script.json").read_text())
    gone = False
    while not gone and (folder / "state.json").exists():
        time.sleep(0.01)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = json.loads((folder / "state.json").read_text())
            gone = not state["resource"] or preempt(folder, script, state, commands=0)
            (folder / "state.json").write_text(json.dumps(state))


def lose_machines(folder, known):
    """Kills what runs on the workers and removes their disks."""
    for name in known["nodes"]:
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
    """Puts gcloud with its ssh-add, and what the workers have into `folder`/bin; returns the folder for PATH."""
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
