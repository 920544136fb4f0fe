"""A run's settings: one list of keys for the file and the flags, and a sentence for every wrong one."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from latentwire.bridge.errors import InvalidRequest
from latentwire.training.config import TrainConfig, demo_config, read_config

KEYS = {"sender": "a", "receiver": "b", "task": "world", "out": "c"}


def written(folder: Path, **more: Any) -> Path:
    """A file of settings."""
    file = folder / "run.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in {**KEYS, **more}.items()))
    return file


def test_a_file_and_flags_mean_the_same(tmp_path: Path) -> None:
    more = {"layer": [1, 2], "seed": 7, "receiver": ["b", "d"], "kd_weight": 0.5, "memory_budget": "24GB"}
    config = TrainConfig.model_validate({**KEYS, **more})
    assert config.memory_budget == 24 * 10**9
    file = written(tmp_path, **more)
    assert read_config(file, {}) == read_config(None, config.model_dump()) == config
    assert read_config(file, {"seed": 9, "depth": None}) == config.model_copy(update={"seed": 9})


def test_every_key_is_a_flag_and_every_flag_a_key() -> None:
    from latentwire.service.__main__ import train as command

    flags = {name.rstrip("_") for name in inspect.signature(command).parameters}
    assert flags - {"config", "resume", "overwrite", "find_lr", "debug", "log_level"} == set(TrainConfig.model_fields)


@pytest.mark.parametrize(
    "line, words",
    [
        ("lerning_rate = 1.0", "lerning_rate"),
        ("learning_rate = -1.0", "learning_rate.*-1.0"),
        ('encoder = "vq"', "encoder.*'vq'"),
        ("max_steps = 1.5", "max_steps.*1.5"),
        ("batch_size = 0", "batch_size.*0"),
        ("latent_dim = 17000", "latent_dim.*17000"),
        ("num_latents = 70000", "num_latents.*70000"),
        (f"seed = {2**70}", f"seed.*{2**70}"),
        ("kd_weight = -0.1", "kd_weight.*-0.1"),
        ("first_k = 0", "first_k.*0"),
        ("keep_last = 0", "keep_last.*0"),
        ('metric = "bleu"', "metric.*'bleu'"),
        ('precision = "int4"', "precision.*'int4'"),
        ('log_with = ["mlflow"]', "log_with.0.*'mlflow'"),
        ('memory_budget = "plenty"', "memory_budget.*'plenty'"),
        ("x = ", "run.toml"),
    ],
)
def test_a_wrong_key_is_named_with_its_value(tmp_path: Path, line: str, words: str) -> None:
    file = written(tmp_path)
    file.write_text(f"{file.read_text()}{line}\n")
    with pytest.raises(InvalidRequest, match=words) as caught:
        read_config(file, {})
    assert "\n" not in str(caught.value) or line == "x = "


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"answer_weight": 0}, "one of answer_weight, first_k_weight and kd_weight must be above 0"),
        ({"batch_size": 1, "margin_weight": 1}, "batch_size must be 2 or more"),
        ({"batch_size": 1, "diversity_weight": 1}, "batch_size must be 2 or more"),
        ({"receiver": ["b", "b"]}, r"receivers must differ, got \['b', 'b'\]"),
        ({"bridge": "x"}, "--bridge needs --add-receiver"),
        ({"add_receiver": "d"}, "--add-receiver needs --bridge"),
        ({"add_receiver": "d", "bridge": "x"}, "neither --sender nor --receiver"),
    ],
)
def test_settings_that_contradict_one_another_are_refused_in_one_sentence(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        read_config(None, {**KEYS, **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weight", ["answer_weight", "first_k_weight", "kd_weight"])
def test_each_objective_of_the_answer_may_be_the_only_one(weight: str) -> None:
    config = read_config(None, {**KEYS, "answer_weight": 0, weight: 1})
    assert getattr(config, weight) == 1


@pytest.mark.parametrize("key, one, several", [("layer", 2, [2]), ("receiver", "b", ["b"])])
def test_one_value_needs_no_list(tmp_path: Path, key: str, one: object, several: object) -> None:
    assert getattr(read_config(written(tmp_path, **{key: one}), {}), key) == several


def test_one_tracker_needs_no_list(tmp_path: Path) -> None:
    assert read_config(written(tmp_path, log_with="tensorboard"), {}).log_with == ["tensorboard"]


def test_a_missing_key_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="task: Field required"):
        read_config(None, {key: KEYS[key] for key in ("sender", "receiver", "out")})
    for missing in ("sender", "receiver"):
        with pytest.raises(InvalidRequest, match="sender and receiver are needed"):
            read_config(None, {key: value for key, value in KEYS.items() if key != missing})
    with pytest.raises(InvalidRequest, match=r"gone\.toml"):
        read_config(tmp_path / "gone.toml", {})


def test_local_paths_no_longer_depend_on_where_the_command_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    names = {"sender": "random:model", "receiver": ["model", "org/name", "builtin:llama"]}
    config = TrainConfig.model_validate({**KEYS, **names})
    assert config.sender == f"random:{tmp_path / 'model'}"
    assert config.receiver == [str(tmp_path / "model"), "org/name", "builtin:llama"] and config.task == "world"


def test_the_demo_is_a_run_like_any_other(tmp_path: Path) -> None:
    config = demo_config(tmp_path, 10)
    assert (config.max_steps, config.alignment_steps, config.receivers) == (10, 4, ["builtin:llama"])
    assert read_config(None, config.model_dump()) == config
