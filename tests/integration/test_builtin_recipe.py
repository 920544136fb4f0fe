"""The models that ship with the product are made by the committed recipe, and do what their cards say."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentwire.bridge import engine
from latentwire.bridge.evaluation import world
from latentwire.bridge.models import BUILTIN, fingerprint_of, load_model
from latentwire.bridge.prompt import compose, layout_for
from latentwire.bridge.sampling import SamplingParams
from latentwire.training.builtin import __main__ as maker
from latentwire.training.builtin.documents import BACKGROUND, END, Mixture, document
from latentwire.training.builtin.recipe import RECIPES, Recipe, optimisers

COPY = Mixture(8, copy=1.0)
MIXED = Mixture(8, copy=0.2, repeat=0.2, terse=0.5, blank=0.2)


def shrunk(which: str, *stages: Mixture) -> Recipe:
    return replace(RECIPES[which], stages=stages or (COPY,), batch=4)


@pytest.mark.parametrize("which", list(RECIPES))
def test_documents_and_batches_are_a_function_of_the_seed(which: str) -> None:
    made = [[document(seed, index, MIXED) for index in range(40)] for seed in (0, 0, 1)]
    assert made[0] == made[1] and not any(a == b for a, b in zip(made[0], made[2], strict=True))
    recipe = shrunk(which, MIXED)
    tokenizer = recipe.tokenizer()
    first, again, other = ([ids.tolist() for ids, _ in maker.batches(recipe, tokenizer, seed)] for seed in (0, 0, 1))
    assert first == again != other and len(first) == recipe.steps and all(len(ids) == 4 for ids in first)


def test_a_document_ends_each_answer_and_weighs_what_can_be_foretold() -> None:
    for index in range(200):
        pieces = document(0, index, MIXED)
        assert pieces[-1] == (END, 1.0)
        for (text, weight), (after, after_weight) in pairwise(pieces):
            if after == END:
                assert weight == 1.0
            if after_weight == 1.0 and after != END:  # what asks for an answer is background, like the source
                assert weight == BACKGROUND and text.endswith(("Answer:", "Repeat:"))
    copied = document(3, 5, COPY)
    assert copied[0][0] == copied[2][0] and [weight for _, weight in copied] == [BACKGROUND, BACKGROUND, 1.0, 1.0]


@pytest.mark.parametrize("which", list(RECIPES))
def test_pieces_encoded_one_by_one_are_the_tokens_of_the_whole(which: str) -> None:
    tokenizer = RECIPES[which].tokenizer()
    for index in range(40):
        pieces = document(0, index, MIXED)
        ids, weights = maker.encode(pieces, tokenizer)
        whole = "".join(tokenizer.eos_token if text == END else text for text, _ in pieces)
        assert ids == tokenizer(tokenizer.bos_token + whole, add_special_tokens=False).input_ids
        assert len(weights) == len(ids) and weights[0] == 0.0 and weights[-1] == 1.0


@pytest.mark.parametrize("which", list(RECIPES))
def test_a_few_steps_bring_the_loss_down(which: str) -> None:
    recipe = shrunk(which, replace(COPY, steps=24))
    tokenizer = recipe.tokenizer()
    torch.manual_seed(0)
    model = recipe.model(tokenizer)
    before = [p.detach().clone() for p in model.parameters()]
    optimizers = optimisers(model, recipe)
    losses = [
        maker.train_step(model, optimizers, batch, [recipe.matrix_rate, recipe.other_rate])
        for batch in maker.batches(recipe, tokenizer, 0)
    ]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_padding_and_background_weigh_what_they_should() -> None:
    recipe = shrunk("llama")
    tokenizer = recipe.tokenizer()
    torch.manual_seed(0)
    model = recipe.model(tokenizer)
    rows = [([0, 5, 6, 7], [0.0, 0.1, 1.0, 1.0]), ([0, 8], [0.0, 1.0])]
    with torch.no_grad():
        logp = [model(input_ids=torch.tensor([ids])).logits.log_softmax(-1)[0] for ids, _ in rows]
    weighed = [(-float(logp[r][i - 1, ids[i]]), w[i]) for r, (ids, w) in enumerate(rows) for i in range(1, len(ids))]
    by_hand = sum(loss * weight for loss, weight in weighed) / sum(weight for _, weight in weighed)
    batch = maker.collate(rows, tokenizer.pad_token_id)
    still: list[torch.optim.Optimizer] = [torch.optim.SGD(model.parameters(), lr=0.0)]
    assert maker.train_step(model, still, batch, [0.0]) == pytest.approx(by_hand, rel=1e-5)


def test_stages_follow_one_another_and_the_rate_rises_stays_and_falls() -> None:
    recipe = RECIPES["llama"]
    steps = [stage.steps for stage in recipe.stages]
    for number, stage in enumerate(recipe.stages):
        assert recipe.stage(sum(steps[:number])) is stage and recipe.stage(sum(steps[: number + 1]) - 1) is stage
    rates = [recipe.rate(step) for step in range(recipe.steps)]
    assert rates[0] == 0.02 and rates[49] == rates[recipe.steps // 2] == 1.0
    assert rates[-1] == pytest.approx(1 / (0.3 * recipe.steps)) and rates[-100:] == sorted(rates[-100:], reverse=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Recipe]]:
    """A model made by the command, in a handful of steps."""
    recipe = shrunk("llama", replace(COPY, steps=40), replace(MIXED, steps=100))
    out = tmp_path_factory.mktemp("made") / "llama"

    def measuring(model: Any, tokenizer: Any, count: int) -> dict[str, float]:
        # What is measured is what is stored, rounding included.
        assert all(torch.equal(p.bfloat16().float(), p) for p in model.parameters())
        return evaluate(model, tokenizer, count)

    evaluate = maker.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "llama", recipe)
        patch.setattr(torch, "set_num_threads", lambda count: None)
        patch.setattr(maker, "evaluate", measuring)
        maker.main("llama", out, stretch=0.1, questions=4)
    yield out, recipe


def test_a_model_is_published_with_its_card_and_its_log(made: tuple[Path, Recipe]) -> None:
    out, _ = made
    card: dict[str, Any] = json.loads((out / "training.json").read_text())
    assert (card["model"], card["seed"], card["steps"]) == ("llama", 0, 50)
    assert [stage["steps"] for stage in card["recipe"]["stages"]] == [40, 10] and card["recipe"]["batch"] == 4
    assert set(card["held_out"]) == {"questions", "base_rate", "read", "none", "repeat", "repeat_ten_facts"}
    assert card["held_out"]["questions"] == 4 and card["held_out"]["base_rate"] == world.base_rate()
    (line,) = [json.loads(text) for text in (out / "training.jsonl").read_text().splitlines()]
    assert line["step"] == 50 and 0 < line["loss"] < 10
    lm = load_model(str(out))
    assert lm.model.num_parameters() == card["parameters"]
    assert {path.name for path in out.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors"}
    assert not list(out.parent.glob(".*"))
    # Half the bytes hold the model exactly.
    assert all(torch.equal(p.bfloat16().float(), p) for p in lm.model.parameters())
    assert (out / "model.safetensors").stat().st_size < 2.2 * card["parameters"]


def test_a_model_published_over_another_takes_its_place(made: tuple[Path, Recipe], tmp_path: Path) -> None:
    recipe = made[1]
    tokenizer = recipe.tokenizer()

    def published(seed: int) -> tuple[str, list[Tensor]]:
        torch.manual_seed(seed)
        model = recipe.model(tokenizer)
        maker.publish(model, tokenizer, {"seed": seed}, f"{seed}\n", tmp_path / "model")
        return fingerprint_of(str(tmp_path / "model")).weights, [p.bfloat16().float() for p in model.parameters()]

    (first, _), (second, weights) = published(0), published(1)
    assert first != second
    loaded = load_model(str(tmp_path / "model")).model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(loaded, weights, strict=True))
    assert json.loads((tmp_path / "model" / "training.json").read_text()) == {"seed": 1}
    assert (tmp_path / "model" / "training.jsonl").read_text() == "1\n"


@pytest.mark.parametrize("which", list(RECIPES))
def test_a_committed_model_was_made_by_the_committed_recipe(which: str) -> None:
    card = json.loads((BUILTIN / which / "training.json").read_text())
    recipe = {key: value for key, value in asdict(RECIPES[which]).items() if not callable(value)}
    assert card["recipe"] == json.loads(json.dumps(recipe)) and card["steps"] == RECIPES[which].steps
    lm = load_model(f"builtin:{which}")
    assert lm.model.num_parameters() == card["parameters"]
    assert lm.tokenizer.get_vocab() == RECIPES[which].tokenizer().get_vocab()
    lines = [json.loads(line) for line in (BUILTIN / which / "training.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == card["steps"]


@pytest.mark.parametrize("which", list(RECIPES))
def test_a_committed_model_answers_what_it_reads_and_little_else(which: str) -> None:
    card, lm = json.loads((BUILTIN / which / "training.json").read_text())["held_out"], load_model(f"builtin:{which}")
    asked, params = world.questions("test", 3, 40), [SamplingParams(max_tokens=40)] * 40
    scores = []
    for blind in (False, True):
        prompts = [world.QUESTION.replace("{question}", question) for _, question, _ in asked]
        sources = [None if blind else source for source, _, _ in asked]
        layout = layout_for(lm, world.QUESTION)
        rows = [compose(lm, layout, prompt, latent=source) for prompt, source in zip(prompts, sources, strict=True)]
        said = engine.generate(lm, rows, None, params)[0]
        right = [
            (g.text, g.finish_reason) == (f" {answer}", "stop") for g, (_, _, answer) in zip(said, asked, strict=True)
        ]
        scores.append(sum(right) / len(right))
    assert scores[0] >= 0.95 and card["read"] >= 0.95
    assert scores[1] <= 0.2 and card["none"] <= 0.2
