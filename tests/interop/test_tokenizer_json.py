"""tokenizer.json, loaded by the `tokenizers` library, gives the tokenizer's ids for every text for which it claims to."""

import itertools
import json
import random
import string

import pytest

from gpt_jax.data.english import EnglishWords
from gpt_jax.data.tokenizers import GPT1, Bytes, SentencePiece, Tokenizer
from gpt_jax.errors import UserError
from gpt_jax.interop import tokenizer_json
from gpt_jax.interop.tokenizer_json import claims_equality, convert, differences, tokenizer_config

SPECIALS = ("<start>", "<delimiter>", "<extract>")
NORMALIZATIONS = ("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")


def load(tokenizer: Tokenizer, specials=()):
    """Loads our file into the `tokenizers` library."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    return tokenizers.Tokenizer.from_str(json.dumps(convert(tokenizer, specials)))


def check(tokenizer: Tokenizer, theirs, texts) -> tuple[float, float]:
    """Asserts that no claim is wrong and returns the share of texts with equal ids and the share of texts with a claim."""
    texts = list(texts)
    ours = [tokenizer.encode(text) for text in texts]
    equal = [theirs.encode(text, add_special_tokens=False).ids == ids for text, ids in zip(texts, ours, strict=True)]
    claimed = [claims_equality(tokenizer, text) for text in texts]
    assert [text for text, same, claim in zip(texts, equal, claimed, strict=True) if claim and not same] == []
    assert theirs.decode_batch(ours) == [tokenizer.decode(ids) for ids in ours]
    return sum(equal) / len(texts), sum(claimed) / len(texts)


BLANKS = [" ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", "\0", "\x7f", "\x85", "\u2028", "\ufeff", "\ufffd", " \u2581"]
STRINGS = "the cat The ... aaa aaaaa é e\u0301 E\u0301 ①\u0301 ﬁ ｶﾞ 漢字 한 \u1112\u1161 😀 👩\u200d👧 🇫🇷 \u2581 \u2585 \u2047"
STRINGS += " <0x41> </s> <unk> </w> &amp;"


def random_text(rng: random.Random) -> str:
    """Returns text made of ordinary words, of difficult cases, and of arbitrary characters."""
    characters = [range(0xD800), range(0xE000, 0x110000), range(0x250)]
    parts = [
        rng.choice(BLANKS + STRINGS.split()) if rng.random() < 0.9 else chr(rng.choice(rng.choice(characters)))
        for _ in range(rng.randrange(20))
    ]
    return "".join(parts)


DOCUMENTS = [
    "The cat sat on the mat; the other cat did not.\n\n  if cat:\n      sit(mat)  # aaaaaaa\n",
    "The dog, the other cat and the mat. A café <0x41> </s> <unk>\n      indented\n\t\ttabs -- and ...... dots\n",
    "aaa aaaa aaaaa abab ababab baba\n",
] * 20


# -- SentencePiece and bytes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=NORMALIZATIONS)
def pieces(request) -> SentencePiece:
    return SentencePiece.train(DOCUMENTS, 370, request.param)


def test_any_text_through_sentencepiece(pieces):
    rng = random.Random(0)
    texts = ["", "\n", " ", "\u2581", " \n  a", *(random_text(rng) for _ in range(1500))]
    equal, claimed = check(pieces, load(pieces), texts)
    if tokenizer_json._normalizes(pieces):
        assert claimed > 0.15
    else:
        assert equal == claimed == sum("</s>" not in text for text in texts) / len(texts)


@pytest.mark.parametrize("normalization", ["nmt_nfkc", "nfkc_cf"])
def test_characters_that_are_normalized_by_themselves(normalization):
    """A character for which equality is claimed is normalized as SentencePiece does it, and so are its neighbors."""
    tokenizer = SentencePiece.train(DOCUMENTS, 370, normalization)
    theirs = load(tokenizer).normalizer
    blocks = [range(0x3400), range(0xA000, 0xAC00), range(0xD7A4, 0xD800), range(0xF900, 0x13000), range(0x1D000, 0x1FC00)]
    claimed = [character for character in map(chr, itertools.chain(*blocks)) if claims_equality(tokenizer, character)]
    claimed.remove("\n")  # An added token, which the library does not normalize.
    assert len(claimed) > 24_000
    for i in range(0, len(claimed), 1000):
        text = " ".join(f"A{character}A" for character in claimed[i : i + 1000])
        assert theirs.normalize_str(text) == tokenizer.processor.normalize(text).replace("\u2581", " ")


@pytest.mark.parametrize("text", ["E\u0301", "①\u0301", "ｶﾞ", "\u1112\u1161\u11ab", "a\u2581b", "👩\u200d👧"])
def test_no_claim_for_characters_that_are_normalized_together(text):
    assert not claims_equality(SentencePiece.train(DOCUMENTS, 370, "nmt_nfkc"), f"so {text} it is")
    assert claims_equality(SentencePiece.train(DOCUMENTS, 370, "identity"), f"so {text} it is")


def test_merges_do_not_depend_on_how_a_piece_can_be_split():
    """In text of two letters, nearly every piece can be split in several ways into two others."""
    rng = random.Random(0)
    tokenizer = SentencePiece.train(["".join(rng.choices("aab", k=60)) for _ in range(300)], 420, "identity")
    theirs = load(tokenizer)
    for _ in range(300):
        text = "".join(rng.choices("aab", k=80))
        assert theirs.encode(text).ids == tokenizer.encode(text)


def test_merges_worked_out_by_hand():
    scores = {"bc": 0, "ab": -1, "abcd": -2, "abc": -3, "a": -4, "b": -5, "c": -6, "d": -7}
    assert tokenizer_json._merges(scores) == [["b", "c"], ["a", "b"], ["abc", "d"], ["a", "bc"], ["ab", "c"]]


def test_bytes():
    tokenizer = Bytes()
    theirs = load(tokenizer)
    rng = random.Random(0)
    texts = ["", "\n", "aé\n", *(random_text(rng) for _ in range(500))]
    equal, claimed = check(tokenizer, theirs, texts)
    assert equal == claimed == sum("</s>" not in text for text in texts) / len(texts)
    for _ in range(300):
        ids = rng.choices(range(257), k=8)  # Mostly not valid UTF-8.
        assert theirs.decode(ids) == tokenizer.decode(ids)


def test_novels_through_sentencepiece(shared_data):
    paragraphs = sample(novels(shared_data), 3000)
    tokenizer = SentencePiece.train(paragraphs[:1500], 3000, "nmt_nfkc")
    equal, claimed = check(tokenizer, load(tokenizer), paragraphs)
    assert equal == 1
    assert claimed > 0.999


# -- the released encoder ---------------------------------------------------------------------------------------------------


def novels(shared_data) -> list[str]:
    files = sorted(shared_data("novels").rglob("*.txt"))
    assert files
    return [line for file in files[::4] for line in file.read_text().splitlines() if line.strip()]


def sample(texts: list[str], size: int) -> list[str]:
    return random.Random(0).sample(texts, size)


@pytest.fixture(scope="module")
def english():
    pytest.importorskip("ftfy", reason="ftfy (extra gpt1) is not installed")
    pytest.importorskip("spacy", reason="spaCy (extra gpt1) is not installed")


@pytest.fixture(scope="module")
def spelling(tmp_path_factory) -> GPT1:
    """A tokenizer with characters and a few merges, whose ids show where words end."""
    characters = sorted(set(string.printable) - set(string.whitespace) - set(string.ascii_uppercase)) + list("éèàüæ£€")
    merges = ["t h", "th e</w>", "i n", "in g</w>", "n o", "no t</w>", "t h</w>"]
    entries = ["<unk>", *characters, *(c + "</w>" for c in characters), *(m.replace(" ", "") for m in merges), "\n</w>"]
    folder = tmp_path_factory.mktemp("spelling")
    (folder / GPT1.files[0]).write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    (folder / GPT1.files[1]).write_text("#version: 0.2\n" + "".join(m + "\n" for m in merges))
    return GPT1.read(folder)


@pytest.fixture(scope="module")
def released(shared_data, english) -> GPT1:
    return GPT1.read(shared_data("gpt1-bpe"))


def words(theirs, text: str) -> list[str]:
    return [word for word, _ in theirs.pre_tokenizer.pre_tokenize_str(theirs.normalizer.normalize_str(text))]


@pytest.fixture(scope="module")
def theirs_spelling(spelling):
    return load(spelling)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The thing, not THE \u201cTH\u201d!", 'the thing , not the " th " !'),
        ("  Yes.\r\n \n\tNo--\n", "yes . \n no --"),
        ("\x08wait\u2026 a\u2014b??", "wait ... a - b ? ?"),
        ("I don't; can't, cannot. WON'T dont", "i do n't ; ca n't , can not . won't do nt"),
        ("I'd we're who's Its it's id Wed well", "i 'd we 're who 's its it 's i d we d well"),
        ("'Tis 'em, goin' 'cause' dogs' O'Brien's.'", "' tis 'em , goin' 'cause ' dogs ' o'brien 's . '"),
        ("Mr. Smith's U.S. NASA. a. b.c. Ph.D.'s etc.", "mr. smith 's u.s. nasa . a. b.c . ph.d. 's etc ."),
        ("end.Start Mr.Who so...and ...yes so...", "end . start mr. who so ... and ... yes so ..."),
        ("$5.50, 50%. US$3 \u00a34 10km 10am 3rd 12:30:", "$ 5.50 , 50 % . us$ 3 \u00a3 4 10 km 10 am 3rd 12:30 :"),
        ("`` x '' `y' a/b [c] (d_e)", "` ` x '' ` y ' a / b [ c ] ( d _ e )"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_words_of_the_released_encoder(english, spelling, theirs_spelling, text, expected):
    split = EnglishWords()
    ours = ["\n" if word.isspace() else word for part in split.parts(text) for word in split.words(part)]
    assert words(theirs_spelling, text) == ours == expected.split(" ") * bool(expected)
    assert theirs_spelling.encode(text).ids == spelling.encode(text)


MOJIBAKE = "caf\u00c3\u00a9"
UNREPAIRED = [
    MOJIBAKE,
    "caf\u00e9\u201d\u201c",
    "R&amp;D",
    "&eacute; x",
    "a\x1b[31mb",
    "\ufb01ne",
    "\uff21",
    "\u03c3\u03ac\u03c2",
    "a\ud800b",
]
UNUSUAL = "I'd've Mustn't've y'all im. Wed. dogs'' ''Tis 'em.' 's. 5m. 5K. x:p e@f.de <start> a</s>"


@pytest.mark.parametrize("text", [*UNREPAIRED, *UNUSUAL.split()])
def test_no_claim_for_text_that_is_not_plain(spelling, text):
    assert not claims_equality(spelling, text)
    assert not claims_equality(spelling, f"This, then, is it: {text}")


FRONTS = "' ... $ a It's"
CORES = "He it I can could Mr. St. Ph.D. e.g. N.Y. U.S. NASA 'em 'Cause goin goin' nothin' let who there im ima well word"
ENDS = ". ' 's 'S : ... n't 've 'll 'd s d x A .a .A not 's. 1 %"
SHORT = ("a B ' . 1", "s D ' . : é", "3 0 $ % . : km ' m", '- ~ ! + / _ | " * & < = ^ @ ` a')


def chunks(rng: random.Random):
    """Yields all short chunks of characters that have rules, and random chunks of words between marks and endings."""
    for parts in SHORT:
        yield from map("".join, itertools.chain.from_iterable(itertools.product(parts.split(), repeat=n) for n in (1, 2, 3)))
    for _ in range(5000):
        fronts, ends = (rng.choices(parts.split(), k=rng.randrange(3)) for parts in (FRONTS, ENDS))
        yield "".join([*fronts[:1], rng.choice(CORES.split()), *ends])


def test_every_claimed_chunk_among_any_neighbors(english, spelling, theirs_spelling):
    rng = random.Random(0)
    claimed = sorted({chunk for chunk in chunks(rng) if claims_equality(spelling, chunk)})
    assert len(claimed) > 2500
    neighbors = ["b'", "'b", ".", ":", "'", ")", "''", "a", "8", "Mr", '"', "\n"]
    for chunk in claimed:
        text = f"{chunk} {rng.choice(neighbors)} {chunk} {rng.choice(neighbors)}"
        assert theirs_spelling.encode(text).ids == spelling.encode(text), text


def test_generated_text_of_the_released_encoder(english, spelling, theirs_spelling):
    rng = random.Random(0)
    parts = "the cat Cat DON'T don't I'm it's dogs' 'em 'Tis 'cause Mr. U.S. A. a. b. end. end... cannot gonna o'clock nothin'"
    parts += " let's wed id its s d t 3 3.5 $5 £3 50% 1st word.Word so...and and/or café Émile é\u2019s “Yes” … — “ ” \u2018"
    parts += " \u2019 \u00b4 ` ' \" - -- ; , . ? !! ( ) :) :-) xD 8) ^_^ & # @ % = + * \\ | ~ _ < > [ ]"
    glue = [" ", " ", " ", "", "\n", "\t", "\u00a0"]
    texts = ["".join(rng.choice(parts.split()) + rng.choice(glue) for _ in range(rng.randrange(1, 9))) for _ in range(4000)]
    equal, claimed = check(spelling, theirs_spelling, texts)
    assert equal > 0.8
    assert claimed > 0.4


def test_released_ids(released, shared_data):
    golden = [json.loads(line) for line in (shared_data("gpt1-bpe") / "golden.jsonl").read_text().splitlines()]
    theirs = load(released)
    equal = [theirs.encode(case["text"]).ids == case["ids"] for case in golden]
    claimed = [claims_equality(released, case["text"]) for case in golden]
    assert [case["text"] for case, same in zip(golden, equal, strict=True) if not same] == [
        "sch\u00c3\u00b6n caf\u00c3\u00a9 mojibake"
    ]
    assert claimed == equal
    texts = sample(novels(shared_data), 1000)
    glue = shared_data("glue")
    texts += sample([line.split("\t")[3] for line in (glue / "CoLA/train.tsv").read_text().splitlines()], 800)
    texts += sample([line.split("\t")[0] for line in (glue / "SST-2/train.tsv").read_text().splitlines()], 1000)
    equal_share, claimed_share = check(released, theirs, texts)
    assert equal_share > 0.999
    assert claimed_share > 0.995


# -- special tokens, config, differences -------------------------------------------------------------------------------------


def test_special_tokens_stand_where_figure_1_puts_them(spelling):
    theirs = load(Bytes(), SPECIALS)
    assert theirs.encode("ab").ids == [257, 97, 98, 259]
    assert theirs.encode("ab", "c").ids == [257, 97, 98, 258, 99, 259]
    assert theirs.encode("ab", "c").type_ids == [0] * 6
    assert theirs.encode("ab", "c", add_special_tokens=False).ids == [97, 98, 99]
    assert theirs.decode([257, 97, 258, 256, 99, 259]) == "ac"
    assert theirs.get_vocab_size() == 260
    n = spelling.vocab_size
    not_ = spelling.ids["not</w>"]
    assert load(spelling, SPECIALS).encode("not", "Not").ids == [n, not_, n + 1, not_, n + 2]
    assert load(spelling).encode("not", "Not").ids == [not_, not_]


def test_names_of_special_tokens_must_be_new(spelling):
    with pytest.raises(UserError, match=r"--format: huggingface names a special token '</s>', but .*; use npz"):
        convert(Bytes(), ("</s>", "<delimiter>", "<extract>"))
    with pytest.raises(UserError, match=r"special token 'the</w>'"):
        convert(spelling, ("<start>", "the</w>", "<extract>"))


def test_text_that_spells_a_special_token():
    assert not claims_equality(Bytes(), "a <start> b", SPECIALS)
    assert claims_equality(Bytes(), "a <start> b")
    assert not claims_equality(Bytes(), "a </s> b")


def test_no_claim_for_a_lone_surrogate():
    assert not claims_equality(Bytes(), "a\ud800b")


def test_config(spelling):
    config = tokenizer_config(spelling, SPECIALS, 512)
    assert config["model_max_length"] == 512
    assert (config["bos_token"], config["sep_token"], config["cls_token"]) == SPECIALS
    assert config["unk_token"] == config["pad_token"] == "<unk>"
    assert "eos_token" not in config  # It is the newline, which decoding must not remove.
    assert tokenizer_config(Bytes(), (), 8)["eos_token"] == "</s>"


def test_batches_are_padded_with_an_entry_of_the_vocabulary(spelling):
    """A language model continues the end of a row, and a classifier has its extract token there."""
    pieces = SentencePiece.train(DOCUMENTS, 370, "identity")
    for tokenizer, name in ((spelling, "<unk>"), (pieces, "<unk>"), (Bytes(), "</s>")):
        for specials, side in (((), "left"), (SPECIALS, "right")):
            config, converted = tokenizer_config(tokenizer, specials, 16), convert(tokenizer, specials)
            assert (config["pad_token"], config["padding_side"]) == (name, side)
            ids = converted["model"]["vocab"] | {token["content"]: token["id"] for token in converted["added_tokens"]}
            assert ids[name] == tokenizer_json.pad_id(tokenizer)


@pytest.mark.parametrize("specials", [(), SPECIALS])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "gpt1"])
def test_transformers_loads_the_folder(kind, specials, spelling, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = {
        "bytes": Bytes,
        "sentencepiece": lambda: SentencePiece.train(DOCUMENTS, 370, "identity"),
        "gpt1": lambda: spelling,
    }[kind]()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "openai-gpt"}))
    (tmp_path / "tokenizer.json").write_text(json.dumps(convert(tokenizer, specials)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(tokenizer, specials, 16)))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "the cat\nnot <start> <unk> </s> it's"
    ids = theirs(text, add_special_tokens=False)
    assert sorted(ids) == ["attention_mask", "input_ids"]
    assert len(theirs) == tokenizer.vocab_size + len(specials)
    if kind != "gpt1":  # Its words need spaCy.
        assert ids["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(ids["input_ids"]) == text
    elif specials:
        n, the, no = tokenizer.vocab_size, tokenizer.ids["the</w>"], tokenizer.ids["not</w>"]
        batch = theirs(["the", "the"], ["not", "the not"], padding=True)
        assert batch["input_ids"] == [[n, the, n + 1, no, n + 2, 0], [n, the, n + 1, the, no, n + 2]]
    batch = theirs(["the", "the cat"], padding=True)
    sizes = [sum(mask) for mask in batch["attention_mask"]]
    shorter, missing = batch["input_ids"][0], sizes[1] - sizes[0]
    padding = shorter[-missing:] if specials else shorter[:missing]
    assert padding == [tokenizer_json.pad_id(tokenizer)] * missing != []
    assert len(theirs) == tokenizer.vocab_size + len(specials)
    full = theirs("the " * 30, truncation=True)["input_ids"]
    assert len(full) == 16
    assert (full[-1] == tokenizer.vocab_size + 2) == bool(specials)


def test_differences_are_described(spelling):
    assert ["ftfy" in " ".join(differences(tokenizer)) for tokenizer in (spelling, Bytes())] == [True, False]
    sentences = [" ".join(differences(SentencePiece.train(DOCUMENTS, 370, name))) for name in ("identity", "nmt_nfkc")]
    assert ["Combining" in text for text in sentences] == [False, True]
    assert all("special token" in text for text in sentences)
