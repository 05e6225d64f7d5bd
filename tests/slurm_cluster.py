"""A real Slurm on this machine: a controller and two virtual nodes with cards that are none, all on the loopback address."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import pytest
from debian_packages import unpack_packages

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["SlurmCluster", "slurm_cluster"]

_PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "libhwloc15")
_NODES = {"node1": ("nvidia_l4", 2), "node2": ("nvidia_a100-sxm4-40gb", 4)}
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
PluginDir={libraries}/slurm-wlm
SlurmctldPidFile={folder}/log/slurmctld.pid
SlurmdPidFile={folder}/log/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
MailProg=/bin/true
KillWait=2
GresTypes=gpu
TaskProlog={prolog}
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=1000 \
Gres=gpu:nvidia_l4:2 Feature=nvidia_l4
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=1000 \
Gres=gpu:nvidia_a100-sxm4-40gb:4 Feature=nvidia_a100-sxm4-40gb
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True, kw_only=True)
class SlurmCluster:
    """A cluster that runs."""

    folder: Path
    environment: Mapping[str, str]

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of the cluster would."""
        return subprocess.run(
            words, env={**self.environment, **variables}, cwd=self.folder,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip


@contextlib.contextmanager
def slurm_cluster(folder: Path, *, prolog: Path) -> Iterator[SlurmCluster]:
    """Run a cluster for as long as the context lasts; skips the test where it cannot be had.

    Args:
        folder: an empty folder, where everything of it lies.
        prolog: its TaskProlog.
    """
    if os.geteuid() != 0:
        pytest.skip("the cluster's daemons are started as root")
    prefix = unpack_packages(folder, *_PACKAGES)
    libraries, programs = prefix / "usr/lib/x86_64-linux-gnu", prefix / "usr/sbin"
    for name in ("slurmctld", "slurmd", "slurmstepd"):
        # By the name that it is started under a daemon tells whether it is one, and reads the nodes' cards.
        (programs / name).symlink_to(f"{name}-wlm")
    for name in ("log", "state", "spool/node1", "spool/node2", "devices"):
        (folder / name).mkdir(parents=True)
    configuration = folder / "slurm.conf"
    ports = _free_ports(3)
    configuration.write_text(_CONFIGURATION.format(ports=ports, folder=folder, libraries=libraries, prolog=prolog))
    _write_cards(folder)
    environment = {
        **os.environ,
        "SLURM_CONF": str(configuration),
        "PATH": f"{prefix}/usr/bin:{programs}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{libraries}/slurm-wlm:{libraries}",
    }
    cluster = SlurmCluster(folder=folder, environment=environment)
    daemons = [
        ["slurmctld", "-D", "-c"],
        *(["slurmd", "-D", "-N", node, "-d", str(programs / "slurmstepd")] for node in _NODES),
    ]
    started = []
    try:
        # One after the other into the list: what was started before one that fails is ended too.
        started.extend(_start(programs, words, environment) for words in daemons)
        _wait_until_idle(cluster, started)
        yield cluster
    finally:
        _stop(cluster, started)


def _start(programs: Path, words: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    null = subprocess.DEVNULL
    return subprocess.Popen(
        [programs / words[0], *words[1:]], env=environment, stdin=null, stdout=null, stderr=null, start_new_session=True
    )


def _write_cards(folder: Path) -> None:
    """Cards are device files; these lead to the null device, and their last digit is the index."""
    lines = []
    for node, (kind, count) in _NODES.items():
        for index in range(count):
            (folder / f"devices/{node}-{index}").symlink_to("/dev/null")
        lines.append(f"NodeName={node} Name=gpu Type={kind} File={folder}/devices/{node}-[0-{count - 1}]\n")
    (folder / "gres.conf").write_text("".join(lines))


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [one.getsockname()[1] for one in sockets]


def _wait_until_idle(cluster: SlurmCluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + 60
    while True:
        shown = cluster.run("sinfo", "--noheader", "--Node", "--format", "%N %T").stdout.split()
        if shown.count("idle") == len(_NODES):
            return
        gone = [daemon.args for daemon in daemons if daemon.poll() is not None]
        if gone or time.monotonic() > until:
            logs = "\n".join(path.read_text()[-2000:] for path in (cluster.folder / "log").glob("*.log"))
            raise RuntimeError(f"the cluster does not come up ({shown}, ended: {gone}):\n{logs}")
        time.sleep(0.1)


def _stop(cluster: SlurmCluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    """End the jobs, then the daemons: a job's step outlives its daemon."""
    if len(daemons) > len(_NODES):
        cluster.run("scancel", "--user", "root")
        until = time.monotonic() + 15
        while cluster.run("squeue", "--noheader").stdout.strip() and time.monotonic() < until:
            time.sleep(0.1)
    for daemon in daemons:
        daemon.send_signal(signal.SIGTERM)
    for daemon in daemons:
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    left = [one for one in psutil.process_iter(["environ"]) if _is_of(one, cluster.folder)]
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=10)


def _is_of(process: psutil.Process, folder: Path) -> bool:
    return (process.info["environ"] or {}).get("SLURM_CONF") == str(folder / "slurm.conf")
