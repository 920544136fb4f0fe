"""The tasks of the benchmark of real models are tasks, though their data is not here."""

import pytest

from benchmarks.real import TASKS, table
from latentwire.bridge.evaluation.tasks import TaskFile
from latentwire.training.config import TrainConfig

ON_DISK = [name for name, task in TASKS.items() if task.data is not None]


@pytest.mark.parametrize("name", ON_DISK)
def test_every_task_of_the_benchmark_is_a_task_file(name: str) -> None:
    fields = dict(TASKS[name].fields)
    if fields.get("labels") == []:  # those of the data
        fields["labels"] = ["yes", "no"]
    made = TaskFile.model_validate({"name": name, "train": "a.jsonl", "test": "b.jsonl", **fields})
    assert made.prompt.count("{latent}") == 1


@pytest.mark.parametrize("name", TASKS)
def test_every_recipe_is_one_of_settings_that_there_are(name: str) -> None:
    words = TASKS[name].recipe.split()
    assert {word.removeprefix("--").replace("-", "_") for word in words[::2]} <= set(TrainConfig.model_fields)


def test_rows_are_made_from_those_of_the_data_or_left_out() -> None:
    squad, stories, banking = (TASKS[name].row for name in ("squad", "tinystories", "banking77"))
    assert squad is not None and stories is not None and banking is not None
    assert squad(asked := {"question": "Who?", "answers": ["Ann", "Ann B."]}) == asked
    assert banking({"label": "reverted_card_payment?"}) == {"label": "reverted card payment"}
    assert squad({"question": "Who?", "answers": []}) is None
    assert stories({"text": "A b. C d.\n\nE f. G h. I j."}) == {"begun": "A b. C d.", "next": "E f. G h"}


def test_the_table_averages_the_seeds_of_a_pair_a_task_and_a_ratio() -> None:
    def run(seed: int, value: float) -> dict[str, object]:
        conditions = {name: {"metric": "accuracy", "value": value} for name in ("bridge", "direct")}
        key = {"sender": "a", "receiver": "b", "task": "sst2", "ratio": 4, "seed": seed}
        return {**key, "report": {"conditions": conditions}}

    shown = table([run(0, 0.5), run(1, 0.75)])
    assert shown.row_count == 1
    cells = [next(iter(column.cells)) for column in shown.columns]
    assert cells[:7] == ["a → b", "sst2", "4", "2", "accuracy", "0.625", "0.625"]
    assert cells[7:] == ["–"] * (len(cells) - 7)
