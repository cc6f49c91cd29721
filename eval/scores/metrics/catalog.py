"""The metrics that can be had here, of all that there are."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.scores.metrics.metric import (
    ALL,
    CAPTION,
    METRICS,
    Example,
    Family,
    Scores,
    SetFamily,
    Unavailable,
    check_names,
)
from eval.scores.metrics.sources import Places

WITHOUT_WEIGHTS = ("pixels.Pixels", "registration.Registration")
"""The others are made from `Places`, and raise `Unavailable`."""


@dataclass
class Battery:
    """The metrics of one evaluation."""

    families: list[Family] = field(default_factory=list)
    sets: list[tuple[str, SetFamily]] = field(default_factory=list)
    """With their names among the families."""
    chosen: frozenset[str] = frozenset(METRICS)
    unavailable: dict[str, str] = field(default_factory=dict)
    """Metric's name -> why it is not measured."""

    def __call__(self, example: Example) -> Scores:
        """The scores of a picture, which is taken into its method's set too."""
        for _, family in self.sets:
            family.add(example)
        scores: Scores = {}
        for family in self.families:
            scores |= family(example)
        if not example.prompt.strip():  # a picture without an instruction
            scores = {name: value for name, value in scores.items() if METRICS[name].against != "instruction"}
        return {name: scores[name] for name in METRICS if name in scores and name in self.chosen}

    def of_sets(self, method: str) -> Scores:
        """The scores of a method's whole set; why there are none is added to `unavailable`."""
        scores: Scores = {}
        for name, family in self.sets:
            try:
                scores |= family.result(method)
            except Unavailable as error:
                self.unavailable |= dict.fromkeys(_of_family(name), str(error))
        return scores


def load_battery(names: Sequence[str] | None, places: Places) -> Battery:
    """The metrics of these names; by default (None) those without weights and those whose weights are found.

    What is named may be fetched; what is not, is only looked for.

    Raises:
        InputError: there is no metric of such a name.
    """
    wanted = list(METRICS) if names is None or ALL in names else [CAPTION, *names]
    check_names(wanted, list(METRICS))
    battery = Battery(chosen=frozenset(wanted))
    for family in dict.fromkeys(METRICS[name].family for name in METRICS if name in wanted):
        module, _, name = family.partition(".")
        make: Any = getattr(importlib.import_module(f"eval.scores.metrics.{module}"), name)
        try:
            loaded: Any = make() if family in WITHOUT_WEIGHTS else make(places)
        except Unavailable as error:
            names = _of_family(family)
            battery.unavailable |= {each: str(error) for each in names if each in wanted}
        else:
            kept: list[Any] = battery.sets if hasattr(loaded, "result") else battery.families
            kept.append((family, loaded) if kept is battery.sets else loaded)
    return battery


def _of_family(family: str) -> list[str]:
    """The names of the metrics that a class measures."""
    return [metric.name for metric in METRICS.values() if metric.family == family]
