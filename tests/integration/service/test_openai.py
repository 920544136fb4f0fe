"""OpenAI's own client against a service in a thread: what it reads is what ``/generate`` says, by other names."""

import json
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion
from pydantic import SecretStr

from latentwire.bridge.checkpoint import make_bridge, save_bridge
from latentwire.bridge.config import Head
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import layout_for
from latentwire.service.app import create_app
from latentwire.service.auth.keys import SCOPES, hash_of, key_line
from latentwire.service.schemas.inference import TokenLogprobOut
from latentwire.service.settings import Settings
from tests.conftest import TEMPLATE, bridge_config
from tests.integration.service.conftest import HELD_SECONDS, READY_SECONDS, until

SOURCE = "Mara wants a cup of tea. Ben lives in Rome."
QUESTION = "Question: Where does Ben live?\nAnswer:"
KEYS = "\n".join(
    [
        key_line("all", hash_of(b"all"), SCOPES),
        key_line("prometheus", hash_of(b"prometheus"), []),
        key_line("short", hash_of(b"short"), ["infer"], tokens_per_minute=10),
    ]
)
ASK: dict[str, Any] = {"model": "tiny", "prompt": "Where?", "max_tokens": 6, "seed": 5}
CHAT: dict[str, Any] = {
    "model": "tiny", "messages": [{"role": "user", "content": "Where?"}], "max_tokens": 6, "seed": 5
}  # fmt: skip
GIVEN = {"source": SOURCE}


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory, lms: dict[str, FrozenLM]) -> tuple[str, list[str]]:
    """A bridge from the NeoX to the Llama and to the GPT-2; and the receivers' names, the default first."""
    folder = tmp_path_factory.mktemp("forked")
    config, second = bridge_config(lms["neox"], lms["llama"]), lms["gpt2"]
    head = Head(second.ref, layout_for(second, TEMPLATE), second.embedding_rms())
    torch.manual_seed(2)
    save_bridge(folder, make_bridge(replace(config, heads={**config.heads, second.name: head})))
    return str(folder), [*config.heads, second.name]


@pytest.fixture(scope="module")
def app(checkpoint: Path, forked: tuple[str, list[str]]) -> FastAPI:
    bridges = {"tiny": str(checkpoint), "forked": forked[0], "team/tiny": str(checkpoint), "world": "builtin"}
    return create_app(Settings(api_keys=SecretStr(KEYS)), bridges)


@pytest.fixture(scope="module")
def address(app: FastAPI) -> Iterator[str]:
    """The address of a server in a thread, which is ready."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    where = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        until(lambda: httpx.get(f"{where}/health/ready").status_code == 200, READY_SECONDS)
        yield where
    finally:
        server.should_exit = True
        thread.join(READY_SECONDS)
    assert not thread.is_alive()


def client_of(address: str, key: str = "all") -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with client_of(address) as client:
        yield client


@pytest.fixture(scope="module")
def post(address: str) -> Iterator[Callable[..., dict[str, Any]]]:
    """Ask one of this product's own routes."""
    with httpx.Client(base_url=address, headers={"Authorization": "Bearer all"}) as own:

        def ask(path: str, **body: Any) -> dict[str, Any]:
            response = own.post(path, json=body)
            assert response.status_code == 200, response.text
            said: dict[str, Any] = response.json()
            return said

        yield ask


Post = Callable[..., dict[str, Any]]


@pytest.fixture
def generate(post: Post) -> Post:
    """What ``/generate`` says to ``ASK``; keyword arguments change it."""

    def ask(**changes: Any) -> dict[str, Any]:
        body = {
            "bridge": "tiny", "inputs": [{"text": SOURCE}], "prompt": "Where?", "max_tokens": 6, "seed": 5,
            "temperature": 1.0,
        }  # fmt: skip
        return post("/generate", **{**body, **changes})

    return ask


def refused(ask: Callable[[], Any], kind: type[openai.APIStatusError], param: str | None, *said: str) -> None:
    """The call fails with OpenAI's error, about ``param``, and the message has all of ``said``."""
    with pytest.raises(kind) as caught:
        ask()
    error = caught.value
    assert type(error) is kind
    assert isinstance(error.body, dict)
    assert set(error.body) == {"message", "type", "param", "code", "request_id"}
    assert error.body["request_id"] == error.request_id
    assert error.param == param, error.body
    assert all(words in error.body["message"] for words in said), error.body


def test_the_built_in_bridge_answers_openais_client_from_a_source_the_receiver_never_sees(client: OpenAI) -> None:
    asked = client.completions.create(model="world", prompt=QUESTION, temperature=0, extra_body=GIVEN)
    assert asked.choices[0].text.strip() == "Ben lives in Rome."
    parts: Any = [{"type": "source", "text": SOURCE}, {"type": "text", "text": QUESTION}]
    chatted = client.chat.completions.create(
        model="world", messages=[{"role": "user", "content": parts}], temperature=0
    )
    assert (chatted.choices[0].message.content, chatted.choices[0].message.role) == (asked.choices[0].text, "assistant")
    blind = client.completions.create(
        model="world", prompt=QUESTION, temperature=0, extra_body={**GIVEN, "condition": "none"}
    )
    assert "Rome" not in blind.choices[0].text


def test_models_are_the_bridges_and_the_receivers_of_those_that_have_several(
    client: OpenAI, forked: tuple[str, list[str]]
) -> None:
    listed = client.models.list().data
    names = [f"forked/{receiver}" for receiver in forked[1]]
    assert [model.id for model in listed] == ["tiny", "forked", *names, "team/tiny", "world"]
    assert {(model.object, model.owned_by, model.created > 0) for model in listed} == {("model", "latentwire", True)}
    for model in listed:
        assert client.models.retrieve(model.id) == model
    refused(lambda: client.models.retrieve("other"), openai.NotFoundError, "model", "'other'", "tiny")
    refused(lambda: client.models.retrieve("tiny/"), openai.NotFoundError, "model", "''")


def test_the_model_says_which_receiver_answers(client: OpenAI, generate: Post, forked: tuple[str, list[str]]) -> None:
    texts = [generate(bridge="forked", receiver=receiver)["outputs"][0]["text"] for receiver in forked[1]]
    assert texts[0] != texts[1]
    for name, text in zip(["forked", *(f"forked/{r}" for r in forked[1])], [texts[0], *texts], strict=True):
        said = client.completions.create(**{**ASK, "model": name}, extra_body=GIVEN)
        assert (said.model, said.choices[0].text) == (name, text)
    slashed = client.completions.create(**{**ASK, "model": "team/tiny"}, extra_body=GIVEN)
    assert slashed.choices[0].text == generate()["outputs"][0]["text"]


def test_a_completion_is_what_generate_says(client: OpenAI, generate: Post, app: FastAPI) -> None:
    said, native = client.completions.create(**ASK, extra_body=GIVEN), generate()
    (output,), usage = native["outputs"], native["usage"]
    assert [choice.model_dump() for choice in said.choices] == [
        {"finish_reason": output["finish_reason"], "index": 0, "logprobs": None, "text": output["text"]}
    ]
    assert said.id.startswith("cmpl-") and said.object == "text_completion"
    assert said.system_fingerprint == f"fp_{app.state.runtime.bridges['tiny'].manifest.bridge_id[:12]}"
    assert said.usage is not None and usage["soft_tokens"] > 0
    given = usage["prompt_tokens"] + usage["soft_tokens"]
    assert said.usage.to_dict() == {
        "prompt_tokens": given,
        "completion_tokens": usage["generated_tokens"],
        "total_tokens": given + usage["generated_tokens"],
        "latentwire": {"source_tokens": usage["source_tokens"], "soft_tokens": usage["soft_tokens"]},
    }


def test_a_latent_and_a_stored_one_stand_for_their_source(client: OpenAI, post: Post, generate: Post) -> None:
    latent = post("/encode", bridge="tiny", inputs=[SOURCE], store=True)["latents"][0]
    text = generate()["outputs"][0]["text"]
    for body in (GIVEN, {"latent": latent["data"]}, {"latent_id": latent["id"]}):
        assert client.completions.create(**ASK, extra_body=body).choices[0].text == text
        assert client.chat.completions.create(**CHAT, extra_body=body).choices[0].message.content == text
    for part in (
        {"type": "source", "text": SOURCE},
        {"type": "latent", "data": latent["data"]},
        {"type": "latent_id", "id": latent["id"]},
    ):
        messages: Any = [{"role": "user", "content": [part, {"type": "text", "text": "Where?"}]}]
        said = client.chat.completions.create(**{**CHAT, "messages": messages})
        assert said.choices[0].message.content == text


def test_the_condition_says_what_stands_in_the_latents_place(client: OpenAI, generate: Post) -> None:
    for condition in ("direct", "none"):
        said = client.completions.create(**ASK, extra_body={**GIVEN, "condition": condition})
        native = generate(condition=condition)
        assert said.choices[0].text == native["outputs"][0]["text"]
        assert said.usage is not None and said.usage.prompt_tokens == native["usage"]["prompt_tokens"]
    nothing = client.completions.create(**ASK, extra_body={"condition": "none"})
    assert nothing.choices[0].text == generate(condition="none")["outputs"][0]["text"]


def test_several_prompts_with_n_choices_each_come_in_generates_order(client: OpenAI, generate: Post) -> None:
    prompts = ["Where?", "Who?"]
    said = client.completions.create(**{**ASK, "prompt": prompts, "n": 2}, extra_body=GIVEN)
    native = generate(inputs=[{"text": SOURCE}] * 2, prompt=prompts, n=2)
    assert len({choice.text for choice in said.choices}) == 4
    assert [(choice.index, choice.text) for choice in said.choices] == [
        (output["index"], output["text"]) for output in native["outputs"]
    ]


def test_sampling_goes_through(client: OpenAI, generate: Post) -> None:
    whole = generate(max_tokens=12)["outputs"][0]["text"]
    said = client.completions.create(**{**ASK, "max_tokens": 12, "stop": whole[4]}, extra_body=GIVEN)
    assert said.choices[0].text == whole[: whole.index(whole[4])] and said.choices[0].finish_reason == "stop"
    for sampling in ({"temperature": 0.0}, {"temperature": 2.0, "top_p": 0.5}, {"temperature": 1.5, "top_k": 3}):
        native = generate(**sampling, stop=["zz", "qq"])["outputs"][0]
        body = {**GIVEN, **sampling, "stop": ["zz", "qq"]}
        completion = client.completions.create(**ASK, extra_body=body).choices[0]
        assert (completion.text, completion.finish_reason) == (native["text"], native["finish_reason"])
        chat = client.chat.completions.create(**CHAT, extra_body=body).choices[0]
        assert (chat.message.content, chat.finish_reason) == (native["text"], native["finish_reason"])


def test_a_source_that_is_too_long_is_cut_where_that_is_asked_for(client: OpenAI, generate: Post) -> None:
    long = "a " * 200
    said = client.completions.create(**ASK, extra_body={"source": long, "truncate": True})
    assert said.choices[0].text == generate(inputs=[{"text": long}], truncate=True)["outputs"][0]["text"]


def test_the_receivers_prompt_is_the_text_of_all_messages_line_by_line(client: OpenAI, generate: Post) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "source", "text": SOURCE}]},
        {"role": "assistant", "content": "Yes.", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "name": "mara", "content": [{"type": "text", "text": t} for t in ("Question:", "Where?")]},
    ]
    said = client.chat.completions.create(**{**CHAT, "messages": messages})
    native = generate(prompt="Be brief.\nYes.\nQuestion:\nWhere?")
    assert said.choices[0].message.content == native["outputs"][0]["text"]
    assert (said.id.split("-")[0], said.object) == ("chatcmpl", "chat.completion")


def test_both_names_of_most_tokens_count_and_few_is_the_default(client: OpenAI, generate: Post) -> None:
    body = {name: value for name, value in CHAT.items() if name != "max_tokens"}
    for most, changes in (({"max_completion_tokens": 3}, {"max_tokens": 3}), ({}, {"max_tokens": 32})):
        said = client.chat.completions.create(**body, **most, extra_body=GIVEN)
        assert said.choices[0].message.content == generate(**changes)["outputs"][0]["text"]


def test_logprobs_have_openais_shapes(client: OpenAI, generate: Post) -> None:
    (native,) = generate(logprobs=2)["outputs"]
    said = client.completions.create(**ASK, logprobs=2, extra_body=GIVEN).choices[0].logprobs
    assert said is not None and said.tokens == [token["token"] for token in native["logprobs"]]
    assert said.token_logprobs == [token["logprob"] for token in native["logprobs"]]
    assert said.text_offset == [sum(map(len, said.tokens[:at])) for at in range(6)]
    for token, top in zip(native["logprobs"], said.top_logprobs or [], strict=True):
        every = [*token["top"], [token["token"], token["logprob"]]]
        assert top == {text: max(logprob for other, logprob in every if other == text) for text, _ in every}
    chat = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2, extra_body=GIVEN).choices[0].logprobs
    assert chat is not None and chat.content is not None
    for token, one in zip(native["logprobs"], chat.content, strict=True):
        assert (one.token, one.logprob) == (token["token"], token["logprob"])
        assert [[top.token, top.logprob] for top in one.top_logprobs] == token["top"]
        assert one.bytes == (None if "\ufffd" in one.token else list(one.token.encode()))
    few = client.chat.completions.create(**CHAT, logprobs=True, extra_body=GIVEN).choices[0].logprobs
    assert few is not None and few.content is not None and {len(one.top_logprobs) for one in few.content} == {0}


NATIVE = {"bridge": "tiny", "inputs": [{"text": SOURCE}], "prompt": "Where?", "max_tokens": 6}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {**NATIVE, "logprobs": 5}),
        ("/v1/completions", {**ASK, **GIVEN, "logprobs": 5}),
        ("/v1/chat/completions", {**CHAT, **GIVEN, "logprobs": True, "top_logprobs": 5}),
    ],
)
def test_impossible_tokens_have_a_number_too_for_json_has_no_infinity(
    address: str, app: FastAPI, path: str, body: dict[str, Any], stream: bool
) -> None:
    model = next(
        e for e in app.state.runtime.models.engines.all() if e.lm.name in app.state.runtime.bridges["tiny"].model_names
    )

    def two_are_possible(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        impossible = torch.ones(logits.shape[-1], dtype=torch.bool)
        impossible[[40, 50]] = False
        return logits.masked_fill(impossible, float("-inf"))

    hook = model.lm.model.get_output_embeddings().register_forward_hook(two_are_possible)
    try:
        answer = httpx.post(
            f"{address}{path}", json={**body, "stream": stream}, headers={"Authorization": "Bearer all"}
        )
    finally:
        hook.remove()
    assert answer.status_code == 200, answer.text
    assert not re.search('Infinity|NaN|logprob":null|,null]', answer.text)
    assert answer.text.count("-9999.0") >= 6


def test_what_is_no_number_is_an_impossible_token_s() -> None:
    odd = TokenLogprobOut(token="a", logprob=float("nan"), top=[("a", float("-inf")), ("b", -0.5)])
    assert odd.model_dump(mode="json") == {"token": "a", "logprob": -9999.0, "top": [["a", -9999.0], ["b", -0.5]]}


def joined(chunks: list[Completion], index: int) -> str:
    return "".join(c.text for chunk in chunks for c in chunk.choices if c.index == index)


def lists(*parts: Any) -> dict[str, list[Any]]:
    """The lists of a completion's log-probabilities, put together."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [one for part in parts if part is not None for one in getattr(part, name)] for name in names}


def near(value: Any) -> Any:
    """Equal to what differs in the last digits: a sum depends on the company in which it is made."""
    if isinstance(value, list):
        return [near(one) for one in value]
    if isinstance(value, dict):
        return {name: near(one) for name, one in value.items()}
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


@pytest.mark.parametrize("stop", [None, [" Rome"], [" lives at", " Paris", " Rome."]])
def test_log_probabilities_come_with_the_text_of_their_tokens(client: OpenAI, stop: list[str] | None) -> None:
    """Also where text is held back that might become a stop string; those of the stop string come at the end."""
    body: dict[str, Any] = {
        "model": "world", "prompt": QUESTION, "temperature": 0, "logprobs": 1, "stop": stop, "extra_body": GIVEN
    }  # fmt: skip
    (whole,) = client.completions.create(**body).choices
    *chunks, last = [chunk.choices[0] for chunk in client.completions.create(**body, stream=True)]
    assert lists(*(c.logprobs for c in (*chunks, last))) == near(lists(whole.logprobs)) and len(chunks) > 1
    assert [c.text for c in chunks] == ["".join(lists(c.logprobs)["tokens"]) for c in chunks]
    assert "".join(lists(last.logprobs)["tokens"]) == ("" if stop is None else stop[-1])
    parts: Any = [{"type": "source", "text": SOURCE}, {"type": "text", "text": QUESTION}]
    chat: dict[str, Any] = {
        "model": "world", "messages": [{"role": "user", "content": parts}], "temperature": 0, "logprobs": True,
        "stop": stop,
    }  # fmt: skip
    (answer,) = client.chat.completions.create(**chat).choices
    assert answer.logprobs is not None
    pieces = [chunk.choices[0] for chunk in client.chat.completions.create(**chat, stream=True)]
    reported = [(c.logprobs.content or []) if c.logprobs else [] for c in pieces]
    assert [one.model_dump() for some in reported for one in some] == near(answer.logprobs.model_dump()["content"])
    assert [c.delta.content or "" for c in pieces[:-1]] == [
        "".join(one.token for one in some) for some in reported[:-1]
    ]


def test_a_streamed_completion_is_the_whole_one_in_pieces(client: OpenAI) -> None:
    body: dict[str, Any] = {**ASK, "n": 2, "logprobs": 1, "extra_body": GIVEN}
    whole = client.completions.create(**body)
    chunks = list(client.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert len(chunks) > 4 and len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert joined(chunks, choice.index) == choice.text
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert lists(*(c.logprobs for c in mine)) == near(lists(choice.logprobs))
    assert [chunk.usage for chunk in chunks] == [None] * (len(chunks) - 1) + [whole.usage]
    assert chunks[-1].choices == [] and all("usage" in chunk.to_dict(exclude_unset=True) for chunk in chunks)


def test_a_streamed_chat_is_the_whole_one_in_pieces(client: OpenAI) -> None:
    body: dict[str, Any] = {**CHAT, "n": 2, "logprobs": True, "extra_body": GIVEN}
    whole = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(**body, stream=True))
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert [c.delta.role for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert mine[-1].delta.to_dict() == {} and choice.logprobs is not None
        told = [one.model_dump() for c in mine if c.logprobs for one in c.logprobs.content or []]
        assert told == near(choice.logprobs.model_dump()["content"])
    assert not any("usage" in chunk.to_dict(exclude_unset=True) for chunk in chunks)


async def test_the_asynchronous_client_reads_the_same(address: str, client: OpenAI) -> None:
    async with AsyncOpenAI(base_url=f"{address}/v1", api_key="all", max_retries=0) as asynchronous:
        said = await asynchronous.completions.create(**ASK, extra_body=GIVEN)
        chatted = await asynchronous.chat.completions.create(**CHAT, extra_body=GIVEN)
        stream = await asynchronous.completions.create(**ASK, stream=True, extra_body=GIVEN)
        text = joined([chunk async for chunk in stream], 0)
        chat = await asynchronous.chat.completions.create(**CHAT, stream=True, extra_body=GIVEN)
        content = "".join([chunk.choices[0].delta.content or "" async for chunk in chat])
    expected = client.completions.create(**ASK, extra_body=GIVEN).choices[0].text
    assert (said.choices[0].text, chatted.choices[0].message.content, text, content) == (expected,) * 4


@pytest.mark.parametrize(("path", "body"), [("completions", ASK), ("chat/completions", CHAT)])
def test_a_stream_is_lines_of_data_and_ends_with_done(address: str, path: str, body: dict[str, Any]) -> None:
    headers = {"Authorization": "Bearer all"}
    response = httpx.post(f"{address}/v1/{path}", json={**body, **GIVEN, "stream": True}, headers=headers)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events[-1] == "data: [DONE]"
    last = json.loads(events[-2].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] in ("stop", "length")
    assert "finish_reason" in json.loads(events[0].removeprefix("data: "))["choices"][0]


def test_an_error_after_the_first_chunk_reaches_the_caller(
    client: OpenAI, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = next(
        e for e in app.state.runtime.models.engines.all() if e.lm.name in app.state.runtime.bridges["tiny"].model_names
    )
    real, opened, calls = model.lm.model.forward, Event(), 0

    def forward(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        assert calls <= 4 or opened.wait(HELD_SECONDS)
        return real(*given, **named)

    monkeypatch.setattr(model.lm.model, "forward", forward)
    body = {**ASK, "max_tokens": 100}
    stream = client.completions.create(**body, stream=True, extra_body={**GIVEN, "timeout_seconds": 4.0})
    try:
        assert next(stream).choices[0].text
        with pytest.raises(openai.APIError, match="no answer within 4 s") as caught:
            list(stream)
    finally:
        opened.set()
    assert (caught.value.code, caught.value.type) == ("DeadlineExceeded", "server_error")


def test_a_caller_who_closes_a_stream_ends_its_generation(client: OpenAI, app: FastAPI) -> None:
    runtime = app.state.runtime
    with client.completions.create(**{**ASK, "max_tokens": 150}, stream=True, extra_body=GIVEN) as stream:
        next(stream)
    until(
        lambda: runtime.admission.admitted == 0 and not any(engine.running for engine in runtime.models.engines.all())
    )


BOTH: dict[str, Any] = {  # what no answer could show has any value, the rest one that asks for nothing
    "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "safety_identifier": "s",
    "prompt_cache_key": "k", "prompt_cache_retention": "24h", "session_id": "s", "conversation_id": "c", "chat_id": "c",
    "request_id": "r", "trace_id": "t", "frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
    "min_p": 0.0, "min_tokens": 0, "ignore_eos": False, "logit_bias": {},
}  # fmt: skip
IDLE: dict[str, dict[str, Any]] = {
    "completions": {**BOTH, "best_of": 1, "echo": False, "suffix": ""},
    "chat/completions": {
        **BOTH, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "functions": [],
        "function_call": "none", "response_format": {"type": "text"}, "modalities": ["text"],
        "reasoning_effort": "none", "verbosity": "medium",
    },
}  # fmt: skip
REAL: dict[str, Any] = {"n": 1, "stop": [], "stream_options": {"include_usage": True}, "top_p": 1}


def ignored(address: str) -> dict[str, float]:
    text = httpx.get(f"{address}/metrics", headers={"Authorization": "Bearer prometheus"}).text
    found = re.findall(r'^latentwire_ignored_fields_total\{field="(.+)"\} (\S+)$', text, re.MULTILINE)
    return {name: float(count) for name, count in found}


@pytest.mark.parametrize("path", IDLE)
def test_fields_that_ask_for_nothing_are_taken_left_out_and_counted(
    address: str, client: OpenAI, generate: Post, path: str
) -> None:
    body, idle = (ASK if path == "completions" else CHAT), IDLE[path]
    nulls = {name: None for name in (*idle, *REAL, "timeout_seconds", "what_nobody_knows", "nor_this")}
    before = ignored(address)
    answers: list[Any] = [
        client.post(f"/{path}", body={**body, **GIVEN, **more}, cast_to=object)
        for more in ({}, {**idle, **REAL}, nulls)
    ]
    for answer in answers:
        choice = answer["choices"][0]
        text = choice["text"] if path == "completions" else choice["message"]["content"]
        assert text == generate()["outputs"][0]["text"]
    counted = {name: count - before.get(name, 0) for name, count in ignored(address).items()}
    assert {name: count for name, count in counted.items() if count} == {**dict.fromkeys(idle, 1), "other": 2}


def test_messages_bring_fields_that_ask_for_nothing_too(address: str, client: OpenAI, generate: Post) -> None:
    nothing: dict[str, Any] = {
        "id": "msg_1", "name": "mara", "metadata": {"a": 1}, "created_at": 1, "timestamp": "now", "refusal": "",
        "reasoning_content": "", "annotations": [], "tool_calls": [], "cache_control": {"type": "ephemeral"},
        "audio": None, "function_call": None, "what_nobody_knows": None,
    }  # fmt: skip
    part = {"type": "text", "text": "Where?", "cache_control": {"type": "ephemeral"}, "annotations": [], "odd": None}
    before = ignored(address)
    messages: Any = [{"role": "assistant", "content": "Yes.", **nothing}, {"role": "user", "content": [part]}]
    said = client.chat.completions.create(**{**CHAT, "messages": messages}, extra_body={**GIVEN, "top_logprobs": 0})
    assert said.choices[0].message.content == generate(prompt="Yes.\nWhere?")["outputs"][0]["text"]
    counted = {name: count - before.get(name, 0) for name, count in ignored(address).items()}
    assert {name for name, count in counted.items() if count} == {
        *(f"messages.{name}" for name, value in nothing.items() if value is not None), "messages.other",
        "messages.content.cache_control", "messages.content.annotations", "messages.content.other",
    }  # fmt: skip


def test_both_names_of_most_tokens_may_say_the_same(client: OpenAI, generate: Post) -> None:
    said = client.chat.completions.create(**CHAT, max_completion_tokens=6, extra_body=GIVEN)
    assert said.choices[0].message.content == generate()["outputs"][0]["text"]


def says(*content: Any, role: str = "user") -> dict[str, Any]:
    """One message: of a text, or of parts."""
    return {"messages": [{"role": role, "content": content[0] if isinstance(content[0], str) else list(content)}]}


def says_more(**fields: Any) -> dict[str, Any]:
    """One message with more fields than it needs."""
    return {"messages": [{"role": "user", "content": "Where?", **fields}]}


@pytest.mark.parametrize(
    ("path", "changes", "param", "said"),
    [
        ("completions", {"frequency_penalty": 0.5}, "frequency_penalty", "does not do that; expected 0, got 0.5"),
        ("completions", {"presence_penalty": -1}, "presence_penalty", "expected 0, got -1"),
        ("completions", {"logit_bias": {"50256": -100}}, "logit_bias", "expected {}"),
        ("completions", {"best_of": 3}, "best_of", "expected 1, got 3"),
        ("completions", {"echo": True}, "echo", "expected false, got True"),
        ("completions", {"suffix": "end"}, "suffix", "expected \"\", got 'end'"),
        ("completions", {"repetition_penalty": 1.1}, "repetition_penalty", "expected 1, got 1.1"),
        ("completions", {"min_p": 0.1}, "min_p", "expected 0, got 0.1"),
        (
            "completions",
            {"stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "false",
        ),
        ("completions", {"stream_options": {"usage": True}}, "stream_options.usage", "not permitted"),
        ("completions", {"prompt": [1, 2]}, "prompt.0", "valid string, got 1"),
        ("completions", {"prompt": []}, "prompt", "at least 1 item"),
        ("completions", {"temperature": 2.5}, "temperature", "got 2.5"),
        ("completions", {"messages": []}, "messages", "not permitted"),
        ("completions", {"temprature": 1}, "temprature", "not permitted"),
        ("completions", {"temprature": {}}, "temprature", "not permitted"),
        ("completions", {"source": None}, None, "exactly one of source, latent and latent_id, not 0"),
        ("completions", {"latent_id": "lat_1"}, None, "exactly one of source, latent and latent_id, not 2"),
        ("completions", {"source": None, "latent_id": "a", "condition": "direct"}, None, "give it as text"),
        ("completions", {"n": 17}, "n", "n is 17; at most 16"),
        ("completions", {"max_tokens": 513}, "max_tokens", "max_tokens is 513; at most 512"),
        ("completions", {"prompt": ["Where?"] * 65}, "prompt", "prompt is 65; at most 64"),
        ("completions", {"prompt": "{latent}{latent}"}, "prompt", "2 times"),
        ("completions", {"source": "a" * 100_001}, "source", "100001 characters"),
        ("completions", {"source": "a " * 200}, "source", "128"),
        ("completions", {"source": None, "latent": "!"}, "latent", "not base64"),
        ("chat/completions", {"tools": [{"type": "function"}]}, "tools", "expected []"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format", '{"type": "text"}'),
        ("chat/completions", {"reasoning_effort": "high"}, "reasoning_effort", "expected \"none\", got 'high'"),
        ("chat/completions", {"messages": []}, "messages", "at least 1 item"),
        ("chat/completions", says_more(weight=1), "messages.0.weight", "not permitted"),
        ("chat/completions", says_more(tool_calls=[{"id": "a"}]), "messages.0.tool_calls", "expected []"),
        ("chat/completions", says_more(reasoning_content="hm"), "messages.0.reasoning_content", "does not do that"),
        (
            "chat/completions",
            says({"type": "text", "text": "a", "detail": "low"}),
            "messages.0.content.0.detail",
            "not",
        ),
        ("chat/completions", says("a", role="assistant"), None, "role assistant; expected user"),
        ("chat/completions", says("a", role="tool"), "messages.0.role", "got 'tool'"),
        ("chat/completions", says({"type": "image_url"}), "messages.0.content.0.type", "'image_url'"),
        ("chat/completions", says({"type": "latent", "text": "a"}), "messages.0.content.0", "field data, not text"),
        ("chat/completions", says({"type": "source"}), "messages.0.content.0", "field text, not none"),
        ("chat/completions", says({"type": "source", "text": "a"}, role="system"), "messages.0", "role system has"),
        ("chat/completions", says({"type": "source", "text": "a"}), None, "not 2"),
        (
            "chat/completions",
            {"source": None, **says({"type": "text", "text": "a"}, {"type": "latent", "data": "!"})},
            "messages.0.content.1.data",
            "not base64",
        ),
        ("chat/completions", says("{latent}{latent}"), "messages", "2 times"),
        ("chat/completions", {"max_completion_tokens": 3}, None, "not both"),
        ("chat/completions", {"top_logprobs": 2}, None, "needs logprobs"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_one_clear_sentence(
    client: OpenAI, path: str, changes: dict[str, Any], param: str | None, said: str, stream: bool
) -> None:
    body = {**(ASK if path == "completions" else CHAT), **GIVEN, "stream": stream, **changes}
    refused(lambda: client.post(f"/{path}", body=body, cast_to=object), openai.BadRequestError, param, said)


def test_what_is_not_there_is_not_found(client: OpenAI) -> None:
    def ask(**changes: Any) -> Any:
        return client.post("/completions", body={**ASK, **GIVEN, **changes}, cast_to=object)

    refused(lambda: ask(model="gpt-4o"), openai.NotFoundError, "model", "'gpt-4o'", "tiny")
    refused(lambda: ask(model="tiny/nobody"), openai.NotFoundError, "model", "'nobody'")
    refused(lambda: ask(source=None, latent_id="lat_0"), openai.NotFoundError, "latent_id", "lat_0")
    refused(lambda: client.post("/embeddings", body={}, cast_to=object), openai.NotFoundError, None, "/v1/embeddings")


def test_a_latent_of_another_bridge_is_a_bad_request_which_clients_do_not_repeat(client: OpenAI, post: Post) -> None:
    other = post("/encode", bridge="forked", inputs=[SOURCE])["latents"][0]["data"]
    refused(
        lambda: client.completions.create(**ASK, extra_body={"latent": other}),
        openai.BadRequestError,
        "latent",
        "bridge",
    )


def test_keys_are_openais_keys(address: str) -> None:
    def ask(key: str) -> Completion:
        with client_of(address, key) as client:
            return client.completions.create(**ASK, extra_body=GIVEN)

    refused(lambda: ask("unknown"), openai.AuthenticationError, None, "not known")
    refused(lambda: ask("prometheus"), openai.PermissionDeniedError, None, "infer")
    assert ask("short").choices
    refused(lambda: ask("short"), openai.RateLimitError, None, "10 tokens of this minute")


def test_a_body_that_is_no_json_and_a_crash_have_openais_body_too(
    address: str, client: OpenAI, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"Authorization": "Bearer all", "content-type": "application/json"}
    response = httpx.post(f"{address}/v1/completions", content=b"{", headers=headers)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    monkeypatch.setattr(app.state.runtime, "find", lambda name: 1 / 0)
    refused(lambda: client.models.retrieve("tiny"), openai.InternalServerError, None, "failed on this request")
