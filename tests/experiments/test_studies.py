"""Studies: the fine-tunings that they run, the settings that they refuse, and the files that they write."""

import dataclasses
import json
import shutil

import pytest

from gpt_jax.cli import main
from gpt_jax.config import FinetuneConfig, PretrainConfig, TransferConfig
from gpt_jax.config.load import config_to_dict, load_config
from gpt_jax.errors import UserError
from gpt_jax.experiments import studies
from gpt_jax.tasks.finetune import spread
from gpt_jax.tasks.registry import task_from_config
from gpt_jax.train.checkpoint_info import newest_checkpoint
from gpt_jax.train.pretrain import pretrain
from tests.tiny import replace_fields

PNG = b"\x89PNG\r\n\x1a\n"


def settings(config):
    """Returns the settings that distinguish the fine-tunings of a study."""
    return config.init.from_, config.init.like, config.init.blocks, config.task.lm_weight


def quiet(line):
    pass


def newest(run):
    """Returns the path of the checkpoint that a study starts from."""
    return str(newest_checkpoint(run, quiet).path)


def test_layers_go_from_nothing_to_all_blocks(pretrained):
    start = newest(pretrained)
    variants = studies.layer_variants(FinetuneConfig(init=TransferConfig(str(pretrained))), quiet)
    assert [(variant.name, variant.x, settings(variant.config)) for variant in variants] == [
        ("nothing", -1, ("none", start, -1, 0.5)),
        ("embeddings", 0, (start, "", 0, 0.5)),
        ("1 block", 1, (start, "", 1, 0.5)),
        ("2 blocks", 2, (start, "", 2, 0.5)),
    ]


@pytest.fixture(scope="module")
def lstm(pretrained, tmp_path_factory):
    """The folder of an LSTM after one update on the store of `pretrained`."""
    config = replace_fields(
        load_config(str(pretrained.parent / "tiny.py")),
        model={"kind": "lstm", "num_layers": 1, "lstm_units": 8, "context_length": 8, "loss_chunk": 0},
        data={"store": str(pretrained / "store")},
        optim={"warmup": "0 steps"},
        train={"duration": "1 steps"},
    )
    folder = tmp_path_factory.mktemp("lstm") / "run"
    pretrain(config, folder)
    return folder


def test_ablations_are_the_rows_of_table_5(pretrained, lstm):
    start, lines = newest(pretrained), []
    variants = studies.ablation_variants(FinetuneConfig(init=TransferConfig(str(pretrained))), lines.append, str(lstm))
    assert {variant.name: settings(variant.config) for variant in variants} == {
        "full": (start, "", -1, 0.5),
        "w/o pre-training": ("none", start, -1, 0.5),
        "w/o aux LM": (start, "", -1, 0.0),
        "LSTM w/ aux LM": (newest(lstm), "", -1, 0.5),
    }
    assert not lines
    assert len(studies.ablation_variants(FinetuneConfig(init=TransferConfig(str(pretrained))), lines.append)) == 3
    assert lines == ["ablations: the LSTM's row is left out; name a pre-trained LSTM with --lstm RUN"]


def test_steps_are_the_checkpoints_of_the_run(pretrained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    shutil.copytree(run / "checkpoints" / "1", run / "checkpoints" / "1.replaced")  # left by an interrupted save
    variants = studies.step_variants(FinetuneConfig(init=TransferConfig(str(run))), quiet)
    assert [(variant.name, variant.x) for variant in variants] == [("nothing", 0), ("step 1", 1), ("step 2", 2)]
    assert [variant.config.init.from_ for variant in variants[1:]] == [str(run / "checkpoints" / step) for step in ("1", "2")]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("layers", ["--init.from", "none", "--init.like", "gpt1"], "--init.from: name the pre-trained run"),
        ("layers", ["--init.from", "LSTM"], "is an LSTM, which has no blocks"),
        ("layers", ["--init.from", "RUN", "--init.blocks", "1"], "--init.blocks: the study 'layers' sets this field"),
        ("layers", ["--init.from", "RUN", "--lstm", "LSTM"], "--lstm: applies to the study 'ablations', not to 'layers'"),
        ("steps", ["--init.from", "RUN", "--lstm", "LSTM"], "--lstm: applies to the study 'ablations', not to 'steps'"),
        ("steps", ["--init.from", "RUN/checkpoints/1"], "give a run's folder, not a checkpoint's"),
        ("ablations", ["--init.from", "LSTM", "--lstm", "LSTM"], "is an LSTM; give it as --lstm and a Transformer here"),
        ("ablations", ["--init.from", "RUN", "--lstm", "RUN"], "is a Transformer; pre-train an LSTM with --model.kind lstm"),
        ("ablations", ["--init.from", "RUN", "--lstm", "nowhere"], "nowhere: no such folder"),
        ("ablations", ["--init.from", "RUN", "--lstm", "none"], "--lstm: name the run of a pre-trained LSTM"),
        ("steps", ["--init.from", "RUN", "--init.blocks", "9"], "--init.blocks: the checkpoint has 2 blocks, not 9"),
        ("layers", ["--init.from", "RUN", "--seeds", "0"], "--seeds: must be positive, not 0"),
        ("ablations", ["--init.from", "RUN", "--init.blocks", "1"], "--init.blocks: the study 'ablations' sets this field"),
        (
            "ablations",
            ["--init.from", "RUN", "--task.lm-weight", "0"],
            "--task.lm-weight: must be positive; the study 'ablations'",
        ),
    ],
)
def test_settings_that_do_not_allow_a_study_are_refused_before_training(
    config_file, pretrained, lstm, tmp_path, capsys, name, arguments, message
):
    words = [word.replace("RUN", str(pretrained)).replace("LSTM", str(lstm)) for word in arguments]
    out = tmp_path / "study"
    assert main(["study", config_file, "--name", name, "--workdir", str(out), *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gpt-jax: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "folders"),
    [
        ("layers", ["nothing", "embeddings", "1-block", "2-blocks"]),
        ("ablations", ["full", "wo-pre-training", "wo-aux-LM"]),
        ("steps", ["nothing", "step-1", "step-2"]),
    ],
)
def test_the_scores_of_several_seeds_are_written_printed_and_plotted(
    config_file, pretrained, tmp_path, monkeypatch, capsys, name, folders
):
    """The fine-tunings themselves are replaced by made-up scores."""
    calls = []

    def finetune_seeds(config, workdir, seeds):
        calls.append((workdir, seeds))
        workdir.mkdir(parents=True)
        return {"validation": {"accuracy": spread([0.5, 0.5 + len(calls) / 10])}}

    monkeypatch.setattr(studies, "finetune_seeds", finetune_seeds)
    out = tmp_path / "study"
    config = dataclasses.replace(load_config(config_file), init=TransferConfig(str(pretrained)))
    result = studies.study(name, config, out, 2)
    assert calls == [(out / folder, 2) for folder in folders]
    assert json.loads((out / f"{name}.json").read_text()) == json.loads(json.dumps(result))
    expected = [spread([0.5, 0.5 + number / 10]) for number in range(1, len(folders) + 1)]
    assert [row["validation"]["accuracy"] for row in result["variants"]] == expected
    assert (out / f"{name}.png").read_bytes().startswith(PNG)
    header, *table, files = capsys.readouterr().out.splitlines()
    assert header.split() == ["variant", "accuracy,", "median", "lowest", "highest"]
    assert [line.split("  ")[0] for line in table] == [row["variant"] for row in result["variants"]]
    assert [line.split()[-3:] for line in table] == [
        [f"{50 + 5 * number:.1f}", "50.0", f"{50 + 10 * number:.1f}"] for number in range(1, len(folders) + 1)
    ]
    assert files == f"{out / name}.json, {out / name}.png"


@pytest.mark.parametrize("name", ["layers", "ablations", "steps"])
def test_the_variants_of_a_study_are_known_when_the_pretrained_run_is_gone(config_file, pretrained, tmp_path, name):
    run = shutil.copytree(pretrained, tmp_path / "run")
    config, file = dataclasses.replace(load_config(config_file), init=TransferConfig(str(run))), tmp_path / "study" / "file.json"
    task = task_from_config(config.task)
    before = studies.find_variants(name, config, task, file, "", quiet)
    assert len(before) >= 3
    run.rename(tmp_path / "moved")
    lines = []
    assert studies.find_variants(name, config, task, file, "", lines.append) == before
    assert lines[-1].startswith(f"continuing with the variants in {file} ({run}")
    # A study that has not begun needs the run.
    with pytest.raises(UserError, match=f"{run}"):
        studies.find_variants(name, config, task, tmp_path / "other.json", "", quiet)


@pytest.mark.parametrize("content", ["[]", "{}", '{"variants": [{"variant": "a", "x": 1}]}', '{"variants": 5}', "\udcff"])
def test_a_damaged_file_of_variants_is_one_line(config_file, tmp_path, content):
    config, file = dataclasses.replace(load_config(config_file), init=TransferConfig("gone")), tmp_path / "file.json"
    file.write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=f"^{file}"):
        studies.find_variants("layers", config, task_from_config(config.task), file, "", quiet)
    variants = [{"variant": "a", "x": 1, "config": config_to_dict(PretrainConfig())}]
    file.write_text(json.dumps({"variants": variants}))
    with pytest.raises(UserError, match=f"^{file}: contains a pre-training config; "):
        studies.find_variants("layers", config, task_from_config(config.task), file, "", quiet)


@pytest.mark.slow
def test_a_study_fine_tunes_its_variants_and_does_not_repeat_finished_ones(config_file, pretrained, tmp_path, capsys):
    out = tmp_path / "study"
    pretrained = shutil.copytree(pretrained, tmp_path / "pretrained")
    command = ["study", config_file, "--name", "layers", "--init.from", str(pretrained), "--workdir", str(out)]
    assert main(command) == 0
    rows = json.loads((out / "layers.json").read_text())["variants"]
    assert [row["variant"] for row in rows] == ["nothing", "embeddings", "1 block", "2 blocks"]
    run = newest(pretrained)
    varied = [(row["init"]["from_"], row["init"]["like"], row["init"]["blocks"], row["lm_weight"]) for row in rows]
    assert varied == [("none", run, -1, 0.5), (run, "", 0, 0.5), (run, "", 1, 0.5), (run, "", 2, 0.5)]
    for row in rows:
        folder = out / row["variant"].replace(" ", "-")
        result = json.loads((folder / "seed-0" / "result.json").read_text())
        assert row["validation"]["accuracy"]["values"] == [result["validation"]["accuracy"]]
    assert len({row["validation"]["loss"]["median"] for row in rows}) == 4
    assert (out / "layers.png").read_bytes().startswith(PNG)
    before = (out / "layers.json").read_bytes()
    capsys.readouterr()
    assert main(command) == 0  # all variants are finished already
    assert (out / "layers.json").read_bytes() == before
    assert "nothing to do" in capsys.readouterr().err
    shutil.rmtree(pretrained)
    shutil.rmtree(out / "nothing" / "seed-0" / "checkpoints")
    assert main(command) == 2  # This run would have to begin anew.
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith(f"gpt-jax: --init.like: there is no folder '{pretrained}/checkpoints/2', and no config is named ")
    )
    shutil.rmtree(out / "nothing")
    variants = json.loads((out / "layers-variants.json").read_text())["variants"]
    (out / "layers-variants.json").write_text(json.dumps({"variants": variants[1:]}))
    assert main(command) == 0  # The other variants are finished.
    assert json.loads((out / "layers.json").read_text())["variants"] == rows[1:]
