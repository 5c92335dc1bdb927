"""Tokenizers: the released GPT-1 encoder, SentencePiece trained on the run's own text, and bytes.

`create_tokenizer` makes the tokenizer that a config describes, `Tokenizer.save` writes it into a folder, and `load_tokenizer`
reads it back in any process after checking that its files are the ones that were saved. Ids are Python ints in [0, vocab_size).
Any text is accepted; a lone surrogate, which is not a character, is replaced.
"""

import abc
import functools
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from gpt_jax.config import TokenizerConfig
from gpt_jax.data.english import EnglishWords
from gpt_jax.errors import UserError, nearest
from gpt_jax.inputs.json_values import parse_json
from gpt_jax.runtime.rundir import installed_versions, read_json, write_atomic

MANIFEST = "tokenizer.json"


class Tokenizer(abc.ABC):
    """Base class of the tokenizers. A tokenizer depends only on the contents of its files, which also identify it.

    Attributes:
      kind: "sentencepiece", "gpt1" or "bytes".
      files: the names of the files in a tokenizer's folder.
      libraries: distributions whose versions are recorded with the files.
      contents: the contents of the files.
      vocab_size: the number of ids, without padding.
      eos_id: the id that ends a document. `encode` does not add it.
      fingerprint: hexadecimal SHA-256 of the kind and the files. Tokenizers with equal fingerprints give equal ids.
    """

    kind: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()
    libraries: ClassVar[tuple[str, ...]] = ()
    vocab_size: int
    eos_id: int

    def __init__(self, *contents: bytes):
        self.contents = contents
        self.fingerprint = _fingerprint(self.kind, contents)

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids. Bytes that are not UTF-8 become U+FFFD."""

    def save(self, folder: Path) -> None:
        """Writes the files and tokenizer.json into `folder`, which is created if necessary."""
        manifest = {"kind": self.kind, "vocab_size": self.vocab_size, "fingerprint": self.fingerprint}
        manifest |= {"versions": installed_versions(self.libraries)}
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in zip(self.files, self.contents, strict=True):
            write_atomic(folder / name, content)
        # The manifest is written last, so that a folder with a manifest is complete.
        write_atomic(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def create_tokenizer(
    config: TokenizerConfig, vocab_size: int, sample: Callable[[], Iterable[str]], field: str = "data.tokenizer.path"
) -> Tokenizer:
    """Makes the tokenizer that a config describes.

    Args:
      config: the kind of the tokenizer, and the folder of a ready-made one.
      vocab_size: the number of entries in the model's vocabulary, which must be the tokenizer's.
      sample: returns the documents to train on. It is called only if a tokenizer is trained.
      field: the option that named `config.path`, for messages.

    Raises:
      UserError: a file is missing or damaged, an optional dependency is missing, the vocabulary does not have `vocab_size`
        entries, or there is too little text to train a vocabulary of that size.
    """
    if config.kind == "bytes":
        tokenizer: Tokenizer = Bytes()
    elif config.kind == "gpt1":
        tokenizer = GPT1.read(Path(config.path), field)
        tokenizer.encode("")  # A missing library is reported here, before the corpus is read.
    elif config.path:
        tokenizer = load_tokenizer(Path(config.path))
        if tokenizer.kind != config.kind:
            raise UserError(f"--{field}: {config.path} contains a {tokenizer.kind} tokenizer, not {config.kind}")
    else:
        tokenizer = SentencePiece.train(sample(), vocab_size, config.normalization)
    if tokenizer.vocab_size != vocab_size:
        option = field if config.path and field != "data.tokenizer.path" else "model.vocab-size"
        sizes = f"the {tokenizer.kind} tokenizer has {tokenizer.vocab_size} entries, but the model has {vocab_size}"
        raise UserError(f"--{option}: {sizes}; they must be equal")
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """Loads the tokenizer that `Tokenizer.save` wrote into a folder.

    Raises:
      UserError: there is no tokenizer in `folder`, or its files are not the ones that were saved.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}: there is no tokenizer here ({MANIFEST} is missing)")
    manifest = read_json(path)
    kinds: dict[str, Any] = {cls.kind: cls for cls in (Bytes, GPT1, SentencePiece)}
    kind = str(manifest.get("kind"))
    if kind not in kinds:
        raise UserError(f"{path}: there is no tokenizer kind '{kind}'; {nearest(kind, kinds)}")
    try:
        contents = [(folder / name).read_bytes() for name in kinds[kind].files]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; restore it or prepare again") from None
    if _fingerprint(kind, contents) != manifest.get("fingerprint"):
        files = " or ".join(kinds[kind].files) or MANIFEST
        raise UserError(f"{folder}: {files} differs from what was saved (SHA-256 in {MANIFEST}); restore it or prepare again")
    return kinds[kind](*contents)


def _decode(content: bytes, name: str) -> str:
    """Returns the text of a tokenizer's file.

    Raises:
      UserError: it is not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}:{line}: byte {error.start} of the file is not UTF-8") from None


def _fingerprint(kind: str, contents: Sequence[bytes]) -> str:
    digest = hashlib.sha256(kind.encode())
    for content in contents:
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


# -- bytes ------------------------------------------------------------------------------------------------------------------


class Bytes(Tokenizer):
    """A tokenizer whose ids are the UTF-8 bytes of the text. Id 256 ends a document and decodes to nothing."""

    kind = "bytes"
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != self.eos_id).decode("utf-8", "replace")


# -- the released encoder ---------------------------------------------------------------------------------------------------

NEWLINE = "\n</w>"
MAX_CACHED = 64
"""Maximum number of characters of a string whose ids are cached. It bounds the cache to about 50 MB."""


class GPT1(Tokenizer):
    """The encoder released with the paper (openai/finetune-transformer-lm, text_utils.py), with 40,478 entries.

    It repairs wrongly decoded characters with ftfy, makes a few replacements, splits the text with spaCy's rules for English and
    lowercases it. Byte-pair merges then join the symbols of each word; the last symbol of a word ends with "</w>". A symbol
    without an entry gets id 0. No entry ends a document, so `eos_id` is the newline's id. Only encoding needs ftfy and spaCy.
    Their versions can change the ids, so the extra `gpt1` restricts each to one release series.

    Args:
      vocabulary: the contents of the released encoder_bpe_40000.json, which maps entries to ids.
      merges: the contents of the released vocab_40000.bpe, which has one merge on each line after the first.

    Raises:
      UserError: the files are not in that format.
    """

    kind = "gpt1"
    files = ("encoder_bpe_40000.json", "vocab_40000.bpe")
    libraries = ("ftfy", "spacy")

    def __init__(self, vocabulary: bytes, merges: bytes):
        super().__init__(vocabulary, merges)
        self.ids: dict[str, int] = parse_json(_decode(vocabulary, self.files[0]), Path(self.files[0]))
        ids: list[Any] = list(self.ids.values()) if isinstance(self.ids, dict) and NEWLINE in self.ids else [None]
        if not all(type(id) is int for id in ids) or sorted(ids) != list(range(len(ids))):
            raise UserError(f"{self.files[0]}: must map entries, including a newline followed by </w>, to the ids 0, 1, 2, ...")
        self.entries = sorted(self.ids, key=self.ids.__getitem__)
        self.vocab_size = len(self.entries)
        self.eos_id = self.ids[NEWLINE]
        version, *lines = _decode(merges, self.files[1]).replace("\r\n", "\n").rstrip("\n").split("\n")
        if not version.startswith("#version"):
            raise UserError(f"{self.files[1]}:1: must be '#version: 0.2', with the merges in the following lines")
        pairs = [tuple(line.split(" ")) for line in lines]
        for number, pair in enumerate(pairs, start=2):
            if len(pair) != 2 or not all(pair):
                raise UserError(f"{self.files[1]}:{number}: must be two symbols with a space between them")
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self._cached_ids = functools.lru_cache(maxsize=1 << 17)(self._part_ids)

    @classmethod
    def read(cls, folder: Path, field: str = "data.tokenizer.path") -> Self:
        """Reads the released files from a folder; `field` is the option that named it, for messages.

        Raises:
          UserError: a file is missing, or not in the released format.
        """
        missing = [name for name in cls.files if not (folder / name).is_file()]
        if missing:
            raise UserError(f"--{field}: '{folder}' lacks {' and '.join(missing)}; give the folder of the released files")
        try:
            return cls(*((folder / name).read_bytes() for name in cls.files))
        except (OSError, UserError) as error:
            raise UserError(f"--{field}: {folder}/{error}") from None

    def encode(self, text: str) -> list[int]:
        parts = self._english.parts(text)
        return [id for part in parts for id in (self._cached_ids(part) if len(part) <= MAX_CACHED else self._part_ids(part))]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.entries[i] for i in ids).replace("</w>", " ")

    @functools.cached_property
    def _english(self) -> EnglishWords:
        return EnglishWords()

    def _part_ids(self, part: str) -> tuple[int, ...]:
        return tuple(id for word in self._english.words(part) for id in self._merge(word))

    def _merge(self, word: str) -> tuple[int, ...]:
        """Returns the ids of a word after merging the adjacent pair with the lowest rank until no pair has a rank."""
        if word == "\n":
            return (self.eos_id,)
        ranks, unranked = self.ranks, len(self.ranks)
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            best = min(itertools.pairwise(symbols), key=lambda pair: ranks.get(pair, unranked))
            if best not in ranks:
                break
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = ["".join(best)]
                i += 1
        return tuple(self.ids.get(symbol, 0) for symbol in symbols)


# -- SentencePiece ----------------------------------------------------------------------------------------------------------

SPECIAL_IDS: dict[str, Any] = {"unk_id": 0, "eos_id": 1, "bos_id": -1, "pad_id": -1}
"""The ids of the special pieces; -1 means that the model does not have the piece."""
SPACE = "\u2581"
"""The character that represents a space in SentencePiece's pieces."""


class SentencePiece(Tokenizer):
    """A SentencePiece model with byte fallback, made by `train`. The end of a document decodes to nothing.

    Args:
      model: the serialized model.
    """

    kind = "sentencepiece"
    files = ("sentencepiece.model",)
    libraries = ("sentencepiece",)

    def __init__(self, model: bytes):
        import sentencepiece

        super().__init__(model)
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self.processor.get_piece_size()
        self.eos_id = self.processor.eos_id()
        self._space_character = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int, normalization: str) -> Self:
        """Trains a byte-pair encoding. Equal text gives the same model, byte for byte, on any machine.

        Raises:
          UserError: `vocab_size` is too small for the text's characters or too large for its words.
        """
        import sentencepiece

        model = io.BytesIO()
        # The lines are in a list because SentencePiece would wrap an error that an iterator raises in one of its own.
        lines = [line for document in documents for line in document.encode("utf-8", "replace").split(b"\n")]
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                normalization_rule_name=normalization,
                # The rarest characters, together one in 10,000 of the text, are encoded as bytes and have no entries.
                byte_fallback=True,
                character_coverage=0.9999,
                # Spaces are kept, and a run of spaces can be one piece, because indentation is meaningful in documentation. No
                # space is added before a text, so that the parts of an encoded text decode to the parts of the text.
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                add_dummy_prefix=False,
                # A newline is a separate piece. Normalization would turn it into a space, but the end of a paragraph matters.
                user_defined_symbols=["\n"],
                **SPECIAL_IDS,
                max_sentence_length=2**30,
                # The number of threads does not change the pieces, but it is written into the model.
                num_threads=16,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(f"--model.vocab-size: {_training_problem(str(error), vocab_size)}") from None
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        # As a piece, this character would decode to a space. Its bytes decode to itself.
        first, *rest = (self.processor.encode(part.encode("utf-8", "replace")) for part in text.split(SPACE))
        for part in rest:
            first += self._space_character + part
        return first

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode([int(i) for i in ids])


def _training_problem(message: str, vocab_size: int) -> str:
    """Translates an error message of SentencePiece's trainer into a message that says what to change."""
    if match := re.search(r"set it to a value <= (\d+)", message):
        return f"the text has too few words for {vocab_size} entries; give at most {match[1]}, or add text"
    if match := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return f"{vocab_size} is too small; the bytes and the text's frequent characters alone need {match[1]}"
    if "sentences_.empty()" in message:
        return "there is no text to train a SentencePiece tokenizer on"
    return f"SentencePiece could not train a tokenizer: {message}"
