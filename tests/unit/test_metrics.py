"""Scores of single examples."""

import pytest

from latentwire.bridge.evaluation.metrics import METRICS, exact_match, normalise, token_f1


@pytest.mark.parametrize(
    "text, plain",
    [("The  Cat!", "cat"), ("a man, an apple", "man apple"), ("Theatre", "theatre"), ("U.S.", "us"), ("", "")],
)
def test_case_articles_punctuation_and_spaces_do_not_count(text: str, plain: str) -> None:
    assert normalise(text) == plain


def test_exact_match_wants_the_whole_answer() -> None:
    assert exact_match(" Mara lives in Rome.", "mara lives in rome") == 1.0
    assert exact_match("Mara lives in Rome today", "Mara lives in Rome") == 0.0


@pytest.mark.parametrize(
    "said, wanted, score",
    [
        ("Mara lives in Rome", "Mara lives in Paris", 0.75),
        ("Rome", "Mara lives in Rome", 0.4),  # precision 1, recall 1/4
        ("rome rome", "Rome", 2 / 3),  # a repeated word is matched once
        ("Oslo", "Rome", 0.0),
        ("", "", 1.0),
        ("", "Rome", 0.0),
        ("Rome", "the", 0.0),  # an answer of articles only is empty once normalised
    ],
)
def test_f1_is_the_harmonic_mean_of_word_precision_and_recall(said: str, wanted: str, score: float) -> None:
    assert token_f1(said, wanted) == pytest.approx(score)
    assert token_f1(wanted, said) == pytest.approx(score)


def test_of_several_right_answers_the_nearest_one_counts() -> None:
    right = [(" in Rome", " Rome", " the city of Rome"), (" Oslo",)]
    assert METRICS["em"].scores(["Rome.", "Rome"], right) == [1.0, 0.0]
    assert METRICS["token_f1"].scores(["old Rome", "Oslo"], right) == pytest.approx([2 / 3, 1.0])
