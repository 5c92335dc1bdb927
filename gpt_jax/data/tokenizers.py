"""Text to token ids and back: the released GPT-1 encoder, SentencePiece trained on the run's own text, and bytes.

`create` makes the tokenizer that a config asks for, `save` writes it into a folder, and `load` brings it back in any process,
after checking that its files are the ones that were saved. Ids are Python ints in [0, vocab_size). A lone surrogate, which
is no character, becomes a replacement character in every kind; any other text is accepted.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Self

from gpt_jax.config import TokenizerConfig
from gpt_jax.errors import UserError, nearest
from gpt_jax.runtime.rundir import write_atomic

MANIFEST = "tokenizer.json"


class Tokenizer(abc.ABC):
    """A tokenizer is made from the contents of its files alone, so it is saved, pickled and recognised by them."""

    kind: ClassVar[str]
    """"sentencepiece", "gpt1" or "bytes"."""
    files: ClassVar[tuple[str, ...]] = ()
    """Names of its files in a tokenizer's folder."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Distributions whose versions are recorded beside the files."""
    vocab_size: int
    """The logical number of ids."""
    eos_id: int
    """The id that `prepare` puts after every document; `encode` does not."""
    fingerprint: str
    """Hexadecimal SHA-256 of the kind and the files: tokenizers with equal fingerprints give equal ids."""

    def __init__(self, *contents: bytes):
        self.contents = contents
        self.fingerprint = _fingerprint(self.kind, contents)

    def __reduce__(self) -> tuple[type[Self], tuple[bytes, ...]]:
        return type(self), self.contents

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`; none for an empty one."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""

    def save(self, folder: Path) -> None:
        """Writes the files and tokenizer.json into `folder`, which is made if need be."""
        versions = {}
        for library in self.libraries:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[library] = importlib.metadata.version(library)
        manifest = {"kind": self.kind, "vocab_size": self.vocab_size, "fingerprint": self.fingerprint, "versions": versions}
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in zip(self.files, self.contents, strict=True):
            write_atomic(folder / name, content)
        # Last, so that a folder with a manifest is whole.
        write_atomic(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def create(
    config: TokenizerConfig, vocab_size: int, sample: Callable[[], Iterable[str]], field: str = "data.tokenizer.path"
) -> Tokenizer:
    """Makes the tokenizer that a config describes.

    Args:
      config: the kind, and where a ready one lies.
      vocab_size: the model's number of entries, which the tokenizer must have.
      sample: gives the documents to train on; called only if a tokenizer is trained.
      field: the option that named `config.path`, for messages.

    Raises:
      UserError: a missing or unsound file, a missing optional dependency, a vocabulary of another size than `vocab_size`,
        or too little text for it.
    """
    tokenizer: Tokenizer
    if config.kind == "bytes":
        tokenizer = Bytes()
    elif config.kind == "gpt1":
        tokenizer = GPT1.read(Path(config.path), field)
        tokenizer.encode("")  # Whatever encoding needs and is not installed is said now, not after the corpus has been read.
    elif config.path:
        tokenizer = load(Path(config.path))
        if tokenizer.kind != config.kind:
            raise UserError(f"--{field}: {config.path} holds a {tokenizer.kind} tokenizer, not {config.kind}")
    else:
        tokenizer = SentencePiece.train(sample(), vocab_size, config.normalization)
    if tokenizer.vocab_size != vocab_size:
        if config.path and field != "data.tokenizer.path":
            raise UserError(f"--{field}: {config.path} has {tokenizer.vocab_size} entries; the model wants {vocab_size}")
        raise UserError(f"--model.vocab-size: the {tokenizer.kind} tokenizer has {tokenizer.vocab_size}, not {vocab_size}")
    return tokenizer


def load(folder: Path) -> Tokenizer:
    """Loads what `save` wrote.

    Raises:
      UserError: there is no tokenizer in `folder`, or its files are not the ones that were saved.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        kind, fingerprint = manifest["kind"], manifest["fingerprint"]
    except FileNotFoundError:
        raise UserError(f"{folder}: no tokenizer here ({MANIFEST} is missing)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); save the tokenizer again") from None
    kinds: dict[str, type[Bytes] | type[GPT1] | type[SentencePiece]] = {each.kind: each for each in (Bytes, GPT1, SentencePiece)}
    if kind not in kinds:
        raise UserError(f"{path}: kind '{kind}' is unknown; {nearest(str(kind), kinds)}")
    files = [_read(folder / name) for name in kinds[kind].files]
    if _fingerprint(kind, files) != fingerprint:
        names = " or ".join(kinds[kind].files) or MANIFEST
        raise UserError(f"{folder}: {names} differs from what was saved (SHA-256 in {MANIFEST}); restore it or prepare again")
    return kinds[kind](*files)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _fingerprint(kind: str, files: Sequence[bytes]) -> str:
    digest = hashlib.sha256(kind.encode())
    for content in files:
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


# -- bytes ------------------------------------------------------------------------------------------------------------------


class Bytes(Tokenizer):
    """The UTF-8 bytes of the text, 0 to 255, and the separator 256, which decodes to nothing."""

    kind = "bytes"
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != self.eos_id).decode("utf-8", "replace")


# -- the released encoder ---------------------------------------------------------------------------------------------------

PUNCTUATION = re.compile(r'([-~!";?+,)(/*\[\]}{|_])\1*')
"""Runs that are set apart by spaces before spaCy sees the text. No backslash: the released pattern escapes it away."""
PLAIN = str.maketrans({"\u2014": "-", "\u2013": "-", "\u2015": "-", "\u2026": "...", "\u00b4": "'"})
"""Dashes, the ellipsis and the acute accent as the released code writes them."""
NEWLINE = "\n</w>"


class GPT1(Tokenizer):
    """The encoder released with the paper (openai/finetune-transformer-lm, text_utils.py) and its 40,478 entries.

    Mojibake repair by ftfy, a few replacements, spaCy's rule-based English words, lower case, then byte-pair merges within a
    word, whose last symbol carries "</w>". What is no entry gets id 0. There is no end-of-document entry, so the separator is the
    newline's id. Only encoding needs ftfy and spaCy; their versions can change ids, so the extra `gpt1` holds them to one series.
    """

    kind = "gpt1"
    files = ("encoder_bpe_40000.json", "vocab_40000.bpe")
    libraries = ("ftfy", "spacy")

    def __init__(self, vocabulary: bytes, merges: bytes):
        """Takes the contents of the released encoder_bpe_40000.json (entry to id) and vocab_40000.bpe (a merge a line).

        Raises:
          UserError: they are not in that format.
        """
        super().__init__(vocabulary, merges)
        try:
            self.ids: dict[str, int] = json.loads(vocabulary)
            self.entries = [entry for entry, _ in sorted(self.ids.items(), key=lambda item: item[1])]
            numbered = [self.ids[entry] for entry in self.entries] == list(range(len(self.entries)))
        except (ValueError, TypeError, AttributeError):
            numbered = False
        if not numbered or NEWLINE not in self.ids:
            raise UserError(f"{self.files[0]}: must map entries, a newline followed by </w> among them, to the ids from 0 on")
        self.vocab_size = len(self.entries)
        self.eos_id = self.ids[NEWLINE]
        pairs = [tuple(line.split(" ")) for line in merges.decode("utf-8", "replace").rstrip("\n").split("\n")[1:]]
        for line, pair in enumerate(pairs, start=2):
            if len(pair) != 2:
                raise UserError(f"{self.files[1]}:{line}: must be two symbols with a space between them")
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self._word_ids = functools.lru_cache(maxsize=1 << 17)(self._merge)

    @classmethod
    def read(cls, folder: Path, field: str = "data.tokenizer.path") -> GPT1:
        """Reads the released files from a folder; `field` is the option that named it, for messages.

        Raises:
          UserError: they are not there, or not as they were released.
        """
        missing = [name for name in cls.files if not (folder / name).is_file()]
        if missing:
            raise UserError(f"--{field}: '{folder}' lacks {' and '.join(missing)}; name the folder that has them")
        try:
            return cls(*(_read(folder / name) for name in cls.files))
        except UserError as error:
            raise UserError(f"--{field}: {folder}/{error}") from None

    def encode(self, text: str) -> list[int]:
        return list(itertools.chain.from_iterable(self._word_ids(word) for word in self._words(text)))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.entries[i] for i in ids).replace("</w>", " ")

    @functools.cached_property
    def _words(self) -> Callable[[str], list[str]]:
        """The function that cuts text into lower-case words, as released."""
        try:
            import ftfy
            import spacy
        except ModuleNotFoundError as error:
            raise UserError(f"the gpt1 tokenizer needs {error.name}: pip install 'gpt_jax[gpt1]'") from None
        english = spacy.blank("en")

        def words(text: str) -> list[str]:
            text = PUNCTUATION.sub(r" \g<0> ", ftfy.fix_text(text).translate(PLAIN))
            text = re.sub(r"[^\S\n]+", " ", re.sub(r"\s*\n\s*", " \n ", text)).strip()
            # The whole text at once: spaCy's exceptions look past spaces. In a zone: it would remember every word of the corpus.
            with english.memory_zone():
                return [word.text.lower() for word in english.tokenizer(text)]

        return words

    def _merge(self, word: str) -> tuple[int, ...]:
        """The ids of one word: again and again, the neighbours of the lowest rank are merged wherever they stand."""
        if word.isspace():  # spaCy gives "\n " for a newline.
            return (self.eos_id,)
        symbols = [*word[:-1], word[-1] + "</w>"]
        unranked = len(self.ranks)
        while len(symbols) > 1:
            best = min(itertools.pairwise(symbols), key=lambda pair: self.ranks.get(pair, unranked))
            if best not in self.ranks:
                break
            merged = []
            i = 0
            while i < len(symbols):
                width = 2 if (symbols[i], *symbols[i + 1 : i + 2]) == best else 1
                merged.append("".join(symbols[i : i + width]))
                i += width
            symbols = merged
        return tuple(self.ids.get(symbol, 0) for symbol in symbols)


# -- SentencePiece ----------------------------------------------------------------------------------------------------------

SPACE = "\u2581"
"""The character that SentencePiece writes for a space in its pieces."""


class SentencePiece(Tokenizer):
    """A SentencePiece model with byte fallback, trained by `train`. Its separator decodes to nothing."""

    kind = "sentencepiece"
    files = ("sentencepiece.model",)
    libraries = ("sentencepiece",)

    def __init__(self, model: bytes):
        """Takes a serialised model that `train` made."""
        import sentencepiece

        super().__init__(model)
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self.processor.get_piece_size()
        self.eos_id = self.processor.eos_id()
        self._space_character = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int, normalization: str) -> SentencePiece:
        """Trains a byte-pair encoding. Equal text gives an equal model, byte for byte, on any machine.

        Raises:
          UserError: `vocab_size` is too small for the text's characters or too large for its words.
        """
        import sentencepiece

        model = io.BytesIO()
        # In a list, since SentencePiece would wrap what reading the documents raises in an error of its own.
        lines = [line for document in documents for line in document.encode("utf-8", "replace").split(b"\n")]
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                normalization_rule_name=normalization,
                # The rarest characters, one in 10,000 of the text together, are spelt in bytes and take no entries.
                byte_fallback=True,
                character_coverage=0.9999,
                # Spaces are kept as they are and runs of them may be one piece: indentation means something in documentation.
                # No space is put before a text, so that decoding the parts of a text gives the parts of the text.
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                add_dummy_prefix=False,
                # A newline is a piece of its own: normalisation would make it a space, and a paragraph's end is worth a token.
                user_defined_symbols=["\n"],
                unk_id=0,
                eos_id=1,
                bos_id=-1,
                pad_id=-1,
                max_sentence_length=2**30,
                # Any number gives the same pieces, but the number is written into the model.
                num_threads=16,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(f"--model.vocab-size: {_training_problem(str(error), vocab_size)}") from None
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        # The character that stands for a space in pieces would come back as a space; its bytes come back as themselves.
        first, *rest = (self.processor.encode(part.encode("utf-8", "replace")) for part in text.split(SPACE))
        for part in rest:
            first += self._space_character + part
        return first

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode([int(i) for i in ids])


def _training_problem(message: str, vocab_size: int) -> str:
    """Says what would be right, from the error that SentencePiece's trainer ended with."""
    if match := re.search(r"set it to a value <= (\d+)", message):
        return f"the text has too few words for {vocab_size} entries; at most {match[1]} work, or add text"
    if match := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return f"{vocab_size} is too small; the bytes and the text's frequent characters alone need {match[1]}"
    if "sentences_.empty()" in message:
        return "there is no text to train a SentencePiece tokenizer on"
    return f"SentencePiece could not train a tokenizer: {message}"
