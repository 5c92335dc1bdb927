"""GPT-1 in plain PyTorch, as a peer: a model made of PyTorch's own building blocks, and a training step."""

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from gpt_jax.config import ModelConfig, OptimConfig


def plain_gpt(config: ModelConfig) -> Any:
    """Returns a torch.nn.Module that maps tokens int64 [batch, time] to logits [batch, time, vocab].

    It is the model of `model/transformer.py` with the same dropout sites: post-layer-norm blocks, GELU in its tanh
    approximation, `scaled_dot_product_attention`, and an output layer that shares the token embeddings. Parameters start from
    N(0, init_stddev). `forward` is `logits` of `hidden`.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    width = config.embed_dim
    norm = functools.partial(nn.LayerNorm, width, config.layer_norm_epsilon)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, config.mlp_dim), nn.Linear(config.mlp_dim, width)
            self.attention_norm, self.mlp_norm = norm(), norm()
            self.dropout = nn.Dropout(config.residual_dropout)

        def forward(self, x: Any) -> Any:
            heads = (*x.shape[:2], 3, config.num_heads, config.head_dim)
            query, key, value = self.qkv(x).view(heads).permute(2, 0, 3, 1, 4)
            rate = config.attention_dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
            mixed = self.out(mixed.transpose(1, 2).reshape(x.shape))
            x = self.attention_norm(x + self.dropout(mixed))
            return self.mlp_norm(x + self.dropout(self.down(F.gelu(self.up(x), approximate="tanh"))))

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(config.vocab_size, width)
            self.positions = nn.Embedding(config.context_length, width)
            self.dropout = nn.Dropout(config.embed_dropout)
            self.blocks = nn.ModuleList(Block() for _ in range(config.num_layers))
            for parameter in self.parameters():
                if parameter.dim() == 2:
                    nn.init.normal_(parameter, std=config.init_stddev)

        def hidden(self, tokens: Any) -> Any:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            x = self.dropout(self.tokens(tokens) + self.positions(positions))
            for block in self.blocks:
                x = block(x)
            return x

        def logits(self, hidden: Any) -> Any:
            return F.linear(hidden, self.tokens.weight)

        def forward(self, tokens: Any) -> Any:
            return self.logits(self.hidden(tokens))

    return Gpt()


def transformers_gpt(config: ModelConfig) -> Any:
    """Returns transformers' OpenAIGPTLMHeadModel for a model whose inner width is four times its width."""
    import transformers

    settings = transformers.OpenAIGPTConfig(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_layer=config.num_layers,
        n_embd=config.embed_dim,
        n_head=config.num_heads,
        embd_pdrop=config.embed_dropout,
        attn_pdrop=config.attention_dropout,
        resid_pdrop=config.residual_dropout,
        layer_norm_epsilon=config.layer_norm_epsilon,
        initializer_range=config.init_stddev,
        afn="gelu",  # In transformers, this is the tanh approximation.
    )
    return transformers.OpenAIGPTLMHeadModel(settings)


def start_torch() -> Any:
    """Imports torch, gives it the threads of this process, and returns the device to use."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()))
    torch.manual_seed(0)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_step(model: Any, loss: Callable[..., Any], config: OptimConfig, device: Any, compiled: bool) -> Callable[..., None]:
    """Returns a function that makes one update of a torch module, in float32 on CPUs and bfloat16 on GPUs.

    Args:
      model: the module, which is moved to the device.
      loss: (model, *batch) -> scalar.
      config: the settings of the optimizer, which is PyTorch's fused AdamW.
      compiled: whether forward and backward pass are compiled with torch.compile.
    """
    import torch

    model = model.to(device).train()
    parameters = list(model.parameters())
    betas = (config.b1, config.b2)
    settings: dict[str, Any] = {"betas": betas, "eps": config.epsilon, "weight_decay": config.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(parameters, lr=config.peak_lr, **settings)
    forward = torch.compile(loss) if compiled else loss

    def step(*batch: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value = forward(model, *batch)
        value.backward()
        if config.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()

    return step


def device_kind(device: Any) -> str:
    """Returns the kind of a GPU, which is that of JAX (`chips.CHIPS`); empty for a CPU."""
    if device.type != "cuda":
        return ""
    import torch

    return str(torch.cuda.get_device_name(device))


def synchronize(device: Any) -> None:
    """Waits for a GPU to finish."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def to_torch(array: np.ndarray, device: Any) -> Any:
    """Returns a tensor on the device, with integers as int64."""
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return (tensor if tensor.is_floating_point() else tensor.long()).to(device)
