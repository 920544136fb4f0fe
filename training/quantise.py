"""``latentwire quantise``: codebooks for the latents of a bridge, saved in its checkpoint.

Importing this module needs no torch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.files import writable_folder

if TYPE_CHECKING:
    import numpy as np

    from latentwire.bridge.bridge import Bridge
    from latentwire.bridge.codebooks import Codebooks

TENTH = 10  # one in so many examples is not fitted to: on it the error is measured
FEWEST = 10  # slots for each vector of a codebook
ROWS = 32
SEEDS = 1 << 32  # that scikit-learn knows


def quantise(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder, which gets the codebooks.")
    ],
    task: Annotated[str, typer.Option(help="'world' or a task file (.toml): its training sources are read.")],
    codebooks: Annotated[int, typer.Option(min=2, max=8, help="How many: 2 for rq2, 4 for rq4 too, 8 for all.")] = 4,
    examples: Annotated[int, typer.Option(min=1, help="Most training examples to read.")] = 4000,
    seed: Annotated[int, typer.Option(min=0, help="Of the examples, and where the fit begins.")] = 0,
    device: Annotated[
        str | None, typer.Option(help=r"Where models compute; as in 'train'. \[default: the best there is]")
    ] = None,
    precision: Annotated[str | None, typer.Option(help=r"bf16, fp16 or fp32. \[default: bf16; fp32 on a CPU]")] = None,
) -> None:
    """Let latents travel as 2, 4 or 8 bytes a slot (rq2, rq4, rq8): fit codebooks to those of training sources."""
    from latentwire.bridge.bridge import Bridge
    from latentwire.bridge.codebooks import CODEBOOKS, save_codebooks
    from latentwire.bridge.evaluation.evaluate import progress_bar

    out, folder = Console(), writable_folder(checkpoint, "codebooks are")
    bridge = Bridge.load(folder, device=device, precision=precision)
    with progress_bar(out) as progress:
        made, left = fit_codebooks(bridge, task, count=codebooks, examples=examples, seed=seed, progress=progress)
    save_codebooks(folder, made)
    for line in (
        f"fitted to {made.about['slots']} slots; on sources not fitted to, of the latents' energy is left over after",
        *(f"  {number} codebook{'s' if number > 1 else ''}: {share:.1%}" for number, share in enumerate(left, start=1)),
        f"{folder / CODEBOOKS} holds them; messages made with other ones are read no more",
    ):
        out.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def fit_codebooks(
    bridge: "Bridge",
    task: str,
    *,
    count: int = 4,
    examples: int = 4000,
    seed: int = 0,
    progress: Callable[[str, int, int], object] = lambda *_: None,
) -> tuple["Codebooks", list[float]]:
    """Fit codebooks to the latents of a task's training sources, by k-means of what the ones before leave over.

    Args:
        bridge: Whose sender reads them.
        task: ``world``, or a task file (.toml).
        count: How many codebooks.
        examples: Most examples to read; which ones is drawn with ``seed``.
        seed: Also of the vectors that a fit begins with.
        progress: Told how far it is.

    Returns:
        The codebooks, and the share of energy left over after each on examples not fitted to: of the sum of squares.

    Raises:
        InvalidRequest: The examples have too few slots.
        LatentWireError: A model cannot be loaded, or is not the one the bridge was trained with.
    """
    import numpy as np
    from sklearn.cluster import KMeans

    from latentwire.bridge.codebooks import VECTORS, Codebooks
    from latentwire.bridge.evaluation.tasks import load_task
    from latentwire.training.data import chunks

    loaded, latents = load_task(task), list["np.typing.NDArray[np.float32]"]()
    rows = np.random.default_rng(seed).choice(len(loaded.train), min(examples, len(loaded.train)), replace=False)
    for chosen in chunks(rows.tolist(), ROWS):
        texts = [loaded.train[i].source for i in chosen]
        latents += [latent.array for latent in bridge.encode(texts, dtype="float32", truncate=True)]
        progress("the sender reads", len(latents), len(rows))
    tested, fitted = latents[::TENTH], [latent for at, latent in enumerate(latents) if at % TENTH]
    slots = sum(map(len, fitted))
    if slots < (need := FEWEST * VECTORS):
        raise InvalidRequest(
            f"{len(rows)} training examples of {loaded.name!r} give {slots} slots to fit {VECTORS} vectors to; "
            f"at least {need} are needed",
            param="examples",
        )
    left, test = np.concatenate(fitted), np.concatenate(tested)
    energy, shares = float(np.square(test).sum()), []
    vectors = np.zeros((0, VECTORS, left.shape[1]), np.float32)
    about = {
        "bridge_id": bridge.manifest.bridge_id, "task": loaded.name, "data_sha256": loaded.data_sha256,
        "slots": str(slots),
    }  # fmt: skip
    for number in range(count):
        means = KMeans(VECTORS, n_init=1, max_iter=60, random_state=(seed + number) % SEEDS)
        # Rounded as they are saved, so that the next one is fitted to what a reader will have left over.
        vector = means.fit(left).cluster_centers_.astype(np.float16).astype(np.float32)[None]
        one = Codebooks(vector, about)
        left, test = (rest - one.latent(one.codes(rest, 1)) for rest in (left, test))
        vectors = np.concatenate([vectors, vector])
        shares.append(float(np.square(test).sum()) / energy)
        progress("codebooks", number + 1, count)
    return Codebooks(vectors, about), shares
