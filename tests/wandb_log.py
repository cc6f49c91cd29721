"""Reads what W&B has written: its transaction log, which is what `wandb sync` uploads."""

import json
import struct
from pathlib import Path

import wandb
from wandb.proto.wandb_internal_pb2 import Record


class Written:
    """A transaction log, read back when W&B's process, which writes it, has ended.

    Blocks of 32 KiB hold records in parts: checksum, length, kind (1 whole; 2, 3, 4 first, middle, last part).
    """

    def __init__(self, folder: Path):
        wandb.teardown()
        (path,) = folder.glob("run-*.wandb")
        data, position, part, self.records = path.read_bytes(), 7, b"", []
        while position < len(data):
            if (left := 32768 - position % 32768) < 7:
                position += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, position)
            part += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):
                self.records.append(Record.FromString(part))
                part = b""

    def of(self, kind: str) -> list:
        """Records of a kind."""
        return [getattr(each, kind) for each in self.records if each.WhichOneof("record_type") == kind]

    def config(self) -> dict:
        """As uploaded."""
        return {each.key: json.loads(each.value_json) for each in self.of("run")[0].config.update}

    def history(self) -> list[dict]:
        """Rows, with nested names joined by a slash."""
        return [
            {"/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in self.of("history")
        ]

    def summary(self) -> dict:
        """What is left of all updates."""
        updates = [update for each in self.of("summary") for update in each.update]
        return {each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in updates}
