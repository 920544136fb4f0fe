"""Two processes train what one would: started with torchrun, checked against a run of one process here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentwire.bridge.checkpoint import load_bridge
from latentwire.bridge.errors import InvalidRequest
from latentwire.training import loop
from latentwire.training.config import TrainConfig
from latentwire.training.machine import Ranks, join_ranks
from latentwire.training.run import Run
from latentwire.training.step import take_step
from tests.conftest import write_model
from tests.integration.runs import ROOT, log_of, quiet, states_of, task_of

STEPS = 5
ROWS = [(f"Number {n}{' and so on' * (n % 4)}.", f"\nWhich of {n}?", f" {n}") for n in range(1, 41)]
SCRIPT = '''
"""One of two processes: every run of the test, and what this process saw of it."""

import io
import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed
from rich.console import Console

from latentwire.training import loop
from latentwire.training.config import TrainConfig
from latentwire.training.machine import Ranks

FOLDER, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
BASE = json.loads((FOLDER / "config.json").read_text())
take_step, told = loop.take_step, {}
Ranks.leave = lambda self: None  # several runs, one after the other, in the same processes


class Stopped(Exception):
    pass


def run(name, *, fatal=None, asked=None, resume=False, **changes):
    seen = {"rows": [], "norms": [], "losses": [], "ended": "done"}

    def step(run, number, rows, *, waited):
        if number == fatal:
            raise Stopped
        if number == asked and RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        record = take_step(run, number, rows, waited=waited)
        seen["rows"].append([row.source.ids for row in rows])
        seen["norms"].append(record.gradient_norm)
        seen["losses"].append(record.loss)
        with run.residency.use(record.receiver) as lm:
            held = list(lm.model.parameters())
        seen["bytes"] = run.residency.resident()[record.receiver]
        seen["whole"] = sum(p.numel() for p in held)
        seen["here"] = sum(getattr(p, "_local_tensor", p).numel() for p in held)
        return record

    loop.take_step = step
    console = Console(file=io.StringIO())
    try:
        loop.train(TrainConfig(**{**BASE, "out": str(FOLDER / name), **changes}), console, resume=resume)
    except Stopped:
        seen["ended"] = "stopped"
    except SystemExit as end:
        seen["ended"] = f"exit {end.code}"
    seen["said"] = console.file.getvalue()
    told[name + ", resumed" * resume] = seen


run("whole")
run("cut", fatal=3, save_every=1)
run("cut", resume=True, save_every=1)
run("asked", asked=1)
run("asked", resume=True)
run("cached", cache_features=True)
run("sharded", fsdp=True)
torch.distributed.destroy_process_group()
(FOLDER / f"told-{RANK}.json").write_text(json.dumps(told))
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two processes did, and the same run of one in ``one``."""
    folder = tmp_path_factory.mktemp("ranks")
    sender, receiver = (write_model(folder / family, family) for family in ("neox", "llama"))
    base: dict[str, Any] = {
        # AdamW gives a gradient near zero a whole step, so that weights differ by rounding times this.
        "learning_rate": 1e-3,
        "sender": str(sender), "receiver": [str(receiver)], "task": task_of(folder, *ROWS), "batch_size": 2,
        "cache": str(folder / "cache"), "ratio": 8, "latent_dim": 16, "hidden_dim": 32, "depth": 1,
        "max_steps": STEPS, "warmup_steps": 1, "save_every": 100, "max_source_tokens": 48, "alignment_steps": 1,
        "validate_every": 3, "validation_examples": 2, "metric": "loss", "probe_every": 0, "mode_tokens": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**base, "out": ""}))
    (folder / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = subprocess.Popen(
        [*launcher, str(folder / "script.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, errors = both.communicate(timeout=200)
    except subprocess.TimeoutExpired:  # one waits for the other for ever
        both.terminate()  # the launcher takes its processes with it
        both.communicate()
        raise
    assert both.returncode == 0, errors[-4000:]
    one(TrainConfig.model_validate({**base, "batch_size": 4, "out": folder / "one"}), folder)
    return folder


def one(config: TrainConfig, folder: Path) -> None:
    """The same run in this process, with all rows in one batch."""
    rows_seen: list[list[list[int]]] = []

    def step(run: Run, number: int, rows: Any, *, waited: float) -> Any:
        rows_seen.append([row.source.ids for row in rows])
        return take_step(run, number, rows, waited=waited)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", step)
        loop.train(config, quiet())
    (folder / "one.json").write_text(json.dumps(rows_seen))


def told(folder: Path, name: str) -> list[dict[str, Any]]:
    """What each process saw of a run."""
    return [json.loads((folder / f"told-{rank}.json").read_text())[name] for rank in (0, 1)]


def weights_of(folder: Path) -> dict[str, Tensor]:
    _, bridge = load_bridge(folder)
    heads = {f"head.{k}": v for k, v in bridge.heads.state_dict().items()}
    return {**bridge.encoder.state_dict(), **heads}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["whole", "cached", "sharded"])
def test_two_processes_have_the_losses_and_weights_of_one(folder: Path, name: str) -> None:
    single, both = log_of(folder / "one"), log_of(folder / name)
    assert len(single) == len(both) == STEPS
    for mine, theirs in zip(single, both, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        assert theirs["losses"] == pytest.approx(mine["losses"], rel=1e-4)
        assert theirs["gradient_norm"] == pytest.approx(mine["gradient_norm"], rel=1e-3)
        assert theirs["tokens"] == mine["tokens"]
    assert_close(weights_of(folder / "one"), weights_of(folder / name))
    seen = told(folder, name)
    assert seen[0]["losses"] == seen[1]["losses"] and seen[0]["norms"] == seen[1]["norms"]


def test_each_row_of_a_step_is_read_by_exactly_one_process(folder: Path) -> None:
    single: list[list[list[int]]] = json.loads((folder / "one.json").read_text())
    first, second = (seen["rows"] for seen in told(folder, "whole"))
    assert len(single) == STEPS
    for whole, mine, theirs in zip(single, first, second, strict=True):
        assert (len(mine), len(theirs)) == (2, 2)
        assert sorted(mine + theirs) == sorted(whole)
        assert not {tuple(row) for row in mine} & {tuple(row) for row in theirs}


def test_one_process_writes_and_speaks(folder: Path) -> None:
    first, second = told(folder, "whole")
    assert "2 processes" in first["said"] and "validation loss" in first["said"] and second["said"] == ""
    assert [record["step"] for record in log_of(folder / "whole")] == [1, 2, 3, 4, 5]
    events = [(line["event"], line["step"]) for line in log_of(folder / "whole", "events.jsonl")]
    assert [event for event in events if event[0] != "alarm"] == [("validation", 3), ("validation", 5), ("save", 5)]
    assert len(states_of(folder / "whole")) == 1 and not list((folder / "whole").glob(".*"))


def test_a_run_of_two_processes_goes_on_as_if_nothing_had_happened(folder: Path) -> None:
    assert [seen["ended"] for seen in told(folder, "cut")] == ["stopped", "stopped"]
    assert [len(seen["losses"]) for seen in told(folder, "cut, resumed")] == [2, 2]
    whole, again = weights_of(folder / "whole"), weights_of(folder / "cut")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert log_of(folder / "cut") == log_of(folder / "whole")


def test_a_request_to_one_process_stops_both_after_the_same_step(folder: Path) -> None:
    first, second = told(folder, "asked")
    assert [seen["ended"] for seen in (first, second)] == ["exit 0", "exit 0"]
    assert len(first["losses"]) == len(second["losses"]) == 2
    assert "saved after step 2" in first["said"]
    assert [seen["ended"] for seen in told(folder, "asked, resumed")] == ["done", "done"]
    assert [len(seen["losses"]) for seen in told(folder, "asked, resumed")] == [3, 3]
    whole, again = weights_of(folder / "whole"), weights_of(folder / "asked")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_sharded_receiver_is_held_in_halves(folder: Path) -> None:
    plain, sharded = told(folder, "whole")[0], told(folder, "sharded")
    assert plain["here"] == plain["whole"]
    blocks = plain["whole"] - 2 * 259 * 32 - 32  # but for embedding, head and last norm
    assert [seen["here"] for seen in sharded] == [plain["whole"] - blocks // 2] * 2


def test_the_memory_of_a_whole_receiver_is_counted(folder: Path) -> None:
    assert [seen["bytes"] for seen in told(folder, "whole")] == [4 * seen["here"] for seen in told(folder, "whole")]


def test_the_memory_of_a_sharded_receiver_is_counted(folder: Path) -> None:
    assert [seen["bytes"] for seen in told(folder, "sharded")] == [4 * seen["here"] for seen in told(folder, "sharded")]


def test_processes_share_all_rows_evenly_and_lose_none() -> None:
    rows = list(range(12))
    shares = [Ranks(rank, 3).share(rows) for rank in range(3)]
    assert sorted(row for share in shares for row in share) == rows and {len(share) for share in shares} == {4}
    assert Ranks().share(rows) == rows and Ranks().first and not Ranks(1, 3).first


def test_one_process_needs_no_launcher_and_no_exchange() -> None:
    assert join_ranks(torch.device("cpu")) == Ranks(0, 1)
    gradient = torch.ones(3)
    Ranks().all_reduce([gradient])
    Ranks().barrier()
    assert gradient.tolist() == [1, 1, 1]
    assert Ranks().any(True, torch.device("cpu")) and not Ranks().any(False, torch.device("cpu"))


def test_a_run_of_two_processes_is_not_resumed_by_one(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(InvalidRequest, match="processes was 2, now 1"):
        loop.train(TrainConfig(**{**config, "out": folder / "whole"}), quiet(), resume=True)
