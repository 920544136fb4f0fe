"""A small world of facts in plain English, for measuring what crosses a bridge.

A *source* is a handful of facts about distinct subjects, one sentence each ("Mara lives in Rome. The lamp is red.").
A question names one subject, and its answer is the fact in its canonical wording, whatever words the source used. A
scene draws on one to three relations only, so that several subjects share a relation and nothing but *binding* (whose
value is it?) tells the answers apart.

**Held out.** A combination (subject, relation, value) belongs to the train or the test split by a hash of its words,
about one in eight to test. Every sentence of a test source is therefore one that no training source ever held.

**Base rate.** Without the source, the question still gives away all of the answer but the value. A reader who knows the
world and nothing of the split is right once in ``len(values)`` (see ``base_rate``: about 4 %); one who learnt the
training split's combinations by heart is right less often, because those are never the answer in the test split.

Everything is a pure function of (split, seed, index): a position in the data is one integer. No torch here.
"""

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal
from zlib import crc32

Split = Literal["train", "test"]

QUESTION = "{latent}\nQuestion: {question}\nAnswer:"
"""The receiver's prompt; the answer is " " + sentence, then EOS. ``{latent}`` is where the source stands."""
REPEAT = "{latent}\nRepeat:"
"""The prompt for dense reconstruction; the answer is " " + source, then EOS."""

NAMES = tuple(
    "Mara Ben Lina Omar Tess Hugo Nora Ivan Cleo Felix Greta Jonas Kira Leo Maya Nils Olga Pablo Rosa Sven Tara Victor "
    "Wanda Yusuf Zara Anton Bella Carl Dora Emil Fiona Gus Helga Igor Judy Kurt Lola Marco Nadia Otto Petra Ralf Sonja "
    "Tom Ursula Vera Willy Yara".split()
)
THINGS = tuple(
    "lamp chair ladder basket piano mirror kettle clock bucket pillow drum vase broom candle blanket barrel wagon sofa "
    "guitar trunk statue carpet teapot globe".split()
)
ACTS = tuple(
    "sings dances paints swims reads writes cooks jogs skates sleeps climbs fishes knits whistles prays travels sails "
    "dreams teaches juggles hunts surfs draws gardens".split()
)
WISHES = tuple(
    "a cup of tea|a piece of cake|a bowl of soup|a glass of milk|a new coat|a warm hat|a long holiday|a fast bicycle|"
    "some fresh bread|some sweet honey|a quiet evening|a good friend|a silver ring|a wooden boat|a pair of shoes|"
    "a bag of apples|some ripe cheese|a ticket home|a soft bed|a sharp knife|a box of chocolate|a clean shirt|"
    "a big garden|a jar of jam".split("|")
)
CITIES = tuple(
    "Rome Paris London Berlin Madrid Vienna Prague Oslo Athens Cairo Tokyo Lima Boston Dublin Warsaw Lisbon Delhi "
    "Moscow Sydney Havana Geneva Milan Seoul Chicago".split()
)
JOBS = tuple(
    "baker doctor farmer lawyer nurse painter pilot plumber sailor singer tailor teacher waiter writer dentist judge "
    "miner porter soldier butcher gardener hunter banker dancer".split()
)
NUMBERS = tuple(
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty thirty forty fifty".split()
)
HERD = ("cats", "dogs", "hens", "goats", "ducks", "horses")
ROOMS = tuple(
    "kitchen hall garage attic cellar bathroom bedroom library office pantry stable tower barn chapel tent cabin "
    "workshop corridor studio nursery shed lobby".split()
)
COLOURS = tuple(
    "red blue green yellow black white brown grey pink purple orange violet golden beige scarlet crimson turquoise "
    "maroon olive lilac".split()
)


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact. ``statements`` are its wordings, the canonical one (used in answers) first."""

    name: str
    subjects: tuple[str, ...]
    values: tuple[str, ...]
    question: str
    statements: tuple[str, ...]
    candidates: int
    """Values that fit a question: less than ``len(values)`` where the question gives a part of the value away."""


def _relation(name: str, subjects: tuple[str, ...], values: tuple[str, ...], question: str, *said: str) -> Relation:
    return Relation(name, subjects, values, question, said, len(values))


RELATIONS = (
    _relation("act", NAMES, ACTS, "What does {s} do?", "{s} {v}.", "{s} often {v}."),
    _relation("wish", NAMES, WISHES, "What does {s} want?", "{s} wants {v}.", "{s} would like {v}."),
    _relation("home", NAMES, CITIES, "Where does {s} live?", "{s} lives in {v}.", "{s} has a house in {v}."),
    _relation("job", NAMES, JOBS, "What is the job of {s}?", "{s} works as a {v}.", "{s} is a {v}."),
    Relation(
        "herd",
        NAMES,
        tuple(f"{number} {animal}" for number in NUMBERS for animal in HERD),
        "How many {last} does {s} have?",
        ("{s} has {v}.", "{s} owns {v}."),
        len(NUMBERS),
    ),
    _relation("place", THINGS, ROOMS, "Where is the {s}?", "The {s} is in the {v}.", "The {s} stands in the {v}."),
    _relation("colour", THINGS, COLOURS, "What colour is the {s}?", "The {s} is {v}.", "The {s} looks {v}."),
)


@dataclass(frozen=True, slots=True)
class Fact:
    """One sentence of a source: ``wording`` indexes the relation's statements."""

    subject: str
    relation: Relation
    value: str
    wording: int = 0

    @property
    def sentence(self) -> str:
        """The fact as the source words it."""
        return self.relation.statements[self.wording].format(s=self.subject, v=self.value)

    @property
    def question(self) -> str:
        """The question that this fact answers."""
        return self.relation.question.format(s=self.subject, last=self.value.split()[-1])

    @property
    def answer(self) -> str:
        """The fact in its canonical wording."""
        return self.relation.statements[0].format(s=self.subject, v=self.value)


@dataclass(frozen=True, slots=True)
class Scene:
    """A source and the (question, answer) pairs it decides, in the order of its sentences."""

    source: str
    questions: tuple[tuple[str, str], ...]


def split_of(subject: str, relation: str, value: str) -> Split:
    """The split that owns a combination: a hash of its words, the same on every machine and Python."""
    return "test" if crc32(f"{subject}|{relation}|{value}".encode()) % 8 == 0 else "train"


@cache
def _values(split: Split, subject: str, relation: Relation) -> tuple[str, ...]:
    return tuple(value for value in relation.values if split_of(subject, relation.name, value) == split)


def facts(
    split: Split,
    seed: int,
    index: int,
    *,
    min_facts: int = 4,
    max_facts: int = 8,
    relations: tuple[Relation, ...] = RELATIONS,
    wordings: int = 2,
) -> tuple[Fact, ...]:
    """The facts of scene ``index``: distinct subjects, one to three relations, combinations of ``split`` only.

    Fewer ``relations`` or ``wordings`` make an easier world, which is how a model's training starts.
    """
    if not 1 <= min_facts <= max_facts <= len(THINGS) // 2:
        raise ValueError(f"facts per scene must be within 1..{len(THINGS) // 2}, got {min_facts}..{max_facts}")
    rng = Random(f"{split}/{seed}/{index}")
    kinds = rng.sample(relations, min(rng.randint(1, 3), len(relations)))
    count = rng.randint(min_facts, max_facts)
    chosen: dict[str, Fact] = {}
    while len(chosen) < count:
        relation = rng.choice(kinds)
        subject = rng.choice(relation.subjects)
        values = _values(split, subject, relation)  # empty for a few subjects of the test split
        if values and subject not in chosen:
            wording = rng.randrange(min(wordings, len(relation.statements)))
            chosen[subject] = Fact(subject, relation, rng.choice(values), wording)
    return tuple(chosen.values())


def scene(split: Split, seed: int, index: int, *, min_facts: int = 4, max_facts: int = 8) -> Scene:
    """Scene ``index`` of a split: its source (sentences joined by spaces) and one question per fact."""
    told = facts(split, seed, index, min_facts=min_facts, max_facts=max_facts)
    return Scene(" ".join(fact.sentence for fact in told), tuple((fact.question, fact.answer) for fact in told))


def questions(
    split: Split, seed: int, count: int, *, min_facts: int = 4, max_facts: int = 8
) -> list[tuple[str, str, str]]:
    """``count`` triples (source, question, answer), one question drawn from each of ``count`` scenes."""
    drawn = []
    for index in range(count):
        shown = scene(split, seed, index, min_facts=min_facts, max_facts=max_facts)
        question, answer = Random(f"{split}/{seed}/{index}/question").choice(shown.questions)
        drawn.append((shown.source, question, answer))
    return drawn


def base_rate() -> float:
    """Expected exact match without the source: the mean over relations of one in the number of fitting values."""
    return sum(1 / relation.candidates for relation in RELATIONS) / len(RELATIONS)


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word of sources, questions, answers and prompts, sorted, without punctuation."""
    texts = [QUESTION, REPEAT, *NAMES, *THINGS]
    for relation in RELATIONS:
        texts += [*relation.values, *relation.statements, relation.question]
    for mark in ("{latent}", "{question}", "{last}", "{s}", "{v}", ".", "?", ":"):
        texts = [text.replace(mark, " ") for text in texts]
    return tuple(sorted({word for text in texts for word in text.split()}))
