"""A run's folder: one config, one text, a record that survives being cut off, files that are whole."""

import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path

import pytest

from gpt_jax.config import DataConfig, FinetuneRunConfig, OptimConfig, PretrainConfig, TaskConfig, TrainConfig
from gpt_jax.config.load import CONFIG_VERSION, DIGEST_VERSION
from gpt_jax.errors import UserError
from gpt_jax.runtime.rundir import RunDir, environment, read_json, sha256, write_atomic

CONFIG = PretrainConfig(data=DataConfig(source="text.txt"), train=TrainConfig(duration="100 steps"))


def attempt(folder, config=CONFIG, digest="d0" * 32, *, allow_changes=False, steps=(), from_step=0):
    """Starts a run, records these steps and ends; returns the number of the attempt."""
    run = RunDir(folder)
    run.check_config(config, allow_changes)
    run.check_data(digest, allow_changes)
    run.open(config, digest)
    try:
        run.supersede(from_step)
        for step in steps:
            run.record("train", step, loss=1 / (step + 2))
    finally:
        run.close()
    return run.attempt


def test_config_json_has_the_config_and_what_produced_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_some_flag")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_some_flag")
    attempt(tmp_path / "new" / "run")
    stored = json.loads((tmp_path / "new" / "run" / "config.json").read_text())
    assert stored["config"]["data"]["source"] == "text.txt"
    assert stored["config"]["train"]["duration"] == "100 steps"
    assert stored["config"]["optim"]["peak_lr"] == 2.5e-4
    assert stored["data_digest"] == "d0" * 32
    assert len(stored["digest"]) == 64
    assert stored["config_version"] == CONFIG_VERSION == 2
    assert stored["digest_version"] == DIGEST_VERSION == 2
    assert stored["xla_flags"] == "--xla_some_flag"
    assert stored["libtpu_init_args"] == "--xla_tpu_some_flag"
    assert {"python", "jax", "flax", "optax", "numpy"} <= set(stored["versions"])
    assert "commit" in stored


@pytest.mark.parametrize("package", ["libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt"])
def test_the_environment_has_the_versions_of_the_packages_that_drive_accelerators(monkeypatch, package):

    def version(name):
        if name != package:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions = environment()["versions"]
    del versions["python"]
    assert versions == {package: "1.2.3"}


def test_a_command_that_is_not_utf8_is_recorded_so_that_it_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpt-jax", "pretrain", "--workdir", "caf\udce9"])  # as Python decodes an argument in Latin-1
    attempt(tmp_path, steps=[1])
    assert read_json(tmp_path / "config.json")["command"][-1] == "caf\\udce9"
    assert attempt(tmp_path, steps=[2], from_step=1) == 2


def test_records_carry_kind_step_time_and_attempt(tmp_path):
    assert attempt(tmp_path, steps=[1, 2]) == 1
    assert attempt(tmp_path, steps=[3], from_step=2) == 2
    first, second, third = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [first["kind"], first["step"], first["attempt"], first["loss"]] == ["train", 1, 1, 1 / 3]
    assert abs(first["time"] - os.stat(tmp_path / "metrics.jsonl").st_mtime) < 60
    assert (second["attempt"], third["attempt"]) == (1, 2)
    assert RunDir(tmp_path).records() == [first, second, third]


# -- one config -------------------------------------------------------------------------------------------------------------


def test_another_config_is_refused_and_its_differences_are_named(tmp_path):
    attempt(tmp_path, steps=[1])
    other = dataclasses.replace(CONFIG, optim=OptimConfig(peak_lr=1e-3), train=TrainConfig(duration="200 steps"))
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError) as caught:
        attempt(tmp_path, other, steps=[2])
    message = str(caught.value)
    assert "--optim.peak-lr 0.001 (was 0.00025), --train.duration '200 steps' (was '100 steps')." in message
    assert "--allow-changes" in message
    assert "\n" not in message
    assert (tmp_path / "config.json").read_bytes() == before
    assert [record["step"] for record in RunDir(tmp_path).records()] == [1]
    # A change that is allowed once is the run's config from then on.
    attempt(tmp_path, other, allow_changes=True, from_step=1)
    attempt(tmp_path, other, from_step=1)
    with pytest.raises(UserError, match=r"--optim.peak-lr 0.00025 \(was 0.001\)"):
        attempt(tmp_path)


def test_fields_that_affect_speed_or_display_may_differ(tmp_path):
    attempt(tmp_path, steps=[1])
    data = dataclasses.replace(CONFIG.data, prefetch=9, pipeline="threads")
    train = dataclasses.replace(CONFIG.train, log_seconds=1.0, save_every="7 steps", grad_accum_steps=2, prompts=("Hello",))
    assert attempt(tmp_path, dataclasses.replace(CONFIG, data=data, train=train), steps=[2], from_step=1) == 2


def test_the_paths_of_inputs_may_differ(tmp_path):
    """Their content is compared by other means."""
    attempt(tmp_path, steps=[1])
    tokenizer = dataclasses.replace(CONFIG.data.tokenizer, path="elsewhere")
    data = dataclasses.replace(CONFIG.data, source="elsewhere", store="elsewhere", tokenizer=tokenizer)
    assert attempt(tmp_path, dataclasses.replace(CONFIG, data=data), steps=[2], from_step=1) == 2


def rewrite_config(folder, change):
    """Replaces the config in config.json, a nested dictionary, by one that `change` has modified."""
    stored = read_json(folder / "config.json")
    change(stored["config"])
    write_atomic(folder / "config.json", json.dumps(stored))


def test_a_field_that_did_not_exist_when_a_run_began_had_its_default(tmp_path):
    attempt(tmp_path, steps=[1])
    rewrite_config(tmp_path, lambda config: config["optim"].pop("clip_norm"))
    with pytest.raises(UserError, match=r"it differs in --optim.clip-norm 1.0 \(was 0.0\)\."):
        attempt(tmp_path, dataclasses.replace(CONFIG, optim=OptimConfig(clip_norm=1.0)))
    assert "clip_norm" not in read_json(tmp_path / "config.json")["config"]["optim"]
    assert attempt(tmp_path, steps=[2], from_step=1) == 2
    assert read_json(tmp_path / "config.json")["config"]["optim"]["clip_norm"] == 0.0


def test_a_run_of_an_earlier_version_is_compared_under_the_present_names(tmp_path):
    def to_version_1(config):
        config["train"]["micro_batches"] = config["train"].pop("grad_accum_steps")
        config["task"]["lengths"] = config["task"].pop("num_length_buckets")
        config["task"]["order"] = "grouped" if config["task"].pop("bucket_by_length") else "random"

    config = FinetuneRunConfig(task=TaskConfig(bucket_by_length=False))
    attempt(tmp_path, config, steps=[1])
    rewrite_config(tmp_path, to_version_1)
    with pytest.raises(UserError, match=r"it differs in --task.bucket-by-length True \(was False\)\."):
        attempt(tmp_path, FinetuneRunConfig())
    assert attempt(tmp_path, config, steps=[2], from_step=1) == 2
    assert read_json(tmp_path / "config.json")["config"]["task"]["bucket_by_length"] is False


def test_an_unknown_field_of_a_runs_config_is_named_with_its_file(tmp_path):
    attempt(tmp_path, steps=[1])
    rewrite_config(tmp_path, lambda config: config["train"].update(bach_size=64))
    message = r"config.json: no config field is named 'train.bach-size'; did you mean train.batch-size"
    with pytest.raises(UserError, match=message) as caught:
        attempt(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")


def test_an_attempt_that_trained_nothing_ties_the_folder_to_nothing(tmp_path):
    """A first try with a wrong field must not make the corrected one an error."""
    attempt(tmp_path, dataclasses.replace(CONFIG, optim=OptimConfig(peak_lr=1.0)), digest="e1" * 32)
    attempt(tmp_path, steps=[1])
    with pytest.raises(UserError, match="different config"):
        attempt(tmp_path, dataclasses.replace(CONFIG, optim=OptimConfig(peak_lr=1.0)))


def test_another_token_store_is_refused(tmp_path):
    attempt(tmp_path, steps=[1])
    with pytest.raises(UserError, match=r"trained on different data \(digest d0d0d0d0d0d0, now e1e1e1e1e1e1\)"):
        attempt(tmp_path, digest="e1" * 32)
    assert attempt(tmp_path, digest="e1" * 32, allow_changes=True, from_step=1) == 2
    with pytest.raises(UserError, match=r"digest e1e1e1e1e1e1, now d0d0d0d0d0d0"):
        attempt(tmp_path)


def test_a_folder_with_checkpoints_but_no_config_is_refused(tmp_path):
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no config.json; use another --workdir"):
        attempt(tmp_path)


def test_the_folder_of_an_imported_model_is_refused(tmp_path):
    run = RunDir(tmp_path)
    run.require_not_imported()
    attempt(tmp_path)
    run.require_not_imported()
    run.open(CONFIG, "", imported_from="/models/openai-gpt")
    run.close()
    with pytest.raises(UserError) as caught:
        run.require_not_imported()
    assert str(caught.value) == (
        f"{tmp_path} contains a model imported from /models/openai-gpt; use another --workdir with --init.from {tmp_path}"
    )


def test_a_config_json_that_is_not_json_is_named(tmp_path):
    attempt(tmp_path, steps=[1])
    (tmp_path / "config.json").write_text('{"config": {')
    with pytest.raises(UserError, match=r"config.json:1: not valid JSON: "):
        attempt(tmp_path)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"config": []}, ": 'config' is a list, not an object; it has changed since it was written"),
        ({"config": None}, ": 'config' is null, not an object; "),
        ({"config": {"train": 5}}, ": no config field is named 'train'; "),
        ({"config": {"train": {"seed": "3"}}}, ": --train.seed: '3' is not a whole number"),
        ({"config": {"optim": {"peak_lr": 10**400}}}, f": --optim.peak-lr: 1{'0' * 59}... is not a number below 2^63"),
        ({"config": {"data": {"source": ["a"]}}}, ": --data.source: ('a',) is not a string"),
        ({"config": {"task": {"train": {"a": 5}}}}, ": no config field is named 'task.train.a'; "),
        ({"data_digest": 5}, ": 'data_digest' is a number, not a string; "),
        ({"init": []}, ": 'init' is a list, not an object; "),
    ],
)
def test_a_config_json_with_bad_values_is_one_line(tmp_path, values, problem):
    attempt(tmp_path, steps=[1])
    write_atomic(tmp_path / "config.json", json.dumps(read_json(tmp_path / "config.json") | values))
    with pytest.raises(UserError) as error:
        attempt(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/config.json{problem}")
    assert "\n" not in str(error.value)


def test_a_config_json_that_is_nested_deeply_is_one_line(tmp_path):
    attempt(tmp_path, steps=[1])
    for depth in (5, 800, 980, 5000):
        (tmp_path / "config.json").write_text('{"data_digest": "", "config": ' + '{"a": ' * depth + "5" + "}" * depth + "}")
        with pytest.raises(UserError, match=f"^{tmp_path}/config.json:"):
            attempt(tmp_path)


@pytest.mark.parametrize("name", ["config", "data_digest"])
def test_a_config_json_that_lacks_a_value_is_one_line(tmp_path, name):
    attempt(tmp_path, steps=[1])
    write_atomic(
        tmp_path / "config.json",
        json.dumps({key: value for key, value in read_json(tmp_path / "config.json").items() if key != name}),
    )
    with pytest.raises(UserError, match=f"config.json: '{name}' is missing; it has changed since it was written"):
        attempt(tmp_path)


@pytest.mark.parametrize("content", [b"[1]", b"5", b"", b"\xff\xfe{", b"[" * 100_000, b'{"config": ' + b"9" * 5000 + b"}"])
def test_a_config_json_that_holds_something_else_is_one_line(tmp_path, content):
    attempt(tmp_path, steps=[1])
    (tmp_path / "config.json").write_bytes(content)
    for check in (attempt, lambda folder: RunDir(folder).require_not_imported()):
        with pytest.raises(UserError) as error:
            check(tmp_path)
        assert str(error.value).startswith(f"{tmp_path}/config.json:")


# -- the record -------------------------------------------------------------------------------------------------------------


def test_records_past_the_step_from_which_training_continues_are_moved_not_lost(tmp_path):
    attempt(tmp_path, steps=[1, 2, 3, 4])
    attempt(tmp_path, steps=[3, 4, 5], from_step=2)
    attempt(tmp_path, steps=[5], from_step=4)
    kept = [(record["step"], record["attempt"]) for record in RunDir(tmp_path).records()]
    assert kept == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)]
    moved = [json.loads(line) for line in (tmp_path / "metrics.superseded.jsonl").read_text().splitlines()]
    assert [(record["step"], record["attempt"]) for record in moved] == [(3, 1), (4, 1), (5, 2)]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_was_cut_off_is_left_out_of_the_record(tmp_path, cut):
    attempt(tmp_path, steps=[1, 2, 3])
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    # A record that lacks only its line end is whole.
    assert [record["step"] for record in RunDir(tmp_path).records()] == ([1, 2, 3] if cut == 1 else [1, 2])
    attempt(tmp_path, steps=[3, 4], from_step=2)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]


NOT_RECORDS = [
    b"\xff\xfe",
    b"[]",
    b"5",
    b"{}",
    b"null",
    b"[" * 100_000,
    b'{"step": ' + b"9" * 5000 + b"}",
    b'{"kind": "train", "step": "3", "attempt": 1}',
    b'{"kind": "train", "step": -3, "attempt": 1}',
    b'{"kind": "train", "step": 3, "attempt": "first"}',
    b'{"kind": "train", "step": 3}',
    b'{"step": 3, "attempt": 1}',
    b'{"kind": 5, "step": 3, "attempt": 1}',
    b'{"kind": "train", "step": ' + b"1" * 400 + b', "attempt": 1}',
]


def test_lines_that_are_not_records_are_moved_not_lost(tmp_path):
    attempt(tmp_path, steps=[1, 2])
    file = tmp_path / "metrics.jsonl"
    first, second = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([first, *NOT_RECORDS, second]) + b"\n")
    assert [record["step"] for record in RunDir(tmp_path).records()] == [1, 2]
    assert attempt(tmp_path, steps=[3], from_step=2) == 2
    assert [json.loads(line)["step"] for line in file.read_bytes().splitlines()] == [1, 2, 3]
    assert (tmp_path / "metrics.superseded.jsonl").read_bytes() == b"\n".join(NOT_RECORDS) + b"\n"


def test_a_cut_off_line_is_noticed_where_nothing_is_superseded(tmp_path):
    attempt(tmp_path, steps=[1, 2])
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-1])
    attempt(tmp_path, steps=[3], from_step=2)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


def test_floats_are_written_to_the_last_bit(tmp_path):
    run = RunDir(tmp_path)
    run.open(CONFIG, "")
    values = [0.1 + 0.2, 1e-45, 3.4028234663852886e38, 5.551115123125783e-17]
    run.record("eval", 1, values=values)
    run.close()
    assert RunDir(tmp_path).records()[0]["values"] == values


@pytest.mark.parametrize("end", [RunDir.sync, RunDir.close, lambda run: run.write_result({"loss": 1.0})])
def test_the_record_is_written_to_the_disk_and_closed(tmp_path, monkeypatch, end):
    """A file on a mounted bucket is uploaded when it is closed."""
    run = RunDir(tmp_path)
    run.open(CONFIG, "")
    run.record("train", 1, loss=1.0)
    opened, file, synced = run._metrics, tmp_path / "metrics.jsonl", []

    def fsync(descriptor):
        if os.path.samestat(os.fstat(descriptor), file.stat()):
            synced.append(file.read_text())

    monkeypatch.setattr(os, "fsync", fsync)
    end(run)
    assert opened.closed
    (content,) = synced
    assert json.loads(content)["step"] == 1
    run.close()


def test_a_record_continues_after_it_was_written_to_the_disk(tmp_path):
    run = RunDir(tmp_path)
    run.open(CONFIG, "")
    for step in (1, 2, 3):
        run.record("train", step, loss=1.0)
        run.sync()
        assert [record["step"] for record in RunDir(tmp_path).records()] == list(range(1, step + 1))
    run.close()
    run.close()
    assert [record["attempt"] for record in RunDir(tmp_path).records()] == [1, 1, 1]


def test_only_the_primary_process_writes(tmp_path):
    run = RunDir(tmp_path / "run", primary=False)
    run.open(CONFIG, "")
    run.supersede(0)
    run.record("train", 1, loss=1.0)
    run.sync()
    run.write_result({"loss": 1.0})
    run.close()
    assert not (tmp_path / "run").exists()


# -- files ------------------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomic(path, "old")

    def fail(descriptor):
        assert path.read_text() == "old"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_atomic(path, b"newer")
    assert path.read_text() == "newer"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, ": No such file or directory"), ("{", ":1: not valid JSON: Expecting"), ("[1]", ":1: a list, not a JSON object")],
)
def test_a_file_that_is_not_a_json_object_is_named(tmp_path, content, problem):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}{problem}")
    assert "\n" not in str(caught.value)


def test_checksums_are_those_of_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / ".result.json.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"result.json: no space left on the device; free some space") as caught:
        write_atomic(tmp_path / "result.json", "{}")
    assert "\n" not in str(caught.value)
    run = RunDir(tmp_path)
    run.open(CONFIG, "")
    run.record("event", 0)
    file = run._metrics.fileno()
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), file)
    for write in (lambda: run.record("train", 1, loss=1.0), run.sync):  # The second one tries to write the record again.
        with pytest.raises(UserError, match=r"metrics.jsonl: no space left on the device"):
            write()
    run.close()
