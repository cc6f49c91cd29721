"""The rows that a configuration names, for caching, planning and training."""

from collections.abc import Iterator
from pkgutil import resolve_name

from data_prep.rows.augmentation import Augment
from data_prep.rows.mixture import DatasetSource, read_mixture
from data_prep.rows.rows import EMPTY_PROMPT, RejectedRow, Row, read_rows
from train.config.sections import Config


def takes_text_to_image(config: Config) -> bool:
    """Whether the loss trains rows without a source. One of the user's own does if it says `needs_source = False`."""
    return not getattr(resolve_name(config.loss["_target_"]), "needs_source", True)


def configured_rows(config: Config) -> Iterator[Row | RejectedRow]:
    """The rows of all splits of `data.dataset`: training rows at every area and in every version, the others as they are.

    Raises:
        InputError: a dataset cannot be read.
    """
    data = config.data
    sources = [DatasetSource(**vars(each)) for each in data.datasets]
    yield from read_mixture(sources, Augment(**vars(data.augment)), text_to_image=takes_text_to_image(config))


def validation_rows(config: Config) -> Iterator[Row | RejectedRow]:
    """The rows of `data.validation`. Those without a source are among them, though there is nothing to edit.

    Raises:
        InputError: the dataset cannot be read.
    """
    assert config.data.validation is not None
    yield from read_rows(config.data.validation, config.data.root, text_to_image=True)


def dataset_names(config: Config) -> str:
    """What `data.dataset` names, for people."""
    return ", ".join(each.dataset for each in config.data.datasets)


def preserved_prompts(config: Config) -> tuple[str, ...]:
    """The instructions that `loss.preserve` needs; none where it is 0."""
    if not config.loss.get("preserve"):
        return ()
    return tuple(
        prompt if prompt.strip() else EMPTY_PROMPT for prompt in config.data.preserve_prompts or [EMPTY_PROMPT]
    )
