"""A dataset's rows -> training and validation, so that no picture of one is known from the other."""

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data_prep.builders.common.dataset import lines_file, tell_rejected
from data_prep.builders.common.relocation import moved_row
from data_prep.builders.split.stratification import choose_validation
from data_prep.cli import CORES, Engine, OnError, Processes, Seed
from data_prep.errors import InputError
from data_prep.jobs.engines import make_engine
from data_prep.jobs.items import PARTS_FOLDER, Item, Result, run_items
from data_prep.rows.duplicates import HASH_BYTES, image_hash, same_content
from data_prep.rows.images import open_image
from data_prep.rows.rows import RejectedRow, Row, is_absent, read_rows
from data_prep.rows.tables import read_table

REJECTED, TRAIN, VALIDATION = range(3)
SHOWN = 20
"""Strata in the table."""

Stratify = Literal["prompt", "tag", "none"]


def command(
    dataset: Annotated[Path, typer.Option(help="Dataset file to read. It is not changed.")],
    out: Annotated[
        Path, typer.Option(help="The .jsonl file to write. Rejected rows are listed in NAME.rejected.jsonl.")
    ],
    validation: Annotated[
        str, typer.Option(help="Validation rows: a share of all rows, such as 0.1, or a number, such as 200.")
    ],
    root: Annotated[
        Path | None, typer.Option(help="Folder that relative paths start from.", show_default="the dataset's folder")
    ] = None,
    stratify: Annotated[
        Stratify, typer.Option(help="Column whose values get the same shares in training and validation.")
    ] = "tag",
    seed: Seed = 0,
    processes: Processes = CORES,
    engine: Engine = "local",
    on_error: OnError = "raise",
) -> None:
    """Writes the rows to a new file with `split` set to train or validation, so that the two parts share no photograph.

    Rows stay together if they have the same `group`, or if their target or bridge source is the same image: the same file, or
    a copy that was saved again, resized, made a little brighter, marked, or cropped by up to 3 %. Other sources do not tie
    rows together, and neither do plain images: a logo or a white page may be in every row. Rows are not changed otherwise,
    except that relative paths are adapted if the new file is in another folder, and that a row without `id` gets one from its
    number. Rows that are already train or validation are drawn again. Rows of any other split, such as test, are refused.

    python data_prep/run.py split --dataset photos/dataset.jsonl --out photos/split.jsonl --validation 0.1
    """
    wanted = parse_validation(validation)
    _check_out(out, dataset)
    source, report = str(dataset), out.with_suffix(".rejected.jsonl")
    _check_splits(read_rows(source, root))
    content = Content()
    workers = make_engine(engine, processes, preload=["numpy", "PIL.Image", "imagehash", "data_prep.rows.duplicates"])
    first, num_rejected = None, 0
    with lines_file(report) as write_rejected:
        items = content.items(read_rows(source, root), stratify)
        for answer in run_items(items, HashPictures(), out.parent / PARTS_FOLDER, workers, "split"):
            if isinstance(answer, RejectedRow):
                first, num_rejected = first or answer, num_rejected + 1
                write_rejected(answer.to_json())
            else:
                content.add(answer.item.number, answer.value)
    if not content.numbers:
        tell_rejected(first, num_rejected, report, "raise")
    parts = content.split(wanted, np.random.default_rng(seed))
    _write(source, root, out, parts, stratify)
    tell_rejected(first, num_rejected, report, on_error)


def parse_validation(text: str) -> float | int:
    """A share in (0, 1), or a number of rows from 1.

    Raises:
        InputError: neither.
    """
    try:
        value = int(text) if text.strip().isdecimal() else float(text)
    except ValueError:
        value = 0
    if not (value >= 1 if isinstance(value, int) else 0 < value < 1):
        raise InputError(
            f"--validation must be a share between 0 and 1 or a whole number of rows, 1 or more, got {text!r}"
        )
    return value


@dataclass(frozen=True)
class HashPictures:
    """The hashes of a row's bridge source and target, as hexadecimal text."""

    def __call__(self, item: Item) -> Result:
        return Result([image_hash(open_image(path)).hex() for path in item.files])


@dataclass
class Content:
    """What is known of the rows: about 120 bytes of each, whatever their prompts and paths."""

    group_of: array = field(default_factory=lambda: array("q"))
    """For every row of the file, the number of its `group`; 0 for none."""
    stratum_of: array = field(default_factory=lambda: array("q"))
    """The stratum of every row of the file."""
    numbers: array = field(default_factory=lambda: array("q"))
    """The numbers of the usable rows, from 1."""
    hashes: bytearray = field(default_factory=bytearray)
    """The hashes of the usable rows, two for each."""

    def items(self, rows: Iterator[Row | RejectedRow], stratify: Stratify) -> Iterator[Item | RejectedRow]:
        """Passes rows on to be hashed, and notes the rest of what is asked of them."""
        for row in rows:
            known = isinstance(row, Row)
            self.group_of.append(_number(row.group) if known and row.group else 0)
            self.stratum_of.append(_number(_stratum(row, stratify)) if known else 0)
            yield Item(row.number, row.id, (row.edit_image[row.bridge_image], row.image)) if known else row

    def add(self, number: int, hashes: list[str]) -> None:
        """Notes a row's hashes."""
        self.numbers.append(number)
        for text in hashes:
            self.hashes += bytes.fromhex(text)

    def split(self, wanted: float | int, rng: np.random.Generator) -> NDArray[np.uint8]:
        """REJECTED, TRAIN or VALIDATION for each row of the file. Says so if it is not as many as wanted.

        Raises:
            InputError: it cannot be split.
        """
        usable = np.array(self.numbers) - 1
        size = len(usable)
        number = wanted if isinstance(wanted, int) else max(1, round(wanted * size))
        if number >= size:
            raise InputError(f"--validation {wanted} would leave no row for training: only {size} rows can be used")
        groups = self.groups()
        chosen = choose_validation(groups, np.array(self.stratum_of)[usable], number, rng)
        largest = np.bincount(groups).max()
        if not chosen.any():
            raise InputError(f"all {size} rows show the same content, so they cannot be split: check the column group")
        if chosen.sum() != number:
            print(
                f"validation has {chosen.sum()} rows, not {number}: rows of the same content stay together, and the "
                f"largest group has {largest}"
            )
        parts = np.full(len(self.group_of), REJECTED, dtype=np.uint8)
        parts[usable] = np.where(chosen, VALIDATION, TRAIN)
        return parts

    def groups(self) -> NDArray[np.int64]:
        """For each usable row the number of those that it must stay with, from 0."""
        hashes = np.frombuffer(self.hashes, dtype=np.uint8).reshape(-1, HASH_BYTES)
        like = same_content(hashes) // 2  # pictures -> rows
        size = len(self.numbers)
        named = np.flatnonzero(groups := np.array(self.group_of)[np.array(self.numbers) - 1])
        _, first, which = np.unique(groups[named], return_index=True, return_inverse=True)
        left = np.concatenate([np.arange(size).repeat(2), named])
        right = np.concatenate([like, named[first][which]])
        graph = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(size, size))
        return connected_components(graph, directed=False)[1].astype(np.int64)


def _number(text: str) -> int:
    """63 bits of a hash: the same in every run."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1


def _stratum(row: Row, stratify: Stratify) -> str:
    return "" if stratify == "none" else getattr(row, stratify)


def _check_out(out: Path, dataset: Path) -> None:
    if out.suffix != ".jsonl":
        raise InputError(f"--out must be a .jsonl file, got {out}")
    if os.path.lexists(out):
        is_input = dataset.exists() and out.exists() and out.samefile(dataset)
        way_out = "name another file" if is_input else "remove it, or name another file"
        raise InputError(f"--out {out} {'is the dataset itself' if is_input else 'exists already'}: {way_out}")


def _check_splits(rows: Iterable[Row | RejectedRow]) -> None:
    """Refuses what is held out for something else: it would be trained on, or validated with."""
    for row in rows:
        if isinstance(row, Row) and row.split not in ("train", "validation"):
            raise InputError(
                f"row {row.number} has the split {row.split!r}, but this command assigns every row to train or validation: "
                "remove such rows first"
            )


def _write(source: str, root: Path | None, out: Path, parts: NDArray[np.uint8], stratify: Stratify) -> None:
    """Reads the dataset again and writes the new file, then the table."""
    folder = Path(os.path.abspath(out)).parent
    counts: dict[str, Counter[int]] = {}
    with lines_file(out) as write_row:
        for part, row, values in zip(parts.tolist(), read_rows(source, root), read_table(source), strict=True):
            if part == REJECTED or isinstance(row, RejectedRow) or not isinstance(values, dict):
                continue
            split = "train" if part == TRAIN else "validation"
            present = {name: value for name, value in values.items() if not is_absent(value)}
            write_row({"id": row.id} | moved_row(row, present, folder) | {"split": split})
            counts.setdefault(_stratum(row, stratify), Counter())[part] += 1
    _print_table(counts, stratify)
    print(f"{np.count_nonzero(parts)} rows in {out}")


def _print_table(counts: dict[str, Counter[int]], stratify: Stratify) -> None:
    """Rows of the largest strata in each part, and of all."""
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1].total(), entry[0]))
    lines = [(name or f"(no {stratify})", count) for name, count in ordered] if stratify != "none" else []
    if len(lines) > SHOWN:
        rest = sum((count for _, count in lines[SHOWN:]), Counter())
        lines = [*lines[:SHOWN], (f"({len(lines) - SHOWN} more)", rest)]
    lines.append(("all", sum(counts.values(), Counter())))
    print(f"{stratify if stratify != 'none' else '':40} {'train':>9} {'validation':>11} {'share':>7}")
    for name, count in lines:
        text = name if len(name) <= 40 else name[:39] + "…"
        share = count[VALIDATION] / count.total()
        print(f"{text:40} {count[TRAIN]:9} {count[VALIDATION]:11} {share:7.1%}")
