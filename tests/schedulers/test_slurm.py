"""On a real Slurm: jobs go to the card that the service chose, and tasks find the plan for the card that they got."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from service_fakes import FakeExecutor, make_report, make_settings, running_service, succeeding
from slurm_cluster import slurm_cluster

from autobatch.store import NewMeasurement

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service_fakes import RunningService
    from slurm_cluster import SlurmCluster

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "docker/slurm"
A100 = "A100-SXM4-40GB"
SHOW = 'echo "$SLURMD_NODENAME $CUDA_VISIBLE_DEVICES ${AUTOBATCH_MICRO_BATCH_SIZE-none} ${AUTOBATCH_ACCUMULATION_STEPS-none}"\n'

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Two nodes, with two L4 and four A100."""
    with slurm_cluster(tmp_path_factory.mktemp("slurm"), prolog=SCRIPTS / "task-prolog") as running:
        yield running


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service that knows gpt2 on both, and that vit fits an A100 alone."""
    settings = make_settings(tmp_path_factory.mktemp("service"))
    with running_service(settings, executor=FakeExecutor(succeeding)) as running:
        known = (("gpt2", A100, 37), ("gpt2", "L4", 17), ("vit", A100, 20), ("vit", "L4", None))
        for workload, gpu, largest in known:
            report = make_report(gpu=gpu, largest=largest, workload=workload)
            new = NewMeasurement.of(report, workload=workload, gpu=gpu, source="reported")
            running.services.measurements.add(new, token_id=None)
        yield running


def submit(cluster: SlurmCluster, *words: str, text: str, **variables: str) -> str:
    """Submit a job, wait for its end and return what it printed."""
    job = cluster.folder / "job.sh"
    job.write_text(f"#!/bin/bash\n{text}")
    program = cluster.folder / "bin/autobatch"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m autobatch "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}:{cluster.environment['PATH']}"
    python_path = os.pathsep.join(map(str, (ROOT, ROOT / "server")))
    environment = {"PATH": path, "PYTHONPATH": python_path, **variables}
    output = cluster.folder / "output"
    command = SCRIPTS / "sbatch-autobatch"
    done = cluster.run(str(command), "--wait", "--output", str(output), *words, str(job), **environment)
    assert done.returncode == 0, done.stderr + output.read_text()
    printed = output.read_text()
    output.unlink()
    return printed


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("#AUTOBATCH gpt2 --target 256 --gpu L4 --gpu a100-40gb:2\n", "node1 0 16 16"),  # the fewest cards
        ("#AUTOBATCH vit --target 256 --gpu L4 --gpu a100-40gb:2\n", "node2 0,1 16 8"),  # the one that fits
        ("#SBATCH --gres=gpu:nvidia_l4:1\n#AUTOBATCH vit --target 256 --gpu a100-40gb\n", "node2 0 16 16"),
    ],
)
def test_a_job_goes_to_the_card_that_the_service_chose(
    cluster: SlurmCluster, service: RunningService, asked: str, said: str
) -> None:
    """Its batch script has the plan, and so has a step of it."""
    text = f"{asked}{SHOW}srun bash -c '{SHOW.strip()}'\n"
    printed = submit(cluster, text=text, AUTOBATCH_SERVICE=service.url)
    assert printed.splitlines() == [said, said]


def test_nodes_may_be_told_apart_by_features(cluster: SlurmCluster, service: RunningService) -> None:
    """Where gres have no types."""
    text = f"#AUTOBATCH vit --target 256 --gpu L4 --gpu a100-40gb\n{SHOW}"
    printed = submit(cluster, text=text, AUTOBATCH_SERVICE=service.url, AUTOBATCH_FORM="sbatch:constraint")
    assert printed == "node2 0 16 16\n"


def test_a_plain_submission_is_told_the_plan_of_its_card(cluster: SlurmCluster, service: RunningService) -> None:
    """The prolog asks for the card and the number that Slurm gave, whatever was known at submission."""
    asked = {"AUTOBATCH_WORKLOAD": "gpt2", "AUTOBATCH_TARGET": "256", "AUTOBATCH_SERVICE": service.url}
    printed = submit(cluster, "--gres=gpu:nvidia_a100-sxm4-40gb:4", text=SHOW, **asked)
    assert printed == "node2 0,1,2,3 32 2\n"
    printed = submit(cluster, "--gres=gpu:nvidia_l4:1", text=SHOW, **asked)
    assert printed == "node1 0 16 16\n"


def test_a_job_runs_without_an_answer(cluster: SlurmCluster, service: RunningService) -> None:
    """Where the service is away, and where nothing was asked."""
    asked = {"AUTOBATCH_WORKLOAD": "gpt2", "AUTOBATCH_TARGET": "256", "AUTOBATCH_SERVICE": "http://127.0.0.1:9"}
    printed = submit(cluster, "--gres=gpu:nvidia_l4:1", text=SHOW, **asked).splitlines()
    assert "autobatch: no plan for 1 × nvidia_l4" in printed[0]
    assert printed[-1] == "node1 0 none none"
    assert submit(cluster, "--gres=gpu:1", "--nodelist=node1", text=SHOW) == "node1 0 none none\n"
