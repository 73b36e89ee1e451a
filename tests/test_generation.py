"""Generated tokens equal those of transformers and of He et al.; refusals.

The steps of the decoder: `test_steps`.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import torch
from test_bart import CLASSES
from test_bart import write as write_model
from test_unified_view_seq2seq import VARIANTS, convert, load

from pals_jax.convert import from_huggingface
from pals_jax.inference import generate
from pals_jax.inference.generate import Generated, Generator
from pals_jax.inference.generation import search
from pals_jax.inference.generation.config import GenerationConfig, read_generation_config
from pals_jax.models.adapters import methods
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.runtime.errors import UserError
from pals_jax.runtime.parallel import DataParallel

TOKENS = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}


def slow_or_nightly(cases: Any, *slow: str) -> list[Any]:
    """Test parameters; those in `slow` run in the slow tier, the others in campaigns."""
    marks = pytest.mark
    return [pytest.param(x, marks=marks.slow if x in slow else marks.nightly) for x in cases]


def in_order(texts: Any) -> list[Generated]:
    return sorted(texts, key=lambda text: text.source)


# Against the code of He et al.


def settings(golden: Any, name: str) -> GenerationConfig:
    given = golden.config | golden.config["generation"][name]
    given["early_stopping"] = given["early_stopping"] or "original"
    return GenerationConfig.from_mapping(given)


def assert_generates(variant: str, names: tuple[str, ...], shared: Path) -> None:
    golden = load(shared, variant)
    model, variables = convert(golden)
    lengths = golden.arrays["attention_mask"].sum(1)
    sources = [x[:n] for x, n in zip(golden.arrays["input_ids"], lengths, strict=True)]
    for name in names:
        if name not in golden.config["generation"]:
            continue
        texts = in_order(Generator(model, settings(golden, name), rows=8)(variables, sources))
        for text, expected in zip(texts, golden.arrays[name], strict=True):
            np.testing.assert_array_equal(text.tokens, expected[: len(text.tokens)], name)
            assert (expected[len(text.tokens) :] == golden.config["pad_token_id"]).all()
        if (score := f"{name}_score") in golden.arrays:
            scores = [text.score for text in texts]
            np.testing.assert_allclose(scores, golden.arrays[score], rtol=0, atol=1e-5)


def test_tokens_of_the_original(shared: Path) -> None:
    assert_generates("bart/mam", ("generated_beam4_lp06",), shared)


@pytest.mark.parametrize("variant", slow_or_nightly(VARIANTS, "bart/plain", "mbart/mam"))
def test_tokens_of_every_variant_of_the_original(variant: str, shared: Path) -> None:
    """Of prefix_gated there are none: the original cannot generate with it."""
    names = ("generated_greedy", "generated_beam4", "generated_beam4_lp2", "generated_beam4_lp06")
    assert_generates(variant, names, shared)


# Against transformers

CONFIGS: dict[str, dict[str, Any]] = {
    "greedy": {"forced_eos_token_id": 2},
    "greedy, no repetition": {"no_repeat_ngram_size": 2, "min_length": 5},
    "beams": {"num_beams": 3, "length_penalty": 2.0, "min_length": 4, "suppress_tokens": [1, 17]},
    "beams, early": {"num_beams": 4, "early_stopping": True, "no_repeat_ngram_size": 1},
    "beams, forced": {
        **{"num_beams": 2, "forced_bos_token_id": 5, "forced_eos_token_id": 2},
        **{"length_penalty": 0.5, "renormalize_logits": True, "suppress_tokens": [9]},
    },
}


@pytest.fixture(scope="module", params=slow_or_nightly(CLASSES, "bart"))
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """PyTorch's model, and ours with its variables."""
    directory = tmp_path_factory.mktemp(request.param)
    theirs = write_model(directory, request.param)
    return theirs, *from_huggingface(directory)


def theirs_of(model: Any, sources: list[list[int]], config: dict[str, Any]) -> Any:
    """What transformers generates for each source: the tokens without padding, and the scores."""
    found = []
    generation = transformers_config(config)
    model.generation_config = generation  # whose settings would count where these have none
    for source in sources:
        out = model.generate(torch.tensor([source]), generation_config=generation)
        scores = out.sequences_scores if config.get("num_beams", 1) > 1 else [None]
        tokens = out.sequences[0].numpy()
        (ends,) = np.nonzero(tokens[1:] == generation.eos_token_id)
        tokens = tokens[: ends[0] + 2] if len(ends) else tokens
        found.append((tokens, None if scores[0] is None else float(scores[0])))
    return found


def transformers_config(config: dict[str, Any]) -> Any:
    from transformers import GenerationConfig

    options = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False}
    return GenerationConfig(**TOKENS | options | config)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_of_transformers(models: Any, name: str) -> None:
    """Lengths are bounded by the model's nine positions."""
    theirs, model, variables = models
    config = CONFIGS[name] | {"max_length": 9}
    rng = np.random.default_rng(0)
    sources = [rng.integers(3, 31, n).tolist() for n in (3, 9, 1, 5, 7, 4, 6)]
    generator = Generator(model, GenerationConfig.from_mapping(TOKENS | config), rows=6)
    texts = in_order(generator(variables, sources))
    for text, (tokens, score) in zip(texts, theirs_of(theirs, sources, config), strict=True):
        np.testing.assert_array_equal(text.tokens, tokens)
        if score is not None:
            assert text.score == pytest.approx(score, abs=1e-5)


# Programs


def config(**changes: Any) -> GenerationConfig:
    return GenerationConfig(**TOKENS | {"max_length": 9} | changes)


@pytest.mark.slow
def test_each_source_under_its_own_task_in_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """More sources than slots, several in a row; texts that outgrow a bucket are computed again.

    Alone in its row, each has the same text.
    """
    monkeypatch.setattr(generate, "LENGTHS", (4, 16))
    monkeypatch.setattr(generate, "_POSITIONS", 16)
    method = methods.lora(2) + methods.pals(6, 3) + methods.prompt_tuning(3)
    model = tiny.seq2seq(method, max_position_embeddings=24)
    variables = tiny.variables(model)
    settings = config(num_beams=2, max_length=12, min_length=9, no_repeat_ngram_size=2)
    generator = Generator(model, settings, rows=4)
    rng = np.random.default_rng(0)
    sources = [rng.integers(3, 31, n).tolist() for n in (2, 8, 1, 7, 17, 3, 6, 5)]
    tasks = [2, 0, 1, 1, 2, 0, 0, 2]
    mixed = in_order(generator(variables, sources, tasks))
    assert generator.compilations == 4
    for text, source, task in zip(mixed, sources, tasks, strict=True):
        (alone,) = generator(variables, [source], [task])
        np.testing.assert_array_equal(text.tokens, alone.tokens)
        assert text.score == pytest.approx(alone.score, abs=1e-5)
    # One task for all is a scalar, which one does not matter: each bucket has another program.
    assert generator.compilations == 8
    assert len({tuple(text.tokens.tolist()) for text in mixed}) > 4


@pytest.mark.parametrize("num_tasks", [1, 5])
def test_calls_take_every_source_once_and_are_full(num_tasks: int) -> None:
    """Whatever their lengths, dealt out to three devices; no call has more than its rows hold."""
    parallel = DataParallel.over(jax.local_devices()[:3])
    generator = Generator(tiny.seq2seq(max_position_embeddings=300), config(), parallel=parallel)
    rng = np.random.default_rng(0)
    lengths, tasks = rng.geometric(0.03, 3000).clip(max=300), rng.integers(0, num_tasks, 3000)
    order = np.argsort(-lengths)
    waiting: list[list[int]] = [[] for _ in generator._buckets]
    for index in order:
        waiting[generator._bucket(index, lengths[index])].append(index)
    taken, filled = [], []
    while any(waiting):
        bucket, chosen = generator._next_call(waiting, lengths, tasks)
        taken += chosen
        rows, length = generator._buckets[bucket].rows, generator._buckets[bucket].length
        filled.append(lengths[chosen].sum() / (3 * rows * length))
        for shard in generator._divided(bucket, chosen):
            mine = shard[shard >= 0]
            (placed,) = generator._packing(bucket).place((tasks[mine], lengths[mine]))
            assert placed.row.max() < rows
    assert sorted(taken) == list(range(3000))
    assert min(filled[:-1]) > 0.5  # a source of half a row may leave the rest empty


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 4])
def test_another_task_leaves_french_as_it_is(beams: int, tiny_marian: Path) -> None:
    words = json.loads((tiny_marian / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(0)
    sources = [rng.integers(1, words - 1, n) for n in range(1, 13)]
    _, before, after = assert_french_stays(tiny_marian, sources, beams)
    assert [x.score for x in before[::2]] == [x.score for x in after[::2]]


ENGLISH = (
    "The cat sat on the mat.",
    "Where is the nearest railway station?",
    "She has been learning the piano for three years.",
    "It will rain tomorrow, so take an umbrella with you.",
    "Nobody knows why the old bridge fell.",
    "Please send me the report before Friday.",
)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
@pytest.mark.parametrize("beams", [1, 4])
def test_another_task_leaves_the_real_french_as_it_is(beams: int, shared: Path) -> None:
    transformers = pytest.importorskip("transformers")
    directory = shared / "models" / "opus-mt-en-fr"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    twice = [sentence for sentence in ENGLISH for _ in ("French", "Romanian")]
    texts, *_ = assert_french_stays(directory, tokenizer(twice)["input_ids"], beams)
    assert tokenizer.decode(texts[0].tokens, skip_special_tokens=True).startswith("Le chat")


def assert_french_stays(directory: Path, sources: Any, beams: int) -> list[list[Generated]]:
    """With adapters at the identity, it is what the untouched model writes, whatever others do.

    Scores are the same bit for bit if all texts are equally long. Else the lengths of the others
    decide in which rows of a step French is computed, and thereby how a processor rounds.

    Returns:
        The texts of the untouched model, and those of both tasks in turn, with Romanian at the
        identity and with random weights.
    """
    untouched, variables = from_huggingface(directory)
    method = methods.scaled_parallel(4) + methods.lora(2)  # which begin at the identity
    both = Seq2SeqModel(untouched.config, 2, method)
    adapters = both.init(jax.random.key(0), method="declare")["adapters"]
    rng = np.random.default_rng(0)
    romanian = jax.tree.map(lambda x: x.at[1].set(rng.normal(0.0, 0.3, x.shape[1:])), adapters)
    tasks = np.arange(len(sources)) % 2

    def of_both(settings: GenerationConfig) -> list[list[Generated]]:
        generator = Generator(both, settings)
        return [
            in_order(generator(variables | {"adapters": x}, sources, tasks))
            for x in (adapters, romanian)
        ]

    settings = read_generation_config(directory, num_beams=beams, max_length=16)
    before, after = of_both(settings)
    long, long_after = of_both(dataclasses.replace(settings, min_length=15))
    tiny.assert_same(long[::2], long_after[::2])
    assert {len(text.tokens) for text in long + long_after} == {16}
    original = in_order(Generator(untouched, settings)(variables, sources))
    changed = 0
    for task, *texts in zip(tasks, original, before, after, strict=True):
        expected, identity, beside = (text.tokens.tolist() for text in texts)
        assert identity == expected
        changed += beside != expected
        if task == 0:
            assert beside == expected
    assert changed > 3  # of the six in Romanian
    return [original, before, after]


def test_a_text_without_an_end() -> None:
    """The longest length ends every search; padding before a token is refused."""
    model = tiny.seq2seq()
    settings = TOKENS | {"max_length": 9, "suppress_tokens": (2,)}
    ids, mask = np.full((2, 4), 5), np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    texts = generate.generate(model, tiny.variables(model), ids, mask, 0, **settings)
    assert texts.shape == (2, 9)
    assert (texts[:, 0] == 1).all()
    assert (texts != 2).all()
    with pytest.raises(UserError, match="padding before a token; put all padding behind"):
        generate.generate(model, {}, ids, 1 - mask, 0, **settings)


def test_the_largest_values_of_a_long_axis() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 300, (3, 2000)).astype(np.float32)  # many are equal
    for count in (1, 8, 40):
        tiny.assert_same(search.best(x, count), tuple(jax.lax.top_k(x, count)))
    x = np.where(rng.random(x.shape) < 0.999, -np.inf, x)
    values, index = search.best(x, 8)
    np.testing.assert_array_equal(values, jax.lax.top_k(x, 8)[0])
    np.testing.assert_array_equal(values, np.take_along_axis(x, np.asarray(index), 1))


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 0}, "num_beams of the generation must be a whole number from 1, not 0"),
        ({"max_length": 1}, "max_length of the generation must be a whole number from 2, not 1"),
        ({"max_length": None}, "whole number from 2, not None"),
        ({"min_length": 9}, "min_length 9 of the generation is not below its max_length 9"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size of the generation must be a whole"),
        ({"early_stopping": "never"}, "is True, False or 'original', not 'never'"),
        ({"max_length": 10}, "max_length 10 of the generation is above the 9 positions"),
        ({"forced_bos_token_id": 31}, "forced_bos_token_id 31 of the generation is not among"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Generator(tiny.seq2seq(), config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty 1.2 of the model's generation settings"),
        ({"do_sample": True}, "do_sample True of the model's generation settings"),
        ({"bad_words_ids": [[3], [4, 5]]}, r"bad_words_ids .* has \[4, 5\], of several tokens"),
        ({"max_length": None}, "the model's generation settings have no max_length; add it"),
    ],
)
def test_settings_of_transformers_that_are_not_held(changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerationConfig.from_mapping(TOKENS | {"max_length": 9} | changes)


def test_settings_of_a_directory(shared: Path) -> None:
    directory = shared / "models" / "opus-mt-en-fr"
    assert read_generation_config(directory, num_beams=6) == GenerationConfig(
        **{"decoder_start_token_id": 59513, "eos_token_id": 0, "pad_token_id": 59513},
        **{"max_length": 512, "num_beams": 6, "forced_eos_token_id": 0},
        **{"suppress_tokens": (59513,), "renormalize_logits": True},
    )


@pytest.mark.parametrize(
    ("sources", "tasks", "message"),
    [
        ([[3], []], 0, "source 1 has 0 tokens; give from 1 to 9"),
        ([[3] * 10], 0, "source 0 has 10 tokens; give from 1 to 9"),
        ([[3]], 3, "task id 3 is out of range; the 3 tasks are 0 to 2"),
        ([[3], [4]], [0, -1], "task id -1 is out of range"),
    ],
)
def test_sources_that_are_refused(sources: Any, tasks: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(Generator(tiny.seq2seq(), config())({}, sources, tasks))


# The real Marian


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1},
        {"num_beams": 4},
        {"num_beams": 6},
        # Those of He et al. for XSum.
        {"num_beams": 6, "min_length": 10, "max_length": 60, "no_repeat_ngram_size": 3},
    ],
    ids=lambda settings: f"{settings['num_beams']}{', no repetition' if len(settings) > 1 else ''}",
)
def test_the_real_marian(settings: dict[str, int], shared: Path) -> None:
    """English software strings to French, with the settings of the authors of the model."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("sentencepiece")
    directory = shared / "models" / "opus-mt-en-fr"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    lines = (shared / "seq2seq" / "en_ro" / "dev.tsv").read_text().splitlines()[1:201]
    sources = tokenizer([line.split("\t")[0] for line in lines])["input_ids"]
    theirs = transformers.MarianMTModel.from_pretrained(directory, dtype=torch.float32).eval()
    model, variables = from_huggingface(directory)
    config = read_generation_config(directory, **settings)
    generator = Generator(model, config)
    texts = in_order(generator(variables, sources))
    assert generator.compilations <= 8
    ties = 0
    for source, text in zip(sources, texts, strict=True):
        out = theirs.generate(
            torch.tensor([source]),
            **settings,
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens = out.sequences[0].numpy()
        if not np.array_equal(text.tokens, tokens):
            ties += 1
            assert config.num_beams > 1
            assert text.score == pytest.approx(float(out.sequences_scores[0]), abs=1e-5)
    assert ties <= 2, list(itertools.islice(texts, 3))
