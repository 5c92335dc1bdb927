"""tokenizer.json: our tokenizers in the format of the `tokenizers` library, and the texts for which that gives our ids.

SentencePiece and bytes fit into that library's building blocks, all but a few corners. The released GPT-1 encoder does not: it
repairs text with ftfy and finds words with spaCy, thousands of lines of rules. Here a dozen regular expressions put spaces where
those rules end a word, which gives the same words for nearly all English prose. `differences` says in words what is left out,
and `claims_equality` decides it for a given text, on the safe side.
"""

from __future__ import annotations

import base64
import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.data.tokenizers import GPT1, PUNCTUATION, SPACE, Bytes, SentencePiece, Tokenizer
from gpt_jax.errors import UserError

END = "</s>"
"""The separator's name in a SentencePiece model; the separator of `bytes` gets the same one, that of `gpt1` is the newline."""


def convert(tokenizer: Tokenizer, specials: Sequence[str] = ()) -> dict[str, Any]:
    """The contents of tokenizer.json.

    Args:
      specials: names for the start, delimiter and extract tokens that fine-tuning added behind the vocabulary. The file then puts
        them around a text or a pair of texts as Figure 1 of the paper does. Without them nothing is added to a text.

    Raises:
      UserError: one of the names is an entry of the vocabulary already.
    """
    parts = _parts(tokenizer)
    ids = {} if isinstance(tokenizer, GPT1) else {END: tokenizer.eos_id}
    for i, name in enumerate(specials, start=tokenizer.vocab_size):
        if name in ids or name in parts["model"]["vocab"]:
            raise UserError(f"special token '{name}': the tokenizer has an entry of that name; choose another")
        ids[name] = i
    added = [_added_token(name, i, special=True) for name, i in ids.items()] + parts.pop("added_tokens")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        **parts,
        "post_processor": _figure_1(ids, *specials) if specials else None,
    }


def tokenizer_config(tokenizer: Tokenizer, specials: Sequence[str], context_length: int) -> dict[str, Any]:
    """The contents of tokenizer_config.json, which transformers reads along with tokenizer.json; `specials` as in `convert`."""
    names = {} if isinstance(tokenizer, GPT1) else {"eos_token": END}
    if isinstance(tokenizer, GPT1 | SentencePiece):
        names["unk_token"] = _unknown(tokenizer)
    if specials:
        names |= dict(zip(("bos_token", "sep_token", "cls_token"), specials, strict=True))
        if "unk_token" in names:  # It has id 0, with which batches for the classifier are padded.
            names["pad_token"] = names["unk_token"]
    return {
        # Their class for this kind of model would take the vocabulary alone and cut text in its own way.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        # No token types: their model would add a token's embedding for each type.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # Text that spells a special token stays text.
        "split_special_tokens": True,
        **names,
    }


def differences(tokenizer: Tokenizer) -> tuple[str, ...]:
    """What tokenizer.json cannot express, a sentence or two for each thing."""
    special = (
        "Text that spells a special token is read as that token by the tokenizers library alone; transformers reads it as text, "
        "as in training."
    )
    if isinstance(tokenizer, GPT1):
        return (
            "In training, ftfy repaired the text. tokenizer.json replaces quotes and dashes, drops control characters and "
            "composes accents, but leaves mojibake, HTML entities, terminal escapes, ligatures and full-width letters alone.",
            "In training, spaCy's English rules found the words. tokenizer.json approximates them by regular expressions: "
            "emoticons, web addresses, rare contractions and signs in the middle of a word can be cut otherwise.",
            "English prose is rarely affected: ids differed in 2 of 20,000 paragraphs of novels and 9 of 5,534 passages of news.",
            special,
        )
    if isinstance(tokenizer, Bytes):
        return (special,)
    broken = "When byte tokens that are no UTF-8 are decoded, the byte tokens next to them are lost as well."
    if not _normalizes(tokenizer):
        return special, broken
    return (
        "Combining marks, joined emoji, conjoining Hangul and half-width sound marks can be normalized otherwise than in "
        f"training, and '{SPACE}' can become a space.",
        special,
        broken,
    )


def claims_equality(tokenizer: Tokenizer, text: str, specials: Sequence[str] = ()) -> bool:
    """Whether tokenizer.json, made with `specials`, gives exactly our ids for this text. Where in doubt, no."""
    if re.search("[\ud800-\udfff]", text) or any(name in text for name in (END, *specials)):
        return False
    if isinstance(tokenizer, GPT1):
        return _is_plain_english(text)
    return not _normalizes(tokenizer) or (SPACE not in text and not any(map(_joins, text)))


# -- parts in common --------------------------------------------------------------------------------------------------------


def _parts(tokenizer: Tokenizer) -> dict[str, Any]:
    """Normalizer, pre-tokenizer, model, decoder and added tokens."""
    if isinstance(tokenizer, SentencePiece):
        return _sentencepiece(tokenizer)
    if isinstance(tokenizer, GPT1):
        return _gpt1(tokenizer)
    return _bytes()


def _unknown(tokenizer: GPT1 | SentencePiece) -> str:
    """The name of id 0, which stands for what is not in the vocabulary."""
    return tokenizer.entries[0] if isinstance(tokenizer, GPT1) else tokenizer.processor.id_to_piece(0)


def _bpe(vocab: Mapping[str, int], merges: Sequence[Sequence[str]], **options: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(vocab),
        "merges": [list(pair) for pair in merges],
        **options,
    }


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _added_token(name: str, i: int, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": name, **flags, "special": special}


def _figure_1(ids: Mapping[str, int], start: str, delimiter: str, extract: str) -> dict[str, Any]:
    """start text extract, and start a delimiter b extract (section 3.3, Figure 1)."""

    def token(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    a, b = ({"Sequence": {"id": sequence, "type_id": 0}} for sequence in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [token(start), a, token(extract)],
        "pair": [token(start), a, token(delimiter), b, token(extract)],
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (start, delimiter, extract)},
    }


# -- bytes ------------------------------------------------------------------------------------------------------------------


def _bytes() -> dict[str, Any]:
    # Their byte-level form names a byte by a character that can be printed: its own in Latin-1, or one from U+0100 on.
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    names = {byte: chr(byte) for byte in own} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "model": _bpe({names[byte]: byte for byte in range(256)}, []),
        "decoder": byte_level,
        "added_tokens": [],
    }


# -- SentencePiece ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _proto(tokenizer: SentencePiece) -> Any:
    """The model as SentencePiece's own protocol buffer, a ModelProto."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    return ModelProto.FromString(tokenizer.contents[0])


def _normalizes(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer, SentencePiece) and bool(_proto(tokenizer).normalizer_spec.precompiled_charsmap)


def _sentencepiece(tokenizer: SentencePiece) -> dict[str, Any]:
    proto = _proto(tokenizer)
    kinds = type(proto).SentencePiece
    # Pieces have a space where SentencePiece writes its stand-in: then that character in a text is no piece, and falls to bytes
    # as it does with us.
    vocab = {piece.piece.replace(SPACE, " "): i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece.replace(SPACE, " "): piece.score for piece in proto.pieces if piece.type == kinds.NORMAL}
    charsmap = proto.normalizer_spec.precompiled_charsmap
    return {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()} if charsmap else None,
        "pre_tokenizer": None,
        "model": _bpe(vocab, _merges(scores), unk_token=_unknown(tokenizer), byte_fallback=True),
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "added_tokens": [
            _added_token(piece.piece, i, special=False)
            for i, piece in enumerate(proto.pieces)
            if piece.type == kinds.USER_DEFINED
        ],
    }


def _merges(scores: Mapping[str, float]) -> list[list[str]]:
    """All pairs of pieces that make a piece, the pieces with the highest score first.

    SentencePiece ranks what a pair of neighbours makes, `tokenizers` the pair itself. That comes to the same although a piece may
    be made of several pairs, because only one of them ever occurs: two neighbours came about without regard to what is beyond
    them, so they are the two that the piece's characters, merged by themselves, come to last.
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
    """Whether a character may be one with its neighbour, in their normalization or in ours."""
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf", "Cn") or _JOINING.match(character) is not None


# -- the released encoder ---------------------------------------------------------------------------------------------------
#
# A chunk is what stands between two spaces. Patterns are Oniguruma's, which `tokenizers` uses.


def _any(words: str) -> str:
    return f"(?:{'|'.join(map(re.escape, words.split()))})"


REPLACED = (
    (r"[\x00-\x08\x0b\x0e-\x1f\x7f]", ""),
    ("[\u02bc\u00b4\u2018-\u201b]", "'"),
    ("[\u201c-\u201f]", '"'),
    ("[\u2013-\u2015]", "-"),
    ("\u2026", "..."),
)
"""What ftfy and PLAIN write otherwise: a pattern, and its replacement."""

START, STOP = r"(?<!\S)", r"(?!\S)"
"""Of a chunk."""
MARK = PUNCTUATION.pattern.removeprefix("(").removesuffix(r")\1*")
"""A character that is a chunk of its own."""
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
"""These keep their period, single letters among them."""
ELISION = "'" + _any("em ll nuff re bout cause Cause cos Cos coz Coz cuz Cuz") + r"|'[dsS](?!\.(?!\.))"
"""These keep the apostrophe in front."""
CLIPPED = _any("doin Doin goin Goin havin Havin lovin Lovin nothin Nothin nuthin Nuthin ol Ol somethin Somethin") + "'(?!s)"
"""These keep the apostrophe behind."""
EDGE = "`:#&<>"
"""What is cut from both ends of a chunk, as apostrophes and runs of periods are."""
SUFFIX = rf"(?:'(?:s|S(?!\.(?!\.)))?|[{EDGE}]|\.+)"
PERIOD = rf"(?:(?<=[\p{{Ll}}\d%'{EDGE}])|(?<=\p{{Lu}}\p{{Lu}}))\.(?!\.)"
"""One that ends a sentence, not an initial."""
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
"""A chunk made of one of the first words and one of the second is cut between them. It may begin with a capital letter."""
WHOLE = "ill its hell shell shed were well whore"
"""These look like contractions."""
CUTS = (
    # Marks. A run of one mark is taken apart too, if spaCy has a rule for that mark.
    rf"([-~|/])\1*\K|{MARK}\K",
    rf"(?<=\S)(?<!{MARK})(?={MARK})",
    # The front of a chunk.
    rf"{START}(?:{ELISION})(?={SUFFIX}*{STOP})\K|{START}(?>''|['=%{EDGE}]|{CURRENCY}|\.\.+)\K(?=\S)",
    # Its end. A word that keeps its last mark is passed over as a whole: a cut behind it does no harm.
    rf"{START}(?:{ABBREVIATION}|{ELISION}|{CLIPPED}|'')(?={SUFFIX}*{STOP})\K"
    rf"|(?<=\S)(?=(?<!')'|[{EDGE}]|(?<!\.)\.\.|{PERIOD})(?={SUFFIX}+{STOP})"
    rf"|(?<=\d)(?={UNIT}{SUFFIX}*{STOP})",
    # Contractions.
    "|".join(
        rf"{START}(?=\S[^A-Z\s]*{STOP})(?!(?i:{_any(WHOLE)}){STOP})(?i:{_any(first)})\K(?={_any(second)}{STOP})"
        for first, second in CONTRACTIONS
    ),
    # The middle of a chunk: runs of periods, and a period between a small letter and a capital one.
    rf"(?<=[^\s.])(?=\.\.)|(?<=\.\.)(?=[^\s.])|{START}{ABBREVIATION}\K(?:{STOP}|(?<=\p{{Ll}}\.)(?=[\p{{Lu}}'`]))"
    r"|(?<=[\p{Ll}'`])(?=\.[\p{Lu}'`])|(?<=[\p{Ll}'`]\.)(?=[\p{Lu}'`])",
)
"""Where spaces are put into a text, one pattern after the other. They match nothing but places between characters, and never the
one before the first, where some versions of `tokenizers` fail to put anything."""


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
"""Neighbours that do not make ftfy take a letter with an accent, or a currency, for mojibake."""
SAFE_TEXT = re.compile(
    "(?:[\t\n -~\u00a0\u00b4\u2013-\u2015\u2018\u2019\u201c\u201d\u2026]"
    rf"|(?<![^{BESIDE}])(?:[à-öø-ÿ£€]|[ÀÆÇÈÉÊËÑÖÜÄ](?=[A-Za-z]))(?![^{BESIDE}]))*"
)
"""A text that ftfy leaves as it is, but for REPLACED and entities."""
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
        # Contractions of three words, and rare ones.
        r".*(?:d|ll|n'?t)'?ve\b|'?(?i:i'?ma\b|how'd'y|y'?all)",
        # What spaCy puts together again after cutting, unless a neighbour prevents it: two apostrophes, elisions with marks,
        # and the last letter of a contraction or of a unit with its period. Some of these units keep it, too.
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
"""A chunk, with marks set apart, in which CUTS finds the words of spaCy, whatever its neighbours are."""


def _is_plain_english(text: str) -> bool:
    if not SAFE_TEXT.fullmatch(text):
        return False
    for pattern, content in REPLACED:
        text = re.sub(pattern, content, text)
    return all(map(SAFE_CHUNK.fullmatch, PUNCTUATION.sub(r" \g<0> ", text).split()))
