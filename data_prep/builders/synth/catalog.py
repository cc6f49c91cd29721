"""All recipes by name, and how they are combined to one pair."""

import difflib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_prep.builders.common.results import exact_mask
from data_prep.builders.synth.draft import Backward, Draft, Edit, Forward, NoEdit, Picture, Scene
from data_prep.builders.synth.recipes import colour, damage, grade, light, objects, outpaint, weather
from data_prep.errors import InputError

ATTEMPTS = 8
"""Draws before a photograph is given up for a recipe."""
LEAST_SHARE, LEAST_CHANGE = 0.003, 3.0
"""An edit that shows: this share of the pixels changes, by this much of 255 on average."""
CELL = 8
"""Pixels a side that the VAE makes one latent of: the least that a mask can preserve in training."""


@dataclass(frozen=True)
class Recipe:
    """One kind of edit."""

    edit: Edit
    kinds: tuple[str, ...] = ()
    """Recipes that share a kind contradict each other in one pair: adding fog and removing it."""
    alone: bool = False
    """It cannot be combined with any other."""


RECIPES: dict[str, Recipe] = {
    "recolour": Recipe(colour.recolour, ("colour",)),
    "insert": Recipe(objects.insert),
    "remove": Recipe(objects.remove),
    "cutout": Recipe(objects.on_white, alone=True),
    "grade": Recipe(grade.grade, ("colour", "light")),
    "white_balance": Recipe(Backward(light.colour_cast, light.WHITE_BALANCE), ("light",)),
    "relight": Recipe(Forward(light.relight, light.RELIGHT), ("light",)),
    "add_fog": Recipe(Forward(weather.fog, weather.ADD_FOG), ("fog",)),
    "add_rain": Recipe(Forward(weather.rain, weather.ADD_RAIN), ("fall",)),
    "add_snow": Recipe(Forward(weather.snow, weather.ADD_SNOW), ("fall",)),
    "remove_fog": Recipe(Backward(weather.fog, weather.REMOVE_FOG), ("fog",)),
    "remove_rain": Recipe(Backward(weather.rain, weather.REMOVE_RAIN), ("fall",)),
    "remove_snow": Recipe(Backward(weather.snow, weather.REMOVE_SNOW), ("fall",)),
    "deblur": Recipe(Backward(damage.blur, damage.DEBLUR), ("detail",)),
    "upscale": Recipe(Backward(damage.low_resolution, damage.UPSCALE), ("detail",)),
    "denoise": Recipe(Backward(damage.noise, damage.DENOISE)),
    "clean_jpeg": Recipe(Backward(damage.jpeg, damage.CLEAN_JPEG)),
    "outpaint": Recipe(Backward(outpaint.crop_border, outpaint.PROMPTS)),
}
"""In the order in which edits that are combined are made: colours, objects, light, weather, the camera's faults."""

GROUPS = {
    "all": tuple(RECIPES),
    "weather": ("add_fog", "add_rain", "add_snow", "remove_fog", "remove_rain", "remove_snow"),
    "restore": ("deblur", "upscale", "denoise", "clean_jpeg"),
}


def parse_recipes(text: str) -> list[str]:
    """The recipes of `remove,insert,remove+relight`, each once; in a combination, in the order in which they are done.

    Raises:
        InputError: an unknown name, or recipes that cannot be combined.
    """
    found: list[str] = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        found += GROUPS[word] if word in GROUPS else [_combination(word)]
    if not found:
        raise InputError(f"--recipes names no recipe: choose from {', '.join([*GROUPS, *RECIPES])}")
    return list(dict.fromkeys(found))


def make_draft(photograph: Picture, recipe: str, scene: Scene) -> Draft:
    """The pair of one recipe, or of several joined by `+`.

    Raises:
        NoEdit: it cannot be done with this draw, or it does not show.
    """
    draft = Draft(photograph, photograph)
    for name in recipe.split("+"):
        draft = RECIPES[name].edit(draft, scene)
    changed = (draft.source != draft.target).any(axis=-1)
    amount = np.abs(draft.source.astype(np.int16) - draft.target)[changed]
    if changed.mean() < LEAST_SHARE or amount.mean() < LEAST_CHANGE:
        raise NoEdit("the edit does not show")
    return draft


def instruction(prompts: tuple[str, ...]) -> str:
    """Several instructions as one: "Remove the fog, then make it snow."."""
    return ", then ".join([prompts[0], *(prompt[0].lower() + prompt[1:] for prompt in prompts[1:])]) + "."


def preserved(draft: Draft) -> Image.Image | None:
    """The exact mask, 255 where source and target are the same bit for bit and 0 elsewhere.

    None if not one whole latent's worth of pixels is preserved, as with most edits of the whole picture, where single pixels
    are the same by chance.
    """
    mask = exact_mask(Image.fromarray(draft.source), Image.fromarray(draft.target))
    rows, columns = mask.height // CELL, mask.width // CELL
    cells = np.asarray(mask)[: rows * CELL, : columns * CELL].reshape(rows, CELL, columns, CELL)
    return mask if cells.all(axis=(1, 3)).any() else None


def _combination(word: str) -> str:
    names = [name.strip() for name in word.split("+")]
    for name in names:
        if name not in RECIPES:
            nearest = difflib.get_close_matches(name, [*RECIPES, *GROUPS], n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"choose from {', '.join([*GROUPS, *RECIPES])}"
            raise InputError(f"--recipes: unknown recipe {name!r}: {hint}")
    if len(set(names)) < len(names):
        raise InputError(f"--recipes: {word!r} names a recipe twice")
    kinds = [kind for name in names for kind in RECIPES[name].kinds]
    if len(names) > 1 and any(RECIPES[name].alone for name in names):
        raise InputError(f"--recipes: in {word!r}, cutout cannot be combined with another recipe")
    if len(set(kinds)) < len(kinds):
        raise InputError(f"--recipes: the edits of {word!r} contradict each other, or change the same thing twice")
    return "+".join(name for name in RECIPES if name in names)
