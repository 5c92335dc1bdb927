"""Typed configs: the dataclasses of a run, reading them from files, and overriding them on the command line."""

from gpt_jax.config.schema import (
    DataConfig,
    DistributedConfig,
    FinetuneConfig,
    FinetuneLoopConfig,
    FinetuneRunConfig,
    InitConfig,
    LoopConfig,
    MeshConfig,
    ModelConfig,
    ModelOptions,
    OptimConfig,
    PipelineConfig,
    PretrainConfig,
    ProfileConfig,
    RunConfig,
    TaskConfig,
    TokenizerConfig,
    TrainConfig,
    TransferConfig,
)
