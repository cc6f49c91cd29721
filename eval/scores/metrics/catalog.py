"""All metrics there are, and those of them that can be had here."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.scores.metrics.clip import Clip
from eval.scores.metrics.dino import Dino
from eval.scores.metrics.fid import Fid
from eval.scores.metrics.identity import Identity
from eval.scores.metrics.metric import Example, Family, Metric, Scores, SetFamily, Unavailable, check_names
from eval.scores.metrics.perceptual import Dists, Lpips, LpipsPie
from eval.scores.metrics.pixels import Pixels
from eval.scores.metrics.registration import Registration
from eval.scores.metrics.sources import Places

WEIGHTLESS: tuple[type[Any], ...] = (Pixels, Registration)
WEIGHED: tuple[type[Any], ...] = (Lpips, LpipsPie, Dists, Clip, Dino, Identity)
"""Made from `Places`; they raise `Unavailable`."""
METRICS: dict[str, Metric] = {
    metric.name: metric for family in (*WEIGHTLESS, *WEIGHED, Fid) for metric in family.metrics
}
"""By name, in the order of tables."""
ALL = "all"
CAPTION = "psnr"
"""Always measured: it stands under every picture."""


@dataclass
class Battery:
    """The metrics of one evaluation."""

    families: list[Family] = field(default_factory=list)
    sets: list[SetFamily] = field(default_factory=list)
    chosen: frozenset[str] = frozenset(METRICS)
    unavailable: dict[str, str] = field(default_factory=dict)
    """Metric's name -> why it is not measured."""

    def __call__(self, example: Example) -> Scores:
        """The scores of a picture, which is taken into its method's set too."""
        for family in self.sets:
            family.add(example)
        scores: Scores = {}
        for family in self.families:
            scores |= family(example)
        return {name: scores[name] for name in METRICS if name in scores and name in self.chosen}

    def of_sets(self, method: str) -> Scores:
        """The scores of a method's whole set; why there are none is added to `unavailable`."""
        scores: Scores = {}
        for family in self.sets:
            try:
                scores |= family.result(method)
            except Unavailable as error:
                self.unavailable |= {metric.name: str(error) for metric in family.metrics}
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
    for family in (family() for family in WEIGHTLESS):
        if _wanted(family, wanted):
            battery.families.append(family)
    for load in (*WEIGHED, Fid):
        if not _wanted(load, wanted):
            continue
        try:
            loaded: Any = load(places)
        except Unavailable as error:
            battery.unavailable |= {name: str(error) for name in _wanted(load, wanted)}
        else:
            kept: list[Any] = battery.sets if isinstance(loaded, Fid) else battery.families
            kept.append(loaded)
    return battery


def _wanted(family: Any, names: Sequence[str]) -> list[str]:
    return [metric.name for metric in family.metrics if metric.name in names]
