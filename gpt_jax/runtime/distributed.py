"""Multi-process runs: startup, consistency checks, synchronization, and coordinated shutdown."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt_jax.config import DistributedConfig
from gpt_jax.errors import Preempted, TrainingError, UserError
from gpt_jax.runtime import environment, lock
from gpt_jax.runtime.console import Log
from gpt_jax.runtime.signals import StopSignals


def start(config: DistributedConfig, log: Log) -> None:
    """Joins the other processes of this run, if there are any. Call it before anything else uses JAX's devices.

    The cluster is described, in order of precedence, by the config's coordinator; by JAX_COORDINATOR_ADDRESS with
    JAX_NUM_PROCESSES and JAX_PROCESS_ID (or the JOB_COMPLETION_INDEX of an indexed Kubernetes job); or by a SLURM step of several
    tasks, an indexed Kubernetes job, or a TPU pod, all of which JAX detects. Otherwise the run has a single process.

    Raises:
      UserError: the environment variables are invalid or incomplete, or the devices that they name do not exist.
      TrainingError: the other processes did not connect within `timeout_seconds`.
    """
    arguments = environment.cluster_arguments(config)
    if arguments is not None and not jax.distributed.is_initialized():  # initialized by an earlier run in this process
        _join(arguments, config.timeout_seconds, log)
    environment.require_devices()


def _join(arguments: dict[str, Any], seconds: int, log: Log) -> None:
    """Joins the other processes; see `start`."""
    who = f"process {arguments['process_id']} of {arguments['num_processes']}" if arguments else "this process"
    where = arguments.get("coordinator_address", "the coordinator that the cluster specifies")
    failure = f"{who} could not join the others at {where} within {seconds} s"
    # At its own timeout, JAX aborts the process with a stack trace that cannot be caught, so this timer's limit is shorter.
    timer = threading.Timer(seconds, _exit_now, (failure,))
    timer.daemon = True
    timer.start()
    with waiting(f"{who} to join the others at {where}", log):
        try:
            jax.distributed.initialize(**arguments, initialization_timeout=seconds + 60)
        except RuntimeError as error:
            raise TrainingError(f"{failure}: {str(error).splitlines()[0]}") from error
        except ValueError as error:
            problem = f"JAX cannot find the processes of this run in the cluster's variables ({error})"
            raise UserError(f"{problem}; set {environment.JOIN}") from error
        finally:
            timer.cancel()


def _exit_now(reason: str) -> None:
    """Prints the reason, releases the locks and exits the process immediately, from any thread."""
    print(f"gpt-jax: {reason}", file=sys.stderr, flush=True)
    lock.release_all()
    os._exit(TrainingError.exit_code)


@contextlib.contextmanager
def exit_if_peer_lost() -> Iterator[None]:
    """Exits with code 1 if a computation in the body fails because another process is gone, or if this one has lost its lock.

    In a multi-process run, any failed computation is treated as a lost process. The exit is immediate, because a pending save and
    JAX's shutdown would wait a minute or more for the other process, until JAX aborts.
    """
    try:
        yield
    except lock.LockLost as error:
        if jax.process_count() > 1:
            _exit_now(str(error))
        raise
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = " ".join(str(error).split())[:200]
        problem = f"process {jax.process_index()} of {jax.process_count()} lost another process ({reason})"
        _exit_now(f"{problem}; restart all processes to continue from the newest checkpoint")


def is_primary() -> bool:
    """Returns whether this process writes the run's folder and prints lines for the user."""
    return jax.process_index() == 0


@contextlib.contextmanager
def waiting(what: str, log: Log, every: float = 15.0) -> Iterator[None]:
    """Logs what the body is waiting for every `every` seconds, so that a hang is never silent."""
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
def primary_first(what: str, log: Log) -> Iterator[None]:
    """Runs the body on process 0 and then on the others, which can use its result (`what` describes the result in messages).

    Raises:
      UserError: the body raised it on process 0; all processes then raise it.
    """
    if jax.process_count() == 1:
        yield
    elif not is_primary():
        if mistake := _exchange("", f"process 0 to finish {what}", log)[0]:
            raise UserError(mistake)
        yield
    else:
        waiting_for = f"the other {jax.process_count() - 1} processes to reach {what}"
        try:
            yield
        except UserError as error:
            _exchange(str(error), waiting_for, log)
            raise
        _exchange("", waiting_for, log)


@contextlib.contextmanager
def locked(folder: Path, log: Log) -> Iterator[None]:
    """Holds the lock of a folder (`lock.FolderLock`) on process 0, for all processes of the run, which wait for it together.

    Raises:
      UserError: another run holds it, and this one does not wait for it; or the folder cannot be written.
      Preempted: a stop was requested while waiting.
    """
    own = lock.FolderLock(folder, log)
    try:
        with StopRequest() as stop:
            acquired = False
            while not acquired:
                with primary_first(f"the lock of {folder}", log):
                    acquired = is_primary() and own.try_acquire()
                acquired = bool(broadcast(int(acquired)))
                if stop.after_update():
                    raise Preempted(f"{folder}: stop requested while waiting for the lock of this folder")
                if not acquired:
                    lock.pause()
        yield
    finally:
        own.release()


def broadcast(value: int) -> int:
    """Returns process 0's value on every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int64(value))) if jax.process_count() > 1 else value


def require_agreement(facts: Mapping[str, str], log: Log) -> None:
    """Checks that all processes have the same facts. Every process must call it.

    Args:
      facts: values by name, such as "commit", a few kilobytes in total. A missing or empty value counts as "none".

    Raises:
      UserError: some facts differ. The message is the same on all processes and names the ones with less common values.
    """
    if jax.process_count() == 1:
        return
    own = json.dumps({"host": socket.gethostname(), **facts})
    everyone = [json.loads(text) for text in _exchange(own, f"all {jax.process_count()} processes to report their settings", log)]
    names = dict.fromkeys(name for other in everyone for name in other if name != "host")  # The names may differ, too.
    differences = [difference for name in names if (difference := _difference(name, everyone))]
    if differences:
        raise UserError(f"the processes of this run do not agree: {'; '.join(differences)}; run the same command on all hosts")


def _difference(name: str, everyone: list[dict[str, str]]) -> str:
    """Returns a phrase that names the processes whose fact differs from the most common value; empty if there are none."""
    values = [facts.get(name) or "none" for facts in everyone]
    usual = Counter(values).most_common(1)[0][0]  # Ties go to the first value.
    hosts = [f"process {number} ({facts['host']})" for number, facts in enumerate(everyone)]
    odd = [(host, value) for host, value in zip(hosts, values, strict=True) if value != usual]
    if not odd:
        return ""
    others = "the others" if values.count(usual) > 1 else hosts[values.index(usual)]
    (host, value), *rest = odd
    return ", ".join([f"{host} has {name} {value}", *(f"{host} {value}" for host, value in rest), f"{others} {usual}"])


def _exchange(text: str, what: str, log: Log) -> list[str]:
    """Returns the texts of all processes in order. Every process must call it. `what` names the awaited event in messages."""
    data = np.frombuffer(text.encode(), np.uint8)
    with waiting(what, log):
        sizes = multihost_utils.process_allgather(np.int32(data.size))
        rows = multihost_utils.process_allgather(np.pad(data, (0, max(int(sizes.max()), 1) - data.size)))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


class StopRequest(StopSignals):
    """Records SIGTERM (a preemption) and the first Ctrl-C, so that the loop can save and exit between two updates.

    In a multi-process run, the signal may reach only one process. JAX's preemption service then stops all of them at the same
    step.
    """

    def __init__(self) -> None:
        super().__init__(second_interrupt_kills=True)
        self._updates = 0

    def __enter__(self) -> Self:
        if jax.process_count() == 1:
            super().__enter__()
        return self

    def after_update(self) -> bool:
        """Returns whether to stop after the update that has just been dispatched; the answer is the same on every process."""
        self._updates += 1
        if jax.process_count() == 1:
            return self.count > 0
        # The service stops all processes one count after the largest reported count, so every run counts from 1.
        return bool(multihost_utils.reached_preemption_sync_point(self._updates))
