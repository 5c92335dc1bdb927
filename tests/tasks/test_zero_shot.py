"""Tests of zero-shot probes: span scores against full logits in NumPy, and the rules by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef

from gpt_jax.config import MeshConfig, ModelConfig
from gpt_jax.data.tokenizers import Bytes, SentencePiece
from gpt_jax.errors import UserError
from gpt_jax.model.network import network
from gpt_jax.model.transformer import ParamSpec, logits
from gpt_jax.runtime.sharding import make_mesh, named_sharding
from gpt_jax.tasks.readers import Example, TaskSplit
from gpt_jax.tasks.registry import TASKS
from gpt_jax.tasks.winograd import read_winograd
from gpt_jax.tasks.zero_shot import PROBES, Span, best_threshold, run_probe, score_spans, token_log_probabilities

TINY = ModelConfig(
    vocab_size=257, context_length=40, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32, lstm_units=16, loss_chunk=16
)
LSTM = ModelConfig(kind="lstm", vocab_size=257, context_length=40, embed_dim=16, num_heads=2, lstm_units=16, loss_chunk=16)


def random_params(config):
    """Returns parameters that are all random. The rows that pad the table are not zero, so that only a mask keeps them out."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(network(config).init, config), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape) / 3, jnp.float32), shapes)


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


@functools.partial(jax.jit, static_argnums=0)
def full_logits(config, params, tokens):
    return logits(config, params, network(config).apply(config, params, tokens))


def log_probability(config, params, ids, scored):
    """Returns the sum over the last `scored` ids in float64, from a sequence on its own that is padded to the context."""
    tokens = np.zeros((1, config.context_length), np.int32)
    tokens[0, : len(ids) - 1] = ids[:-1]
    scores = np.asarray(full_logits(config, params, tokens), np.float64)[0]
    log_probabilities = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return sum(log_probabilities[place - 1, ids[place]] for place in range(len(ids) - scored, len(ids)))


def split_of(rows):
    return TaskSplit([Example(str(n), texts, label, f"made:{n + 1}") for n, (texts, label) in enumerate(rows)], len(rows), {})


# -- tokens -----------------------------------------------------------------------------------------------------------------

SHORT = ModelConfig(vocab_size=150, context_length=12, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32, loss_chunk=4)


def random_tokens(time):
    """Returns tokens and targets of eight rows."""
    return np.random.default_rng(1).integers(0, SHORT.vocab_size, (2, 8, time)).astype(np.int32)


def log_probabilities_by_hand(config, params, tokens, targets):
    """Returns NumPy's log-softmax over the logical vocabulary, float64, of the network's output."""
    hidden = np.asarray(jax.jit(functools.partial(network(config).apply, config))(params, tokens), np.float64)
    scores = hidden @ np.asarray(params["embedding"]["tokens"][: config.vocab_size], np.float64).T
    normalized = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return np.take_along_axis(normalized, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("time", [1, 11, 12])
def test_token_log_probabilities(time):
    tokens, targets = random_tokens(time)
    params = random_params(SHORT)
    actual = token_log_probabilities(SHORT, params, tokens, targets)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, log_probabilities_by_hand(SHORT, params, tokens, targets), atol=1e-5)


@pytest.mark.parametrize("kind", ["transformer", "lstm"])
def test_token_log_probabilities_on_a_mesh(kind):
    config = dataclasses.replace(SHORT, kind=kind, lstm_units=8, loss_chunk=5)
    tokens, targets = random_tokens(12)
    params = random_params(config)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    is_spec = lambda leaf: isinstance(leaf, ParamSpec)  # noqa: E731
    shardings = jax.tree.map(lambda spec: named_sharding(mesh, spec.axes), network(config).param_specs(config), is_leaf=is_spec)
    with jax.set_mesh(mesh):
        actual = token_log_probabilities(config, jax.device_put(params, shardings), tokens, targets)
    np.testing.assert_allclose(actual, log_probabilities_by_hand(config, params, tokens, targets), atol=1e-5)


# -- spans ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, LSTM], ids=lambda config: config.kind)
def test_spans_against_full_logits(config):
    params = random_params(config)
    draw = np.random.default_rng(1)
    lengths = [2, 41, 33, 34, 3, 20, *draw.integers(2, 42, 40)]  # more than one batch of the shorter size
    spans = [Span(draw.integers(0, 257, length).tolist(), int(draw.integers(1, length))) for length in lengths]
    scores = score_spans(config, params, spans)
    expected = np.array([log_probability(config, params, *span) for span in spans])
    np.testing.assert_allclose(scores.total, expected, rtol=1e-5)
    np.testing.assert_allclose(scores.mean, expected / [span.num_scored for span in spans], rtol=1e-5)
    assert not scores.truncated.any()


def test_sequences_longer_than_the_context_lose_their_beginning(params):
    """41 ids fit: 40 are the input of the model, and the last one is only predicted."""
    ids = np.random.default_rng(2).integers(0, 257, 60).tolist()
    scores = score_spans(TINY, params, [Span(ids, 5), Span(ids[19:], 5), Span(ids, 50), Span(ids[19:], 40)])
    assert scores.truncated.tolist() == [True, False, True, False]
    assert scores.total[0] == scores.total[1] == pytest.approx(log_probability(TINY, params, ids[19:], 5), rel=1e-5)
    assert scores.mean[2] == scores.mean[3], "the last 40 tokens of a span that is too long are scored"


def test_few_programs_are_compiled(params):
    token_log_probabilities.clear_cache()
    score_spans(TINY, params, [Span([1] * length, 1) for length in range(2, 42)] * 3)
    assert token_log_probabilities._cache_size() == 2  # padded to 32 and to 40


# -- CoLA's threshold -------------------------------------------------------------------------------------------------------


def test_threshold_by_hand():
    scores, labels = np.array([-1.0, -5.0, -3.0, -2.0, -4.0]), np.array([1, 0, 1, 0, 0])
    # The threshold -3 accepts three, two of them rightly, and refuses two rightly: (2 * 2 - 1 * 0) / sqrt(3 * 2 * 3 * 2) = 0.67.
    # The threshold -1 has (1 * 3 - 0 * 1) / sqrt(1 * 2 * 3 * 4) = 0.61.
    assert best_threshold(scores, labels) == -3.0
    assert best_threshold(scores, 1 - labels) == -5.0, "accepting all correlates with nothing, and that beats a negative one"
    # The thresholds -2 and -4 both have 1 / sqrt(3). Of equal ones, the lowest is chosen.
    assert best_threshold(np.array([-5.0, -4.0, -3.0, -2.0]), np.array([0, 1, 0, 1])) == -4.0
    assert best_threshold(np.array([-2.0, -2.0, -2.0]), np.array([1, 0, 1])) == -2.0


def test_threshold_against_scikit_learn():
    draw = np.random.default_rng(0)
    for _ in range(20):
        labels = draw.integers(0, 2, 50)
        scores = np.round(draw.normal(size=50) + labels, 1)  # with equal scores
        by_threshold = {s: matthews_corrcoef(labels, scores >= s) for s in np.unique(scores)}
        best = best_threshold(scores, labels)
        assert by_threshold[best] == pytest.approx(max(by_threshold.values()), abs=1e-12)
        assert best == min(s for s, value in by_threshold.items() if value > by_threshold[best] - 1e-12)


# -- the probes, end to end -------------------------------------------------------------------------------------------------


def ids_of(text):
    return list(text.encode())


def mean_after(params, context, continuation):
    ids = [256, *ids_of(context), *ids_of(continuation)]
    return log_probability(TINY, params, ids, len(ids_of(continuation))) / len(ids_of(continuation))


def test_cola(params):
    train = [("abc", 1), ("the cat", 0), ("zz z", 1), ("qqq", 0), ("a man", 1), ("xyz xyz", 0)]
    validation = [("a dog", 1), ("of of", 0), ("hm", 1), ("no", 0)]
    splits = {"train": train, "validation": validation}
    splits = {name: split_of([((text,), label) for text, label in rows]) for name, rows in splits.items()}
    result = run_probe("cola", TINY, params, Bytes(), splits)
    means = np.array([mean_after(params, "", text) for text, _ in train])
    labels = np.array([label for _, label in train])
    correlations = [matthews_corrcoef(labels, means >= threshold) for threshold in means]
    threshold = means[int(np.argmax(correlations))]
    assert result["threshold"] == pytest.approx(threshold, rel=1e-5)
    accepted = [mean_after(params, "", text) >= threshold - 1e-6 for text, _ in validation]
    expected = matthews_corrcoef([label for _, label in validation], accepted)
    assert result["matthews"] == pytest.approx(expected)
    assert result["normalized"] == pytest.approx(expected / 0.35)
    assert (result["n"], result["split"], result["truncated"]) == (4, "validation", 0)


def test_choices_by_hand():
    def choices(name, *texts):
        return PROBES[name].choices(Example("0", texts, 0, "made:1"))

    assert choices("cola", "a dog barks") == [("", "a dog barks")]
    assert choices("sst2", "a fine film") == [("a fine film very", " negative"), ("a fine film very", " positive")]
    assert choices("race", "a document why?", "no", "so") == [("a document why?", " no"), ("a document why?", " so")]
    assert choices("story_cloze", "it ended.", "well", "ill") == [("it ended.", " well"), ("it ended.", " ill")]


class Abbreviating(Bytes):
    """A tokenizer with an entry for one of the two words, which spells the other."""

    def encode(self, text):
        return [self.entry] if text == " negative" else super().encode(text)


def test_sst2_sums_the_pieces_of_a_word(params):
    """The least likely token is less likely than nine bytes are on average, but more likely than all nine together."""
    tokenizer = Abbreviating()
    tokens = np.zeros((1, 40), np.int32)
    tokens[0, :7] = [256, *ids_of("a very")]
    tokenizer.entry = int(np.asarray(full_logits(TINY, params, tokens))[0, 6].argmin())
    result = run_probe("sst2", TINY, params, tokenizer, {"validation": split_of([(("a",), 0)])})
    assert result["accuracy"] == 1


def test_sst2_compares_whole_words_after_very(params):
    sentences = ["a fine film", "dull", "it is what it is", "so so", "bad", "great fun"]
    predictions = []
    for sentence in sentences:
        ids = [256, *ids_of(sentence + " very")]
        negative = log_probability(TINY, params, ids + ids_of(" negative"), len(" negative"))
        positive = log_probability(TINY, params, ids + ids_of(" positive"), len(" positive"))
        predictions.append(int(positive > negative))
    labels = [1, 0, *predictions[2:]]
    rows = [((sentence,), label) for sentence, label in zip(sentences, labels, strict=True)]
    result = run_probe("sst2", TINY, params, Bytes(), {"validation": split_of(rows)})
    accuracy = np.mean(np.array(labels) == predictions)
    assert result["accuracy"] == accuracy
    assert result["normalized"] == pytest.approx((accuracy - 0.5) / (0.932 - 0.5))


def test_race_takes_the_answer_of_the_highest_mean(params):
    """With the model's own choices as labels all are right, with others none. The answers differ in length."""
    questions = [
        ("where is it?", "here", "there, I think", "no", "nobody knows"),
        ("who?", "a", "bbbbbbbb", "Mr. C", "the dog of his aunt"),
        ("a document that is too long for its question? why?", "so", "because", "it is", "ha"),
    ]
    chosen = []
    for context, *answers in questions:
        means = []
        for answer in answers:
            ids = [256, *ids_of(f"{context} {answer}")][-41:]
            means.append(log_probability(TINY, params, ids, len(answer) + 1) / (len(answer) + 1))
        chosen.append(int(np.argmax(means)))

    def run(labels):
        return run_probe("race", TINY, params, Bytes(), {"test": split_of(list(zip(questions, labels, strict=True)))})

    right = run(chosen)
    assert (right["accuracy"], right["truncated"]) == (1.0, 1)
    assert right["normalized"] == pytest.approx(0.75 / (0.533 - 0.25))
    assert run([(label + 1) % 4 for label in chosen])["accuracy"] == 0


def test_winograd_scores_what_follows_the_substituted_candidate(params, tmp_path):
    path = tmp_path / "test.c.txt"
    path.write_text("The bee saw the cup as it fell.\nit\nThe bee,the cup\nthe cup\n")
    split = read_winograd(path)
    bee = mean_after(params, "The bee saw the cup as the bee", " fell.")
    cup = mean_after(params, "The bee saw the cup as the cup", " fell.")
    for name in ("dprd", "wsc"):
        result = run_probe(name, TINY, params, Bytes(), {"test": split})
        assert result["accuracy"] == float(cup > bee)
    assert result["normalized"] is None, "the paper has no figure for WSC"


def test_equal_choices_share_the_point(params, tmp_path):
    """A model with equal probabilities for all tokens guesses, even if the right candidate is always the first."""
    path = tmp_path / "wsc.txt"
    path.write_text("It hit me, so _ broke.\n_\nthe cup,the jug\nthe cup\n\n" * 3)
    even = params | {"embedding": jax.tree.map(jnp.zeros_like, params["embedding"])}
    assert run_probe("dprd", TINY, even, Bytes(), {"test": read_winograd(path)})["accuracy"] == 0.5


def test_a_space_belongs_to_the_word_that_follows_it():
    """A text encoded in two parts has the same pieces as the whole text."""
    words = "the film was very positive and the play was very negative but not so very bad " * 20
    pieces = SentencePiece.train([words], 300, "nmt_nfkc")
    for context, continuation in [("the film was very", " positive"), ("the play was very", " negative"), ("not so", " bad")]:
        assert pieces.encode(context) + pieces.encode(continuation) == pieces.encode(context + continuation)


@pytest.mark.parametrize(
    ("name", "texts", "random"),
    [("sst2", 1, 1 / 2), ("race", 5, 1 / 4), ("story_cloze", 3, 1 / 2), ("dprd", 4, 1 / 2), ("wsc", 7, 1 / 5)],
)
def test_the_score_of_guessing_follows_from_the_number_of_choices(params, name, texts, random):
    content = split_of([(("Text.",) * texts, 0)])
    result = run_probe(name, TINY, params, Bytes(), dict.fromkeys(("validation", "test"), content))
    assert result["random"] == pytest.approx(random)
    if name != "sst2":
        assert result["accuracy"] == pytest.approx(random), "all choices are the same"


def test_examples_may_have_different_numbers_of_candidates(params, tmp_path):
    sentence, candidates = "Late at night it fell.\nit\n", ["the cup", "the jug", "a tray", "the pan", "the knife"]
    path = tmp_path / "pdp.txt"
    path.write_text("\n".join(f"{sentence}{','.join(candidates[:count])}\nthe cup\n" for count in (2, 5, 3)))
    means = [mean_after(params, f"Late at night {candidate}", " fell.") for candidate in candidates]
    result = run_probe("wsc", TINY, params, Bytes(), {"test": read_winograd(path)})
    assert result["accuracy"] == pytest.approx(np.mean([np.argmax(means[:count]) == 0 for count in (2, 5, 3)]))
    assert result["random"] == pytest.approx(np.mean([1 / 2, 1 / 5, 1 / 3]))


@pytest.mark.parametrize(("name", "gain"), [("cola", 10.4), ("race", 5.7), ("story_cloze", 8.9)])
def test_the_previous_best_is_the_papers_figure_minus_the_gain_in_section_4_2(name, gain):
    published = TASKS[name].published[TASKS[name].metrics[0], ""]
    assert 100 * PROBES[name].best == pytest.approx(published - gain)


@pytest.mark.parametrize(
    ("name", "splits", "message"),
    [
        ("cloa", {}, "there is no probe 'cloa'; did you mean cola"),
        ("cola", {"validation": split_of([(("a",), 1)])}, "^--zero-shot cola: the train split of CoLA is missing or empty"),
        ("dprd", {"test": split_of([])}, "^--zero-shot dprd: the test split of DPRD is missing or empty"),
        (
            "sst2",
            {"validation": split_of([(("a",), 1), (("b",), None)])},
            "^made:2: the row has no label, but the zero-shot probe 'sst2' needs one$",
        ),
        ("cola", {"train": split_of([(("a",), 1), (("b",), 1)])}, "^made:1: the train split has only one class, but"),
    ],
)
def test_missing_or_unusable_splits_are_refused(params, name, splits, message):
    with pytest.raises(UserError, match=message) as error:
        run_probe(name, TINY, params, Bytes(), splits)
    assert "\n" not in str(error.value)
