"""gpt_jax: pre-train, fine-tune, evaluate and export GPT-1 in JAX, from a laptop's CPU to TPU pods."""

from pathlib import Path

__version__ = "0.1.0"

if not Path(__file__).with_name("launch").is_dir():
    # A checkout that is not installed: launch/ and configs/ are beside the package, not in it (`package_dir` in setup.cfg).
    __path__.append(str(Path(__file__).resolve().parents[1]))
