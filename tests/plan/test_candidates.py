"""Candidates and their estimated times are worked out by hand for devices that have nothing but a position in a torus."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import Mesh

from gpt_jax.config import DataConfig, ModelConfig, PretrainConfig, TokenizerConfig, TrainConfig
from gpt_jax.config.load import load_config
from gpt_jax.errors import UserError
from gpt_jax.plan import candidates
from gpt_jax.plan.candidates import find_candidates, step_seconds
from gpt_jax.runtime.chips import CHIPS, GIB
from gpt_jax.runtime.mesh import AXES
from gpt_jax.train.choices import choose
from gpt_jax.train.memory_estimate import step_bytes
from tests.tiny import replace_fields

V5E = "TPU v5 lite"
LINK = 50e9
"""Bytes/s of one link of a v5e in one direction."""


@dataclasses.dataclass(frozen=True)
class Device:
    coords: tuple[int, ...]
    slice_index: int = 0
    device_kind: str = V5E
    platform: str = "tpu"
    core_on_chip: int = 0


def devices(*extents, slices=1):
    return [Device(place, number) for number in range(slices) for place in np.ndindex(*extents)]


def small(batch_size=8, **model):
    model = {"vocab_size": 1000, "context_length": 128, "num_layers": 2, "embed_dim": 16, "num_heads": 2, "mlp_dim": 64} | model
    tokenizer = DataConfig(tokenizer=TokenizerConfig(kind="sentencepiece"))
    return PretrainConfig(model=ModelConfig(**model), data=tokenizer, train=TrainConfig(batch_size=batch_size))


def found(config, places, slices=1):
    """Returns the candidates as (data, fsdp, tensor, micro-batches, remat)."""
    configs = [each.config for each in find_candidates(config, places, slices)]
    assert all(config.mesh.slice == slices for config in configs)
    axes = ("data", "fsdp", "tensor")
    return {(*(getattr(c.mesh, axis) for axis in axes), c.train.grad_accum_steps, c.model.remat) for c in configs}


def test_meshes_divide_the_batch_and_the_model():
    meshes = {(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)}  # Four devices cannot share two heads.
    assert found(small(), devices(2, 2, 1)) == {(*mesh, 1, "dots") for mesh in meshes}
    assert found(small(batch_size=2), devices(2, 2, 1)) == {(2, 1, 2, 1, "dots"), (1, 2, 2, 1, "dots")}
    assert found(small(embed_dim=6, batch_size=4), devices(2, 2, 1)) == {
        (4, 1, 1, 1, "dots"),
        (2, 2, 1, 1, "dots"),
        (2, 1, 2, 1, "dots"),
        (1, 2, 2, 1, "dots"),
    }


def test_slices_are_an_axis_of_their_own():
    assert found(small(), devices(2, 1, 1, slices=2), slices=2) == {
        (2, 1, 1, 1, "dots"),
        (1, 2, 1, 1, "dots"),
        (1, 1, 2, 1, "dots"),
    }
    first = find_candidates(small(), devices(2, 1, 1, slices=2), slices=2)[0]
    assert first.options.startswith("--mesh.slice 2 --mesh.data ")


@pytest.mark.parametrize(
    ("gigabytes", "splits"),
    [
        ({"dots": 1, "full": 1}, {(2, "dots")}),  # 8 of 16 sequences at once
        ({"dots": 2, "full": 1}, {(4, "dots"), (2, "full")}),
        ({"dots": 15, "full": 4}, {(8, "full")}),
        ({"dots": 14, "full": 3}, {(16, "dots"), (4, "full")}),
    ],
)
def test_the_fewest_micro_batches_that_fit(monkeypatch, gigabytes, splits):
    """With an invented amount of memory for each sequence, of 14.4 GiB."""

    def invented(config, sizes, platform, remat):
        return gigabytes[remat] * GIB * config.train.batch_size // (4 * config.train.grad_accum_steps)

    monkeypatch.setattr(candidates, "step_bytes", invented)
    one_head = small(batch_size=64, num_heads=1, mlp_dim=63, embed_dim=15)
    assert found(one_head, devices(4, 1, 1)) == {(4, 1, 1, *split) for split in splits}


@pytest.mark.parametrize("shape", [(8, 8, 1), (4, 4, 1)])
def test_what_is_found_fits_and_nothing_else_has_changed(shape):
    config = load_config("gpt1_1b5")
    best_first = find_candidates(config, devices(*shape))
    assert best_first
    chosen = choose(config.model, "tpu", V5E).attention
    for each in best_first:
        candidate = replace_fields(each.config, model={"attention": chosen})
        sizes = dataclasses.asdict(candidate.mesh)
        assert step_bytes(candidate, sizes, "tpu", candidate.model.remat) <= 0.9 * CHIPS[V5E].memory
        assert np.prod(list(sizes.values())) == np.prod(shape)
        back = replace_fields(each.config, model={"remat": config.model.remat}, train={"grad_accum_steps": 1})
        assert dataclasses.replace(back, mesh=config.mesh) == config
    assert [each.seconds for each in best_first] == sorted(each.seconds for each in best_first)


P, F = 1_479_539_712, 6 * (36 * 12 * 1792**2 + 50_000 * 1792) + 12 * 36 * 1792 * 1024
"""Parameters of gpt1_1b5, and its FLOPs a token."""


@pytest.mark.parametrize(
    ("sizes", "split", "communication"),
    [
        ({"data": 4}, (1, "dots"), 2 * 4 * P * 3 / 4 / (2 * LINK)),
        ({"fsdp": 4}, (1, "dots"), (2 * 2 + 4) * P * 3 / 4 / (2 * LINK)),
        ({"fsdp": 4}, (8, "full"), 8 * (2 * 2 + 4) * P * 3 / 4 / (2 * LINK)),
        ({"data": 2, "fsdp": 2}, (1, "dots"), (2 * 2 + 4) * P / 2 / LINK + 2 * 4 * P / 2 / 2 / LINK),
        ({"tensor": 4}, (1, "dots"), 4 * 36 * 2 * 2 * 512 * 1024 * 1792 * 3 / 4 / (2 * LINK)),
        ({"data": 2, "tensor": 2}, (2, "dots"), 2 * 2 * 4 * P / 2 / 2 / LINK + 4 * 36 * 2 * 2 * 256 * 1024 * 1792 / 2 / LINK),
    ],
)
def test_the_estimate_is_that_of_the_formulas(sizes, split, communication):
    """On 2 x 2 chips, each of which has one link along each axis: four devices use both, two use one."""
    micro_batches, remat = split
    config = replace_fields(load_config("gpt1_1b5"), train={"grad_accum_steps": micro_batches}, model={"remat": remat})
    computing = F * 512 * 1024 / (4 * 197e12 * 0.5) * (4 / 3 if remat == "full" else 1)
    shape = [{**dict.fromkeys(AXES, 1), **sizes}[axis] for axis in AXES]
    grid = Mesh(np.array(devices(2, 2, 1)).reshape(shape), AXES)
    assert step_seconds(config, grid) == pytest.approx(computing + communication, rel=1e-6)


@pytest.mark.parametrize(("embed_dim", "scatters"), [(24, 2), (32, 1)])
def test_gradients_in_parts_of_tiles_are_summed_as_wholes(embed_dim, scatters):
    """Four devices have 6 or 8 rows each. An all-reduce takes as long as two reduce-scatters."""
    config = small(embed_dim=embed_dim)
    seconds = [
        step_seconds(config, Mesh(np.array(devices(2, 2, 1)).reshape(shape), AXES)) for shape in ((1, 1, 4, 1), (1, 4, 1, 1))
    ]
    gathers, gradients = 2 * 2 + 4 * scatters, 4 * 2
    assert seconds[0] - seconds[1] == pytest.approx((gathers - gradients) * config.model.num_parameters * 3 / 4 / (2 * LINK))


def test_less_communication_is_better():
    """A wide model with few tokens sends fewer activations than weights; a narrow one with many tokens the other way around."""
    wide = small(batch_size=2, embed_dim=1024, mlp_dim=16_384, num_heads=16)
    narrow = small(batch_size=512, embed_dim=16, mlp_dim=64)
    assert [find_candidates(config, devices(2, 1, 1))[0].config.mesh.tensor for config in (wide, narrow)] == [2, 1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (small(kind="lstm"), "--search: is for Transformers; the memory of a model of kind lstm is not estimated"),
        (small(batch_size=3), "--search: no mesh of 4 devices divides the batch of 3 and the model; use a multiple of 4"),
        (load_config("gpt1_7b"), "--topology: 4 devices do not suffice: even the smallest step needs "),
    ],
)
def test_without_candidates(config, message):
    with pytest.raises(UserError, match=f"^{message}"):
        find_candidates(config, devices(2, 2, 1))
