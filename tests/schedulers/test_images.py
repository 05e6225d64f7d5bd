"""The images as the Dockerfile makes them: built without a container engine by buildah, started, asked, and gone again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker/Dockerfile"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PROBE = {"workload": "gpt2?layers=2&width=128&heads=2&vocab=512", "target": 8, "gpu": "T4"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True, kw_only=True)
class Builder:
    """buildah with a store of its own."""

    folder: Path

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one of its commands."""
        done = subprocess.run(self.words(*words), env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, (done.stdout + done.stderr)[-4000:]
        return done

    def words(self, *words: str) -> list[str]:
        """A command line of it."""
        store = ("--root", str(self.folder / "store"), "--runroot", str(self.folder / "run"))
        return ["buildah", *store, "--storage-driver", "overlay", *words]

    @property
    def environment(self) -> dict[str, str]:
        """Its variables: what it keeps for a while lies with the rest."""
        return {**os.environ, "TMPDIR": str(self.folder / "tmp")}

    def build(self, target: str) -> dict[str, Any]:
        """Build an image from the checkout and return what it is configured to."""
        # Behind a proxy that shows certificates of its own, the machine's are needed to fetch packages.
        mounts = ["--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro"] if CERTIFICATES.exists() else []
        self.run(
            "build", "--isolation", "chroot", "--pull=never", "--format", "docker", "--layers", *mounts,
            "--file", str(DOCKERFILE), "--target", target, "--tag", f"localhost/{target}:test", str(ROOT),
        )  # fmt: skip
        shown = json.loads(self.run("inspect", "--type", "image", f"localhost/{target}:test").stdout)
        configuration: dict[str, Any] = shown["Docker"]["config"]
        return configuration


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """Buildah with the Dockerfile's base, which debootstrap makes; nothing of it is left."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("buildah", "debootstrap"))):
        pytest.skip("needs root, buildah and debootstrap (apt install buildah debootstrap)")
    folder = tmp_path_factory.mktemp("images")
    (folder / "tmp").mkdir()
    built = Builder(folder=folder)
    mounts = Path("/proc/self/mounts").read_text()
    try:
        make_base(built)
        yield built
    finally:
        built.run("rm", "--all", check=False)
        built.run("rmi", "--all", "--force", check=False)
        built.run("umount", "--all", check=False)
        assert Path("/proc/self/mounts").read_text() == mounts
        shutil.rmtree(folder, ignore_errors=True)


def make_base(builder: Builder) -> None:
    """Make what the Dockerfile is FROM, of Debian's packages."""
    [name] = {line.split()[1] for line in DOCKERFILE.read_text().splitlines() if line.startswith("FROM debian")}
    release = name.removeprefix("debian:").partition("-")[0]
    tree = builder.folder / "base"
    subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=ca-certificates", release, str(tree)],
        check=True, capture_output=True,
    )  # fmt: skip
    container = builder.run("from", "scratch").stdout.strip()
    builder.run("add", "--quiet", container, str(tree), "/")
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    builder.run("config", "--cmd", "bash", "--env", f"PATH={path}", container)
    builder.run("commit", "--quiet", "--rm", container, f"localhost/{name}")
    shutil.rmtree(tree)


@dataclass(frozen=True, kw_only=True)
class Container:
    """A container of an image that was built."""

    builder: Builder
    name: str
    data: Path

    def words(self, *command: str, **variables: str) -> list[str]:
        """The command line that runs something in it, as the image's own user."""
        flags = [word for key, value in variables.items() for word in ("--env", f"{key}={value}")]
        # Not at /data, which the images declare a volume: buildah gives each container one of its own there.
        data = [
            "--volume",
            f"{self.data}:/shared",
            "--env",
            "AUTOBATCH_SERVER_DATABASE_URL=sqlite:////shared/server.sqlite3",
        ]
        return self.builder.words("run", "--isolation", "chroot", *flags, *data, self.name, "--", *command)

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run something to its end."""
        return subprocess.run(
            self.words(*command, **variables), env=self.builder.environment, capture_output=True, text=True, check=False
        )

    @contextlib.contextmanager
    def running(self, *command: str, log: Path, **variables: str) -> Iterator[None]:
        """Run something for as long as the context lasts, and end it as an engine does: by SIGTERM to the first process."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.words(*command, **variables), env=self.builder.environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
            try:
                yield
            finally:
                first = innermost(process.pid, command[0])
                if first is not None:
                    first.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0, log.read_text()[-3000:]


def innermost(pid: int, program: str) -> psutil.Process | None:
    """The container's first process: what buildah started under that name."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            if child.name() == program:
                return child
    return None


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The volume, which the images' user may write to."""
    folder = tmp_path / "data"
    folder.mkdir()
    os.chown(folder, 10001, 10001)
    return folder


@contextlib.contextmanager
def container(builder: Builder, target: str, data: Path) -> Iterator[Container]:
    name = builder.run("from", "--pull-never", f"localhost/{target}:test").stdout.strip()
    try:
        yield Container(builder=builder, name=name, data=data)
    finally:
        builder.run("rm", name)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
        return port


def ask(port: int, token: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {token}"}
    method = "GET" if body is None else "POST"
    answer = httpx.request(
        method, f"http://127.0.0.1:{port}{path}", headers=headers, json=body, timeout=90, trust_env=False
    )
    assert answer.is_success, answer.text
    form: dict[str, Any] = answer.json()
    return form


def wait_until_healthy(checked: Container, check: list[str], seconds: float, **variables: str) -> None:
    until = time.monotonic() + seconds
    while (done := checked.run(*check, **variables)).returncode:
        assert time.monotonic() < until, done.stderr
        time.sleep(0.5)


def test_the_images_probe_and_answer(builder: Builder, data: Path, tmp_path: Path) -> None:
    """A server without torch, a runner with the emulated card compiled in, one volume: a probe that is asked for is answered."""
    server, runner = builder.build("server"), builder.build("runner")
    for configuration in (server, runner):
        assert configuration["User"] == "10001"
        assert configuration["Entrypoint"] == ["tini", "--", "autobatch"]
        assert configuration["Healthcheck"]["Test"] == ["CMD", "autobatch", "serve", "--check"]
    port = free_port()
    here = {"AUTOBATCH_SERVER_PORT": str(port)}
    with container(builder, "server", data) as answers, container(builder, "runner", data) as probes:
        assert answers.run("python3", "-c", "import torch").returncode == 1
        start, check = [*server["Entrypoint"], *server["Cmd"]], server["Healthcheck"]["Test"][1:]
        refused = answers.run(*start, **here)
        assert refused.returncode == 2
        assert "no token exists" in refused.stderr
        assert answers.run(*check, **here).returncode == 69
        token = answers.run("autobatch", "token", "create", "me", "--scope", "probe:write").stdout.strip()
        without_gpus = {"AUTOBATCH_SERVER_REAL_GPUS": "false"}
        assert probes.run("sh", "-c", "ls ~/.cache/autobatch/emulator/*/libcuda.so.1").returncode == 0
        # The image's health checks, as an engine would run them.
        assert probes.run(*runner["Healthcheck"]["Test"][1:], **without_gpus).returncode == 69
        with (
            answers.running(*start, log=tmp_path / "server.log", **here),
            probes.running(*runner["Entrypoint"], *runner["Cmd"], log=tmp_path / "runner.log", **without_gpus),
        ):
            wait_until_healthy(answers, check, 30, **here)
            wait_until_healthy(probes, runner["Healthcheck"]["Test"][1:], 60, **without_gpus)
            probe = ask(port, token, "/v1/probes", PROBE)
            for _ in range(3):
                probe = ask(port, token, f"/v1/probes/{probe['id']}?wait=60")
                if probe["state"] not in {"queued", "running"}:
                    break
            assert probe["state"] == "succeeded", (tmp_path / "runner.log").read_text()[-3000:]
            query = "workload=gpt2%3Flayers%3D2%26width%3D128%26heads%3D2%26vocab%3D512&gpu=T4&target=8"
            answer = ask(port, token, f"/v1/plan?{query}")
            assert (answer["verdict"], answer["basis"]) == ("fits", "emulated")
            assert answer["plan"] == probe["plan"]
        assert answers.run(*check, **here).returncode == 69
