"""Folders of pictures as people have them."""

import pytest

from data_prep.errors import InputError
from data_prep.folders import list_images, unique_names


def test_images_are_found_by_name_in_order_and_links_do_not_loop(tmp_path):
    for name in ("b.png", "a/ü 图.JPG", "a/c.webp", "notes.txt", ".hidden.png", ".git/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "elsewhere.png").symlink_to(tmp_path / "nowhere.png")
    found = [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)]
    assert found == [
        "a/c.webp",
        "a/ü 图.JPG",
        "b.png",
        "elsewhere.png",
    ]  # the dangling link is for the reader to refuse


@pytest.mark.parametrize(("name", "message"), [("nothing", "is not a folder"), ("empty", "no image file")])
def test_nothing_to_find_is_an_error(name, message, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        list_images(tmp_path / name)


def test_names_are_unique(tmp_path):
    paths = [tmp_path / name for name in ("a/x.jpg", "a/x.png", "b/x.jpg", "y.jpg")]
    assert unique_names(paths, tmp_path) == ["a__x.jpg", "a__x.png", "b__x", "y"]
