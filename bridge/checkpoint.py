"""A bridge on disk: a folder with ``config.json`` and the safetensors files it names.

Weight files carry their digest in their name and never change; replacing ``config.json`` by rename is the one
step that commits. Killed at any instant, the folder holds the old checkpoint or the new one, whole.
"""

import hashlib
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from latentwire.bridge.codebooks import CODEBOOKS, Codebooks, load_codebooks, save_codebooks
from latentwire.bridge.config import BridgeConfig, Fingerprint, Manifest, ModelRef, Part, dump_manifest, parse_manifest
from latentwire.bridge.devices import default_device
from latentwire.bridge.drift import STATISTICS
from latentwire.bridge.encoder import Encoder, encoder_class, make_encoder
from latentwire.bridge.errors import CorruptCheckpoint, IncompatibleBridge, ModelUnavailable, UnknownBridge, first_line
from latentwire.bridge.families import ROLES, Role
from latentwire.bridge.files import replace_file
from latentwire.bridge.gate import GATE
from latentwire.bridge.heads import SoftTokenHead
from latentwire.bridge.models import BUILTIN, FrozenLM, check_role, fingerprint_of, hub_folder
from latentwire.bridge.prompt import check_layout

CONFIG = "config.json"
BUILTIN_BRIDGE = BUILTIN / "bridge"
HUB = "hf://"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class BridgeModel:
    """An encoder and its heads, by receiver name; codebooks of its latents, where some were made."""

    config: BridgeConfig
    encoder: Encoder
    heads: nn.ModuleDict
    codebooks: Codebooks | None = None

    @property
    def default_receiver(self) -> str:
        return next(iter(self.config.heads))

    def head(self, receiver: str) -> SoftTokenHead:
        """The head of one receiver (UnknownBridge where there is none, with the names of those there are)."""
        if receiver not in self.config.heads:
            known = ", ".join(self.config.heads)
            raise UnknownBridge(f"the bridge has no head for receiver {receiver!r}; it has {known}", param="receiver")
        head = self.heads[head_key(receiver)]
        assert isinstance(head, SoftTokenHead)
        return head

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained."""
        return [*self.encoder.parameters(), *self.heads.parameters()]


def head_key(receiver: str) -> str:
    """A module name for a receiver name, which may hold dots."""
    return receiver.replace(".", "·")


def make_bridge(config: BridgeConfig) -> BridgeModel:
    """A freshly initialised bridge."""
    dim = config.encoder.latent_dim
    heads = nn.ModuleDict({head_key(name): SoftTokenHead(dim, head) for name, head in config.heads.items()})
    return BridgeModel(config, make_encoder(config.encoder), heads)


def folder_of_checkpoint(name: str | Path) -> Path:
    """The folder of ``builtin``, a folder or a reachable Hub name (UnknownBridge where no checkpoint is in it).

    ``hf://`` before it says that a name is of the Hub; without, a folder of that name comes first.
    """
    folder, on_hub = BUILTIN_BRIDGE if str(name) == "builtin" else Path(name), str(name).removeprefix(HUB)
    if on_hub != str(name):
        try:
            folder = hub_folder(on_hub)
        except ModelUnavailable as error:
            why = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise UnknownBridge(f"{name} cannot be had from the Hub: {first_line(why)}") from None
    elif not folder.exists() and HUB_NAME.fullmatch(on_hub):
        with suppress(ModelUnavailable):
            folder = hub_folder(on_hub)
    if not (folder / CONFIG).is_file():
        raise UnknownBridge(
            f"no checkpoint at {str(name)!r}: expected a folder with {CONFIG}, the Hub name of one, or 'builtin'"
        )
    return folder


def save_bridge(folder: Path, bridge: BridgeModel) -> Manifest:
    """Write a checkpoint; atomic, and safe to repeat into the same folder.

    A gate there was of the old weights, and so were statistics, and codebooks unless the bridge brings its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    encoder = write_part(folder, "encoder", bridge.encoder.state_dict())
    heads = {name: write_part(folder, "head", bridge.head(name).state_dict()) for name in bridge.config.heads}
    manifest = Manifest(1, _bridge_id(bridge.config, encoder), bridge.config, encoder, heads)
    for old in (GATE, STATISTICS, CODEBOOKS):
        (folder / old).unlink(missing_ok=True)
    replace_file(folder / CONFIG, dump_manifest(manifest))
    if bridge.codebooks is not None and bridge.codebooks.about["bridge_id"] == manifest.bridge_id:
        save_codebooks(folder, bridge.codebooks)
    remove_stale_parts(folder, "encoder", {encoder.file})
    remove_stale_parts(folder, "head", {part.file for part in heads.values()})
    return manifest


def _bridge_id(config: BridgeConfig, encoder: Part) -> str:
    identity = f"{encoder.sha256}/{config.encoder}/{config.layers}/{config.sender.fingerprint}"
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def read_manifest(name: str | Path) -> Manifest:
    """What a checkpoint is, without its weights (UnknownBridge: there is none; CorruptCheckpoint: it is damaged)."""
    path = folder_of_checkpoint(name) / CONFIG
    manifest = parse_manifest(_read(path), str(path))
    try:
        encoder_class(manifest.bridge.encoder.kind)
    except ValueError as error:
        raise CorruptCheckpoint(
            f"{path}: bridge.encoder.kind: {error}, got {manifest.bridge.encoder.kind!r}; "
            "an encoder of your own is known once the module that defines it was imported"
        ) from None
    return manifest


def load_bridge(name: str | Path, *, device: torch.device | None = None) -> tuple[Manifest, BridgeModel]:
    """Read a checkpoint, checking every byte against its digest.

    ``device`` is the accelerator where there is one, unless given.

    Raises:
        UnknownBridge: No checkpoint there.
        CorruptCheckpoint: A file is missing, damaged, or holds other tensors than the configuration says.
    """
    folder, manifest = folder_of_checkpoint(name), read_manifest(name)
    if manifest.bridge_id != (actual := _bridge_id(manifest.bridge, manifest.encoder)):
        raise CorruptCheckpoint(f"{folder / CONFIG}: bridge_id is {manifest.bridge_id}, its contents make {actual}")
    if manifest.heads.keys() != manifest.bridge.heads.keys():
        have, want = list(manifest.heads), list(manifest.bridge.heads)
        raise CorruptCheckpoint(f"{folder / CONFIG}: heads: weights of {have}, expected of {want}")
    codebooks = load_codebooks(folder, manifest.bridge_id, manifest.bridge.encoder.latent_dim)
    bridge = replace(make_bridge(manifest.bridge), codebooks=codebooks)
    _load_into(bridge.encoder, folder, manifest.encoder)
    for receiver, part in manifest.heads.items():
        _load_into(bridge.head(receiver), folder, part)
    for module in (bridge.encoder, bridge.heads):
        module.to(device or default_device()).eval().requires_grad_(False)
    return manifest, bridge


def check_identity(expected: ModelRef, actual: Fingerprint, role: str) -> None:
    """Refuse a model other than the one trained with (IncompatibleBridge, with the part that differs, both digests)."""
    for part in ("config", "weights", "tokenizer"):
        want, have = getattr(expected.fingerprint, part), getattr(actual, part)
        if want != have:
            raise IncompatibleBridge(
                f"the bridge was trained with {role} {expected.name!r} whose {part} is {want}; this one's is {have}"
            )


def check_sender(config: BridgeConfig, sender: FrozenLM) -> None:
    """Refuse a sender other than the one trained with (IncompatibleBridge)."""
    check_identity(config.sender, sender.fingerprint, "sender")


def check_receiver(config: BridgeConfig, name: str, receiver: FrozenLM) -> None:
    """Refuse a receiver, or special tokens, other than those trained with (IncompatibleBridge)."""
    check_identity(config.heads[name].receiver, receiver.fingerprint, "receiver")
    check_layout(config.heads[name].layout, receiver)


def check_models(config: BridgeConfig, roles: Collection[Role] = ROLES) -> None:
    """Compare models a checkpoint names with their files, unloaded (errors: ``check_role``, ``check_identity``)."""
    refs: list[tuple[Role, ModelRef]] = [("sender", config.sender)]
    refs += [("receiver", head.receiver) for head in config.heads.values()]
    for role, ref in refs:
        if role in roles:
            check_role(ref.name, role)
            check_identity(ref, fingerprint_of(ref.name), role)


def write_part(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> Part:
    """Write tensors as ``stem-<digest>.safetensors`` (rename into place) and describe the file."""
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    part = Part(f"{stem}-{digest[:8]}.safetensors", digest, len(data))
    replace_file(folder / part.file, data)
    return part


def read_part(folder: Path, part: Part) -> dict[str, Tensor]:
    """Read a weight file back (CorruptCheckpoint where it is missing, or of another digest; both digests are named)."""
    path = folder / part.file
    if not path.is_file():
        raise CorruptCheckpoint(f"{path} is missing; the checkpoint needs its {part.bytes} bytes")
    data = _read(path)
    digest = hashlib.sha256(data).hexdigest()
    if digest != part.sha256:
        raise CorruptCheckpoint(
            f"{path} is damaged: {len(data)} bytes with digest {digest[:16]}, "
            f"expected {part.bytes} bytes with {part.sha256[:16]}"
        )
    try:
        return load(data)
    except SafetensorError as error:
        raise CorruptCheckpoint(f"{path} is no safetensors file: {error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from None


def remove_stale_parts(folder: Path, stem: str, keep: set[str]) -> None:
    """Delete weight files of ``stem`` that the committed state no longer names, and what a killed save left."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    for path in folder.glob(f"{stem}-*.safetensors"):
        if path.name not in keep:
            path.unlink(missing_ok=True)


def _load_into(module: nn.Module, folder: Path, part: Part) -> None:
    tensors = read_part(folder, part)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))[0]
        raise CorruptCheckpoint(
            f"{folder / part.file}: {odd} is {found.get(odd, 'missing')}, expected {expected.get(odd, 'nothing')}"
        )
    with torch.no_grad():
        module.load_state_dict(tensors)
