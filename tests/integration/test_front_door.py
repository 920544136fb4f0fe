"""``import latentwire``: every public name, and the examples in its docstring."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latentwire
from latentwire.bridge.errors import InvalidRequest, UnknownBridge
from latentwire.service.cli.demo import running
from tests.ports import free_port

PROMPT = "Question: What does Mara want?\nAnswer:"
NAMES = [name for name in latentwire.__all__ if name != "__version__"]


@pytest.fixture(scope="module")
def bridge() -> latentwire.Bridge:
    return latentwire.Bridge.load("builtin")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A service of the built-in bridge, which examples call ``client``."""
    port = free_port()
    with running("builtin", port, tmp_path_factory.mktemp("service") / "log"):
        yield f"http://127.0.0.1:{port}"


def test_all_is_sorted_and_every_name_in_it_is_there() -> None:
    assert latentwire.__all__ == sorted(latentwire.__all__) == dir(latentwire)
    for name in NAMES:
        value = getattr(latentwire, name)
        assert value.__name__ == name and value.__doc__
    with pytest.raises(AttributeError, match="no attribute 'Brigde'"):
        _ = latentwire.Brigde  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [None, "Client", "AsyncClient", "Latent", "ServiceError", "LatentWireError"])
def test_what_a_client_needs_is_imported_without_torch(name: str | None) -> None:
    code = f"import sys, latentwire; {f'latentwire.{name}; ' if name else ''}print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_one_encoding_is_asked_many_times(bridge: latentwire.Bridge) -> None:
    latents = bridge.encode(["Mara wants a cup of tea.", "Ben lives in Rome."])
    assert [latent.array.shape for latent in latents] == [latent.shape for latent in latents]
    prompts = [PROMPT, "Question: Where does Ben live?\nAnswer:"]
    answers = bridge.generate(latents, prompts)
    assert answers.texts == [" Mara wants a cup of tea.", " Ben lives in Rome."]
    assert answers.usage.soft_tokens == sum(latent.shape[0] for latent in latents) and answers.usage.source_tokens == 0
    assert bridge.generate([latent.data for latent in latents], prompts).texts == answers.texts


SOURCES = ["Mara wants a cup of tea.", "Ben lives in Rome.", "Mara lives in Oslo."]
ASKED = "{latents}\nQuestion: Where does Ben live?\nAnswer:"


def test_several_sources_are_asked_in_one_prompt(bridge: latentwire.Bridge) -> None:
    latents = bridge.encode(SOURCES)
    answers = bridge.generate([latents, [SOURCES[0], latents[1]], SOURCES[1]], ASKED, max_tokens=8)
    slots = [len(latent.array) for latent in latents]
    assert answers.usage.soft_tokens == sum(slots) + slots[0] + 2 * slots[1]
    apart = [bridge.generate([one], ASKED, max_tokens=8).texts[0] for one in (latents, SOURCES[:2], SOURCES[1])]
    assert answers.texts == apart
    spelt = "[1] {latent}\n[2] {latent}\nQuestion: Where does Ben live?\nAnswer:"
    assert bridge.generate([latents[:2]], spelt, max_tokens=8).texts == apart[1:2]
    turned = [latents[::-1], latents[1:]]
    scored = bridge.score([latents, *turned], ASKED, [" Ben lives in Rome.", " Ben sings."])
    assert len({one[0].logprob for one in scored}) == 3
    one = bridge.generate([[latents[1]]], "{latent}\nQuestion: Where does Ben live?\nAnswer:").texts
    assert one == bridge.generate(latents[1], "Question: Where does Ben live?\nAnswer:").texts


def test_sampling_is_told_by_its_seed_and_its_samples_differ(bridge: latentwire.Bridge) -> None:
    hot: dict[str, Any] = {"temperature": 5.0, "n": 3, "max_tokens": 6}
    first = bridge.generate("Mara sings.", "Who?", seed=1, **hot)
    assert first.texts == bridge.generate("Mara sings.", "Who?", seed=1, **hot).texts
    assert first.diversity is not None and first.diversity.distinct_ratio == len(set(first.texts)) / 3 > 1 / 3
    assert bridge.generate("Mara sings.", "Who?", **hot).texts != bridge.generate("Mara sings.", "Who?", **hot).texts


def test_models_come_when_they_are_needed_and_leave_when_told() -> None:
    bridge = latentwire.Bridge.load("builtin")
    assert bridge.residency.resident() == {}
    latents = bridge.encode("Mara sings.")
    assert list(bridge.residency.resident()) == [bridge.sender]
    bridge.generate(latents, "Who?", max_tokens=1)
    assert set(bridge.residency.resident()) == {bridge.sender, *bridge.receivers}
    assert bridge.unload() > 0 and bridge.residency.resident() == {}


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"max_tokens": 0}, "max_tokens is 0; expected greater than or equal to 1"),
        ({"max_tokens": 600}, "max_tokens is 600; 'builtin:llama' reads 512 receiver tokens in all"),
        ({"temperature": -1.0}, "temperature is -1.0; expected greater than or equal to 0"),
        ({"top_p": 0.0}, "top_p is 0.0; expected greater than 0"),
        ({"top_k": -1}, "top_k is -1; expected greater than or equal to 0"),
        ({"seed": -1}, "seed is -1; expected greater than or equal to 0"),
        ({"n": 0}, "n is 0; expected greater than or equal to 1"),
        ({"n": 10**6}, "n is 1000000; expected less than or equal to 1024"),
        ({"logprobs": -1}, "logprobs is -1; expected greater than or equal to 0"),
        ({"stop": ""}, "stop.0 is ''; String should have at least 1 character"),
        ({"prompt": []}, "0 prompts for 1 inputs"),
        ({"prompt": ["a", {"role": "user", "content": "b"}]}, "a message is 'a'; expected its role"),
        ({"prompt": ["a", "b"]}, "2 prompts for 1 inputs; give one, or one for each"),
        (
            {"prompt": [{"role": "nobody", "content": "a"}]},
            r"expected its role \(system, user, assistant\)",
        ),
        ({"prompt": "a " * 3000}, "takes 3005 receiver tokens; 480 fit"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(
    bridge: latentwire.Bridge, arguments: dict[str, Any], named: str
) -> None:
    given = {"inputs": "Mara sings.", "prompt": "Who?", **arguments}
    with pytest.raises(InvalidRequest, match=named) as caught:
        bridge.generate(**given)
    assert str(caught.value.param).split(".")[0] in arguments and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"limit": 0}, "limit is 0; expected 1 or more"),
        ({"conditions": []}, "conditions is .*; expected a list out of bridge, direct"),
        ({"conditions": "bridge"}, "conditions is 'bridge'; expected a list out of bridge, direct"),
        ({"conditions": ["mismatched"], "limit": 1}, "no 'mismatched': the examples have one source alone"),
        ({"task": "nope.toml"}, "there is no such file"),
    ],
)
def test_an_evaluation_that_cannot_be_made_says_why(
    bridge: latentwire.Bridge, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidRequest, match=named):
        latentwire.evaluate(bridge, **arguments)


AN_INPUT = "expected a text, a message in bytes or a Latent"
WRONG_TYPES = {
    "bridge.generate('a', 'Who?', max_tokens='5')": "max_tokens is '5'; expected a valid integer",
    "bridge.generate('a', 'Who?', stop=[5])": "stop.0 is 5; expected a valid string",
    "bridge.generate({'text': 'a'}, 'Who?')": f"one input is of type dict; {AN_INPUT}",
    "bridge.generate([5], 'Who?')": f"one input is of type int; {AN_INPUT}",
    "bridge.generate([['a', 5]], 'Who?')": f"one source is of type int; {AN_INPUT}",
    "bridge.generate([[]], 'Who?')": f"one source is of type NoneType; {AN_INPUT}",
    "bridge.generate([['a', 'b']], 'Who {latent}?')": (
        "the prompt has {latent} 1 times and {latents} 0 times; for 2 sources expected {latent} as often, or {latents} "
        "once, in one text"
    ),
    "bridge.generate([['a'] * 300], 'Who?')": (
        "the input with 300 sources takes 1997 receiver tokens; 480 fit beside what is to be generated"
    ),
    "bridge.generate('a', None)": "one prompt is of type NoneType; expected a text, one for each input, or messages",
    "bridge.read([['a']])": f"one input is of type list; {AN_INPUT}",
    "bridge.read('a', against=5)": "one original is of type int; expected a text for each input",
    "bridge.encode([b'a'])": "one text is of type bytes; expected a text, or several",
    "latentwire.evaluate(bridge, limit='a')": "limit is 'a'; expected 1 or more",
}


def test_a_value_of_another_type_is_named_in_one_sentence() -> None:
    """In a process without the types' own checks, which this suite runs under."""
    code = (
        "import latentwire\nbridge = latentwire.Bridge.load()\n"
        f"for call in {list(WRONG_TYPES)}:\n"
        "    try: eval(call)\n"
        "    except latentwire.LatentWireError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == list(WRONG_TYPES.values()), done.stderr


def test_a_message_may_come_as_any_bytes_and_a_checkpoint_by_its_name(bridge: latentwire.Bridge) -> None:
    (latent,) = bridge.encode("Ben lives in Rome.")
    prompt = "Question: Where does Ben live?\nAnswer:"
    for message in (latent.data, bytearray(latent.data), memoryview(latent.data)):
        assert bridge.generate(message, prompt).texts == [" Ben lives in Rome."]
    report = latentwire.evaluate("builtin", limit=1, conditions=["bridge"])
    assert repr(report) == "Report(builtin on world: bridge)"


def test_an_encoder_kind_has_one_class() -> None:
    from latentwire.bridge.encoder import KINDS, Encoder

    with pytest.raises(ValueError, match=r"kind 'pooling' is taken by latentwire\.bridge\.encoder\.Pooling"):
        type("Mine", (Encoder,), {"kind": "pooling"})
    assert KINDS["pooling"].__name__ == "Pooling"


def test_what_cannot_be_asked_is_refused_before_the_sender_reads() -> None:
    bridge = latentwire.Bridge.load("builtin")
    with pytest.raises(InvalidRequest, match="2 prompts for 1 inputs"):
        bridge.generate("Mara sings.", ["a", "b"])
    assert bridge.residency.resident() == {}


def test_what_is_not_there_is_named(bridge: latentwire.Bridge, tmp_path: Path) -> None:
    with pytest.raises(UnknownBridge, match="no head for receiver 'nobody'; it has builtin:llama"):
        bridge.generate("Mara sings.", "Who?", receiver="nobody")
    with pytest.raises(UnknownBridge, match=r"no checkpoint at .*expected a folder"):
        latentwire.Bridge.load(tmp_path)
    with pytest.raises(InvalidRequest, match="no condition is called 'brigde'; there are bridge, direct"):
        latentwire.evaluate(bridge, conditions=["brigde"])
    with pytest.raises(InvalidRequest, match="stepz"):
        latentwire.train(sender="builtin:neox", receiver="builtin:llama", task="world", out=tmp_path, stepz=1)


def test_a_report_has_its_numbers_and_is_saved_as_a_page_or_as_json(bridge: latentwire.Bridge, tmp_path: Path) -> None:
    told: list[int] = []
    report = latentwire.evaluate(
        bridge, task="world", limit=6, conditions=["bridge", "none"], on_progress=lambda _, done, __: told.append(done)
    )
    assert list(report.conditions) == ["bridge", "none"] and told
    result = report.conditions["bridge"]
    assert result.metric == "em" and result.low is not None and result.high is not None
    assert 0 <= result.low <= result.value <= result.high <= 1
    report.save(tmp_path / "r.html")
    report.save(tmp_path / "deeper" / "r.json")
    assert f"{result.value:.3f}" in (tmp_path / "r.html").read_text()
    assert '"conditions"' in (tmp_path / "deeper" / "r.json").read_text()
    assert "exact match" in (tmp_path / "r.html").read_text() and f"{result.value:.3f}" in str(report)
    with pytest.raises(InvalidRequest, match="File exists"):
        report.save(tmp_path / "r.html" / "below")


def test_an_evaluation_measures_what_the_command_measures(bridge: latentwire.Bridge) -> None:
    from latentwire.bridge.evaluation.context import open_context
    from latentwire.bridge.evaluation.measure import measure

    ask: dict[str, Any] = {"limit": 8, "receiver": None, "dtype": "float16"}
    there = measure(open_context("builtin", "world", **ask), keep_examples=True)
    here = latentwire.evaluate(bridge, "world", limit=8).document

    def untimed(report: Any) -> Any:
        rows = {name: {**row, "ttft_ms": 0} for name, row in report["conditions"].items()}
        return {**report, "conditions": rows, "about": {**report["about"], "command": None}}

    assert here["about"]["command"] == "latentwire evaluate builtin --task world --limit 8 --dtype float16"
    assert untimed(here) == untimed(there)


def test_a_bridge_is_trained_and_used(tmp_path: Path) -> None:
    run = latentwire.train(
        sender="builtin:neox", receiver="builtin:llama", task="world", out=tmp_path / "run", max_steps=2, batch_size=2,
        quiet=True,
    )  # fmt: skip
    assert run.manifest.bridge.provenance.steps == 2
    bridge = run.bridge()
    assert bridge.manifest == run.manifest and bridge.generate("Mara sings.", "Who?", max_tokens=2).texts
    assert np.isfinite(bridge.encode("Mara sings.")[0].array).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_a_public_name_run(name: str, tmp_path: Path, service: str) -> None:
    value = getattr(latentwire, name)
    module = importlib.import_module(value.__module__)
    given = {"latentwire": latentwire, "url": service, "out": tmp_path / "run"}
    tests = doctest.DocTestFinder().find(value, name, module, extraglobs=given)
    examples = [example for test in tests for example in test.examples]
    assert examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for test in tests:
        runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)


def test_a_continuation_is_scored_as_it_is_said(bridge: latentwire.Bridge) -> None:
    latents = bridge.encode(["Mara wants a cup of tea.", "Mara wants a new lamp."])
    said = bridge.generate(latents, PROMPT, logprobs=0)
    scored = bridge.score(latents, PROMPT, said.texts, logprobs=True)
    assert [score.best for score in scored.scores] == [0, 1] and scored.usage.soft_tokens == said.usage.soft_tokens
    for number, output in enumerate(said.outputs):
        choice = scored[number][number]
        assert output.logprobs is not None and choice.logprobs is not None
        *tokens, ended = choice.logprobs
        assert [token.token for token in tokens] == [token.token for token in output.logprobs]
        near = pytest.approx([token.logprob for token in output.logprobs], abs=1e-3)
        assert [token.logprob for token in tokens] == near
        assert choice.token_count == output.token_count and ended.token in ("</s>", "<eos>", "<|endoftext|>")
        assert sum(one.probability for one in scored[number].choices) == pytest.approx(1)
        begun = bridge.score(latents[number], PROMPT, said.texts[number], end=False)[0][0]
        assert begun.logprob == pytest.approx(choice.logprob - ended.logprob, abs=1e-3) and begun.logprobs is None


@pytest.mark.parametrize(
    "choices, named",
    [
        ([], "a choice is empty; expected one text or several"),
        (["a", ""], "a choice is empty; expected one text or several"),
        (" a" * 3000, "takes 3[0-9]* receiver tokens; 512 fit"),
    ],
)
def test_choices_that_cannot_be_scored_are_named(bridge: latentwire.Bridge, choices: Any, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named) as caught:
        bridge.score("Mara sings.", "Who?", choices)
    assert "\n" not in str(caught.value)
