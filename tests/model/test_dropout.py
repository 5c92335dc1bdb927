"""Dropout masks: the frozen definition, what a mask depends on, and a light version of benchmarks/masks_study.py."""

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.model import dropout as masks
from gpt_jax.model.dropout import Site

WORD = 0xFFFFFFFF

bits = jax.jit(masks.bits)  # compiled whole: one operation at a time, each would be compiled by itself
keep = jax.jit(masks.keep, static_argnums=3)
dropout = jax.jit(masks.dropout, static_argnums=2)


def stream_of(*place):
    return jax.jit(masks.mask_stream)(*(np.asarray(x, np.uint32) for x in place))


# The definition of docs/masks.md once more, on Python integers, sharing nothing with the module.


def threefry(k0, k1, x0, x1):
    keys = [k0, k1, k0 ^ k1 ^ 0x1BD11BDA]
    x0, x1 = (x0 + k0) & WORD, (x1 + k1) & WORD
    for round_ in range(20):
        r = [13, 15, 26, 6, 17, 29, 16, 24][round_ % 8]
        x0 = (x0 + x1) & WORD
        x1 = ((x1 << r | x1 >> (32 - r)) & WORD) ^ x0
        if round_ % 4 == 3:
            n = round_ // 4 + 1
            x0, x1 = (x0 + keys[n % 3]) & WORD, (x1 + keys[(n + 1) % 3] + n) & WORD
    return x0, x1


def finalize(x):
    x = (x ^ x >> 16) * 0x21F0AAAD & WORD
    x = (x ^ x >> 15) * 0xD35A2D97 & WORD
    return x ^ x >> 15


def expected_value(seed, step, layer, site, row, head, query, key):
    a, b = threefry(seed, step, row, layer << 20 | site << 16 | head)
    pair, which = query // 16 * 8 + query % 8, query // 8 % 2
    column = finalize(b ^ key)
    multiplier = finalize(a ^ column) | 1
    word = (finalize(a ^ pair) ^ column) * multiplier & WORD
    if which == 1:
        word = word * 0xADB4A92D & WORD
    return word >> 16 ^ 0x8000


PLACES = [
    (1, 2, 3, Site.ATTENTION, 4, 5),
    (0, 0, 0, Site.EMBEDDING, 0, 0),
    (WORD, WORD, 4095, Site.CLASSIFIER, WORD, 65535),
    (1234567890, 98765, 11, Site.RESIDUAL_MLP, 3_000_000_000, 0),
]


@pytest.mark.parametrize("place", PLACES)
def test_equals_its_definition_bit_for_bit(place):
    queries, keys = np.r_[0:40, 504:512, 70_000], np.r_[0:9, 511, 3071, 2**31]
    expected = [[expected_value(*place, int(q), int(k)) for k in keys] for q in queries]
    stream = stream_of(*place)
    assert stream.dtype == jnp.uint32
    assert [int(word) for word in stream] == list(
        threefry(place[0], place[1], place[4], place[2] << 20 | place[3] << 16 | place[5])
    )
    values = bits(stream, jnp.asarray(queries, jnp.uint32), jnp.asarray(keys, jnp.uint32))
    assert values.dtype == jnp.uint32
    np.testing.assert_array_equal(values, expected)
    on_numpy = masks.bits(np.asarray(stream), queries, keys)
    assert isinstance(on_numpy, np.ndarray)
    np.testing.assert_array_equal(on_numpy, expected)


def test_stream_is_the_threefry_that_jax_has():
    key, counter = np.array([7, 8], np.uint32), np.array([9, 1 << 20 | 2 << 16 | 3], np.uint32)
    theirs = jax.extend.random.threefry_2x32(key, counter)
    np.testing.assert_array_equal(stream_of(7, 8, 1, 2, 9, 3), theirs)


def test_golden_values():
    """Frozen with version 1. If this fails, a resumed run would see other masks: raise MASK_VERSION or undo the change."""
    assert masks.MASK_VERSION == 1
    stream = stream_of(1, 2, 3, Site.ATTENTION, 4, 5)
    assert [int(word) for word in stream] == [0x72FA1EF1, 0x03713D72]
    values = np.asarray(bits(stream, jnp.arange(16), jnp.arange(8)))
    assert values[0, :4].tolist() == [3171, 20544, 25336, 32848]
    assert values[1, :4].tolist() == [63108, 51838, 274, 29884]
    assert values[8, :4].tolist() == [64337, 13240, 59543, 6587]
    assert values[15, :4].tolist() == [27659, 31370, 18993, 65198]
    dropped = ~np.asarray(keep(stream, jnp.arange(16), jnp.arange(32), 0.1))
    words = np.packbits(dropped, axis=1).view(">u4").ravel().tolist()
    assert words[:8] == [0x81080011, 0x20210304, 0x5800, 0x4000808, 0x41004080, 0x802000, 0x1000800, 0x10C200]
    assert words[8:] == [0x81200, 0x2000A008, 0x2100, 0x2508, 0x1812000, 0x6, 0x60, 0x300A]
    assert [int(site) for site in Site] == [0, 1, 2, 3, 4]


def test_shapes_broadcast_and_tracing_changes_nothing():
    def make(seed, step, row):
        stream = masks.mask_stream(seed, step, 3, Site.ATTENTION, row[:, None], jnp.arange(3))
        return stream, keep(stream, jnp.arange(32), jnp.arange(16), 0.1)

    rows = jnp.array([0, 7], jnp.int32)
    stream, kept = jax.jit(lambda: make(5, 6, rows))()  # Python integers, known while tracing
    assert stream.shape == (2, 3, 2)
    assert kept.shape == (2, 3, 32, 16)
    assert kept.dtype == bool
    for dtype in (np.int32, np.uint32):
        traced = jax.jit(make)(dtype(5), dtype(6), np.asarray(rows, dtype))
        jax.tree.map(np.testing.assert_array_equal, (stream, kept), traced)
    np.testing.assert_array_equal(stream[1, 2], stream_of(5, 6, 3, Site.ATTENTION, 7, 2))


def test_a_block_is_a_slice_of_the_whole():
    stream = np.asarray(stream_of(0, 1, 2, Site.ATTENTION, np.arange(2)[:, None], np.arange(3)))
    whole = masks.bits(stream, np.arange(128), np.arange(96))
    for q, k, tall, wide in ((0, 0, 16, 16), (16, 32, 48, 64), (64, 5, 64, 1), (121, 95, 7, 1)):
        block = masks.bits(stream, q + np.arange(tall), k + np.arange(wide))
        np.testing.assert_array_equal(block, whole[..., q : q + tall, k : k + wide])
    # Positions of their own per batch row, as in cached decoding.
    queries = np.array([[[3, 4]], [[90, 91]]])
    ragged = masks.bits(stream, queries, np.arange(96))
    np.testing.assert_array_equal(ragged[0], whole[0, :, 3:5])
    np.testing.assert_array_equal(ragged[1], whole[1, :, 90:92])


def test_kernels_compute_by_pairs():
    @jax.jit
    def by_pairs(stream):
        a, b = stream
        pairs, keys = jnp.arange(64, dtype=jnp.uint32), jnp.arange(48, dtype=jnp.uint32)
        kept = masks.keep_pair(masks.row_term(a, pairs)[:, None], *masks.column_terms(a, b, keys), 0.1)
        return jnp.stack([half.reshape(8, 8, 48) for half in kept], 1).reshape(128, 48)

    stream = stream_of(3, 1, 4, Site.ATTENTION, 1, 5)
    np.testing.assert_array_equal(by_pairs(stream), keep(stream, jnp.arange(128), jnp.arange(48), 0.1))


def test_queries_eight_apart_share_one_word():
    stream = stream_of(3, 1, 4, Site.ATTENTION, 1, 5)
    words = masks._words(np.asarray(stream), np.arange(32), np.arange(8))
    for q in (*range(8), *range(16, 24)):
        np.testing.assert_array_equal(words[q] * np.uint32(masks.SECOND), words[q + 8])


def test_every_argument_matters():
    place = {"seed": 9, "step": 8, "layer": 7, "site": Site.RESIDUAL_MLP, "example": 6, "head": 5}

    def mask(**change):
        return np.asarray(keep(stream_of(*(place | change).values()), jnp.arange(64), jnp.arange(64), 0.5))

    base = mask()
    np.testing.assert_array_equal(base, mask())
    for name in place:
        for change in (1, -1):
            agreement = (mask(**{name: place[name] + change}) == base).mean()
            assert abs(agreement - 0.5) < 5 * 0.5 / 64, name
    swapped = mask(seed=8, step=9)
    assert abs((swapped == base).mean() - 0.5) < 5 * 0.5 / 64


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 2.0**-16])
def test_keep_is_bits_against_the_threshold(rate):
    stream = stream_of(0, 0, 0, Site.ATTENTION, jnp.arange(8), 0)
    kept = keep(stream, jnp.arange(256), jnp.arange(256), rate)
    np.testing.assert_array_equal(kept, bits(stream, jnp.arange(256), jnp.arange(256)) >= round(rate * 65536))
    share = round(rate * 65536) / 65536
    assert abs(float(kept.mean()) - (1 - share)) < 5 * (share * (1 - share) / kept.size) ** 0.5


def test_dropout():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32, 48)), jnp.float32)
    stream = stream_of(0, 1, 0, Site.EMBEDDING, jnp.arange(4), 0)
    out = dropout(x, stream, 0.1)
    kept = np.asarray(keep(stream, jnp.arange(32), jnp.arange(48), 0.1))
    assert 0 < kept.sum() < kept.size
    np.testing.assert_allclose(out, np.where(kept, x / (1 - 6554 / 65536), 0), rtol=1e-6)
    assert jax.eval_shape(lambda x: masks.dropout(x, stream, 0.1), x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert masks.dropout(x, stream, 0.0) is x
    gradient = jax.grad(lambda x: dropout(x, stream, 0.1).sum())(x)
    np.testing.assert_allclose(gradient, kept / (1 - 6554 / 65536), rtol=1e-6)


def test_limits():
    stream = stream_of(0, 0, 0, Site.ATTENTION, 0, 0)
    assert bool(keep(stream, jnp.arange(64), jnp.arange(64), 0.0).all())
    for rate in (-0.1, 1.0, 1.5, float("nan"), 1 - 2.0**-18):
        with pytest.raises(ValueError, match="dropout rate"):
            keep(stream, jnp.arange(2), jnp.arange(2), rate)
    good = {"seed": 0, "step": 0, "layer": 0, "site": 0, "example": 0, "head": 0}
    for name, limit in {"seed": 2**32, "step": 2**32, "layer": 4096, "site": 16, "example": 2**32, "head": 65536}.items():
        for wrong in (limit, -1):
            with pytest.raises(ValueError, match=name):
                masks.mask_stream(**good | {name: wrong})


def test_no_structure_in_a_few_masks():
    """Uniform values, and no correlation at the distances kernels and models would notice (limits: five deviations)."""
    size, rate = 256, 0.1
    position = jnp.arange(size)
    place = stream_of(0, jnp.arange(4)[:, None], 1, Site.ATTENTION, 2, jnp.arange(4)).reshape(16, 2)
    values = np.asarray(bits(place, position, position))
    counts = np.bincount(values.ravel() >> 4, minlength=4096)  # 256 in each
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert abs(chi2 - 4095) < 5 * (2 * 4095) ** 0.5

    share = masks.threshold(rate) / 65536
    mask = ((values < masks.threshold(rate)) - share) / (share * (1 - share)) ** 0.5
    pairs = mask.reshape(16, size // 16, 2, 8, size)
    products = {
        "next query": mask[:, 1:] * mask[:, :-1],
        "next key": mask[:, :, 1:] * mask[:, :, :-1],
        "other half": pairs[:, :, 0] * pairs[:, :, 1],
        "next stream": mask[1:] * mask[:-1],
        "rectangle": mask[:, 1:, 1:] * mask[:, 1:, :-1] * mask[:, :-1, 1:] * mask[:, :-1, :-1],
        "rectangle of halves": pairs[:, :, 0, :, 1:] * pairs[:, :, 1, :, 1:] * pairs[:, :, 0, :, :-1] * pairs[:, :, 1, :, :-1],
    }
    for name, product in products.items():
        assert abs(product.sum()) < 5 * product.size**0.5, name

    # Every rectangle at once: squared inner products of all pairs of rows average to one.
    for m in (mask, mask.transpose(0, 2, 1)):
        inner = (m @ m.transpose(0, 2, 1)) / size**0.5
        squares = (inner[:, *np.triu_indices(size, 1)] ** 2).mean(1)
        assert abs(squares.mean() - 1) < 5 * squares.std(ddof=1) / len(squares) ** 0.5 + 0.01
