"""A run records what it chose where the config says "auto", and keeps it when it resumes."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from gpt_jax.config import MeshConfig, ModelConfig
from gpt_jax.config.load import load_config
from gpt_jax.errors import UserError
from gpt_jax.model.attention import IMPLEMENTATIONS
from gpt_jax.runtime.mesh import AXES
from gpt_jax.runtime.rundir import RunDir
from gpt_jax.runtime.sharding import make_mesh
from gpt_jax.train.choices import AUTOMATIC, changed_choices, choose, keep_choices
from gpt_jax.train.pretrain import pretrain
from gpt_jax.train.restore import load_model
from gpt_jax.train.step import jit_evaluation
from tests.tiny import replace_fields, tiny_config, trajectory, write_text


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    source = write_text(tmp_path_factory.mktemp("text"))
    return tiny_config(
        source,
        model={"attention": "auto", "loss_chunk": 0, "context_length": 72},
        train={"duration": "6 steps", "eval_every": "3 steps", "save_every": "3 steps"},
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The uninterrupted run, with the choices of this version."""
    run = tmp_path_factory.mktemp("choices") / "whole"
    pretrain(config, run)
    return run


def recorded(run):
    model = json.loads((run / "config.json").read_text())["config"]["model"]
    return {name: model[name] for name in AUTOMATIC}


def events(run):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(record["field"], record["change"]) for record in records if record.get("event") == "choice"]


def interrupted(whole, folder):
    """Returns a copy of the run that has reached only step 3."""
    run = shutil.copytree(whole, folder / "run")
    shutil.rmtree(run / "checkpoints" / "6")
    return run


def rewrite(run, **values):
    """Changes the recorded fields of the model."""
    path = run / "config.json"
    stored = json.loads(path.read_text())
    stored["config"]["model"] |= values
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("platform", "attention", "loss_chunk"), [("cpu", "blockwise", 0), ("gpu", "plain", 128), ("tpu", "pallas_tpu", 128)]
)
def test_choices_depend_on_the_platform(platform, attention, loss_chunk):
    chosen = choose(ModelConfig(), platform)
    choices = chosen.attention, chosen.remat, chosen.layer_unroll, chosen.loss_chunk
    assert choices == (attention, "dots", 1, loss_chunk)
    assert choose(chosen, platform) == chosen
    given = ModelConfig(attention="plain", remat="full", layer_unroll=4, loss_chunk=7)
    assert choose(given, platform) == given
    with pytest.raises(UserError, match=r"--model\.attention: pallas_.pu runs on .PUs, and the devices are .PUs; use auto"):
        choose(ModelConfig(attention="pallas_gpu" if platform == "tpu" else "pallas_tpu"), platform)


@pytest.mark.parametrize(("time", "attention"), [(32, "plain"), (64, "plain"), (65, "blockwise"), (2048, "blockwise")])
def test_short_sequences_use_plain_attention_on_cpus(time, attention):
    assert choose(ModelConfig(context_length=time), "cpu").attention == attention


def test_implementations_of_attention_train_alike(config, tmp_path):
    """For 20 updates with dropout, in batches and masks that do not depend on the implementation."""
    config = replace_fields(config, train={"duration": "20 steps", "eval_every": "20 steps", "save_every": "20 steps"})
    losses = []
    for attention in ("plain", "blockwise"):
        pretrain(replace_fields(config, model={"attention": attention}), tmp_path / attention)
        losses.append([float(loss) for _, kind, loss, *_ in trajectory(tmp_path / attention) if kind == "train"])
    assert len(losses[0]) == 20
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_they_are_recorded(whole):
    assert recorded(whole) == {"attention": "blockwise", "remat": "dots", "layer_unroll": 1, "loss_chunk": 0}
    assert events(whole) == []


def test_a_run_keeps_what_an_earlier_version_chose(config, tmp_path, monkeypatch):
    """A version that chose differently, and one that did not record what it chose."""
    earlier = tmp_path / "earlier"
    explicit = replace_fields(config, model={"attention": "plain", "remat": "off"})
    pretrain(explicit, earlier)
    monkeypatch.delitem(IMPLEMENTATIONS, "blockwise")  # This version's choice must not be used.
    for folder, attention in (("recorded", "plain"), ("not recorded", "auto")):
        run = interrupted(earlier, tmp_path / folder)
        rewrite(run, attention=attention)
        pretrain(config, run)
        assert trajectory(run) == trajectory(earlier)
        assert recorded(run) == {"attention": "plain", "remat": "off", "layer_unroll": 1, "loss_chunk": 0}
        assert events(run) == []


def test_a_change_is_an_event(whole, config, tmp_path, capsys):
    run = interrupted(whole, tmp_path)
    pretrain(replace_fields(config, model={"attention": "plain"}), run)
    assert events(run) == [("model.attention", "plain instead of blockwise")]
    line = "--model.attention is plain instead of blockwise, so this run is equal to an uninterrupted one only up to rounding"
    assert line in capsys.readouterr().err
    for (*where, loss), (*there, expected) in zip(
        (record[:3] for record in trajectory(run)), (record[:3] for record in trajectory(whole)), strict=True
    ):
        assert where == there
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("allow_changes", [False, True])
def test_a_damaged_record_is_named(whole, config, tmp_path, allow_changes):
    run = interrupted(whole, tmp_path)
    rewrite(run, attention="unknown")
    with pytest.raises(UserError) as error:
        pretrain(config, run, allow_changes)
    assert str(error.value).startswith(f"{run}/config.json: --model.attention: 'unknown' is not one of auto, ")


def test_other_lengths_are_a_change(whole, config):
    run = RunDir(shutil.copytree(whole, whole.parent / "lengths"))
    stored = json.loads((run.path / "config.json").read_text()) | {"lengths": [16, 32]}
    (run.path / "config.json").write_text(json.dumps(stored))
    settled = keep_choices(run, config, make_mesh(MeshConfig()))
    run.lengths = (16, 32)
    assert changed_choices(run, settled, "cpu") == {}
    run.lengths = (32,)
    assert changed_choices(run, settled, "cpu") == {"task.num-length-buckets": "1 ([32]) instead of 2 ([16, 32])"}


def test_another_platform_chooses_anew(whole, config, tmp_path):
    run = interrupted(whole, tmp_path)
    path = run / "config.json"
    stored = json.loads(path.read_text()) | {"platform": "gpu"}
    path.write_text(json.dumps(stored))
    rewrite(run, attention="plain", loss_chunk=128)
    pretrain(config, run)
    assert jax.default_backend() == "cpu"
    assert recorded(run)["attention"] == "blockwise"
    assert [name for name, _ in events(run)] == ["model.attention", "model.loss-chunk"]


# -- remat ------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
    """Stands for a device of a mesh."""

    id: int
    device_kind: str
    platform: str = "tpu"
    process_index: int = 0


def tpus(number, kind="TPU v5 lite"):
    devices = [Device(index, kind) for index in range(number)]
    return Mesh(np.array(devices).reshape(1, number, 1, 1), AXES)


def record(folder, config):
    """Returns a run on four TPUs that has recorded its config and has begun to train."""
    run = RunDir(folder)
    run.open(config, "digest", platform="tpu", devices="4 x TPU v5 lite")
    run.record("train", 1)
    run.close()
    return run


def gpt1(sequences, **model):
    config = load_config("gpt1")
    return replace_fields(config, model={"attention": "plain", "loss_chunk": 128} | model, train={"batch_size": sequences})


def test_remat_depends_on_the_batch_and_on_the_memory_of_the_devices(tmp_path):
    run = RunDir(tmp_path / "new")
    chosen = [
        keep_choices(run, gpt1(n), tpus(4, kind)).model.remat
        for n, kind in [(64, "TPU v5 lite"), (384, "TPU v5 lite"), (384, "TPU v5")]
    ]
    assert chosen == ["dots", "full", "dots"]
    with pytest.raises(UserError, match=r"--train\.batch-size: 4096 is 1024 sequences a device, .* at most"):
        keep_choices(run, gpt1(4096), tpus(4))
    with pytest.raises(UserError, match=r"96 sequences a device, which with --model\.remat off need about .*; at most"):
        keep_choices(run, gpt1(384, remat="off"), tpus(4))


@pytest.mark.parametrize(
    ("kind", "model", "attention"),
    [
        ("TPU v5 lite", {}, "pallas_tpu"),
        ("TPU v5 lite", {"context_length": 8192}, "pallas_tpu"),
        ("TPU v4", {"context_length": 8192}, "blockwise"),
        ("TPU v4", {"context_length": 4096}, "pallas_tpu"),
        ("TPU v4", {"context_length": 4096, "compute_dtype": "float32"}, "plain"),
        ("TPU v5 lite", {"num_heads": 24}, "plain"),  # heads of 32
    ],
)
def test_attention_on_tpus_depends_on_what_the_kernels_take(tmp_path, kind, model, attention):
    run, config = RunDir(tmp_path / "new"), gpt1(8, **{"attention": "auto"} | model)
    assert keep_choices(run, config, tpus(4, kind)).model.attention == attention
    if attention != "pallas_tpu":
        lengths = r".* at most (4,096 tokens in bfloat16 on a TPU v4, not 8,192|2,048 tokens in float32 on a TPU v4, not 4,096)"
        message = rf"--model\.attention: pallas_tpu takes (heads of size 64 or 128, not 32|{lengths})"
        with pytest.raises(UserError, match=message):
            keep_choices(run, replace_fields(config, model={"attention": "pallas_tpu"}), tpus(4, kind))


def test_tpus_unroll_the_layers_of_models_with_few(tmp_path):
    layers = {12: 12, 24: 1}
    for num_layers, unrolled in layers.items():
        chosen = keep_choices(RunDir(tmp_path / "new"), gpt1(64, num_layers=num_layers), tpus(4)).model
        assert chosen.layer_unroll == unrolled
    assert keep_choices(RunDir(tmp_path / "new"), gpt1(64, remat="full"), tpus(4)).model.layer_unroll == 1
    run = record(tmp_path / "run", gpt1(64, layer_unroll=3))
    assert keep_choices(run, gpt1(64), tpus(4)).model.layer_unroll == 3


def test_a_model_that_is_loaded_makes_its_own_choices(whole):
    """They were made for the devices of the run, and would unroll graphs that are exported on another machine."""
    assert recorded(whole) == {"attention": "blockwise", "remat": "dots", "layer_unroll": 1, "loss_chunk": 0}
    model = load_model(whole).config.model
    assert {name: getattr(model, name) for name in AUTOMATIC} == AUTOMATIC


def test_evaluation_does_not_depend_on_the_batch_of_the_training():
    """A model that was trained on a pod is evaluated on a few devices."""
    jit_evaluation(gpt1(4096), tpus(1), lambda config, params, batch: batch)


def test_a_run_keeps_its_remat_on_the_same_devices_and_chooses_anew_on_others(tmp_path):
    run = record(tmp_path / "run", gpt1(384, remat="off"))
    assert keep_choices(run, gpt1(384), tpus(4)).model.remat == "off"
    assert keep_choices(run, gpt1(384, remat="off"), tpus(4)).model.remat == "off"
    other = keep_choices(run, gpt1(384), tpus(8))
    assert other.model.remat == "dots"
    assert changed_choices(run, other, "tpu") == {"model.remat": "dots instead of off"}


def test_a_run_with_larger_micro_batches_chooses_its_remat_anew(tmp_path):
    run = record(tmp_path / "run", gpt1(64, remat="dots"))
    assert keep_choices(run, gpt1(384), tpus(4)).model.remat == "full"
    with pytest.raises(UserError, match=r"96 sequences a device, which with --model\.remat off need about .*; at most"):
        keep_choices(run, gpt1(384, remat="off"), tpus(4))
    with pytest.raises(UserError, match=r"1024 sequences a device"):
        keep_choices(run, gpt1(4096), tpus(4))


def test_a_run_that_did_not_record_remat_keeps_its_meaning(tmp_path):
    run = record(tmp_path / "run", gpt1(384))
    assert keep_choices(run, gpt1(384), tpus(4)).model.remat == "dots"
