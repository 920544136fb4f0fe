"""Deployment files agree with the code they deploy. Foreign tools check them too, where they are installed."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from deploy import metrics_md
from deploy.grafana import build
from latentwire.service.app import create_app
from latentwire.service.metrics import FEWEST
from latentwire.service.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
YAML = sorted(path for path in [*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.yml")] if "templates" not in path.parts)
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
GPU = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())
BOARDS: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in DEPLOY.glob("grafana/dashboards/*.json")}
PANELS: list[dict[str, Any]] = [panel for board in BOARDS.values() for panel in board["panels"]]
RULES: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"][0]["rules"]
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text()).splitlines()

# Labels that Prometheus adds, a histogram has, or replicas on Ray.
ADDED = {"instance", "job", "le", "replica", "front"}
METRIC = re.compile(r"\b(latentwire_\w+)(?:\{(.*?)\})?")


def expressions() -> list[str]:
    queries = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]
    return [*queries, *(rule["expr"] for rule in RULES)]


def instructions(name: str) -> list[str]:
    """What follows ``name`` in the image's last stage."""
    start = max(i for i, line in enumerate(DOCKERFILE) if line.startswith("FROM "))
    return [line.removeprefix(name + " ") for line in DOCKERFILE[start:] if line.startswith(name + " ")]


@pytest.fixture(scope="module")
def exposed(checkpoint: Path) -> Iterator[dict[str, set[str]]]:
    """The labels of every sample that a service exposes once it has answered."""
    with TestClient(
        create_app(Settings(), {"tiny": str(checkpoint), "gated": "builtin"}), "http://127.0.0.1"
    ) as client:
        deadline = time.monotonic() + 30
        while (answer := client.get("/health/ready")).status_code != 200:
            assert answer.json()["error"]["type"] == "NotReady" and time.monotonic() < deadline, answer.text
            time.sleep(0.05)
        body = {"inputs": [{"text": "Mara sings."}], "prompt": "What does Mara do?", "max_tokens": 2}
        for asked in ({"bridge": "tiny"}, {"bridge": "gated", "fallback": "text"}):
            assert client.post("/generate", json={**body, **asked}).status_code == 200
        texts = {"bridge": "gated", "inputs": [f"Mara has {i} cups." for i in range(FEWEST)]}  # for a drift
        assert client.post("/encode", json=texts).status_code == 200
        text = client.get("/metrics").text
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        labels[family.name if family.type != "counter" else f"{family.name}_total"] = set()
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    # Families without samples are known by their names; these have none without a GPU, or an evaluation.
    for name, has in {"allocator_retries_total": {"device"}, "device_power_watts": {"device"},
                      "device_utilization_ratio": {"device"},
                      "evaluation_score": {"bridge", "task", "condition"}}.items():  # fmt: skip
        assert f"latentwire_{name}" in labels
        labels[f"latentwire_{name}"] |= has
    yield labels


@pytest.mark.parametrize("path", YAML, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_yaml_file_parses(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize("expression", expressions())
def test_dashboard_and_rules_ask_for_metrics_and_labels_that_the_service_exposes(
    expression: str, exposed: dict[str, set[str]]
) -> None:
    found = METRIC.findall(expression)
    assert found or "up{" in expression
    known: set[str] = set(ADDED)
    for name, selector in found:
        assert name in exposed
        selected = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
        assert selected <= exposed[name] | ADDED
        known |= exposed[name]
    for grouped in re.findall(r"\b(?:by|on) \((.*?)\)", expression):
        assert {label.strip() for label in grouped.split(",")} <= known


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
def test_legends_name_labels_that_their_query_keeps(panel: dict[str, Any], exposed: dict[str, set[str]]) -> None:
    for target in panel.get("targets", []):
        grouped = re.findall(r"\bby \((.*?)\)", target["expr"])
        kept = {label.strip() for group in grouped for label in group.split(",")}
        if not grouped:
            kept = ADDED.union(*(exposed[name] for name, _ in METRIC.findall(target["expr"])))
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept


def test_the_reference_of_metrics_is_what_is_registered_and_exposed(exposed: dict[str, set[str]]) -> None:
    committed = metrics_md.COMMITTED.read_text()
    assert metrics_md.rendered() == committed, "python -m deploy.metrics_md writes it anew"
    told = set(re.findall(r"^\| `(\w+)`", committed, re.MULTILINE))
    parts = {f"{name}{end}" for name in told for end in ("_bucket", "_sum", "_count")}
    assert told <= set(exposed) <= told | parts


def test_every_metric_of_the_service_is_on_a_dashboard(exposed: dict[str, set[str]]) -> None:
    asked = " ".join(expressions())
    families = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in exposed}
    assert {name for name in families if name not in asked} == set()


def test_panels_have_ids_and_targets_reference_ids_of_their_own() -> None:
    for board in BOARDS.values():
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids)
    for panel in PANELS:
        references = [target["refId"] for target in panel.get("targets", [])]
        assert all(references) and len(set(references)) == len(references)
        assert bool(references) == (panel["type"] != "row")


@pytest.mark.parametrize("board", BOARDS)
def test_panels_do_not_overlap(board: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARDS[board]["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24
        taken |= cells


def test_dashboards_are_what_their_code_makes() -> None:
    made = dict(build.files())
    assert made.keys() == set(DEPLOY.glob("grafana/dashboards/*.json"))
    for path, text in made.items():
        assert path.read_text() == text, "python -m deploy.grafana.build writes it anew"


def test_dashboards_use_the_provisioned_datasource() -> None:
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    panels = [panel for panel in PANELS if panel["type"] != "row"]
    for board in BOARDS.values():
        chosen, *variables = board["templating"]["list"]
        assert (chosen["name"], chosen["query"], chosen["current"]["value"]) == (
            "datasource", sources[0]["type"], sources[0]["uid"],
        )  # fmt: skip
        assert [variable["name"] for variable in variables] == ["instance", "bridge"]
        for user in [*panels, *variables]:
            assert user["datasource"] == {"type": sources[0]["type"], "uid": "${datasource}"}
    host, port = re.fullmatch(r"http://(\w+):(\d+)", sources[0]["url"]).groups()  # type: ignore[union-attr]
    assert COMPOSE["services"][host]["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_grafana_finds_the_dashboards_where_it_is_mounted() -> None:
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/latentwire.yaml").read_text())["providers"][0]
    grafana = COMPOSE["services"]["grafana"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert (DEPLOY / "grafana/dashboards" / home.name).is_file()


@pytest.mark.parametrize(
    "title, steps",
    [
        ("Share of the commonest output", [("transparent", None), ("red", 0.5)]),
        ("Different outputs", [("red", None), ("transparent", 0.1)]),
        ("Entropy of words", [("red", None), ("transparent", 1.0)]),
        ("Taken", [("transparent", None), ("red", 0.94)]),
        ("Ready", [("red", None), ("green", 1)]),
    ],
)
def test_thresholds_are_those_of_the_alerts(title: str, steps: list[tuple[str, float | None]]) -> None:
    panel = next(panel for panel in PANELS if panel["title"] == title)
    defaults = panel["fieldConfig"]["defaults"]
    assert [(step["color"], step["value"]) for step in defaults["thresholds"]["steps"]] == steps
    assert panel["type"] == "stat" or defaults["custom"]["thresholdsStyle"]["mode"] != "off"


def test_each_alert_has_a_section_in_the_runbook_and_cases_that_fire_it_and_do_not() -> None:
    sections = {
        line.removeprefix("## ") for line in (DEPLOY / "RUNBOOK.md").read_text().splitlines() if line[:3] == "## "
    }
    cases = yaml.safe_load((DEPLOY / "prometheus/rules.test.yml").read_text())["tests"]
    tested = {case["alert_rule_test"][0]["alertname"]: case for case in cases}
    assert sections == {rule["alert"] for rule in RULES} == set(tested)
    for rule in RULES:
        assert rule["annotations"]["runbook_url"] == f"deploy/RUNBOOK.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("warning", "critical")
        case = tested[rule["alert"]]
        fired = [alert["exp_labels"] for alert in case["alert_rule_test"][0]["exp_alerts"]]
        given = [dict(re.findall(r'(\w+)="(.*?)"', series["series"])) for series in case["input_series"]]
        assert fired
        assert any(all(labels.items() - said.items() for said in fired) for labels in map(shared(fired[0]), given))


def shared(other: dict[str, str]) -> Callable[[dict[str, str]], dict[str, str]]:
    """Keeps of some labels those that another series has too."""
    return lambda labels: {name: value for name, value in labels.items() if name in other}


def test_prometheus_scrapes_the_service_where_compose_runs_it() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    host, port = config["scrape_configs"][0]["static_configs"][0]["targets"][0].split(":")
    assert host in COMPOSE["services"] and instructions("EXPOSE") == [port]
    assert all((DEPLOY / "prometheus" / name).is_file() for name in config["rule_files"])


def test_compose_mounts_files_that_exist_and_volumes_that_are_declared() -> None:
    for service in COMPOSE["services"].values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
    assert (DEPLOY / COMPOSE["services"]["latentwire"]["build"] / "Dockerfile").is_file()


def test_compose_publishes_on_loopback_only_and_never_redis() -> None:
    published = {name: service["ports"] for name, service in COMPOSE["services"].items() if "ports" in service}
    assert set(published) == {"latentwire", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_foreign_images_are_pinned_and_every_service_is_watched() -> None:
    for name, service in COMPOSE["services"].items():
        assert "test" in service["healthcheck"]
        assert name == "latentwire" or re.search(r":v?\d+\.\d+\.\d+", service["image"])


def test_compose_sets_settings_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = COMPOSE["services"]["latentwire"]["environment"]
    for name, value in environment.items():
        assert name.startswith(PREFIX)
        monkeypatch.setenv(name, value or "24GB")
    assert Settings().redis_url == environment["LW_REDIS_URL"] == "redis://redis:6379/0"


def test_the_gpu_override_reserves_a_gpu_and_builds_for_it() -> None:
    service = GPU["services"]["latentwire"]
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert service["build"]["args"] == {"TORCH_INDEX_URL": ""}
    assert "ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu" in DOCKERFILE
    assert service["image"] != COMPOSE["services"]["latentwire"]["image"]


def test_the_image_runs_as_a_numbered_user_that_is_not_root() -> None:
    (user,) = instructions("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert any(f"--uid {user.split(':')[0]}" in line for line in instructions("RUN"))
    # Whatever writes to the image comes before.
    lines = [line.split()[0] for line in DOCKERFILE if line]
    assert not {"RUN", "COPY", "ADD"} & set(lines[lines.index("USER") :])


def test_the_image_serves_and_keeps_models_in_its_volume() -> None:
    assert json.loads(instructions("ENTRYPOINT")[0]) == ["latentwire"]
    assert json.loads(instructions("CMD")[0]) == ["serve", "--host", "0.0.0.0"]
    (volume,) = instructions("VOLUME")
    assert f"HF_HOME={volume}" in instructions("ENV")[0].split()


def test_the_health_checks_ask_where_the_service_says_it_listens() -> None:
    """What they find, the tests of ``service.health`` say."""
    assert json.loads(instructions("HEALTHCHECK")[0].split(" CMD ")[1]) == [
        "python",
        "-Pm",
        "latentwire.service.health",
    ]
    test = COMPOSE["services"]["latentwire"]["healthcheck"]["test"]
    assert test == ["CMD", "python", "-Pm", "latentwire.service.health", "ready"]


def test_any_user_of_group_0_may_write_where_the_image_is_written_to() -> None:
    folders = {*instructions("VOLUME"), *instructions("WORKDIR")}
    (made,) = re.findall(r"install -d -o \d+ -g 0 -m 775 ([^&]+)", " ".join(instructions("RUN")))
    assert set(made.split()) == folders
    assert "HOME=/tmp" in instructions("ENV")[0].split()


def test_everything_the_image_copies_passes_its_ignore_file() -> None:
    copied = [line.split()[1:-1] for line in DOCKERFILE if line.startswith("COPY ") and "--from" not in line]
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(path for paths in copied for path in paths) == sorted(allowed)
    assert all((ROOT / path).exists() for path in allowed)


def test_constraints_pin_every_requirement_exactly_and_portably() -> None:
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(
        re.fullmatch(r"[\w.-]+==(\d+!)?[\w.]+", pin) for pin in pins
    )  # no local version: "+cpu" fits one machine only
    versions = {canonicalize_name(name): version for name, version in (pin.split("==") for pin in pins)}
    assert not [name for name in versions if name.startswith(("nvidia", "triton", "cuda", "latentwire"))]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *(line for lines in extras.values() for line in lines)]:
        requirement = Requirement(line)
        if requirement.name == "latentwire":
            assert requirement.extras <= extras.keys()
            continue
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), line


def tool(name: str) -> str:
    """A program on PATH or beside the interpreter; the test is skipped without it."""
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=DEPLOY, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_accepts_the_dockerfile() -> None:
    run(tool("hadolint"), ROOT / "Dockerfile")


def test_shellcheck_accepts_the_script_that_tries_the_image() -> None:
    run(tool("shellcheck"), DEPLOY / "try-image.sh")


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]], ids=len)
def test_compose_accepts_its_files(files: list[str]) -> None:
    run(tool("docker-compose"), *(argument for name in files for argument in ("-f", name)), "config", "--quiet")


def test_prometheus_accepts_its_configuration() -> None:
    run(tool("promtool"), "check", "config", DEPLOY / "prometheus/prometheus.yml")


def test_prometheus_understands_every_query_of_the_dashboards(tmp_path: Path) -> None:
    queries = [query.replace("$__rate_interval", "1m") for query in expressions()]
    rules = [{"record": f"query:{i}", "expr": query} for i, query in enumerate(queries)]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    run(tool("promtool"), "check", "rules", file)


def test_alerts_fire_when_they_should_and_only_then() -> None:
    run(tool("promtool"), "test", "rules", DEPLOY / "prometheus/rules.test.yml")
