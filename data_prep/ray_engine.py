"""The work of `data_prep.items` as a Ray Data job, for more than one machine. Needs the extra `ray`."""

import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from data_prep.errors import InputError
from data_prep.items import Engine, Part

REPOSITORY = Path(__file__).resolve().parents[1]


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
