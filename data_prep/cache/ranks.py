"""The processes that build one cache, and how they tell each other small things: through files on the shared disk."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.files import write_text


@dataclass(frozen=True)
class Ranks:
    """This process among the others. No collective but a barrier is needed, so it works under any launcher."""

    rank: int
    world_size: int
    barrier: Callable[[], None]
    """Returns when every rank has called it."""
    folder: Path
    """Where the messages are; on a disk that all ranks share."""

    def exchange(self, name: str, value: Any) -> list[Any]:
        """The JSON values that all ranks passed under this name, by rank."""
        if self.world_size == 1:
            return [value]
        write_text(self._file(name, self.rank), json.dumps(value))
        self.barrier()
        return [json.loads(self._file(name, rank).read_text(encoding="utf-8")) for rank in range(self.world_size)]

    def forget(self) -> None:
        """Waits for all, then deletes what this rank passed."""
        self.barrier()
        for path in self.folder.glob(f"*-{self.rank}.json"):
            path.unlink()
        with contextlib.suppress(OSError):  # not the last to leave
            self.folder.rmdir()

    def _file(self, name: str, rank: int) -> Path:
        return self.folder / f"{name}-{rank}.json"
