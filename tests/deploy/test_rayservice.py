"""deploy/ray/rayservice.yaml is a RayService as KubeRay's ray.io/v1 has it, and says of the service what there is."""

import copy
import re
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from serving import ROOT

from server import __version__
from server.settings import Settings

FOLDER = ROOT / "deploy" / "ray"
KUBERNETES = "1.37"
ROUTING = "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING"

Resource = dict[str, Any]


def struct(required: list[str], **fields: Any) -> Resource:
    return {"type": "object", "required": required, "properties": fields, "additionalProperties": False}


TEXT, NUMBER, TRUTH = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
OF_KUBERNETES = {"type": "object"}  # validated by its own schema

# Names and types from KubeRay's ray-operator/apis/ray/v1, rayservice_types.go and raycluster_types.go: the fields that
# may be used here. Pods and the Service below are Kubernetes' own.
RAY_SERVICE = struct(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=struct(["name"], name=TEXT, labels=TEXTS, annotations=TEXTS),
    spec=struct(
        ["serveConfigV2", "rayClusterConfig"],
        serveConfigV2=TEXT,
        serveService=OF_KUBERNETES,
        rayClusterConfig=struct(
            ["headGroupSpec"],
            rayVersion=TEXT,
            enableInTreeAutoscaling=TRUTH,
            autoscalerOptions=struct(
                [], idleTimeoutSeconds=NUMBER, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}
            ),
            headGroupSpec=struct(["rayStartParams", "template"], rayStartParams=TEXTS, template=OF_KUBERNETES),
            workerGroupSpecs={
                "type": "array",
                "items": struct(
                    ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
                    groupName=TEXT,
                    replicas=NUMBER,
                    minReplicas=NUMBER,
                    maxReplicas=NUMBER,
                    numOfHosts=NUMBER,
                    rayStartParams=TEXTS,
                    template=OF_KUBERNETES,
                ),
            },
        ),
    ),
)


@pytest.fixture
def manifest() -> Resource:
    return yaml.safe_load((FOLDER / "rayservice.yaml").read_text("utf-8"))


def groups(manifest: Resource) -> list[Resource]:
    cluster = manifest["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def container(group: Resource) -> Resource:
    (found,) = group["template"]["spec"]["containers"]
    return found


def environment(group: Resource) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container(group)["env"]}


def validate(manifest: Resource) -> None:
    jsonschema.validate(manifest, RAY_SERVICE)
    service = {"apiVersion": "v1", "kind": "Service", **manifest["spec"]["serveService"]}
    kubernetes_validate.validate(service, KUBERNETES, strict=True)
    for group in groups(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_manifest_is_strictly_what_kuberay_and_kubernetes_have(manifest: Resource):
    validate(manifest)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (("spec",), "serveConfig"),
        (("spec", "rayClusterConfig", "headGroupSpec"), "replicas"),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0), "maxReplica"),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec"), "container"),
        (("spec", "serveService", "spec"), "port"),
    ],
)
def test_what_they_do_not_have_is_noticed(manifest: Resource, path: tuple[str | int, ...], name: str):
    wrong = copy.deepcopy(manifest)
    place: Any = wrong
    for each in path:
        place = place[each]
    place[name] = 1
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(wrong)


def test_it_serves_what_the_configuration_for_gpus_does(manifest: Resource):
    served = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    assert served["http_options"].pop("host") == "0.0.0.0"  # KubeRay asks the pods' own addresses for their health
    shipped = yaml.safe_load((FOLDER / "gpu.yaml").read_text("utf-8"))
    del shipped["http_options"]["host"]
    assert served == shipped


def test_ports_are_those_that_ray_listens_on(manifest: Resource):
    served = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    listening = {"serve": served["http_options"]["port"], "grpc": served["grpc_options"]["port"]}
    for group in groups(manifest):
        ports = {port["name"]: port["containerPort"] for port in container(group)["ports"]}
        assert listening.items() <= ports.items()
    told = {port["targetPort"]: port["port"] for port in manifest["spec"]["serveService"]["spec"]["ports"]}
    assert told == listening


def test_every_replica_has_a_worker_with_its_gpu_and_its_cores(manifest: Resource):
    (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    (deployment,) = application["deployments"]
    head, worker = groups(manifest)
    assert head["rayStartParams"]["num-cpus"] == "0"
    has = container(worker)["resources"]["limits"]
    needs = deployment["ray_actor_options"]
    assert (int(has["nvidia.com/gpu"]), int(has["cpu"]) >= needs["num_cpus"]) == (needs["num_gpus"], True)
    assert worker["maxReplicas"] == deployment["autoscaling_config"]["max_replicas"]
    assert worker["template"]["spec"]["terminationGracePeriodSeconds"] >= deployment["graceful_shutdown_timeout_s"]


def test_an_ingress_sends_calls_to_all_nodes_alike(manifest: Resource):
    assert {environment(group)[ROUTING] for group in groups(manifest)} == {"0"}


def test_variables_are_settings_and_replicas_receive_what_they_admit(
    manifest: Resource, monkeypatch: pytest.MonkeyPatch
):
    (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    (deployment,) = application["deployments"]
    _, worker = groups(manifest)
    variables = deployment["ray_actor_options"]["runtime_env"]["env_vars"]
    variables |= environment(worker)
    del variables[ROUTING]
    assert set(variables) <= {f"T2I_{name.upper()}" for name in Settings.model_fields}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.max_queue == deployment["max_ongoing_requests"]
    (mount,) = (each for each in container(worker)["volumeMounts"] if each["name"] == "weights")
    assert all(str(folder).startswith(mount["mountPath"]) for folder in settings.experts)


def test_versions_are_those_of_the_image(manifest: Resource):
    (ray,) = re.findall(r"^ray\[serve\]==(.*)$", (FOLDER / "requirements.txt").read_text("utf-8"), re.MULTILINE)
    assert manifest["spec"]["rayClusterConfig"]["rayVersion"] == ray
    image = f"text-to-image-service-ray:{__version__}-cuda"
    assert {container(group)["image"] for group in groups(manifest)} == {image}
    assert image in (FOLDER / "Dockerfile").read_text("utf-8")
