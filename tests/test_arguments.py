"""The arguments of the verbs: ranges of numbers, values that begin with a dash, and options that cannot be combined."""

import pytest

from gpt_jax.arguments import join_values, parse
from gpt_jax.cli import VERBS, main
from gpt_jax.config import FinetuneConfig, FinetuneLoopConfig
from gpt_jax.errors import UserError
from gpt_jax.tasks.finetune import finetune_seeds

WHOLE = {
    "nan": "is not a whole number",
    "inf": "is not a whole number",
    "1.5": "is not a whole number",
    "x": "is not a whole number",
}
COUNT = WHOLE | {"0": "must be positive", "-1": "must be positive"}
NUMBERS = {
    "demo --seed": WHOLE | {"-1": "must be in [0, 2^32)", "4294967296": "must be in [0, 2^32)"},
    "finetune cola --workdir RUN --seeds": COUNT,
    "study cola --workdir RUN --name layers --seeds": COUNT,
    "evaluate RUN --text TEXT --max-bytes": COUNT,
    "evaluate RUN --text TEXT --stride": COUNT,
    "generate RUN --prompt a --tokens": COUNT,
    "generate RUN --prompt a --top-k": COUNT,
    "generate RUN --prompt a --seed": WHOLE | {"-1": "must be in [0, 2^32)", "4294967296": "must be in [0, 2^32)"},
    "generate RUN --prompt a --temperature": {
        **{"nan": "must be at least 0", "-1": "must be at least 0", "-1e-3": "must be at least 0"},
        **{"inf": "must be finite", "-inf": "must be finite", "x": "is not a number"},
    },
    "generate RUN --prompt a --top-p": {
        **{"nan": "must be in (0, 1]", "0": "must be in (0, 1]", "1.5": "must be in (0, 1]", "-0.5": "must be in (0, 1]"},
        **{"inf": "must be finite", "x": "is not a number"},
    },
    "export RUN --format huggingface --out OUT --shard-bytes": {
        **{"nan": "must be a number of bytes", "0": "must be a number of bytes", "0.5": "must be a number of bytes"},
        **{"-1": "must be a number of bytes", "inf": "must be finite", "1GB": "is not a number"},
    },
    "checkpoint prune RUN --keep-latest": COUNT,
    "checkpoint prune RUN --keep-best": WHOLE | {"-1": "must be at least 0"},
    "launch local smoke --workdir RUN --crashes": WHOLE,
    "supervise --grace-seconds": WHOLE,
    "plan gpt1 --topology v5e-8 --slices": COUNT,
    "plan gpt1 --topology v5e-8 --corpus-tokens": COUNT,
    "plan gpt1 --topology v5e-8 --examples": COUNT,
    "plan gpt1 --topology v5e-8 --price": {
        **{"nan": "must be at least 0", "-1": "must be at least 0"},
        **{"inf": "must be finite", "x": "is not a number"},
    },
    "bench train --batch-size": COUNT,
    "bench matmul --rounds": COUNT,
}


@pytest.mark.parametrize(
    ("command", "word", "rule"), [(command, word, rule) for command, rules in NUMBERS.items() for word, rule in rules.items()]
)
def test_a_number_out_of_range_is_one_line(capsys, command, word, rule):
    assert main([*command.split(), word]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    option = command.split()[-1]
    assert err.startswith(f"gpt-jax: {option}: ")
    assert rule in err
    assert err.count("\n") == 1
    assert word in err


def test_every_number_of_a_verb_is_in_the_table():
    """A type that is not `number`, `int` or `float` makes a path or a name."""
    from gpt_jax.arguments import _parser

    subparsers = next(action for action in _parser()._actions if action.dest == "verb").choices
    assert subparsers.keys() == VERBS.keys()
    found = set()
    for verb, sub in subparsers.items():
        for action in sub._actions:
            if action.type in (int, float) or getattr(action.type, "__qualname__", "") == "number.<locals>.convert":
                found.add((verb, action.option_strings[0]))
    listed = {(command.split()[0], command.split()[-1]) for command in NUMBERS}
    same_type = {("launch", name) for name in ("--slices", "--seeds", "--preemptions", "--grace-seconds", "--processes")}
    same_type |= {("supervise", name) for name in ("--preemptions", "--crashes")}
    assert found == listed | same_type


@pytest.mark.parametrize("path", ["checkpoint list", "report --paper", "evaluate", "generate --prompt a", "demo --workdir"])
def test_an_empty_path_is_refused(path, capsys):
    """It may come from a variable that is not set, and would be the current folder."""
    assert main([*path.split(), ""]) == 2
    assert "is empty (see" in capsys.readouterr().err


def test_the_last_seed_is_in_range_before_the_first_is_run(tmp_path):
    for seed, seeds in ((0, 2**32 + 1), (2**32 - 1, 2), (0, 10**30)):
        with pytest.raises(UserError, match=r"--seeds: the last seed would be \d+, but a seed is at most 2\^32 - 1"):
            finetune_seeds(FinetuneConfig(train=FinetuneLoopConfig(seed=seed)), tmp_path, seeds)
    assert list(tmp_path.iterdir()) == []


# -- values that begin with a dash ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt", ["--words", "-", "--", "-h", "--help", "--traceback", "--tokens", "--prompt", "--a=b c", "-1", ""]
)
def test_a_prompt_may_begin_with_a_dash(prompt):
    for words in (["--prompt", prompt], [f"--prompt={prompt}"]):
        options, _ = parse(join_values(["generate", "RUN", *words, "--tokens", "5"]))
        assert (options.prompt, options.tokens) == ([prompt], 5)


def test_a_missing_prompt_is_noticed():
    with pytest.raises(UserError, match=r"^--prompt: expected one argument \(see gpt-jax generate --help\)$"):
        parse(join_values(["generate", "RUN", "--prompt"]))


def test_only_values_are_joined():
    words = [
        "launch",
        "slurm",
        "c.py",
        "--spot",
        "--name",
        "-x",
        "--optim.peak-lr",
        "-1e-3",
        "--train.seed",
        "--help",
        "-h",
        "--",
        "-y",
    ]
    joined = [
        "launch",
        "slurm",
        "c.py",
        "--spot",
        "--name=-x",
        "--optim.peak-lr=-1e-3",
        "--train.seed",
        "--help",
        "-h",
        "--",
        "-y",
    ]
    assert join_values(words) == joined


# -- options that cannot be combined ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("checkpoint list . --keep-latest 3", "--keep-latest: requires prune"),
        ("checkpoint verify . --keep-best 3", "--keep-best: requires prune"),
        ("bench matmul --store .", "--store: belongs to input, not to matmul"),
        ("evaluate . --split dev", "--split: invalid choice: 'dev'"),
        ("evaluate . --text a --split test", "--split: applies to tasks; with --text, leave it out"),
        ("evaluate . --text a --zero-shot cola", "--text and --zero-shot are different measurements"),
        ("evaluate . --zero-shot cola --task.path x", "'--task.path' is not an argument of gpt-jax evaluate with --zero-shot"),
        ("evaluate . --every-checkpoint", "--every-checkpoint: requires --zero-shot"),
        ("generate . --prompt a --temprature 1", "'--temprature' is not an argument of gpt-jax generate"),
    ],
)
def test_options_that_do_not_apply_are_refused(capsys, words, message):
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
