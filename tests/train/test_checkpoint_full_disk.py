"""A disk that fills or breaks at any write of a save leaves the checkpoint before it sound, and nothing else."""

import itertools
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import PretrainConfig
from gpt_jax.errors import UserError
from gpt_jax.train import checkpoint
from gpt_jax.train.checkpoint import CheckpointWriter
from gpt_jax.train.checkpoint_info import find_checkpoint, list_checkpoints
from tests.failing_writes import ERRORS, compiled, fail_write, play, run_scene, stop_failing

pytestmark = pytest.mark.slow


def state(step):
    return {"params": {"kernel": jnp.full((64, 64), step, jnp.float32), "bias": jnp.full(7, step, jnp.float32)}}


def save(run, step):
    with CheckpointWriter(run / "checkpoints", PretrainConfig(), "d0", run.parent / "tokenizer") as writer:
        writer.save(step, state(step), {"loss": 1.0}, 1.0)


def describe(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


REASONS = {
    "ENOSPC": "No space left on device",
    "EDQUOT": "Disk quota exceeded",
    "EIO": "Input/output error",
    "EROFS": "Read-only file system",
}


def fail_each_write(folder, error, forever, stride):
    """Lets the k-th write of the save of step 2 fail, for k = 1, 1 + stride, and so on until a save has fewer writes."""
    folder = Path(folder)
    run = folder / "run"
    (folder / "tokenizer").mkdir()
    for name in ("vocab.txt", "tokenizer.json"):
        (folder / "tokenizer" / name).write_text("content")
    save(run, 1)
    failures = []
    for number in itertools.count(1, int(stride)):
        fail_write(run, number, ERRORS[error], forever == "True")
        message = ""
        try:
            save(run, 2)
        except UserError as caught:
            message = str(caught)
        count = stop_failing()
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        states = [info.state for info in list_checkpoints(run)]
        failures.append(bool(message))
        if message:
            problem = f"{run}/checkpoints: checkpoint 2 could not be saved ({REASONS[error]})"
            assert message == f"{problem}; checkpoint 1 is sound: run again to continue from it", (number, message)
            assert (names, states) == (["1"], ["sound"]), (number, names, states)
            save(run, 2)
        else:  # The failure did not matter, for example because the write was tried again.
            assert (names, states) == (["1", "2"], ["sound", "sound"]), (number, names, states)
        for step in (1, 2):
            info = find_checkpoint(run / "checkpoints" / str(step), print)
            restored = checkpoint.restore_params(info, jax.tree.map(describe, state(0)["params"]))
            np.testing.assert_array_equal(restored["kernel"], state(step)["params"]["kernel"])
        shutil.rmtree(run / "checkpoints" / "2")
        if number > count:
            break
    print(sum(failures), "of", len(failures), "saves failed")


CASES = [("ENOSPC", False, 1), ("ENOSPC", True, 2), ("EDQUOT", False, 5), ("EIO", False, 3), ("EROFS", True, 5)]


@pytest.mark.parametrize(("error", "forever", "stride"), CASES)
def test_whichever_write_of_a_save_fails_the_checkpoint_before_it_is_kept_and_nothing_else(tmp_path, error, forever, stride):
    printed = run_scene(compiled(tmp_path), __file__, "fail_each_write", tmp_path, error, forever, stride)
    failed, attempts = map(int, re.fullmatch("([0-9]+) of ([0-9]+) saves failed\n", printed).groups())
    assert 80 < stride * attempts < 200
    assert failed > 0.8 * attempts


if __name__ == "__main__":
    play(globals())
