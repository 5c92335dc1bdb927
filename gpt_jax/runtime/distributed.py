"""Several processes of one run: starting, agreeing on what they run, waiting for each other with a word, stopping together."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt_jax.config import DistributedConfig
from gpt_jax.errors import TrainingError, UserError

Log = Callable[[str], None]


def start(config: DistributedConfig, log: Log) -> None:
    """Joins the other processes of this run, if there are any; to be called before anything else touches JAX's devices.

    In this order: the config's coordinator; JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID (or an indexed
    Kubernetes job's JOB_COMPLETION_INDEX); a SLURM step of several tasks, an indexed Kubernetes job, or a TPU pod, all of which
    JAX detects. Otherwise this process is alone.

    Raises:
      UserError: the environment's variables do not make sense.
      TrainingError: the others did not come within `timeout_seconds`.
    """
    if jax.distributed.is_initialized():  # by an earlier run of this process
        return
    arguments = _cluster(config)
    if arguments is None:
        return
    who = f"process {arguments['process_id']} of {arguments['num_processes']}" if arguments else "this process"
    where = arguments.get("coordinator_address", "the coordinator that the cluster names")
    failure = f"{who} could not join the others at {where} in {config.timeout_seconds} s"
    # When its own time is up, JAX aborts the process with a stack trace, which nothing can catch: so ours is up before.
    watch = threading.Timer(config.timeout_seconds, _leave, (failure,))
    watch.daemon = True
    watch.start()
    with waiting(f"{who} to join the others at {where}", log):
        try:
            jax.distributed.initialize(**arguments, initialization_timeout=config.timeout_seconds + 60)
        except (RuntimeError, ValueError) as error:
            raise TrainingError(f"{failure}: {str(error).splitlines()[0]}") from error
        finally:
            watch.cancel()


def _leave(reason: str) -> None:
    """Ends this process at once, wherever its main thread is."""
    print(f"gpt-jax: {reason}", file=sys.stderr, flush=True)
    os._exit(TrainingError.exit_code)


@contextlib.contextmanager
def losing_peers() -> Iterator[None]:
    """Around the training of several processes: ends this one with exit code 1 when a computation fails, as it does when
    another process is gone. At once, because whatever comes later (a pending save, JAX's farewell) would wait for that process
    for a minute or more, until JAX aborts.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = " ".join(str(error).split())[:200]
        _leave(
            f"process {jax.process_index()} of {jax.process_count()} lost another one ({reason}); start all of them again to go "
            "on from the newest checkpoint"
        )


def _cluster(config: DistributedConfig) -> dict[str, Any] | None:
    """Arguments of jax.distributed.initialize: explicit ones, {} for what JAX detects itself, None for a single process."""
    if config.coordinator:
        return {"coordinator_address": config.coordinator, "num_processes": config.num_processes, "process_id": config.process_id}
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env:
        try:
            count = int(env["JAX_NUM_PROCESSES"])
            number = int(env.get("JAX_PROCESS_ID") or env["JOB_COMPLETION_INDEX"])
        except (KeyError, ValueError):
            raise UserError(
                "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set to whole numbers as well"
            ) from None
        return {"coordinator_address": env["JAX_COORDINATOR_ADDRESS"], "num_processes": count, "process_id": number}
    slurm = int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    kubernetes = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    tpu_device = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    tpu_wanted = "tpu" in (env.get("JAX_PLATFORMS") or "tpu")
    tpu_pod = tpu_device and tpu_wanted and importlib.util.find_spec("libtpu") is not None
    return {} if slurm or kubernetes or tpu_pod else None


def is_primary() -> bool:
    """Whether this process writes the run's folder and talks to the person."""
    return jax.process_index() == 0


@contextlib.contextmanager
def waiting(what: str, log: Log, every: float = 15.0) -> Iterator[None]:
    """While the body runs, says every `every` seconds what is being waited for: a hang without a word is worse than an error."""
    done = threading.Event()

    def remind() -> None:
        started = time.monotonic()
        while not done.wait(every):
            log(f"still waiting for {what} ({time.monotonic() - started:.0f} s)")

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def first_alone(what: str, log: Log) -> Iterator[None]:
    """Has process 0 run the body before the others do, so that it can make what they find; `what` names it.

    Raises:
      UserError: the body's of process 0, on every process.
    """
    if jax.process_count() == 1:
        yield
    elif not is_primary():
        if mistake := _told("", f"process 0 to finish {what}", log)[0]:
            raise UserError(mistake)
        yield
    else:
        others = f"the other {jax.process_count() - 1} processes to come for {what}"
        try:
            yield
        except UserError as error:
            _told(str(error), others, log)
            raise
        _told("", others, log)


def agree(value: int) -> int:
    """Process 0's value, on every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int64(value))) if jax.process_count() > 1 else value


def require_agreement(facts: Mapping[str, str], log: Log) -> None:
    """Compares what every process says of itself with what most of them say; all of them must call it.

    Args:
      facts: by their names, such as "commit"; a few kilobytes. One that is not there, or empty, is "none".

    Raises:
      UserError: some differ; the message, the same on all processes, says which process of which host differs in what.
    """
    if jax.process_count() == 1:
        return
    own = json.dumps({"host": socket.gethostname(), **facts})
    told = [json.loads(one) for one in _told(own, f"all {jax.process_count()} processes to say what they run", log)]
    names = dict.fromkeys(name for one in told for name in one if name != "host")  # a host may lack what another has
    differences = [difference for name in names if (difference := _difference(name, told))]
    if differences:
        raise UserError(f"the processes of this run do not agree: {'; '.join(differences)}; start the same on all hosts")


def _difference(name: str, told: list[dict[str, str]]) -> str:
    """Which processes have something else than most of them, or in a tie than the first of them; empty: all have the same."""
    values = [one.get(name) or "none" for one in told]
    usual = Counter(values).most_common(1)[0][0]  # of equally common values the one met first
    hosts = [f"process {number} ({one['host']})" for number, one in enumerate(told)]
    odd = [(host, value) for host, value in zip(hosts, values, strict=True) if value != usual]
    if not odd:
        return ""
    others = "the others" if values.count(usual) > 1 else hosts[values.index(usual)]
    (host, value), *rest = odd
    return ", ".join([f"{host} has {name} {value}", *(f"{host} {value}" for host, value in rest), f"{others} {usual}"])


def _told(own: str, what: str, log: Log) -> list[str]:
    """What each process tells the others, in their order; all of them must call it."""
    text = np.frombuffer(own.encode(), np.uint8)
    with waiting(what, log):
        sizes = multihost_utils.process_allgather(np.int32(text.size))
        texts = multihost_utils.process_allgather(np.pad(text, (0, max(int(sizes.max()), 1) - text.size)))
    return [bytes(row[:size]).decode() for row, size in zip(texts, sizes, strict=True)]


class StopRequest:
    """Notices SIGTERM (a preemption) and the first Ctrl-C, so that the loop can save and leave between two updates.

    With several processes the notice may reach only one; JAX's preemption service then makes all of them stop at one step.
    """

    def __init__(self) -> None:
        self.asked = False
        self._updates = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once

    def now(self) -> bool:
        """Whether to stop after the update that has just been dispatched; the same answer on every process."""
        self._updates += 1
        if jax.process_count() == 1:
            return self.asked
        # The service has all stop at the count after the largest that it has heard of: so it counts from 1, in a resumed run too.
        return bool(multihost_utils.reached_preemption_sync_point(self._updates))
