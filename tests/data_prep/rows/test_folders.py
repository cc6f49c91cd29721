"""Folders of pictures as people have them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import InputError
from data_prep.rows.folders import list_images, unique_names


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


@given(st.sets(st.text("ab._/A", min_size=1, max_size=6).map(lambda name: name.strip("/.") or "x"), max_size=12))
def test_names_are_unique_and_fit_for_files(names):
    folder = Path("/photos")
    paths = sorted({folder / f"{name}{ending}" for name in names for ending in (".jpg", ".png")})
    made = unique_names(paths, folder)
    assert len({name.casefold() for name in made}) == len(paths)
    assert not any("/" in name for name in made)


def test_plain_names_stay_plain():
    paths = [Path("/photos") / name for name in ("a/x.jpg", "b/x.jpg", "y.tar.jpg")]
    assert unique_names(paths, Path("/photos")) == ["a__x", "b__x", "y.tar"]
