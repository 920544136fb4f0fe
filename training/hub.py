"""Checkpoints on the Hugging Face Hub: a repository with a model card that says how the bridge was measured."""

import json
import tempfile
from pathlib import Path
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from latentwire.bridge.checkpoint import HUB, folder_of_checkpoint
from latentwire.bridge.config import Manifest
from latentwire.bridge.errors import InvalidRequest, ModelUnavailable, first_line
from latentwire.bridge.evaluation.saved import read_report
from latentwire.bridge.models import revision_of
from latentwire.training.export import Exported, export

# Of what was there before.
STALE = ["encoder-*", "head-*", "gate.json", "statistics.json", "codebooks.safetensors", "report.json"]
TEXTS = ("examples", "slots", "latents")  # of a report: other people's data
CARD = """---
{yaml}
---

# {name}

A latent bridge of LatentWire: `{sender}` reads a text, and {receivers} from the latent alone, without seeing
the text.

```python
import latentwire

bridge = latentwire.Bridge.load("hf://{name}")
latents = bridge.encode("The text.")
print(bridge.generate(latents, {prompt!r}).texts)
```

`latentwire serve --bridge {short}=hf://{name}` serves it over HTTP.

| | |
|---|---|
{facts}

## Measured

{measured}

## Made by

```json
{recipe}
```
"""


def push_to_hub(
    checkpoint: str | Path,
    repository: str,
    *,
    report: Path | None = None,
    private: bool = False,
    message: str = "A checkpoint of LatentWire",
) -> str:
    """Put a checkpoint into a repository of the Hub, in one commit; its address.

    The commit holds the checkpoint as ``export`` writes it, a model card, and the report without its texts. What the
    repository held of another checkpoint goes. The token is the Hub's own: ``HF_TOKEN``, or ``hf auth login``.

    >>> latentwire.push_to_hub("runs/news", "someone/news-bridge")  # doctest: +SKIP
    'https://huggingface.co/someone/news-bridge'

    Args:
        checkpoint: As of ``Bridge.load``.
        repository: ``owner/name``; made where it is not there.
        report: Of ``latentwire evaluate``, of this checkpoint: its figures go into the card.
        private: Whether a repository that is made is private.
        message: Of the commit.

    Raises:
        InvalidRequest: The report is of another bridge, or the repository's name is none.
        ModelUnavailable: The Hub cannot be reached, or does not let this token write there.
        UnknownBridge, CorruptCheckpoint: As of ``load_bridge``.
    """
    with tempfile.TemporaryDirectory() as made:
        out = Path(made) / "checkpoint"
        manifest = export(folder_of_checkpoint(checkpoint), out).manifest
        figures = None if report is None else _figures(report, manifest)
        (out / "README.md").write_text(card(repository, manifest, figures), encoding="utf-8")
        if figures is not None:
            (out / "report.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
        api = HfApi(library_name="latentwire")
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=out, commit_message=message, delete_patterns=STALE
            )
        except HFValidationError as error:
            raise InvalidRequest(f"{repository!r} is no name of a repository: {first_line(error)}") from None
        except ValueError as error:  # of the card, when the Hub has looked at it
            raise InvalidRequest(f"the Hub refuses the model card: {first_line(error)}") from None
        except (HTTPError, OfflineModeIsEnabled, OSError) as error:
            raise ModelUnavailable(f"{repository!r} cannot be written on the Hub: {_reason(error)}") from None
    return str(commit.repo_url)


def pull(checkpoint: str, out: Path) -> Exported:
    """Write a checkpoint of the Hub into a folder of its own, once all of it is here and whole.

    Raises:
        InvalidRequest: ``out`` holds a checkpoint already.
        UnknownBridge, CorruptCheckpoint: As of ``load_bridge``.
    """
    return export(folder_of_checkpoint(HUB + checkpoint.removeprefix(HUB)), out)


def card(name: str, manifest: Manifest, report: dict[str, Any] | None) -> str:
    """The model card of a checkpoint: what it is, how it is used, and what was measured, with its controls."""
    bridge = manifest.bridge
    models = [bridge.sender.name, *bridge.heads]
    data = ModelCardData(
        library_name="latentwire",
        base_model=[revision_of(model)[0] for model in models if _is_hub_name(model)] or None,
        tags=["latent-bridge", "soft-prompt"],
    )
    encoder, run = bridge.encoder, bridge.provenance
    facts = {
        "sender": f"`{bridge.sender.name}`, layer {', '.join(map(str, bridge.layers))}",
        "receivers": ", ".join(f"`{receiver}`" for receiver in bridge.heads),
        "encoder": f"{encoder.kind}, latent width {encoder.latent_dim}",
        "longest source": f"{bridge.max_source_tokens} tokens of the sender",
        "task": f"`{run.task}`, {sum(one.steps for one in (*bridge.earlier, run))} steps",
        "bridge id": f"`{manifest.bridge_id}`",
    }
    return CARD.format(
        yaml=data.to_yaml(),
        name=name,
        short=name.rpartition("/")[2],
        sender=bridge.sender.name,
        receivers=" or ".join(f"`{receiver}`" for receiver in bridge.heads) + " answers",
        prompt="Question: …\nAnswer:",
        facts="\n".join(f"| {what} | {value} |" for what, value in facts.items()),
        measured="Nothing was measured yet." if report is None else _measured(report),
        recipe=json.dumps({"data_sha256": run.data_sha256, "code_version": run.code_version, **run.recipe}, indent=1),
    )


def _measured(report: dict[str, Any]) -> str:
    """The conditions of a report, with their intervals."""
    rows = []
    for name, row in report["conditions"].items():
        spread = "too few examples" if row["low"] is None else f"{row['low']:.3f}-{row['high']:.3f}"
        rows.append(f"| {name} | {row['value']:.3f} | {spread} |")
    metric = next(iter(report["conditions"].values()))["metric"]
    asked = f"`{report['task']}`, {report['n']} test examples; 95 % intervals. `report.json` has all of it."
    return "\n".join([asked, "", f"| condition | {metric} | |", "|---|---|---|", *rows])


def _figures(file: Path, manifest: Manifest) -> dict[str, Any]:
    report = read_report(file)
    if report["bridge_id"] != manifest.bridge_id:
        raise InvalidRequest(
            f"--report {file} is of bridge {report['bridge_id']}, the checkpoint is {manifest.bridge_id}",
            param="report",
        )
    return {key: value for key, value in report.items() if key not in TEXTS}


def _is_hub_name(model: str) -> bool:
    return ":" not in model and not Path(model).exists() and model.count("/") == 1


def _reason(error: Exception) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        return f"it answers {status}; a token with write access is wanted (HF_TOKEN, or: hf auth login)"
    return first_line(error)
