"""The proxy of the manifest, as a real nginx runs it: without a token it leads to the webhook alone."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from debian_packages import unpack_packages
from ruamel.yaml import YAML
from service_fakes import FakeExecutor, make_report, make_settings, running_service, succeeding

from autobatch.store import NewMeasurement

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service_fakes import RunningService

ROOT = Path(__file__).parents[2]
REVIEW = json.loads((ROOT / "tests/data/kubernetes/review.json").read_text())

pytestmark = pytest.mark.slow


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[RunningService]:
    """A service that tokens close, which knows gpt2 on an L4."""
    with running_service(make_settings(tmp_path), executor=FakeExecutor(succeeding)) as running:
        new = NewMeasurement.of(make_report(gpu="L4", largest=17), workload="gpt2", gpu="L4", source="reported")
        running.services.measurements.add(new, token_id=None)
        running.services.tokens.create("somebody", ["plan:read"], seconds=None)
        yield running


def deployment() -> tuple[str, dict[str, Any]]:
    """The proxy's configuration, and the Deployment's Pod."""
    forms = list(YAML(typ="safe").load_all((ROOT / "docker/kubernetes/service.yaml").read_text()))
    [configuration] = [one["data"]["nginx.conf"] for one in forms if "nginx.conf" in one.get("data", {})]
    [pod] = [one["spec"]["template"]["spec"] for one in forms if one["kind"] == "Deployment"]
    return configuration, pod


def write_token(pod: dict[str, Any], folder: Path, database_url: str) -> None:
    """Run what the first container runs, with its volume as a folder."""
    [container] = pod["initContainers"]
    program = folder / "autobatch"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m autobatch "$@"\n')
    program.chmod(0o755)
    [script] = container["args"]
    python_path = os.pathsep.join(map(str, (ROOT, ROOT / "server")))
    subprocess.run(
        [*container["command"], script.replace("/token/", f"{folder}/")],
        env={
            "PATH": f"{folder}:/usr/bin:/bin",
            "PYTHONPATH": python_path,
            "HOSTNAME": "autobatch-0",
            "AUTOBATCH_SERVER_DATABASE_URL": database_url,
        },
        check=True,
        capture_output=True,
    )


def test_the_api_server_reaches_the_webhook_and_nothing_else(closed: RunningService, tmp_path: Path) -> None:
    """Without a token the webhook answers with a patch; every other address asks for one, by HTTPS as by HTTP."""
    prefix = unpack_packages(tmp_path, "nginx")
    configuration, pod = deployment()
    write_token(pod, tmp_path, closed.services.settings.database_url)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=autobatch",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", tmp_path / "tls.key", "-out", tmp_path / "tls.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    for there, here in (
        ("/tmp/", f"{tmp_path}/"),  # noqa: S108 - the container's own; before the others, which may lead there
        ("listen 8443", f"listen 127.0.0.1:{port}"),
        ("127.0.0.1:8000", closed.url.removeprefix("http://")),
        ("/tls/", f"{tmp_path}/"),
        ("/token/", f"{tmp_path}/"),
    ):
        assert there in configuration
        configuration = configuration.replace(there, here)
    file = tmp_path / "nginx.conf"
    file.write_text(configuration)
    with (tmp_path / "nginx.log").open("wb") as log:
        proxy = subprocess.Popen(
            [prefix / "usr/sbin/nginx", "-g", "daemon off;", "-c", file, "-p", tmp_path, "-e", "stderr"],
            stdout=log, stderr=log,
        )  # fmt: skip
        try:
            trusted = ssl.create_default_context(cafile=str(tmp_path / "tls.crt"))
            with httpx.Client(base_url=f"https://localhost:{port}", verify=trusted, trust_env=False) as client:
                wait_for(client, tmp_path / "nginx.log")
                answered = client.post("/v1/kubernetes/mutate", json=REVIEW)
                assert answered.status_code == 200, answered.text
                assert answered.json()["response"]["patchType"] == "JSONPatch"
                query = "/v1/plan?workload=gpt2&gpu=L4&target=256"
                assert client.get(query).status_code == 401
                token = closed.services.tokens.create("other", ["plan:read"], seconds=None)[1]
                assert client.get(query, headers={"Authorization": f"Bearer {token}"}).json()["verdict"] == "fits"
                for path in ("/v1/kubernetes/mutate/", "/v1/kubernetes/mutate/../../plan", "/V1/kubernetes/mutate"):
                    assert client.post(path, json=REVIEW).status_code in {401, 404, 405}, path
                assert client.get("/readyz").status_code == 200
        finally:
            proxy.terminate()
            assert proxy.wait(20) == 0


def wait_for(client: httpx.Client, log: Path) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            client.get("/livez")
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError(log.read_text())
