"""deploy/kubernetes is valid, and what it says of the server is what the server has."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client import CollectorRegistry
from serving import ROOT

from server import __version__, lifecycle, runtime
from server.api.service_names import SERVICE
from server.engine.engine import Engine
from server.engine.scheduling import QueueLimits
from server.observability.metrics import LiveCollector, Metrics
from server.settings import Settings

KUBERNETES = "1.37"
OVERLAYS = ("cpu", "gpu")
KUBECTL = Path(sys.executable).parent / "kubectl"
# Kinds that Kubernetes gets from others, whose schemas are not among its own.
FOREIGN = {"PodMonitor"}

Resource = dict[str, Any]


def rendered(overlay: str) -> list[Resource]:
    folder = ROOT / "deploy" / "kubernetes" / "overlays" / overlay
    command = [KUBECTL, "kustomize", str(folder)]
    return list(yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


@pytest.fixture(scope="module", params=OVERLAYS)
def resources(request: pytest.FixtureRequest) -> list[Resource]:
    return rendered(request.param)


def the(kind: str, resources: list[Resource]) -> Resource:
    (found,) = (each for each in resources if each["kind"] == kind)
    return found


def pod(resources: list[Resource]) -> Resource:
    return the("Deployment", resources)["spec"]["template"]["spec"]


def server(resources: list[Resource]) -> Resource:
    (container,) = pod(resources)["containers"]
    return container


def containers(resources: list[Resource]) -> list[Resource]:
    return [*pod(resources).get("initContainers", []), *pod(resources)["containers"]]


def variables(resources: list[Resource]) -> dict[str, str]:
    """Those of the server, as far as they are known before it runs."""
    own = {each["name"]: each.get("value") for each in server(resources).get("env", [])}
    return the("ConfigMap", resources)["data"] | own


@pytest.fixture
def settings(resources: list[Resource], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the server makes of its variables."""
    for name, value in variables(resources).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    return Settings()


def test_every_resource_is_strictly_what_the_api_has(resources: list[Resource]):
    for resource in resources:
        if resource["kind"] not in FOREIGN:
            kubernetes_validate.validate(resource, KUBERNETES, strict=True)


def test_a_resource_that_the_api_has_not_is_noticed():
    deployment = the("Deployment", rendered("cpu"))
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(deployment, KUBERNETES, strict=True)


def test_everything_is_in_one_namespace_which_asks_for_restricted_pods(resources: list[Resource]):
    namespace = the("Namespace", resources)
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for resource in resources:
        if resource is not namespace:
            assert resource["metadata"]["namespace"] == namespace["metadata"]["name"], resource["kind"]


def test_pods_are_as_the_restricted_pod_security_standard_has_them(resources: list[Resource]):
    assert pod(resources)["automountServiceAccountToken"] is False
    context = pod(resources)["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(resources):
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert own["readOnlyRootFilesystem"] is True
    assert {kind for volume in pod(resources)["volumes"] for kind in set(volume) - {"name"}} <= {
        "emptyDir",
        "persistentVolumeClaim",
    }


def test_every_variable_is_a_setting(resources: list[Resource]):
    known = {f"T2I_{name.upper()}" for name in Settings.model_fields}
    assert {name for name in variables(resources) if name.startswith("T2I_")} <= known
    assert [name for name in variables(resources) if not name.startswith("T2I_")] == ["OMP_NUM_THREADS"]


def test_init_containers_look_at_what_the_server_will_serve(resources: list[Resource], settings: Settings):
    verify = pod(resources).get("initContainers", [])
    assert bool(verify) is (settings.base is not None)
    for container in verify:
        assert container["command"][:3] == ["python", "-m", "server.verify"]
        assert container["image"] == server(resources)["image"]
        assert container["envFrom"] == server(resources)["envFrom"]
        (mount,) = container["volumeMounts"]
        assert mount in server(resources)["volumeMounts"]
        assert mount["readOnly"] is True
        assert all(str(folder).startswith(f"{mount['mountPath']}/") for folder in settings.experts)


def test_ports_are_those_that_the_server_listens_on(resources: list[Resource], settings: Settings):
    ports = {port["name"]: port["containerPort"] for port in server(resources)["ports"]}
    listening = {"grpc": settings.listen, "health": settings.health_listen, "metrics": settings.metrics_listen}
    assert {name: f"0.0.0.0:{port}" for name, port in ports.items()} == listening


def test_probes_ask_the_health_port_for_services_that_the_server_has(resources: list[Resource]):
    probes = {name: server(resources)[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    (health,) = (port["containerPort"] for port in server(resources)["ports"] if port["name"] == "health")
    assert {name: probe["grpc"] for name, probe in probes.items()} == {
        "startup": {"port": health, "service": SERVICE},
        "readiness": {"port": health, "service": SERVICE},
        "liveness": {"port": health},
    }
    assert probes["readiness"]["failureThreshold"] == 1


def test_the_pod_outlives_the_drain(resources: list[Resource], settings: Settings):
    ending = lifecycle._CALLS_SECONDS + lifecycle._CONNECTIONS_SECONDS + runtime._DEVICE_SECONDS
    before = server(resources)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod(resources)["terminationGracePeriodSeconds"] >= before + settings.grace_seconds + ending


def test_selectors_find_the_pods_and_names_find_what_they_name(resources: list[Resource]):
    labels = the("Deployment", resources)["spec"]["template"]["metadata"]["labels"]
    selectors = [
        the("Deployment", resources)["spec"]["selector"]["matchLabels"],
        the("Service", resources)["spec"]["selector"],
        the("PodDisruptionBudget", resources)["spec"]["selector"]["matchLabels"],
        the("NetworkPolicy", resources)["spec"]["podSelector"]["matchLabels"],
        *(each["labelSelector"]["matchLabels"] for each in pod(resources)["topologySpreadConstraints"]),
        *(each["spec"]["selector"]["matchLabels"] for each in resources if each["kind"] == "PodMonitor"),
    ]
    assert all(selector and selector.items() <= labels.items() for selector in selectors)

    names = {port["name"] for port in server(resources)["ports"]}
    policy = the("NetworkPolicy", resources)["spec"]
    used = [port["targetPort"] for port in the("Service", resources)["spec"]["ports"]]
    used += [port["port"] for rule in policy["ingress"] for port in rule["ports"]]
    for monitor in (each for each in resources if each["kind"] == "PodMonitor"):
        used += [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
    assert set(used) <= names

    claims = {each["metadata"]["name"] for each in resources if each["kind"] == "PersistentVolumeClaim"}
    claimed = (volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod(resources)["volumes"])
    assert {claim for claim in claimed if claim} == claims


def test_nothing_is_let_out_and_callers_are_let_in_to_their_port_alone(resources: list[Resource]):
    policy = the("NetworkPolicy", resources)["spec"]
    assert (policy["policyTypes"], policy["egress"]) == (["Ingress", "Egress"], [])
    callers, collectors = policy["ingress"]
    assert [port["port"] for port in callers["ports"]] == ["grpc"]
    assert [port["port"] for port in collectors["ports"]] == ["metrics"]


def test_the_service_is_headless_so_that_clients_see_every_replica(resources: list[Resource]):
    service = the("Service", resources)["spec"]
    assert service["clusterIP"] == "None"
    assert "publishNotReadyAddresses" not in service


@pytest.fixture(scope="module")
def metrics() -> Iterator[dict[str, set[tuple[str, str]]]]:
    """The names of what the server tells on its metrics port, each with its labels."""
    engine = Engine(QueueLimits(jobs=1, jobs_per_caller=1, pixels=1, bytes=1))
    registry: CollectorRegistry = Metrics(1).registry
    registry.register(LiveCollector(engine, lambda: (0, 0, 0)))
    yield {
        sample.name: {label for each in family.samples for label in each.labels.items()}
        for family in registry.collect()
        for sample in family.samples
    }
    engine.stop()


def test_the_autoscaler_follows_a_metric_that_the_server_tells(metrics: dict[str, set[tuple[str, str]]]):
    resources = rendered("gpu")
    scaler = the("HorizontalPodAutoscaler", resources)["spec"]
    (metric,) = (each["pods"]["metric"] for each in scaler["metrics"])
    assert set(metric["selector"]["matchLabels"].items()) <= metrics[metric["name"]]
    target = {name: scaler["scaleTargetRef"][name] for name in ("apiVersion", "kind")}
    assert target.items() <= the("Deployment", resources).items()
    assert scaler["scaleTargetRef"]["name"] == the("Deployment", resources)["metadata"]["name"]
    assert "replicas" not in the("Deployment", resources)["spec"]


def test_gpus_are_asked_for_where_they_are_used():
    asked = {overlay: server(rendered(overlay))["resources"]["limits"].get("nvidia.com/gpu") for overlay in OVERLAYS}
    assert asked == {"cpu": None, "gpu": "1"}
    assert variables(rendered("gpu"))["T2I_DEVICE"] == "cuda"


def test_images_are_of_this_version():
    images = {overlay: server(rendered(overlay))["image"] for overlay in OVERLAYS}
    assert images == {
        "cpu": f"text-to-image-service:{__version__}",
        "gpu": f"text-to-image-service:{__version__}-cuda",
    }


def test_the_docs_name_the_service_and_the_label_of_its_clients():
    section = (ROOT / "docs/kubernetes.md").read_text("utf-8").split("## In a cluster")[1].split("\n## ")[0]
    resources = rendered("cpu")
    service = the("Service", resources)["metadata"]
    assert f"dns:///{service['name']}.{service['namespace']}:50051" in section
    (label,) = the("NetworkPolicy", resources)["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"].items()
    assert f'{label[0]}: "{label[1]}"' in section
    for told in re.findall(r"deploy/kubernetes/\S+?(?=[\s`),;]|$)", section):
        assert (ROOT / told).exists(), told
    assert json.dumps({"healthCheckConfig": {"serviceName": SERVICE}})[1:-1] in " ".join(section.split())
