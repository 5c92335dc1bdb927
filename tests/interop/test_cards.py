"""The card of an export: its code runs in the folder, gives the model's outputs, and says what is true of the files."""

import contextlib
import io
import json
import re

import numpy as np
import pytest

from gpt_jax.interop import cards, export, huggingface, tokenizer_json
from gpt_jax.interop.export import FORMATS
from gpt_jax.tasks.readers import Example
from gpt_jax.tasks.transforms import SpecialTokens, encode_examples
from tests.interop.conftest import CLASSES

KINDS = ("classification", "entailment", "similarity", "regression", "multiple_choice")
GRAPHS = [name for name, format_ in FORMATS.items() if format_.write]
# Graphs that are traced take seconds to compile.
SLOW = {("savedmodel", kind) for kind in KINDS} | {("stablehlo", kind) for kind in KINDS if kind != "regression"}


def quiet(line):
    pass


def run_code(folder, monkeypatch, number=0):
    """Runs a block of code of the card in its folder; returns its variables and what it printed."""
    blocks = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    variables, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(blocks[number], variables)
    return variables, printed.getvalue().strip()


def export_model(run, format_, folder):
    """Exports a model and returns it; the test is skipped if a package of the format is missing."""
    for package in FORMATS[format_].packages:
        pytest.importorskip(package)
    export.export(run, format_, folder, quiet)
    return export.load_checkpoint(run, format_, quiet)


def parameters(names, slow):
    cases = [(format_, kind) for format_ in names for kind in KINDS]
    return [pytest.param(*case, marks=[pytest.mark.slow] * (case in slow), id=" ".join(case)) for case in cases]


# -- graphs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["stablehlo", "onnx", pytest.param("savedmodel", marks=pytest.mark.slow)])
def test_the_card_of_a_language_models_graph(format_, pretrained, tmp_path, monkeypatch):
    model = export_model(pretrained, format_, tmp_path / "out")
    variables, _ = run_code(tmp_path / "out", monkeypatch)
    assert variables["tokens"].tolist() == [[5, 9, 2], [7, 0, 0]]
    expected = model.function.bind(model.params)(variables["tokens"])
    np.testing.assert_allclose(variables["logits"], expected, atol=1e-4)
    # What follows a text has no effect on it.
    alone = model.function.bind(model.params)(np.array([[7]], np.int32))
    np.testing.assert_allclose(variables["logits"][1, :1], alone[0], atol=1e-4)
    assert not (tmp_path / "out" / "labels.json").exists()


@pytest.mark.parametrize(("format_", "kind"), parameters(GRAPHS, SLOW))
def test_the_card_of_a_fine_tuned_models_graph(format_, kind, fine_tuned, tmp_path, monkeypatch):
    model = export_model(fine_tuned(kind), format_, tmp_path / "out")
    variables, printed = run_code(tmp_path / "out", monkeypatch)
    expected = model.function.bind(model.params)(*variables["inputs"].values())
    np.testing.assert_allclose(variables["log_probabilities"], expected, atol=1e-4)
    if kind == "regression":
        assert float(printed) == pytest.approx(np.exp(expected[0]) @ [1.0, 2.0, 3.0], abs=1e-4)
    else:
        assert printed == model.task.labels[expected[0].argmax()]
    # The sequences are those of the training, Figure 1 of the paper.
    words = {"multiple_choice": ("5 9 2", "7", "7", "7"), "classification": ("5 9 2",)}.get(kind, ("5 9 2", "7"))
    encoded = encode_examples(
        [Example("", words, None, "")],
        model.task.kind,
        lambda text: [int(word) for word in text.split()],
        SpecialTokens(257, 258, 259),
        np.arange(3.0),
        max_tokens=32,
        truncation="longest",
    )
    spans = zip(encoded.begins[0], encoded.lengths[0], strict=True)
    assert variables["sequences"] == [encoded.tokens[begin : begin + length].tolist() for begin, length in spans]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_those_of_the_task(kind, fine_tuned, tmp_path):
    model = export.load_checkpoint(fine_tuned(kind), "npz", quiet)
    labels = cards.labels_json(model.task, model.tokenizer)
    expected = {"multiple_choice": ("0", "1", "2"), "regression": ("1", "2", "3")}.get(kind, CLASSES)
    assert labels["id2label"] == {str(number): label for number, label in enumerate(expected)}
    assert labels["score_range"] == ([1.0, 3.0] if kind == "regression" else None)
    assert labels["kind"] == ("similarity" if kind == "regression" else kind)
    assert labels["special_tokens"] == {"start": 257, "delimiter": 258, "extract": 259}


@pytest.mark.parametrize("format_", ["npz", "openai"])
def test_the_card_of_files_of_tensors(format_, pretrained, tmp_path, monkeypatch):
    export_model(pretrained, format_, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "gpt-jax import FOLDER" in card
    assert re.search("- config_digest: [0-9a-f]{64}\n- config_digest_version: 2\n- data_digest: [0-9a-f]{64}\n", card)
    if format_ == "npz":
        assert run_code(tmp_path / "out", monkeypatch)[1] == "(257, 16)"


def test_the_npz_of_a_classifier_says_which_column_is_which_label(fine_tuned, tmp_path):
    export.export(fine_tuned("classification"), "npz", tmp_path / "out", quiet)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Column i of W_y and entry i of b_y give the score of label i in labels.json" in card
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert np.load(tmp_path / "out" / "params.npz")["W_y"].shape == (16, len(labels["id2label"]))


# -- Hugging Face -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason=f"{package} is not installed")


def test_a_language_model_generates_for_a_batch_as_for_each_text(offline, fine_tuned, pretrained, tmp_path, monkeypatch):
    """The weights are random and large, so that positions and padding would show."""
    import torch

    export_model(pretrained, "huggingface", tmp_path / "out")
    variables, _ = run_code(tmp_path / "out", monkeypatch)
    tokenizer, model = variables["tokenizer"], variables["model"]
    assert variables["tokens"].shape[1] == len("The") + 5
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (1.0 if parameter.ndim > 1 else 0.3)
    model.generation_config.eos_token_id = None

    def generate(texts):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        return torch.stack(model.generate(**batch, **settings).logits, 1)

    texts = ["abc de", "a", "hello world"]
    together = generate(texts)
    assert together.std() > 0.5
    for text, logits in zip(texts, together, strict=True):
        torch.testing.assert_close(generate([text])[0], logits, atol=1e-4, rtol=0)


def test_the_logits_of_a_text_do_not_change_with_padding(offline, pretrained, tmp_path, monkeypatch):
    import torch

    export_model(pretrained, "huggingface", tmp_path / "out")
    variables, printed = run_code(tmp_path / "out", monkeypatch, number=1)
    tokenizer, model = variables["tokenizer"], variables["model"]
    assert printed == f"torch.Size([{len('A') + len('The')}, 257])"
    for side in ("right", "left"):
        batch = tokenizer(["A", "The"], padding=True, padding_side=side, return_tensors="pt")
        positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)  # Without them, only the right side would do.
        with torch.inference_mode():
            logits = model(**batch, position_ids=positions).logits
            for row, text in enumerate(["A", "The"]):
                alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
                torch.testing.assert_close(logits[row][batch.attention_mask[row].bool()], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_of_a_fine_tuned_model(offline, kind, fine_tuned, tmp_path, monkeypatch):
    """The scores of a padded batch are those of our model for each example alone."""
    import torch

    ours = export_model(fine_tuned(kind), "huggingface", tmp_path / "out")
    variables, printed = run_code(tmp_path / "out", monkeypatch)
    words = {
        "classification": [("A text.",), ("Another, longer text.",)],
        "entailment": [("A premise.", "A hypothesis."), ("A long premise.", "Another one.")],
        "multiple_choice": [("A context.", "answer 0", "answer 1", "answer 2")],
    }.get(kind, [("A text.", "The other text."), ("A long text.", "Another one.")])
    start, delimiter, extract = 257, 258, 259
    results = []
    for first, *others in words:
        first, others = list(first.encode()), [list(other.encode()) for other in others]
        if kind == "classification":
            sequences = [[start, *first, extract]]
        else:
            sequences = [[start, *first, delimiter, *other, extract] for other in others]
        if kind in ("similarity", "regression"):
            sequences.append([start, *others[0], delimiter, *first, extract])
        results.append(each_alone(ours, sequences))
    scores = torch.log_softmax(variables["scores"], -1)
    np.testing.assert_allclose(scores, np.concatenate(results), atol=1e-4)
    best = np.concatenate(results).argmax(-1)
    if kind == "regression":
        expected = np.exp(np.concatenate(results)) @ [1.0, 2.0, 3.0]
        assert [float(word) for word in re.findall(r"\d\.\d+", printed)] == pytest.approx(expected.tolist(), abs=1e-3)
    elif kind == "multiple_choice":
        assert printed == str([f"answer {best[0]}"])
    else:
        assert printed == str([CLASSES[number] for number in best])


def each_alone(model, sequences):
    """Our log-probabilities for one example, whose sequences are padded to a common length."""
    tokens = np.zeros((1, len(sequences), max(map(len, sequences))), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[0, row, : len(sequence)] = sequence
    return model.function.bind(model.params)(tokens, np.array([[len(sequence) - 1 for sequence in sequences]], np.int32))


def test_the_padding_of_a_tokenizer_is_the_models(fine_tuned, pretrained):
    for run, side in ((pretrained, "left"), (fine_tuned("classification"), "right")):
        model = export.load_checkpoint(run, "huggingface", quiet)
        config = huggingface.to_config_json(model.config, model.tokenizer, model.task, model.head, "float32")
        specials = huggingface.SPECIALS if model.task else ()
        tokenizer = tokenizer_json.tokenizer_config(model.tokenizer, specials, 32)
        assert (config["pad_token_id"], tokenizer["pad_token"], tokenizer["padding_side"]) == (256, "</s>", side)
