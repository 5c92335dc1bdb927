"""GPT-2 in CTranslate2, as a peer of generation: a model of the shape of transformers' peer, with random parameters."""

from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.config import ModelConfig
from gpt_jax.runtime.processor import num_cores


def save_gpt2(config: ModelConfig, folder: Path) -> None:
    """Writes a model in CTranslate2's format into an existing folder. The tokens of its vocabulary are the numbers in decimal."""
    from ctranslate2 import specs

    rng = np.random.default_rng(0)
    width = config.embed_dim

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns), np.float32) * np.float32(config.init_stddev)

    def fill_linear(layer: Any, outputs: int, inputs: int) -> None:
        layer.weight, layer.bias = matrix(outputs, inputs), np.zeros(outputs, np.float32)

    def fill_norm(layer: Any) -> None:
        layer.gamma, layer.beta = np.ones(width, np.float32), np.zeros(width, np.float32)

    activation = specs.Activation.GELUTanh
    spec = specs.TransformerDecoderModelSpec.from_config(config.num_layers, config.num_heads, activation=activation)
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = matrix(config.vocab_size, width)
    decoder.position_encodings.encodings = matrix(config.context_length, width)
    fill_norm(decoder.layer_norm)
    for layer in decoder.layer:
        attention, mlp = layer.self_attention, layer.ffn
        fill_norm(attention.layer_norm)
        fill_linear(attention.linear[0], 3 * width, width)
        fill_linear(attention.linear[1], width, width)
        fill_norm(mlp.layer_norm)
        fill_linear(mlp.linear_0, config.mlp_dim, width)
        fill_linear(mlp.linear_1, width, config.mlp_dim)
    spec.register_vocabulary([str(token) for token in range(config.vocab_size)])
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = str(config.vocab_size - 1)
    spec.validate()
    spec.optimize()
    spec.save(str(folder))


def load_generator(folder: Path) -> Any:
    """Returns the ctranslate2.Generator of a saved model, in bfloat16 on a GPU if there is one, or in float32 on all cores."""
    import ctranslate2

    if ctranslate2.get_cuda_device_count():
        return ctranslate2.Generator(str(folder), device="cuda", compute_type="bfloat16")
    return ctranslate2.Generator(str(folder), device="cpu", compute_type="float32", inter_threads=1, intra_threads=num_cores())


def continue_greedily(generator: Any, prompts: np.ndarray, num_tokens: int) -> list[list[int]]:
    """Continues each prompt (int [batch, time]) by `num_tokens` tokens, each time the most likely one; no text ends early."""
    texts = [[str(token) for token in prompt] for prompt in prompts]
    lengths = {"min_length": num_tokens, "max_length": num_tokens}
    results = generator.generate_batch(texts, **lengths, beam_size=1, sampling_topk=1, include_prompt_in_result=False)
    return [result.sequences_ids[0] for result in results]
