"""Products with parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.model.linear import add_bias, product


def test_the_gradient_of_a_parameter_is_summed_in_float32():
    """Two tokens whose gradients differ by a factor of 1,000: a sum in bfloat16 would lose the smaller one."""
    x, gradient = jnp.ones((2, 1, 2), jnp.bfloat16), jnp.array([1, 1e-3], jnp.bfloat16)[:, None, None]

    def weighted(kernel, bias):
        multiplied = product(x, kernel, ("embed",), ("mlp",), "default")
        return (add_bias(multiplied, bias) * gradient).astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(weighted, argnums=(0, 1)))(jnp.ones((2, 1)), jnp.ones(1))
    for each in gradients:
        assert each.dtype == jnp.float32
        np.testing.assert_allclose(each, 1 + float(jnp.bfloat16(1e-3)), rtol=1e-6)
