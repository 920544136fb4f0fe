"""A bridge to a receiver with a chat template: one composer for training, evaluation, /generate and /v1."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoTokenizer

from latentwire.bridge.checkpoint import make_bridge, read_manifest, save_bridge
from latentwire.bridge.errors import ModelUnavailable
from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.models import FrozenLM, load_model
from latentwire.bridge.prompt import TEXT
from latentwire.service.app import create_app
from latentwire.service.settings import Settings
from latentwire.training.loop import train
from tests.conftest import bridge_config, write_model
from tests.integration.conftest import MakeConfig
from tests.integration.runs import quiet
from tests.integration.service.conftest import wait_until_ready

MARKUP = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama whose files hold a chat template."""
    folder = write_model(tmp_path_factory.mktemp("instruct") / "llama", "llama", seed=8)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = MARKUP
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, lms: dict[str, FrozenLM], instruct: str) -> Path:
    out = tmp_path_factory.mktemp("chat") / "bridge"
    torch.manual_seed(1)
    config = bridge_config(lms["neox"], load_model(instruct), chat=True, system="Be brief.")
    save_bridge(out, make_bridge(config))
    return out


@pytest.fixture(scope="module")
def client(folder: Path, checkpoint: Path) -> Iterator[TestClient]:
    app = create_app(Settings(), {"chat": str(folder), "plain": str(checkpoint)})
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        wait_until_ready(client)
        yield client


@pytest.fixture
def read(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What receivers are given to read, soft tokens as ``[]``."""
    seen: list[str] = []
    app: Any = client.app
    for engine in app.state.runtime.models.engines.all():
        submit = engine.submit

        def noted(row: Any, *rest: Any, submit: Any = submit, lm: Any = engine.lm) -> Any:
            parts = zip(row.ids, row.slots, strict=True)
            seen.append("".join("[]" if slot != TEXT else lm.tokenizer.decode([i]) for i, slot in parts))
            return submit(row, *rest)

        monkeypatch.setattr(engine, "submit", noted)
    return seen


def ask(client: TestClient, **fields: Any) -> Any:
    body = {"bridge": "chat", "inputs": [{"text": "Mara sings."}], "max_tokens": 2, **fields}
    return client.post("/generate", json=body)


def test_a_prompt_is_the_users_turn_with_the_latent_inside(client: TestClient, read: list[str]) -> None:
    assert ask(client, prompt="Who?").status_code == 200
    assert ask(client, prompt="About {latent}: who?").status_code == 200
    soft = "[]" * 3
    assert read == [
        f"<s>system: Be brief.</s><s>user:{soft}\nWho?</s><s>assistant: ",
        f"<s>system: Be brief.</s><s>user: About{soft}: who?</s><s>assistant: ",
    ]


def test_other_conditions_differ_in_nothing_but_the_latents_place(client: TestClient, read: list[str]) -> None:
    for condition in ("direct", "none"):
        assert ask(client, prompt="Who?", condition=condition).status_code == 200
    around = "<s>system: Be brief.</s><s>user: {}\nWho?</s><s>assistant: "
    assert read == [around.format("Mara sings."), around.format("")]


def test_messages_of_every_role_go_through_the_template_in_order(client: TestClient, read: list[str]) -> None:
    said = [("system", "Shout."), ("user", "Who?"), ("assistant", "Ben."), ("user", "Sure?")]
    messages = [{"role": role, "content": text} for role, text in said]
    assert ask(client, messages=messages).status_code == 200
    chat = {"model": "chat", "source": "Mara sings.", "max_tokens": 2, "messages": messages}
    assert client.post("/v1/chat/completions", json=chat).status_code == 200
    chat["messages"][0] = {"role": "developer", "content": "Shout."}
    assert client.post("/v1/chat/completions", json=chat).status_code == 200
    expected = (
        "<s>system: Shout.</s><s>user:" + "[]" * 3 + "\nWho?</s><s>assistant: Ben.</s><s>user: Sure?</s><s>assistant: "
    )
    assert read == [expected] * 3


def test_a_bridge_without_a_chat_template_gets_the_texts_line_by_line(client: TestClient, read: list[str]) -> None:
    messages = [{"role": "system", "content": "Shout."}, {"role": "user", "content": "Who?"}]
    assert ask(client, bridge="plain", messages=messages).status_code == 200
    assert read == ["<s>" + "[]" * 3 + "\nShout.\nWho?"]
    assert [bridge["chat"] for bridge in client.get("/bridges").json()["bridges"]] == [True, False]


@pytest.mark.parametrize(
    "fields, words",
    [
        ({}, "give exactly one of prompt and messages"),
        ({"prompt": "Who?", "messages": [{"role": "user", "content": "x"}]}, "give exactly one of prompt and messages"),
        ({"messages": [{"role": "assistant", "content": "Ben."}]}, "of the role assistant; expected user"),
        ({"messages": [{"role": "user", "content": "{latent}{latent}"}]}, "stands 2 times"),
        ({"messages": [{"role": "user", "content": "{latent}"}] * 2}, "stands in 2 turns"),
    ],
)  # fmt: skip
def test_a_conversation_that_cannot_be_asked_is_refused(client: TestClient, fields: dict[str, Any], words: str) -> None:
    refused = ask(client, **fields)
    assert refused.status_code == 422 and words in refused.json()["error"]["message"]


def test_a_run_keeps_the_template_and_is_measured_through_it(make: MakeConfig, instruct: str) -> None:
    config = make(receiver=instruct, template="chat", system="Be brief.", reconstruction_weight=1.0)
    train(config, quiet())
    layout = read_manifest(config.out).bridge.heads[instruct].layout
    assert layout.chat is not None and (layout.chat.template, layout.chat.system) == (MARKUP, "Be brief.")
    assert (layout.bos_id, layout.eos_id, layout.end_ids) == (None, 1, (1,))
    setting = open_context(config.out, "world", limit=1, dtype="float16", receiver=None)
    example, tokenizer = setting.examples[0], setting.receiver.tokenizer
    bridge, direct, none = (
        setting.rows([0], [reading], [None])[0] for reading in (setting.latents([0])[0], example.source, None)
    )
    start, end = "<s>system: Be brief.</s><s>user:", "</s><s>assistant: "
    for row in (bridge, direct, none):
        text = tokenizer.decode(row.text_ids)
        assert text.startswith(start) and text.endswith(end)
    assert example.source[:20] in tokenizer.decode(direct.text_ids)


def test_a_run_in_a_template_that_is_not_there_is_refused(make: MakeConfig) -> None:
    with pytest.raises(ModelUnavailable, match="has no chat template"):
        train(make(template="chat"), quiet())
    with pytest.raises(ValueError, match="--system needs --template chat"):
        make(system="Be brief.")
