"""What every editor does, whatever its base model."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from pathlib import Path

from data_prep.errors import InputError
from data_prep.model.geometry import Geometry
from eval.request.knobs import AdapterUse
from eval.request.request import Abilities, EditRequest, EditResult, OnProgress


class BaseEditor(ABC):
    """Edits images with one base model, whose parts load when they are first needed."""

    abilities: Abilities

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where the model's files are."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Fingerprint of the model's contents. A model that is only a hub id is downloaded for it."""

    def identity(self, request: EditRequest) -> dict[str, str]:
        """Fingerprints of all models that the request's pictures depend on, by what they are."""
        return {"model": self.fingerprint}

    def revised(self, request: EditRequest) -> dict[str, str]:
        """What this base does otherwise with such a request than when tables got their keys, of which it is a part: what was
        made before is not taken for done. Empty where nothing has changed.

        Raises:
            InputError: as `check`.
        """
        return {}

    def check(self, request: EditRequest) -> None:
        """Loads no weights.

        Raises:
            InputError: this base, with these adapters, cannot serve the request.
        """
        self.abilities.check(request)

    def notes(self, request: EditRequest) -> Sequence[str]:
        """What the user should know of how a request that passed `check` will be served."""
        return ()

    @abstractmethod
    def geometry_for(self, adapters: Sequence[AdapterUse]) -> Geometry:
        """The sizes of images of a request with these adapters that names none.

        Raises:
            InputError: an adapter's header cannot be read.
        """

    @abstractmethod
    def compared_steps(self, request: EditRequest) -> tuple[int, ...]:
        """The step counts that an evaluation tries where none are named.

        Raises:
            InputError: as `check`.
        """

    def preload(self, adapters: Sequence[AdapterUse] = ()) -> None:
        """Loads what the first edit would, so that it does not wait for it.

        Args:
            adapters: that it will have.

        Raises:
            InputError: something is missing, it would not stay loaded, or this base loads with its first edit alone.
        """
        raise InputError(f"{self.abilities.base} is only loaded by its first edit: leave out --preload")

    @abstractmethod
    def edit(self, request: EditRequest, on_progress: OnProgress | None = None) -> list[EditResult]:
        """`request.count` pictures. The same request and seed give the same picture, for any count and order.

        Raises:
            InputError: as `check`.
        """

    def batch_key(self, request: EditRequest) -> Hashable:
        """Requests with one key may be edited together; None for one that must be edited by itself."""
        return None

    def edit_together(
        self, requests: Sequence[EditRequest], on_progress: OnProgress | None = None
    ) -> list[list[EditResult]]:
        """The results of requests with one `batch_key`, as `edit` would give them but for rounding (at most a grey level or
        two of 255)."""
        return [self.edit(request, on_progress) for request in requests]

    def edit_groups(self, groups: Sequence[Sequence[EditRequest]]) -> list[list[list[EditResult]]]:
        """The results of several groups of requests with one `batch_key` each: the pictures that `edit_together` gives of each
        group, or `edit` of a single request."""
        return [self.edit_together(group) if len(group) > 1 else [self.edit(group[0])] for group in groups]
