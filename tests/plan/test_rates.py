"""Rates: interpolation by hand, the cache, and the small programs that measure them."""

import math

import jax
import jax.numpy as jnp
import pytest

from gpt_jax.plan import rates as rates_module
from gpt_jax.plan.rates import best_of, find_rates, interpolate, product_layout
from tests.plan.rates_by_hand import rates


def test_times_are_interpolated_in_the_logarithms():
    points = [(100, 2.0), (10_000, 200.0), (40_000, 400.0)]
    assert interpolate(points, 1000) == pytest.approx(20.0)
    assert interpolate(points, 20_000) == pytest.approx(200 * math.sqrt(2))
    assert interpolate(points, 10_000) == pytest.approx(200.0)


def test_a_short_transfer_takes_as_long_as_the_shortest_and_a_long_one_is_proportional():
    points = [(100, 2.0), (10_000, 200.0)]
    assert interpolate(points, 5) == 2.0
    assert interpolate(points, 30_000) == pytest.approx(600.0)


def test_the_rate_of_a_product_is_interpolated_between_its_neighbors():
    grid = [(m, n, k, 1e9 * m * n * k) for m in (1, 4) for n in (1, 4) for k in (1, 4)]
    measured = rates(products={"NN f32": grid})
    assert measured.product_rate("NN f32", 4, 4, 1) == pytest.approx(16e9)
    assert measured.product_rate("NN f32", 2, 4, 1) == pytest.approx(8e9)
    assert measured.product_rate("NN f32", 2, 2, 2) == pytest.approx(8e9)
    assert measured.product_rate("NN f32", 100, 1, 1) == pytest.approx(4e9)  # beyond the grid


def test_a_product_that_was_too_large_to_measure_has_the_rate_of_the_nearest_one():
    grid = [(1, 1, 1, 1e9), (64, 1, 1, 2e9), (64, 64, 1, 3e9), (1, 1, 64, 4e9)]
    assert rates(products={"NN f32": grid}).product_rate("NN f32", 64, 64, 64) == pytest.approx(3e9)


@pytest.mark.parametrize(("layout", "left", "right"), [("NN", (3, 5), (5, 2)), ("NT", (3, 5), (2, 5)), ("TN", (5, 3), (5, 2))])
def test_layouts_have_the_names_of_blas(layout, left, right):
    axes = left.index(5), right.index(5)
    assert product_layout(*axes, batched=False) == layout
    assert product_layout(*axes, batched=True) == f"batched {layout}"


def test_the_better_of_two_measurements_counts():
    first = rates(products={"NN f32": [(1, 1, 1, 1e9), (2, 2, 2, 5e9)]}, call=3.0, other_load=0.5)
    second = rates(products={"NN f32": [(1, 1, 1, 2e9), (2, 2, 2, 4e9)]}, call=2.0, other_load=0.1, curves={"copy": [(1, 9.0)]})
    best = best_of(first._replace(curves={"copy": [(1, 8.0)]}), second)
    assert best.products == {"NN f32": [(1, 1, 1, 2e9), (2, 2, 2, 5e9)]}
    assert best.curves == {"copy": [(1, 8.0)]}
    assert (best.call, best.other_load) == (2.0, 0.1)


def test_rates_are_measured_again_until_the_machine_is_quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(rates_module, "rates_path", lambda: tmp_path / "folder" / "rates.json")
    measured = [rates(call=3.0, other_load=1.5), rates(call=1.0, other_load=0.9), rates(call=2.0, other_load=0.0)]
    waiting = iter(measured)
    monkeypatch.setattr(rates_module, "measure_rates", lambda: next(waiting))
    said = []
    assert [find_rates(said.append).call for _ in range(4)] == [3.0, 1.0, 1.0, 1.0]
    assert len(said) == 3
    (tmp_path / "folder" / "rates.json").write_text("{")  # not the file of a finished measurement
    with pytest.raises(StopIteration):
        find_rates(said.append)


def test_the_rates_of_another_machine_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = rates_module.rates_path()
    assert before.is_relative_to(tmp_path)
    monkeypatch.setattr(rates_module, "num_cores", lambda: 77)
    assert rates_module.rates_path() != before


def test_everything_that_a_model_needs_is_measured(monkeypatch):
    for name, value in {"SIZES": (64,), "BATCHED_SIZES": (16,), "BYTES": (2**14, 2**16), "SECONDS": 0.0}.items():
        monkeypatch.setattr(rates_module, name, value)
    found = rates_module.measure_rates()
    assert set(found.products) == {f"{batch}{layout} f32" for batch in ("", "batched ") for layout in ("NN", "NT", "TN", "TT")}
    assert all(rate > 0 for rows in found.products.values() for *_, rate in rows)
    assert set(found.operations) == set(rates().operations)
    assert {"copy", "serial copy", "transpose", "reduce"} <= set(found.curves)
    assert all(seconds > 0 for points in found.curves.values() for _, seconds in points)


def test_the_measured_products_contract_the_axes_of_their_names(monkeypatch):
    monkeypatch.setattr(rates_module, "BATCHED_SIZES", (16, 64))
    shapes = []

    def record(function, out, *arrays, work):
        shapes.append((out.shape, *(array.shape for array in arrays)))
        assert jax.eval_shape(function, *arrays).shape == out.shape
        return 0.5

    monkeypatch.setattr(rates_module, "_seconds", record)
    rows = rates_module._measure_products(0, 1, True, jnp.float32)
    assert ((32, 16, 64), (32, 16, 16), (32, 64, 16)) in shapes
    assert (16, 64, 16, 2 * 32 * 16 * 64 * 16 / 0.5) in rows
