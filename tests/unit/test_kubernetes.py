"""The chart and the manifests say the same, are valid, and agree with the code they deploy."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from fastapi.testclient import TestClient

from latentwire.service.app import create_app
from latentwire.service.auth.keys import key_line, new_key
from latentwire.service.cli.server import CLOSING_SECONDS
from latentwire.service.processes.supervisor import END_SECONDS
from latentwire.service.settings import PREFIX, Settings
from tests.documents import commands
from tests.unit.test_deploy import COMPOSE, DEPLOY, instructions, run, tool

Manifest = dict[str, Any]
HELM, K8S = DEPLOY / "helm", DEPLOY / "k8s"
CHART = HELM / "latentwire"
ABOUT: dict[str, str] = yaml.safe_load((CHART / "Chart.yaml").read_text())
NAMESPACE = "latentwire"
# An overlay, one with a component more, and the files of values that make the chart say the same.
SAME = {
    "base": [],
    "overlays/gpu": ["gpu"],
    "overlays/replicas": ["gpu", "replicas"],
    "base + openshift": ["openshift"],
    "overlays/replicas + openshift": ["gpu", "replicas", "openshift"],
}
CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}  # of operators: Kubernetes has no schema of them


def rendered(*command: str | Path) -> list[Manifest]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=DEPLOY, timeout=60)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def by_chart(*arguments: str) -> list[Manifest]:
    return rendered(tool("helm"), "template", NAMESPACE, CHART, "--namespace", NAMESPACE, *arguments)


def of_chart(where: str) -> list[Manifest]:
    return by_chart(*(argument for name in SAME[where] for argument in ("--values", str(HELM / f"{name}.yaml"))))


@pytest.fixture(scope="module")
def kustomized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Manifest]]:
    """What ``kubectl apply -k`` would send, by a key of ``SAME``."""
    found = {}
    for where in SAME:
        overlay, _, component = where.partition(" + ")
        folder = K8S / overlay
        if component:
            folder = tmp_path_factory.mktemp("overlay")
            lines = {"resources": [K8S / overlay], "components": [K8S / "components" / component]}
            text = {key: [os.path.relpath(path, folder) for path in paths] for key, paths in lines.items()}
            (folder / "kustomization.yaml").write_text(yaml.safe_dump(text))
        found[where] = rendered(tool("kubectl"), "kustomize", folder)
    return found


@pytest.fixture(params=list(SAME))
def manifests(request: pytest.FixtureRequest, kustomized: dict[str, list[Manifest]]) -> list[Manifest]:
    return kustomized[request.param]


def one(manifests: list[Manifest], kind: str, name: str = "latentwire") -> Manifest:
    (found,) = (each for each in manifests if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


def pod(manifests: list[Manifest], name: str = "latentwire") -> Manifest:
    template: Manifest = one(manifests, "Deployment", name)["spec"]["template"]
    return template


def container(manifests: list[Manifest], name: str = "latentwire") -> Manifest:
    (found,) = pod(manifests, name)["spec"]["containers"]
    return dict(found)


def environment(manifests: list[Manifest]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(manifests)["env"]}


def comparable(value: Any) -> Any:
    """Without the order of what has a name, and the namespace, which helm is told and kustomize writes down."""
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items() if key != "namespace"}
    if isinstance(value, list):
        items = [comparable(item) for item in value]
        named = all(isinstance(item, dict) and "name" in item for item in items)
        return sorted(items, key=lambda item: str(item["name"])) if named else items
    return value


@pytest.mark.parametrize("limits", ["null", '{"memory": null}'])
def test_a_gpu_is_a_limit_where_there_is_no_other(limits: str) -> None:
    made = by_chart("--values", str(HELM / "gpu.yaml"), "--set-json", f'resources={{"limits": {limits}}}')
    assert container(made)["resources"]["limits"] == {"nvidia.com/gpu": 1}


@pytest.mark.parametrize("where", SAME)
def test_the_chart_and_the_overlays_say_the_same(where: str, kustomized: dict[str, list[Manifest]]) -> None:
    sides = (of_chart(where), [each for each in kustomized[where] if each["kind"] != "Namespace"])
    chart, overlay = ({(m["kind"], m["metadata"]["name"]): comparable(m) for m in side} for side in sides)
    assert chart == overlay


def test_the_manifests_that_come_from_the_chart_are_up_to_date(tmp_path: Path) -> None:
    tool("helm")
    # Of the environment, or beside the interpreter.
    path = os.pathsep.join([str(Path(tool("helm")).parent), os.environ["PATH"]])
    subprocess.run([K8S / "render.sh", tmp_path], check=True, timeout=60, env={**os.environ, "PATH": path})
    made = {file.relative_to(tmp_path): file.read_text() for file in tmp_path.rglob("*.yaml")}
    assert made
    assert {name: (K8S / name).read_text() for name in made} == made, "make manifests"


def test_helm_and_yamllint_and_shellcheck_find_nothing() -> None:
    run(tool("yamllint"), "--strict", "--config-file", DEPLOY.parent / ".yamllint", DEPLOY)
    run(tool("shellcheck"), K8S / "render.sh")
    values = [argument for name in ("gpu", "replicas") for argument in ("--values", HELM / f"{name}.yaml")]
    run(tool("helm"), "lint", "--strict", CHART, *values)


@pytest.mark.parametrize("version", [ABOUT["kubeVersion"].strip(">=").removesuffix(".0-0"), "1.37"])
def test_every_manifest_has_the_schema_of_the_oldest_and_of_the_newest_kubernetes(
    version: str, manifests: list[Manifest]
) -> None:
    for manifest in manifests:
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_a_field_that_kubernetes_does_not_know_would_be_found(kustomized: dict[str, list[Manifest]]) -> None:
    wrong = one(kustomized["base"], "Service")
    wrong = {**wrong, "spec": {**wrong["spec"], "port": 80}}
    with pytest.raises(kubernetes_validate.ValidationError, match="'port' was unexpected"):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ("replica=3", "additional properties 'replica'"),
        ("bridges={news}", "does not match"),
        ("replicas=2", "several replicas find each other's latents in a Redis"),
        (
            "autoscaling.enabled=true,redis.enabled=true",
            "autoscaling.enabled asks Prometheus, which monitoring.enabled",
        ),
        ("autoscaling.minReplicas=9", "autoscaling.minReplicas is 9, above maxReplicas, 4"),
        ("redis.enabled=true,env[0].name=LW_REDIS_URL", "redis.enabled makes another"),
        ("env[0].name=LW_DRAIN_DELAY", "env names LW_DRAIN_DELAY, which the chart sets: use drainDelaySeconds"),
        ("env[0].name=LW_DRAIN_TIMEOUT", "env names LW_DRAIN_TIMEOUT, which the chart sets: use drainSeconds"),
        ("keysSecret=,env[0].name=LW_ALLOWED_HOSTS", "use allowedHosts"),
        ("env[0].name=LW_PORT", "env names LW_PORT: the chart's probes and its Service want port 8000"),
        ("env[0].name=LW_THREADS,env[0].value=7", "got number, want string"),
        ("networkPolicy.from=null", "missing property 'from'"),
        ("redis=null", "missing property 'redis'"),
    ],
)
def test_the_chart_refuses_values_that_it_does_not_know_or_that_do_not_go_together(
    arguments: str, complaint: str
) -> None:
    command = [tool("helm"), "template", str(CHART), "--set", arguments]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode and complaint in refused.stderr


def test_variables_are_settings_and_their_values_are_taken(
    manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(manifests).items():
        assert name.startswith(PREFIX)
        monkeypatch.setenv(name, value)
    Settings()  # refuses what it does not know


def test_probes_and_the_monitor_ask_what_the_service_answers(
    kustomized: dict[str, list[Manifest]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = kustomized["overlays/replicas"]
    asked = [container(manifests)[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    (endpoint,) = one(manifests, "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["authorization"]["type"] == "Bearer" and endpoint["authorization"]["credentials"]["key"] == "key"
    key, digest = new_key()
    keys = tmp_path / "keys.jsonl"
    keys.write_text(key_line("prometheus", digest, ()) + "\n")
    queries = [trigger["metadata"]["query"] for trigger in one(manifests, "ScaledObject")["spec"]["triggers"]]
    application = create_app(Settings(api_keys_file=keys), {"builtin": "builtin"})
    with TestClient(application, "http://10.1.2.3:8000") as client:  # as the kubelet calls it
        for probe in asked:
            assert client.get(probe["path"]).status_code in (200, 503)
        assert client.get(endpoint["path"]).status_code == 401
        answer = client.get(endpoint["path"], headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 200
    metrics = [metric for query in queries for metric in re.findall(r"latentwire_\w+", query)]
    assert len(metrics) == 2 and all(f"# TYPE {metric} gauge" in answer.text for metric in metrics)


def test_the_alerts_of_the_cluster_are_those_of_compose_with_the_job_of_the_release(
    kustomized: dict[str, list[Manifest]],
) -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())
    assert one(kustomized["overlays/replicas"], "PrometheusRule")["spec"] == rules
    given = ("--set", "monitoring.enabled=true", "--set", "monitoring.labels.release=kps")
    command = (tool("helm"), "template", "news", CHART, *given)
    manifests = rendered(*command)
    rule, monitor = one(manifests, "PrometheusRule", "news"), one(manifests, "ServiceMonitor", "news")
    labels = rule["metadata"]["labels"]
    assert labels == monitor["metadata"]["labels"] and labels["release"] == "kps"
    (down,) = (each for each in rule["spec"]["groups"][0]["rules"] if each["alert"] == "LatentWireDown")
    assert down["expr"] == 'up{job="news"} == 0 or absent(up{job="news"})' and one(manifests, "Service", "news")
    assert not [each for each in by_chart() if each["kind"] in CUSTOM]


def test_a_packed_chart_has_the_alerts_in_it(tmp_path: Path) -> None:
    run(tool("helm"), "package", CHART, "--destination", tmp_path)
    (packed,) = tmp_path.glob("*.tgz")
    manifests = rendered(tool("helm"), "template", NAMESPACE, packed, "--set", "monitoring.enabled=true")
    assert one(manifests, "PrometheusRule") == one(by_chart("--set", "monitoring.enabled=true"), "PrometheusRule")


def test_ports_lead_to_where_the_service_listens(manifests: list[Manifest]) -> None:
    (port,) = container(manifests)["ports"]
    assert instructions("EXPOSE") == [str(port["containerPort"])] == [str(Settings().port)]
    (published,) = one(manifests, "Service")["spec"]["ports"]
    allowed = [
        allowed["port"] for rule in one(manifests, "NetworkPolicy")["spec"]["ingress"] for allowed in rule["ports"]
    ]
    probed = [container(manifests)[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "readiness", "liveness")]
    assert {published["targetPort"], *allowed, *probed} == {port["name"]}
    assert container(manifests)["args"][:2] == ["serve", "--host=0.0.0.0"]


def test_a_pod_has_the_time_that_its_end_takes(manifests: list[Manifest]) -> None:
    spec, given = pod(manifests)["spec"], environment(manifests)
    pause, drain = float(given["LW_DRAIN_DELAY"]), float(given["LW_DRAIN_TIMEOUT"])
    assert spec["terminationGracePeriodSeconds"] >= pause + drain + CLOSING_SECONDS + END_SECONDS
    assert pause >= 5  # in which every node has heard that nothing is sent here any more
    assert drain >= Settings().request_timeout  # whoever was accepted is answered


def test_pods_keep_to_the_restricted_standard(manifests: list[Manifest]) -> None:
    for deployment in [each for each in manifests if each["kind"] == "Deployment"]:
        spec = deployment["spec"]["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"].get("runAsUser") != 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec["automountServiceAccountToken"] and not spec["enableServiceLinks"]
        for each in spec["containers"]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert each["resources"]["limits"]["memory"] and "cpu" not in each["resources"]["limits"]
    assert one(manifests, "Namespace")["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}


def test_the_user_is_that_of_the_image_or_the_cluster_chooses_one(kustomized: dict[str, list[Manifest]]) -> None:
    user = int(instructions("USER")[0].split(":")[0])
    context = pod(kustomized["base"])["spec"]["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (user, 0, 0)
    for deployment in ("latentwire", "latentwire-redis"):
        chosen = pod(kustomized["overlays/replicas + openshift"], deployment)["spec"]["securityContext"]
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(chosen)


def test_what_the_image_writes_to_is_mounted(manifests: list[Manifest]) -> None:
    spec, mounted = pod(manifests)["spec"], {m["mountPath"]: m["name"] for m in container(manifests)["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in map(dict, spec["volumes"])}
    assert set(mounted.values()) == set(volumes)
    assert {*instructions("VOLUME"), "/tmp"} <= set(mounted) and volumes[mounted["/tmp"]] == {"emptyDir": {}}
    assert Path(environment(manifests)["LW_API_KEYS_FILE"]).parent.as_posix() in mounted
    claims = [
        volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if "persistentVolumeClaim" in volume
    ]
    assert claims == [each["metadata"]["name"] for each in manifests if each["kind"] == "PersistentVolumeClaim"]


def test_selectors_find_the_pods_they_mean(manifests: list[Manifest]) -> None:
    pods = {
        m["metadata"]["name"]: m["spec"]["template"]["metadata"]["labels"]
        for m in manifests
        if m["kind"] == "Deployment"
    }
    found = set()
    for manifest in manifests:
        spec, name = manifest.get("spec", {}), manifest["metadata"]["name"]
        selector = spec.get("podSelector", spec.get("selector"))
        if manifest["kind"] == "ServiceMonitor":
            assert one(manifests, "Service")["metadata"]["labels"] == selector["matchLabels"]
        elif selector:
            labels = selector.get("matchLabels", selector)
            assert [each for each, has in pods.items() if labels.items() <= has.items()] == [name]
            found.add(manifest["kind"])
    assert found == {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}


def test_one_that_has_the_gpu_goes_before_the_next_comes(kustomized: dict[str, list[Manifest]]) -> None:
    gpu, several = kustomized["overlays/gpu"], kustomized["overlays/replicas"]
    assert container(gpu)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container(gpu)["image"] == f"latentwire:{ABOUT['appVersion']}-cuda"
    assert container(kustomized["base"])["image"] == f"latentwire:{ABOUT['appVersion']}"
    assert one(gpu, "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    rolling = one(several, "Deployment")["spec"]["strategy"]
    assert rolling == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}
    assert one(gpu, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_replicas_are_scaled_by_rows_before_any_is_refused(kustomized: dict[str, list[Manifest]]) -> None:
    manifests = kustomized["overlays/replicas"]
    assert "replicas" not in one(manifests, "Deployment")["spec"]  # the scaler's
    spec = one(manifests, "ScaledObject")["spec"]
    assert set(spec) == {"scaleTargetRef", "minReplicaCount", "maxReplicaCount", "advanced", "triggers"}
    assert spec["scaleTargetRef"] == {"name": "latentwire"} and 1 < spec["minReplicaCount"] < spec["maxReplicaCount"]
    labels = f'{{namespace="{NAMESPACE}", service="{one(manifests, "Service")["metadata"]["name"]}"}}'
    for trigger in spec["triggers"]:
        assert (trigger["type"], trigger["metricType"]) == ("prometheus", "AverageValue")
        assert set(trigger["metadata"]) == {"serverAddress", "query", "threshold"}
        assert trigger["metadata"]["query"].endswith(f"_rows{labels})")
        assert 0 < int(trigger["metadata"]["threshold"]) < Settings().max_queue


def test_the_redis_of_the_cluster_is_that_of_compose(kustomized: dict[str, list[Manifest]]) -> None:
    manifests, composed = kustomized["overlays/replicas"], COMPOSE["services"]["redis"]
    redis = container(manifests, "latentwire-redis")
    assert (redis["image"], redis["args"]) == (composed["image"], composed["command"])
    assert redis["readinessProbe"]["exec"]["command"] == composed["healthcheck"]["test"][1:]
    (port,) = one(manifests, "Service", "latentwire-redis")["spec"]["ports"]
    url = environment(manifests)["LW_REDIS_URL"]
    assert url == f"redis://latentwire-redis:{port['port']}/0"
    egress = [
        allowed["port"] for rule in one(manifests, "NetworkPolicy")["spec"]["egress"] for allowed in rule["ports"]
    ]
    assert port["port"] in egress


def test_without_keys_the_names_of_the_service_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = by_chart(
        "--set", "keysSecret=", "--set", "bridges={news=/bridges/news}", "--set", "bridgesClaim=trained"
    )
    for name, value in environment(manifests).items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.insecure and settings.api_keys_file is None
    assert settings.allowed_hosts[1] == f"{one(manifests, 'Service')['metadata']['name']}.{NAMESPACE}"
    assert container(manifests)["args"][2:] == ["--bridge=news=/bridges/news"]
    assert {"name": "bridges", "mountPath": "/bridges", "readOnly": True} in container(manifests)["volumeMounts"]


def test_the_documents_install_the_image_that_they_build() -> None:
    (command,) = commands("helm")
    flags = command[command.index(NAMESPACE) + 2 :]  # after its name and the chart
    files = [str(DEPLOY.parent / flag) if flag.startswith("deploy/") else flag for flag in flags]
    pushed = [words[2] for words in commands("docker") if words[1] == "push"]
    assert [container(by_chart(*files))["image"]] == pushed
