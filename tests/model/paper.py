"""The paper's model in its own formulas (section 4.1, with the masks of docs/masks.md), in the precision of its parameters.

The functions take NumPy or `jax.numpy` as `xp`; with the latter and 64-bit types, JAX differentiates them.
"""

import jax
import numpy as np

from gpt_jax.model import dropout as masks


def layer_norm(x, norm, xp):
    centered = x - x.mean(-1, keepdims=True)
    return centered / xp.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * norm["gain"] + norm["bias"]


def gelu(x, xp):
    return 0.5 * x * (1 + xp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x, xp):
    exponentials = xp.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def drop(x, key, rate, layer, site):
    """Applies dropout to [batch, heads, queries, keys] or [batch, time, channels]; `key` is None without dropout."""
    if key is None:
        return x
    rows, heads = (key.example_id[:, None], np.arange(x.shape[1])) if x.ndim == 4 else (key.example_id, 0)
    stream = np.asarray(masks.mask_stream(key.seed, key.step, layer, site, rows, heads))
    kept = np.asarray(masks.keep(stream, np.arange(x.shape[-2]), np.arange(x.shape[-1]), rate))
    return x * (kept / (1 - round(rate * 65536) / 65536)).astype(x.dtype)


def hidden(config, params, tokens, key=None, xp=np):
    """The last block's output [batch, time, embed]."""
    time = tokens.shape[1]
    future = np.triu(np.full((time, time), -np.inf), 1).astype(params["embedding"]["positions"].dtype)
    x = params["embedding"]["tokens"][tokens] + params["embedding"]["positions"][:time]
    x = drop(x, key, config.embed_dropout, 0, 0)
    for number in range(config.num_layers):
        block = jax.tree.map(lambda array, number=number: array[number], params["blocks"])
        qkv, out, up, down = block["attention"]["qkv"], block["attention"]["out"], block["mlp"]["up"], block["mlp"]["down"]
        query, key_, value = xp.einsum("bte,echd->cbhtd", x, qkv["kernel"]) + qkv["bias"][:, None, :, None]
        probabilities = softmax(query @ key_.swapaxes(-1, -2) / np.sqrt(config.head_dim).astype(x.dtype) + future, xp)
        mixed = drop(probabilities, key, config.attention_dropout, number, 1) @ value
        mixed = xp.einsum("bhtd,hde->bte", mixed, out["kernel"]) + out["bias"]
        x = layer_norm(x + drop(mixed, key, config.residual_dropout, number, 2), block["attention_norm"], xp)
        changed = gelu(x @ up["kernel"] + up["bias"], xp) @ down["kernel"] + down["bias"]
        x = layer_norm(x + drop(changed, key, config.residual_dropout, number, 3), block["mlp_norm"], xp)
    return x


def loss(config, params, tokens, targets, key=None, xp=np):
    """Mean negative log-likelihood over all tokens, in nats."""
    table = params["embedding"]["tokens"][: config.vocab_size]
    probabilities = softmax(hidden(config, params, tokens, key, xp) @ table.T, xp)
    return -xp.log(xp.take_along_axis(probabilities, targets[..., None], -1)).mean()
