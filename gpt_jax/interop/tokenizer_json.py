"""Conversion of our tokenizers to tokenizer.json, the format of the `tokenizers` library.

The library's building blocks can express SentencePiece and bytes, except for a few special cases. They cannot express the
released GPT-1 encoder, which repairs text with ftfy and finds words with spaCy, because these libraries apply thousands of lines
of rules. Instead, a dozen regular expressions insert spaces where those rules end a word, which gives the same words for nearly
all English prose. `differences` describes the cases that are not handled, and `claims_equality` determines whether the ids of a
given text are certain to be the same.
"""

import base64
import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.data.english import PUNCTUATION
from gpt_jax.data.tokenizers import GPT1, SPACE, Bytes, SentencePiece, Tokenizer
from gpt_jax.errors import UserError

END = "</s>"
"""Name of the end-of-text token of `bytes` and of a SentencePiece model. The end-of-text token of `gpt1` is the newline."""


def convert(tokenizer: Tokenizer, specials: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the contents of tokenizer.json.

    Args:
      specials: names of the start, delimiter and extract tokens that fine-tuning added to the vocabulary. If they are given, they
        are added to a text or a pair of texts as in Figure 1 of the paper; otherwise, nothing is added.

    Raises:
      UserError: one of the names is already an entry of the vocabulary.
    """
    parts = {"bytes": _bytes, "gpt1": _gpt1, "sentencepiece": _sentencepiece}[tokenizer.kind](tokenizer)  # type: ignore[operator]
    ids = {} if isinstance(tokenizer, GPT1) else {END: tokenizer.eos_id}
    for i, name in enumerate(specials, start=tokenizer.vocab_size):
        if name in ids or name in parts["model"]["vocab"]:
            raise UserError(
                f"--format: huggingface names a special token '{name}', but the tokenizer already has an entry of this name; use "
                "npz, stablehlo, onnx or savedmodel"
            )
        ids[name] = i
    added = [_added_token(name, i, special=True) for name, i in ids.items()] + parts.pop("added_tokens")
    added.sort(key=lambda token: token["id"])
    template = _figure_1(ids, *specials) if specials else None
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts, "post_processor": template}


def tokenizer_config(tokenizer: Tokenizer, specials: Sequence[str], context_length: int) -> dict[str, Any]:
    """Returns the contents of tokenizer_config.json, which transformers reads along with tokenizer.json.

    Args:
      specials: as in `convert`.
    """
    names = {} if isinstance(tokenizer, GPT1) else {"eos_token": END}
    if isinstance(tokenizer, GPT1 | SentencePiece):
        names["unk_token"] = _unknown(tokenizer)
    if specials:
        names |= dict(zip(("bos_token", "sep_token", "cls_token"), specials, strict=True))
    return {
        # The library's class for this model type would use only the vocabulary and split text in its own way.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        # An entry of the vocabulary pads batches, so that no id changes. Which one does not matter: it is masked.
        "pad_token": names.get("unk_token", END),
        # A text is continued from its last token, which must therefore be at the end of the row.
        "padding_side": "right" if specials else "left",
        # Token types are left out, because the model in transformers would add token embeddings for them.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # Text that looks like a special token is treated as text.
        "split_special_tokens": True,
        **names,
    }


def pad_id(tokenizer: Tokenizer) -> int:
    """Returns the id that pads batches: that of the unknown entry, or of the end of a text in `bytes`, which lacks one."""
    return tokenizer.eos_id if isinstance(tokenizer, Bytes) else 0


def differences(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns descriptions of the behavior that tokenizer.json cannot express, each in one or two sentences."""
    special = (
        "The tokenizers library alone treats text that looks like a special token as that token; transformers treats it as text, "
        "as in training."
    )
    if isinstance(tokenizer, GPT1):
        return (
            "In training, ftfy repaired the text. tokenizer.json replaces quotes and dashes, removes control characters and "
            "composes accents, but does not repair mojibake, HTML entities, terminal escapes, ligatures and full-width letters.",
            "In training, spaCy's English rules found the words. tokenizer.json approximates them by regular expressions: it may "
            "split emoticons, web addresses, rare contractions and signs in the middle of a word differently.",
            "English prose is rarely affected: ids differed in 2 of 20,000 paragraphs of novels and 9 of 5,534 passages of news.",
            special,
        )
    if isinstance(tokenizer, Bytes):
        return (special,)
    broken = "When byte tokens that are not valid UTF-8 are decoded, the byte tokens next to them are lost as well."
    if not _normalizes(tokenizer):
        return special, broken
    normalized = (
        "Combining marks, joined emoji, conjoining Hangul and half-width sound marks may be normalized differently than in "
        f"training, and '{SPACE}' may become a space."
    )
    return normalized, special, broken


def claims_equality(tokenizer: Tokenizer, text: str, specials: Sequence[str] = ()) -> bool:
    """Returns whether tokenizer.json, made with `specials`, is certain to give the tokenizer's ids for a text."""
    if re.search("[\ud800-\udfff]", text) or any(name in text for name in (END, *specials)):
        return False
    if isinstance(tokenizer, GPT1):
        return _is_plain_english(text)
    return not _normalizes(tokenizer) or (SPACE not in text and not any(map(_joins, text)))


# -- common parts -----------------------------------------------------------------------------------------------------------


def _unknown(tokenizer: GPT1 | SentencePiece) -> str:
    """Returns the name of id 0, which represents text that is not in the vocabulary."""
    return tokenizer.entries[0] if isinstance(tokenizer, GPT1) else tokenizer.processor.id_to_piece(0)


def _bpe(vocab: Mapping[str, int], merges: Sequence[Sequence[str]], **options: Any) -> dict[str, Any]:
    unused = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    off = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    return {"type": "BPE", **unused, **off, "vocab": dict(vocab), "merges": [list(pair) for pair in merges], **options}


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _added_token(name: str, i: int, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": name, **flags, "special": special}


def _figure_1(ids: Mapping[str, int], start: str, delimiter: str, extract: str) -> dict[str, Any]:
    """Returns the templates (start, a, extract) for one text and (start, a, delimiter, b, extract) for a pair (Figure 1)."""
    a, b = ({"Sequence": {"id": sequence, "type_id": 0}} for sequence in "AB")
    first, middle, last = ({"SpecialToken": {"id": name, "type_id": 0}} for name in (start, delimiter, extract))
    special_tokens = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (start, delimiter, extract)}
    single, pair = [first, a, last], [first, a, middle, b, last]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special_tokens}


# -- bytes ------------------------------------------------------------------------------------------------------------------


def _bytes(_: Bytes) -> dict[str, Any]:
    # The library names each byte by a printable character: the byte's own character in Latin-1, or one from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = _bpe({names[byte]: byte for byte in range(256)}, [])
    return {"normalizer": None, "pre_tokenizer": level, "model": model, "decoder": level, "added_tokens": []}


# -- SentencePiece ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _proto(tokenizer: SentencePiece) -> Any:
    """Returns the model as SentencePiece's own protocol buffer, a ModelProto."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    return ModelProto.FromString(tokenizer.contents[0])


def _normalizes(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer, SentencePiece) and bool(_proto(tokenizer).normalizer_spec.precompiled_charsmap)


def _sentencepiece(tokenizer: SentencePiece) -> dict[str, Any]:
    proto = _proto(tokenizer)
    kinds = type(proto).SentencePiece
    # SentencePiece uses SPACE for a space. If the pieces contain spaces instead, a SPACE in a text is not a piece and falls back
    # to bytes, as it does in our tokenizer.
    vocab = {piece.piece.replace(SPACE, " "): i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece.replace(SPACE, " "): piece.score for piece in proto.pieces if piece.type == kinds.NORMAL}
    user_defined = [(piece.piece, i) for i, piece in enumerate(proto.pieces) if piece.type == kinds.USER_DEFINED]
    charsmap = base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()
    return {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap} if charsmap else None,
        "pre_tokenizer": None,
        "model": _bpe(vocab, _merges(scores), unk_token=_unknown(tokenizer), byte_fallback=True),
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "added_tokens": [_added_token(name, i, special=False) for name, i in user_defined],
    }


def _merges(scores: Mapping[str, float]) -> list[list[str]]:
    """Returns all pairs of pieces that make a piece, in descending order of the score of that piece.

    SentencePiece ranks the result of merging two neighbors, while `tokenizers` ranks the pair. Both give the same merges. Several
    pairs may make the same piece, but only one of these pairs ever occurs: a merge does not depend on the text around the pair,
    so it is the last pair that results from merging the characters of the piece alone.
    """
    return [
        [piece[:i], piece[i:]]
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]


_JOINING = re.compile(
    "[\u0d4e\u0e33\u0eb3\u1100-\u11ff\u3131-\u318e\ua960-\ua97f\ud7b0-\ud7fb\uff9e-\uffdc\U000111c2\U000111c3\U00011a84-\U00011a89"
    "\U0001f1e6-\U0001f1ff\U0001f3fb-\U0001f3ff]"
)


def _joins(character: str) -> bool:
    """Returns whether the library or our tokenizer may normalize a character together with its neighbor."""
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf", "Cn") or _JOINING.match(character) is not None


# -- the released encoder ---------------------------------------------------------------------------------------------------
#
# A chunk is the text between two spaces. The patterns are for Oniguruma, the regular expressions of `tokenizers`.


def _any(words: str) -> str:
    return f"(?:{'|'.join(map(re.escape, words.split()))})"


REPLACED = (
    (r"[\x00-\x08\x0b\x0e-\x1f\x7f]", ""),
    ("[\u02bc\u00b4\u2018-\u201b]", "'"),
    ("[\u201c-\u201f]", '"'),
    ("[\u2013-\u2015]", "-"),
    ("\u2026", "..."),
)
"""Characters that ftfy and our tokenizer replace: the pattern and its replacement."""

START, STOP = r"(?<!\S)", r"(?!\S)"
"""Patterns for the start and the end of a chunk."""
MARK = PUNCTUATION.pattern.removeprefix("(").removesuffix(r")\1*")
"""A punctuation mark that is always a separate chunk."""
CURRENCY = r"(?:(?:US|[AC])?\$|[£€])"
UNIT = _any("km m dm cm mm ha nm yd in ft kg g mg t lb oz kmh mph hPa Pa mbar mb MB kb KB gb GB tb TB T G M K % $ £ €")
ABBREVIATION = (
    r"(?:[a-zäöü]|"
    + _any(
        "a.m p.m e.g E.g E.G i.e I.e I.E v.s vs co Co Ph.D D.C S.C N.C N.D N.H N.J N.M N.Y Adm Ak Ala Apr Ariz Ark Aug Bros "
        "Calif Colo Conn Corp Dec Del Dr Feb Fla Ga Gen Gov Ia Id Ill Inc Ind Jan Jr Jul Jun Kan Kans Ky La Ltd Mar Mass Md "
        "Messrs Mich Minn Miss Mo Mont Mr Mrs Ms Mt Neb Nebr Nev Nov Oct Okla Ore Pa Prof Rep Rev Sen Sep Sept St Tenn Va "
        "Wash Wis"
    )
    + r")\.(?!\.)"
)
"""Words that keep their period, including single letters."""
ELISION = "'" + _any("em ll nuff re bout cause Cause cos Cos coz Coz cuz Cuz") + r"|'[dsS](?!\.(?!\.))"
"""Words that keep the apostrophe at their start."""
CLIPPED = _any("doin Doin goin Goin havin Havin lovin Lovin nothin Nothin nuthin Nuthin ol Ol somethin Somethin") + "'(?!s)"
"""Words that keep the apostrophe at their end."""
EDGE = "`:#&<>"
"""Characters that are split off at both ends of a chunk, like apostrophes and runs of periods."""
SUFFIX = rf"(?:'(?:s|S(?!\.(?!\.)))?|[{EDGE}]|\.+)"
PERIOD = rf"(?:(?<=[\p{{Ll}}\d%'{EDGE}])|(?<=\p{{Lu}}\p{{Lu}}))\.(?!\.)"
"""A period that ends a sentence, not an initial."""
CONTRACTIONS = (
    ("ai are ca could dare did do does had has have is may might must need ought sha should was were wo would", "n't nt"),
    ("could might must not should would", "'ve ve"),
    ("i you he she it we they who what when where why how there that this these those", "'ll ll 'd d"),
    ("i you we they who what when where why how there these those", "'ve ve"),
    ("you we they who what when where why how there these those", "'re re"),
    ("he she it who what when where why how there that this", "s"),
    ("i", "'m m"),
    ("can", "not"),
    ("gon", "na"),
    ("got", "ta"),
    ("c'm", "on"),
    ("1 2 3 4 5 6 7 8 9 10 11 12", "am pm"),
)
"""Pairs of lists of words. A chunk that consists of a word of the first list and a word of the second, such as "don't", is cut
between them. It may begin with a capital letter."""
WHOLE = "ill its hell shell shed were well whore"
"""Words that look like contractions but are not cut."""
CUTS = (
    # Marks. A run of one mark is split too, if spaCy has a rule for that mark.
    rf"([-~|/])\1*\K|{MARK}\K",
    rf"(?<=\S)(?<!{MARK})(?={MARK})",
    # The beginning of a chunk.
    rf"{START}(?:{ELISION})(?={SUFFIX}*{STOP})\K|{START}(?>''|['=%{EDGE}]|{CURRENCY}|\.\.+)\K(?=\S)",
    # The end of a chunk. A word that keeps its last mark is skipped completely; a cut after it does no harm.
    rf"{START}(?:{ABBREVIATION}|{ELISION}|{CLIPPED}|'')(?={SUFFIX}*{STOP})\K"
    rf"|(?<=\S)(?=(?<!')'|[{EDGE}]|(?<!\.)\.\.|{PERIOD})(?={SUFFIX}+{STOP})"
    rf"|(?<=\d)(?={UNIT}{SUFFIX}*{STOP})",
    # Contractions.
    "|".join(
        rf"{START}(?=\S[^A-Z\s]*{STOP})(?!(?i:{_any(WHOLE)}){STOP})(?i:{_any(first)})\K(?={_any(second)}{STOP})"
        for first, second in CONTRACTIONS
    ),
    # The middle of a chunk: runs of periods, and a period between a lowercase and an uppercase letter.
    rf"(?<=[^\s.])(?=\.\.)|(?<=\.\.)(?=[^\s.])|{START}{ABBREVIATION}\K(?:{STOP}|(?<=\p{{Ll}}\.)(?=[\p{{Lu}}'`]))"
    r"|(?<=[\p{Ll}'`])(?=\.[\p{Lu}'`])|(?<=[\p{Ll}'`]\.)(?=[\p{Lu}'`])",
)
"""Patterns for the positions where spaces are inserted into a text, applied one after the other. They match only positions
between characters, never the position before the first character, where some versions of `tokenizers` do not insert anything."""


def _gpt1(tokenizer: GPT1) -> dict[str, Any]:
    normalizers = [
        {"type": "NFC"},
        *(_replace(pattern, content) for pattern, content in REPLACED),
        _replace(r"\A\s+|\s+\z", ""),
        _replace(r"\s*[\n\r]\s*", " \n "),
        *(_replace(pattern, " ") for pattern in CUTS),
        {"type": "Lowercase"},
    ]
    merges = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
    word_end = {"type": "Replace", "pattern": {"String": "</w>"}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[^\S\n]+"}, "behavior": "Removed", "invert": False},
        "model": _bpe(tokenizer.ids, merges, unk_token=_unknown(tokenizer), end_of_word_suffix="</w>"),
        "decoder": {"type": "Sequence", "decoders": [word_end, {"type": "Fuse"}]},
        "added_tokens": [],
    }


BESIDE = "\0-\x7f\u00a0\u00b4\u2013-\u2015\u2019\u2026"
"""Characters next to which ftfy does not mistake an accented letter or a currency sign for mojibake."""
SAFE_TEXT = re.compile(
    "(?:[\t\n -~\u00a0\u00b4\u2013-\u2015\u2018\u2019\u201c\u201d\u2026]"
    rf"|(?<![^{BESIDE}])(?:[à-öø-ÿ£€]|[ÀÆÇÈÉÊËÑÖÜÄ](?=[A-Za-z]))(?![^{BESIDE}]))*"
)
"""A text that ftfy does not change, except for REPLACED and HTML entities."""
LETTER = "[A-Za-zÀÆÇÈÉÊËÑÖÜÄà-öø-ÿ]"
NUMBER = rf"\d+(?:[.:]\d+)*(?:st|nd|rd|th|s|d|am|pm|{UNIT})?"
WORD = "|".join(
    (
        rf"{LETTER}+(?:'{LETTER}+)*",
        r"[A-Z]?[a-z]+(?:\.[a-z]+)+",
        r"(?:[A-Z]\.)+[A-Z]?",
        r"(?:[A-Za-z]+\d+)+",
        ABBREVIATION,
        NUMBER,
    )
)
UNSAFE_CHUNK = "|".join(
    (
        # Contractions of three words, and rare contractions.
        r".*(?:d|ll|n'?t)'?ve\b|'?(?i:i'?ma\b|how'd'y|y'?all)",
        # Parts that spaCy joins again after cutting, unless the text next to them prevents it: two apostrophes, elisions with
        # marks, and the last letter of a contraction or of a unit with its period. Some of these units also keep their period.
        r".*''|'[dsS]\.",
        rf"(?:{ELISION})(?:'s?|\.+|:){{2}}",
        *(
            rf"'?(?i:{_any(first)})[{''.join(letters)}]\."
            for first, second in CONTRACTIONS
            if (letters := [end for end in second.split() if len(end) == 1])
        ),
        r".*\d[mgtTGMK$£€]\.",
    )
)
SAFE_CHUNK = re.compile(rf"{MARK}+|\S|''|``|(?!{UNSAFE_CHUNK})(?:'?(?:{WORD})?|{CURRENCY}{NUMBER})(?:'s)?'?(?:\.+|:)?'?")
"""A chunk, with marks already split off, for which CUTS finds the same words as spaCy regardless of the text around it."""


def _is_plain_english(text: str) -> bool:
    if not SAFE_TEXT.fullmatch(text):
        return False
    for pattern, content in REPLACED:
        text = re.sub(pattern, content, text)
    return all(map(SAFE_CHUNK.fullmatch, PUNCTUATION.sub(r" \g<0> ", text).split()))
