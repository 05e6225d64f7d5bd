"""The files for Kubernetes: valid by the published schemas, of one mind with each other and with the service, and run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from autobatch import __version__
from autobatch_server.pods import PREFIX, Pod
from autobatch_server.routes.admission import router
from autobatch_server.settings import Settings

if TYPE_CHECKING:
    from conftest import Libraries

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker/kubernetes"
VERSIONS = [f"1.{minor}" for minor in range(30, 38)]


def documents(name: str) -> list[dict[str, Any]]:
    return [dict(one) for one in YAML(typ="safe").load_all((FOLDER / name).read_text())]


def of_kind(name: str, kind: str) -> dict[str, Any]:
    [found] = [one for one in documents(name) if one["kind"] == kind]
    return found


ALL = [(path.name, one) for path in sorted(FOLDER.glob("*.yaml")) for one in documents(path.name)]


@pytest.mark.parametrize(("name", "form"), ALL, ids=[f"{name} {form['kind']}" for name, form in ALL])
def test_every_object_keeps_to_the_published_schemas(name: str, form: dict[str, Any]) -> None:
    """Of every version that has the webhook's conditions, with no field that Kubernetes does not know."""
    if form["apiVersion"].startswith("cert-manager.io/"):  # a custom resource, whose schema is not Kubernetes' own
        assert form["kind"] in {"Issuer", "Certificate"}
        return
    for version in VERSIONS:
        assert kubernetes_validate.validate(form, version, strict=True) == version


def test_a_schema_refuses_what_is_misspelt() -> None:
    """The check above can fail."""
    form = of_kind("train-with-webhook.yaml", "Job")
    form["spec"]["template"]["spec"]["restartPolcy"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError, match="restartPolcy"):
        kubernetes_validate.validate(form, VERSIONS[-1], strict=True)


def test_the_webhook_never_holds_a_pod_up() -> None:
    """It is ignored where it fails, waits a second, changes nothing elsewhere, and reaches the service's own route."""
    [webhook] = of_kind("webhook.yaml", "MutatingWebhookConfiguration")["webhooks"]
    assert (webhook["failurePolicy"], webhook["timeoutSeconds"], webhook["sideEffects"]) == ("Ignore", 1, "None")
    assert webhook["admissionReviewVersions"] == ["v1"]
    service, there = of_kind("service.yaml", "Service"), webhook["clientConfig"]["service"]
    assert (there["name"], there["namespace"]) == (service["metadata"]["name"], service["metadata"]["namespace"])
    assert there["port"] == service["spec"]["ports"][0]["port"]
    [route] = router.routes
    assert there["path"] == route.path
    [rule] = webhook["rules"]
    assert (rule["operations"], rule["resources"]) == (["CREATE"], ["pods"])
    assert f"'{PREFIX}workload' in object.metadata.annotations" in webhook["matchConditions"][0]["expression"]
    # The service's own Pod must start without itself.
    [excluded] = webhook["namespaceSelector"]["matchExpressions"]
    assert service["metadata"]["namespace"] in excluded["values"]


def test_the_service_the_proxy_and_the_certificate_fit_together() -> None:
    """Labels, ports, secrets and volumes by the same names; nothing runs as root."""
    deployment, service = of_kind("service.yaml", "Deployment"), of_kind("service.yaml", "Service")
    template = deployment["spec"]["template"]
    assert (
        service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    )
    spec = template["spec"]
    containers = [*spec["initContainers"], *spec["containers"]]
    volumes = {one["name"] for one in spec["volumes"]}
    for container in containers:
        assert {one["name"] for one in container["volumeMounts"]} <= volumes
        # Training jobs write where they like.
        assert container["securityContext"].get("readOnlyRootFilesystem", False) == (container["name"] != "runner")
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    proxy = next(one for one in containers if one["name"] == "proxy")
    ports = {one["name"]: one["containerPort"] for one in proxy["ports"]}
    assert service["spec"]["ports"][0]["targetPort"] in ports
    configuration, settings = [
        next(one["data"][key] for one in documents("service.yaml") if key in one.get("data", {}))
        for key in ("nginx.conf", "server.toml")
    ]
    uncommented = re.sub(r"^# (?=cluster_gpus|\[|factory)", "", settings, flags=re.MULTILINE)
    assert set(tomllib.loads(uncommented)) == {"cluster_gpus", "workloads"}
    assert set(tomllib.loads(uncommented)) <= set(Settings.model_fields)
    assert f"listen {ports['https']} ssl;" in configuration
    authority, certificate = [one["spec"] for one in documents("certificate.yaml") if one["kind"] == "Certificate"]
    root, issuer = [one for one in documents("certificate.yaml") if one["kind"] == "Issuer"]
    assert (authority["isCA"], authority["issuerRef"]["name"]) == (True, root["metadata"]["name"])
    assert issuer["spec"]["ca"]["secretName"] == authority["secretName"]
    assert certificate["issuerRef"]["name"] == issuer["metadata"]["name"]
    [tls] = [one["secret"]["secretName"] for one in spec["volumes"] if one["name"] == "tls"]
    assert certificate["secretName"] == tls
    meta = service["metadata"]
    assert certificate["dnsNames"] == [f"{meta['name']}.{meta['namespace']}.svc"]
    assert of_kind("webhook.yaml", "MutatingWebhookConfiguration")["metadata"]["annotations"] == {
        "cert-manager.io/inject-ca-from": f"{meta['namespace']}/autobatch"
    }
    # Everything lies in the namespace that is made first.
    namespace = of_kind("namespace.yaml", "Namespace")["metadata"]["name"]
    for name in ("certificate.yaml", "service.yaml"):
        assert {one["metadata"]["namespace"] for one in documents(name)} == {namespace}
        assert (
            "kubectl apply -f namespace.yaml -f certificate.yaml -f service.yaml"
            in (FOLDER / "service.yaml").read_text()
        )


def test_the_service_is_checked_where_it_runs() -> None:
    """By the command that its image has, and the proxy takes up renewed certificates."""
    [pod] = [one["spec"]["template"]["spec"] for one in documents("service.yaml") if one["kind"] == "Deployment"]
    service, _, proxy = pod["containers"]
    words = service["livenessProbe"]["exec"]["command"]
    assert words[:3] == ["autobatch", "serve", "--check"]
    assert (words[3:], service["args"][1:3]) == (["--host", "127.0.0.1"], ["--host", "127.0.0.1"])
    [command] = proxy["args"]
    assert command.count("/config/nginx.conf") == 2
    assert "nginx -s reload" in command


def test_images_are_of_this_version() -> None:
    """What is built by the Dockerfile's own words is what the files name."""
    for path in FOLDER.glob("*.yaml"):
        for image, tag in re.findall(r"image: (autobatch-[a-z]+):(\S+)", path.read_text()):
            assert image in {"autobatch-server", "autobatch-runner"}
            assert tag == __version__, path.name


def test_the_annotations_of_the_example_are_those_that_are_read() -> None:
    """Those that are shown as comments too."""
    text = (FOLDER / "train-with-webhook.yaml").read_text()
    pod = of_kind("train-with-webhook.yaml", "Job")["spec"]["template"]
    # The API server writes a quantity as text.
    pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = "1"
    commented = re.findall(rf"# {PREFIX}([a-z-]+): +(\"?)(.+?)\2  ", text)
    assert len(commented) == 6
    for name, _, value in commented:
        pod["metadata"]["annotations"][f"{PREFIX}{name}"] = value
    question = Pod(pod).question()
    assert question is not None
    assert (question.workload, question.target, question.world_size) == ("gpt2?seq_len=512", 256, 16)
    assert question.gpus == ("A100-SXM4-80GB", "L4")
    assert (question.split, question.basis, question.sets_affinity) == ("balanced", "measured", False)


@pytest.mark.slow
def test_a_training_probes_first_and_then_trains(libraries: Libraries, tmp_path: Path) -> None:
    """The manifest's own code and commands, with its volumes as folders: the first container's plan is the second one's."""
    code = of_kind("probe-then-train.yaml", "ConfigMap")["data"]
    spec = of_kind("probe-then-train.yaml", "Job")["spec"]["template"]["spec"]
    for volume in ("code", "plan"):
        (tmp_path / volume).mkdir()
    for name, text in code.items():
        (tmp_path / "code" / name).write_text(text)
    [probe], [train] = spec["initContainers"], spec["containers"]
    probed = run_container(probe, tmp_path)
    assert probed.returncode == 0, probed.stderr
    assert "plan written to" in probed.stderr
    trained = run_container(train, tmp_path, card="A100-SXM4-40GB")
    assert trained.returncode == 0, trained.stderr
    sizes = re.fullmatch(r"trained with (\d+) x (\d+) = 262144\n", trained.stdout)
    assert sizes is not None, trained.stdout
    assert int(sizes[1]) * int(sizes[2]) == 262144
    assert int(sizes[2]) > 1


def run_container(container: dict[str, Any], folder: Path, card: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a container's command here, on an emulated card where one is named."""
    paths = {one["mountPath"]: str(folder / one["name"]) for one in container["volumeMounts"]}

    def here(word: str) -> str:
        for path, place in paths.items():
            word = re.sub(rf"(^|=){path}(?=/)", rf"\g<1>{place}", word)
        return word

    programs = {"autobatch": [sys.executable, "-m", "autobatch"], "python3": [sys.executable]}
    program, *words = map(here, container["command"])
    command = [*programs[program], *words]
    if card is not None:
        command = [*programs["autobatch"], "emulate", card, "--", *command]
    own = {one["name"]: here(one["value"]) for one in container.get("env", [])}
    python_path = os.pathsep.join(map(str, (ROOT, ROOT / "server")))
    return subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": python_path, **own},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
