"""Codebooks fitted to a bridge's latents, and latents that travel as their codes."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.bulk import encode_corpus
from latentwire.bridge.checkpoint import BUILTIN_BRIDGE, BridgeModel, load_bridge, save_bridge
from latentwire.bridge.codebooks import CODEBOOKS, Codebooks
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.evaluate import evaluate
from latentwire.service.__main__ import app
from latentwire.training.export import export
from latentwire.training.quantise import fit_codebooks

SOURCE, PROMPT = "Ben lives in Rome. Mara wants a cup of tea.", "Question: Where does Ben live?\nAnswer:"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in bridge in a folder of one's own, without its codebooks."""
    folder = tmp_path_factory.mktemp("own") / "bridge"
    shutil.copytree(BUILTIN_BRIDGE, folder)
    (folder / CODEBOOKS).unlink()
    return folder


@pytest.fixture(scope="module")
def quantised(own: Path) -> str:
    """What the command says of the codebooks it puts there."""
    said = CliRunner().invoke(app, ["quantise", str(own), "--task", "world", "--codebooks", "2", "--examples", "300"])
    assert said.exit_code == 0, said.output
    return said.output


def test_the_command_saves_codebooks_and_says_what_each_leaves_over(own: Path, quantised: str) -> None:
    books = Bridge.load(own).model.codebooks
    assert books is not None and books.vectors.shape == (2, 256, 128)
    assert f"fitted to {books.about['slots']} slots" in quantised
    left = [float(share) for share in re.findall(r"codebooks?: ([\d.]+)%", quantised)]
    assert len(left) == 2 and left[1] < left[0] < 40
    said = CliRunner().invoke(app, ["inspect", str(own)]).output
    assert f"2 codebooks of 'world', fitted to {books.about['slots']} slots" in said


@pytest.mark.usefixtures("quantised")
def test_codes_say_nearly_what_the_numbers_do_in_less_than_the_text(own: Path) -> None:
    bridge = Bridge.load(own)
    (coded,), (exact,) = bridge.encode(SOURCE, dtype="rq2"), bridge.encode(SOURCE, dtype="float32")
    assert len(coded.data) < len(exact.data) / 20
    decoded = bridge.decode(coded.data)
    assert np.square(decoded - exact.array).sum() < 0.35 * np.square(exact.array).sum()
    assert bridge.generate(coded, PROMPT).usage.soft_tokens == len(decoded)
    reports = [
        evaluate(bridge, limit=40, conditions=["bridge"], dtype=dtype, on_progress=lambda *_: None).document
        for dtype in ("float16", "rq2")
    ]
    exact_score, coded_score = (report["conditions"]["bridge"]["value"] for report in reports)
    assert coded_score > 0.6 * exact_score
    assert reports[1]["bytes"]["latent"] < reports[1]["bytes"]["source"]


@pytest.mark.usefixtures("quantised")
def test_codebooks_go_with_a_checkpoint_and_never_with_another_encoder(own: Path, tmp_path: Path) -> None:
    export(own, tmp_path / "slim")
    (_, slim), (_, bridge) = load_bridge(tmp_path / "slim"), load_bridge(own)
    assert slim.codebooks is not None and bridge.codebooks is not None
    assert (slim.codebooks.digest, slim.codebooks.about) == (bridge.codebooks.digest, bridge.codebooks.about)
    shutil.copytree(own, tmp_path / "again")
    for weights in bridge.encoder.parameters():
        weights.data.mul_(1.01)
    save_bridge(tmp_path / "again", bridge)
    assert not (tmp_path / "again" / CODEBOOKS).exists()


@pytest.mark.usefixtures("quantised")
def test_a_corpus_of_codes_is_asked_like_any_other_and_goes_on_with_its_own_codebooks_alone(
    own: Path, tmp_path: Path
) -> None:
    bridge = Bridge.load(own)
    corpus = encode_corpus(bridge, {"ben": SOURCE}, tmp_path / "coded.lw", dtype="rq2")
    assert (corpus.dtype, corpus["ben"].dtype) == ("rq2", "rq2")
    checked = CliRunner().invoke(app, ["corpus", "check", str(corpus.path)])
    assert checked.exit_code == 0 and "in rq2" in checked.output and "as it was written" in checked.output
    (coded,) = bridge.encode(SOURCE, dtype="rq2")
    np.testing.assert_array_equal(bridge.decode(corpus["ben"].data), bridge.decode(coded.data))
    journal = tmp_path / "begun.lw.part.journal"
    with pytest.raises(RuntimeError, match="stop here"):
        encode_corpus(bridge, {"ben": SOURCE}, tmp_path / "begun.lw", dtype="rq2", on_progress=_stop)
    assert journal.exists()
    fresh, _ = fit_codebooks(bridge, "world", count=2, examples=300, seed=7)
    other = Bridge(bridge.name, bridge.manifest, _with(bridge, fresh), bridge.residency)
    with pytest.raises(InvalidRequest, match=r"it was begun with codebooks [0-9a-f]{8}, not"):
        encode_corpus(other, {"ben": SOURCE}, tmp_path / "begun.lw", dtype="rq2")


def _stop(*_: int) -> None:
    raise RuntimeError("stop here")


def _with(bridge: Bridge, codebooks: Codebooks) -> BridgeModel:
    return replace(bridge.model, codebooks=codebooks)


def test_too_few_slots_a_dtype_without_codebooks_and_a_checkpoint_of_no_folder_are_one_sentence(
    own: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(own, bare)
    (bare / CODEBOOKS).unlink(missing_ok=True)
    for command, message in (
        (f"quantise {bare} --task world --examples 20", "at least 2560 are needed"),
        ("quantise builtin --task world", "'builtin' is no folder; codebooks are saved in the checkpoint's own"),
        (f"encode {bare} --text Ben --dtype rq2 --out {tmp_path}/x", "bridge has none"),
        (f"evaluate {bare} --task world --limit 2 --dtype rq2", "bridge has none"),
    ):
        said = CliRunner().invoke(app, command)
        assert isinstance(said.exception, InvalidRequest) and message in str(said.exception), (command, said.output)
    assert not (bare / CODEBOOKS).exists() and not (tmp_path / "x").exists()


def test_the_built_in_bridge_answers_from_fewer_bytes_than_its_texts_have() -> None:
    report = evaluate("builtin", limit=60, conditions=["bridge"], dtype="rq8", on_progress=lambda *_: None).document
    assert report["bytes"]["latent"] < report["bytes"]["source"]
    assert report["conditions"]["bridge"]["value"] > 0.85
    assert "--dtype rq8" in json.dumps(report["about"])


def test_any_seed_from_0_fits_codebooks_and_one_below_is_refused(own: Path) -> None:
    said = CliRunner().invoke(app, f"quantise {own} --task world --seed -1")
    assert said.exit_code == 2 and "--seed" in said.output
    made, _ = fit_codebooks(Bridge.load(own), "world", count=2, examples=300, seed=(1 << 32) - 1)
    assert len(made.vectors) == 2
