"""A trained bridge and its models, in this process: encode texts, and answer from their latents.

Dimensions used in this file:
    K slots    C latent width    D receiver width
"""

import secrets
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentwire.bridge import engine, wire
from latentwire.bridge.asked import Input, each_of, prompts_of
from latentwire.bridge.checkpoint import BridgeModel, check_receiver, check_sender, folder_of_checkpoint, load_bridge
from latentwire.bridge.config import Manifest, Prompt
from latentwire.bridge.devices import device_named, dtype_named
from latentwire.bridge.diversity import diversity
from latentwire.bridge.encoder import slots_of
from latentwire.bridge.errors import InvalidRequest, at_fault
from latentwire.bridge.gate import Gate, gate_asked, load_gates, watched
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.memory import budget_bytes
from latentwire.bridge.models import FrozenLM, check_role, load_reader
from latentwire.bridge.prompt import Row, compose
from latentwire.bridge.reader import SourceTokens, check_ids, source_tokens
from latentwire.bridge.residency import Residency
from latentwire.bridge.results import Generated, Latent, Output, Scored, Usage, ms_since, timing_since
from latentwire.bridge.sampling import SamplingParams, check_params, sample_params
from latentwire.bridge.scoring import score_from_latents, score_of
from latentwire.bridge.sources import Given, arrange, inputs_of, latent_of, slots_in, texts_of

BATCH_ROWS = 32


class Bridge:
    """A trained bridge: the sender reads texts, a receiver answers from their latents alone.

    >>> bridge = latentwire.Bridge.load("builtin")
    >>> latents = bridge.encode(["Mara wants a cup of tea."])
    >>> bridge.generate(latents, "Question: What does Mara want?\\nAnswer:").texts
    [' Mara wants a cup of tea.']

    Models are loaded when first needed, one at a time, and stay until ``unload``, or until another needs their room.

    Attributes:
        name: The checkpoint it was loaded from, or the name it is served under.
        manifest: What the checkpoint says about itself.
        model: Its weights: the encoder, and a head for each receiver.
        residency: Its models in memory.
        gates: By receiver, which answers from latents are trusted; ``latentwire calibrate`` makes them.
        signing_key: Signs messages; only messages that bear its signature are then decoded.
    """

    def __init__(
        self, name: str, manifest: Manifest, model: BridgeModel, residency: Residency, *,
        signing_key: bytes | None = None, gates: Mapping[str, Gate] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.name, self.manifest, self.model, self.gates = name, manifest, model, gates
        self.residency, self.signing_key = residency, signing_key
        self.reader = cache(load_reader)

    @classmethod
    def load(
        cls,
        name: str | Path = "builtin",
        *,
        device: str | None = None,
        precision: str | None = None,
        memory_budget: str | int | None = None,
    ) -> "Bridge":
        """Load a checkpoint. Its models follow when they are needed.

        >>> latentwire.Bridge.load("builtin").receivers
        ['builtin:llama']

        Args:
            name: A checkpoint folder, the name of a Hub repository that holds one, or ``builtin``.
            device: Where models compute: cpu, cuda, cuda:1, mps or xpu; the best there is, unless given.
            precision: bf16, fp16 or fp32; bf16 on an accelerator and fp32 on a CPU, unless given.
            memory_budget: Most bytes of models at once: ``24GB``, or ``0.8`` of the device. No limit, unless given.

        Raises:
            UnknownBridge: No checkpoint there.
            CorruptCheckpoint: A file is missing or damaged.
            InvalidRequest: The device is not there, or the budget is none.
        """
        placed = device_named(device)
        residency = Residency(budget_bytes(memory_budget, placed), placed, dtype_named(precision, placed))
        return cls.open(str(name), name, residency)

    @classmethod
    def open(
        cls, name: str, checkpoint: str | Path, residency: Residency, *, signing_key: bytes | None = None
    ) -> "Bridge":
        """``load``, under a name of its own, with models that other bridges may share (errors as there)."""
        manifest, model = load_bridge(checkpoint, device=residency.device)
        gates = load_gates(folder_of_checkpoint(checkpoint), manifest)
        return cls(name, manifest, model, residency, signing_key=signing_key, gates=gates)

    def __repr__(self) -> str:
        return f"Bridge({self.name!r}: {self.sender} → {', '.join(self.receivers)})"

    @property
    def sender(self) -> str:
        """Name of the sender."""
        return self.manifest.bridge.sender.name

    @property
    def receivers(self) -> list[str]:
        """Names of the receivers, the default one first."""
        return list(self.manifest.bridge.heads)

    @property
    def model_names(self) -> list[str]:
        """Names of all its models, the sender first."""
        return [self.sender, *self.receivers]

    def encode(self, texts: str | Sequence[str], *, dtype: str = "float16", truncate: bool = False) -> list[Latent]:
        """Let the sender read texts: a latent for each, in order.

        >>> latentwire.Bridge.load().encode("Mara wants a cup of tea.")[0].array.shape
        (3, 128)

        Args:
            texts: One text or several.
            dtype: What the numbers travel in: float16, int8, int4 or float32; with codebooks rq2, rq4 or rq8.
            truncate: Cut a text that is longer than the bridge reads, instead of refusing it.

        Raises:
            InvalidRequest: A text is empty or too long.
            LatentWireError: The sender cannot be loaded, or is not the one the bridge was trained with.
        """
        kind, each = wire.sendable(dtype, self.model.codebooks), each_of(texts, (str,), "text", "a text, or several")
        sources = [self.tokenize(text, truncate=truncate) for text in each]
        encoded: list[engine.Encoded] = []
        with self.lend(self.sender) as sender:
            for start in range(0, len(sources), BATCH_ROWS):
                encoded += engine.encode(self.model, sender, sources[start : start + BATCH_ROWS])
        return [
            Latent(
                data=self.message(row.latent, kind),
                shape=(len(row.latent), row.latent.shape[1]),
                source_tokens=row.source_tokens,
                dtype=kind,
                source_bytes=len(text.encode()),
                truncated=row.truncated,
            )
            for text, row in zip(each, encoded, strict=True)
        ]

    def generate(
        self,
        inputs: Input | Sequence[Input | Sequence[Input]],
        prompt: str | Sequence[str] | Sequence[Mapping[str, Any]],
        *,
        receiver: str | None = None,
        max_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        n: int = 1,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        logprobs: int | None = None,
        truncate: bool = False,
        fallback: str | None = None,
    ) -> Generated:
        """Let a receiver answer a prompt about each input, which it does not see.

        >>> latentwire.Bridge.load().generate("Ben lives in Rome.", "Question: Where does Ben live?\\nAnswer:").texts
        [' Ben lives in Rome.']

        Args:
            inputs: One input or several: texts, messages, or latents. A list among them holds the sources of one input.
            prompt: What is asked: one prompt for all inputs, one for each, or the messages of a conversation
                (``{"role": "user", "content": …}``). ``{latent}`` says where the soft tokens stand; for several
                sources it stands as often, or ``{latents}`` once.
            receiver: Which receiver answers; the first one, unless given.
            max_tokens: Most tokens of an answer.
            temperature: How freely tokens are sampled; 0 takes the likeliest one.
            top_p: Sample from the smallest set of tokens that has this probability.
            top_k: Sample from this many of the likeliest tokens; 0 from all.
            seed: The same seed samples the same answers; drawn anew unless given.
            n: Answers for each input.
            stop: An answer ends before the first of these.
            stop_ids: An answer ends at any of these tokens.
            logprobs: Report the log-probability of each token, and of this many of the likeliest.
            truncate: Cut a text that is longer than the bridge reads, instead of refusing it.
            fallback: ``text`` lets the receiver read the text itself where the bridge's gate does not trust the latent.

        Raises:
            InvalidRequest: Prompt and latent do not fit the receiver, there are not as many prompts as inputs, a
                number is out of its range, or there is no gate for a fallback.
            UnknownBridge: The bridge has no head for the receiver.
            LatentWireError: A model cannot be loaded, or is not the one the bridge was trained with.
        """
        started, name = time.perf_counter(), self.receiver(receiver)
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        params = SamplingParams(
            max_tokens, temperature, top_p, top_k, secrets.randbits(63) if seed is None else seed, stops,
            tuple(stop_ids or ()), logprobs,
        )  # fmt: skip
        check_params(params, n)
        if max_tokens >= (most := self.reader(name).max_tokens):
            raise InvalidRequest(
                f"max_tokens is {max_tokens}; {name!r} reads {most} receiver tokens in all", param="max_tokens"
            )
        gate, each = gate_asked(self.gates, self.name, name, fallback), inputs_of(inputs)
        prompts = prompts_of(prompt, len(each))
        texts = self._rows(name, texts_of(each), prompts, params, n) if gate else []
        sources, source_tokens = self._sources(each, truncate)
        encode_ms = ms_since(started)
        rows = self._rows(name, sources, prompts, watched(params) if gate else params, n)
        answers = self._answers(name, rows)
        generated_tokens = sum(answer.token_count for answer in answers)
        verdicts: Iterable[Any] = [()] * len(answers)
        if gate:
            verdicts = judged = gate.judge(answers)
            instead = self._answers(name, [texts[number] for number in judged.refused])
            generated_tokens += sum(answer.token_count for answer in instead)
            answers = judged.given(answers, instead, params)
        outputs = tuple(
            Output(index, answer.text, answer.finish_reason, answer.token_count, answer.logprobs, *verdict)
            for index, (answer, verdict) in enumerate(zip(answers, verdicts, strict=True))
        )
        return Generated(
            id=f"gen_{uuid.uuid4().hex}",
            bridge=self.name,
            outputs=outputs,
            usage=Usage(source_tokens, sum(map(slots_in, sources)), generated_tokens),
            timing=timing_since(started, encode_ms),
            diversity=diversity([output.text for output in outputs]),
        )

    def score(
        self,
        inputs: Input | Sequence[Input | Sequence[Input]],
        prompt: str | Sequence[str] | Sequence[Mapping[str, Any]],
        choices: str | Sequence[str],
        *,
        receiver: str | None = None,
        end: bool = True,
        logprobs: bool = False,
        truncate: bool = False,
    ) -> Scored:
        """How likely a receiver finds each of some continuations of a prompt about each input.

        >>> bridge, choices = latentwire.Bridge.load(), [" Mara wants tea.", " Mara wants a cup of tea."]
        >>> scored = bridge.score("Mara wants a cup of tea.", "Question: What does Mara want?\\nAnswer:", choices)
        >>> scored[0].best, round(scored[0][1].probability)
        (1, 1)

        Args:
            inputs: As of ``generate``.
            prompt: As of ``generate``.
            choices: One continuation or several, each with the space that leads it.
            receiver: As of ``generate``.
            end: The end of the answer counts as a token of each: exactly this is said. Off, this is how it begins.
            logprobs: Report the log-probability of each token.
            truncate: As of ``generate``.

        Raises:
            InvalidRequest: A choice is empty, or as of ``generate`` (and so are the other errors).
        """
        started, name = time.perf_counter(), self.receiver(receiver)
        texts = each_of(choices, (str,), "choice", "a text, or several")
        each = inputs_of(inputs)
        prompts = prompts_of(prompt, len(each))
        sources, source_tokens = self._sources(each, truncate)
        encode_ms = ms_since(started)
        questions = [self.continue_with(name, *both, texts, end=end) for both in zip(sources, prompts, strict=True)]
        with self.lend(name) as lm:
            found = score_from_latents(self.model, name, lm, [latent_of(given) for given in sources], questions)
        return Scored(
            id=f"score_{uuid.uuid4().hex}",
            bridge=self.name,
            scores=tuple(score_of(self.reader(name), texts, one, logprobs=logprobs) for one in found),
            usage=Usage(source_tokens, sum(map(slots_in, sources))),
            timing=timing_since(started, encode_ms),
        )

    def unload(self) -> int:
        """Let the models go; bytes of memory that came back (ModelInUse while one of them works)."""
        return sum(self.residency.unload(name) for name in self.model_names)

    def receiver(self, name: str | None) -> str:
        """The receiver of a name, or the first one (UnknownBridge where the bridge has no head for it)."""
        if name is not None:
            self.model.head(name)
        return name or self.model.default_receiver

    def message(self, latent: NDArray[np.float32], dtype: wire.DType = "float16") -> bytes:
        """A latent (K, C) of this bridge as it crosses the wire."""
        return wire.encode(latent, self.manifest.bridge_id, dtype, key=self.signing_key, codebooks=self.model.codebooks)

    def decode(self, message: bytes) -> NDArray[np.float32]:
        """The latent (K, C) of a message, checked (InvalidMessage, IncompatibleBridge, Forbidden)."""
        config = self.manifest.bridge
        return wire.decode(
            message,
            bridge_id=self.manifest.bridge_id,
            latent_dim=config.encoder.latent_dim,
            max_slots=slots_of(config.encoder, config.max_source_tokens),
            key=self.signing_key,
            codebooks=self.model.codebooks,
        ).latent

    def tokenize(self, text: str, *, truncate: bool = False) -> SourceTokens:
        """What the sender reads of a text (InvalidRequest where that is nothing, or too much)."""
        return source_tokens(self.manifest.bridge, self.reader(self.sender), text, truncate=truncate)

    def compose(
        self, receiver: str, given: Given, prompt: Prompt, params: SamplingParams, answer: str | None = None
    ) -> Row:
        """A prompt with what is given, and any answer to be scored (InvalidRequest: no room, odd ids or places)."""
        reader, layout = self.reader(receiver), self.manifest.bridge.heads[receiver].layout
        with at_fault("stop_ids"):
            check_ids(reader, params.stop_ids)
        try:
            placed, contents = arrange(layout, prompt, given)
            room = reader.max_tokens - params.max_tokens
            return compose(reader, layout, placed, latent=contents, answer=answer, max_tokens=room)
        except InvalidRequest as error:
            error.param = error.param or "prompt"
            raise

    def continue_with(
        self, receiver: str, given: Given, prompt: Prompt, choices: Sequence[str], *, end: bool
    ) -> list[Row]:
        """``compose`` with each of some continuations, which are to be scored (InvalidRequest where one is empty)."""
        if not choices or "" in choices:
            raise InvalidRequest("a choice is empty; expected one text or several", param="choices")
        last = None if end or self.manifest.bridge.heads[receiver].layout.eos_id is None else -1
        unsaid = SamplingParams(max_tokens=0)
        return [self.compose(receiver, given, prompt, unsaid, choice)[:last] for choice in choices]

    def _rows(
        self, receiver: str, sources: Sequence[Given], prompts: Sequence[Prompt], params: SamplingParams, n: int
    ) -> list[engine.LatentPrompt]:
        return [
            engine.LatentPrompt(
                self.compose(receiver, given, asked, params), latent_of(given), sample_params(params, sample)
            )
            for given, asked in zip(sources, prompts, strict=True)
            for sample in range(n)
        ]

    def _answers(self, receiver: str, rows: Sequence[engine.LatentPrompt]) -> list[Generation]:
        answers: list[Generation] = []
        with self.lend(receiver) as lm:
            for start in range(0, len(rows), BATCH_ROWS):
                answers += engine.generate_from_latents(self.model, receiver, lm, rows[start : start + BATCH_ROWS])[0]
        return answers

    def check(self, lm: FrozenLM) -> None:
        """Refuse a model that is not the one of its name that the bridge was trained with (IncompatibleBridge)."""
        if lm.name == self.sender:  # one model can be both
            check_sender(self.manifest.bridge, lm)
        if lm.name in self.manifest.bridge.heads:
            check_receiver(self.manifest.bridge, lm.name, lm)

    def _sources(self, inputs: Sequence[Input | tuple[Input, ...]], truncate: bool) -> tuple[list[Given], int]:
        """The latents of inputs, and the tokens that the sender read for them."""
        flat = [one for item in inputs for one in (item if isinstance(item, tuple) else (item,))]
        texts = [one for one in flat if isinstance(one, str)]
        encoded = self.encode(texts, truncate=truncate) if texts else []
        read = iter(encoded)
        messages = [next(read) if isinstance(one, str) else one for one in flat]
        latents = iter([self.decode(one.data if isinstance(one, Latent) else bytes(one)) for one in messages])
        given: list[Given] = [
            tuple(next(latents) for _ in one) if isinstance(one, tuple) else next(latents) for one in inputs
        ]
        return given, sum(latent.source_tokens for latent in encoded)

    @contextmanager
    def lend(self, name: str) -> Iterator[FrozenLM]:
        """One of the bridge's models, checked, which stays in memory while the block runs.

        Raises:
            ModelUnavailable: It is not there, or cannot play its role.
            IncompatibleBridge: It is not the one that the bridge was trained with.
            InsufficientMemory: It does not fit the memory budget.
        """
        if name == self.sender:
            check_role(name, "sender")
        if name in self.receivers:
            check_role(name, "receiver")
        with self.residency.use(name) as lm:
            self.check(lm)
            yield lm
