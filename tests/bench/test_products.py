"""The products of a step: all of its floating-point operations, and gradients that are those of the forward products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.bench.products import products_of_step, step_products
from gpt_jax.config import ModelConfig
from gpt_jax.config.load import config_to_dict
from gpt_jax.train.flops import flops_per_token
from tests.tiny import tiny_config

MODEL = ModelConfig(vocab_size=256, context_length=24, num_layers=3, embed_dim=32, num_heads=4, mlp_dim=96)


def test_the_products_are_the_operations_of_a_step():
    products = products_of_step(MODEL, batch_size=5)
    assert sum(product.flops * product.repeats for product in products) == 5 * 24 * flops_per_token(MODEL)


def test_backward_products_are_the_gradients_of_the_forward_ones():
    products = products_of_step(MODEL, batch_size=2)
    forward = [product for product in products if "gradient" not in product.name]
    assert len(forward) == 7
    for product in forward:
        inputs, _, output_name = product.equation.partition("->")
        left_name, right_name = inputs.split(",")
        left, right = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in enumerate((product.left, product.right)))
        output, backward = jax.vjp(lambda *arrays: jnp.einsum(product.equation, *arrays), left, right)  # noqa: B023
        arrays = {left_name: left, right_name: right, output_name: output}
        expected = dict(zip((left_name, right_name), backward(output), strict=True))
        gradients = [other for other in products if other.name.startswith(f"{product.name}, ")]
        assert {other.equation.partition("->")[2] for other in gradients} == expected.keys()
        for gradient in gradients:
            inputs, _, result = gradient.equation.partition("->")
            operands = [arrays[name] for name in inputs.split(",")]
            assert [operand.shape for operand in operands] == [gradient.left, gradient.right]
            np.testing.assert_allclose(jnp.einsum(gradient.equation, *operands), expected[result], rtol=1e-3, atol=1e-3)


def test_every_product_is_timed(tmp_path):
    config = tiny_config(tmp_path)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=2))
    program = step_products(config_to_dict(config))
    program.run(1)
    rates = program.details()
    assert len(rates) == 21
    assert all(rate > 0 for rate in rates.values())
