"""tokenizer.json: our tokenizers in the format of the `tokenizers` library, and the texts for which that gives our ids.

SentencePiece and bytes fit into that library's building blocks, all but a few corners. The released GPT-1 encoder does not: it
repairs text with ftfy and finds words with spaCy, thousands of lines of rules. Here some twenty regular expressions put spaces
where those rules end a word, which gives the same words for nearly all English prose. `differences` says in words what is left
out, and `claims_equality` decides it for a given text, on the safe side.
"""

from __future__ import annotations

import base64
import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from gpt_jax.data.tokenizers import GPT1, PUNCTUATION, SPACE, Bytes, SentencePiece, Tokenizer
from gpt_jax.errors import UserError

UNKNOWN = "<unk>"
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
    ids = {} if isinstance(tokenizer, GPT1) else {END: tokenizer.separator}
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
    if not isinstance(tokenizer, Bytes):
        names["unk_token"] = UNKNOWN
    if specials:
        names |= dict(zip(("bos_token", "sep_token", "cls_token"), specials, strict=True))
        if "unk_token" in names:
            names["pad_token"] = UNKNOWN
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
    """What tokenizer.json cannot express, a sentence for each thing."""
    spelt = (
        "Text that spells a special token becomes that token if tokenizer.json is read by the tokenizers library alone; "
        "transformers keeps it text, as in training."
    )
    if isinstance(tokenizer, GPT1):
        return (
            "The model was trained on text that ftfy had repaired: mojibake, HTML entities, ligatures, full-width letters and "
            "control characters are left as they are here; curly quotes and dashes are replaced.",
            "The model was trained on the words of spaCy's English tokenizer, which are approximated by regular expressions: "
            "numbers with units or times of day (5km, 10am), double contractions (I'd've), web addresses and emoticons differ.",
            "For plain English text the ids are equal.",
            spelt,
        )
    if not isinstance(tokenizer, SentencePiece):
        return (spelt,)
    broken = "Byte tokens that are no UTF-8 decode to replacement characters, and so do the valid ones beside them."
    if not _proto(tokenizer).normalizer_spec.precompiled_charsmap:
        return spelt, broken
    return (
        "Normalization goes by whole characters here: combining marks, joined emoji, conjoining Hangul and half-width sound marks "
        f"can be normalized differently, and '{SPACE}' may become a space.",
        spelt,
        broken,
    )


def claims_equality(tokenizer: Tokenizer, text: str, specials: Sequence[str] = ()) -> bool:
    """Whether tokenizer.json, made with `specials`, gives exactly our ids for this text. Where in doubt, no."""
    if re.search("[\ud800-\udfff]", text) or any(name in text for name in (END, *specials)):
        return False
    if isinstance(tokenizer, GPT1):
        return _is_plain_english(text)
    if isinstance(tokenizer, SentencePiece) and _proto(tokenizer).normalizer_spec.precompiled_charsmap:
        return SPACE not in text and not any(map(_joins, text))
    return True


# -- parts in common --------------------------------------------------------------------------------------------------------


def _parts(tokenizer: Tokenizer) -> dict[str, Any]:
    """Normalizer, pre-tokenizer, model, decoder and added tokens."""
    if isinstance(tokenizer, SentencePiece):
        return _sentencepiece(tokenizer)
    if isinstance(tokenizer, GPT1):
        return _gpt1(tokenizer)
    return _bytes()


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
        "special_tokens": {
            name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (start, delimiter, extract)
        },
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
def _parse(model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(model)


def _proto(tokenizer: SentencePiece) -> Any:
    """The model as SentencePiece's own protocol buffer, ModelProto."""
    return _parse(*tokenizer.contents)


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
        "model": _bpe(vocab, _merges(scores), unk_token=UNKNOWN, byte_fallback=True),
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "added_tokens": [
            _added_token(piece.piece, i, special=False) for i, piece in enumerate(proto.pieces) if piece.type == kinds.USER_DEFINED
        ],
    }


def _merges(scores: Mapping[str, float]) -> list[list[str]]:
    """For each piece, from the highest score down, the pair of pieces that SentencePiece makes it from; none for characters.

    SentencePiece ranks what a pair of neighbours makes, `tokenizers` the pair itself. One pair a piece is enough for both to agree:
    two neighbours have come about without a look beyond them, as they would have if they were the whole text. So a piece is only
    ever made from the two that its own characters, merged by themselves, come to in the end.
    """
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        symbols = list(piece)
        while len(symbols) > 2:
            made = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
            if not made:
                break
            _, i = min(made)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        if len(symbols) == 2:
            merges.append(symbols)
    return merges


_JOINING = re.compile(
    "[\u0d4e\u0e33\u0eb3\u1100-\u11ff\u3131-\u318e\ua960-\ua97f\ud7b0-\ud7fb\uff9e-\uffdc\U000111c2\U000111c3\U00011a84-\U00011a89"
    "\U0001f1e6-\U0001f1ff\U0001f3fb-\U0001f3ff]"
)


def _joins(character: str) -> bool:
    """Whether a character may be one with its neighbour, in their normalization or in ours."""
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf", "Cn") or _JOINING.match(character) is not None


# -- the released encoder ---------------------------------------------------------------------------------------------------


def _any(words: str) -> str:
    """A pattern for any of the words."""
    return f"(?:{'|'.join(map(re.escape, words.split()))})"


REPLACED = (("[\u02bc\u00b4\u2018-\u201b]", "'"), ("[\u201c-\u201f]", '"'), ("[\u2013-\u2015]", "-"), ("\u2026", "..."))
MARK = PUNCTUATION.pattern.removeprefix("(").removesuffix(r")\1*")
SUFFIX = r"(?:'(?:s|S(?!\.(?!\.)))?|[`:#&<>]|\.+)"
END_OF_CHUNK = r"(?!\S)"
SUFFIXES = rf"(?={SUFFIX}*{END_OF_CHUNK})"
ABBREVIATION = (
    r"(?:[a-zäöü]|"
    + _any(
        "a.m p.m e.g E.g E.G i.e I.e I.E v.s vs co Co Ph.D D.C S.C N.C N.D N.H N.J N.M N.Y Adm Ak Ala Apr Ariz Ark Aug Bros Calif "
        "Colo Conn Corp Dec Del Dr Feb Fla Ga Gen Gov Ia Id Ill Inc Ind Jan Jr Jul Jun Kan Kans Ky La Ltd Mar Mass Md Messrs Mich "
        "Minn Miss Mo Mont Mr Mrs Ms Mt Neb Nebr Nev Nov Oct Okla Ore Pa Prof Rep Rev Sen Sep Sept St Tenn Va Wash Wis"
    )
    + r")\.(?!\.)"
)
CLIPPED = (
    "'" + _any("em ll nuff re bout cause Cause cos Cos coz Coz cuz Cuz") + r"|'[dsS](?!\.(?!\.))",
    _any("doin Doin goin Goin havin Havin lovin Lovin nothin Nothin nuthin Nuthin ol Ol somethin Somethin") + "'(?!s)",
)
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
)
WHOLE = "ill its hell shell shed were well whore"

def _rules():
    start, end = r"(?<!\S)", END_OF_CHUNK
    return [
        ([rf"([-~|/])\1*\K", rf"{MARK}\K"]),
        ([rf"(?<=\S)(?<!{MARK})(?={MARK})"]),
        ([rf"{start}(?:{CLIPPED[0]}){SUFFIXES}\K", rf"{start}(?:''|['`#&<>=%:$£]|\.\.++)\K(?=\S)"]),
        ([rf"{start}(?:{ABBREVIATION}|{'|'.join(CLIPPED)}|''){SUFFIXES}\K",
          rf"(?<=\S)(?:(?<!')(?=')|(?='[sS])|(?=[`:#&<>])|(?<!\.)(?=\.\.)|(?:(?<=[\p{{Ll}}0-9%'`:])|(?<=\p{{Lu}}\p{{Lu}}))(?=\.(?!\.)))(?={SUFFIX}+{end})",
          rf"(?<=\d)(?=[%$£]{SUFFIX}*{end})"]),
        ([rf"{start}(?=\p{{L}}[a-z']*{end})(?!(?i:{_any(WHOLE)}){end})(?i:{_any(heads)})\K(?={_any(tails)}{end})" for heads, tails in CONTRACTIONS]),
        ([r"(?<=[^\s.])(?=\.\.)", r"(?<=\.\.)(?=[^\s.])", rf"{start}{ABBREVIATION}\K(?=[\p{{Lu}}'`])",
          r"(?<=[\p{Ll}'`])(?=\.[\p{Lu}'`])", r"(?<=[\p{Ll}'`]\.)(?=[\p{Lu}'`])", r"(?<=[\p{L}\d])(?=:\p{L})", r"(?<=[\p{L}\d]:)(?=\p{L})"]),
    ]

def _gpt1(tokenizer: GPT1) -> dict[str, Any]:
    normalizers = [
        {"type": "NFC"},
        *(_replace(pattern, content) for pattern, content in REPLACED),
        _replace(r"\A\s+|\s+\z", ""),
        _replace(r"\s*[\n\r]\s*", " \n "),
        *(_replace("|".join(patterns), " ") for patterns in _rules()),
        {"type": "Lowercase"},
    ]
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[^\S\n]+"}, "behavior": "Removed", "invert": False},
        "model": _bpe(tokenizer.ids, sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__), unk_token=tokenizer.entries[0], end_of_word_suffix="</w>"),
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "</w>"}, "content": " "}, {"type": "Fuse"}]},
        "added_tokens": [],
    }


LETTER = "A-Za-zÀÆÇÈÉÊËÑÖÜÄà-öø-ÿ"
SAFE_CHARACTERS = re.compile(
    "(?:[\t\n -~\u00a0\u00b4\u2013-\u2015\u2018\u2019\u201c\u201d\u2026]"
    "|(?<![^\0-\x7f\u00a0\u00b4\u2013-\u2015\u2019\u2026])(?:[à-öø-ÿ£]|[ÀÆÇÈÉÊËÑÖÜÄ](?=[A-Za-z]))(?![^\0-\x7f\u00a0\u00b4\u2013-\u2015\u2019\u2026]))*"
)
MERGED = "|".join(
    rf"(?i:{_any(heads)})[{''.join(t for t in tails.split() if len(t) == 1)}]\." for heads, tails in CONTRACTIONS if re.search(r"\b\w$", tails)
)
RISKY = re.compile(
    rf".*''|'(?i:{_any('d s')}\.|{_any('em ll nuff re s d bout cause cos coz cuz')}(?:'s?|\.+|:){{2}})|.*(?i:d|ll|n'?t)'?ve\b|'?(?i:i'?ma\b|how'd'y|y'?all|{MERGED})"
)
NUMBER = r"\d+(?:[.:]\d+)*(?:st|nd|rd|th|s|d|%)?"
SAFE_CHUNK = re.compile(
    rf"(?:{MARK})+|(?!{RISKY.pattern})(?:'?(?:[{LETTER}]+(?:'[{LETTER}]+)*|(?:[A-Z]\.)+[A-Z]?|{ABBREVIATION}|{NUMBER})?|[$£]{NUMBER})(?:'s)?'?(?:\.+|:)?'?"
)


def _chunks(text):
    for pattern, content in REPLACED:
        text = re.sub(pattern, content, text)
    return PUNCTUATION.sub(r" \g<0> ", text).split()

def _is_plain_english(text: str) -> bool:
    """Whether a text has only characters that ftfy leaves alone and chunks whose words the rules find."""
    return SAFE_CHARACTERS.fullmatch(text) is not None and all(map(SAFE_CHUNK.fullmatch, _chunks(text)))
