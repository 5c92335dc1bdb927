"""The tokenizers: the ids of the released encoder, exact round trips, and folders that identify their tokenizer."""

import hashlib
import json
import os
import random
import string
import subprocess
import sys
import types
from pathlib import Path

import pytest

from gpt_jax.config import TokenizerConfig
from gpt_jax.data.tokenizers import GPT1, Bytes, SentencePiece, create_tokenizer, load_tokenizer
from gpt_jax.errors import UserError

VOCABULARY, MERGES = GPT1.files


@pytest.fixture
def english():
    """Skips where the optional libraries of the gpt1 tokenizer are absent."""
    pytest.importorskip("ftfy", reason="ftfy (extra gpt1) is not installed")
    pytest.importorskip("spacy", reason="spaCy (extra gpt1) is not installed")


def write_released(folder: Path, characters: str, merges: list[str]) -> Path:
    """Writes files in the released format: <unk>, characters, characters that end a word, merges in order, newline."""
    entries = ["<unk>", *characters, *(c + "</w>" for c in characters), *(m.replace(" ", "") for m in merges), "\n</w>"]
    folder.mkdir(exist_ok=True)
    (folder / VOCABULARY).write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    (folder / MERGES).write_text("#version: 0.2\n" + "".join(m + "\n" for m in merges))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> GPT1:
    merges = ["l o", "lo w</w>", "e r</w>", "lo w", "low er</w>", "n n"]
    return GPT1.read(write_released(tmp_path_factory.mktemp("tiny"), "elnorw", merges))


@pytest.fixture(scope="module")
def spelling(tmp_path_factory) -> GPT1:
    """An encoder of printable ASCII without capitals and without merges, so that decoding shows the words that it made."""
    printable = "".join(sorted(set(string.printable) - set(string.whitespace) - set(string.ascii_uppercase)))
    return GPT1.read(write_released(tmp_path_factory.mktemp("spelling"), printable, []))


def random_text(rng: random.Random) -> str:
    """Returns a mixture of ordinary words and characters that tokenizers often get wrong."""
    words = [
        "the",
        "cat",
        "The",
        " ",
        "  ",
        "    ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\0",
        "\x7f",
        "\x85",
        "\u2028",
        "\ufeff",
        "\ufffd",
    ]
    words += ["\u2581", " \u2581", "\u2585", "\u2047", "é", "e\u0301", "ﬁ", "漢字", "😀", "👩\u200d👧"]
    words += ["<0x41>", "</s>", "<unk>", "</w>", "&amp;"]
    return "".join(rng.choice(words) if rng.random() < 0.9 else chr(rng.randrange(0xD800)) for _ in range(rng.randrange(30)))


DOCUMENTS = [
    "The cat sat on the mat.\n\n  if cat:\n      sit(mat)\n",
    "The dog, the other cat and the mat.\n      indented\n",
] * 20


@pytest.fixture(scope="module")
def pieces() -> SentencePiece:
    return SentencePiece.train(DOCUMENTS, 310, "identity")


# -- the released encoder ---------------------------------------------------------------------------------------------------


def test_released_vocabulary_gives_the_released_ids(english):
    unpack = Path(__file__).parents[2] / "../shared/data/unpack"
    if not unpack.is_file():
        pytest.skip("the released vocabulary (../shared/data) is not on this machine")
    folder = Path(subprocess.run([unpack, "gpt1-bpe"], check=True, capture_output=True, text=True).stdout.strip())
    tokenizer = create_tokenizer(TokenizerConfig(kind="gpt1", path=str(folder)), 40_478, list)
    golden = [json.loads(line) for line in (folder / "golden.jsonl").read_text().splitlines()]
    wrong = [case["text"] for case in golden if tokenizer.encode(case["text"]) != case["ids"]]
    assert len(golden) == 240
    assert wrong == []
    assert tokenizer.eos_id == 40_477


@pytest.mark.parametrize(
    ("text", "symbols"),
    [
        ("low", ["low</w>"]),
        ("LoWer", ["lower</w>"]),  # l o w e r</w>: l+o has rank 0, e+r</w> rank 2, lo+w rank 3, low+er</w> rank 4.
        ("lowe", ["low", "e</w>"]),
        ("lolow", ["lo", "low</w>"]),  # Both l+o are merged before lo+w</w>.
        ("lo", ["l", "o</w>"]),  # The merge is of l and o, not of l and a final o.
        ("l", ["l</w>"]),
        ("nnnnn", ["nn", "nn", "n</w>"]),  # Merges go from the left and do not overlap; nn+nn is not a merge.
        ("n" * 300, ["nn"] * 149 + ["n", "n</w>"]),
        ("lozlow", ["lo", "<unk>", "low</w>"]),
        ("zz z", ["<unk>", "<unk>", "<unk>"]),
        ("low\n\n  low", ["low</w>", "\n</w>", "low</w>"]),
        ("\n low \n", ["low</w>"]),
        ("", []),
    ],
)
def test_merges_worked_out_by_hand(english, tiny, text, symbols):
    ids = json.loads(tiny.contents[0])
    assert tiny.encode(text) == [ids[symbol] for symbol in symbols]


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("Hello  WORLD", "hello world "),
        ("I don't (know)?!", "i do n't ( know ) ? ! "),
        ("wait\u2026 a\u2014b \u00b4", "wait ... a - b ' "),
        ("\u201cYes,\u201d he\u2019d said", '" yes , " he \'d said '),  # ftfy replaces curly quotes.
        ("&amp; f\x1b[31mred", "& fred "),
        ("x+=y||z", "x + = y || z "),
        ("\\\\a", "\\\\a "),  # The released pattern does not match backslashes.
        ("one.\r\n\r\n\ttwo", "one . \n two "),
        ("na\u00efve", "na<unk>ve "),
    ],
)
def test_normalization_and_words(english, spelling, text, printed):
    assert spelling.decode(spelling.encode(text)) == printed


def test_ids_do_not_depend_on_what_was_read_before(english, tiny):
    text = "low\nlower lowlow nn"
    fresh = GPT1(*tiny.contents).encode(text)
    for before in ("", "lowlow low", "nn lower low", text):
        tiny.encode(before)
        assert tiny.encode(text) == fresh


def test_ids_of_short_strings_are_kept_and_those_of_long_ones_are_not(english, tiny, monkeypatch):
    tokenizer, long = GPT1(*tiny.contents), "low" * 1000
    text = f"low lower {long} nn"
    ids = tokenizer.encode(text)
    read: list[str] = []
    words = tokenizer._english.words
    monkeypatch.setattr(tokenizer._english, "words", lambda part: read.append(part) or words(part))
    assert tokenizer.encode(text) == ids
    assert read == [long]


@pytest.mark.parametrize("library", ["ftfy", "spacy"])
def test_a_missing_library_is_named_and_decoding_needs_none(tmp_path, monkeypatch, library):
    folder = write_released(tmp_path, "lo", ["l o"])
    for name in ("ftfy", "spacy"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"needs {library}: pip install 'gpt_jax\[gpt1\]'"):
        create_tokenizer(TokenizerConfig(kind="gpt1", path=str(folder)), 7, list)
    GPT1.read(folder).save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").decode([5, 4, 6]) == "loo \n "


def test_missing_and_malformed_released_files_are_named(tmp_path):
    config = TokenizerConfig(kind="gpt1", path=str(tmp_path))
    with pytest.raises(UserError, match=f"data.tokenizer.path.*lacks {VOCABULARY} and {MERGES}"):
        create_tokenizer(config, 40_478, list)
    write_released(tmp_path, "ab", ["a b"])
    for content, problem in (
        (b"#version: 0.2\na b\nabc\n", "3: must be two symbols"),
        (b"#version: 0.2\na \n", "2: must be two symbols"),
        (b"a b\n", "1: must be '#version: 0.2'"),
        (b"", "1: must be '#version: 0.2'"),
        (b"#version: 0.2\na b\na \xff\n", "3: byte 20 of the file is not UTF-8"),
    ):
        (tmp_path / MERGES).write_bytes(content)
        with pytest.raises(UserError, match=f"{tmp_path}/{MERGES}:{problem}"):
            create_tokenizer(config, 40_478, list)
    wanted = ": must map entries"
    for vocabulary, problem in (
        ("{", ":1: not valid JSON"),
        ("[" * 100_000, ":1: not readable: its brackets are nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", ":1: not readable: a number has more than"),
        ('{"\\ud800": 0, "\\n</w>": 1}', r":1: \\ud800 is half of a surrogate pair"),
        ("[]", wanted),
        ("5", wanted),
        ("{}", wanted),
        ('{"a": 0}', wanted),
        ('{"a": 1, "\\n</w>": 2}', wanted),
        ('{"a": "x", "\\n</w>": 0}', wanted),
        ('{"a": 0.0, "\\n</w>": 1}', wanted),
        ('{"a": true, "\\n</w>": 0}', wanted),
        ('{"a": null, "\\n</w>": 0}', wanted),
    ):
        (tmp_path / VOCABULARY).write_text(vocabulary)
        with pytest.raises(UserError, match=f"{tmp_path}/{VOCABULARY}{problem}"):
            create_tokenizer(config, 40_478, list)


def test_line_ends_of_windows_in_the_merges(english, tiny, tmp_path):
    """Git may write them when it checks out the released file."""
    merges = tiny.contents[1].replace(b"\n", b"\r\n")
    assert GPT1(tiny.contents[0], merges).encode("lower low") == tiny.encode("lower low")


# -- SentencePiece and bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_any_text_comes_back(kind, pieces):
    tokenizer = {"bytes": Bytes(), "sentencepiece": pieces}[kind]
    rng = random.Random(0)
    for text in ["", "\n", " ", "\u2581", " \n  a", *(random_text(rng) for _ in range(500))]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode([*ids, tokenizer.eos_id]) == text


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_invalid_text_does_not_stop_a_run(kind, pieces):
    tokenizer = {"bytes": Bytes(), "sentencepiece": pieces}[kind]
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_bytes_are_utf8():
    assert Bytes().encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert (Bytes().eos_id, Bytes().vocab_size) == (256, 257)


def test_pieces_of_a_trained_model(pieces):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces.contents[0])
    assert [processor.id_to_piece(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "</s>", "\n", "<0x00>", "<0xFF>"]
    assert processor.get_piece_size() == pieces.vocab_size == 310
    assert pieces.eos_id == 1
    assert pieces.encode("😀") == [3 + byte for byte in "😀".encode()]
    assert pieces.encode("\n\n") == [2, 2]
    assert len(pieces.encode("the cat")) < len("the cat")
    assert len(pieces.encode("      ")) < 6  # Runs of spaces are pieces.


def test_a_text_decodes_as_its_parts_do(pieces):
    ids = pieces.encode("The cat\n  sat on the mat")
    for cut in range(len(ids)):
        assert pieces.decode(ids[:cut]) + pieces.decode(ids[cut:]) == "The cat\n  sat on the mat"


def test_normalization_keeps_newlines():
    tokenizer = SentencePiece.train(DOCUMENTS, 310, "nmt_nfkc")
    assert tokenizer.decode(tokenizer.encode("ﬁ ①\n\n  y\tz")) == "fi 1\n\n  y z"


def test_equal_text_trains_equal_models_silently(pieces, capfd):
    again = SentencePiece.train((d for d in DOCUMENTS), 310, "identity")
    assert again.contents == pieces.contents
    assert again.fingerprint == pieces.fingerprint
    assert SentencePiece.train([*DOCUMENTS, "zebra zebra"], 310, "identity").fingerprint != pieces.fingerprint
    assert capfd.readouterr() == ("", "")


def test_documents_longer_than_any_line_limit_are_learned_from():
    words = "".join(f"{a}{b}{a}{b} " for a in "abcdef" for b in "uvwxyz") * 200
    tokenizer = SentencePiece.train([words], 330, "identity")
    assert len(words) > 30_000
    assert len(tokenizer.encode(words)) < 0.6 * len(words)


def test_an_impossible_vocabulary_size_is_reported_with_one_that_works():
    with pytest.raises(UserError, match=r"model.vocab-size.*give at most \d+, or add text") as error:
        SentencePiece.train(DOCUMENTS, 5000, "identity")
    most = int(str(error.value).split("at most ")[1].split(",")[0])
    assert SentencePiece.train(DOCUMENTS, most, "identity").vocab_size == most
    with pytest.raises(UserError, match=r"model.vocab-size: 260 is too small.* need \d+$") as error:
        SentencePiece.train(DOCUMENTS, 260, "identity")
    least = int(str(error.value).split()[-1])
    assert SentencePiece.train(DOCUMENTS, least, "identity").vocab_size == least


def test_training_on_nothing_and_on_unreadable_text():
    with pytest.raises(UserError, match="no text to train"):
        SentencePiece.train(["", "\n"], 300, "identity")

    def documents():
        yield "the cat"
        raise UserError("corpus.txt:2: not UTF-8")

    with pytest.raises(UserError, match=r"^corpus\.txt:2: not UTF-8$"):
        SentencePiece.train(documents(), 300, "identity")


# -- folders ----------------------------------------------------------------------------------------------------------------


def make(kind: str, folder: Path, pieces: SentencePiece):
    if kind == "gpt1":
        return GPT1.read(write_released(folder / "released", "lo", ["l o"]))
    return {"bytes": Bytes(), "sentencepiece": pieces}[kind]


KINDS = ["bytes", "sentencepiece", "gpt1"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_the_same_one(kind, tmp_path, pieces):
    tokenizer = make(kind, tmp_path, pieces)
    ids = list(range(tokenizer.vocab_size))
    tokenizer.save(tmp_path / "a/b")
    other = load_tokenizer(tmp_path / "a/b")
    assert type(other) is type(tokenizer)
    assert (other.kind, other.vocab_size, other.eos_id) == (kind, tokenizer.vocab_size, tokenizer.eos_id)
    assert other.fingerprint == tokenizer.fingerprint
    assert other.decode(ids) == tokenizer.decode(ids)
    manifest = json.loads((tmp_path / "a/b/tokenizer.json").read_text())
    assert manifest["kind"] == kind
    assert manifest["vocab_size"] == tokenizer.vocab_size
    assert manifest["fingerprint"] == tokenizer.fingerprint
    assert sorted(os.listdir(tmp_path / "a/b")) == sorted([*tokenizer.files, "tokenizer.json"])


def test_kinds_have_different_fingerprints(tmp_path, pieces):
    assert len({make(kind, tmp_path, pieces).fingerprint for kind in KINDS}) == 3
    assert Bytes().fingerprint == hashlib.sha256(b"bytes").hexdigest()  # Stores record it, so it may never change.


@pytest.mark.parametrize(("kind", "name"), [(cls.kind, name) for cls in (SentencePiece, GPT1) for name in cls.files])
def test_an_altered_or_missing_file_is_named(kind, name, tmp_path, pieces):
    make(kind, tmp_path, pieces).save(tmp_path / "saved")
    path = tmp_path / "saved" / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.* differs from what was saved"):
        load_tokenizer(tmp_path / "saved")
    path.unlink()
    with pytest.raises(UserError, match=name):
        load_tokenizer(tmp_path / "saved")


def test_a_changed_file_changes_the_fingerprint(tmp_path):
    one = GPT1.read(write_released(tmp_path / "one", "lo", ["l o", "o l"]))
    other = GPT1.read(write_released(tmp_path / "two", "lo", ["o l", "l o"]))
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, r"tokenizer\.json is missing"),
        ("{", r"tokenizer\.json:1: not valid JSON"),
        ("[]", r"tokenizer\.json:1: a list, not a JSON object"),
        ("{}", r"tokenizer\.json: there is no tokenizer kind 'None'; known: bytes, gpt1, sentencepiece"),
        ('{"kind": "byte", "fingerprint": ""}', r"there is no tokenizer kind 'byte'; did you mean bytes\?"),
        ('{"kind": "bytes"}', r"tokenizer\.json differs from what was saved"),
    ],
)
def test_folders_without_a_valid_manifest_are_refused(tmp_path, manifest, message):
    if manifest is not None:
        (tmp_path / "tokenizer.json").write_text(manifest)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_a_save_that_fails_leaves_the_old_files(tmp_path, pieces, monkeypatch):
    pieces.save(tmp_path)

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        SentencePiece.train(DOCUMENTS, 300, "identity").save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == pieces.fingerprint


# -- create -----------------------------------------------------------------------------------------------------------------


def no_sample():
    raise AssertionError("no text is needed")


def test_create_trains_or_loads_what_the_config_says(tmp_path, pieces):
    assert create_tokenizer(TokenizerConfig(kind="bytes"), 257, no_sample).fingerprint == Bytes().fingerprint
    trained = create_tokenizer(TokenizerConfig(kind="sentencepiece", normalization="identity"), 310, lambda: iter(DOCUMENTS))
    assert trained.fingerprint == pieces.fingerprint
    trained.save(tmp_path)
    ready = TokenizerConfig(kind="sentencepiece", path=str(tmp_path))
    assert create_tokenizer(ready, 310, no_sample).fingerprint == pieces.fingerprint
    with pytest.raises(
        UserError,
        match=r"--init.tokenizer: the sentencepiece tokenizer has 310 entries, but the model has 400; they must be equal",
    ):
        create_tokenizer(ready, 400, no_sample, field="init.tokenizer")
    with pytest.raises(
        UserError,
        match=r"--model.vocab-size: the sentencepiece tokenizer has 310 entries, but the model has 400; they must be equal",
    ):
        create_tokenizer(ready, 400, no_sample)
    Bytes().save(tmp_path)
    with pytest.raises(UserError, match=r"data\.tokenizer\.path: .* contains a bytes tokenizer, not sentencepiece"):
        create_tokenizer(ready, 257, no_sample)
    with pytest.raises(UserError, match="there is no tokenizer here"):
        create_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(tmp_path / "nowhere")), 310, no_sample)
