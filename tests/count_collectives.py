"""Trains several configurations and prints what the ranks sent each other in each, as JSON. The argument is a JSON file with
a list of override lists."""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_prep.errors import exit_codes
from data_prep.model.directory import ModelDirectory
from scripts.bench.collectives import Collectives
from train.config import compose
from train.parallel.processes import Processes
from train.phases import cache_phase, plan_run, train_phase
from train.plan.planner import geometry_of

if __name__ == "__main__":
    with exit_codes():
        processes, found = Processes.start(None), []
        for overrides in json.loads(Path(sys.argv[1]).read_text()):
            config = compose(overrides)
            model = ModelDirectory.resolve(config.model.path)
            plan = plan_run(config, model, processes.world_size)
            cache_phase(config, model, geometry_of(config), processes)
            with Collectives() as collectives:
                train_phase(config, model, geometry_of(config), processes, plan)
            found.append({"calls": collectives.calls, "bytes": collectives.bytes})
        if processes.is_main:
            print(json.dumps(found), flush=True)
        processes.stop()
