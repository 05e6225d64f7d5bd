"""On an emulated card: take up the plan of each file named, and say what came of it, one line of JSON for all."""

from __future__ import annotations

import json
import sys

import autobatch

said = {}
for name in sys.argv[1:]:
    how, _, path = name.rpartition("=")
    reprobe = None
    if how == "reprobe":
        other = autobatch.Report.from_json(open("again.json").read())  # noqa: PTH123, SIM115
        reprobe = lambda other=other: other  # noqa: E731
    try:
        plan = autobatch.plan_from_env(environment={"AUTOBATCH_PLAN_FILE": path}, reprobe=reprobe)
        said[name] = [plan.micro_batch_size, plan.accumulation_steps]
    except autobatch.AutobatchError as error:
        said[name] = [type(error).__name__, str(error)]
print(json.dumps(said))
