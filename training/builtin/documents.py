"""Tokenizers and training documents of the built-in pair.

A document is a list of (text, weight) pieces. Pieces are encoded one by one: both tokenizers cut before every space and
around every newline, so the pieces' tokens are the tokens of the whole. ``END`` stands for the EOS token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from latentwire.bridge.evaluation import world

END = "<end>"
BACKGROUND = 0.1
"""Loss weight of text that cannot be foretold (sources, questions); answers and copies weigh 1."""

Piece = tuple[str, float]


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a stage of training reads: shares of documents by kind; the rest asks questions about a source."""

    steps: int
    copy: float
    """A list of random words, twice: teaches to look back, without which nothing else starts."""
    repeat: float = 0.0
    terse: float = 0.0
    """Share of sources that lose function words, down to "Mara tea.": what a few soft tokens can say."""
    blank: float = 0.0
    """Questions without a source, so that a model with nothing to read still answers in form."""
    relations: int = len(world.RELATIONS)
    wordings: int = 2


def _skeleton() -> Tokenizer:
    """A byte-level BPE that round-trips any text and never merges across a newline or before a space."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _finish(tokenizer: Tokenizer, bos: str, eos: str, pad: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (bos, eos, pad)])
    opening = (bos, tokenizer.token_to_id(bos))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[opening])
    tokens = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, **tokens, model_max_length=512, clean_up_tokenization_spaces=False
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """The receiver's: one token for a word of the world (and for a subject that opens a source), bytes for the rest."""
    openings = ["The", *world.NAMES, *world.THINGS]
    words = [f"Ġ{word}" for word in world.vocabulary()]
    units = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *openings, *words, "Question", "Answer", "Repeat"]
    tokenizer = _skeleton()
    tokenizer.model = models.BPE({unit: id for id, unit in enumerate(units)}, [], ignore_merges=True)
    return _finish(tokenizer, "<s>", "</s>", "<pad>")


def piece_tokenizer(size: int = 576, scenes: int = 4000) -> PreTrainedTokenizerFast:
    """The sender's: BPE trained on the world's text to ``size`` tokens, so that most words take two or three."""
    tokenizer = _skeleton()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 3, initial_alphabet=alphabet, show_progress=False)
    shown = (world.scene("train", 0, index) for index in range(scenes))
    texts = (world.QUESTION.format(latent=scene.source, question=scene.questions[0][0]) for scene in shown)
    tokenizer.train_from_iterator(texts, trainer)
    return _finish(tokenizer, "<|begin|>", "<|end|>", "<|pad|>")


def _without_function_words(fact: world.Fact, keep: float, rng: Random) -> str:
    """The sentence with each word outside subject and value kept with probability ``keep``: "Mara cup tea."."""
    content = {fact.subject, *fact.value.split()} - {"a", "of", "some"}
    words = fact.sentence.removesuffix(".").split()
    kept = [word for word in words if word in content or rng.random() < keep]
    return " ".join(kept) + "."


def _source(told: tuple[world.Fact, ...], terse: float, rng: Random) -> str:
    if rng.random() >= terse:
        return " ".join(fact.sentence for fact in told)
    keep = rng.choice((0.0, 0.5))
    return " ".join(_without_function_words(fact, keep, rng) for fact in told)


def _copy(rng: Random) -> Iterator[Piece]:
    words = " ".join(rng.choice(world.vocabulary()) for _ in range(rng.randint(10, 40)))
    yield f" {words}", BACKGROUND
    yield "\nRepeat:", BACKGROUND
    yield f" {words}", 1.0
    yield END, 1.0


def document(seed: int, index: int, mixture: Mixture, max_questions: int = 6) -> list[Piece]:
    """Training document ``index``, a pure function of its arguments; BOS is not part of it."""
    rng = Random(f"document/{seed}/{index}")
    kind = rng.random()
    if kind < mixture.copy:
        return list(_copy(rng))
    relations = world.RELATIONS[: mixture.relations]
    told = world.facts("train", seed, index, min_facts=2, max_facts=10, relations=relations, wordings=mixture.wordings)
    source = _source(told, mixture.terse, rng)
    if kind < mixture.copy + mixture.repeat:
        return [(source, BACKGROUND), ("\nRepeat:", BACKGROUND), (f" {source}", 1.0), (END, 1.0)]
    pieces: list[Piece] = [] if kind > 1 - mixture.blank else [(source, BACKGROUND)]
    for fact in rng.sample(told, min(len(told), max_questions)):
        asked = world.QUESTION.format(latent="", question=fact.question)
        pieces += [(asked, BACKGROUND), (f" {fact.answer}", 1.0), (END, 1.0)]
    return pieces
