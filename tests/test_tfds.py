"""The real builders of TensorFlow Datasets, fed with the official files, without a network."""

import itertools
import json
import socket
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets.text.glue as tfds_glue
import tiny
from etils import epath
from tensorflow_datasets.core.download import DownloadManager

from pals_jax.data import tfds
from pals_jax.data.glue_dir import GlueDir
from pals_jax.data.tasks import GLUE, TEXT_TASKS, Task
from pals_jax.data.tfds import Tfds
from pals_jax.runtime.errors import Unavailable, UserError

MOST = 2000  # rows per file


@pytest.fixture(scope="module")
def official(shared, tmp_path_factory) -> Path:
    """The heads of the official files; those the shared sample lacks are made of their likes."""
    directory = tmp_path_factory.mktemp("official")
    for path in (shared / "glue").glob("*/*.tsv"):
        copy = directory / path.relative_to(shared / "glue")
        copy.parent.mkdir(exist_ok=True)
        with path.open(newline="\n") as lines, copy.open("w", newline="\n") as out:
            out.writelines(itertools.islice(lines, MOST))
    take(directory / "MNLI" / "dev_matched.tsv", "dev_mismatched.tsv", slice(12))
    take(directory / "MNLI" / "dev_matched.tsv", "test_matched.tsv", slice(10))
    take(directory / "MNLI" / "dev_matched.tsv", "test_mismatched.tsv", slice(10))
    take(directory / "QQP" / "dev.tsv", "test.tsv", slice(5))
    return directory


def take(path: Path, name: str, columns: slice) -> None:
    """Some rows and columns of a file as another file beside it."""
    lines = path.read_text().split("\n")[:50:7]
    lines = ["\t".join(line.split("\t")[columns]) for line in lines]
    path.with_name(name).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def microsoft(official) -> dict[str, Path]:
    """MRPC as its makers published it, before GLUE took its dev set out of the training set."""
    directory = official / "MRPC"
    header, *train = (directory / "train.tsv").read_text().rstrip("\n").split("\n")
    _, *dev = (directory / "dev.tsv").read_text().rstrip("\n").split("\n")
    mixed = [*itertools.chain(*zip(dev, train, strict=False)), *train[len(dev) :]]
    assert len(mixed) == len(train) + len(dev)
    path = directory / "msr_paraphrase_train.txt"
    path.write_text("\n".join([header, *mixed]) + "\n", encoding="utf-8-sig")
    return {
        "dev_ids": directory / "dev_ids.tsv",
        "train": path,
        "test": directory / "test.tsv",
    }


@pytest.fixture
def offline(official, microsoft, monkeypatch):
    """Has the builder's downloads come from the official files; the list of what it asked for."""
    asked = []

    def download(self, url):
        asked.append(url)
        if isinstance(url, dict):
            return {key: epath.Path(microsoft[key]) for key in url}
        return epath.Path(official / "diagnostic" / "diagnostic.tsv")

    def download_and_extract(self, url):
        asked.append(url)
        return epath.Path(official)

    monkeypatch.setattr(DownloadManager, "download", download)
    monkeypatch.setattr(DownloadManager, "download_and_extract", download_and_extract)
    return asked


@pytest.mark.parametrize("name", tiny.mostly_slow(GLUE, "mrpc", "mnli", "stsb"))
def test_both_sources_give_the_same_examples(name, official, offline, tmp_path, capsys):
    task, files, prepared = GLUE[name], GlueDir(official), Tfds(tmp_path)
    assert prepared.splits(task) == files.splits(task) == task.splits
    for split in task.splits:
        ours, theirs = files.read(task, split), prepared.read(task, split)
        assert theirs.texts == ours.texts
        assert np.array_equal(theirs.ids, ours.ids)
        if split in task.test_splits:
            assert theirs.targets is ours.targets is None
        else:
            assert theirs.targets.dtype == ours.targets.dtype == np.float32
            assert np.array_equal(theirs.targets, ours.targets)
            assert len(set(ours.targets)) > 1
    assert len(offline) == 1, "prepared once, read back afterwards"
    assert list(tmp_path.rglob("*.array_record-*"))
    assert "tensorflow" not in sys.modules
    assert not capsys.readouterr().out


def test_columns_and_labels_are_those_of_tfds():
    configs = {config.name: config for config in tfds_glue.Glue.BUILDER_CONFIGS}
    for name, task in GLUE.items():
        assert tuple(configs[name].text_features) == task.text
        classes = configs[name].label_classes or []
        assert len(classes) == len(task.labels)
        if task.labels != ("0", "1"):  # as the official files and the server name them
            assert tuple(classes) == task.labels


def test_a_failed_download_leaves_nothing(monkeypatch, tmp_path):
    def download_and_extract(self, url):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(DownloadManager, "download_and_extract", download_and_extract)
    with pytest.raises(Unavailable, match=r"cannot prepare glue/rte in .*: no route to host"):
        Tfds(tmp_path).read(GLUE["rte"], "dev")
    assert not list(tmp_path.rglob("*2.0.0*"))


def test_a_server_that_does_not_answer_is_not_waited_for(monkeypatch, tmp_path, capsys):
    """The real downloader, at a port where someone listens and says nothing."""
    monkeypatch.setattr(tfds, "_ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(tfds, "_TRIES", 2)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/RTE.zip"
        monkeypatch.setattr(
            DownloadManager,
            "download_and_extract",
            lambda self, _: self._downloader._sync_download(url, epath.Path(tmp_path)),
        )
        with pytest.raises(
            Unavailable, match=r"cannot prepare glue/rte .*[Tt]imed? ?out"
        ) as raised:
            Tfds(tmp_path).read(GLUE["rte"], "dev")
    assert raised.value.status == 75
    assert "downloading glue/rte with TensorFlow Datasets" in capsys.readouterr().err


def test_data_prepared_in_another_format(offline, tmp_path):
    Tfds(tmp_path).read(GLUE["wnli"], "dev")
    (info,) = tmp_path.rglob("dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"File format is already set to FileFormat.TFRECORD"):
        Tfds(tmp_path).read(GLUE["wnli"], "dev")


def test_what_tfds_does_not_have(tmp_path):
    with pytest.raises(UserError, match="mine is not a GLUE task"):
        Tfds(tmp_path).read(Task("mine", ("x",)), "train")
    with pytest.raises(UserError, match="rte has no split 'validation'"):
        Tfds(tmp_path).read(GLUE["rte"], "validation")


# Texts to texts, in the layouts of the official files


def rows_of(path: Path, count: int) -> list[dict[str, str]]:
    with path.open() as lines:
        return [json.loads(line) for line in itertools.islice(lines, count)]


def test_xsum(shared, monkeypatch, tmp_path):
    """From the archive that its makers' script extracts, with lines that the builder removes."""
    rows = rows_of(shared / "seq2seq" / "xsum" / "dev.jsonl", 30)
    folder, manual = tmp_path / "xsum-extracts-from-downloads", tmp_path / "manual"
    folder.mkdir()
    manual.mkdir()
    for i, row in enumerate(rows):
        body = row["document"].replace("\n", "\n\n")
        (folder / f"{i}.data").write_text(
            f"[XSUM]URL[XSUM]\nhttp://x\n\n[XSUM]INTRODUCTION[XSUM]\n{row['summary']}\n\n"
            f"[XSUM]RESTBODY[XSUM]\nShare this with\n{body}\n"
        )
    with tarfile.open(manual / f"{folder.name}.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    splits = {"train": range(20), "validation": range(20, 25), "test": range(25, 31)}
    ids = tmp_path / "splits.json"
    ids.write_text(json.dumps({name: [str(i) for i in x] for name, x in splits.items()}))
    monkeypatch.setattr(DownloadManager, "download", lambda self, url: epath.Path(ids))
    monkeypatch.setattr(DownloadManager, "manual_dir", epath.Path(manual))
    monkeypatch.setattr(DownloadManager, "extract", lambda self, path: epath.Path(tmp_path))
    task, source = TEXT_TASKS["xsum"], Tfds(tmp_path / "tfds")
    assert source.splits(task) == ("train", "dev", "test")
    for split, name in (("train", "train"), ("dev", "validation"), ("test", "test")):
        examples = source.read(task, split)
        found = {(text, target) for (text,), target in texts_of(examples)}
        expected = [rows[i] for i in splits[name] if i < 30]  # the last of test is missing
        assert found == {(row["document"].strip(), row["summary"]) for row in expected}
    assert source.is_here(task)
    assert "tensorflow" not in sys.modules


def texts_of(examples):
    assert examples.targets is None
    return zip(examples.texts, examples.target_texts, strict=True)


def test_xsum_that_is_not_there(monkeypatch, tmp_path):
    ids = tmp_path / "splits.json"
    ids.write_text("{}")
    monkeypatch.setattr(DownloadManager, "download", lambda self, url: epath.Path(ids))
    with pytest.raises(UserError, match=r"cannot prepare xsum in .*xsum-extracts-from-downloads"):
        Tfds(tmp_path).read(TEXT_TASKS["xsum"], "dev")


def test_wmt16(shared, monkeypatch, tmp_path):
    """Europarl as two files, SETIMES as one of TMX, news as SGML."""
    lines = (shared / "seq2seq" / "en_ro" / "dev.tsv").read_text().splitlines()[1:41]
    pairs = [tuple(line.split("\t")) for line in lines if "&" not in line and "<" not in line]
    europarl, setimes, dev, test = pairs[:12], pairs[12:20], pairs[20:25], pairs[25:30]
    folder = tmp_path / "training-parallel-ep-v8"
    folder.mkdir()
    for i, language in enumerate(("en", "ro")):
        texts = "\n".join(pair[i] for pair in europarl)
        (folder / f"europarl-v8.ro-en.{language}").write_text(texts)
    units = "".join(
        f'<tu><tuv xml:lang="en"><seg>{en}</seg></tuv><tuv xml:lang="ro"><seg>{ro}</seg></tuv></tu>'
        for en, ro in setimes
    )
    (tmp_path / "en-ro.tmx").write_text(f"<?xml version='1.0'?><tmx><body>{units}</body></tmx>")
    (tmp_path / "dev").mkdir()
    for name, some in (("newsdev2016", dev), ("newstest2016", test)):
        for i, (kind, language) in enumerate((("ref", "en"), ("src", "ro"))):
            segments = "\n".join(f'<seg id="{n}">{p[i]}</seg>' for n, p in enumerate(some, 1))
            (tmp_path / "dev" / f"{name}-roen-{kind}.{language}.sgm").write_text(segments)

    def place(url: str) -> epath.Path:
        return epath.Path(tmp_path / "en-ro.tmx" if "SETIMES" in url else tmp_path)

    def download_and_extract(self, urls):
        if isinstance(urls, str):
            return place(urls)
        if isinstance(urls, list):
            return [place(url) for url in urls]
        return {name: [place(url) for url in some] for name, some in urls.items()}

    monkeypatch.setattr(DownloadManager, "download_and_extract", download_and_extract)
    task, source = TEXT_TASKS["wmt16_enro"], Tfds(tmp_path / "tfds")
    for split, expected in (("train", europarl + setimes), ("dev", dev), ("test", test)):
        examples = source.read(task, split)
        assert sorted((text, target) for (text,), target in texts_of(examples)) == sorted(expected)
    assert (task.source_language, task.target_language) == ("en_XX", "ro_RO")
    assert "tensorflow" not in sys.modules
