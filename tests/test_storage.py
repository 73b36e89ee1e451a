"""Files and directories are replaced atomically."""

from pathlib import Path

import pytest

from pals_jax.runtime import storage


def test_what_is_replaced_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("old", "new"):
        with storage.replacing(path) as part:
            part.write_text(text)
            assert path.exists() == (text == "new")
        assert path.read_text() == text
    with storage.replacing(tmp_path / "folder") as part:
        part.mkdir()
        (part / "inside").write_text("")
    assert sorted(x.name for x in tmp_path.rglob("*")) == ["file", "folder", "inside"]


def test_a_failure_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with storage.replacing(path) as part:
            part.write_text("half")
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_text_has_the_rights_of_any_file(tmp_path: Path) -> None:
    """Not those of a temporary file, which only its owner may read."""
    storage.write_text(tmp_path / "one", "text")
    (tmp_path / "other").write_text("text")
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "other").stat().st_mode
