"""Rates of an imaginary device with two cores, in round numbers."""

from gpt_jax.plan.rates import Rates

GIGA = 1e9
CURVES = {
    "copy": [(1e3, 1e-6), (1e6, 1e-3)],  # 1 GB/s
    "serial copy": [(1e3, 2e-6), (1e6, 2e-3)],
    "transpose": [(1e3, 5e-6), (1e6, 5e-3)],
    "reduce": [(1e3, 3e-6), (1e6, 3e-3)],
}
OPERATIONS = {"simple": 1e-9, "exponential": 7e-9, "log": 7e-9, "tanh": 5e-9, "divide": 4e-9, "sqrt": 3e-9, "rsqrt": 3e-9}


def rates(**changes):
    """Returns the rates, with some fields changed. Every product runs at 2 GFLOP/s, batched ones at 1 GFLOP/s."""
    products = {}
    for layout in ("NN", "NT", "TN", "TT"):
        products[f"{layout} f32"] = [(1, 1, 1, 2 * GIGA)]
        products[f"batched {layout} f32"] = [(1, 1, 1, GIGA)]
    fields = {"cores": 2, "products": products, "curves": CURVES, "operations": OPERATIONS | {"repeated": 11e-9}}
    fields |= {"iteration": 1e-6, "call": 0.0, "other_load": 0.0}
    return Rates(**{**fields, **changes})
