"""`gpt-jax plan`: mistakes are one line, a plan is made once, and without libtpu there is arithmetic."""

import importlib.util
import json
import subprocess
import sys

import pytest

from gpt_jax.cli import main
from gpt_jax.config.load import load_config
from gpt_jax.plan import cache
from gpt_jax.plan.workload import pretraining
from tests.plan.test_describe import REPORT


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The folder of the command, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=[True])
def libtpu(request, monkeypatch):
    """Pretends that libtpu is installed, or that it is not."""
    find = importlib.util.find_spec
    found = lambda name: (object() if request.param else None) if name == "libtpu" else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", found)


LIKE = ("--init.from", "none", "--init.like")
absent = pytest.mark.parametrize("libtpu", [False], indirect=True)


class Compiled(list):
    """The workloads that were compiled, and the report of each."""

    report = REPORT


@pytest.fixture
def compiled(monkeypatch, libtpu):
    """The workloads that were compiled; the report of each is that of the tests of its text, unless a test sets another one."""
    from gpt_jax.plan import program, report

    compiled = Compiled()
    monkeypatch.setattr(program, "compile_program", lambda workload, _, slices: compiled.append((workload, slices)))
    monkeypatch.setattr(report, "make_report", lambda *_: compiled.report)
    return compiled


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "--topology: name a TPU slice or a node with GPUs, for example v5e-256"),
        (
            ["--topology", "v5e-100"],
            "--topology: 'v5e-100' does not exist; the nearest sizes are v5e-32, v5e-64, v5e-128, v5e-256",
        ),
        (
            ["--topology", "v5x-8"],
            "--topology: 'v5x-8' is not in a known family (write FAMILY-SIZE, such as v5e-16); did you mean v5",
        ),
        (["--topology", "v5e"], "--topology: 'v5e' does not exist; the nearest sizes are v5e-1, v5e-4"),
        (["--topology", ""], "--topology: '' is not in a known family (write FAMILY-SIZE, such as v5e-16)"),
        (["--topology", "h100-8", "--search"], "--topology: h100-8 is not a TPU slice, such as v5e-256"),
        (["--topology", "h100-8", "--json", "plan.json"], "--json: works only for TPU slices"),
        (["--topology", "h100-8", "--generate", "1x2+3"], "--generate: works only for TPU slices"),
        (["--topology", "cpu-4"], "--topology: cpu-4 is not a TPU slice, such as v5e-256, or a node with GPUs, such as h100-8"),
        (
            ["--topology", "v5e-4", "--mesh.fsdp", "3"],
            "--mesh: the other axes multiply to 3, which does not divide 4 devices on v5e-4",
        ),
        (["--topology", "v5e-4", "--mesh.data", "2"], "--mesh: slice=1 x data=2 x fsdp=1 x tensor=1 requires 2 devices"),
        (["--topology", "v5e-4", "--slices", "2"], "--mesh.slice: there are 2 TPU slices, so set --mesh.slice 2"),
        (["--topology", "v5e-4", "--mesh.tensor", "4"], "--mesh.tensor: 4 does not divide model.num-heads 5; 1 would"),
        (["--topology", "v5e-16"], "--train.batch-size: 8 does not split evenly over slice x data x fsdp = 16; 16 would"),
        (
            ["--topology", "v5e-4", "--train.grad-accum-steps", "4"],
            "--train.batch-size: 8 does not split evenly over slice x data x fsdp = 4 in 4 micro-batches; 16 would",
        ),
        (["--topology", "v5e-4", "--slices", "0"], "--slices: must be positive, not 0"),
        (["--topology", "v5e-4", "--price", "cheap"], "--price: 'cheap' is not a number"),
        (["--topology", "v5e-4", "--price", "-1"], "--price: must be at least 0, not -1"),
        (["--topology", "v5e-4", "--price", "nan"], "--price: must be at least 0, not nan"),
        (["--topology", "v5e-4", "--corpus-tokens", "many"], "--corpus-tokens: 'many' is not "),
        (["--topology", "v5e-4", "--json", "absent/plan.json"], "--json: absent: no such folder"),
        (["--topology", "v5e-4", "--json", "."], "--json: .: is a folder; name a file"),
        (["--topology", "v5e-4", "--model.layers", "3"], "model.layers"),
        (["--topology", "v5e-4", "--train.duration", "9 years"], "--train.duration: "),
        (["--topology", "v5e-4", "--price", "inf"], "--price: "),
    ],
)
def test_a_mistake_is_one_line(compiled, capsys, words, problem):
    assert main(["plan", "mini", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert problem in printed.err
    assert compiled == []


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "name a config: gpt-jax plan CONFIG"),
        (["gpt3", "--topology", "v5e-4"], "gpt3"),
        (["finetune/sst2", "--topology", "v5e-4"], "--init.from: name the run or checkpoint to fine-tune"),
        (["finetune/sst2", "--topology", "v5e-4", "--init.from", "none"], "--init.like: name the run, checkpoint or config"),
        (["finetune/sst2", "--topology", "v5e-4", "--init.from", "absent"], "absent: no such folder"),
        (["finetune/sst2", "--topology", "v5e-4", *LIKE, "gpt3"], "--init.like: there is no folder 'gpt3', and "),
        (
            ["finetune/sst2", "--topology", "v5e-4", *LIKE, "gpt1", "--corpus-tokens", "9"],
            "--corpus-tokens: does not apply to finetune",
        ),
        (
            ["finetune/sst2", "--topology", "v5e-4", *LIKE, "gpt1", "--search"],
            "--search: searches for the fastest pre-training, but finetune/sst2",
        ),
        (
            ["finetune/sst2", "--topology", "v5e-4", *LIKE, "gpt1", "--generate", "1x2+3"],
            "--generate: plans text generation with the model of a pre-",
        ),
        (
            ["finetune/sst2", "--topology", "v5e-64", *LIKE, "gpt1"],
            "--train.batch-size: 32 does not split evenly over slice x data x fsdp = 64",
        ),
        (["gpt1", "--topology", "v5e-8", "--examples", "9"], "--examples: does not apply to pretrain"),
        (["gpt1", "--topology", "v5e-8", "--generate", "8"], "--generate: '8' is not PROMPTSxLENGTH+TOKENS, such as 8x32+100"),
        (["gpt1", "--topology", "v5e-8", "--generate", "0x32+100"], "--generate: '0x32+100' is not PROMPTSxLENGTH+TOKENS"),
        (["gpt1", "--topology", "v5e-8", "--generate", "1x32+500"], "--generate: 32 + 500 tokens exceed the context of 512"),
        (["gpt1", "--topology", "v5e-8", "--generate", "1x32+9", "--examples", "1"], "--examples: does not apply to generate"),
        (["gpt1", "--topology", "v5e-16", "--generate", "1x32+9"], "1 x v5e-16 has 4; the largest slice with one host is v5e-8"),
        (
            ["gpt1", "--topology", "v5p-8", "--slices", "2", "--generate", "1x32+9"],
            "2 x v5p-8 has 2; the largest slice with one host is v5p-8",
        ),
    ],
)
def test_a_config_must_name_what_is_planned(compiled, capsys, words, problem):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert problem in error


def test_the_length_of_a_fine_tuning(compiled, capsys):
    """3 epochs of 3,211 examples are 3 x 100 updates of 32 examples; 300 steps of 0.2 s on 16 chips are 0.267 chip-hours."""
    compiled.report = REPORT | {"verb": "finetune", "duration": "3 epochs"}
    words = ["plan", "finetune/rte", "--topology", "v5e-4", *LIKE, "gpt1"]
    assert main([*words, "--examples", "3211"]) == 0
    assert "run of 3 epochs: 300 steps, 0.0167 hours, 0.267 chip-hours" in capsys.readouterr().out
    assert main(words) == 0
    assert "; give --examples for the length of the run" in capsys.readouterr().out


def test_a_batch_that_does_not_fit_is_refused_before_anything_is_compiled(compiled, capsys):
    assert main(["plan", "gpt1", "--topology", "v5e-8", "--train.batch-size", "8192"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--train.batch-size: 8192 is 1024 sequences a device" in error
    assert "a device fit (--train.batch-size " in error
    assert compiled == []


def test_a_plan_is_compiled_once(compiled, capsys, folder):
    words = ["plan", "mini", "--topology", "v5e-4", "--slices", "2", "--mesh.slice", "2"]
    assert main([*words, "--json", "plan.json"]) == 0
    first = capsys.readouterr()
    assert "compiling the step for 2 x v5e-4, which takes minutes" in first.out + first.err
    assert "mini: 116,534,784 parameters on 2 x v5e-8" in first.out
    assert json.loads((folder / "plan.json").read_text()) == REPORT | {"config": "mini"}
    assert main([*words, "--price", "3"]) == 0
    again = capsys.readouterr()
    assert "compiling" not in again.out + again.err
    assert [slices for _, slices in compiled] == [2]
    assert main([*words, "--train.batch-size", "16"]) == 0
    assert [workload.rows for workload, _ in compiled] == [8, 16]


@pytest.mark.parametrize(
    ("config", "words", "line"),
    [
        ("mini", ["--price", "3"], "1,465 steps, 0.0814 hours, 1.3 chip-hours, 3.91 at 3 a chip-hour"),  # 3e6 tokens of 8 x 256
        ("gpt1", ["--corpus-tokens", "32768000"], "100,000 steps, 5.56 hours, 88.9 chip-hours"),  # 64,000 windows of 512
        ("gpt1", [], "; give --corpus-tokens for the length of the run"),
    ],
)
def test_the_length_of_the_run(compiled, capsys, config, words, line):
    assert main(["plan", config, "--topology", "v5e-4", *words]) == 0
    assert line in capsys.readouterr().out


@absent
def test_without_libtpu_there_is_arithmetic(compiled, capsys):
    """8 x 256 tokens a step, on 4 chips of 197 TFLOP/s; the FLOPs of a token are those of test_report.py."""
    assert main(["plan", "mini", "--topology", "v5e-4", "--price", "3"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "mini: 10,256,640 parameters on v5e-4 (TPU v5 lite), mesh data=4, attention pallas_tpu\nbatch of 8 x 256 tokens, 2 seq"
    )
    assert " of 15.75 (" in text
    flops = 8 * 256 * (6 * (4 * (4 * 320 * 320 + 2 * 320 * 1280) + 16_384 * 320) + 12 * 4 * 320 * 256)
    assert f", {flops:.4g} a step\n" in text
    assert f"{flops / (4 * 197e12) * 1e3:9.2f}  matrix products at 197 TFLOP/s" in text
    run, limit = text.splitlines()[-2:]
    assert limit.endswith("pip install 'gpt_jax[tpu]')")
    assert run.startswith("at least for the run of 3e6 tokens: 1,465 steps, ")
    assert run.endswith(" at 3 a chip-hour")
    assert compiled == []


@absent
def test_without_libtpu_a_batch_that_does_not_fit_is_an_error(capsys, libtpu):
    assert main(["plan", "gpt1", "--topology", "v5e-8", "--train.batch-size", "8192"]) == 2
    assert "a device fit (--train.batch-size " in capsys.readouterr().err


@absent
def test_without_libtpu_there_is_no_report_to_write(folder, capsys, libtpu):
    assert main(["plan", "mini", "--topology", "v5e-4", "--json", "plan.json"]) == 2
    printed = capsys.readouterr()
    assert "--json: needs libtpu: pip install 'gpt_jax[tpu]'" in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (folder / "plan.json").exists()


def test_a_known_plan_is_printed_without_jax():
    facts = pretraining(load_config("mini")).facts()
    cache.write(cache.cache_key(**facts, accelerator="v5e-4", slices=1), REPORT)
    code = """
import importlib.util, sys
from gpt_jax.cli import main
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: sys if name == "libtpu" else find(name)
assert main(["plan", "mini", "--topology", "v5e-4"]) == 0
print("loaded:", *sorted({"jax", "jaxlib", "libtpu", "tensorflow"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    assert done.stdout.startswith("mini: 116,534,784 parameters")
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_a_program_that_does_not_fit_is_compiled_once(compiled, capsys, monkeypatch):
    from gpt_jax.plan import program

    def compile_program(workload, _, slices):
        compiled.append(workload)
        raise program.DoesNotFit("20 GiB are needed; use --train.grad-accum-steps 2")

    monkeypatch.setattr(program, "compile_program", compile_program)
    for _ in range(2):
        assert main(["plan", "mini", "--topology", "v5e-4"]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == "gpt-jax: 20 GiB are needed; use --train.grad-accum-steps 2"
    assert len(compiled) == 1


def test_gpus_are_planned_by_arithmetic(compiled, capsys):
    """Nothing is compiled, and a run of 1,465 steps costs at least its shortest time on 8 GPUs at the list price."""
    assert main(["plan", "mini", "--topology", "h100-8"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("mini: 10,256,640 parameters on h100-8 (NVIDIA H100 80GB HBM3), mesh data=8")
    assert text.splitlines()[-2].startswith("at least for the run of 3e6 tokens: 1,465 steps, ")
    assert "at the list price of $6.88 a chip-hour (AWS in us-east-1, " in text
    assert compiled == []


def test_a_fine_tuning_that_does_not_fit_is_refused_by_arithmetic(compiled, capsys):
    """The option counts examples, of which each has 4 sequences; with the suggested micro-batches it fits."""
    words = ["plan", "finetune/race", "--topology", "l4-1", *LIKE, "gpt1", "--train.batch-size", "128"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpt-jax: --train.batch-size: 128 examples of 4 sequences x 512 tokens need about ")
    assert " GiB on each device, but a program can use only 16.9; " in error
    advice = error.strip().rpartition("; use ")[2]
    assert advice.startswith("--train.grad-accum-steps ")
    assert main([*words, *advice.split()]) == 0
