"""Checkpoints survive what happens to them: kills, full disks, flipped bytes, other meshes, old formats."""

import base64
import hashlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from gpt_jax.errors import UserError
from gpt_jax.train import checkpoint
from gpt_jax.train.checkpoint import Checkpoints


def values(step):
    """The state of a step: a function of the step alone, so that any process can tell whether a checkpoint is right."""
    matrix = np.arange(32, dtype=np.float32).reshape(8, 4) * np.float32(step + 0.5)
    return {"params": {"block": {"kernel": matrix, "bias": matrix[0]}}, "moments": {"kernel": -matrix}, "step": np.int32(step)}


def state(step):
    return jax.tree.map(jnp.asarray, values(step))


def abstract(tree):
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), tree)


def writer(run, keep_latest=2, keep_best=0, tokenizer=None):
    return Checkpoints(
        run / "checkpoints",
        keep_latest=keep_latest,
        keep_best=keep_best,
        config_json='{"train": {"seed": 3}}',
        config_digest="c0",
        data_digest="d0",
        tokenizer=tokenizer,
    )


def save(run, *steps, losses=None, **options):
    with writer(run, **options) as checkpoints:
        for i, step in enumerate(steps):
            checkpoints.save(step, state(step), {"loss": losses[i]} if losses else {})


def steps(run):
    """Names of the step folders on disk, and nothing else may lie there."""
    return sorted((path.name for path in (run / "checkpoints").iterdir()), key=lambda name: (len(name), name))


def expect(info, step):
    """The checkpoint holds exactly the state of `step`."""
    restored = checkpoint.restore(info, abstract(state(step)))
    jax.tree.map(np.testing.assert_array_equal, restored, values(step))
    assert jax.tree.map(lambda array: array.dtype, restored) == jax.tree.map(lambda array: array.dtype, values(step))


def quiet(line):
    raise AssertionError(f"nothing should have been said, but: {line}")


def spawn(scene, *arguments, prefix=(), **environment):
    """Runs one of this file's functions in a Python process of its own."""
    command = [*prefix, sys.executable, __file__, scene.__name__, *map(str, arguments)]
    defaults = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment = os.environ | defaults | environment
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process):
    """Waits for a process to end well; returns what it printed."""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    return out, err


class Crash(BaseException):
    """Stands for the end of the process at this very place."""


def crash(*_):
    raise Crash


def crash_before_seal(run, step, monkeypatch, **options):
    """Leaves the folder of `step` as a kill between Orbax's commit and the manifest does."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_seal", crash)
        with pytest.raises(Crash):
            save(run, step, **options)


# -- what is written --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_state_config_tokenizer_and_metrics(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("a b c")
    save(tmp_path, 40, losses=[2.5], tokenizer=tmp_path / "tokenizer")
    info = checkpoint.resolve(tmp_path, quiet)
    assert (info.step, info.state, info.metrics, info.path) == (40, "sound", {"loss": 2.5}, tmp_path / "checkpoints" / "40")
    assert info.size == sum(file.stat().st_size for file in info.path.rglob("*") if file.is_file())
    expect(info, 40)
    assert checkpoint.read_config(info) == {"train": {"seed": 3}}
    assert (info.path / "tokenizer" / "vocab.txt").read_text() == "a b c"


def test_the_manifest_vouches_for_every_file(tmp_path):
    save(tmp_path, 40)
    folder = tmp_path / "checkpoints" / "40"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    del files["manifest.json"]
    assert manifest["files"] == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    own = manifest.pop("sha256")
    assert own == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    del manifest["files"]
    assert manifest == {
        "format_version": 1,
        "step": 40,
        "config_digest": "c0",
        "data_digest": "d0",
        "mask_version": 1,
        "permutation_version": 1,
        "metrics": {},
        "process_count": 1,
        "device_count": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
    }


def test_saved_values_are_those_at_the_call_although_the_buffers_are_donated(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda array: array * 0 - 1, tree), donate_argnums=0)
    ramp = np.arange(2_000_000, dtype=np.float32)
    overwrite({"a": jnp.array(ramp), "b": jnp.array(ramp)})  # Compiled, so that it runs while the save is still writing.
    with writer(tmp_path, keep_latest=9) as checkpoints:
        for step in range(5):
            tree = {"a": jnp.array(ramp + step), "b": jnp.array(ramp - step)}
            shape = abstract(tree)
            checkpoints.save(step, tree, {})
            jax.block_until_ready(overwrite(tree))
            jax.tree.map(lambda array: array.delete(), tree)
    for info in checkpoint.inspect(tmp_path):
        restored = checkpoint.restore(info, shape)
        np.testing.assert_array_equal(restored["a"], ramp + info.step)
        np.testing.assert_array_equal(restored["b"], ramp - info.step)


def test_no_save_is_dropped_when_they_follow_each_other_at_once(tmp_path):
    save(tmp_path, *range(6), keep_latest=6)
    assert [(info.step, info.state) for info in checkpoint.inspect(tmp_path)] == [(step, "sound") for step in range(6)]


def test_a_failed_save_is_raised_by_the_next_call(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, writer(tmp_path) as checkpoints:
        patch.setattr(checkpoint, "_seal", crash)
        checkpoints.save(1, state(1), {})
        with pytest.raises(Crash):
            checkpoints.save(2, state(2), {})
    assert steps(tmp_path) == ["1"]


# -- what stays -------------------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_stay(tmp_path):
    losses = {10: 5.0, 20: 1.0, 30: 4.0, 40: 2.0, 50: 1.0, 60: float("nan"), 70: 6.0}
    after = {
        10: ["10"],
        20: ["10", "20"],
        30: ["20", "30"],  # The two newest; 20 is the best too.
        40: ["20", "30", "40"],
        50: ["40", "50"],  # As good as 20, and newer.
        60: ["50", "60"],  # No loss: never the best.
        70: ["50", "60", "70"],
    }
    with writer(tmp_path, keep_latest=2, keep_best=1) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, state(step), {"loss": loss})
            checkpoints.wait()
            assert steps(tmp_path) == after[step]
    infos = checkpoint.inspect(tmp_path)
    assert [info.step for info in checkpoint.best(infos, 2)] == [50, 70]
    assert infos[1].metrics == {}


def test_a_sound_checkpoint_stays_until_the_next_one_is_sealed(tmp_path, monkeypatch):
    save(tmp_path, 10, keep_latest=1)
    crash_before_seal(tmp_path, 20, monkeypatch, keep_latest=1)
    assert [(info.step, info.state) for info in checkpoint.inspect(tmp_path)] == [(10, "sound"), (20, "incomplete")]
    lines = []
    expect(checkpoint.resolve(tmp_path, lines.append), 10)
    assert lines == ["checkpoint 20 is incomplete (file manifest.json: missing, so its save was cut short); using 10"]
    save(tmp_path, 20, keep_latest=1)
    assert steps(tmp_path) == ["20"]
    expect(checkpoint.resolve(tmp_path, quiet), 20)


def test_saving_a_step_again_replaces_it_without_a_moment_of_danger(tmp_path, monkeypatch):
    with writer(tmp_path) as checkpoints:
        checkpoints.save(10, state(99), {})  # The only checkpoint, with other values than it will have.
    crash_before_seal(tmp_path, 10, monkeypatch)
    lines = []
    info = checkpoint.resolve(tmp_path, lines.append)
    assert info.step == 10
    assert lines == ["checkpoint 10 is incomplete (file manifest.json: missing, so its save was cut short); using 10.replaced"]
    expect(info, 99)
    save(tmp_path, 10)
    assert steps(tmp_path) == ["10"]
    expect(checkpoint.resolve(tmp_path, quiet), 10)


def test_going_back_past_a_damaged_checkpoint(tmp_path):
    save(tmp_path, 10, 20, 30, keep_latest=3)
    flip(tmp_path / "checkpoints" / "30" / "config.json")
    assert checkpoint.resolve(tmp_path, lambda line: None).step == 20
    save(tmp_path, 25, keep_latest=1)
    assert steps(tmp_path) == ["25", "30"]
    save(tmp_path, 30, keep_latest=1)
    assert steps(tmp_path) == ["30"]
    expect(checkpoint.resolve(tmp_path, quiet), 30)


def test_what_killed_saves_left_is_cleared_at_the_next_start(tmp_path):
    (tmp_path / "checkpoints" / "35.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    save(tmp_path, 30)
    assert steps(tmp_path) == ["30"]


def test_prune(tmp_path, monkeypatch):
    save(tmp_path, 10, 20, 30, 40, losses=[1.0, 2.0, 3.0, 4.0], keep_latest=4)
    crash_before_seal(tmp_path, 50, monkeypatch)
    flip(tmp_path / "checkpoints" / "30" / "config.json")
    removed = checkpoint.prune(tmp_path, keep_latest=1, keep_best=1)
    assert [(info.step, info.state) for info in removed] == [(20, "sound"), (30, "damaged")]
    assert steps(tmp_path) == ["10", "40", "50"]  # 50 may be about to be sealed by a run that is going on.
    for step in ("10", "40"):
        flip(tmp_path / "checkpoints" / step / "config.json")
    assert checkpoint.prune(tmp_path, keep_latest=1, keep_best=0) == []  # No sound one: whatever can be rescued stays.
    with pytest.raises(UserError, match="keep-latest"):
        checkpoint.prune(tmp_path, keep_latest=0, keep_best=1)


# -- damage -----------------------------------------------------------------------------------------------------------------


def flip(file):
    """Changes one bit of one byte in the middle of a file; gives an empty file one byte."""
    data = bytearray(file.read_bytes() or b"\x01")
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_damage_to_any_file_is_named_and_the_previous_checkpoint_used(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("a b c")
    save(tmp_path, 30, 40, tokenizer=tmp_path / "tokenizer")
    folder = tmp_path / "checkpoints" / "40"
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert len(names) >= 10
    for name in names:
        original = (folder / name).read_bytes()
        flip(folder / name)
        lines = []
        assert checkpoint.resolve(tmp_path, lines.append).step == 30
        [line] = lines
        assert line.startswith(f"checkpoint 40 is damaged (file {name}: ")
        assert line.endswith("); using 30")
        (folder / name).write_bytes(original)
    assert checkpoint.resolve(tmp_path, quiet).step == 40


@pytest.mark.parametrize("position", [0, 5, 60, 400, 900, -40, -1])
def test_no_byte_of_the_manifest_can_change_unnoticed(tmp_path, position):
    save(tmp_path, 40, losses=[2.5])
    manifest = tmp_path / "checkpoints" / "40" / "manifest.json"
    data = bytearray(manifest.read_bytes())
    data[position] ^= 1
    manifest.write_bytes(data)
    assert [info.state for info in checkpoint.inspect(tmp_path)] == ["damaged"]


def test_truncated_and_missing_files_are_noticed_without_checksums(tmp_path):
    save(tmp_path, 30, 40)
    (tmp_path / "checkpoints" / "30" / "state" / "_METADATA").unlink()
    os.truncate(tmp_path / "checkpoints" / "40" / "config.json", 3)
    assert [(info.state, info.problem) for info in checkpoint.inspect(tmp_path, checksums=False)] == [
        ("damaged", "file state/_METADATA: No such file or directory"),
        ("damaged", "file config.json: 3 bytes instead of 22"),
    ]


def test_no_sound_checkpoint_is_an_error(tmp_path):
    save(tmp_path, 30, 40)
    for step in ("30", "40"):
        flip(tmp_path / "checkpoints" / step / "config.json")
    with pytest.raises(UserError, match=r"no sound checkpoint: 40 is damaged \(file config.json.*; 30 is damaged") as error:
        checkpoint.resolve(tmp_path, quiet)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no sound checkpoint"):  # Starting over would lose the run.
        checkpoint.newest(tmp_path, quiet)


def test_a_run_whose_first_save_was_cut_short_starts_at_its_beginning(tmp_path, monkeypatch):
    assert checkpoint.newest(tmp_path, quiet) is None
    crash_before_seal(tmp_path, 10, monkeypatch)
    assert checkpoint.newest(tmp_path, quiet) is None
    with pytest.raises(UserError, match="no finished checkpoint"):
        checkpoint.resolve(tmp_path, quiet)


def test_a_folder_of_several_seeds_names_one(tmp_path):
    for seed in (0, 1):
        (tmp_path / f"seed-{seed}" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=f"several seeds; name one of them, as {tmp_path}/seed-0"):
        checkpoint.resolve(tmp_path, quiet)


def test_a_step_folder_names_itself(tmp_path):
    save(tmp_path, 30, 40)
    expect(checkpoint.resolve(tmp_path / "checkpoints" / "30", quiet), 30)
    flip(tmp_path / "checkpoints" / "30" / "config.json")
    with pytest.raises(UserError, match=r"checkpoints/30: is damaged \(file config.json: checksum differs\)"):
        checkpoint.resolve(tmp_path / "checkpoints" / "30", quiet)
    [damaged, _] = checkpoint.inspect(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.restore(damaged, abstract(state(30)))
    with pytest.raises(UserError, match="no such folder"):
        checkpoint.resolve(tmp_path / "elsewhere", quiet)
    shutil.copytree(tmp_path / "checkpoints" / "40", tmp_path / "checkpoints" / "50")
    assert checkpoint.resolve(tmp_path, lambda line: None).step == 40  # 50 is not what its folder says.


# -- formats ----------------------------------------------------------------------------------------------------------------


def test_a_newer_format_is_refused(tmp_path):
    save(tmp_path, 40)
    file = tmp_path / "checkpoints" / "40" / "manifest.json"
    manifest = json.loads(file.read_text()) | {"format_version": 2}
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(manifest, sort_keys=True, indent=1) + "\n")
    with pytest.raises(UserError, match="format version 2, and this gpt_jax reads up to 1; update"):
        checkpoint.resolve(tmp_path, quiet)


def test_a_checkpoint_of_format_1_still_loads(tmp_path):
    archive = io.BytesIO(base64.b85decode("".join(FORMAT_1.split())))
    with tarfile.open(fileobj=archive, mode="r:xz") as tar:
        tar.extractall(tmp_path / "checkpoints", filter="data")
    info = checkpoint.resolve(tmp_path, quiet)
    assert (info.step, info.metrics) == (7, {"loss": 1.25})
    assert checkpoint.read_manifest(info)["config_digest"] == "c0"
    assert checkpoint.read_config(info) == {"train": {"seed": 3}}
    wanted = abstract({"params": {"kernel": jnp.zeros((2, 3))}, "step": jnp.int32(0)})
    restored = checkpoint.restore(info, wanted)
    np.testing.assert_array_equal(restored["params"]["kernel"], [[0, 0.5, 1], [1.5, 2, 2.5]])
    assert int(restored["step"]) == 7
    assert (info.path / "tokenizer" / "vocab.txt").read_text() == "a b c\n"


# -- restoring --------------------------------------------------------------------------------------------------------------


def test_all_differences_are_listed_at_once(tmp_path):
    save(tmp_path, 40)
    info = checkpoint.resolve(tmp_path, quiet)
    wanted = {
        "params": {"block": {"kernel": jnp.zeros((8, 5)), "bias": jnp.zeros(4, jnp.bfloat16), "gain": jnp.zeros(4)}},
        "step": jnp.int32(0),
    }
    with pytest.raises(UserError) as error:
        checkpoint.restore(info, abstract(wanted))
    assert str(error.value).endswith(
        "checkpoint 40 does not fit this config: moments/kernel float32[8,4] is not wanted; "
        "params/block/bias is float32[4], not bfloat16[4]; params/block/gain float32[4] is missing; "
        "params/block/kernel is float32[8,4], not float32[8,5]"
    )


def test_parameters_alone_can_be_read(tmp_path):
    save(tmp_path, 40)
    info = checkpoint.resolve(tmp_path, quiet)
    params = checkpoint.restore_part(info, abstract(state(0)["params"]))
    jax.tree.map(np.testing.assert_array_equal, params, values(40)["params"])
    with pytest.raises(UserError, match=r"params/block/bias float32\[4\] is not wanted"):
        checkpoint.restore_part(info, {"block": {"kernel": abstract(jnp.zeros((8, 4)))}})


def save_and_restore_on_meshes(run):
    def place(tree, shape, rows, columns):
        mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
        specs = {0: jax.P(), 1: jax.P(columns), 2: jax.P(rows, columns)}
        return jax.tree.map(lambda array: jax.device_put(array, jax.NamedSharding(mesh, specs[array.ndim])), tree)

    with writer(run) as checkpoints:
        checkpoints.save(40, place(state(40), (2, 2, 2), ("data", "fsdp"), "tensor"), {})
    info = checkpoint.resolve(run, print)
    for placed in (place(state(0), (1, 4, 2), "tensor", "fsdp"), place(state(0), (8, 1, 1), "data", None), state(0)):
        restored = checkpoint.restore(info, abstract(placed))
        jax.tree.map(np.testing.assert_array_equal, restored, values(40))
        assert jax.tree.map(lambda array: array.sharding, restored) == jax.tree.map(lambda array: array.sharding, placed)
    assert "tensorflow" not in sys.modules
    print(jax.device_count())


def test_any_mesh_restores_and_nothing_is_said(tmp_path):
    out, err = finish(spawn(save_and_restore_on_meshes, tmp_path, JAX_NUM_CPU_DEVICES="8"))
    assert (out, err) == ("8\n", "")
    expect(checkpoint.resolve(tmp_path, quiet), 40)  # Saved on eight devices, restored on whatever is here.


def save_and_restore_as_one_of_two(run, port, process):
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(array):
        sharding = jax.NamedSharding(mesh, jax.P("data") if array.ndim else jax.P())
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def share(step):
        return jax.tree.map(place, values(step))

    with writer(run) as checkpoints:
        for step in (10, 20, 30, 30):
            checkpoints.save(step, share(step), {})
    multihost_utils.sync_global_devices("saved")
    info = checkpoint.resolve(run, print)
    restored = checkpoint.restore(info, abstract(share(0)))
    jax.tree.map(np.testing.assert_array_equal, multihost_utils.process_allgather(restored, tiled=True), values(30))
    print(info.step, checkpoint.read_manifest(info)["process_count"])


def test_two_processes_save_and_restore_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [spawn(save_and_restore_as_one_of_two, tmp_path, port, process, JAX_NUM_CPU_DEVICES="2") for process in range(2)]
    try:
        for process in processes:
            out, _ = finish(process)
            assert out.splitlines()[-1] == "30 2"
    finally:
        for process in processes:
            process.kill()
    assert steps(tmp_path) == ["20", "30"]
    expect(checkpoint.resolve(tmp_path, quiet), 30)


# -- interruptions ----------------------------------------------------------------------------------------------------------


def save_for_ever(run, back):
    info = checkpoint.newest(run, print)
    step = info.step - int(back) if info else 0
    with writer(run) as checkpoints:
        while True:
            step += 1
            checkpoints.save(step, state(step), {})
            print("saving", step, flush=True)


def test_killed_at_any_time_nothing_sealed_is_lost_and_nothing_sound_is_wrong(tmp_path):
    chance = random.Random(0)
    reached = 0
    for back in (0, 1, 0):  # The second process repeats a step that is already there.
        with spawn(save_for_ever, tmp_path, back) as process:
            lines = [process.stdout.readline() for _ in range(chance.randint(2, 4))]
            time.sleep(chance.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.read().splitlines()
            errors = process.stderr.read()
        started = [int(line.split()[1]) for line in lines if line.startswith("saving")]
        assert len(started) >= 2, errors
        newest = checkpoint.resolve(tmp_path, lambda line: None).step
        assert newest >= max(reached, started[-1] - 1)  # A save starts when the previous one is sealed.
        reached = newest
        for info in checkpoint.inspect(tmp_path):
            assert info.state != "damaged"
            if info.state == "sound":
                expect(info, info.step)


def save_until_full(run):
    big = {"weights": jax.random.normal(jax.random.key(0), (300, 1000))}
    try:
        with writer(run, keep_latest=99) as checkpoints:
            for step in range(1, 99):
                checkpoints.save(step, big, {})
    except UserError as error:
        print(error)
    infos = checkpoint.inspect(run)
    restored = checkpoint.restore(checkpoint.resolve(run, print), abstract(big))
    print([info.state for info in infos], bool((restored["weights"] == big["weights"]).all()))


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_kept(tmp_path):
    prefix = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=3m tmpfs "{tmp_path}" && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs user namespaces (unshare -rm) to mount a small file system")
    out, err = finish(spawn(save_until_full, tmp_path, prefix=prefix))
    assert (out, err) == (
        f"{tmp_path}/checkpoints: checkpoint 3 could not be saved (No space left on device); "
        "checkpoint 2 is sound: run again to go on from there\n['sound', 'sound'] True\n",
        "",
    )


# A tar file of checkpoint 7, written by the first release of format 1. Never make it anew: it stands for users' checkpoints.
FORMAT_1 = r"""
{Wp48S^xk9=GL@E0stWa8~^|S5YJf5;7|Vuf?WU`i@Y3t0aqY5pwmS<&cNiWxzH_)?VqxPo^%t0Rj=E^Rh*lu;yDB8Y2sIf7T&bQy$3v}JJZD*6ZsGd3`c8m-Z8+S
K8X(sF?<_yQ(ed5SD8xFbohQuCf!=XL4a-6!IzEb-E7_49q7Ja8Ami>y%uXV)s+B<gPU-xN`~2Ib1j@_B%53WYY6PjBze-lTO_Kj04IX~zP*0(Bs#C5RX58hU%W0Q
>@E=5owY~9#99Z6;|&ihD(?=(6I8)Z<Y%2E<k9p}547w|*%m4xvU%dJod>d^hF>xUYDo9h3UOeNYdw)lb(G{HcP;9AHizCKc7c>FO2@A1TYuR5ZOLkA>nKP3Dt#(n
Ok)LJ6HoWvn;$($T7xA+je0uz5u@F~>p3OdNc^ZHB0LNk4*$WQ6`<A=kA*h^ypR?#W}D?MJJEd5Ak;Rnw9Y7`S-K#4;l<tE@^%BeeO-iP<<`-a<2h}@R655*!{BW5
bCQwohh<wI?W26Y=_-2<<_|(ngkS;6Y`|0NTb{ku?gK3#^9ri>96%`};)pYTHaI@7R|H4*UB4o=%XY`)FXLjO6KXSJ{o>tyNeYL#s5-#;0Vx<G_)F=GOftKFX{%;|
)5OfDo}FcVq(;fz+1#Fx3El7%g`@pe{%-YO$oApY!5E8aG%c$#YqoTsW&@UPF1n=GOcvh|Ip$%Y&JR#!`I=+Oh7XK63m%*X#Jcc}AS-bc5Ry&$1U9#-)YEYo<rxg^
99Is>f~lb#srI5LMEWnRfxtc02Vf57wsQ_Xd6ekLD|Ww!c0wf!zdD1a8__{9=qI#&tUS9{EXKCh%YHcY$M4J1$0FHz=F8G>6dAYJiuN-C3jt-Ph6$Sml7<Sq&RBtR
5L`;r$9ZG3)>7Xd=@VcTDl3oZ2$?}xB<6h|uT#%y?80$%QM#tQ(azzJtXhKqB_quACIVPz{^RUF@md{cuUyxAVb4~#2_&NpK7i!hsPJkfih3(F%8<T4m)t^~1mRRa
s@#}fT-!DQ$FbSYP(SbFpEH5T78y^Q%cH!0^0-k)f*_Jj3Uqa$tpNv96A&9OxrBKrKh-rt%}kxIm}zA>db*|0b5t#O{6Yo>7D+O%Q@fvPqdI2x@$YUYaz1crr47R=
iU<w`<WcsHm79UG*D`=GSG*m&1zXLF0xAZ-5pW15T07-*J&2E8f5be#=y=kG_ON4K5IHtUTLn#)3q5wg*&upgRE)A1tq^0MUQ2D8(Ll|Y^gj-mf2O_22qt@Aidm_%
QMfoaiZbtHRB$t<D9xhJxMC9hPm5VQVH>fp`k+6u5yLKEurKKyDXD$#dZ}VOIQ0@37k`qwlfrF7LW|e#VOu2F_cWP6vQc0j@jlis9i&v&Zy1s}O%fsig9g=BS4`ij
K?#b`=vn`1YoCB7Rk&aT%|Y6V-o91*9r~&#O2s#~6ndCuvJ9oj#_V&BD4-rV?s)2Oe}+7aRmo|ODB>}#;!()A4e9jud;kEhfc-V$6t6#`3P(f@D%VMshF7O(WdaRc
+Gc}fF9Rxs-J=a><h5dfs2ZL9{gPZ@pWw37zq1(cd#YBQ>GLsHGa~jpsHg%H7`WhH8u|@t@ze2tCyUm1>PMPjUzP&{94aEs>iP^Oajg$OOXqdnc^agA0&M>S&C_Cl
1+XT^HA%=y7+L$Ds_lmMr?tP_(#y#KbZA=h8Yce*9?ncw*V7KZ<`HKBzJIC>1*K)o$&9MBJiVY@y1gp08bm<f$<F<(pd3in9JtV`Pz8d&q5457Pi0i^DG7el&EEMZ
*lcLh$%rwN$7BzlI+_PHSuo^emV3!?{4dwY>*|kXT>SQ7ODhI9&nl0{d0^!Yl#4z;=PMg7k@OPA4RWNy7~D+UvNJKOJrAVgAt#bTC_et!mdOo}jf$=XLBl`bH}#}5
MZY$<Slw&dlS97B=HWDULD<cyuTE!?D%w+yWO<2{r7lZIZ<Zs{z^sDX$%GB`9J<jjoXO_;+o9}P13{Aw2QUw3hT{Lx8j`x04lli{O`f}Rz38fv_B@~M7{sgx@Ho^2
Y8^=?{*979X}O$?{<5V?NvexELE+6JP(a0BY($8jxaX!ZFYY@VdkHg*Ny35kjC6tklIxD`r5Q1@9sU51>%k{_mI=^9UdiP$#c)EExb4!lvIxsZq$_s$L-ZT`g{NBG
+9C5tq@TPIc6jY=FE_+%d);O@e}!1DgHz_cLMGAVOkX*?*tt(m(QiZzru+N0b<6^6;;8pm@X|noM&Mx)@J<^d0~7eaRymS{c?HGpC}Z89@w*#-DF^9Z6kTpj^$v72
B!4C%;I(g1q8uzTzW)B@TJ&+5tiGBdb1n<|N_;QpH(H9`F6em&Qc+dxJZi1peX^1FzDm#;P3(QBHGV^gh$RXDXYVkWG5UuNyL~6^P5p7(vkoamJZW>epUzN1Y6`Er
lGD6TWyyQUj5&iwlvvF7XGxFBBuDoH5@wGc;cnq1O&&aFX<F320hy|z3|{3Ku5n+W)=M6pc6a)pK6@o2zhjQ4gn*e%dBC$ALb7dS6av=$mn$(`Y%D&UpaS?tD#Ag9
jvH9@m$}5(8H~9B-0b&!XwIAU2y*B?v4}!nTQ9?FwMECC2twuTqz^e%j@}f-N6oc2bMdk+*9O^d*z!5Tf7#Ae9jM>ZB_3Jgs2E_#u;e{s+|3t+y;kAwpkFrs*G1G?
x$w-Uq6M&M(F7Ow=+av`6j44F495JYTtC=TP}?B9PFq?9w+$@K(jv+0Z9@S*y9f5TteOY_(@_n_NqV*Hn*gJatFYFsbl1HlJlAJC!b769Cpts>OQ<1n5|#CMXnn*k
z+qc>|7Z=K00000!An`e9qKx+00Ev6fS>^Y#>az{vBYQl0ssI200dcD
"""

if __name__ == "__main__":  # In a process that `spawn` started.
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
