"""The drift of latents as Prometheus reads it, on the built-in bridge and on one without statistics."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from deploy.grafana.build import limit
from latentwire.bridge.evaluation.tasks import load_task
from latentwire.service.metrics import FEWEST

Start = Callable[..., TestClient]
ALERT = limit("LatentWireLatentsDrift")[1]
DRIFT = "latentwire_latent_drift"
PROSE = " ".join((Path(__file__).parents[3] / "docs/design.md").read_text().split())


def encode(client: TestClient, bridge: str, texts: list[str]) -> None:
    client.post("/encode", json={"bridge": bridge, "inputs": texts}).raise_for_status()


def drifts(seen: dict[tuple[str, ...], float]) -> dict[str, float]:
    return {key[1]: value for key, value in seen.items() if key[0] == DRIFT}


def test_texts_like_those_of_training_stay_below_the_alert_and_others_do_not(start: Start, samples: Any) -> None:
    test = load_task("world").test
    usual = [test[i].source for i in range(FEWEST)]
    kinds = {
        "usual": usual,
        "sorted words": [" ".join(sorted(text.split())) for text in usual],
        "prose": [PROSE[at : at + 200] for at in range(0, 200 * FEWEST, 200)],
        "code": [f"def f{i}(x): return {i} * x ** {i % 7}  # {'z' * (i % 11)}" for i in range(FEWEST)],
    }
    client = start(checkpoints=dict.fromkeys(kinds, "builtin"))
    for bridge, texts in kinds.items():
        encode(client, bridge, texts[1:])
    assert drifts(samples(client)) == {}  # too few to tell
    for bridge, texts in kinds.items():
        encode(client, bridge, texts[:1])
    found = drifts(samples(client))
    assert found["usual"] < ALERT / 2 < found["sorted words"]
    assert min(found["prose"], found["code"]) > 1.5 * ALERT


def test_a_bridge_without_statistics_has_no_drift(start: Start, samples: Any) -> None:
    client = start()
    encode(client, "tiny", [f"Text {i}." for i in range(FEWEST)])
    seen = samples(client)
    assert seen["latentwire_latent_window", "tiny"] == FEWEST
    assert drifts(seen) == {}
