"""The list prices: they can be read, and compare as those of other sizes and generations."""

import datetime

import pytest

from gpt_jax.runtime.accelerators import ACCELERATORS
from gpt_jax.runtime.chips import CHIPS
from gpt_jax.runtime.prices import LIST_PRICES


@pytest.mark.parametrize("kind", LIST_PRICES)
def test_a_price_has_a_past_date_and_a_source(kind):
    price = LIST_PRICES[kind]
    day = datetime.date.fromisoformat(price.date if price.date.count("-") == 2 else f"{price.date}-01")
    assert datetime.date(2024, 1, 1) < day < datetime.date(2026, 12, 1)
    assert price.source
    assert price.region
    assert kind in CHIPS


@pytest.mark.parametrize("kind", LIST_PRICES)
def test_prices_are_for_one_chip_and_hour(kind):
    """No chip is a hundred times as cheap or as dear as another for the same peak."""
    assert 1e-15 < LIST_PRICES[kind].dollars / CHIPS[kind].peak_flops["bfloat16"] < 2e-14


def test_a_pod_costs_as_much_as_its_chips():
    """SkyPilot's catalog lists 307.2 dollars for v5litepod-256, 537.6 for v5p-256 and 412.16 for v4-256."""
    for name, dollars in (("v5e-256", 307.2), ("v5p-256", 537.6), ("v4-256", 412.16)):
        slice_ = ACCELERATORS[name]
        chips = slice_.hosts * slice_.chips_per_host
        assert chips * LIST_PRICES[slice_.device_kind].dollars == pytest.approx(dollars)


def test_prices_rise_with_the_generation():
    a100, h100, h200 = (LIST_PRICES[f"NVIDIA {kind}"].dollars for kind in ("A100-SXM4-80GB", "H100 80GB HBM3", "H200"))
    assert LIST_PRICES["NVIDIA A100-SXM4-40GB"].dollars < a100 < h100 < h200
