"""What is written appears whole under its name, or not at all."""

import pytest

from paddle_dit.files import appears_whole


def test_a_file_or_folder_appears_at_the_end(tmp_path):
    with appears_whole(tmp_path / "new" / "folder") as partial:
        partial.mkdir()
        (partial / "x").write_text("x")
        assert not (tmp_path / "new" / "folder").exists()
    with appears_whole(tmp_path / "new" / "file") as partial:
        partial.write_text("y")
    assert (tmp_path / "new" / "folder" / "x").read_text() == "x"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["file", "folder"]


def test_a_folder_that_is_there_is_replaced(tmp_path):
    for content in ("old", "new"):
        with appears_whole(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / content).write_text(content)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new"]


@pytest.mark.parametrize("kind", ["folder", "file", "nothing"])
def test_what_breaks_leaves_nothing_and_no_parents(tmp_path, kind):
    def breaks():
        with appears_whole(tmp_path / "there" / "a" / "b") as partial:
            if kind == "folder":
                partial.mkdir()
                (partial / "x").write_text("x")
            elif kind == "file":
                partial.write_text("x")
            raise KeyboardInterrupt

    (tmp_path / "there").mkdir()
    with pytest.raises(KeyboardInterrupt):
        breaks()
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
