"""lm-evaluation-harness asks a bridge: its own tasks, offline, with our conditions in the latent's place."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.errors import InvalidRequest, LeakFound
from latentwire.bridge.evaluation import harness_main
from latentwire.bridge.evaluation.conditions import CONDITIONS
from latentwire.bridge.evaluation.harness import BridgeLM, templates_of
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import compose
from latentwire.bridge.scoring import score

# What the packages of other people's tasks say when they are imported.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "DeprecationWarning", "SyntaxWarning")
]
TASKS = Path(lm_eval.__file__).parent / "tasks"
MARA, BEN = "Mara wants a cup of tea. Ben lives in Rome.", "Ben wants a new lamp. Mara lives in Paris."
ROWS: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {"passage": MARA, "question": "does mara want tea", "label": 1, "idx": 0},
        {"passage": BEN, "question": "does ben live in rome", "label": 0, "idx": 1},
    ],
    "squad_completion": [
        {"text": f"{MARA} Mara wants a cup of", "value": "tea", "title": "Mara"},
        {"text": f"{BEN} Mara lives in", "value": "Paris", "title": "Ben"},
    ],
    "drop": [
        {
            "query_id": str(number), "passage": passage, "question": question,
            "answer": {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": [answer]},
            "validated_answers": {"number": [], "date": [], "spans": []},
        }
        for number, (passage, question, answer) in enumerate(
            [(MARA, "Where does Ben live?", "Rome"), (BEN, "Where does Mara live?", "Paris")]
        )
    ],
    "arc_easy": [
        {
            "id": str(number), "question": question, "choices": {"text": ["Tea", "Sand"], "label": ["A", "B"]},
            "answerKey": "A",
        }
        for number, question in enumerate(["What does Mara drink?", "What does Ben drink?"])
    ],
    "longbench_2wikimqa_e": [
        {"context": passage, "question": question, "answers": [answer], "all_classes": []}
        for passage, question, answer in [
            (MARA, "Where does Ben live?", "Ben lives in Rome."),
            (BEN, "Where does Mara live?", "Mara lives in Paris."),
        ]
    ],
}  # fmt: skip
INCLUDED = {
    "boolq": ("super_glue/boolq/default.yaml", "validation"),
    "drop": ("drop/default.yaml", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "longbench_2wikimqa_e": ("longbench/2wikimqa_e.yaml", "test"),
}
SCORES = {
    "boolq": "acc", "squad_completion": "contains", "drop": "f1", "arc_easy": "acc", "longbench_2wikimqa_e": "score",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The harness's own tasks, with small local files for their data."""
    root = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        write(root)
        yield root


def write(root: Path) -> None:
    for task, rows in ROWS.items():
        _, split = INCLUDED.get(task, ("", "validation"))
        data = root / "data" / task
        data.mkdir(parents=True)
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if task == "squad_completion":  # a class, which names its data itself
            (root / "local.py").write_text(
                "from lm_eval.tasks.squad_completion.task import SQUADCompletion\n"
                f"class Local(SQUADCompletion):\n    DATASET_PATH = {str(data)!r}\n"
            )
            (root / "squad.yaml").write_text(f"task: {task}\nclass: !function local.Local\n")
            continue
        splits = "".join(
            f"{name}_split: {split if name != 'training' else 'null'}\n" for name in ("training", "validation", "test")
        )
        (root / f"{task}.yaml").write_text(
            f"include: {TASKS / INCLUDED[task][0]}\ntask: {task}\ndataset_path: {data}\ndataset_name: null\n{splits}"
        )


@pytest.fixture(scope="module")
def tasks(folder: Path) -> TaskManager:
    return TaskManager(include_path=str(folder))


def evaluated(tasks: TaskManager, names: list[str], **arguments: Any) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model="latentwire", model_args={"checkpoint": "builtin", **arguments}, tasks=list(names), limit=2,
        bootstrap_iters=0, task_manager=tasks,
    )  # fmt: skip
    assert found is not None
    return dict(found)


@pytest.mark.parametrize("condition", ["bridge", "none"])
def test_other_peoples_tasks_run_offline_with_a_condition_in_the_latents_place(
    tasks: TaskManager, condition: str
) -> None:
    found = evaluated(tasks, list(ROWS), condition=condition)
    scores = {task: float(found["results"][task][f"{metric},none"]) for task, metric in SCORES.items()}
    assert all(0 <= score <= 1 for score in scores.values()) and found["results"].keys() == ROWS.keys()
    assert (scores["squad_completion"] > 0) == (condition == "bridge")


@pytest.fixture(scope="module")
def lm() -> BridgeLM:
    return BridgeLM("builtin", batch_size=3)


def asked(kind: Any, number: int, *arguments: Any, task: str = "drop", **doc: str) -> Instance:
    return Instance(kind, {"passage": MARA, **doc}, arguments, 0, (task, number, 1))


PROMPT = "Question: Where does Ben live?\nAnswer:"
CHOICES = [" Ben lives in Rome.", " Ben lives in Paris.", " tea"]


def test_requests_get_what_the_bridge_gives_whatever_their_order(lm: BridgeLM) -> None:
    bridge = Bridge.load()
    requests = [
        asked("loglikelihood", number, f"{passage}\n{PROMPT}", choice, passage=passage)
        for choice in CHOICES
        for number, passage in enumerate([MARA, BEN])
    ]
    found = lm.loglikelihood(requests)
    for number, passage in enumerate([MARA, BEN]):
        wanted = bridge.score(passage, "{latent}\n" + PROMPT, CHOICES, end=False)[0].choices
        near = pytest.approx([choice.logprob for choice in wanted], abs=1e-3)
        assert [logprob for logprob, _ in found[number::2]] == near
    assert [greedy for _, greedy in found[::2]] == [True, False, False]
    few = {"until": ["Rome", "\n"], "max_gen_toks": 16}
    whole = {"until": [], "do_sample": False, "temperature": 1}
    said = lm.generate_until([asked("generate_until", 0, f"{MARA}\n{PROMPT}", kind) for kind in (few, whole)])
    assert said == [" Ben lives in ", bridge.generate(MARA, "{latent}\n" + PROMPT).texts[0]]


def test_a_source_that_comes_beside_its_latent_stops_the_harness() -> None:
    leaking = BridgeLM("builtin")
    leaking.condition = replace(leaking.condition, read=CONDITIONS["direct"].read)
    with pytest.raises(LeakFound, match=r"example 1: beside its soft tokens the receiver reads '<s>Marawants"):
        leaking.loglikelihood([asked("loglikelihood", 0, f"{MARA}\n{PROMPT}", CHOICES[0])])


def test_examples_before_the_question_stay_text_and_nothing_asked_is_nothing_read(lm: BridgeLM) -> None:
    shown = f"{BEN}\nQuestion: Where does Mara live?\nAnswer: Mara lives in Paris.\n\n"
    bridge = Bridge.load()
    requests = [asked("loglikelihood", 0, prompt, CHOICES[0]) for prompt in (f"{shown}{MARA}\n{PROMPT}", "")]
    (with_example, _), (unasked, _) = lm.loglikelihood(requests)
    wanted = bridge.score(MARA, shown + "{latent}\n" + PROMPT, CHOICES[0], end=False)[0][0].logprob
    assert with_example == pytest.approx(wanted, abs=1e-3) and unasked < with_example


def test_direct_reads_what_the_harness_wrote() -> None:
    lm = BridgeLM("builtin", "direct")
    prompt, context = f"Text: {MARA}\n{PROMPT}", lm.context
    ((found, _),) = lm.loglikelihood([asked("loglikelihood", 0, prompt, CHOICES[0])])
    assert isinstance(context.receiver, FrozenLM)
    row = compose(context.receiver, context.layout, prompt, latent=None, answer=CHOICES[0])
    assert found == pytest.approx(score(context.receiver, [[row[:-1]]], None)[0][0].logprob, abs=1e-4)


def test_a_file_names_what_the_sender_reads_of_other_tasks(tmp_path: Path) -> None:
    file = tmp_path / "templates.toml"
    file.write_text("[news]\nsource = '{{title}}'\nprompt = '{latent} {{passage}}?'\n")
    lm = BridgeLM("builtin", templates=str(file))
    ((found, _),) = lm.loglikelihood([asked("loglikelihood", 0, "whatever", " yes", task="news", title="Mara sings.")])
    wanted = Bridge.load().score("Mara sings.", "{latent} " + MARA + "?", " yes", end=False)[0][0].logprob
    assert found == pytest.approx(wanted, abs=1e-3) and set(templates_of(str(file))) > {"news", "boolq", "arc_*"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[news", "not TOML"),
        ("[news]\nprompt = 'a'", "news.source: Field required"),
        ("[news]\nsource = 'a'\nprompt = 'b'", "news.prompt must hold {latent} once"),
    ],
)
def test_a_wrong_file_of_templates_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "templates.toml"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=named):
        templates_of(str(file))


def test_what_cannot_be_asked_is_refused_in_one_sentence(lm: BridgeLM) -> None:
    for request, named in (
        (asked("loglikelihood", 0, MARA, "a", task="gsm8k"), r"'gsm8k' has no template; .* documents have passage"),
        (asked("loglikelihood", 0, "else", "a"), "does not hold its source 'Mara wants"),
        (asked("loglikelihood", 0, "else", "a", passage=" "), "'{{passage}}' of a document is empty"),
    ):
        with pytest.raises(InvalidRequest, match=named):
            lm.loglikelihood([request])
    with pytest.raises(InvalidRequest, match="'drop' scores whole texts"):
        lm.loglikelihood_rolling([asked("loglikelihood_rolling", 0, "a")])
    alone = BridgeLM("builtin", "mismatched")
    with pytest.raises(
        InvalidRequest, match="condition mismatched cannot be had of task 'drop': the examples have one"
    ):
        alone.loglikelihood([asked("loglikelihood", 0, MARA, "a")])


def test_the_command_is_the_harness_with_one_model_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["--tasks", "boolq", "--include_path", str(folder), "--limit", "1", "--model", "latentwire", "--model_args"]
    monkeypatch.setattr(sys, "argv", ["latentwire-lm-eval", "run", *ask, "checkpoint=builtin,condition=none"])
    harness_main.main()
    assert "boolq" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["latentwire-lm-eval", "run", *ask, "condition=nothing"])
    with pytest.raises(SystemExit, match="2"):
        harness_main.main()
    assert "latentwire-lm-eval: condition=nothing: expected one of bridge, direct" in capsys.readouterr().err
