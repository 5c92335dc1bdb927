"""`gpt-jax generate`: prompts of every kind, and output that a terminal may not be able to show."""

import io
import os
import sys

import pytest

from gpt_jax.cli import main
from gpt_jax.config import TokenizerConfig
from gpt_jax.data.tokenizers import create_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.experiments import generate
from gpt_jax.experiments.generate import continue_prompts
from gpt_jax.train.restore import load_model


def run(pretrained, *words):
    return main(["generate", str(pretrained), "--tokens", "3", *words])


def test_prompts_of_any_length_are_continued_in_their_order(pretrained, capsys):
    prompts = ["--tokens", "", "é漢\udcff"]
    assert run(pretrained, *(word for prompt in prompts for word in ("--prompt", prompt)), "--temperature", "0") == 0
    together = capsys.readouterr().out
    alone = ""
    for prompt in prompts:
        assert run(pretrained, "--prompt", prompt, "--temperature", "0") == 0
        alone += capsys.readouterr().out
    assert together == alone
    assert "\\udcff" in together  # A byte of the command line that is not UTF-8.


def test_an_empty_prompt_starts_a_document(pretrained, monkeypatch):
    """It is the same as the token that ends the previous one, as in the samples of a pre-training."""
    seen = []
    monkeypatch.setattr(generate, "generate", lambda config, params, prompts, *_, **__: seen.extend(prompts) or [[97]])
    assert continue_prompts(pretrained, [""], 1) == ["a"]
    assert seen == [[256]]


def test_a_prompt_that_does_not_fit_is_one_line(pretrained, capsys):
    assert main(["generate", str(pretrained), "--prompt", "a" * 30, "--tokens", "5"]) == 2
    assert capsys.readouterr().err == (
        "gpt-jax: --prompt: the prompt has 30 tokens, which with --tokens 5 exceeds the context of 32 by 3 tokens; "
        "cut 3 tokens from it or set --tokens to 2 or less\n"
    )


def test_characters_outside_of_the_vocabulary_are_reported(pretrained, monkeypatch):
    restored = load_model(pretrained)
    documents = ["the cat sat on the mat " * 20] * 5
    pieces = create_tokenizer(TokenizerConfig(kind="sentencepiece"), 280, lambda: documents)
    monkeypatch.setattr(pieces, "encode", lambda text: [0, 0] if text == "漢字" else [5])
    monkeypatch.setattr(generate, "load_model", lambda _: restored._replace(tokenizer=pieces))
    monkeypatch.setattr(generate, "generate", lambda config, params, prompts, *_, **__: [[5] for _ in prompts])
    lines = []
    assert len(continue_prompts(pretrained, ["漢字", "cat"], 1, lines.append)) == 2
    assert lines == ["warning: 2 of the 2 tokens of the prompt '漢字' are not in the vocabulary"]


def test_generate_uses_the_best_checkpoint_of_several(pretrained, tmp_path):
    (tmp_path / "result.json").write_text('{"seeds": [0, 1]}')
    with pytest.raises(UserError, match="contains runs of several seeds; name one of them"):
        continue_prompts(tmp_path, ["a"], 1)


# -- the terminal -----------------------------------------------------------------------------------------------------------


def replace_stdout(monkeypatch, stream, encoding="utf-8"):
    stdout = io.TextIOWrapper(stream, encoding=encoding, write_through=False)
    monkeypatch.setattr(sys, "stdout", stdout)
    return stdout


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", b"\\xe9\\u6f22"), ("latin-1", b"\xe9\\u6f22"), ("utf-8", "é漢".encode()), ("cp1252", b"\xe9\\u6f22")],
)
def test_characters_that_the_terminal_cannot_show_are_escaped(pretrained, monkeypatch, encoding, shown):
    written = io.BytesIO()
    stdout = replace_stdout(monkeypatch, written, encoding)
    assert run(pretrained, "--prompt", "é漢") == 0
    assert written.getvalue().startswith(shown)
    stdout.detach()


@pytest.mark.parametrize("words", [["--prompt", "a"], ["--help"]])
def test_a_closed_pipe_is_quiet(pretrained, monkeypatch, capsys, words):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        stdout = replace_stdout(monkeypatch, pipe)
        assert run(pretrained, *words) == 141  # As if the signal SIGPIPE had ended it.
        stdout.flush()  # Python does the same at its end.
        stdout.detach()
    assert capsys.readouterr().err == ""


def test_a_full_disk_behind_the_output_is_one_line(pretrained, monkeypatch, capsys):
    with open("/dev/full", "wb") as full:
        stdout = replace_stdout(monkeypatch, full)
        assert run(pretrained, "--prompt", "a") == 2
        stdout.flush()
        stdout.detach()
    assert capsys.readouterr().err == "gpt-jax: a file could not be written: No space left on device\n"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_output_that_is_closed_is_no_mistake(pretrained, monkeypatch, name):
    monkeypatch.setattr(sys, name, None)  # This is how Python starts after `>&-`.
    assert run(pretrained, "--prompt", "a") == 0
    assert main(["generate", "nowhere", "--prompt", "a"]) == 2
    getattr(sys, name).close()
