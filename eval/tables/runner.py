"""Runs the jobs of a table: what is done already stays, what fails is listed, and the rest goes on."""

import gc
import sys
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any, TypeVar

import torch

from data_prep.cli import CORES
from data_prep.errors import InputError, is_out_of_memory
from data_prep.files import make_folder
from data_prep.jobs.prefetch import ahead
from data_prep.jobs.progress import progress
from data_prep.rows.images import RejectedImage
from data_prep.rows.rows import RejectedRow
from data_prep.rows.tables import BadRow
from eval.request.base import BaseEditor
from eval.request.provenance import write_png
from eval.request.request import EditRequest, EditResult
from eval.tables.job_files import JobFiles, KeyedJob
from eval.tables.outcomes import Summary, add_seconds, say_failure, write_reports
from eval.tables.table import Job
from train.parallel.processes import Processes

READERS = min(4, CORES)
"""Threads that read ahead."""
WAITING = 4
"""Batches' worth of opened images that may wait for others of their kind."""
Answer = TypeVar("Answer")
Entry = Job | RejectedRow


@dataclass(frozen=True)
class Failed:
    """A row that could not be done."""

    row: RejectedRow
    bug: bool = False
    """Whether it is the program's fault."""


@dataclass(frozen=True)
class Loaded:
    """A job whose images are open."""

    keyed: KeyedJob
    request: EditRequest
    batch_key: Hashable


def run_jobs(
    entries: Sequence[Entry],
    files: JobFiles,
    editor: BaseEditor,
    out: Path,
    batch_size: int = 1,
    processes: Processes | None = None,
    window: int = 1,
) -> Summary:
    """Does what is not done yet, and writes `results.csv` and `failed.csv`.

    Args:
        entries: the rows of the table, in order.
        files: reads them.
        editor: edits; it loads nothing if there is nothing to do.
        out: the folder of results.
        batch_size: pictures that are sampled together, of rows that allow it.
        processes: those that share the rows out and all call this; rank 0 writes the reports. None for one process.
        window: rows that are handed to the editor at a time, at least; a run that is killed loses no more.

    Returns:
        What was done, on every process.

    Raises:
        InputError: the folder cannot be written to, or the model cannot be had.
        OSError: a picture cannot be written; the run ends, for so would the others.
    """
    make_folder(out)
    rank, world_size = (processes.rank, processes.world_size) if processes else (0, 1)
    answers = _key_all(entries, files, editor, processes)
    todo = {each.outputs: each for each in answers if isinstance(each, KeyedJob) and not each.is_done(out)}
    if processes:
        processes.barrier()  # before a rank writes what another would then take for done
    mine = share_out(list(todo.values()), rank, world_size)
    failed = {}
    with progress("editing", len(mine), shown=rank == 0) as advance:
        for keyed, failure in _run(mine, files, editor, out, batch_size, window, rank):
            if failure:
                failed[keyed.outputs] = failure
            advance(1)
    for share in processes.gather(failed) if processes else []:
        failed |= share
    last = [_last(answer, failed) for answer in answers]
    summary = Summary(len(entries), len(todo) - len(failed), [each.row for each in last if isinstance(each, Failed)])
    done = [each for each in last if isinstance(each, KeyedJob)]
    if rank == 0:
        write_reports(out, done, summary.failures)
    return replace(summary, bugs=sum(isinstance(each, Failed) and each.bug for each in last), done=done)


def share_out(todo: Sequence[KeyedJob], rank: int, world_size: int) -> list[KeyedJob]:
    """A process' share: every `world_size`-th row, with all jobs of it that follow each other. A row edited at 4 and at 20
    steps is encoded once then, and no process gets all the long edits."""
    rows = [list(jobs) for _, jobs in groupby(todo, key=lambda each: each.job.number)]
    return list(chain(*rows[rank::world_size]))


def _last(answer: KeyedJob | Failed, failed: dict[tuple[str, ...], Failed]) -> KeyedJob | Failed:
    """What became of a row; several with one content share its fate, each under its own number."""
    if isinstance(answer, Failed) or answer.outputs not in failed:
        return answer
    failure, job = failed[answer.outputs], answer.job
    return replace(failure, row=replace(failure.row, number=job.number, id=job.id))


def _key_all(
    entries: Sequence[Entry], files: JobFiles, editor: BaseEditor, processes: Processes | None
) -> list[KeyedJob | Failed]:
    """The key of every row, or why it cannot be done, found before anything is loaded. Each rank reads its share."""
    rank, world_size = (processes.rank, processes.world_size) if processes else (0, 1)

    notes: set[str] = set()

    def check(job: Job) -> Job:
        editor.check(job.placeholder())
        notes.update(editor.notes(job.placeholder()))
        return job

    def checked(entry: Entry) -> Job | Failed:
        return Failed(entry) if isinstance(entry, RejectedRow) else _attempt(check, entry, entry)

    def answer(entry: Job | Failed) -> KeyedJob | Failed:
        return entry if isinstance(entry, Failed) else _attempt(files.key, entry, entry)

    mine = list(_in_threads(checked, entries[rank::world_size]))
    for note in sorted(notes) if rank == 0 else ():
        print(f"note: {note}", file=sys.stderr)
    if any(isinstance(each, Job) for each in mine):
        _ = editor.fingerprint  # a model that has to be downloaded is, now that there is something to do with it
    share = []
    with progress("reading", len(mine), shown=rank == 0) as advance:
        for each in _in_threads(answer, mine):
            share.append(each)
            advance(1)
    shares = processes.gather(share) if processes else [share]
    answers = [shares[place % world_size][place // world_size] for place in range(len(entries))]
    if rank == 0:
        for each in answers:
            if isinstance(each, Failed):
                say_failure(each.row)
    return answers


def _in_threads(function: Callable[[Any], Answer], arguments: Sequence[Any]) -> Iterator[Answer]:
    """The answers, in order."""
    return ahead(function, arguments, ThreadPoolExecutor(READERS), depth=4 * READERS)


def _run(
    todo: Sequence[KeyedJob],
    files: JobFiles,
    editor: BaseEditor,
    out: Path,
    batch_size: int,
    window: int,
    rank: int,
) -> Iterator[tuple[KeyedJob, Failed | None]]:
    """Edits and writes; an answer for each job, in the order in which they end."""
    groups = []
    for each in _grouped(todo, files, editor, batch_size):
        if isinstance(each, tuple):
            yield each
            continue
        groups.append(each)
        if sum(map(len, groups)) >= window:
            yield from _edit(groups, files, editor, out, rank)
            groups = []
    yield from _edit(groups, files, editor, out, rank)


def _grouped(
    todo: Sequence[KeyedJob], files: JobFiles, editor: BaseEditor, batch_size: int
) -> Iterator[list[Loaded] | tuple[KeyedJob, Failed]]:
    """Jobs that are sampled together, and those that cannot be opened."""

    def load(keyed: KeyedJob) -> tuple[KeyedJob, Loaded | Failed]:
        def opened(job: Job) -> Loaded:
            request = files.load(job)
            editor.check(request)
            return Loaded(keyed, request, editor.batch_key(request) if batch_size > 1 else None)

        return keyed, _attempt(opened, keyed.job, keyed.job)

    waiting = _Waiting(batch_size)
    for keyed, loaded in ahead(load, todo, ThreadPoolExecutor(READERS), depth=batch_size + READERS):
        if isinstance(loaded, Failed):
            say_failure(loaded.row)
            yield keyed, loaded
        elif group := waiting.add(loaded):
            yield group
    yield from waiting.rest()


class _Waiting:
    """Opened jobs that wait until there are enough that may be edited together."""

    def __init__(self, batch_size: int):
        self.batch_size, self.groups = batch_size, dict[Hashable, list[Loaded]]()

    def add(self, loaded: Loaded) -> list[Loaded] | None:
        """A group that is ready: it is full, or goes by itself, or has waited longest when there are too many."""
        if loaded.batch_key is None:
            return [loaded]
        group = self.groups.setdefault(loaded.batch_key, [])
        group.append(loaded)
        if len(group) == self.batch_size:
            return self.groups.pop(loaded.batch_key)
        if sum(map(len, self.groups.values())) >= WAITING * self.batch_size:
            return self.groups.pop(next(iter(self.groups)))
        return None

    def rest(self) -> Iterator[list[Loaded]]:
        """What still waits."""
        yield from self.groups.values()


def _edit(
    groups: list[list[Loaded]], files: JobFiles, editor: BaseEditor, out: Path, rank: int
) -> Iterator[tuple[KeyedJob, Failed | None]]:
    """Edits groups; if that fails, each half of them, and at last each of a group by itself: one bad row costs no other."""
    if not groups:
        return

    def edited(some: list[list[Loaded]]) -> list[list[list[EditResult]]]:
        return editor.edit_groups([[each.request for each in group] for group in some])

    first, several = groups[0][0], len(groups) > 1 or len(groups[0]) > 1
    results = _attempt(edited, groups, first.keyed.job, quiet=several)
    if isinstance(results, Failed) and several:
        for part in _halves(groups):
            yield from _edit(part, files, editor, out, rank)
    elif isinstance(results, Failed):
        say_failure(results.row)
        yield first.keyed, results
    else:
        for each, made in zip(chain(*groups), chain(*results), strict=True):
            _write(each.keyed, made, files, out, rank)
            yield each.keyed, None


def _halves(groups: list[list[Loaded]]) -> list[list[list[Loaded]]]:
    """Of several groups; a single one falls into its jobs."""
    middle = len(groups) // 2
    return [groups[:middle], groups[middle:]] if middle else [[[each]] for each in groups[0]]


def _write(keyed: KeyedJob, results: list[EditResult], files: JobFiles, out: Path, rank: int) -> None:
    """The times first: a picture that is there is taken for done."""
    add_seconds(out, rank, keyed.key, results)
    laid = files.overlay_settings(keyed.job)
    for name, result in zip(keyed.outputs, results, strict=True):
        write_png(replace(result, settings=result.settings | laid), files.sources(keyed.job), out / name)


def _attempt(function: Callable[[Any], Answer], argument: Any, job: Job, quiet: bool = False) -> Answer | Failed:
    """The function's answer, or why there is none. An error of the program itself is shown with its traceback.

    Args:
        quiet: it will be tried again, and shown then.
    """
    try:
        return function(argument)
    except RejectedImage as error:
        return Failed(job.reject(error.reason, error.path))
    except (BadRow, InputError) as error:
        return Failed(job.reject(str(error)))
    except Exception as error:
        if not is_out_of_memory(error):
            if not quiet:
                traceback.print_exc()
            return Failed(job.reject(f"{type(error).__name__}: {error}"), bug=True)
        reason = f"out of memory ({str(error).splitlines()[0] if str(error) else 'no details'})"
    gc.collect()  # here, where the error and the frames it holds are gone
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Failed(job.reject(f"{reason}: a smaller size or --batch-size, or --offload, needs less"))
