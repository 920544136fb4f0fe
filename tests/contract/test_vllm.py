"""A receiver on vLLM: against a real one on the CPU (``make test-vllm``), else against what that one answered."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from latentwire.bridge import remote
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.errors import (
    InferenceFailed,
    InvalidRequest,
    LatentWireError,
    ModelUnavailable,
    NotReady,
)
from latentwire.bridge.files import replace_file
from latentwire.bridge.generation import remote as engine
from latentwire.bridge.generation.base import Soft
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.generation.remote import RemoteEngine
from latentwire.bridge.models import FrozenLM, folder_of, load_model
from latentwire.bridge.prompt import Row, collate, compose, embed
from latentwire.bridge.remote import check_parity, load_embedding, open_remote
from latentwire.bridge.residency import Residency
from latentwire.bridge.results import Output
from latentwire.bridge.sampling import SamplingParams
from latentwire.service.__main__ import app
from latentwire.service.app import create_app
from latentwire.service.settings import Settings
from tests.ports import free_port
from tests.vllm import Tape, real_server

RECORDED = Path(__file__).with_name("vllm.json")
REAL = pytest.param("real", marks=pytest.mark.vllm)
RECEIVER = "builtin:llama"
TEXTS = ["Mara wants a cup of tea.", "Ben lives in Oslo. Mara wants a cup of tea.", "Ben lives in Rome."]
PROMPTS = [f"Question: {what}\nAnswer:" for what in ("What does Mara want?", "Where does Ben live?", "Who?")]
CPU = torch.device("cpu")


@contextmanager
def taped(name: str, kind: str, folder: Path, *flags: str) -> Iterator[Tape]:
    """What a server of the built-in Llama answered; or the server itself, which is recorded where RECORD is set."""
    if kind == "recorded":
        tape = Tape(json.loads(RECORDED.read_text())[name])
        yield tape
        tape.stop()
        return
    model = folder / "llama"
    shutil.copytree(folder_of(RECEIVER), model)
    with real_server(model, folder / "log", *flags) as (url, _):
        tape = Tape([], url)
        yield tape
        tape.stop()
        if os.environ.get("RECORD"):
            others = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
            replace_file(RECORDED, json.dumps(others | {name: tape.exchanges}, indent=1).encode() + b"\n")


@pytest.fixture(scope="module", params=["recorded", REAL])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tape]:
    """A server that takes embeddings."""
    with taped("whole", request.param, tmp_path_factory.mktemp("vllm"), "--enable-prompt-embeds") as tape:
        yield tape


@pytest.fixture
def tape(whole: Tape, monkeypatch: pytest.MonkeyPatch) -> Tape:
    """The same, as it was at first, and nobody waits long before trying again."""
    whole.rewind()
    monkeypatch.setattr(engine, "PAUSES", (0.01, 0.02))
    return whole


@pytest.fixture(scope="module", params=["recorded", REAL])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tape]:
    """A server that was started without ``--enable-prompt-embeds``."""
    with taped("plain", request.param, tmp_path_factory.mktemp("plain")) as tape:
        yield tape


@pytest.fixture(scope="module")
def here() -> Bridge:
    """The built-in bridge with its receiver in this process."""
    return Bridge.load()


@pytest.fixture
def there(tape: Tape) -> Iterator[Bridge]:
    """The same with its receiver on the server."""
    bridge = Bridge.load(receiver=f"vllm:{tape.url}")
    yield bridge
    bridge.unload()


def completions(tape: Tape) -> list[dict[str, Any]]:
    """Streams that were asked for."""
    return [asked for asked in tape.asked if asked.get("stream")]


def told(outputs: tuple[Output, ...]) -> list[tuple[str, str, int]]:
    return [(output.text, output.finish_reason, output.token_count) for output in outputs]


def test_greedy_answers_from_latents_are_those_of_the_model_itself(here: Bridge, there: Bridge, tape: Tape) -> None:
    latents = here.encode(TEXTS)
    ours, theirs = (bridge.generate(latents, PROMPTS, logprobs=3) for bridge in (here, there))
    assert told(theirs.outputs) == told(ours.outputs) and theirs.usage == ours.usage
    assert len(set(theirs.texts)) == 3
    for mine, yours in zip(ours.outputs, theirs.outputs, strict=True):
        assert mine.logprobs and yours.logprobs
        for one, other in zip(mine.logprobs, yours.logprobs, strict=True):
            assert (one.token, [token for token, _ in one.top]) == (other.token, [token for token, _ in other.top])
            assert other.logprob == pytest.approx(one.logprob, abs=1e-3)
            assert [p for _, p in other.top] == pytest.approx([p for _, p in one.top], abs=1e-3)
    assert all(asked["cache_salt"] for asked in completions(tape))


def test_stop_strings_ids_and_limits_end_answers_as_they_do_here(here: Bridge, there: Bridge) -> None:
    latents = here.encode(TEXTS[:1])
    for how in ({"stop": " tea"}, {"stop": "never"}, {"max_tokens": 2}, {"stop_ids": [here_id(here, " cup")]}):
        ours, theirs = (bridge.generate(latents, PROMPTS[0], **how) for bridge in (here, there))  # type: ignore[arg-type]
        assert told(theirs.outputs) == told(ours.outputs), how


def here_id(bridge: Bridge, word: str) -> int:
    (found,) = bridge.reader(RECEIVER).tokenizer(word, add_special_tokens=False)["input_ids"]
    return int(found)


def test_how_to_sample_reaches_the_server(there: Bridge, tape: Tape) -> None:
    latents = there.encode(TEXTS[:1])
    how: dict[str, Any] = {"temperature": 2.0, "top_p": 0.9, "top_k": 40, "seed": 7, "n": 3, "max_tokens": 6}
    first = there.generate(latents, PROMPTS[0], stop="Zed", **how).texts
    assert there.generate(latents, PROMPTS[0], stop="Zed", **how).texts == first and len(set(first)) > 1
    asked = sorted(completions(tape)[:3], key=lambda one: one["seed"] != 7)
    assert {name: asked[0][name] for name in how if name != "n"} == {k: v for k, v in how.items() if k != "n"}
    assert asked[0]["stop"] == ["Zed"] and len({one["seed"] for one in asked}) == 3


def test_a_text_alone_goes_as_ids_and_needs_no_embedding(here: Bridge, there: Bridge, tape: Tape) -> None:
    layout = here.manifest.bridge.heads[RECEIVER].layout
    row = compose(
        here.reader(RECEIVER), layout, "Ben lives in Rome. Question: Where does Ben live?\nAnswer:", latent=None
    )
    generation = asked_of(there.remote_engine(RECEIVER), row, SamplingParams(max_tokens=6))
    assert isinstance(generation, Generation) and generation.text
    assert completions(tape)[-1]["prompt"] == row.ids


def asked_of(
    remote: RemoteEngine, row: Row, params: SamplingParams, soft: Soft | None = None, **more: Any
) -> Generation | LatentWireError:
    """How a request ends."""
    ended = threading.Event()
    found: list[Generation | LatentWireError] = []

    def end(result: Generation | LatentWireError) -> None:
        found.append(result)
        ended.set()

    remote.submit(row, params, soft, end, **more)
    assert ended.wait(60)
    return found[0]


def test_a_latent_can_be_read_back_and_not_scored(there: Bridge) -> None:
    assert there.read(there.encode(TEXTS[0])).readings[0].text == TEXTS[0]
    with pytest.raises(InvalidRequest, match=f"{RECEIVER}' answers at vllm:http.*no log-probabilities of given texts"):
        there.score(TEXTS[0], PROMPTS[0], " Oslo.")


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), 1e6])
def test_embeddings_that_would_poison_a_server_are_never_sent(there: Bridge, tape: Tape, damage: float) -> None:
    remote, latents = there.remote_engine(RECEIVER), there.encode(TEXTS[:1])
    asked = len(tape.asked)
    head = there.model.head(RECEIVER)
    had, head.embedding_rms = head.embedding_rms, damage
    try:
        with pytest.raises(InferenceFailed, match=r"RMS (nan|inf|1e\+06); expected a number up to .*nothing was sent"):
            there.generate(latents, PROMPTS[0])
    finally:
        head.embedding_rms = had
    assert len(tape.asked) == asked and remote.running == 0


def test_the_loudest_soft_tokens_that_a_head_can_make_are_sent(there: Bridge) -> None:
    lm = there.remote_engine(RECEIVER).lm
    row, soft = remote.probe(lm, 0)
    assert there.remote_engine(RECEIVER).input_of(row, soft * 256)["cache_salt"]
    with pytest.raises(InferenceFailed):
        there.remote_engine(RECEIVER).input_of(row, soft * 270)


def test_other_input_has_another_salt(there: Bridge) -> None:
    remote_engine = there.remote_engine(RECEIVER)
    row, soft = remote.probe(remote_engine.lm, 0)
    other = Row([*row.ids[:-1], row.ids[-1] - 1], row.slots, row.labels)
    salts = [
        remote_engine.input_of(one, tokens)["cache_salt"] for one, tokens in ((row, soft), (other, soft), (row, -soft))
    ]
    assert len(set(salts)) == 3 and remote_engine.input_of(row, soft)["cache_salt"] == salts[0]


def test_a_stream_that_is_cut_goes_on_where_it_was(here: Bridge, there: Bridge, tape: Tape) -> None:
    latents = here.encode(TEXTS[:1])
    there.remote_engine(RECEIVER)
    tape.cut_after = [3]
    ours, theirs = (bridge.generate(latents, PROMPTS[0], logprobs=0) for bridge in (here, there))
    assert told(theirs.outputs) == told(ours.outputs)
    before, after = completions(tape)
    assert len(after["prompt_embeds"]["column"]) == len(before["prompt_embeds"]["column"]) + 3
    assert after["max_tokens"] == before["max_tokens"] - 3


def test_one_that_is_cut_again_and_a_sampled_one_fail_with_the_reason(there: Bridge, tape: Tape) -> None:
    latents = there.encode(TEXTS[:1])
    there.remote_engine(RECEIVER)
    tape.cut_after = [3, 0]
    with pytest.raises(NotReady, match=r"the vLLM server at http\S+ was lost after 3 tokens \(its answer has no end\)"):
        there.generate(latents, PROMPTS[0], logprobs=0)
    tape.cut_after = [2]
    with pytest.raises(NotReady, match="lost after 2 tokens"):
        there.generate(latents, PROMPTS[0], temperature=2.0, top_p=0.9, top_k=40, seed=7, max_tokens=6, stop="Zed")


def test_a_server_that_is_away_for_a_moment_is_asked_again(here: Bridge, there: Bridge, tape: Tape) -> None:
    latents = here.encode(TEXTS[:1])
    tape.refuse = 2  # at the start
    there.remote_engine(RECEIVER)
    tape.refuse = 2  # and at a request
    assert there.generate(latents, PROMPTS[0], logprobs=0).texts == here.generate(latents, PROMPTS[0]).texts
    tape.refuse = 3
    with pytest.raises(NotReady, match=r"is not reached \(503 .*\)"):
        there.generate(latents, PROMPTS[0], logprobs=0)


def test_a_server_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PAUSES", (0.01,))
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(NotReady, match=f"the vLLM server at {url} is not reached") as met:
        Bridge.load(receiver=f"vllm:{url}").generate(TEXTS[0], PROMPTS[0])
    assert met.value.retry_after_seconds


def test_a_server_that_says_nothing_is_not_waited_for_for_ever(
    there: Bridge, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = there.encode(TEXTS[:1])
    monkeypatch.setattr(engine, "SILENT_SECONDS", 1.0)
    there.remote_engine(RECEIVER)
    tape.held.clear()
    with pytest.raises(NotReady, match=r"has said nothing for 1 s"):
        there.generate(latents, PROMPTS[0], logprobs=0)


def test_a_request_that_is_given_up_ends_at_once(there: Bridge, tape: Tape) -> None:
    remote_engine, ended = there.remote_engine(RECEIVER), list[object]()
    tape.held.clear()
    running = remote_engine.submit(remote.probe(remote_engine.lm, 0)[0][:4], SamplingParams(), None, ended.append)
    remote_engine.cancel(running)
    assert remote_engine.running == 0
    until(lambda: not remote_engine._tasks)
    assert ended == []


def test_closing_fails_what_runs(there: Bridge, tape: Tape) -> None:
    remote_engine = there.remote_engine(RECEIVER)
    tape.held.clear()
    ended: list[object] = []
    remote_engine.submit(remote.probe(remote_engine.lm, 0)[0][:4], SamplingParams(), None, ended.append)
    remote_engine.close()
    assert len(ended) == 1 and isinstance(ended[0], NotReady)
    with pytest.raises(NotReady):
        remote_engine.submit(remote.probe(remote_engine.lm, 0)[0][:4], SamplingParams(), None, ended.append)


def test_a_request_longer_than_the_servers_room_is_refused_here(there: Bridge, tape: Tape) -> None:
    remote_engine = there.remote_engine(RECEIVER)
    assert remote_engine.capacity_tokens == 512
    remote_engine._most = 20
    with pytest.raises(InvalidRequest, match="this receiver has room for 20"):
        there.generate(TEXTS[0], PROMPTS[0])


def test_a_server_without_prompt_embeds_is_named_with_the_flag(plain: Tape) -> None:
    with pytest.raises(
        ModelUnavailable, match=f"{plain.url} answered 400 for '{RECEIVER}': You must set `--enable-prompt"
    ):
        Bridge.load(receiver=f"vllm:{plain.url}").generate(TEXTS[0], PROMPTS[0])


def test_a_server_of_another_width_is_refused_with_both_widths(tape: Tape, model_folders: dict[str, Path]) -> None:
    with pytest.raises(ModelUnavailable, match="hidden_size 32 does not match the model's hidden_size 128"):
        open_remote(str(model_folders["llama"]), tape.url, Residency(None, CPU), lambda lm: None)


def test_a_server_of_another_model_is_found_out(tape: Tape, tmp_path: Path) -> None:
    other, residency = load_model(RECEIVER), Residency(None, CPU)
    with torch.no_grad():
        for name, weights in other.model.named_parameters():
            if "o_proj" in name:
                weights.mul_(-1)
    other.model.save_pretrained(tmp_path)
    other.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelUnavailable, match=r"answers otherwise than .* nats off, and 0.5 are taken"):
        open_remote(str(tmp_path), tape.url, residency, lambda lm: None)
    assert residency.resident() == {}


def test_a_server_that_does_not_scale_embeddings_as_the_model_does_is_found_out(there: Bridge) -> None:
    remote_engine, whole = there.remote_engine(RECEIVER), load_model(RECEIVER)
    told = [remote_engine.first_tokens(*remote.probe(whole, number)) for number in range(remote.PROBES)]
    check_parity("url", whole, told)

    def scale(model: Any, args: Any, given: dict[str, Any]) -> Any:
        return args, given | {"inputs_embeds": given["inputs_embeds"] * 12}

    whole.model.base_model.register_forward_pre_hook(scale, with_kwargs=True)
    with pytest.raises(ModelUnavailable, match="or scales embeddings"):
        check_parity("url", whole, told)


def test_the_model_is_compared_with_the_server_and_leaves_again(tape: Tape, caplog: pytest.LogCaptureFixture) -> None:
    residency = Residency(None, CPU)
    with caplog.at_level("INFO", logger=remote.__name__):
        open_remote(RECEIVER, tape.url, residency, lambda lm: None).close()
    assert [event for event, *_ in residency.history] == ["load", "drop"] and residency.resident() == {}
    assert [record.message for record in caplog.records if "nats" in record.message] != []


def test_a_model_without_room_is_not_compared_and_the_log_says_so(tape: Tape, caplog: pytest.LogCaptureFixture) -> None:
    remote_engine = open_remote(RECEIVER, tape.url, Residency(100_000, CPU), lambda lm: None)
    remote_engine.close()
    assert any("was not compared" in record.message for record in caplog.records)


def test_only_the_embedding_of_the_receiver_is_in_memory_and_it_embeds_as_the_whole(lm: FrozenLM) -> None:
    alone = load_embedding(lm.name, CPU, torch.float32)
    row, soft = remote.probe(lm, 0)
    batch = collate([row], side="left")
    assert torch.equal(embed(alone, batch, soft[None]), embed(lm, batch, soft[None]))
    layers = [name for name, _ in alone.model.named_parameters() if ".layers." in name or ".h." in name]
    assert layers == [] and alone.embedding_rms() == lm.embedding_rms()
    assert (alone.max_tokens, alone.end_ids, alone.fingerprint) == (lm.max_tokens, lm.end_ids, lm.fingerprint)


@pytest.mark.parametrize(
    "spelled",
    ["vllm:", "vllm:localhost:8001", "http://127.0.0.1:1", "vllm:ftp://a:1", "=vllm:http://a:1", "vllm:http://a:1,vllm:http://b:1",
     "vllm:http://u:p@a:1", "vllm:http://a:1/?x=1", "llama"],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_the_form_of_one(spelled: str) -> None:
    with pytest.raises(InvalidRequest, match="expected vllm:http://HOST:PORT"):
        Bridge.load(receiver=spelled)


def test_receivers_of_several_are_named(here: Bridge) -> None:
    spelled = "a=vllm:http://one:1, b/c=vllm:https://[::1]:2/base/"
    parsed = remote.parse_addresses(spelled)
    assert parsed == {"a": "http://one:1", "b/c": "https://[::1]:2/base"}
    assert remote.addresses_of(parsed, ["b/c", "d"]) == {"b/c": "https://[::1]:2/base"}
    with pytest.raises(
        InvalidRequest, match="the bridge has 2 receivers; expected a=vllm:http://x:1 or b=vllm:http://x:1"
    ):
        remote.addresses_of(remote.parse_addresses("vllm:http://x:1"), ["a", "b"])
    with pytest.raises(InvalidRequest, match="there is no receiver 'a' for vllm:http://one:1; there are builtin:llama"):
        Bridge.load(receiver="a=vllm:http://one:1")


def test_the_command_answers_on_a_server_and_an_evaluation_says_why_it_does_not(tape: Tape) -> None:
    address = f"vllm:{tape.url}"
    asked = ["builtin", "--text", TEXTS[0], "--prompt", PROMPTS[0], "--max-tokens", "2"]
    said = CliRunner().invoke(app, ["generate", *asked, "--receiver", address])
    assert (said.exit_code, said.output) == (0, " Mara wants\n") and completions(tape)
    with pytest.raises(InvalidRequest, match=f"{address} generates only, and an evaluation also scores given texts"):
        CliRunner().invoke(
            app, ["evaluate", "builtin", "--task", "world", "--receiver", address], catch_exceptions=False
        )


# The service.


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def client(tape: Tape) -> Iterator[TestClient]:
    """A service whose receiver is on the server."""
    served = create_app(Settings(receiver=f"vllm:{tape.url}"), {"builtin": "builtin"})
    with TestClient(served, "http://127.0.0.1", raise_server_exceptions=False) as client:
        until(lambda: client.get("/health/ready").status_code == 200)
        yield client


def body_of(*texts: str, **more: Any) -> dict[str, Any]:
    return {"inputs": [{"text": text} for text in texts], "prompt": PROMPTS[0], **more}


def test_the_service_answers_as_the_bridge_does(client: TestClient, there: Bridge) -> None:
    body = body_of(*TEXTS[:2], n=2, temperature=2.0, top_p=0.9, top_k=40, seed=7, max_tokens=6, logprobs=2)
    answer = client.post("/generate", json=body).json()
    how: dict[str, Any] = {
        name: body[name] for name in ("n", "temperature", "top_p", "top_k", "seed", "max_tokens", "logprobs")
    }
    assert [output["text"] for output in answer["outputs"]] == there.generate(TEXTS[:2], PROMPTS[0], **how).texts
    assert answer["usage"]["generated_tokens"] == sum(output["token_count"] for output in answer["outputs"])
    shown = client.get("/bridges").json()["bridges"][0]
    assert shown["engines"] == {RECEIVER: "vllm"} and RECEIVER not in shown["loaded"]


def test_the_service_streams_what_the_server_streams(client: TestClient, tape: Tape) -> None:
    tape.pause = 0.05
    whole = client.post("/generate", json=body_of(TEXTS[0], logprobs=0)).json()["outputs"][0]
    with client.stream("POST", "/generate", json=body_of(TEXTS[0], logprobs=0, stream=True)) as response:
        lines = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    pieces = [line["text"] for line in lines if "index" in line and "text" in line]
    assert "".join(pieces) == whole["text"] and len(pieces) > 3


def test_the_service_cannot_score_on_a_server(client: TestClient) -> None:
    response = client.post("/score", json={**body_of(TEXTS[0]), "choices": [" Oslo."]})
    assert response.status_code == 422 and "no log-probabilities of given texts" in response.json()["error"]["message"]


def test_models_that_are_not_here_are_neither_loaded_nor_dropped(client: TestClient) -> None:
    assert client.post("/admin/bridges/builtin/load").status_code == 200
    assert list(client.get("/bridges").json()["bridges"][0]["loaded"]) == ["builtin:neox"]
    assert client.post("/admin/bridges/builtin/unload").status_code == 200


def test_a_server_that_is_lost_is_503_and_when_it_is_back_requests_are_answered(client: TestClient, tape: Tape) -> None:
    tape.refuse = 3
    response = client.post("/generate", json=body_of(TEXTS[0], logprobs=0))
    assert (response.status_code, response.json()["error"]["type"]) == (503, "NotReady")
    assert "retry-after" in response.headers
    assert client.post("/generate", json=body_of(TEXTS[0], logprobs=0)).status_code == 200
    assert client.get("/health/live").status_code == 200


def test_the_service_becomes_ready_once_the_server_is_there(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentwire.service.inference.runtime.AGAIN_SECONDS", 0.05)
    tape.refuse = 4
    served = create_app(Settings(receiver=f"vllm:{tape.url}"), {"builtin": "builtin"})
    with TestClient(served, "http://127.0.0.1") as client:
        until(lambda: client.get("/health/ready").status_code == 200)
    assert tape.refuse == 0


def test_a_setting_that_names_no_receiver_stops_the_start() -> None:
    with pytest.raises(InvalidRequest, match="there is no receiver 'other'"):
        create_app(Settings(receiver="other=vllm:http://one:1"), {"builtin": "builtin"})
    with pytest.raises(ValueError, match="expected vllm:http://HOST:PORT"):
        Settings(receiver="http://one:1")


# The real one alone.


@pytest.mark.vllm
def test_a_server_that_is_killed_in_a_stream_ends_it_within_seconds(tmp_path: Path) -> None:
    model = tmp_path / "llama"
    shutil.copytree(folder_of(RECEIVER), model)
    lm, began = load_embedding(RECEIVER, CPU, torch.float32), threading.Event()
    with real_server(model, tmp_path / "log") as (url, group):
        remote_engine = RemoteEngine(lm, url)
        remote_engine.greet()
        ended: list[object] = []
        remote_engine.submit(
            remote.probe(lm, 0)[0][:4], SamplingParams(max_tokens=500, stop_ids=()), None, ended.append,
            lambda text, logprobs: began.set(),
        )  # fmt: skip
        assert began.wait(60)
        os.killpg(group, signal.SIGKILL)
        until(lambda: bool(ended), 30)
        remote_engine.close()
    assert isinstance(ended[0], NotReady) and "is not reached" in str(ended[0])
