"""A training that takes seconds, as overrides of the config `smoke`, and the records by which two of them are compared."""

import json
import random

COMPARED = {"train": ("loss", "grad_norm", "learning_rate"), "eval": ("loss", "perplexity", "bits_per_byte")}


def overrides(folder, steps):
    """Returns arguments for `gpt-jax pretrain smoke`; the first run makes the token store in `folder`."""
    rng = random.Random(0)
    text = folder / "text.jsonl"
    lines = ["".join(rng.choices("abcdefgh ", k=400)) for _ in range(60)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    fields = {
        "model.vocab-size": 257,
        "model.context-length": 16,
        "model.embed-dim": 16,
        "model.mlp-dim": 32,
        "data.source": text,
        "data.store": folder / "store",
        "data.validation-share": 0.1,
        "data.processes": 1,
        "data.pipeline": "threads",
        "data.tokenizer.kind": "bytes",
        "train.batch-size": 8,
        "train.duration": f"{steps} steps",
        "train.eval-every": "5 steps",
        "train.eval-windows": 16,
        "train.save-every": "5 steps",
        "train.sample-tokens": 0,
        "train.tensorboard": False,
    }
    return tuple(word for name, value in fields.items() for word in (f"--{name}", str(value)))


def trajectory(run):
    """Returns step, kind and numbers of each record. The numbers stay text, because equal text means equal bits."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [record for record in (json.loads(line, parse_float=str) for line in lines) if record["kind"] in COMPARED]
    return [(record["step"], record["kind"], *(record[name] for name in COMPARED[record["kind"]])) for record in records]
