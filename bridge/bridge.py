"""A trained bridge and its models, in this process: encode texts, and answer from their latents.

Dimensions used in this file:
    K slots    C latent width    D receiver width
"""

import secrets
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import torch

from latentwire.bridge import engine, wire
from latentwire.bridge.asked import Input, each_of, originals_of, prompts_of
from latentwire.bridge.checkpoint import folder_of_checkpoint, load_bridge
from latentwire.bridge.config import Prompt
from latentwire.bridge.devices import device_named, dtype_named
from latentwire.bridge.diversity import diversity
from latentwire.bridge.drift import load_statistics
from latentwire.bridge.errors import InvalidRequest, at_fault
from latentwire.bridge.gate import as_asked, gate_asked, load_gates, watched
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.memory import budget_bytes
from latentwire.bridge.opened import OpenBridge
from latentwire.bridge.parking import HostCopies
from latentwire.bridge.readback import as_said, readings_of, taught
from latentwire.bridge.remote import addresses_of, answers_of, check_named, parse_addresses
from latentwire.bridge.residency import Residency
from latentwire.bridge.results import Generated, Latent, Output, ReadBack, Scored, Usage, ms_since, timing_since
from latentwire.bridge.sampling import SamplingParams, check_params, sample_params
from latentwire.bridge.scoring import Continuation, score_from_latents, score_of
from latentwire.bridge.sources import Given, inputs_of, latent_of, slots_in, texts_of

BATCH_ROWS = 32


class Bridge(OpenBridge):
    """A trained bridge: the sender reads texts, a receiver answers from their latents alone.

    >>> bridge = latentwire.Bridge.load("builtin")
    >>> latents = bridge.encode(["Mara wants a cup of tea."])
    >>> bridge.generate(latents, "Question: What does Mara want?\\nAnswer:").texts
    [' Mara wants a cup of tea.']

    Models are loaded when first needed, one at a time, and stay until ``unload``, or until another needs their room.
    """

    @classmethod
    def load(
        cls,
        name: str | Path = "builtin",
        *,
        device: str | None = None,
        precision: str | None = None,
        memory_budget: str | int | None = None,
        receiver: str | None = None,
    ) -> "Bridge":
        """Load a checkpoint. Its models follow when they are needed.

        >>> latentwire.Bridge.load("builtin").receivers
        ['builtin:llama']

        Args:
            name: A checkpoint folder, a Hub repository that holds one (``hf://owner/name``), or ``builtin``.
            device: Where models compute: cpu, cuda, cuda:1, mps or xpu; the best there is, unless given.
            precision: bf16, fp16 or fp32; bf16 on an accelerator and fp32 on a CPU, unless given.
            memory_budget: Most bytes of models at once: ``24GB``, or ``0.8`` of the device. No limit, unless given.
            receiver: ``vllm:http://HOST:PORT`` lets the receiver answer on that vLLM server; of several receivers
                ``NAME=vllm:http://HOST:PORT`` those that are named, with commas between them.

        Raises:
            UnknownBridge: No checkpoint there.
            CorruptCheckpoint: A file is missing or damaged.
            InvalidRequest: The device is not there, the budget is none, or no server or receiver is spelled like that.
        """
        placed = device_named(device)
        budget, copies = budget_bytes(memory_budget, placed), HostCopies.beside(placed)
        residency = Residency(budget, placed, dtype_named(precision, placed), copies=copies)
        addresses = parse_addresses(receiver)
        bridge = cls.open(str(name), name, residency, addresses=addresses)
        check_named(addresses, bridge.receivers)
        return bridge

    from_pretrained = load
    """The word of the Hub's libraries for it."""

    @classmethod
    def open(
        cls,
        name: str,
        checkpoint: str | Path,
        residency: Residency,
        *,
        senders: Residency | None = None,
        signing_key: bytes | None = None,
        addresses: Mapping[str | None, str] = MappingProxyType({}),
    ) -> "Bridge":
        """``load``, under a name of its own, with models that other bridges may share (errors as there).

        ``senders`` holds senders on a device of their own. Latents cross between devices as they cross the wire: the
        encoder is where the sender is, heads are where the receivers are. ``addresses`` of vLLM servers are those of
        ``remote.parse_addresses``, which may name receivers of other bridges.
        """
        manifest, model = load_bridge(checkpoint, device=torch.device("cpu"))
        folder, remote = folder_of_checkpoint(checkpoint), addresses_of(addresses, list(manifest.bridge.heads))
        bridge = cls(
            name, manifest, model, residency, senders=senders, signing_key=signing_key, remote=remote,
            gates=load_gates(folder, manifest), statistics=load_statistics(folder, manifest),
        )  # fmt: skip
        model.encoder.to(bridge.home(bridge.sender).device)
        model.heads.to(residency.device)
        return bridge

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
            answers = judged.given([as_asked(answer, params) for answer in answers], instead)
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
        fallback: str | None = None,
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
            fallback: ``text`` scores from the text itself where the bridge's gate does not trust what the receiver
                answers from the latent; that answer, as long as the longest choice, is generated for it.

        Raises:
            InvalidRequest: A choice is empty, or as of ``generate`` (and so are the other errors).
        """
        started, name = time.perf_counter(), self.receiver(receiver)
        texts = each_of(choices, (str,), "choice", "a text, or several")
        gate, each = gate_asked(self.gates, self.name, name, fallback), inputs_of(inputs)
        prompts = prompts_of(prompt, len(each))
        if gate:
            how, instead = self.judging(name, texts, end=end), texts_of(each)
            self._rows(name, instead, prompts, how, 1)  # one without room is refused before any work
        sources, source_tokens = self._sources(each, truncate)
        encode_ms = ms_since(started)
        slots, generated_tokens = sum(map(slots_in, sources)), 0
        verdicts: Iterable[Any] = [()] * len(each)
        if gate:
            answers = self._answers(name, self._rows(name, sources, prompts, how, 1))
            generated_tokens = sum(answer.token_count for answer in answers)
            verdicts = judged = gate.judge(answers)
            sources = judged.given(sources, [instead[number] for number in judged.refused])
            slots += sum(map(slots_in, sources))
        questions = [self.continue_with(name, *both, texts, end=end) for both in zip(sources, prompts, strict=True)]
        with self.lend(name) as lm:
            found = score_from_latents(self.model, name, lm, [latent_of(given) for given in sources], questions)
        return Scored(
            id=f"score_{uuid.uuid4().hex}",
            bridge=self.name,
            scores=tuple(
                score_of(self.reader(name), texts, one, *verdict, logprobs=logprobs)
                for one, verdict in zip(found, verdicts, strict=True)
            ),
            usage=Usage(source_tokens, slots, generated_tokens),
            timing=timing_since(started, encode_ms),
        )

    def read(
        self,
        inputs: Input | Sequence[Input],
        *,
        against: str | Sequence[str] | None = None,
        receiver: str | None = None,
        max_tokens: int | None = None,
        truncate: bool = False,
    ) -> ReadBack:
        """What a receiver takes each latent to say: its source, said again from the latent alone. For audits.

        >>> bridge, text = latentwire.Bridge.load(), "Ben lives in Oslo. Mara wants a cup of tea."
        >>> reading = bridge.read(bridge.encode(text), against=text)[0]
        >>> reading.text, reading.against.mean > -0.1
        ('Ben lives in Oslo. Mara wants a cup of tea.', True)

        Args:
            inputs: One input or several: messages, latents, or texts, which the sender reads first.
            against: The original of each, to report how likely the receiver finds it.
            receiver: As of ``generate``.
            max_tokens: Most tokens of a reading; unless given, twice what the latent's source can have had.
            truncate: As of ``generate``.

        Raises:
            InvalidRequest: There are not as many originals as inputs, one is empty, or as of ``generate`` (and so are
                the other errors).
        """
        started, name = time.perf_counter(), self.receiver(receiver)
        each = each_of(inputs, get_args(Input), "input", "a text, a message in bytes or a Latent")
        originals = originals_of(against, len(each))
        check_params(SamplingParams(1 if max_tokens is None else max_tokens))
        sources, source_tokens = self._sources(each, truncate)
        encode_ms = ms_since(started)
        latents = [latent for latent in map(latent_of, sources) if latent is not None]
        prompt, params = self.readings(name, latents, max_tokens)
        with at_fault("max_tokens"):
            rows = [
                engine.LatentPrompt(self.compose(name, latent, prompt, how), latent, how)
                for latent, how in zip(latents, params, strict=True)
            ]
        with at_fault("against"):
            questions = [
                self.continue_with(name, latent, prompt, [as_said(text)], end=True)
                for latent, text in zip(latents, originals, strict=False)
            ]
        answers = self._answers(name, rows)
        found: list[list[Continuation]] = []
        if questions:
            with self.lend(name) as lm:
                found = score_from_latents(self.model, name, lm, latents, questions)
        return ReadBack(
            id=f"read_{uuid.uuid4().hex}",
            bridge=self.name,
            trained=taught(self.manifest.bridge, name) is not None,
            readings=readings_of(answers, originals, found),
            usage=Usage(
                source_tokens,
                sum(map(len, latents)) * (2 if questions else 1),
                sum(answer.token_count for answer in answers),
            ),
            timing=timing_since(started, encode_ms),
        )

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
        if receiver in self.remote:
            remote = self.remote_engine(receiver)
            return answers_of(remote, rows, partial(self.soft, receiver, remote.lm))
        with self.lend(receiver) as lm:
            for start in range(0, len(rows), BATCH_ROWS):
                answers += engine.generate_from_latents(self.model, receiver, lm, rows[start : start + BATCH_ROWS])[0]
        return answers

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
