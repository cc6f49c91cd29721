"""Several runs from one command: `train/run.py -m` with comma-separated values. Hydra makes and places the jobs.

    python train/run.py -m +exp=lbm_2511 data.dataset=pairs.json data.root=photos adapter.rank=16,64 optim=prodigy,adamw

Every job is a process of its own, started by scripts/launch.sh, so that it can have several GPUs and leaves nothing in the
next one's memory. It is a run like any other, in `runs/sweeps/NAME/adapter.rank=16,optim=prodigy/`, and continues when the
same command is given again. `hydra/launcher=` puts the jobs elsewhere: docs/cluster.md.
"""

import hashlib
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString
from hydra.errors import OverrideParseException
from omegaconf import DictConfig
from rich.console import Console

from data_prep.errors import InputError
from train.config import CONFIGS, Config, as_given, compose, from_hydra
from train.record.run_summary import as_table

ROOT = CONFIGS.parent
MOST_COLUMNS = 400
"""Width of the table at the end: a path that is broken into lines cannot be pasted."""
LONGEST_NAME = 120
"""Characters of a folder's name, of the 255 that file systems take."""


class JobFailed(Exception):
    """A job ended with another exit code than 0; it has printed why."""


@dataclass(frozen=True)
class Sweep:
    """A command line, taken apart."""

    hydra: list[Override]
    """For Hydra itself, such as `hydra/launcher=…`."""
    fixed: list[Override]
    """The same for every job."""
    swept: list[Override]
    """With several values."""

    @classmethod
    def parse(cls, overrides: list[str]) -> "Sweep":
        """Reads a command line.

        Raises:
            InputError: it is malformed, or wants something that only the sweep can decide.
        """
        try:
            with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
                parser = OverridesParser.create(GlobalHydra.instance().config_loader())
                parsed = parser.parse_overrides([as_given(override) for override in overrides])
        except OverrideParseException as error:
            raise InputError(f"{error.override!r} is not a valid override: {str(error).splitlines()[0]}") from error
        own = [each for each in parsed if not each.is_hydra_override()]
        swept = [each for each in own if each.is_sweep_override()]
        for each in swept:
            if each.key_or_group in ("run_dir", "cache.dir", "phases"):
                raise InputError(f"{each.key_or_group} cannot be swept over: the sweep gives every job its own folder")
            if sum(other.key_or_group == each.key_or_group for other in own) > 1:
                raise InputError(f"{each.key_or_group} is given twice: once with the values to sweep over is enough")
        return cls(
            [each for each in parsed if each.is_hydra_override()], [each for each in own if each not in swept], swept
        )

    @property
    def launcher(self) -> str:
        """The launcher of Hydra that starts the jobs."""
        chosen = [str(each.value()) for each in self.hydra if each.key_or_group == "hydra/launcher"]
        return chosen[-1] if chosen else "basic"

    def value(self, key: str) -> str | None:
        """What a fixed key is set to."""
        return next((str(each.value()) for each in self.fixed if each.key_or_group == key), None)

    def fixed_lines(self, *without: str) -> list[str]:
        """The fixed overrides, without those of some keys."""
        return [str(each.input_line) for each in self.fixed if each.key_or_group not in without]

    def jobs(self) -> list[list[str]]:
        """The overrides of every job. Of a range that only some sweepers can search, the beginning stands for all."""

        def values(each: Override) -> list[str]:
            value = each.value()
            texts = [str(value.start)] if isinstance(value, IntervalSweep) else each.sweep_string_iterator()
            return [f"{each.get_key_element()}={text}" for text in texts]

        return [[*self.fixed_lines(), *chosen] for chosen in itertools.product(*map(values, self.swept))]


def sweep(overrides: list[str]) -> None:
    """Checks every job, then runs them all.

    Raises:
        InputError: a job's configuration is wrong; none has been started.
        SystemExit: 1, when a job failed. Those after it have run all the same.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("start a sweep with python, not accelerate launch: every job launches processes of its own")
    parsed = Sweep.parse(overrides)
    check_launcher(parsed.launcher)
    of_hydra = [str(each.input_line) for each in parsed.hydra]
    jobs = {tuple(job): compose([*of_hydra, *job]) for job in parsed.jobs()}
    names = {config.name for config in jobs.values()}
    name = names.pop() if len(names) == 1 else "sweep"
    folder = parsed.value("run_dir") or f"runs/sweeps/{name}"
    settings = [
        f"hydra.sweep.dir={quoted(folder)}",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        f"hydra.job.name={quoted(name)}",
        "hydra.job.config.override_dirname.exclude_keys="
        f"[{','.join(quoted(each.key_or_group) for each in parsed.fixed)},run_dir,phases]",
        *of_hydra,
    ]
    swept = [str(each.input_line) for each in parsed.swept]
    trains = any("train" in config.phases for config in jobs.values())
    if parsed.launcher == "basic" or not trains:
        with ending_with_a_table(Path(folder)):
            run_jobs([*settings, *parsed.fixed_lines("run_dir"), *swept])
        return
    caches = {cache_name(config): job for job, config in reversed(jobs.items()) if "cache" in config.phases}
    for job in caches.values():  # jobs that run at once would encode the same rows
        own = [
            line for line in job if line not in parsed.fixed_lines() or line in parsed.fixed_lines("run_dir", "phases")
        ]
        run_jobs([*settings, *own, "phases=[cache]"])
    with ending_with_a_table(Path(folder)):
        run_jobs([*settings, *parsed.fixed_lines("run_dir", "phases"), *swept, "phases=[train]"])


@contextmanager
def ending_with_a_table(folder: Path) -> Iterator[None]:
    """Prints what the runs of the folder have come to, also where one of them failed."""
    try:
        yield
    finally:
        table = as_table(sorted(folder.iterdir()) if folder.is_dir() else [])
        if table.row_count:
            Console(width=MOST_COLUMNS).print(table)


def check_launcher(name: str) -> None:
    """Names the missing package of a launcher.

    Raises:
        InputError: it is not installed.
    """
    if not name.startswith("submitit"):
        return
    try:
        found = importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise InputError(f"hydra/launcher={name} needs a plugin: uv pip install hydra-submitit-launcher")


def run_jobs(overrides: list[str]) -> None:
    """One sweep by Hydra."""
    arguments, environment = sys.argv, dict(os.environ)
    paths = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )  # jobs elsewhere import this module
    os.environ |= {"HYDRA_FULL_ERROR": "1", "PYTHONPATH": paths}  # Hydra's short report hides the exception
    sys.argv = [sys.argv[0], "--multirun", *overrides]
    handler = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")(run_job)()
    except JobFailed as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    finally:
        signal.signal(signal.SIGTERM, handler)
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(environment)


def run_job(composed: DictConfig) -> None:
    """One job, wherever Hydra's launcher has put it.

    Raises:
        JobFailed: it did not end with 0.
    """
    settings, config = HydraConfig.get(), from_hydra(composed)
    overrides = list(settings.overrides.task)
    folder, name = Path(settings.sweep.dir), job_name(settings.job.override_dirname)
    own = {"run_dir": str(folder / name), "name": f"{config.name}-{name}"}
    arguments = [*overrides, *(f"{key}={quoted(value)}" for key, value in own.items())]
    code = launch(arguments, job_environment(name, folder.name))
    if code != 0:
        raise JobFailed(f"the job {name} ended with code {code}: give the same command again to continue the sweep")


def job_name(swept: str) -> str:
    """The swept overrides as the name of one folder."""
    name = re.sub(r"[^\w.,=+-]+", "_", swept).lstrip(".")[:LONGEST_NAME] or "run"
    return name if name == swept or not swept else f"{name}-{hashlib.sha256(swept.encode()).hexdigest()[:6]}"


def cache_name(config: Config) -> str:
    """The same for jobs that train on the same records."""
    settings = json.dumps([asdict(config.model), asdict(config.data)], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:8]


def job_environment(name: str, group: str) -> dict[str, str]:
    """This process's environment and Python, and the job's own name in W&B."""
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    environment |= {"VIRTUAL_ENV": sys.prefix, "WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP", group)}
    if chosen := os.environ.get("WANDB_NAME"):
        environment["WANDB_NAME"] = f"{chosen}-{name}"
    return environment


def launch(overrides: list[str], environment: dict[str, str]) -> int:
    """Runs scripts/launch.sh and returns its exit code. In a session of its own: a queue's signals end no training."""
    command = ["bash", str(ROOT / "scripts/launch.sh"), *overrides]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process, ended(process):
        return process.wait()


@contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    """Takes the process and all that it started along, when something ends this one."""
    try:
        yield
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        raise


def quoted(text: str) -> str:
    """A value that Hydra's grammar reads as this very text."""
    return QuotedString(text, Quote.single).with_quotes()
