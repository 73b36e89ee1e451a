"""Pairs of texts: declared, read, tokenised as by their model's own tokenizer, and placed."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_jax.data.batches import Layout, TrainBatches
from pals_jax.data.examples import Examples
from pals_jax.data.own_tasks import own_task
from pals_jax.data.packing import Packed, Padded, Shape
from pals_jax.data.pairs import PairEncoder, PairTokenizer
from pals_jax.data.sampler import Draw
from pals_jax.data.tasks import Task
from pals_jax.data.tokenize import encode_once
from pals_jax.data.tokenized import TokenizedSplit, TokenizedTargets
from pals_jax.runtime.errors import UserError
from pals_jax.runtime.shards import Shards

# Declared and read


def declared(directory: Path, content: str, **changes: Any) -> Any:
    path = directory / "train.tsv"
    path.write_text(content)
    return own_task("ro", {"train": path, "text": "en", "target": "ro"} | changes)


def test_a_task_with_a_target_text(tmp_path: Path) -> None:
    task, source = declared(tmp_path, "en\tro\na box\to cutie\na cup\to ceașcă\n")
    assert (task.output, task.num_outputs, task.is_regression) == ("text", 0, False)
    assert task.metrics == ("loss", "perplexity")
    assert source.read(task, "train") == Examples(
        [("a box",), ("a cup",)], None, ["o cutie", "o ceașcă"]
    )
    assert Task.from_json({"name": "ro", "text": ["en"], "target": "ro"}).output == "text"


BAD = {
    "train.tsv, line 3: the target in column 'ro' is empty; task ro needs": "a\tb\nc\t \n",
    "train.tsv, line 2: there is no column 'ro'": None,
}


@pytest.mark.parametrize("message", BAD)
def test_targets_that_are_missing(message: str, tmp_path: Path) -> None:
    rows = BAD[message]
    content = "en\tfr\na\tb\n" if rows is None else f"en\tro\n{rows}"
    task, source = declared(tmp_path, content)
    with pytest.raises(UserError) as error:
        source.read(task, "train")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "ro"}, "declared with label, of no use in a task with a target text; remove"),
        ({"regression": True}, "declared with regression, of no use in a task with a target"),
        ({"target": None, "label": "ro", "target_language": "ro"}, "target_language, of no use in"),
        ({"target": ["ro"]}, r"target = \['ro'\]; give one name"),
        ({"text": ("en", "ro")}, "2 text columns; give one"),
        ({"target": None}, "the declaration of task ro lacks label"),
    ],
)
def test_declarations_that_do_not_fit(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        declared(tmp_path, "en\tro\na\tb\nc\td\n", **changes)


def test_a_saved_task_that_contradicts_itself() -> None:
    for fields in ({"labels": ("a", "b")}, {"text": ("a", "b")}, {"label_range": (0, 1)}):
        with pytest.raises(TypeError):
            Task(**{"name": "x", "text": ("a",), "target": "b"} | fields).check()


# Tokenised


@pytest.fixture(scope="module")
def marian(tiny_marian: Path) -> PairTokenizer:
    return PairTokenizer.load(tiny_marian, "marian", 7)


@pytest.fixture(scope="module")
def mbart(tiny_mbart: Path) -> PairTokenizer:
    return PairTokenizer.load(tiny_mbart, "mbart", None)


PAIRS = Examples([("red box",), ("a small old cup",)], None, ["blue box", "the hat"])


def texts(split: TokenizedSplit, tokenizer: PairTokenizer) -> list[tuple[list[str], list[str]]]:
    """The tokens of sources and targets, as words."""
    both = []
    for i in range(len(split)):
        found = []
        for tokens, offsets in (
            (split.tokens, split.offsets),
            (split.target_texts.tokens, split.target_texts.offsets),
        ):
            ids = tokens[offsets[i] : offsets[i + 1]].tolist()
            found.append(tokenizer.tokenizer.convert_ids_to_tokens(ids))
        both.append(tuple(found))
    return both


def test_marian_cuts_sources_and_targets_by_models_of_their_own(marian: PairTokenizer) -> None:
    """The start token is before a target; a target in capitals is known to its model alone."""
    split = PairEncoder(marian, 16, 16)(Examples([("red box",)], None, ["RED BOX"]))
    source, target = (x[0].tolist() for x in (split.tokens[None], split.target_texts.tokens[None]))
    assert source == marian.tokenizer("red box")["input_ids"]
    assert target == [7, *marian.tokenizer(text_target="RED BOX")["input_ids"]]
    assert source[-1] == target[-1] == 0
    assert 1 not in source + target
    assert split.sizes.tolist() == [[len(source), len(target) - 1]]
    assert np.isnan(split.targets).all()


def test_a_marian_of_several_languages(tiny_marian: Path, tmp_path: Path) -> None:
    """The language is a token before the source."""
    for path in tiny_marian.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    ids = json.loads((tmp_path / "vocab.json").read_text())
    codes = {">>fr<<": len(ids), ">>ro<<": len(ids) + 1}
    (tmp_path / "vocab.json").write_text(json.dumps(ids | codes))
    tokenizer = PairTokenizer.load(tmp_path, "marian", 7)
    assert tokenizer.languages == ("fr", "ro")
    source, same = (
        PairEncoder(tokenizer, 16, 16, target_language=code)(PAIRS).tokens[:4].tolist()
        for code in ("ro", "fr")
    )
    assert (source[0], same[0]) == (codes[">>ro<<"], codes[">>fr<<"])
    assert source[1:] == same[1:] == tokenizer.tokenizer("red box")["input_ids"][:3]
    with pytest.raises(UserError, match="target_language: a code is missing for the tokenizer"):
        PairEncoder(tokenizer, 16, 16)


def test_long_texts_are_cut_at_their_ends(marian: PairTokenizer) -> None:
    split = PairEncoder(marian, 4, 3)(Examples([("red old box " * 9,)], None, ["RED " * 9]))
    assert split.sizes.tolist() == [[4, 3]]
    assert (split.tokens[-1], split.target_texts.tokens[-1]) == (0, 0)


def test_mbart_has_the_language_at_the_end_and_starts_with_it(mbart: PairTokenizer) -> None:
    split = PairEncoder(mbart, 16, 16, "en_XX", "ro_RO")(PAIRS)
    assert texts(split, mbart) == [
        (["▁red", "▁box", "</s>", "en_XX"], ["ro_RO", "▁blue", "▁box", "</s>", "ro_RO"]),
        (
            ["▁a", "▁small", "▁old", "▁cup", "</s>", "en_XX"],
            ["ro_RO", "▁the", "▁hat", "</s>", "ro_RO"],
        ),
    ]
    content = mbart.content
    french = PairEncoder(mbart, 16, 16, "ro_RO", "fr_XX")(PAIRS)
    assert texts(french, mbart)[0][1][0] == "fr_XX"
    assert mbart.content == content  # whatever languages it was used for last


def test_a_language_code_that_the_tokenizer_has_not(
    marian: PairTokenizer, mbart: PairTokenizer
) -> None:
    for tokenizer, codes, message in (
        (mbart, ("en_XX", "xx_XX"), "target_language: there is no 'xx_XX' in the tokenizer, which"),
        (mbart, ("en", "ro_RO"), "source_language: there is no 'en' in the tokenizer, which has"),
        (mbart, ("", "ro_RO"), "source_language: a code is missing for the tokenizer, which has"),
        (marian, ("", "ro"), "target_language 'ro': the tokenizer of this marian model has no"),
        (marian, ("en", ""), "source_language 'en': the tokenizer of this marian model has no"),
    ):
        with pytest.raises(UserError, match=message):
            PairEncoder(tokenizer, 16, 16, *codes)


def test_tokens_are_made_once(
    marian: PairTokenizer, mbart: PairTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = PairEncoder(marian, 16, 16)
    built = encode_once(PAIRS, encoder, tmp_path)
    others = (
        PairEncoder(marian, 16, 15),
        PairEncoder(PairTokenizer(marian.tokenizer, "marian", 8), 16, 16),
        PairEncoder(mbart, 16, 16, "en_XX", "ro_RO"),
        PairEncoder(mbart, 16, 16, "ro_RO", "en_XX"),
    )
    for count, other in enumerate(others, 2):
        encode_once(PAIRS, other, tmp_path)
        assert len(list(tmp_path.iterdir())) == count
    monkeypatch.setattr(PairEncoder, "__call__", None)
    again = encode_once(PAIRS, encoder, tmp_path)
    np.testing.assert_array_equal(again.tokens, built.tokens)
    np.testing.assert_array_equal(again.target_texts.tokens, built.target_texts.tokens)


def test_a_language_before_the_texts(tmp_path: Path) -> None:
    """As mBART-50 has it, whose decoder does not start with the language."""
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "MBart50Tokenizer"}')
    with pytest.raises(UserError, match=r"is that of mBART-50, .* facebook/mbart-large-cc25 does"):
        PairTokenizer.load(tmp_path, "mbart", None)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    for model_type, needed in (("marian", "source.spm"), ("bart", "vocab.json")):
        with pytest.raises(UserError, match=f"there is no tokenizer in .*{needed}"):
            PairTokenizer.load(tmp_path, model_type, 2)


def test_the_real_marian(shared: Path) -> None:
    """Romanian is written in pieces of the French model; few of them are unknown."""
    tokenizer = PairTokenizer.load(shared / "models" / "opus-mt-en-fr", "marian", 59513)
    path = shared / "seq2seq" / "en_ro" / "dev.tsv"
    task, source = own_task("ro", {"train": str(path), "text": "en", "target": "ro"})
    split = PairEncoder(tokenizer, 128, 128)(source.read(task, "train"))
    sizes = split.sizes
    assert len(split) == 500
    assert 15 <= np.median(sizes[:, 1]) <= 22
    assert (split.target_texts.tokens == 1).mean() < 0.01
    starts = split.target_texts.offsets[:-1]
    assert (split.target_texts.tokens[starts] == 59513).all()
    ends = split.target_texts.offsets[1:] - 1
    assert (split.target_texts.tokens[ends] == 0).all()


# Placed

pair = st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 30))
draws = st.lists(pair, min_size=1, max_size=24)


@given(st.lists(draws, min_size=1, max_size=3), st.integers(1, 8), st.sampled_from([0, 5]), draws)
def test_every_pair_has_a_place_of_its_own(samples, shards: int, prompts: int, draw) -> None:
    """Source and target in one row each, of one task, where nothing else lies."""

    def sizes(sample: Any) -> tuple[np.ndarray, np.ndarray]:
        tasks, *lengths = np.array(sample).T
        return tasks, np.stack(lengths, axis=1)

    batches = [sizes(sample) for sample in samples]
    packed = Packed.choose(batches, 1000, 24, (40, 30), 384, shards, prompts, target_cost=3.0)
    for tasks, lengths in (*batches, sizes(draw)):
        for placing in (packed, Padded(24, (40, 30), shards)):
            (placement,) = placing.place((tasks, lengths))
            rows, *room = placement.shape
            assert rows % shards == 0
            starts = placement.start, placement.target_start
            for text, (length, start) in enumerate(zip(room, starts, strict=True)):
                taken = np.full((rows, length), -1)
                for n, (row, begin) in enumerate(zip(placement.row, start, strict=True)):
                    place = taken[row, begin : begin + lengths[n, text]]
                    assert place.shape == (lengths[n, text],)
                    assert (place == -1).all()
                    place[:] = n
            for row in range(rows):
                mine = placement.row == row
                assert len(set(tasks[mine])) <= 1
                assert len(set(placement.slot[mine])) == mine.sum() <= placement.slots


def test_short_pairs_share_rows() -> None:
    rng = np.random.default_rng(0)
    sources = rng.lognormal(2.3, 0.5, (200, 32)).clip(4, 64).astype(int)
    targets = (sources * rng.normal(1.5, 0.3, sources.shape)).clip(3, 96).astype(int)
    samples = [(np.zeros(32, int), np.stack(x, axis=1)) for x in zip(sources, targets, strict=True)]
    packed = Packed.choose(samples, 10_000, 32, (64, 96), 512, target_cost=3.0)
    assert len(packed.shapes) <= 8
    positions = sum(packed.place(sample)[0].shape.positions for sample in samples)
    assert sources.sum() + targets.sum() > 0.7 * positions
    assert positions < 0.4 * 200 * Shape(32, 64, 96).positions


def test_a_batch_of_pairs() -> None:
    """Inputs, shifted by one to the labels, in the rows of the sources."""
    offsets = np.array([0, 3, 5, 9])
    targets = TokenizedTargets(np.arange(50, 61, dtype=np.int32), np.array([0, 4, 7, 11]))
    lengths = np.diff(offsets)
    split = TokenizedSplit(
        np.arange(10, 19, dtype=np.int32),
        offsets,
        lengths,
        np.full(3, np.nan, np.float32),
        target_texts=targets,
    )
    draw = Draw(np.array([0], np.int32), np.array([[0, 1, 2]]))
    make = TrainBatches([split], Layout(7, 0), Packed((Shape(2, 8, 6),), 2), Shards(), 0, 1)
    batch = jax.tree.map(lambda x: x[0], make(draw))
    assert batch.token_type_ids is batch.targets is None
    texts = batch.target_texts
    np.testing.assert_array_equal(batch.example_ids, [[0, 2, -1, -1], [1, -1, -1, -1]])
    np.testing.assert_array_equal(
        batch.input_ids, [[10, 11, 12, 15, 16, 17, 18, 7], [13, 14] + [7] * 6]
    )
    np.testing.assert_array_equal(texts.input_ids, [[50, 51, 52, 57, 58, 59], [54, 55] + [7] * 4])
    np.testing.assert_array_equal(texts.labels, [[51, 52, 53, 58, 59, 60], [55, 56] + [7] * 4])
    np.testing.assert_array_equal(texts.attention_mask, [[1, 1, 1, 2, 2, 2], [1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(texts.first, [[0, 3, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.weights, batch.example_ids >= 0)
