"""From a run that can go on to a checkpoint that can be used."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from latentwire.bridge.checkpoint import load_bridge
from latentwire.bridge.errors import InvalidRequest, UnknownBridge
from latentwire.service.__main__ import app
from latentwire.training.export import export
from latentwire.training.loop import BEST, train
from tests.integration.runs import files_of, parts, quiet


def test_an_export_is_the_last_checkpoint_and_less_than_half_the_bytes(make: Any, tmp_path: Path) -> None:
    manifest = train(make(), quiet())
    done = export(make().out, tmp_path / "slim")
    assert parts(done.manifest) == parts(manifest) and load_bridge(tmp_path / "slim")[0] == done.manifest
    assert {path.suffix for path in (tmp_path / "slim").iterdir()} == {".json", ".safetensors"}
    weights = sum(path.stat().st_size for path in (tmp_path / "slim").glob("*.safetensors"))
    assert done.checkpoint_bytes == weights < done.state_bytes / 2


def test_the_best_is_exported_when_asked(make: Any, tmp_path: Path) -> None:
    train(make(validate_every=2, validation_examples=2, metric="em"), quiet())
    best = export(make().out, tmp_path / "best", best=True).manifest
    assert parts(best) == parts(load_bridge(make().out / BEST)[0]) != parts(load_bridge(make().out)[0])


def test_an_export_of_nothing_or_over_something_is_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(UnknownBridge, match="no checkpoint at"):
        export(tmp_path, tmp_path / "slim")
    train(make(max_steps=1), quiet())
    with pytest.raises(InvalidRequest, match="the run was not validated"):
        export(make().out, tmp_path / "slim", best=True)
    before = files_of(make().out)
    with pytest.raises(InvalidRequest, match="already holds a checkpoint"):
        export(make().out, make().out)
    assert files_of(make().out) == before and not (tmp_path / "slim").exists()


def test_the_command_prints_both_sizes(make: Any, tmp_path: Path) -> None:
    train(make(max_steps=1), quiet())
    said = CliRunner().invoke(app, ["export", str(make().out), "--out", str(tmp_path / "slim")])
    done = load_bridge(tmp_path / "slim")[0]
    assert (
        said.exit_code == 0
        and f"{done.encoder.bytes + sum(p.bytes for p in done.heads.values()):,} bytes" in said.output
    )
    assert "the resumable states of" in said.output
