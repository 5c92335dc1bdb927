"""The peer CTranslate2 generates the tokens of transformers' GPT-2 with the same parameters."""

import numpy as np
import pytest

from gpt_jax.bench import generate
from gpt_jax.bench.comparison import Request
from gpt_jax.bench.ctranslate2_gpt import continue_greedily, load_generator, save_gpt2
from tests.tiny import replace_fields

ctranslate2 = pytest.importorskip("ctranslate2")
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")


def load_into_transformers(config, variables):
    """Returns a GPT2LMHeadModel with the arrays of a CTranslate2 specification, which has transposed matrices."""
    sizes = {"n_layer": config.num_layers, "n_embd": config.embed_dim, "n_head": config.num_heads, "n_inner": config.mlp_dim}
    module = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=config.vocab_size, n_positions=config.context_length, **sizes)
    ).eval()
    assigned = {"wte.weight": "embeddings/weight", "wpe.weight": "position_encodings/encodings"}
    assigned |= {"ln_f.weight": "layer_norm/gamma", "ln_f.bias": "layer_norm/beta"}
    for number in range(config.num_layers):
        for theirs, layer in (("ln_1", "self_attention/layer_norm"), ("ln_2", "ffn/layer_norm")):
            assigned |= {f"h.{number}.{theirs}.weight": f"layer_{number}/{layer}/gamma"}
            assigned |= {f"h.{number}.{theirs}.bias": f"layer_{number}/{layer}/beta"}
        for theirs, layer in (
            ("attn.c_attn", "self_attention/linear_0"),
            ("attn.c_proj", "self_attention/linear_1"),
            ("mlp.c_fc", "ffn/linear_0"),
            ("mlp.c_proj", "ffn/linear_1"),
        ):
            assigned |= {f"h.{number}.{theirs}.{kind}": f"layer_{number}/{layer}/{kind}" for kind in ("weight", "bias")}
    state = {name: torch.from_numpy(variables[f"decoder/{source}"]) for name, source in assigned.items()}
    module.transformer.load_state_dict(
        {name: array.T if ".c_" in name and array.ndim == 2 else array for name, array in state.items()}
    )
    return module


def test_tokens_are_those_of_transformers(tiny, tmp_path, monkeypatch):
    model = replace_fields(tiny, model={"init_stddev": 0.3}).model
    variables = {}
    spec_class = ctranslate2.specs.TransformerDecoderModelSpec
    optimize = spec_class.optimize

    def record(spec):
        variables.update({name: np.array(value.numpy()) for name, value in spec.variables().items() if value.shape})
        optimize(spec)

    monkeypatch.setattr(spec_class, "optimize", record)
    save_gpt2(model, tmp_path)
    module = load_into_transformers(model, variables)
    prompts = np.random.default_rng(1).integers(model.vocab_size - 1, size=(3, 8))
    ours = continue_greedily(load_generator(tmp_path), prompts, 16)
    module.generation_config.eos_token_id = module.generation_config.pad_token_id = None
    tokens = torch.from_numpy(prompts)
    theirs = module.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False)
    assert ours == theirs[:, 8:].tolist()
    assert len({token for row in ours for token in row}) > 10


def test_the_program_runs(tiny, monkeypatch):
    monkeypatch.setattr("gpt_jax.bench.generate.PROMPT_TOKENS", 8)
    monkeypatch.setattr("gpt_jax.bench.generate.NEW_TOKENS", 4)
    [comparison] = generate.comparisons(Request(tiny, "tiny", (2,), ("ctranslate2",)))
    assert comparison.peers == ("ctranslate2",)
    comparison.programs["ctranslate2"].build().run(2)
