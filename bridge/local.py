"""Use a checkpoint here and now, without a server: what ``latentwire encode`` and ``latentwire generate`` do.

One model is in memory at a time: each function loads the one it needs and lets it go.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentwire.bridge import engine, wire
from latentwire.bridge.checkpoint import check_receiver, check_sender, load_bridge, read_manifest
from latentwire.bridge.config import Manifest
from latentwire.bridge.encoder import slots_of
from latentwire.bridge.engine import Encoded
from latentwire.bridge.errors import InvalidMessage
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.models import check_role, load_model
from latentwire.bridge.prompt import compose, place
from latentwire.bridge.reader import tokenize_source
from latentwire.bridge.sampling import SamplingParams


def encode_text(checkpoint: str, text: str, *, truncate: bool = False) -> tuple[Manifest, Encoded]:
    """The latent of one text (K, C).

    Raises:
        InvalidRequest: The text is empty or too long.
        LatentWireError: The checkpoint or its sender cannot be loaded, or is another one.
    """
    manifest, bridge = load_bridge(checkpoint)
    check_role(manifest.bridge.sender.name, "sender")
    sender = load_model(manifest.bridge.sender.name)
    check_sender(manifest.bridge, sender)
    config = manifest.bridge
    source = tokenize_source(sender, text, config.source, max_tokens=config.max_source_tokens, truncate=truncate)
    return manifest, engine.encode(bridge, sender, [source])[0]


def read_latent(checkpoint: str, file: Path) -> NDArray[np.float32]:
    """A latent (K, C) from a message in a file.

    Raises:
        InvalidMessage: No such file, or not a message.
        IncompatibleBridge: A message of another bridge.
    """
    manifest = read_manifest(checkpoint)
    try:
        message = file.read_bytes()
    except OSError as error:
        raise InvalidMessage(f"--latent {file}: {error.strerror}", param="latent") from None
    config = manifest.bridge
    return wire.decode(
        message,
        bridge_id=manifest.bridge_id,
        latent_dim=config.encoder.latent_dim,
        max_slots=slots_of(config.encoder, config.max_source_tokens),
    ).latent


def answer(
    checkpoint: str, receiver: str | None, latent: NDArray[np.float32], prompt: str, params: SamplingParams
) -> Generation:
    """What a receiver says about a latent.

    Raises:
        InvalidRequest: Prompt and latent do not fit the receiver.
        LatentWireError: The checkpoint or its receiver cannot be loaded, or is another one.
    """
    manifest, bridge = load_bridge(checkpoint)
    name = receiver or bridge.default_receiver
    bridge.head(name)
    check_role(name, "receiver")
    lm = load_model(name)
    check_receiver(manifest.bridge, name, lm)
    layout = manifest.bridge.heads[name].layout
    room = lm.max_tokens - params.max_tokens
    row = compose(lm, layout, place(layout, prompt), latent=len(latent), max_tokens=room)
    return engine.ask(bridge, name, lm, [engine.Asked(row, latent, params)])[0][0]
