"""Whether all pictures of a row can be used: what every builder asks that takes pictures as they are."""

from typing import Any

from data_prep.rows.images import check_mask_shape, open_image, open_mask


def check_pictures(row: dict[str, Any]) -> None:
    """Decodes every picture fully.

    Args:
        row: with `image: Path`, `edit_image: list[Path]`, and perhaps `ref_gt` and `back_mask`.

    Raises:
        RejectedImage: the first that cannot be used, or a mask of another shape than the target.
    """
    image = open_image(row["image"])
    for path in row["edit_image"]:
        open_image(path)
    if row.get("ref_gt"):
        open_image(row["ref_gt"])
    if row.get("back_mask"):
        check_mask_shape(open_mask(row["back_mask"]), image, row["back_mask"])
