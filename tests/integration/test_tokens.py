"""Examples as tokens: made once, by the composer, and the same from disk as from memory."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from latentwire.bridge.config import BridgeConfig
from latentwire.bridge.evaluation.tasks import REPEAT, Example
from latentwire.bridge.models import FrozenLM, load_model
from latentwire.bridge.prompt import IGNORE, LATENT, TEXT, compose
from latentwire.bridge.reader import tokenize_source
from latentwire.training import tokens as module
from latentwire.training.config import TrainConfig
from latentwire.training.prepare import prepare
from latentwire.training.tokens import Tokeniser, Tokens, flatten, unflatten
from tests.conftest import FAMILIES, bridge_config, write_model
from tests.integration.conftest import MakeConfig
from tests.integration.runs import prepared, quiet, said, task_of

EXAMPLES = [
    Example("Mara wants tea.", "{latent}\nQuestion: What does Mara want?\nAnswer:", " tea"),
    Example("Naïve café — 東京 🙂 and more", "Read: {latent} Where?", " 東京"),
    Example("One", "No place named.", ""),
    Example("word " * 60, "{latent}", " much more than a word or two"),
    Example("</s> is four characters.", "{latent}\n", "</s>"),
]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "answer": {},
    "reconstruction": {"reconstruction_weight": 1.0},
    "continuation": {"continuation_weight": 1.0, "mode_tokens": 2},
    "kd": {"kd_weight": 1.0},
    "all": {"reconstruction_weight": 1.0, "continuation_weight": 1.0, "kd_weight": 1.0, "mode_tokens": 3},
}
ROWS = [(f"Number {n}{' and so on' * n}.", f"\nWhich of {n}?", f" {n}") for n in range(1, 9)]


def tokeniser_of(sender: FrozenLM, receiver: FrozenLM, *, aligned: bool = True, **settings: Any) -> Tokeniser:
    """Of a bridge without a run; every objective is off unless asked for."""
    off = {"reconstruction_weight": 0.0, "ratio": 4}
    config = TrainConfig.model_validate(
        {"sender": "a", "receiver": ["b"], "task": "world", "out": "run", **off, **settings}
    )
    bridge: BridgeConfig = bridge_config(sender, receiver)
    return Tokeniser(config, bridge, REPEAT, sender.reader, receiver.reader, aligned)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tokens]:
    """What is tokenised for the disk, as it is."""
    seen: list[Tokens] = []

    def noting(tokens: Tokens) -> dict[str, Any]:
        seen.append(tokens)
        return flatten(tokens)

    monkeypatch.setattr(module, "flatten", noting)
    return seen


@pytest.mark.parametrize("objectives", list(OBJECTIVES))
@pytest.mark.parametrize("sender", list(FAMILIES))
def test_tokens_come_back_from_a_flat_record_exactly(
    lms: dict[str, FrozenLM], sender: str, lm: FrozenLM, objectives: str
) -> None:
    tokeniser = tokeniser_of(lms[sender], lm, **OBJECTIVES[objectives])
    for example in EXAMPLES:
        tokens = tokeniser(example)
        wanted = ["reconstruction", "continuation"] if objectives == "all" else []
        assert all(getattr(tokens, name) for name in wanted)
        assert unflatten(json.loads(json.dumps(flatten(tokens)))) == tokens


@pytest.mark.parametrize("bos", [True, False])
def test_tokens_of_models_with_and_without_a_first_token_come_back_exactly(tmp_path: Path, bos: bool) -> None:
    sender = load_model(str(write_model(tmp_path / "neox", "neox", bos=not bos)))
    receiver = load_model(str(write_model(tmp_path / "llama", "llama", bos=bos)))
    tokeniser = tokeniser_of(sender, receiver, **OBJECTIVES["all"])
    for example in EXAMPLES:
        tokens = tokeniser(example)
        assert (tokens.answer.ids[0] == receiver.tokenizer.bos_token_id) is bos
        assert unflatten(flatten(tokens)) == tokens


def test_rows_are_those_of_the_composer(lms: dict[str, FrozenLM], lm: FrozenLM) -> None:
    sender = lms["neox"]
    tokeniser = tokeniser_of(sender, lm, **OBJECTIVES["all"])
    layout = tokeniser.layout
    for example in EXAMPLES:
        tokens = tokeniser(example)
        source = tokenize_source(sender, example.source, sender.source_layout, max_tokens=128, truncate=True)
        K = -(-len(source.ids) // 4)
        assert tokens.source == source
        assert tokens.answer == compose(lm, layout, example.prompt, latent=K, answer=example.answer)
        assert tokens.teacher is not None and tokens.reconstruction is not None and tokens.continuation is not None
        if len(example.source) < 100:  # short enough to be repeated whole
            again = compose(lm, layout, REPEAT, latent=K + 3, answer=f" {example.source}")
            assert tokens.reconstruction == again
            asked = compose(lm, layout, example.prompt, latent=example.source)
            answered = [label for label in tokens.answer.labels if label != IGNORE]
            assert (tokens.teacher.ids, tokens.teacher.labels[len(asked) :]) == (asked.ids + answered, answered)
        assert len(tokens.teacher) <= lm.max_tokens
        assert set(tokens.teacher.slots) == {TEXT}


def test_the_two_halves_of_a_source_are_the_source(lms: dict[str, FrozenLM], lm: FrozenLM) -> None:
    sender = lms["neox"]
    tokeniser = tokeniser_of(sender, lm, continuation_weight=1.0)
    text = "Mara wants tea and Tom wants milk."
    tokens = tokeniser(Example(text, "{latent}", " x"))
    first = text[: text.find(" ", len(text) // 2)]
    assert tokens.source.ids[: tokens.half] == tokenize_source(sender, first, sender.source_layout, max_tokens=128).ids
    rest = compose(lm, tokeniser.layout, LATENT, latent=-(-tokens.half // 4), answer=text[len(first) :])
    assert tokens.continuation == rest
    one_word = tokeniser(Example("Unbreakable", "{latent}", " x"))
    assert one_word.half == len(one_word.source.ids)
    assert one_word.continuation is not None and set(one_word.continuation.labels) == {IGNORE}


def test_words_of_windows_are_kept_only_for_a_warm_start(lms: dict[str, FrozenLM], lm: FrozenLM) -> None:
    aligned, not_aligned = (tokeniser_of(lms["neox"], lm, aligned=flag)(EXAMPLES[0]) for flag in (True, False))
    assert not not_aligned.words and len(aligned.words) == len("Mara wants tea.")
    assert [window for window, _ in aligned.words] == [(place + 1) // 4 for place in range(len("Mara wants tea."))]


def read_all(config: TrainConfig) -> list[Tokens]:
    run = prepared(config)
    return [run.sample(name, i) for name in config.receivers for i in range(len(run.train))]


def test_a_data_set_is_tokenised_once_in_its_life(make: MakeConfig, tmp_path: Path, made: list[Tokens]) -> None:
    config = make(task=task_of(tmp_path, *ROWS), **OBJECTIVES["all"])
    first = read_all(config)
    assert first == made and len(made) == len(ROWS)
    del made[:]
    assert read_all(config) == first
    assert not made, "the second run only reads"
    assert read_all(config.model_copy(update={"max_steps": 9, "learning_rate": 0.5, "seed": 3})) == first
    assert not made, "what does not decide the tokens does not matter"


def rewritten(folder: Path, old: str, new: str) -> dict[str, Any]:
    """The same settings, another task file."""
    path = folder / "task.toml"
    path.write_text(path.read_text().replace(old, new))
    return {}


def without_bos(folder: Path) -> dict[str, Any]:
    """The same settings, another tokenizer under the receiver's name."""
    write_model(folder / "receiver", "llama", bos=False)
    return {}


CHANGES: dict[str, Any] = {
    "template": lambda folder: rewritten(folder, "{latent}{q}", "{latent} {q}"),
    "answer": lambda folder: rewritten(folder, '"{a}"', '"{a}."'),
    "tokenizer": without_bos,
    "limit": lambda _: {"max_source_tokens": 32},
    "ratio": lambda _: {"ratio": 4},
    "reconstruction": lambda _: {"reconstruction_weight": 1.0},
    "continuation": lambda _: {"continuation_weight": 1.0},
    "mode tokens": lambda _: {"reconstruction_weight": 1.0, "mode_tokens": 2},
    "kd": lambda _: {"kd_weight": 1.0},
    "alignment": lambda _: {"alignment_steps": 0},
    "subset": lambda _: {"max_examples": 6},
}


def test_whatever_decides_the_tokens_makes_them_anew(make: MakeConfig, tmp_path: Path, made: list[Tokens]) -> None:
    receiver = write_model(tmp_path / "receiver", "llama")
    config = make(task=task_of(tmp_path, *ROWS), receiver=str(receiver))
    seen: list[list[Tokens]] = [read_all(config)]
    for name, change in CHANGES.items():
        del made[:]
        config = config.model_copy(update=change(tmp_path))
        found = read_all(config)
        assert len(made) == len(found) in (6, len(ROWS)), f"another {name} is another entry"
        assert found not in seen, name
        seen.append(found)


def test_two_receivers_have_an_entry_each(
    make: MakeConfig, model_folders: dict[str, Path], tmp_path: Path, made: list[Tokens]
) -> None:
    receivers = [str(model_folders["llama"]), str(model_folders["gpt2"])]
    found = read_all(make(task=task_of(tmp_path, *ROWS), receiver=receivers))
    assert len(made) == len(found) == 2 * len(ROWS) and found == made


@pytest.mark.parametrize("limit, cut", [(20, 7), (48, 5), (200, 0)])
def test_the_number_of_sources_that_are_cut_is_said(make: MakeConfig, tmp_path: Path, limit: int, cut: int) -> None:
    console = quiet()
    run = prepare(make(task=task_of(tmp_path, *ROWS), max_source_tokens=limit), console)
    lengths = [1 + len(source) for source, *_ in ROWS]  # a byte is a token, and BOS is one
    assert sum(length > limit for length in lengths) == cut
    line = f"{cut} of all {len(ROWS)} sources exceed --max-source-tokens"
    assert (line in said(console)) is bool(cut) and ("exceed" in said(console)) is bool(cut)
    kept: Sequence[int] = [len(run.sample(run.config.receiver[0], i).source.ids) for i in range(len(ROWS))]
    assert list(kept) == [min(length, limit) for length in lengths]


def test_of_a_generated_task_the_first_examples_stand_for_all(make: MakeConfig) -> None:
    console = quiet()
    config = make(max_source_tokens=60)
    run = prepare(config, console)
    cut = sum(1 + len(run.train[i].source) > 60 for i in range(20))
    assert cut and f"{cut} of the first 20 sources exceed" in said(console)
