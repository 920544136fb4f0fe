"""What the benchmark of several sources holds against them: the answers from one alone."""

from benchmarks.several import single
from latentwire.bridge.results import Output, TokenLogprob


def answer(text: str, *nats: float) -> Output:
    return Output(0, text, "stop", len(nats), tuple(TokenLogprob("a", one) for one in nats))


def test_one_is_told_its_source_and_the_best_single_one_takes_the_likeliest_answer() -> None:
    each = [(4, 9), (4, 4), (5, 5), (5, 6)]
    outputs = [answer("wrong", -0.1, -3.0), answer("right", -0.5), answer("sure", -1.0), answer("surer", -0.25, -0.25)]
    assert single(each, outputs) == (["right", "sure"], ["right", "surer"])
