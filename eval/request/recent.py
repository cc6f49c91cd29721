"""Values that were made before, so that they are not made again: those that were used last, within a number of bytes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """Values by what they were made of.

    Args:
        max_bytes: most bytes of all that is kept; the value that was asked for last is kept whatever it takes.
        num_bytes: bytes of a value.
    """

    def __init__(self, max_bytes: int, num_bytes: Callable[[V], int]):
        self.max_bytes, self.num_bytes, self._total = max_bytes, num_bytes, 0
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of this key; made, if it is not kept."""
        if key not in self._values:
            value = make()  # if it fails, nothing has changed
            self._values[key] = value
            self._total += self.num_bytes(value)
        self._values.move_to_end(key)
        while self._total > self.max_bytes and len(self._values) > 1:
            _, oldest = self._values.popitem(last=False)
            self._total -= self.num_bytes(oldest)
        return self._values[key]

    def clear(self) -> None:
        """Keeps nothing."""
        self._values.clear()
        self._total = 0
