"""THE composer: the one place where receiver inputs are put together.

Training, evaluation and serving all call ``compose`` and ``collate``, so BOS policy, template, token boundaries,
positions and labels cannot drift apart. Labels leave here unshifted; ``engine.token_losses`` shifts them, once.

Dimensions used in this file:
    B batch    T tokens of a padded row    K slots    D receiver width
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from latentwire.bridge.chat import Segment, chat_of, closing_of, segments
from latentwire.bridge.config import Chat, Layout, Prompt, Turn
from latentwire.bridge.detokenise import decode
from latentwire.bridge.errors import IncompatibleBridge, InvalidRequest
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.reader import Reader, ids_of_texts, text_ids

LATENT, LATENTS, PROMPT = "{latent}", "{latents}", "{prompt}"
REPEAT = f"{LATENT}\nRepeat:"
"""What a receiver is asked that is to repeat a source, unless a task has words of its own; answered as a prompt is."""
NEXT = "\n"  # before each source but the first, at ``{latents}``
IGNORE = -100  # label of a position that is not supervised; the value torch's cross-entropy skips
Content = int | str
"""So many soft tokens, or a text."""
TEXT = -1  # slot number of a position that holds an ordinary token


@dataclass(frozen=True, slots=True)
class Row:
    """One receiver input without padding; three lists of the same length.

    Attributes:
        ids: Token ids; meaningless where a soft token stands.
        slots: Number of the soft token at each position, or ``TEXT``.
        labels: What the model must say at each position (unshifted), or ``IGNORE``.
    """

    ids: list[int]
    slots: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> "Row":
        """A part of the row."""
        return Row(self.ids[part], self.slots[part], self.labels[part])

    @property
    def text_ids(self) -> list[int]:
        """Ids of the ordinary tokens."""
        return [i for i, slot in zip(self.ids, self.slots, strict=True) if slot == TEXT]

    def after(self, ids: list[int]) -> "Row":
        """The same row with generated tokens after it, to continue generating."""
        return Row(self.ids + ids, self.slots + [TEXT] * len(ids), self.labels + [IGNORE] * len(ids))

    def with_slots(self, count: int) -> "Row":
        """The same row around ``count`` soft tokens: what it would be with another example's latent."""
        first, had = self.slots.index(0), sum(slot != TEXT for slot in self.slots)
        before, after = slice(first), slice(first + had, None)
        return Row(
            self.ids[before] + [0] * count + self.ids[after],
            self.slots[before] + list(range(count)) + self.slots[after],
            self.labels[before] + [IGNORE] * count + self.labels[after],
        )


@dataclass(frozen=True)
class Batch:
    """Padded rows. ``positions`` counts real tokens from 0, so padding moves nothing."""

    ids: Int[Tensor, "B T"]
    slots: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``."""
        return Batch(*(getattr(self, name).to(device) for name in ("ids", "slots", "mask", "positions", "labels")))


def layout_for(lm: Reader, template: str, *, chat: bool = False, system: str | None = None) -> Layout:
    """The layout a checkpoint keeps for this receiver and a task's prompt template.

    ``"Review: {latent}\\nSentiment:"`` becomes ``"Review: {latent}\\n{prompt}"``, for prompts that do not place the
    latent. Text before it that holds an unfilled field is left out: a request could not fill it.

    With ``chat``, prompts go into the receiver's own template, behind any ``system`` message (ModelUnavailable: none).
    """
    before, after = split_template(template)
    before = "" if re.search(r"\{\w+\}", before) else before
    gap = after[: len(after) - len(after.lstrip())]
    return _layout(lm, f"{before}{LATENT}{gap}{PROMPT}", chat_of(lm, system) if chat else None)


def text_layout(lm: Reader) -> Layout:
    """The layout in which a model reads and goes on with plain text."""
    return _layout(lm, "", None)


def _layout(lm: Reader, template: str, chat: Chat | None) -> Layout:
    eos = lm.tokenizer.eos_token_id
    closing = closing_of(lm, chat) if chat else None
    taught = closing if closing in lm.end_ids else None if eos is None else int(eos)
    return Layout(template, None if chat else lm.source_layout.bos_id, taught, lm.end_ids, chat)


def check_layout(layout: Layout, lm: Reader) -> None:
    """Refuse a receiver with other special tokens than the layout's (IncompatibleBridge, with token and both ids)."""
    bos = lm.tokenizer.bos_token_id if layout.end_ids is None else lm.source_layout.bos_id
    eos = layout.eos_id if layout.chat and layout.eos_id in lm.end_ids else lm.tokenizer.eos_token_id
    for token, want, have in (
        ("bos id", layout.bos_id, None if layout.chat else bos),
        ("eos id", layout.eos_id, eos),
        ("end ids", layout.end_ids, None if layout.end_ids is None else lm.end_ids),
    ):
        if have != want:
            raise IncompatibleBridge(f"the layout was made with {token} {want}; {lm.name!r} has {have}")


def place(layout: Layout, prompt: Prompt, *, several: bool = False) -> Prompt:
    """The whole of what the receiver is asked: the prompt's own ``{latent}``, else the layout's surroundings of it.

    In a conversation these are put around what the user says first. Where the layout has no chat template, a
    conversation is the text of its turns, line by line. ``several`` sources stand at ``{latents}`` there.
    """
    template = layout.template.replace(LATENT, LATENTS) if several else layout.template
    if isinstance(prompt, str):
        return prompt if _has_place(prompt) else template.replace(PROMPT, prompt)
    if layout.chat is None:
        return place(layout, "\n".join(turn.text for turn in prompt if turn.text), several=several)
    at = next((at for at, turn in enumerate(prompt) if turn.role == "user"), None)
    if at is None or any(_has_place(turn.text) for turn in prompt):
        return prompt
    asked = Turn("user", template.replace(PROMPT, prompt[at].text))
    return (*prompt[:at], asked, *prompt[at + 1 :])


def expand(prompt: Prompt, contents: Sequence[Content]) -> tuple[Prompt, Sequence[Content]]:
    """A prompt with all its places for sources made one, and all that stands there, the text between them included.

    Sources stand where ``{latent}`` does, as often as there are sources, or at one ``{latents}``, each in a line of its
    own behind its number: ``[1] …``. A prompt for one source that says no ``{latents}`` stays as it is.

    Raises:
        InvalidRequest: There are other places than sources, or places in several turns of a conversation.
    """
    texts = [prompt] if isinstance(prompt, str) else [turn.text for turn in prompt]
    named = [at for at, text in enumerate(texts) if _has_place(text)]
    places, lists = (sum(text.count(place) for text in texts) for place in (LATENT, LATENTS))
    if not lists and len(contents) < 2:
        return prompt, contents
    if len(named) != 1 or (places, lists) not in ((0, 1), (len(contents), 0)):
        raise InvalidRequest(
            f"the prompt has {LATENT} {places} times and {LATENTS} {lists} times; for {len(contents)} sources expected "
            f"{LATENT} as often, or {LATENTS} once, in one text",
            param="prompt",
        )
    (at,) = named
    if lists:
        before, after = texts[at].split(LATENTS)
        gaps = [f"{NEXT if number > 1 else ''}[{number}] " for number in range(1, len(contents) + 1)]
    else:
        before, *between, after = texts[at].split(LATENT)
        gaps = ["", *between]
    written = [part for pair in zip(gaps, contents, strict=True) for part in pair]
    whole = f"{before}{LATENT}{after}"
    if isinstance(prompt, str):
        return whole, written
    return (*prompt[:at], Turn(prompt[at].role, whole), *prompt[at + 1 :]), written


def _has_place(text: str) -> bool:
    return LATENT in text or LATENTS in text


def split_template(template: str) -> tuple[str, str]:
    """Text before and after ``{latent}`` (InvalidRequest where it stands twice); without it the latent comes first."""
    before, found, after = template.partition(LATENT)
    if LATENT in after:
        raise InvalidRequest(
            f"{LATENT} stands {template.count(LATENT)} times in the prompt; expected once", param="prompt"
        )
    return (before, after) if found else ("", template)


def _segments(lm: Reader, layout: Layout, prompt: Prompt) -> list[Segment]:
    """The text around the latent, and the tokens of the chat template where the layout has one."""
    if layout.chat is None:
        assert isinstance(prompt, str), "a conversation is placed before it is composed"
        return [prompt]
    turns = [Turn("user", prompt if LATENT in prompt else LATENT + prompt)] if isinstance(prompt, str) else list(prompt)
    if layout.chat.system is not None and turns[0].role != "system":
        turns = [Turn("system", layout.chat.system), *turns]
    return segments(lm, layout.chat, turns)


def compose(
    lm: Reader,
    layout: Layout,
    template: Prompt,
    *,
    latent: Content | Sequence[Content] | None,
    answer: str | None = None,
    max_tokens: int | None = None,
) -> Row:
    """One receiver input: BOS, the template with the latent in its place, and the answer when training.

    A run of text is always tokenised whole, so a source read as text is read the way the model learned to read. What
    follows soft tokens, and the answer, are tokenised as continuations: a tokenizer that marks the start of a text must
    not mark one there. A space directly before soft tokens is left out, since it belongs to the first word of a text.

    Args:
        lm: The model that will read the row.
        layout: Its BOS and EOS policy, and its chat template.
        template: Holds ``{latent}`` at most once; see ``place``.
        latent: What stands at ``{latent}``: K for K soft tokens, a text, several of these one after the other, or None.
            Soft tokens are numbered on through all of them.
        answer: Supervised together with EOS, and nothing else is. In a chat it opens a turn, with no space before it.
        max_tokens: The most the receiver takes, tokens to be generated included.

    Raises:
        InvalidRequest: The row is empty or longer than ``max_tokens``, or the chat template refuses the conversation.
    """
    parts = _segments(lm, layout, template)
    home = _home(parts) if layout.chat else 0
    ids = [] if layout.bos_id is None else [layout.bos_id]
    slots, spoken = [TEXT] * len(ids), ""
    for at, part in enumerate(parts):
        spoken = ""
        if isinstance(part, int):
            ids.append(part)
            slots.append(TEXT)
            continue
        before, after = split_template(part) if at == home else (part, "")
        runs = _runs([before, *(_contents(latent) if at == home else ()), after])
        for place, run in enumerate(runs):
            if isinstance(run, int):
                start = sum(slot != TEXT for slot in slots)
                ids += [0] * run
                slots += range(start, start + run)
                continue
            spoken = run
            text = run.rstrip(" ") if place + 1 < len(runs) else run
            follows = place > 0 or (at > 0 and not lm.begins_again)
            made = _run(lm, text, follows)
            ids += made
            slots += [TEXT] * len(made)
    answer_ids: list[int] = []
    if answer is not None:
        text = answer.removeprefix(" ") if layout.chat else answer
        in_turn = bool(spoken) or not layout.chat
        answer_ids = continuation(lm, text, spoken) if in_turn else _run(lm, text, not lm.begins_again)
        answer_ids = answer_ids + ([] if layout.eos_id is None else [layout.eos_id])
    length = len(ids) + len(answer_ids)
    if not ids:
        raise InvalidRequest("the receiver's input is empty; expected a prompt or a latent", param="prompt")
    if max_tokens is not None and length > max_tokens:
        sources = sum(isinstance(content, int) for content in _contents(latent))
        what = f"the input with {sources} sources" if sources > 1 else "the input"
        raise InvalidRequest(
            f"{what} takes {length} receiver tokens; {max(max_tokens, 0)} fit beside what is to be generated",
            param="prompt",
        )
    return Row(ids + answer_ids, slots + [TEXT] * len(answer_ids), [IGNORE] * len(ids) + answer_ids)


def _contents(latent: Content | Sequence[Content] | None) -> Sequence[Content]:
    return () if latent is None else (latent,) if isinstance(latent, int | str) else latent


def _runs(contents: Sequence[Content]) -> list[Content]:
    """The same contents with neighbouring texts joined, since a text is tokenised whole; nothing empty stays."""
    runs: list[Content] = []
    for content in contents:
        if isinstance(content, str) and runs and isinstance(runs[-1], str):
            runs[-1] += content
        elif content:
            runs.append(content)
    return runs


def _home(parts: Sequence[Segment]) -> int:
    """Which part of a conversation the latent stands in (InvalidRequest unless it is one)."""
    named = [at for at, part in enumerate(parts) if isinstance(part, str) and LATENT in part]
    if len(named) != 1:
        raise InvalidRequest(f"{LATENT} stands in {len(named)} turns; expected it in one", param="messages")
    return named[0]


def _run(lm: Reader, text: str, follows: bool) -> list[int]:
    """A run of text at its start, or where it follows a token of the template."""
    if not text:
        return []
    return continuation(lm, text) if follows else text_ids(lm, text)


def continuation(lm: Reader, text: str, before: str = "") -> list[int]:
    """Tokens of ``text`` where something already stands before it.

    Tried after the real text, then after neutral anchors; where a tokenizer merges across all, the text's own tokens.
    """
    for anchor in (before, ".", "a", "0"):
        if not anchor:
            continue
        head, whole = ids_of_texts(lm, [anchor, anchor + text])
        if head and whole[: len(head)] == head:
            return whole[len(head) :]
    return text_ids(lm, text)


def fit(
    lm: Reader, layout: Layout, template: str, text: str, room: int, answer: str | None = None, *, soft: int = 0
) -> Row:
    """``compose`` with a text, cut to a row of ``room`` tokens (InvalidRequest where the template alone is longer).

    ``soft`` tokens stand directly before the text.
    """
    row, kept = compose(lm, layout, template, latent=(soft, text), answer=answer), len(text_ids(lm, text))
    while len(row) > room and kept > 0:  # again where a cut word joins its neighbours otherwise than the whole did
        kept = max(0, kept - (len(row) - room))
        row = compose(lm, layout, template, latent=(soft, cut_text(lm, text, kept)), answer=answer)
    return row if len(row) <= room else compose(lm, layout, template, latent=soft, answer=answer, max_tokens=room)


def cut_text(lm: Reader, text: str, tokens: int) -> str:
    """The start of ``text`` that the model reads as at most ``tokens`` tokens; half a character can read as more."""
    ids = text_ids(lm, text)
    starts = (decode(lm, ids[:kept], special=True) for kept in range(min(tokens, len(ids)), 0, -1))
    return next((start for start in starts if len(text_ids(lm, start)) <= tokens), "")


def collate(rows: Sequence[Row], *, side: Literal["left", "right"], multiple: int = 1) -> Batch:
    """Pad rows to one length, a ``multiple``. Generation pads left, so every row ends in the same column."""
    B, T = len(rows), -(-max(len(row) for row in rows) // multiple) * multiple
    ids, slots = torch.zeros(B, T, dtype=torch.long), torch.full((B, T), TEXT)
    mask, labels = torch.zeros(B, T, dtype=torch.bool), torch.full((B, T), IGNORE)
    for i, row in enumerate(rows):
        here = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        ids[i, here], slots[i, here] = torch.tensor(row.ids, dtype=torch.long), torch.tensor(row.slots)
        labels[i, here], mask[i, here] = torch.tensor(row.labels, dtype=torch.long), True
    return Batch(ids, slots, mask, (mask.long().cumsum(dim=1) - 1).clamp(min=0), labels)


def embed(lm: FrozenLM, batch: Batch, soft_tokens: Float[Tensor, "B K D"] | None) -> Float[Tensor, "B T D"]:
    """Input embeddings with the soft tokens in place; differentiable in these (IncompatibleBridge at another width)."""
    embeds = lm.embed(batch.ids)
    if soft_tokens is None:
        return embeds
    if soft_tokens.shape[-1] != lm.width:
        raise IncompatibleBridge(f"soft tokens are {soft_tokens.shape[-1]} wide; {lm.name!r} reads {lm.width}")
    at = batch.slots.clamp(min=0)[..., None].expand_as(embeds)
    return torch.where(batch.slots[..., None] == TEXT, embeds, soft_tokens.to(embeds.dtype).gather(1, at))
