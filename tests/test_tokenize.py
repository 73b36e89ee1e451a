"""Tokenization compared with transformers', and the robustness of its cache."""

import json
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoTokenizer,
    CanineTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

from pals_jax.data import tokenize
from pals_jax.data.examples import Examples
from pals_jax.data.glue_dir import GlueDir
from pals_jax.data.tasks import GLUE
from pals_jax.data.tokenize import encode, load_tokenizer, tokenize_split
from pals_jax.data.tokenized import TokenizedSplit
from pals_jax.runtime.errors import UserError

PAIRS = Examples([("a cat", "a dog sat"), ("what ?", "who")], np.array([1, 0], np.float32))


@pytest.fixture(scope="module")
def tokenizer(gte_small) -> PreTrainedTokenizerFast:
    return load_tokenizer(gte_small)


def assert_same(one: TokenizedSplit, other: TokenizedSplit) -> None:
    assert one.hidden is None
    assert other.hidden is None
    for name in ("tokens", "offsets", "first", "targets"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def assert_as_transformers(split: TokenizedSplit, examples: Examples, tokenizer, max_length):
    """Compares with one call of the tokenizer per example."""
    assert len(split) == len(examples) == len(split.lengths)
    for i, texts in enumerate(examples.texts):
        expected = tokenizer(
            *texts, truncation=True, max_length=max_length, return_token_type_ids=True
        )
        tokens = split.tokens[split.offsets[i] : split.offsets[i + 1]]
        assert tokens.tolist() == expected["input_ids"]
        assert len(tokens) == split.lengths[i] <= max_length
        types = np.arange(len(tokens)) >= split.first[i]
        assert types.astype(int).tolist() == expected["token_type_ids"]


@pytest.mark.parametrize(("name", "max_length"), [("mrpc", 128), ("mrpc", 40), ("cola", 12)])
def test_real_rows_as_transformers_tokenizes_them(shared, gte_small, tmp_path, name, max_length):
    examples = GlueDir(shared / "glue").read(GLUE[name], "dev")
    split = tokenize_split(examples, load_tokenizer(gte_small), max_length, tmp_path)
    assert_as_transformers(split, examples, AutoTokenizer.from_pretrained(gte_small), max_length)
    np.testing.assert_array_equal(split.targets, examples.targets)
    assert split.lengths.max() == (86 if max_length == 128 else max_length)
    assert [a.dtype for a in (split.tokens, split.offsets, split.first)] == [
        *(np.int32, np.int64, np.int32)
    ]


def test_more_examples_than_a_batch(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenize, "_BATCH", 3)
    examples = Examples([(f"number {i}",) for i in range(10)], None)
    assert_as_transformers(encode(examples, tokenizer, 8), examples, tokenizer, 8)


def test_unlabelled_and_empty(tokenizer, tmp_path):
    split = encode(Examples([("", "")], None), tokenizer, 8)
    assert split.tokens.tolist() == [101, 102, 102]
    assert np.isnan(split.targets).all()
    nothing = tokenize_split(Examples([], None), tokenizer, 8, tmp_path)
    assert (len(nothing), nothing.offsets.tolist(), nothing.tokens.size) == (0, [0], 0)


def test_special_tokens_of_roberta(tmp_path):
    """`<s> a </s></s> b </s>`, all of type 0, from a small tokenizer trained here."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        ["a cat sat on a mat", "the dog"] * 9, 300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"]
    )
    trained.save_model(str(tmp_path))
    RobertaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "roberta")
    tokenizer = load_tokenizer(tmp_path / "roberta")
    examples = Examples([("a cat sat", "on the mat"), ("dog " * 9, "the cat")], None)
    split = encode(examples, tokenizer, 16)
    assert_as_transformers(split, examples, tokenizer, 16)
    assert split.tokens[: split.offsets[1]].tolist().count(2) == 3
    np.testing.assert_array_equal(split.first, split.lengths)
    with pytest.raises(UserError, match="need 6"):
        encode(examples, tokenizer, 5)


# Truncation of pairs.


def truncate_as_bert(a: int, b: int, room: int) -> tuple[int, int]:
    """The lengths that `_truncate_seq_pair` of the original BERT leaves."""
    while a + b > room:
        if a > b:
            a -= 1
        else:
            b -= 1
    return a, b


def truncate_as_documented(a: int, b: int, room: int) -> tuple[int, int]:
    """The same but for the odd token where both pass half the room."""
    if a + b > room and room % 2 and min(a, b) > room // 2:
        return (room // 2 + 1, room // 2) if a > b else (room // 2, room // 2 + 1)
    return truncate_as_bert(a, b, room)


def test_truncation_of_pairs(tokenizer):
    rng = random.Random(0)
    differences = 0
    for max_length in (5, 6, 17, 32, 33):
        lengths = [(rng.randint(1, 40), rng.randint(1, 40)) for _ in range(200)]
        lengths += [(n, n) for n in range(1, 40)]
        examples = Examples([("a " * a, "b " * b) for a, b in lengths], None)
        split = encode(examples, tokenizer, max_length)
        first, second = split.first - 2, split.lengths - split.first - 1
        for (a, b), *kept in zip(lengths, first.tolist(), second.tolist(), strict=True):
            result = tuple(kept)
            assert result == truncate_as_documented(a, b, max_length - 3)
            differences += result != truncate_as_bert(a, b, max_length - 3)
            if max_length % 2:
                assert result == truncate_as_bert(a, b, max_length - 3)
    assert differences


@pytest.mark.parametrize("max_length", [-1, 0, 4])
def test_no_room_for_text(tokenizer, tmp_path, max_length):
    with pytest.raises(UserError, match=f"{max_length} tokens is too small: .* need 5"):
        tokenize_split(PAIRS, tokenizer, max_length, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# The cache.


def test_cache_is_read_back_and_mapped(tokenizer, tmp_path, monkeypatch):
    built = tokenize_split(PAIRS, tokenizer, 16, tmp_path / "new" / "cache")
    assert_same(built, encode(PAIRS, tokenizer, 16))
    monkeypatch.setattr(tokenize, "_encode", None)
    again = tokenize_split(PAIRS, tokenizer, 16, tmp_path / "new" / "cache")
    assert_same(again, built)
    assert isinstance(again.tokens, np.memmap)
    assert not again.tokens.flags.writeable
    with pytest.raises(TypeError):
        tokenize_split(PAIRS, tokenizer, 17, tmp_path / "new" / "cache")


def test_key_follows_data_tokenizer_and_length(tokenizer, minilm, gte_small, tmp_path):
    """And nothing else: not what the tokenizer was last used for."""

    def entries() -> int:
        return len(list(tmp_path.iterdir()))

    tokenize_split(PAIRS, tokenizer, 16, tmp_path)
    tokenizer("x", truncation=True, max_length=3, padding="max_length")
    tokenize_split(PAIRS, tokenizer, 16, tmp_path)
    tokenize_split(PAIRS, load_tokenizer(minilm), 16, tmp_path)  # the same vocabulary and rules
    assert entries() == 1
    joined = Examples([("a cata", " dog sat"), *PAIRS.texts[1:]], PAIRS.targets)
    relabelled = Examples(PAIRS.texts, 1 - PAIRS.targets)
    unlabelled = Examples(PAIRS.texts, None)
    for count, examples in enumerate((joined, relabelled, unlabelled), 2):
        tokenize_split(examples, tokenizer, 16, tmp_path)
        assert entries() == count
    tokenize_split(PAIRS, tokenizer, 17, tmp_path)
    assert entries() == 5
    cased = load_tokenizer(gte_small)
    cased.backend_tokenizer.normalizer.lowercase = False
    tokenize_split(PAIRS, cased, 16, tmp_path)
    literal = load_tokenizer(gte_small)
    literal.split_special_tokens = True
    tokenize_split(PAIRS, literal, 16, tmp_path)
    left = load_tokenizer(gte_small)
    left.truncation_side = "left"
    tokenize_split(PAIRS, left, 16, tmp_path)
    assert entries() == 8


def _many() -> Examples:
    texts = [(f"row {i} of many rows", "and its pair") for i in range(3000)]
    return Examples(texts, np.arange(3000, dtype=np.float32))


def _build(model: Path, cache: Path, barrier, pause: bool) -> None:
    """In another process: builds the cache when all are ready, or stops half-way for ever."""
    tokenizer = load_tokenizer(model)
    if pause:
        save = TokenizedSplit.save

        def save_and_stop(self, directory):
            save(self, directory)
            (directory / "targets.npy").unlink()
            barrier.wait()
            signal.pause()

        TokenizedSplit.save = save_and_stop
    else:
        encode = tokenize._encode

        def encode_together(*args):
            split = encode(*args)
            barrier.wait()  # neither has found the other's cache
            return split

        tokenize._encode = encode_together
    tokenize_split(_many(), tokenizer, 16, cache)


def start(context, *args) -> multiprocessing.Process:
    process = context.Process(target=_build, args=args)
    process.start()
    return process


@pytest.mark.slow
def test_two_processes_build_at_once(tokenizer, gte_small, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2, timeout=60)
    processes = [start(context, gte_small, tmp_path, barrier, False) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    (entry,) = tmp_path.iterdir()
    assert sorted(path.name for path in entry.iterdir()) == [
        *("first.npy", "offsets.npy", "targets.npy", "tokens.npy")
    ]
    assert_same(TokenizedSplit.load(entry), encode(_many(), tokenizer, 16))


@pytest.mark.slow
def test_a_killed_build_is_not_a_cache(tokenizer, gte_small, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2, timeout=60)
    process = start(context, gte_small, tmp_path, barrier, True)
    barrier.wait()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("building-")
    split = tokenize_split(_many(), tokenizer, 16, tmp_path)
    assert_same(split, encode(_many(), tokenizer, 16))


def test_a_failed_build_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    def save(self, directory):
        directory.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TokenizedSplit, "save", save)
    with pytest.raises(UserError, match=r"cannot write the cache .*No space left"):
        tokenize_split(PAIRS, tokenizer, 16, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written(tokenizer, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot write the cache"):
        tokenize_split(PAIRS, tokenizer, 16, tmp_path / "cache")


# Loading tokenizers.


def test_tokenizer_of_the_packaged_encoder(minilm, tokenizer):
    """Its file asks for padding to 128, which must not reach the cache."""
    assert_same(encode(PAIRS, load_tokenizer(minilm), 16), encode(PAIRS, tokenizer, 16))


@pytest.mark.parametrize("fixture", ["gte_small", "minilm", "tiny_encoder", "tiny_roberta"])
@pytest.mark.parametrize("saved", [False, True])
def test_tokenizers_are_those_of_auto_tokenizer(fixture, saved, request, tmp_path):
    """As a hub has them, and, without a config.json, as a workdir has."""
    folder = request.getfixturevalue(fixture)
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if saved:
        theirs.save_pretrained(tmp_path)
        theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = load_tokenizer(tmp_path if saved else folder)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert {**ours.init_kwargs, "_from_auto": 0} == {**theirs.init_kwargs, "_from_auto": 0}


@pytest.mark.parametrize("change", [{"auto_map": {}}, {"tokenizer_class": "Other"}])
def test_other_tokenizers_are_left_to_auto_tokenizer(change, gte_small, tmp_path):
    declared = json.loads((gte_small / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    assert tokenize._tokenizer_class(tmp_path) is not AutoTokenizer
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared | change))
    assert tokenize._tokenizer_class(tmp_path) is AutoTokenizer


def test_tokenizer_from_a_vocabulary_alone(gte_small, tokenizer, tmp_path):
    for name in ("vocab.txt", "config.json"):
        shutil.copyfile(gte_small / name, tmp_path / name)
    assert_same(encode(PAIRS, load_tokenizer(tmp_path), 16), encode(PAIRS, tokenizer, 16))


def test_directories_without_a_tokenizer(gte_small, tmp_path):
    with pytest.raises(UserError, match="no usable tokenizer in"):
        load_tokenizer(tmp_path)
    shutil.copyfile(gte_small / "config.json", tmp_path / "config.json")
    with pytest.raises(UserError, match=r"no tokenizer in .* needs vocab.txt or tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(UserError, match="no usable tokenizer in"):
        load_tokenizer(tmp_path)


def test_a_name_that_is_nowhere(tmp_path):
    with pytest.raises(UserError, match="is no directory and cannot be fetched from the hub"):
        load_tokenizer(tmp_path / "absent")


def test_a_slow_tokenizer_is_refused(tmp_path):
    CanineTokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a fast one"):
        load_tokenizer(tmp_path)
