"""Trains several configurations, one after the other, in the processes that accelerate launched: starting them costs more
than these trainings do. The argument is a JSON file with a list of override lists. What is compiled is traced, forward and
backward, and not made faster: Inductor would take a minute."""

import functools
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_prep.errors import exit_codes
from data_prep.model.directory import ModelDirectory
from train.builders import check_nodes
from train.config import compose
from train.model import execution
from train.parallel.processes import Processes
from train.phases import cache_phase, plan_run, train_phase
from train.plan.planner import geometry_of

if __name__ == "__main__":
    execution.Compiled = functools.partial(execution.Compiled, backend="aot_eager")
    with exit_codes():
        processes = Processes.start(None)
        for overrides in json.loads(Path(sys.argv[1]).read_text()):
            config = compose(overrides)
            model = ModelDirectory.resolve(config.model.path)
            check_nodes(config, model)
            cache_phase(config, model, geometry_of(config), processes)
            train_phase(config, model, geometry_of(config), processes, plan_run(config, model, processes.world_size))
        processes.stop()
