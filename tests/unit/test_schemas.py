"""What request bodies take and refuse, before any work."""

from typing import Any

import pytest
from pydantic import ValidationError

from latentwire.bridge.errors import InvalidMessage
from latentwire.service.schemas.inference import EncodeRequest, GenerateRequest, Input, message_of


def asked(**fields: Any) -> GenerateRequest:
    return GenerateRequest.model_validate({"inputs": [{"text": "a"}], "prompt": "b", **fields})


def test_little_is_needed_and_the_rest_is_safe() -> None:
    encode, generate = EncodeRequest(inputs=["a"]), asked()
    assert (encode.dtype, encode.store, encode.truncate) == ("float16", False, False)
    assert (generate.temperature, generate.n, generate.stop, generate.seed) == (0.0, 1, [], None)


@pytest.mark.parametrize("model", [EncodeRequest, GenerateRequest, Input])
def test_unknown_fields_are_refused(model: type[EncodeRequest] | type[GenerateRequest] | type[Input]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate({"inputs": ["a"], "prompt": "b", "text": "a", "temprature": 1})
    assert "temprature" in {error["loc"][0] for error in caught.value.errors() if error["type"] == "extra_forbidden"}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"text": "a", "latent": "b"},
        {"text": "a", "sources": [{"text": "c"}]},
        {"text": "a", "latent": "b", "latent_id": "c"},
    ],
)
def test_an_input_is_exactly_one_of_four(given: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=f"exactly one of text, latent, latent_id and sources, not {len(given)}"):
        Input.model_validate(given)


@pytest.mark.parametrize("given", [[], [{}], [{"text": "a", "latent": "b"}], [{"sources": [{"text": "a"}]}], ["a"]])
def test_sources_are_each_exactly_one_of_three(given: list[Any]) -> None:
    with pytest.raises(ValidationError):
        Input.model_validate({"sources": given})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("inputs", []),
        ("inputs", "a"),
        ("inputs", ["a"]),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", 100.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("seed", -1),
        ("seed", 1 << 63),
        ("n", 0),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 17),
        ("truncate", "perhaps"),
    ],
)
def test_a_value_that_can_never_work_is_refused_and_named(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        asked(**{field: value})
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


def test_the_outermost_values_are_taken() -> None:
    body = asked(max_tokens=1, temperature=100, top_p=1, top_k=0, seed=(1 << 63) - 1, stop=["a"] * 16)
    assert body.seed == (1 << 63) - 1


@pytest.mark.parametrize("dtype", ["float64", "FLOAT16", "", None])
def test_only_the_dtypes_of_the_wire_are_taken(dtype: str | None) -> None:
    with pytest.raises(ValidationError):
        EncodeRequest.model_validate({"inputs": ["a"], "dtype": dtype})


def test_one_stop_string_is_a_list_of_one() -> None:
    assert asked(stop="end").stop == ["end"]


def test_one_prompt_is_for_all_inputs_and_a_list_is_one_for_each() -> None:
    inputs = [{"text": "a"}, {"text": "b"}]
    assert asked(inputs=inputs, prompt="p").prompts == ["p", "p"]
    assert asked(inputs=inputs, prompt=["p", "q"]).prompts == ["p", "q"]
    with pytest.raises(ValidationError, match="3 prompts for 2 inputs"):
        asked(inputs=inputs, prompt=["p", "q", "r"])


def test_a_message_is_the_bytes_of_its_base64() -> None:
    assert message_of("TFdJUg==") == b"LWIR"


@pytest.mark.parametrize("data", ["!!!!", "TFdJUg", "é", "TFdJ\nUg=="])
def test_what_is_not_base64_is_refused_and_shown(data: str) -> None:
    with pytest.raises(InvalidMessage) as caught:
        message_of(data)
    assert str(caught.value) == f"the latent {data!r} is not base64"
