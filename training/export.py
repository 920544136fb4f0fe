"""From a run's folder, which can go on, to a checkpoint, which can only be used: less than half the bytes."""

from dataclasses import dataclass
from pathlib import Path

from latentwire.bridge.checkpoint import CONFIG, load_bridge, save_bridge
from latentwire.bridge.config import Manifest
from latentwire.bridge.drift import load_statistics, save_statistics
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.gate import load_gates, save_gates
from latentwire.training.loop import BEST


@dataclass(frozen=True)
class Exported:
    """Bytes of the run's resumable states, and of the checkpoint written."""

    manifest: Manifest
    state_bytes: int
    checkpoint_bytes: int


def export(run: Path, out: Path, *, best: bool = False) -> Exported:
    """Write the checkpoint of a run, its last or its best, into a folder of its own, with its gate and statistics.

    Raises:
        InvalidRequest: ``out`` holds a checkpoint already, or there is no best one because nothing was validated.
        UnknownBridge: The run has no checkpoint yet.
        CorruptCheckpoint: It is damaged.
    """
    if best and not (run / BEST / CONFIG).is_file():
        raise InvalidRequest(f"{run / BEST} holds no checkpoint: the run was not validated", param="best")
    if (out / CONFIG).exists():
        raise InvalidRequest(f"--out {out} already holds a checkpoint", param="out")
    source = run / BEST if best else run
    before, bridge = load_bridge(source)
    gates, statistics = load_gates(source, before), load_statistics(source, before)
    try:
        manifest = save_bridge(out, bridge)
        if gates:
            save_gates(out, manifest.bridge_id, gates)
        if statistics:
            save_statistics(out, manifest.bridge_id, statistics)
    except OSError as error:
        raise InvalidRequest(f"--out {out}: {error.strerror}", param="out") from None
    states = sum(path.stat().st_size for path in run.glob("state-*"))
    return Exported(manifest, states, manifest.encoder.bytes + sum(part.bytes for part in manifest.heads.values()))
