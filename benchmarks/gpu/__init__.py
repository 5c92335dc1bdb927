"""All measurements on one GPU with one command, for a machine that has JAX and PyTorch but neither tensorflow nor a network.

    python -m benchmarks.gpu prepare --novels FOLDER --tasks FOLDER     on a machine where gpt_jax is installed
    python -m benchmarks.gpu run                                        on the GPU machine; also `make gpu`
    python -m benchmarks.gpu tables                                     the results as tables of docs/benchmarks.md

`prepare` makes the folder gpu-data, which travels with the checkout: a token store and a tokenizer of the novels, tasks in GLUE's
layout, and the pure Python packages that such a machine may lack. Without this folder, `run` skips the measurements that need it.

`run` makes each measurement in a process of its own, which is stopped when the time of its part is up, and appends the result to
gpu-results/results.jsonl, so that nothing is lost if a later one fails or the machine is taken away. The first line describes the
machine; the others are {"part", "name", "command", "seconds", "failure", "result"}. The output of all commands is in
gpu-results/log.txt.
"""
