"""Where models compute: what was asked for or nothing, and never silently on something slower."""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire.bridge import devices
from latentwire.bridge.devices import (
    DTYPES,
    cores,
    default_device,
    default_dtype,
    device_named,
    dtype_named,
    has_nvidia,
    in_background,
    multiply_float32,
    use_threads,
)
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.models import FrozenLM
from latentwire.service.__main__ import main
from latentwire.service.inference.models import residencies
from latentwire.service.inference.runtime import Runtime
from latentwire.service.processes import supervisor
from latentwire.service.settings import Settings
from latentwire.training.config import TrainConfig
from latentwire.training.controls import control_config

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing remembered about this machine, before and after."""
    for known in (default_device, default_dtype):
        known.cache_clear()
    yield
    for known in (default_device, default_dtype):
        known.cache_clear()


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an NVIDIA driver, a build of torch for it, and no GPU that torch would take."""
    path = tmp_path / "version"
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  418.67")
    monkeypatch.setattr(devices, "NVIDIA", path)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return path


def too_old() -> None:
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 10010).\nPlease update it.")


def refusal(name: str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        device_named(name)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_there_is_taken_under_its_name() -> None:
    assert device_named("cpu") == device_named(None) == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_that_is_not_there_is_refused_and_the_cpu_is_not_taken_for_it() -> None:
    assert "without CUDA" in refusal("cuda") or "driver" in refusal("cuda")


def test_each_reason_why_there_is_no_cuda_is_named(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "init", too_old)
    assert "driver on your system is too old (found version 10010)" in refusal("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "CUDA_VISIBLE_DEVICES is '-1'" in refusal("cuda:0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is ''" in refusal("cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    driver.unlink()
    monkeypatch.setenv("PATH", "")
    assert "no NVIDIA driver is loaded" in refusal("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build without CUDA" in refusal("cuda")


def test_a_gpu_beyond_those_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "torch finds 1 GPU here, counted from cuda:0" in refusal("cuda:7")
    assert device_named("cuda:0") == torch.device("cuda:0") and device_named("cuda") == CUDA


def test_another_accelerator_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert "torch finds no accelerator here" in refusal("mps")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: CUDA)
    assert "torch finds 'cuda' here" in refusal("xpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", "meta", ""])
def test_a_word_that_names_no_device_is_refused_wherever_one_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "expected cpu, cuda, cuda:1, mps or xpu" in refusal(name)
    with pytest.raises(ValueError, match="device"):
        TrainConfig(sender="a", receiver=["b"], task="world", out=tmp_path, device=name)
    monkeypatch.setenv("LW_DEVICE", name)
    with pytest.raises(ValueError, match="device"):
        Settings()


def test_the_same_words_name_a_precision_everywhere(tmp_path: Path) -> None:
    for word in DTYPES:
        config = TrainConfig.model_validate(
            {"sender": "a", "receiver": "b", "task": "world", "out": tmp_path, "precision": word}
        )
        assert config.precision == Settings.model_validate({"dtype": word}).dtype == word
        assert dtype_named(word, CUDA) == DTYPES[word]
    for refused in (lambda: Settings.model_validate({"dtype": "float16"}), lambda: dtype_named("float16", CPU)):
        with pytest.raises((ValueError, InvalidRequest), match="bf16"):
            refused()


def test_a_machine_with_a_driver_that_torch_cannot_use_says_so_once(
    driver: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "init", too_old)
    with caplog.at_level(logging.WARNING):
        assert [device_named(None), default_device()] == [CPU, CPU]
    (record,) = caplog.records
    assert "NVIDIA GPU, but The NVIDIA driver on your system is too old" in record.getMessage()
    assert "computing on the CPU" in record.getMessage() and "\n" not in record.getMessage()


def test_a_machine_without_a_driver_and_one_told_to_use_its_cpu_say_nothing(
    driver: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        device_named("cpu")
        driver.unlink()
        monkeypatch.setenv("PATH", "")
        assert not has_nvidia() and device_named(None) == CPU
    assert not caplog.records


@pytest.mark.parametrize(
    ("native", "capability", "dtype", "said"),
    [
        (True, (8, 0), torch.bfloat16, ""),
        (False, (7, 5), torch.float16, "T4 only emulates bfloat16: computing in fp16"),
        (False, (6, 1), torch.float32, "T4 only emulates bfloat16: computing in fp32"),
    ],
)
def test_a_card_that_emulates_bfloat16_computes_in_something_else_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, native: bool, capability: tuple[int, int],
    dtype: torch.dtype, said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with caplog.at_level(logging.WARNING):
        assert [default_dtype(CUDA), dtype_named(None, CUDA)] == [dtype] * 2
    assert [said in record.getMessage() for record in caplog.records] == ([True] if said else [])


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_on_a_cpu_without_it_says_that_it_is_slow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has: bool
) -> None:
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": has, "amx_bf16": False}
    )
    with caplog.at_level(logging.WARNING):
        assert dtype_named("bf16", CPU) == torch.bfloat16
        assert dtype_named("fp32", CPU) == dtype_named(None, CPU) == torch.float32
    assert ["about five times slower than fp32" in record.getMessage() for record in caplog.records] == [True] * (
        not has
    )


def test_a_service_computes_where_and_in_what_it_is_told(checkpoint: Path) -> None:
    runtime = Runtime(Settings(device="cpu", dtype="bf16"), {"tiny": str(checkpoint)})
    assert (runtime.residency.device, runtime.residency.dtype) == (CPU, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_service_that_does_not_get_the_gpu_it_was_told_to_use_does_not_start(checkpoint: Path) -> None:
    with pytest.raises(InvalidRequest, match="device 'cuda' was asked for, but"):
        Runtime(Settings(device="cuda"), {"tiny": str(checkpoint)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize(
    "command",
    [
        ["train", "--sender", "builtin:neox", "--receiver", "builtin:llama", "--task", "world", "--device", "cuda"],
        ["evaluate", "builtin", "--task", "world", "--device", "cuda"],
        ["serve"],
    ],
    ids=lambda command: str(command[0]),
)
def test_a_command_that_does_not_get_its_gpu_ends_in_one_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LW_DEVICE", "cuda")  # serve has no flag
    monkeypatch.setenv("LW_FRONTENDS", "0")  # nothing is to fork in here
    out = ["--out", str(tmp_path / "run")] if command[0] == "train" else []
    monkeypatch.setattr("sys.argv", ["latentwire", *command, *out])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "device 'cuda' was asked for, but" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_evaluation_computes_in_what_it_is_told(tmp_path: Path) -> None:
    where: dict[str, Any] = {"limit": 1, "dtype": "float16", "receiver": None}
    setting = open_context("builtin", "world", device="cpu", precision="bf16", **where)
    for lm in (setting.sender, setting.receiver):
        assert isinstance(lm, FrozenLM) and (lm.model.dtype, lm.device) == (torch.bfloat16, CPU)
    assert control_config("random_sender", setting, tmp_path).device == "cpu"
    for word in ({"device": "gpu"}, {"precision": "half"}):
        with pytest.raises(InvalidRequest, match="expected"):
            open_context("builtin", "world", **word, **where)  # type: ignore[arg-type]


def test_each_half_has_the_device_it_is_given_and_a_budget_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentwire.service.inference.models.device_named", lambda name: torch.device(name or "cuda"))
    told = {"memory_budget": "24GB", "dtype": "bf16"}

    def devices(**said: str) -> tuple[bool, list[str]]:
        senders, receivers = residencies(Settings(**told, **said))
        assert (senders.budget_bytes, receivers.budget_bytes) == (24 * 10**9,) * 2
        return senders is receivers, [str(senders.device), str(receivers.device)]

    assert devices() == (True, ["cuda", "cuda"])
    assert devices(device="cuda:1") == (True, ["cuda:1", "cuda:1"])
    assert devices(sender_device="cuda:0") == (True, ["cuda", "cuda"])
    assert devices(sender_device="cuda:0", receiver_device="cuda:1") == (False, ["cuda:0", "cuda:1"])
    assert devices(device="cuda:1", sender_device="cpu") == (False, ["cpu", "cuda:1"])
    assert devices(device="cuda:1", receiver_device="cuda:2") == (False, ["cuda:1", "cuda:2"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("half", ["sender_device", "receiver_device"])
def test_a_half_whose_device_is_not_there_stops_the_start(checkpoint: Path, half: str) -> None:
    with pytest.raises(InvalidRequest, match="device 'cuda:1' was asked for, but"):
        Runtime(Settings(device="cpu", **{half: "cuda:1"}), {"tiny": str(checkpoint)})


def test_float32_is_multiplied_in_tf32_on_cuda_alone_and_not_where_it_is_refused() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        found = []
        for device, tf32 in (("cpu", True), ("cuda", True), ("cpu", True), ("cuda:1", False)):
            multiply_float32(torch.device(device), tf32=tf32)
            found.append(torch.get_float32_matmul_precision())
        assert [before, *found] == ["highest", "highest", "high", "high", "highest"]
    finally:
        torch.set_float32_matmul_precision(before)


class Stream:
    """Of a device that is not there: what waits for what is written down."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_work_in_the_background_waits_for_what_was_asked_before_and_what_comes_after_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    monkeypatch.setattr(devices, "_background", lambda device: Stream("background", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current", log))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(log.append(f"on {stream.name}")))
    with in_background(CPU):
        log.append("work on a CPU")
    with in_background(CUDA):
        log.append("work")
    before, after = "background waits for current", "current waits for background"
    assert log == ["work on a CPU", before, "on background", "work", after]


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["max 100000"], 8), (["350000 100000"], 3), (["50000 100000"], 1), (["1600000 100000"], 8),
        (["-1", "100000"], 8), (["200000", "100000"], 2), ([], 8),
    ],
)  # fmt: skip
def test_cores_are_those_a_container_may_keep_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], wanted: int
) -> None:
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: range(8))
    paths = [tmp_path / f"{i}" for i in range(2)]
    monkeypatch.setattr(devices, "QUOTAS", (paths[:1], paths))
    for path, text in zip(paths, files, strict=False):
        path.write_text(f"{text}\n")
    assert cores() == wanted


@pytest.mark.parametrize(
    ("told", "there", "usual", "wanted"),
    [(None, 1, 1, 1), (None, 2, 2, 1), (None, 16, 16, 15), (None, 32, 16, 16), (3, 2, 2, 3)],
    ids=["one core", "two", "sixteen", "two threads a core", "told"],
)
def test_models_leave_a_core_to_http_unless_told(
    monkeypatch: pytest.MonkeyPatch, told: int | None, there: int, usual: int, wanted: int
) -> None:
    used: list[int] = []
    monkeypatch.setattr(devices, "cores", lambda: there)
    monkeypatch.setattr(torch, "get_num_threads", lambda: usual)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.delenv("OMP_NUM_THREADS")
    use_threads(told)
    assert used == [wanted]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    use_threads(told)
    assert used == [wanted] * (1 if told is None else 2)


@pytest.mark.parametrize("frontends", ["0", "1"])
def test_the_threads_of_a_service_are_set_in_the_process_that_holds_its_models(
    monkeypatch: pytest.MonkeyPatch, frontends: str
) -> None:
    used: list[int] = []

    class Supervisor:
        """Says that this process is the one that holds the models."""

        def __init__(self, frontends: int, drain_seconds: float, close: object) -> None:
            assert frontends == 1

        def run(self) -> str:
            used.append(0)
            return "models"

    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(supervisor, "Supervisor", Supervisor)
    monkeypatch.setattr("sys.argv", ["latentwire", "serve", "--port", "0", "--bridge", "a=nowhere"])
    for name, value in {"THREADS": "7", "FRONTENDS": frontends}.items():
        monkeypatch.setenv(f"LW_{name}", value)
    with pytest.raises(SystemExit):
        main()
    assert used == ([0] if frontends == "1" else []) + [7]
