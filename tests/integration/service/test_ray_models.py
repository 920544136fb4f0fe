"""What the HTTP side does where replicas on Ray go, or are not there; the replicas stand in for Ray's."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("ray", reason="ray is not installed: pip install 'latentwire[ray]'")

from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.errors import InferenceFailed, NotReady
from latentwire.service.inference.models import InMemory
from latentwire.service.processes.frames import QUESTIONS, Answer, Manage, framed, packed
from latentwire.service.ray import deployments, remote
from latentwire.service.ray.deployments import THEIRS, build, halves
from latentwire.service.ray.remote import RayModels
from latentwire.service.ray.replicas import EngineDied
from latentwire.service.settings import Settings

# Of who answers HTTP. A new setting is named here, or where replicas find theirs.
NOT_THEIRS = set(
    "host port admin_port root_path frontends insecure allowed_hosts cors_origins engine ray_encoders ray_generators"
    " ray_cpus ray_gpus request_timeout drain_delay drain_timeout max_inputs max_samples max_tokens max_text_characters"
    " max_body max_bodies redis_url store_memory encode_cache_memory encode_cache store_dir store_disk store_ttl"
    " corpus_dir log_format log_requests tasks jobs_dir api_keys_file api_keys signing_key".split()
)
BUG, DEATH = (RayTaskError("ask", "a traceback", of, ip="127.0.0.1") for of in (ValueError("odd"), EngineDied()))
UP: Any = None


class Half:
    """A deployment: what each question about a bridge meets, in order; those who look are always answered."""

    app_name = deployment_name = "latentwire-half"

    def __init__(self, *met: Any, metrics: Any = ()) -> None:
        self._met, self._metrics, self.asked = list(met), metrics, 0
        self.ask = self

    def broadcast(self, name: str) -> Any:
        assert name == "metrics"
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> Any:
        assert timeout_s and return_exceptions
        if isinstance(self._metrics, Exception):
            raise self._metrics
        return list(self._metrics)

    def remote(self, data: bytes, of: str) -> Any:
        question = QUESTIONS.decode(data)

        async def answer() -> bytes:
            if isinstance(question, Manage):
                return framed(Answer(question.id, packed(InMemory({}, {}, []))))
            self.asked += 1
            met = self._met.pop(0)
            if isinstance(met, Exception):
                raise met
            return framed(Answer(question.id, packed([]))) if met is UP else await met

        return asyncio.ensure_future(answer())


@pytest.fixture
def bridge(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Bridge:
    """One to ask about, and questions are asked again at once."""
    monkeypatch.setattr(remote, "AGAIN_SECONDS", [0.0] * 5)
    return Bridge.load(checkpoint)


async def over(half: Half) -> RayModels:
    """Models whose replicas have been seen."""
    models = RayModels()
    models.attach(*[cast(DeploymentHandle, half)] * 2)
    await models.start()
    while not models.ready:
        await asyncio.sleep(0.01)
    return models


async def encode(models: RayModels, bridge: Bridge) -> Any:
    return await models.encode(bridge, [], lambda cost: None)


async def test_a_question_whose_replica_has_gone_is_asked_again(bridge: Bridge) -> None:
    half = Half(DEATH, DeploymentUnavailableError(cast(Any, "half")), ActorDiedError(), UP)
    models = await over(half)
    assert await encode(models, bridge) == [] and half.asked == 4
    await models.stop()


async def test_a_question_that_ends_replica_after_replica_is_given_up(bridge: Bridge) -> None:
    half = Half(ActorDiedError(), DEATH, ActorDiedError(), UP)
    models = await over(half)
    with pytest.raises(InferenceFailed, match="3 replicas ended"):
        await encode(models, bridge)
    await models.stop()


async def test_an_error_in_what_a_replica_runs_is_asked_of_no_other(
    bridge: Bridge, caplog: pytest.LogCaptureFixture
) -> None:
    half = Half(BUG, UP)
    models = await over(half)
    with pytest.raises(InferenceFailed, match="ValueError"):
        await encode(models, bridge)
    assert half.asked == 1 and "a replica failed" in caplog.text
    await models.stop()


async def test_who_waits_when_the_service_stops_is_told(bridge: Bridge) -> None:
    half = Half(asyncio.Event().wait())
    models = await over(half)
    waiting = asyncio.create_task(encode(models, bridge))
    while not half.asked:
        await asyncio.sleep(0)
    await models.stop()
    with pytest.raises(NotReady, match="the service is stopping"):
        await waiting


async def test_nobody_waits_for_replicas_that_were_never_there(bridge: Bridge) -> None:
    models = RayModels()
    models.attach(*[cast(DeploymentHandle, Half())] * 2)
    calls: list[Callable[[], Any]] = [lambda: encode(models, bridge), lambda: models.load(bridge)]
    for call in calls:
        with pytest.raises(NotReady, match="still loading") as refused:
            await call()
        assert refused.value.retry_after_seconds
    models.failure = "no such checkpoint"
    with pytest.raises(NotReady, match="no such checkpoint"):
        await encode(models, bridge)


async def test_metrics_are_of_the_replicas_that_answer_each_by_its_name() -> None:
    met: list[Any] = [
        (
            "Encoder-a",
            "# HELP latentwire_ready Up.\n# TYPE latentwire_ready gauge\nlatentwire_ready 1.0\n" + counted(3),
        ),
        ("Encoder-b", counted(4)),
        ActorDiedError(),
    ]
    models = await over(Half(metrics=met))
    text = (await models.metrics()).decode()
    assert text.count("# TYPE latentwire_rows_total counter") == 1 and text.count("latentwire_ready 1.0") == 1
    found = {
        sample.labels["replica"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "latentwire_rows_total"
    }
    assert found == {"Encoder-a": 3, "Encoder-b": 4}
    await models.stop()


async def test_metrics_of_replicas_that_do_not_answer_are_left_out_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    models = await over(Half(metrics=TimeoutError()))
    assert (await models.metrics()).endswith(b"\nlatentwire_ready 1.0\n")
    assert "a replica's metrics cannot be had: TimeoutError" in caplog.text
    await models.stop()
    assert b"latentwire_ready 0.0" in await RayModels().metrics()


def counted(rows: int) -> str:
    return f"# HELP latentwire_rows_total Rows.\n# TYPE latentwire_rows_total counter\nlatentwire_rows_total {rows}\n"


async def test_replicas_that_answer_others_are_there_though_nobody_who_looks_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = Half()
    models = await over(half)

    async def none(half: Any) -> None:
        return None

    monkeypatch.setattr(models, "_look", none)
    assert await models._is_there(cast(DeploymentHandle, half))
    monkeypatch.setattr(remote, "SOON_SECONDS", 0.0)
    assert not await models._is_there(cast(DeploymentHandle, half))
    await models.stop()


def test_replicas_get_the_settings_of_models_alone_and_stay_where_those_are_the_same() -> None:
    assert sorted([*THEIRS, *NOT_THEIRS]) == sorted(Settings.model_fields)
    secret = Settings(port=1, max_batch=7, api_keys="a key", redis_url="redis://:secret@here")
    versions, same = [], Settings(max_batch=7)
    for settings, code in ((secret, "a"), (same, "a"), (same, "b"), (Settings(), "a")):
        (encoder, _) = halves(settings, {"demo": "builtin"}, code)
        deployment = encoder._bound_deployment
        versions.append(deployment._version)
        assert deployment.init_args[1]["max_batch"] == settings.max_batch
        assert "secret" not in str(deployment.init_args) and "a key" not in str(deployment.init_args)
        assert deployment.ray_actor_options["runtime_env"] == {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    assert versions[0] == versions[1] and len(set(versions)) == 3


@pytest.mark.parametrize("settings", [{"admin_port": 9000}, {"tasks": {"news": "news.toml"}}])
def test_a_serve_config_refuses_settings_that_would_do_nothing(settings: dict[str, Any]) -> None:
    with pytest.raises(deployments.InvalidRequest, match=f"LW_{next(iter(settings)).upper()}: "):
        build({"settings": settings})
