"""A latent is read back at the row on which training taught the receiver to repeat its source."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latentwire
from latentwire.bridge.checkpoint import make_bridge, save_bridge
from latentwire.bridge.config import BridgeConfig, Provenance
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import IGNORE, REPEAT
from latentwire.bridge.readback import SPARE, reading_params, taught
from latentwire.bridge.sampling import SamplingParams
from latentwire.training.config import TrainConfig
from latentwire.training.tokens import Tokeniser
from tests.conftest import bridge_config
from tests.integration.conftest import MakeConfig
from tests.integration.runs import prepared

TEXTS = ["Ben lives in Oslo. Mara wants a cup of tea.", "Mara sings."]


@pytest.fixture(scope="module")
def bridge() -> latentwire.Bridge:
    return latentwire.Bridge.load("builtin")


def test_what_is_asked_is_the_row_that_was_trained(bridge: latentwire.Bridge) -> None:
    config, (name,) = bridge.manifest.bridge, bridge.receivers
    trained = TrainConfig(**{**config.provenance.recipe, "out": Path("run")})
    task = latentwire.bridge.evaluation.tasks.load_task("world")
    tokeniser = Tokeniser(
        trained, config, task.reconstruction, bridge.reader(bridge.sender), bridge.reader(name), False
    )
    example = task.test[0]
    row = tokeniser(example).reconstruction
    latent = bridge.encode(example.source)[0].array
    prompt, (params,) = bridge.readings(name, [latent], None)
    asked = bridge.compose(name, latent, prompt, params)
    (answered,) = bridge.continue_with(name, latent, prompt, [f" {example.source}"], end=True)
    assert row == answered
    start = next(t for t, label in enumerate(row.labels) if label != IGNORE)
    assert asked == row[:start] and params.temperature == 0


def test_a_latent_says_its_source_as_likely_as_a_score_finds_it(bridge: latentwire.Bridge) -> None:
    latents = bridge.encode(TEXTS)
    back = bridge.read(latents, against=TEXTS)
    assert back.texts == TEXTS and back.trained and len(back) == 2
    scored = bridge.score(latents, REPEAT, [f" {text}" for text in TEXTS], end=True)
    for number, reading in enumerate(back.readings):
        wanted, original = scored[number][number], reading.against
        assert original is not None and original.text == TEXTS[number]
        for one in (reading, original):
            assert one.token_count == wanted.token_count and one.mean == one.logprob / one.token_count
            assert one.logprob == pytest.approx(wanted.logprob, abs=1e-3)
    assert back.usage.generated_tokens == sum(reading.token_count for reading in back.readings)
    swapped = bridge.read(latents, against=TEXTS[::-1])
    assert all(one.against is not None and one.against.logprob < one.logprob - 5 for one in swapped.readings)
    assert bridge.read(TEXTS).texts == TEXTS and bridge.read(latents[1].data)[0].against is None


def test_a_reading_that_was_cut_says_so_and_has_no_end_among_its_nats(bridge: latentwire.Bridge) -> None:
    (reading,) = bridge.read(TEXTS[0], max_tokens=3).readings
    assert (reading.text, reading.finish_reason, reading.token_count) == ("Ben lives in", "length", 3)
    begun = bridge.score(TEXTS[0], REPEAT, " Ben lives in", end=False)[0][0]
    assert reading.logprob == pytest.approx(begun.logprob, abs=1e-3)


def test_a_reading_has_room_for_its_source_and_never_more_than_the_receiver_has(
    bridge: latentwire.Bridge, lms: dict[str, FrozenLM]
) -> None:
    config, (name,) = bridge.manifest.bridge, bridge.receivers
    assert reading_params(config, 4, None, 500).max_tokens == 2 * 4 * config.encoder.ratio + SPARE
    assert reading_params(config, 100, None, 500).max_tokens == 400
    assert reading_params(config, 600, None, 500).max_tokens == 1
    assert reading_params(config, 4, 7, 500).max_tokens == 7
    perceiver = bridge_config(lms["neox"], lms["llama"], kind="perceiver")
    assert reading_params(perceiver, 6, None, 500).max_tokens == 2 * perceiver.max_source_tokens + SPARE
    hybrid = bridge_config(lms["neox"], lms["llama"], kind="hybrid")  # six slots cover no tokens
    assert reading_params(hybrid, 6 + 3, None, 500).max_tokens == 2 * 3 * hybrid.encoder.ratio + SPARE
    latents = [np.zeros((K, config.encoder.latent_dim), np.float32) for K in (1, 103)]
    prompt, params = bridge.readings(name, latents, None)
    for latent, how in zip(latents, params, strict=True):
        assert len(bridge.compose(name, latent, prompt, how)) + how.max_tokens <= bridge.reader(name).max_tokens
    assert len(bridge.compose(name, latents[1], prompt, params[1])) + params[1].max_tokens == 512


def with_recipe(config: BridgeConfig, repeat: str | None = None, **recipe: Any) -> BridgeConfig:
    (name,) = config.heads
    heads = {name: replace(config.heads[name], repeat=repeat)}
    return replace(config, heads=heads, provenance=replace(config.provenance, recipe=recipe))


@pytest.mark.parametrize(
    "repeat, recipe, wanted",
    [
        (None, {}, None),
        (None, {"reconstruction_weight": 0.0}, None),
        (None, {"reconstruction_weight": 0.5, "mode_tokens": 0}, REPEAT),
        ("Say {latent} again:", {"reconstruction_weight": 0.5}, "Say {latent} again:"),
        ("Say {latent} again:", {"reconstruction_weight": 0.5, "mode_tokens": 2}, None),
    ],
)
def test_a_head_was_taught_what_its_recipe_says(
    lms: dict[str, FrozenLM], repeat: str | None, recipe: dict[str, Any], wanted: str | None
) -> None:
    name, config = lms["llama"].name, with_recipe(bridge_config(lms["neox"], lms["llama"]), repeat, **recipe)
    assert taught(config, name) == wanted
    added = Provenance("world", "0" * 64, 0, 1, "test", {"reconstruction_weight": 1.0})
    later = replace(config, heads={name: replace(config.heads[name], provenance=added)})
    assert taught(later, name) == (repeat or REPEAT)


def test_a_bridge_that_was_not_taught_still_answers_and_says_so(lms: dict[str, FrozenLM], tmp_path: Path) -> None:
    config = with_recipe(bridge_config(lms["neox"], lms["llama"]), "Say {latent} again:", reconstruction_weight=1.0)
    save_bridge(tmp_path / "taught", make_bridge(config))
    save_bridge(tmp_path / "untaught", make_bridge(with_recipe(config)))
    backs = [latentwire.Bridge.load(tmp_path / name).read("Mara", max_tokens=4) for name in ("taught", "untaught")]
    assert [back.trained for back in backs] == [True, False] and all(back.texts for back in backs)
    own = latentwire.Bridge.load(tmp_path / "taught")
    said = own.generate(own.encode("Mara"), "Say {latent} again:", max_tokens=4)
    assert own.read(own.encode("Mara"), max_tokens=4).texts == [said.texts[0].removeprefix(" ")]


def test_a_run_keeps_the_prompt_at_which_it_teaches_to_repeat(make: MakeConfig) -> None:
    for weight, wanted in ((1.0, REPEAT), (0.0, None)):
        (head,) = prepared(make(reconstruction_weight=weight)).bridge.config.heads.values()
        assert head.repeat == wanted


@pytest.mark.parametrize(
    "changes, param, named",
    [
        ({"against": ["a", "b"]}, "against", "2 originals for 1 inputs; give one for each"),
        ({"against": ""}, "against", "an original is empty; expected a text"),
        ({"against": " a" * 600}, "against", "takes [0-9]+ receiver tokens; 512 fit"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; expected greater than or equal to 1"),
        ({"max_tokens": 600}, "max_tokens", "max_tokens is 600; beside a latent of 2 slots .* has room for [0-9]+"),
        ({"inputs": " "}, None, "empty"),
    ],
)
def test_what_cannot_be_read_is_named(
    bridge: latentwire.Bridge, changes: dict[str, Any], param: str | None, named: str
) -> None:
    with pytest.raises(InvalidRequest, match=named) as caught:
        bridge.read(**{"inputs": "Mara sings.", **changes})
    assert (param is None or caught.value.param == param) and "\n" not in str(caught.value)


def test_a_generation_reports_what_the_token_that_ended_it_cost_where_that_was_asked(bridge: latentwire.Bridge) -> None:
    (name,), latent = bridge.receivers, bridge.encode(TEXTS[1])[0].array
    for params, has in ((SamplingParams(logprobs=0), True), (SamplingParams(), False), (SamplingParams(2), False)):
        (row,) = bridge._rows(name, [latent], [REPEAT], params, 1)
        (said,) = bridge._answers(name, [row])
        assert (said.end_logprob is not None) == has
    stopped = replace(params, stop=("sings",), logprobs=0, max_tokens=8)
    (cut,) = bridge._answers(name, bridge._rows(name, [latent], [REPEAT], stopped, 1))
    assert cut.finish_reason == "stop" and cut.end_logprob is None
