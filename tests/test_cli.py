"""The command line: every mistake ends in one line on standard error with exit code 2, and nothing is lost."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from gpt_jax.arguments import parse
from gpt_jax.cli import VERBS, main
from gpt_jax.errors import UserError
from gpt_jax.runtime.rundir import INTENDED
from gpt_jax.train.checkpoint_info import list_checkpoints
from tests.tiny import tiny_config, trajectory, write_config, write_text


def write_tiny(folder):
    """Writes a text and the config of a run of 8 updates on it; returns the path of the config."""
    config = tiny_config(
        write_text(folder),
        model={"context_length": 16, "num_layers": 1, "num_heads": 4, "mlp_dim": 32},
        optim={"warmup": "2 steps"},
        train={"duration": "8 steps", "eval_every": "4 steps", "eval_windows": 8, "save_every": "4 steps"},
    )
    return write_config(config, folder / "tiny.py")


@pytest.fixture
def config_file(tmp_path):
    """The path of the config of a tiny run."""
    return write_tiny(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The config and the folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_tiny(folder)
    assert main(["pretrain", str(path), "--workdir", str(folder / "run")]) == 0
    return path, folder / "run"


@pytest.fixture
def mistake(capsys):
    """A function that runs a mistaken command and returns its one line; `after_log` allows lines of progress before it."""

    def run(*arguments, after_log=False):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert lines[-1].startswith("gpt-jax: "), err
        assert after_log or len(lines) == 1, err
        assert "Traceback" not in err
        return lines[-1].removeprefix("gpt-jax: ")

    return run


# -- arguments --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "the following arguments are required: VERB (see gpt-jax --help)"),
        ("pretrian smoke", "invalid choice: 'pretrian'"),
        ("pretrain", "name a config: gpt-jax pretrain CONFIG, with CONFIG one of "),
        ("pretrain smoke", "--workdir: name the folder for the run"),
        ("pretrain smoek --workdir RUN", "no config is named 'smoek'; did you mean smoke?"),
        ("pretrain nowhere.py --workdir RUN", "nowhere.py: no such config file"),
        ("prepare smoke", "--data.store: name the folder for the token store (or --workdir RUN, for RUN/store)"),
        ("pretrain smoke --workdir RUN --optim.peak-lrr 1", "--optim.peak-lrr: no such field; did you mean optim.peak-lr"),
        ("pretrain smoke --workdir RUN --optim 1", "--optim: no such field; it is a section; set one of its fields"),
        ("pretrain smoke --workdir RUN --train.batch-size many", "--train.batch-size: 'many' is not a whole number"),
        ("pretrain smoke --workdir RUN --train.seed 1.5", "--train.seed: '1.5' is not a whole number"),
        ("pretrain smoke --workdir RUN --optim.peak-lr fast", "--optim.peak-lr: 'fast' is not a number"),
        ("pretrain smoke --workdir RUN --optim.peak-lr", "--optim.peak-lr: needs a value"),
        ("pretrain smoke --workdir RUN --optim.kind sgd", "--optim.kind: 'sgd' is not one of adam_gpt1, adamw"),
        ("pretrain smoke --workdir RUN --train.duration soon", "--train.duration: 'soon' is not a duration; use, for example,"),
        ("pretrain smoke --workdir RUN --model.num-heads 3", "--model.num-heads: 3 does not divide model.embed-dim 64"),
        (
            "pretrain smoke --workdir RUN --train.grad-accum-steps 3",
            "--train.grad-accum-steps: 3 does not divide train.batch-size 16",
        ),
        ("pretrain smoke extra --workdir RUN", "'extra' comes before any --field"),
        ("checkpoint list nowhere", "nowhere: no such folder; give a run's folder"),
        ("checkpoint list . --optim.peak-lr 1", "'--optim.peak-lr' is not an argument of gpt-jax checkpoint"),
        ("generate nowhere --prompt Hello", "nowhere: no such folder"),
        ("generate nowhere", "the following arguments are required: --prompt (see gpt-jax generate --help)"),
    ],
)
def test_a_mistaken_command_is_one_line(mistake, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in mistake(*arguments.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        "demo --workdir URL",
        "prepare smoke --workdir URL",
        "prepare smoke --data.store URL",
        "pretrain smoke --workdir URL",
        "pretrain smoke --workdir RUN --data.store URL",
        "pretrain smoke --workdir RUN --data.store=URL",
        "pretrain smoke --workdir RUN --data.source URL",
        "finetune finetune/cola --workdir URL",
        "finetune finetune/cola --workdir RUN --init.from URL",
        "finetune finetune/cola --workdir RUN --init.from none --task.path URL",
        "evaluate URL",
        "evaluate RUN --out URL",
        "evaluate RUN --text URL",
        "evaluate RUN --zero-shot cola=URL",
        "study finetune/cola --name ablations --workdir URL",
        "study finetune/cola --name ablations --workdir RUN --lstm URL",
        "report --paper RUN URL",
        "generate URL --prompt Hello",
        "export RUN --format npz --out URL",
        "import URL --workdir RUN",
        "import RUN --workdir URL",
        "checkpoint list URL",
        "bench input --store URL",
    ],
)
def test_a_url_where_a_path_belongs_is_one_line(mistake, tmp_path, monkeypatch, arguments):
    """No folder called "gs:" is made."""
    monkeypatch.chdir(tmp_path)
    message = mistake(*arguments.replace("URL", "gs://bucket/run").split())
    assert "gs://bucket/run is not a path on this machine; to use a bucket, mount it (docs/launch.md" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        "demo --workdir PATH",
        "prepare smoke --workdir PATH",
        "pretrain smoke --workdir=PATH",
        "finetune finetune/cola --workdir PATH",
        "study finetune/cola --workdir PATH --lstm PATH",
        "evaluate PATH PATH --text PATH --out PATH",
        "evaluate PATH --zero-shot cola=PATH --zero-shot=dprd=PATH",
        "report --paper PATH PATH",
        "generate PATH --prompt Hello",
        "export PATH --format npz --out PATH",
        "import PATH --workdir PATH --tokenizer PATH",
        "launch local smoke --workdir PATH",
        "checkpoint list PATH",
        "bench input --store PATH",
    ],
)
def test_the_home_folder_is_expanded_in_every_path(monkeypatch, words):
    """The shell leaves a tilde alone that is quoted, or follows an equals sign."""
    monkeypatch.setenv("HOME", "/home/me")
    options, _ = parse(words.replace("PATH", "~/x").split())
    shown = repr(options)
    assert shown.count("/home/me/x") == words.count("PATH")
    assert "~" not in shown
    options, _ = parse(words.replace("PATH", "$HOME/x").split())
    assert repr(options).count("$HOME/x") == words.count("PATH")


def test_the_home_folder_of_a_config_and_of_a_run(mistake, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(write_tiny(tmp_path).parent)
    missing = ("--data.source", "~/nothing.txt")
    expected = f"--data.source: '{tmp_path}/nothing.txt' does not exist"
    assert expected in mistake("pretrain", "~/tiny.py", "--workdir", "~/run", *missing, after_log=True)
    assert main(["prepare", "~/tiny.py", "--data.store=~/store"]) == 0
    assert (tmp_path / "store" / "index.json").is_file()
    assert not (tmp_path / "~").exists()


def test_a_prompt_may_hold_a_url(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mistake("generate", "nowhere", "--prompt", "gs://bucket").startswith("nowhere: no such folder")


@pytest.mark.parametrize("words", ["study finetune/cola --name layers --workdir RUN", "pretrain smoke --workdir RUN"])
def test_an_option_that_the_verb_lacks_is_not_advised(mistake, monkeypatch, words):
    def refuse(*_):
        raise UserError(f"RUN contains a run with a different config. {INTENDED}")

    monkeypatch.setitem(VERBS, words.partition(" ")[0], refuse)
    assert ("--allow-changes" in mistake(*words.split())) == words.startswith("pretrain")


def test_traceback_shows_where_an_error_arose(config_file):
    with pytest.raises(UserError, match="--workdir"):
        main(["pretrain", str(config_file), "--traceback"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("def config(:\n", "SyntaxError: "),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1\n", "a config file must define config()"),
        ("def config():\n    return 3\n", "config() returned a int, not a PretrainConfig"),
        ("def config():\n    return PretrainConfig()\n", "NameError: name 'PretrainConfig' is not defined"),
        ("from gpt_jax.config import *\ndef config():\n    return PretrainConfig(modle=1)\n", "TypeError: "),
        ("from gpt_jax.config import *\ndef config():\n    return OptimConfig()\n", "config() returned a OptimConfig"),
    ],
)
def test_a_mistaken_config_file_is_one_line(mistake, tmp_path, content, expected):
    path = tmp_path / "mine.py"
    path.write_text(content)
    message = mistake("pretrain", path, "--workdir", tmp_path / "run")
    assert message.startswith(f"{path}")
    assert expected in message


# -- devices, text, stores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--mesh.data 3", "--mesh: slice=1 x data=3 x fsdp=1 x tensor=1 requires 3 devices, but the run has 8 devices; set one"),
        ("--mesh.fsdp 3", "--mesh: the other axes multiply to 3, which does not divide 8 devices"),
        ("--mesh.data -1 --mesh.fsdp -1", "--mesh: only one axis can be -1"),
        ("--train.batch-size 12", "--train.batch-size: 12 does not split evenly over slice x data x fsdp = 8; 8 or 16 would"),
        ("--mesh.tensor 8", "--mesh.tensor: 8 does not divide model.num-heads 4"),
        ("--mesh.tensor -1 --mesh.data 1", "--mesh.tensor: 8 does not divide model.num-heads 4; 1, 2, 4 would"),
        ("--mesh.data 2 --mesh.tensor 4 --model.mlp-dim 6", "--mesh.tensor: 4 does not divide model.mlp-dim 6; 1, 2, 3 would"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(mistake, config_file, tmp_path, options, expected):
    assert expected in mistake("pretrain", config_file, "--workdir", tmp_path / "run", *options.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.txt", None, "--data.source: '{path}' does not exist"),
        ("empty.txt", b"", "{path}: the file is empty"),
        ("binary.txt", b"some\0bytes", "{path}:1: a NUL byte, so this is not text"),
        ("latin1.txt", b"good\nbad \xe9\n", "{path}:2: byte 0xe9 is not UTF-8; convert the file to UTF-8"),
        ("rows.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "{path}:2: no field 'text' (--data.text-field); did you mean txt?"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n', "{path}:2: not valid JSON"),
        ("short.jsonl", b'{"text": "a b"}\n{"text": "c d"}\n', "--model.context-length: the training text has 4 tokens"),
        ("one.txt", b"a single document", "too few distinct documents (1); at least 2 are needed"),
    ],
)
def test_text_that_cannot_be_used_is_one_line(mistake, config_file, tmp_path, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    message = mistake("pretrain", config_file, "--workdir", tmp_path / "run", "--data.source", path, after_log=True)
    assert expected.format(path=path) in message


def test_a_correct_source_works_after_a_mistaken_one(mistake, config_file, tmp_path):
    mistake("pretrain", config_file, "--workdir", tmp_path / "run", "--data.source", tmp_path / "missing.txt", after_log=True)
    mistake("pretrain", config_file, "--workdir", tmp_path / "run", "--optim.warmup", "9 steps", after_log=True)
    assert main(["prepare", str(config_file), "--workdir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "store" / "index.json").exists()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("--train.duration", "0.001 epochs", "'0.001 epochs' is less than one update of 8 examples"),
        ("--optim.warmup", "8 steps", "must be shorter than the run of 8 steps, not 8 steps"),
        ("--train.duration", "1e300", "'1e300' is 1e+300 updates; a run has fewer than 2^31"),
        ("--train.duration", "1e308 epochs", "'1e308 epochs' is inf updates; a run has fewer than 2^31"),
    ],
)
def test_durations_that_leave_nothing_to_do_are_one_line(mistake, finished, tmp_path, field, value, expected):
    config_file, run = finished
    store = run / "store"
    assert mistake("pretrain", config_file, "--workdir", tmp_path, "--data.store", store, field, value) == f"{field}: {expected}"


def test_a_store_of_another_tokenizer_is_one_line(mistake, finished, tmp_path):
    config_file, run = finished
    other = ("--data.tokenizer.kind", "sentencepiece", "--model.vocab-size", "300", "--data.source=")
    message = mistake("pretrain", config_file, "--workdir", tmp_path, "--data.store", run / "store", *other)
    assert message.startswith(f"{run / 'store'}: made with ")
    assert "data.tokenizer.kind 'bytes', not 'sentencepiece'" in message
    assert "model.vocab-size 257, not 300" in message


def test_a_damaged_shard_is_named(mistake, finished, tmp_path):
    config_file, run = finished
    store = shutil.copytree(run / "store", tmp_path / "store")
    shard = store / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    message = mistake("pretrain", config_file, "--workdir", tmp_path / "run", "--data.store", store)
    assert message == f"{shard}: altered since it was written (its SHA-256 differs); restore it or prepare the store again"
    shard.write_bytes(content[:-2])
    message = mistake("pretrain", config_file, "--workdir", tmp_path / "run", "--data.store", store)
    assert message.startswith(f"{shard}: has {len(content) - 2} bytes instead of {len(content)};")


# -- a run's folder ---------------------------------------------------------------------------------------------------------


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_workdir_of_another_config_is_refused(mistake, finished):
    config_file, run = finished
    before = contents(run)
    message = mistake("pretrain", config_file, "--workdir", run, "--optim.peak-lr", "1e-3", "--mesh.data", "8")
    assert message == (
        f"{run} contains a run with a different config; it differs in --optim.peak-lr 0.001 (was 0.01). "
        "Use another --workdir, or add --allow-changes if this is intended"
    )
    assert contents(run) == before


def test_a_run_resumes_after_it_and_its_text_were_moved(mistake, finished, tmp_path, monkeypatch, capsys):
    """Its token store is inside its folder. Only what the text contains matters."""
    config_file, original = finished
    run = shutil.copytree(original, tmp_path / "moved")
    shutil.rmtree(run / "checkpoints" / "8")
    (run / "result.json").unlink()
    (tmp_path / "texts").mkdir()
    shutil.copy(original.parent / "text.jsonl", tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", str(config_file), "--workdir", "moved/", "--data.source", "./texts//text.jsonl"]) == 0
    assert "resuming at step 4" in capsys.readouterr().err
    assert trajectory(run) == trajectory(original)
    stored = json.loads((run / "config.json").read_text())
    assert (stored["digest_version"], stored["config"]["data"]["source"]) == (2, "./texts//text.jsonl")
    assert stored["digest"] == json.loads((original / "config.json").read_text())["digest"]
    manifest = json.loads((run / "checkpoints" / "8" / "manifest.json").read_text())
    assert (manifest["config_digest"], manifest["config_digest_version"]) == (stored["digest"], 2)

    # The text is gone, and then another one is there.
    (tmp_path / "texts").rename("elsewhere")
    assert main(["pretrain", str(config_file), "--workdir", "moved", "--data.source", "texts/text.jsonl"]) == 0
    assert "already finished at step 8" in capsys.readouterr().err
    # Another store is made from the same text under another name.
    (tmp_path / "elsewhere" / "text.jsonl").rename("words.jsonl")
    words = ("--data.source", "words.jsonl", "--data.store", "store")
    assert main(["pretrain", str(config_file), "--workdir", "moved", *words]) == 0
    assert "already finished at step 8" in capsys.readouterr().err
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "text.jsonl").write_text('{"text": "another"}\n' * 60)
    before = contents(run)
    message = mistake("pretrain", config_file, "--workdir", "moved", "--data.source", "texts/text.jsonl", after_log=True)
    assert message.startswith("moved/store: the text of --data.source has changed from ")
    assert contents(run) == before
    assert main(["pretrain", str(config_file), "--workdir", "moved", "--data.source", "texts", "--allow-changes"]) == 0


def test_a_run_without_a_sound_checkpoint_is_refused(mistake, finished, tmp_path):
    config_file, run = finished
    run = shutil.copytree(run, tmp_path / "run")
    for step in ("4", "8"):
        largest = max((run / "checkpoints" / step).rglob("*"), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1])
    before = contents(run / "checkpoints")
    message = mistake("pretrain", config_file, "--workdir", run)
    assert "no sound checkpoint: 8 is damaged (file " in message
    assert "4 is damaged (file " in message
    assert contents(run / "checkpoints") == before
    records = (run / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["kind"] == "train" for line in records) == 8


def test_every_command_takes_a_checkpoint_that_was_copied_renamed_or_linked(mistake, finished, tmp_path, monkeypatch, capsys):
    config_file, run = finished
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "checkpoints" / "8", "best-model")
    shutil.copytree("best-model", "0008")
    os.symlink("best-model", "latest")
    continued = []
    for name in ("best-model", "0008", "latest"):
        capsys.readouterr()
        if name != "best-model":
            assert main(["generate", name, "--prompt", "ab", "--tokens", "4", "--temperature", "0"]) == 0
            continued.append(capsys.readouterr().out)
        for action in ("list", "verify"):
            assert main(["checkpoint", action, name]) == 0
            shown = capsys.readouterr().out
            assert shown.split()[:1] == ["8"]
            assert f"(in {name}{' -> best-model' if name == 'latest' else ''})" in shown
    assert len(set(continued)) == 1
    assert mistake("checkpoint", "prune", "latest") == "latest: is a single checkpoint; give a run's folder"
    assert mistake("evaluate", "latest").startswith("latest is a pre-trained model")
    assert main(["evaluate", "0008", "--text", str(config_file)]) == 0
    assert main(["export", "latest", "--format", "npz", "--out", "exported"]) == 0


def test_a_renamed_checkpoint_inside_a_run_is_listed_and_kept(finished, tmp_path, capsys):
    run = shutil.copytree(finished[1], tmp_path / "run")
    (run / "checkpoints" / "4").rename(run / "checkpoints" / "best")
    (run / "checkpoints" / "newest").symlink_to("8")
    (run / "checkpoints" / "plots").mkdir()
    for action in ("list", "prune", "verify"):
        capsys.readouterr()
        assert main(["checkpoint", action, str(run)]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        if action != "prune":
            assert [line[0] for line in lines] == ["?", "4", "8", "8"]
            assert [line[3] for line in lines] == ["incomplete", "sound", "sound", "sound"]
            assert [line[-2:] for line in lines[:2]] == [["(in", "plots)"], ["(in", "best)"]]
            assert lines[2][-4:] == ["(in", "newest", "->", "8)"]
        else:
            assert lines == []


def test_verify_names_a_damaged_checkpoint(finished, tmp_path, capsys):
    run = shutil.copytree(finished[1], tmp_path / "run")
    assert main(["checkpoint", "verify", str(run)]) == 0
    config = run / "checkpoints" / "4" / "config.json"
    config.write_text(config.read_text().replace("257", "258"))
    assert main(["checkpoint", "list", str(run)]) == 0  # sizes only
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(run)]) == 2
    four, eight = capsys.readouterr().out.splitlines()
    assert "damaged" in four
    assert "config.json: checksum differs" in four
    assert "sound" in eight
    assert "loss " in eight


def test_nan_in_the_parameters_ends_with_1_and_the_evidence(finished, tmp_path, capsys):
    """The learning rate is so high that the parameters overflow within a few updates."""
    config_file, run = finished
    options = ["--data.store", str(run / "store"), "--optim.peak-lr", "1e38", "--optim.kind", "adamw"]
    assert main(["pretrain", str(config_file), "--workdir", str(tmp_path), *options]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("gpt-jax: update ")
    assert "is not finite" in last
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    (event,) = [record for record in records if record.get("event") == "non-finite"]
    assert len(event["windows"]) == len(event["epochs"]) == 8
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0


# -- processes of their own -------------------------------------------------------------------------------------------------


def python(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | environment)


def test_the_module_is_the_command_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "pretrain" in shown
    done = subprocess.run([sys.executable, "-m", "gpt_jax", "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, "")
    done = subprocess.run([sys.executable, "-m", "gpt_jax", "pretrian"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""


def test_training_needs_no_tensorflow(finished, tmp_path):
    config_file, run = finished
    code = """
import sys
sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None  # They seem not to be installed.
from gpt_jax.arguments import parse
from gpt_jax.cli import main
assert main([*sys.argv[1:], "--data.pipeline", "tf"]) == 2
sys.exit(main([*sys.argv[1:], "--data.pipeline", "auto"]))
"""
    done = python(code, "pretrain", config_file, "--workdir", tmp_path, "--data.store", run / "store")
    assert done.returncode == 0, done.stderr
    assert "gpt-jax: --data.pipeline: tf needs tensorflow, which is not installed" in done.stderr
    losses = [json.loads((folder / "result.json").read_text())["loss"] for folder in (run, tmp_path)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_full_disk_ends_with_a_line_and_a_sound_checkpoint(finished, tmp_path, capsys):
    """The run's folder is on a file system of 3 MB that only this process sees."""
    config_file, run = finished
    script = """
mount -t tmpfs -o size=3m none "$1/disk" && cd "$1" && shift || exit 99
"$@"
code=$?
cp -r disk/run run
exit $code
"""
    (tmp_path / "disk").mkdir()
    longer = ["--train.duration", "200 steps", "--train.save-every", "1 steps", "--train.keep-latest", "1000"]
    arguments = ["pretrain", str(config_file), "--data.store", str(run / "store"), *longer]
    command = [sys.executable, "-m", "gpt_jax", *arguments, "--workdir", "disk/run"]
    isolated = ["unshare", "--map-root-user", "--mount", "bash", "-c", script, "bash", str(tmp_path), *command]
    try:
        done = subprocess.run(isolated, capture_output=True, text=True, timeout=200)
    except FileNotFoundError:
        pytest.skip("this system has no unshare")
    if done.returncode == 99 or "unshare:" in done.stderr:
        pytest.skip(f"this system does not let a process mount a file system of its own: {done.stderr}")
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("gpt-jax: ")
    assert "no space left on" in last.lower()
    assert "Traceback" not in done.stderr

    sound = [info.step for info in list_checkpoints(tmp_path / "run") if info.state == "sound"]
    assert len(sound) > 5
    assert main([*arguments, "--workdir", str(tmp_path / "run"), "--train.save-every", "100 steps"]) == 0
    assert f"resuming at step {sound[-1]}" in capsys.readouterr().err
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("cause", [None, KeyboardInterrupt()])
def test_an_interruption_inside_a_c_function_is_an_interruption(monkeypatch, capsys, cause):
    def interrupt(options, overrides):
        raise SystemError("returned a result with an exception set") from cause

    monkeypatch.setitem(VERBS, "bench", interrupt)
    if cause is None:
        with pytest.raises(SystemError):
            main(["bench", "all"])
    else:
        assert main(["bench", "all"]) == 130
        assert capsys.readouterr().err == "gpt-jax: interrupted\n"


def test_an_interruption_that_a_callback_would_ignore_is_repeated():
    code = """
import signal, sys, time
from gpt_jax import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # A process in the background ignores the signal.

class Callback:
    def __del__(self):
        raise KeyboardInterrupt

def verb(options, overrides):
    Callback()
    while True:
        time.sleep(0.01)

cli.VERBS["bench"] = verb
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code, "bench", "all"], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, "gpt-jax: interrupted\n")
