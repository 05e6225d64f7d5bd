"""Every command that the README shows is run, in its order, by a shell, with the files and the service that it speaks of."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)

# A script as its users have them: sizes by flags or by a file, one rank or several, or a plan by its file.
TRAIN = """
import argparse, os
import torch
from ruamel.yaml import YAML

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--accumulate", type=int, default=2)
parser.add_argument("--length", type=int, default=256)
parser.add_argument("--config")
asked = parser.parse_args()
if asked.config:
    with open(asked.config) as file:
        sizes = YAML(typ="safe").load(file)["train"]
    asked.batch_size, asked.accumulate = sizes["batch_size"], sizes["accumulate"]
if "AUTOBATCH_PLAN_FILE" in os.environ:
    import autobatch
    plan = autobatch.plan_from_env()
    asked.batch_size, asked.accumulate = plan.micro_batch_size, plan.accumulation_steps
torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
model = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 1024)).cuda()
if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    torch.distributed.init_process_group("nccl")
    model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(4):
    for _ in range(asked.accumulate):
        batch = torch.randn(asked.batch_size, asked.length, 1024, device="cuda")
        (model(batch).square().mean() / asked.accumulate).backward()
    optimizer.step()
    optimizer.zero_grad()
"""
SMALL_GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 2, "n_embd": 256, "n_head": 4}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def python_block(first_line: str) -> str:
    [found] = [text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if text.startswith(first_line)]
    return str(found)


@dataclass(kw_only=True)
class Workspace:
    """A folder in which the README's commands find what they speak of."""

    folder: Path
    environment: dict[str, str]
    port: int
    measurement: str = ""
    last_ids: list[str] = field(default_factory=list)

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a line as a shell does."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.with_our_places(command)],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        self.last_ids += re.findall(r"\bprb_[0-9a-f]+\b|(?<=token )[0-9a-f]{16}\b", done.stdout + done.stderr)
        return done

    def with_our_places(self, command: str) -> str:
        """The line with the addresses and the ids that are here."""
        command = re.sub(r"(scheduler|localhost):8000", f"127.0.0.1:{self.port}", command)
        command = command.replace('"measurement": "ID"', f'"measurement": "{self.measurement}"')
        if self.last_ids:
            command = re.sub(r"\bID\b", self.last_ids[-1], command)
        if (
            shutil.which("nvidia-smi") is None
            and "--emulate" not in command
            and (" -- " in command or "--report-to" in command)
        ):
            # Without a GPU these ask which card they are to emulate.
            command = re.sub(r"^autobatch probe ", "autobatch probe --emulate A100-SXM4-40GB ", command)
            # And what trains needs a card, which the emulation is.
            command = re.sub(r"^autobatch run ", "autobatch emulate A100-SXM4-40GB -- autobatch run ", command)
        # What trains by a plan needs the card that the plan is for, which the emulation is.
        return command.replace(
            "AUTOBATCH_PLAN_FILE=plan.json python",
            "AUTOBATCH_PLAN_FILE=plan.json autobatch emulate A100-SXM4-40GB -- python",
        )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """The files, the programs, and a service that knows gpt2 on two cards, as it would after some days."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("train_job.py", "train_ranks.py", "accumulate.py"):
        (folder / name).write_text(python_block(f"# {name}"))
    (folder / "train.py").write_text(TRAIN)
    (folder / "config.json").write_text(json.dumps(SMALL_GPT2))
    (folder / "config.yaml").write_text("train:\n  batch_size: 1\n  accumulate: 1\n")
    (folder / "docker").symlink_to(ROOT / "docker")
    (folder / "job.sh").write_text("#!/bin/sh\n")
    (folder / "bin").mkdir()
    programs = {
        "autobatch": "-m autobatch",
        "python": "",
        "torchrun": "-m torch.distributed.run",
        "accelerate": "-m accelerate.commands.accelerate_cli",
    }
    for name, words in programs.items():
        make_program(folder / "bin" / name, f'exec "{sys.executable}" {words} "$@"')
    make_program(folder / "bin/sbatch", 'echo "sbatch $* $SBATCH_GRES"')
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AUTOBATCH_")},
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "server"))),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "XDG_DATA_HOME": str(folder / "data"),
        "AUTOBATCH_SERVICE": f"http://127.0.0.1:{port}",
    }
    # The operator's file of the README, with our job in the place of theirs.
    [declared] = [text for text in re.findall(r"```toml\n(.*?)```", README, re.DOTALL) if "[workloads" in text]
    (folder / "llama.py").write_text(
        python_block("# train_job.py").replace("width: int", "seq_len: int = 1, width: int")
    )
    (folder / "server.toml").write_text(declared.replace("/srv/jobs", str(folder)))
    serving = subprocess.Popen(
        [*("autobatch", "serve", "--port", str(port), "--config", str(folder / "server.toml")),
         *("--database-url", f"sqlite:///{folder}/server.sqlite3", "--log-level", "ERROR")],
        env=environment, executable=folder / "bin/autobatch",
    )  # fmt: skip
    try:
        yield stocked(Workspace(folder=folder, environment=environment, port=port))
    finally:
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(60) == 0


def make_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def stocked(workspace: Workspace) -> Workspace:
    """Wait for the service, and let it probe what the schedulers' commands ask for."""
    with httpx.Client(base_url=f"http://127.0.0.1:{workspace.port}", timeout=90, trust_env=False) as client:
        until = time.monotonic() + 60
        while True:
            try:
                client.get("/readyz").raise_for_status()
                break
            except httpx.HTTPError:
                assert time.monotonic() < until
                time.sleep(0.1)
        for workload in ("gpt2", "gpt2?seq_len=512"):
            probe: dict[str, Any] = client.post(
                "/v1/probes", json={"workload": workload, "target": 256, "gpu": "L4"}
            ).json()
            while probe["state"] in {"queued", "running"}:
                probe = client.get(f"/v1/probes/{probe['id']}?wait=60").json()
            assert probe["state"] == "succeeded", probe
            if workload == "gpt2":
                workspace.measurement = probe["measurement"]
    return workspace


def commands(block: str) -> list[str]:
    """A block's commands: lines, with those that go on in the next one."""
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def is_of_another_test(command: str) -> bool:
    """What other tests run: a fresh machine's commands are CI's own, containers of `test_images.py`, a card is rehearsed."""
    needs_gpus = command.startswith("torchrun") and shutil.which("nvidia-smi") is None
    return command.startswith(("make ", "docker ", "tests/gpu/", "autobatch serve ", "export ")) or needs_gpus


@pytest.mark.parametrize("block", BLOCKS, ids=[block.split("\n", 1)[0].split("#")[0].strip()[:60] for block in BLOCKS])
def test_a_block_of_commands_runs(block: str, workspace: Workspace) -> None:
    """Each with exit status 0."""
    for command in commands(block):
        if is_of_another_test(command):
            continue
        done = workspace.run(command)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


def test_what_is_not_run_here_is_there() -> None:
    """Targets of the Makefile, and files and stages that the container commands name."""
    left_out = [command for block in BLOCKS for command in commands(block) if is_of_another_test(command)]
    makefile = (ROOT / "Makefile").read_text()
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    for command in left_out:
        for target in re.findall(r"^make (\S+)", command):
            assert f"\n{target}: " in makefile
        for target in re.findall(r"--target (\w+) -t", command):
            assert f" AS {target}\n" in dockerfile
        for path in re.findall(r"-f (\S+)", command):
            assert (ROOT / path).exists()
        for script in re.findall(r"^tests/gpu/\S+", command):
            assert os.access(ROOT / script, os.X_OK)
    assert len(left_out) >= 7


# What a user has before the lines that the README shows: from our example scripts, where they have it.
BEFORE = {
    "autobatch.integrations.transformers": "from hf_trainer import make_trainer\ntrainer = make_trainer(max_steps=2)\n",
    "autobatch.integrations.lightning": (
        "import functools, tempfile, lightning\nfrom lightning_fit import Data, Model\nmodel, data = Model(), Data()\n"
        "Trainer = functools.partial(lightning.Trainer, max_steps=2, logger=False, enable_progress_bar=False,\n"
        "                            enable_model_summary=False, default_root_dir=tempfile.gettempdir(),\n"
        "                            enable_checkpointing=False)\n"
    ),
    "autobatch.integrations.accelerate": (
        "import torch\nfrom accelerate import Accelerator\nfrom torch.utils.data import DataLoader, TensorDataset\n"
        "accelerator, data = Accelerator(), TensorDataset(torch.zeros(512, 64))\nnetwork = torch.nn.Linear(64, 64)\n"
        "model, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters()))\n"
        "loss_of = lambda n: model(torch.zeros(n, 64, device=accelerator.device)).square().mean()\n"
    ),
}
AFTER = {
    "autobatch.integrations.transformers": "print(trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps)",
    "autobatch.integrations.lightning": "print(tuner.report.plan.effective_batch_size)",
    "autobatch.integrations.accelerate": "print(loader.total_batch_size * accelerator.gradient_accumulation_steps)",
}


@pytest.mark.parametrize("module", BEFORE)
def test_the_lines_for_a_framework_run(module: str, workspace: Workspace) -> None:
    """On an emulated L4; what they set makes the target."""
    path = workspace.folder / f"{module.rpartition('.')[2]}_lines.py"
    path.write_text("\n".join((BEFORE[module], python_block(f"from {module} "), AFTER[module])))
    examples = ROOT / "tests/examples/integrations"
    done = workspace.run(f"PYTHONPATH={examples}:$PYTHONPATH HF_HUB_OFFLINE=1 autobatch emulate L4 -- python {path}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "256"
