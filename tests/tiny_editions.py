"""The tiny model as other editions of Qwen-Image-Edit: the same weights, told apart by `model_index.json`."""

from pathlib import Path

from data_prep.model.directory import COMPONENTS
from scripts.make_tiny_model import write_index


def of_edition(pipeline: str, tiny_model_dir: Path, folder: Path) -> Path:
    """A directory of this pipeline's class."""
    folder.mkdir()
    for name in (*COMPONENTS, "scheduler"):
        (folder / name).symlink_to(tiny_model_dir / name)
    write_index(folder, pipeline)
    return folder
