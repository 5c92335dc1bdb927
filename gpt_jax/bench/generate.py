"""Benchmark `generate`: greedy continuation of random prompts by a model with random parameters."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.bench import ctranslate2_gpt, torch_gpt
from gpt_jax.bench.comparison import Comparison, Request
from gpt_jax.bench.program import Program, ProgramSpec, start_jax
from gpt_jax.bench.train import read_config
from gpt_jax.config import ModelConfig
from gpt_jax.config.load import config_to_dict
from gpt_jax.errors import require

PEERS = ("transformers", "ctranslate2")
PROMPT_TOKENS = 32
NEW_TOKENS = 64


def comparisons(request: Request) -> list[Comparison]:
    """Returns a comparison for each batch size.

    Raises:
      UserError: the model's context is too short.
    """
    model, peers = request.config.model, tuple(request.peers)
    short = f"a context of {model.context_length} tokens is too short for {PROMPT_TOKENS} + {NEW_TOKENS} tokens"
    require(model.context_length >= PROMPT_TOKENS + NEW_TOKENS, "config", short)
    result = []
    for size in request.batch_sizes or (1,):
        settings = {"config": config_to_dict(request.config), "batch_size": size}
        programs = {"gpt_jax": ProgramSpec(f"{__name__}:ours", settings)}
        programs |= {peer: ProgramSpec(f"{__name__}:{peer}_peer", settings) for peer in peers}
        shape = f"{model.num_layers} x {model.embed_dim}, batch {size}, {NEW_TOKENS} tokens after {PROMPT_TOKENS}"
        title = f"generate {request.config_name}: {shape}"
        result.append(Comparison(title, "tokens", size * NEW_TOKENS, programs, peers))
    return result


def random_prompts(model: ModelConfig, batch_size: int) -> np.ndarray:
    """Returns prompts of random tokens, int64 [batch, time]."""
    return np.random.default_rng(0).integers(model.vocab_size, size=(batch_size, PROMPT_TOKENS))


def ours(config: dict[str, Any], batch_size: int) -> Program:
    """Returns `decode.generate` with temperature 0."""
    device = start_jax()
    import jax

    from gpt_jax.model.decode import generate
    from gpt_jax.model.network import network
    from gpt_jax.train.choices import choose

    model = choose(read_config(config).model, jax.default_backend())
    params = jax.jit(lambda key: network(model).init(model, key))(jax.random.key(0))
    prompts = random_prompts(model, batch_size).tolist()

    def run(count: int) -> None:
        for _ in range(count):
            generate(model, params, prompts, NEW_TOKENS, temperature=0.0)

    return Program(run, device=device)


def transformers_peer(config: dict[str, Any], batch_size: int) -> Program:
    """Returns transformers' GPT-2 of the same size, whose `generate` has a cache of keys and values."""
    device = torch_gpt.start_torch()
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = read_config(config).model
    sizes = {"n_layer": model.num_layers, "n_embd": model.embed_dim, "n_head": model.num_heads, "n_inner": model.mlp_dim}
    settings = GPT2Config(vocab_size=model.vocab_size, n_positions=model.context_length, **sizes)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    module = GPT2LMHeadModel(settings).to(device, dtype).eval()
    # Neither program may stop early.
    module.generation_config.eos_token_id = module.generation_config.pad_token_id = None
    prompts = torch_gpt.to_torch(random_prompts(model, batch_size), device)
    mask = torch.ones_like(prompts)

    def run(count: int) -> None:
        for _ in range(count):
            with torch.inference_mode():
                module.generate(prompts, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True)
        torch_gpt.synchronize(device)

    return Program(run, device=torch_gpt.device_kind(device))


def ctranslate2_peer(config: dict[str, Any], batch_size: int) -> Program:
    """Returns CTranslate2's `generate_batch` with a GPT-2 of the same size."""
    model, folder = read_config(config).model, Path(tempfile.mkdtemp())  # in the program's scratch folder
    ctranslate2_gpt.save_gpt2(model, folder)
    generator = ctranslate2_gpt.load_generator(folder)
    prompts = random_prompts(model, batch_size)

    def run(count: int) -> None:
        for _ in range(count):
            ctranslate2_gpt.continue_greedily(generator, prompts, NEW_TOKENS)

    return Program(run, device="GPU" if generator.device == "cuda" else "")
