"""Who does the work of `data_prep.jobs.items`: processes of this machine, or a Ray cluster."""

import logging
import multiprocessing
import multiprocessing.resource_tracker
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.jobs import EngineName
from data_prep.jobs.items import Engine, Part
from data_prep.jobs.prefetch import ahead

REPOSITORY = Path(__file__).resolve().parents[2]


def make_engine(name: EngineName, processes: int, preload: Iterable[str] = ()) -> Engine:
    """The engine of that name.

    Raises:
        InputError: Ray is not installed.
    """
    if name == "ray":
        return ray_engine(processes)
    return local_engine(processes, preload)


def local_engine(processes: int, preload: Iterable[str] = ()) -> Engine:
    """Processes of this machine; with one, this process itself.

    Args:
        processes: how many.
        preload: installed modules that are imported once, for all of them.
    """

    def run(function: Callable[[Part], str], parts: Iterable[Part]) -> Iterator[str]:
        if processes == 1:
            yield from map(function, parts)
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))
        try:
            pool = _Workers(processes, context, _end_with_parent)
            yield from ahead(function, parts, pool, depth=4 * processes)
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process was killed, perhaps because memory ran out: run the same command again to continue, "
                "with fewer --processes"
            ) from None

    return run


class _Workers(ProcessPoolExecutor):
    """Processes that do not see Ctrl-C, which a terminal sends to all.

    Only the main process answers: it waits for the items in hand, while a worker that is interrupted, perhaps as it
    imports, prints a traceback.
    """

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """As its base does, which starts a worker where one is missing."""
        with _ctrl_c_waits():
            return super().submit(fn, *args, **kwargs)


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C is answered afterwards, and never by processes that start inside: they inherit that the signal is blocked."""
    multiprocessing.resource_tracker.ensure_running()  # whoever starts it unblocks the signal
    pressed: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()  # which answers what other threads receive
    handler = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number)) if in_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main:
            signal.signal(signal.SIGINT, handler)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def _end_with_parent() -> None:
    """A worker whose main process is killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def ray_engine(processes: int) -> Engine:
    """Tasks of the cluster that `RAY_ADDRESS` names, or of a local one with so many processes.

    Input, output and this project must lie at the same paths on every machine. The main process holds a list of all items
    while it runs.

    Raises:
        InputError: Ray is not installed.
    """
    try:
        import ray
        from ray.data import DataContext
    except ImportError:
        raise InputError("--engine ray needs Ray: pip install 'ray[data]'") from None

    def run(function: Callable[[Part], str], parts: Iterable[Part]) -> Iterator[str]:
        local = None if "RAY_ADDRESS" in os.environ else processes
        environment = {"env_vars": {"PYTHONPATH": str(REPOSITORY)}}
        try:
            ray.init(num_cpus=local, include_dashboard=False, runtime_env=environment, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise InputError(f"no Ray cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: {error}") from None
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells every step of its plan
        try:
            context = DataContext.get_current()
            context.execution_options.preserve_order = True
            context.enable_progress_bars = False  # ours says more
            tasks = [{"part": pickle.dumps(part)} for part in parts]
            done = ray.data.from_items(tasks, override_num_blocks=max(1, len(tasks))).map(
                lambda row: {"text": function(pickle.loads(row["part"])).encode(errors="surrogatepass")}
            )
            for row in done.iter_rows():
                yield row["text"].decode(errors="surrogatepass")
        finally:
            ray.shutdown()

    return run
