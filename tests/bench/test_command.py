"""The command `bench`: its benchmarks, and what each of our programs computes."""

import json
import re
from pathlib import Path

import jax
import pytest

from gpt_jax import arguments
from gpt_jax.bench import attention, peers
from gpt_jax.bench.command import BENCHMARKS, Benchmark, all_comparisons
from gpt_jax.bench.comparison import Comparison, Request, Result, Timing
from gpt_jax.bench.program import ProgramSpec
from gpt_jax.cli import main
from gpt_jax.config import ModelConfig
from gpt_jax.config.load import load_config
from gpt_jax.errors import UserError
from gpt_jax.model.attention import IMPLEMENTATIONS
from tests.tiny import replace_fields, write_config

ROOT = Path(__file__).parents[2]


def test_the_command_line_knows_every_benchmark_and_peer():
    assert (*BENCHMARKS, "all") == arguments.BENCHMARKS
    assert {peer for benchmark in BENCHMARKS.values() for peer in benchmark.peers} == peers.PEERS.keys()
    [row] = re.findall(r"^\| `gpt-jax bench .*$", Path(ROOT, "README.md").read_text(), re.MULTILINE)
    assert re.findall("`([a-z]+)`", row) == [*BENCHMARKS, "all"]


def build(comparison: Comparison) -> None:
    """Builds each of our programs in this process and runs it twice."""
    for name, spec in comparison.programs.items():
        if name not in comparison.peers:
            program = spec.build()
            program.run(1)
            program.run(2)
            assert all(isinstance(value, (int, float)) for value in program.details().values())


@pytest.mark.parametrize("name", ["train", "attention", "loss", "generate", "checkpoint"])
def test_programs_of_a_config_run(tiny, name, monkeypatch):
    monkeypatch.setattr("gpt_jax.bench.generate.PROMPT_TOKENS", 8)
    monkeypatch.setattr("gpt_jax.bench.generate.NEW_TOKENS", 4)
    for comparison in BENCHMARKS[name].comparisons(Request(tiny, "tiny", (8,))):
        assert "tiny" in comparison.title or name in ("attention", "loss")
        build(comparison)


def test_the_attention_benchmark_shows_how_far_an_implementation_is_from_the_definition(tiny, monkeypatch):
    program = BENCHMARKS["attention"].comparisons(Request(tiny, "tiny", (8,)))[1].programs["blockwise"].build()
    errors = program.details()
    assert len(errors) == 2
    assert all(0 < error < 1e-5 for error in errors.values())
    blockwise = IMPLEMENTATIONS["blockwise"]
    monkeypatch.setitem(IMPLEMENTATIONS, "blockwise", lambda *arguments: 1.25 * blockwise(*arguments))
    program = BENCHMARKS["attention"].comparisons(Request(tiny, "tiny", (8,)))[1].programs["blockwise"].build()
    assert list(program.details().values()) == pytest.approx([0.25, 0.25], rel=1e-4)


@pytest.mark.parametrize(("platform", "kernel"), [("cpu", None), ("tpu", "pallas_tpu"), ("gpu", "pallas_gpu")])
def test_the_attention_benchmark_leaves_out_what_does_not_run_here(platform, kernel, monkeypatch):
    assert attention.default_platform() == "cpu"
    monkeypatch.setattr(attention, "default_platform", lambda: platform)
    kernels = [kernel] if kernel else []
    for comparison in BENCHMARKS["attention"].comparisons(Request(load_config("gpt1"), "gpt1", (2,))):
        assert list(comparison.programs) == ["plain", "blockwise", *kernels]
    assert attention.implementations(ModelConfig(context_length=2048, embed_dim=24, num_heads=8)) == ["plain", "blockwise"]


def test_programs_without_a_config_run(monkeypatch):
    monkeypatch.setattr("gpt_jax.bench.tokenize.TEXT_BYTES", 30_000)
    monkeypatch.setattr("gpt_jax.bench.tokenize.VOCABULARY", 500)
    for name in ("tokenize", "matmul"):
        for comparison in BENCHMARKS[name].comparisons(Request()):
            build(comparison)


def test_the_input_benchmark_reads_a_store(pretrained, monkeypatch):
    monkeypatch.setattr("gpt_jax.bench.input.CONTEXT_LENGTH", 32)
    monkeypatch.setattr("gpt_jax.bench.input.importlib.util.find_spec", lambda name: None)  # Importing tensorflow takes seconds.
    comparisons = BENCHMARKS["input"].comparisons(Request(store=pretrained / "store"))
    assert [comparison.work for comparison in comparisons] == [64 * 32, 256 * 32]
    for comparison in comparisons:
        assert list(comparison.programs) == ["threads"]
        build(comparison)


def test_all_runs_every_benchmark_but_fine_tuning_against_the_peers_that_it_has(monkeypatch, capsys):
    monkeypatch.setattr("gpt_jax.bench.tokenize.TEXT_BYTES", 30_000)
    comparisons, failures = all_comparisons(["torch", "transformers"])
    assert failures == []
    assert "finetune is left out" in capsys.readouterr().err
    titles = {comparison.title.replace(",", "").replace(":", "").split()[0] for comparison in comparisons}
    assert titles == BENCHMARKS.keys() - {"finetune"}
    chosen = {comparison.title.split()[0]: set(comparison.peers) for comparison in comparisons}
    assert chosen["train"] == {"torch", "transformers"}
    assert chosen["generate"] == {"transformers"}
    assert chosen["matmul:"] == {"torch"}


def test_all_goes_on_after_a_mistake(tmp_path, monkeypatch, capsys):
    """One benchmark cannot be set up, a program of the second reports a mistake, and the third is measured."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("gpt_jax.bench.comparison.ROUND_SECONDS", 0.0)

    def missing(request: Request) -> list[Comparison]:
        raise UserError("--store: is missing")

    def of(function: str, **arguments: str) -> Benchmark:
        programs = {"ours": ProgramSpec(f"tests.bench.programs:{function}", arguments)}
        return Benchmark(lambda request: [Comparison(function, "", 0, programs)])

    good = of("logging", name="good", log=str(tmp_path / "log"))
    monkeypatch.setattr("gpt_jax.bench.command.BENCHMARKS", {"missing": Benchmark(missing), "bad": of("mistaken"), "good": good})
    assert main(["bench", "all", "--rounds", "2", "--json", str(tmp_path / "out.json")]) == 1
    output = capsys.readouterr().out
    assert "\nmissing\nfailed: --store: is missing\n" in output
    assert "\nmistaken\nfailed: --config: is wrong\n" in output
    measured = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    assert [comparison["failure"] for comparison in measured] == ["--store: is missing", "--config: is wrong", ""]
    assert len(measured[2]["programs"]["ours"]["seconds"]) == 2


def test_interrupting_keeps_what_has_been_measured(tmp_path, monkeypatch, capsys):
    def run(comparison: Comparison, rounds: int) -> Result:
        if "batch 4" in comparison.title:
            raise KeyboardInterrupt
        return Result(comparison, {"gpt_jax": Timing(1.0, (0.5,))}, None)

    monkeypatch.setattr("gpt_jax.bench.command.run_comparison", run)
    words = ["bench", "loss", "--config", "smoke", "--batch-size", "2", "4", "--json", str(tmp_path / "out.json")]
    assert main(words) == 130
    output, error = capsys.readouterr()
    [comparison] = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    assert comparison["programs"]["gpt_jax"]["seconds"] == [0.5]
    assert comparison["title"] in output
    assert error == "gpt-jax: interrupted\n"


def test_a_config_can_be_measured_from_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("gpt_jax.bench.comparison.ROUND_SECONDS", 0.0)
    file = write_config(tiny, tmp_path / "tiny.py")
    words = [
        "bench",
        "train",
        "--config",
        str(file),
        "--model.num-layers",
        "1",
        "--rounds",
        "2",
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert main(words) == 0
    [comparison] = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    assert "1 x 16, batch 8 x 32, dropout 0.1" in comparison["title"]
    assert len(comparison["programs"]["gpt_jax"]["seconds"]) == 2
    assert comparison["work"] == 8 * 32
    assert comparison["title"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "bench train --against tensorflow",
            "'tensorflow' is not a peer of train; its peers are transformers, transformers-compiled",
        ),
        ("bench train --against torch,tensorflow", "'tensorflow' is not a peer of train"),
        ("bench startup --against torch", "'torch' is not a peer of startup; it has none"),
        ("bench matmul --batch-size 3", "--batch-size: belongs to train, attention, loss, generate, input, not to matmul"),
        ("bench loss --products", "--products: belongs to train, not to loss"),
        ("bench all --config demo", "--config: belongs to train, attention, loss, generate, finetune, checkpoint, not to all"),
        ("bench matmul --train.seed 3", "'--train.seed' is not an argument of gpt-jax bench matmul"),
        ("bench finetune", "--config: name the fine-tuning config to time, for example finetune/cola"),
        ("bench finetune --config demo", "demo is a config for gpt-jax pretrain"),
        ("bench train --batch-size 0", "--batch-size: must be positive, not 0"),
        *(
            (f"bench {name} --model.kind lstm", "--config: this model is an LSTM; benchmarks measure Transformers")
            for name in ("train", "attention", "loss", "generate", "checkpoint")
        ),
        ("bench generate --config smoke", "--config: a context of 64 tokens is too short for 32 + 64 tokens"),
        ("bench train --model.num-layrs 3", "--model.num-layrs: no such field; did you mean model.num-layers or"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_a_peer_that_is_not_installed_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        peers.usable_peers(["torch"])
    assert str(error.value) == "--against: torch needs torch, which is not installed: pip install 'gpt_jax[huggingface]'"


def test_a_compiled_peer_is_left_out_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    assert peers.usable_peers(["torch", "torch-compiled", "torch"]) == ["torch", "torch-compiled"]
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert peers.usable_peers(["torch", "torch-compiled"]) == ["torch"]
    assert "torch-compiled is left out: torch.compile needs a C++ compiler" in capsys.readouterr().err


def test_fine_tuning_an_lstm_is_not_measured(tiny, own_task, tmp_path):
    like = write_config(replace_fields(tiny, model={"kind": "lstm"}), tmp_path / "lstm.py")
    files = {name: own_task[name] for name in ("train", "validation")}
    config = replace_fields(load_config("finetune/own"), task=files, init={"from_": "none", "like": str(like)})
    with pytest.raises(UserError, match="this model is an LSTM"):
        BENCHMARKS["finetune"].comparisons(Request(config, "own"))


def test_a_batch_that_the_devices_cannot_share_is_refused(tiny):
    [comparison] = BENCHMARKS["train"].comparisons(Request(tiny, "tiny", (jax.device_count() + 1,)))
    with pytest.raises(UserError, match=r"--train\.batch-size: "):
        comparison.programs["gpt_jax"].build()


def test_transformers_cannot_have_another_inner_width(tiny):
    request = Request(replace_fields(tiny, model={"mlp_dim": 48}), "tiny", (), ("transformers",))
    with pytest.raises(UserError, match="inner width of 4 x 16, not 48"):
        BENCHMARKS["train"].comparisons(request)


def test_a_json_file_that_cannot_be_written_is_reported_before_the_first_program(tmp_path, capsys):
    path = tmp_path / "missing" / "out.json"
    assert main(["bench", "matmul", "--json", str(path)]) == 2
    assert capsys.readouterr().err == f"gpt-jax: --json: there is no folder '{path.parent}'\n"
