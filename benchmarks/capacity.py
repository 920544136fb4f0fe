"""What replicas can do together, simulated, and measured beside it: ``python -m benchmarks.capacity``.

A replica makes steps. A step gives a token to each row that takes part in it, and takes the longer the more there are;
requests join between steps, wait where all rows are taken, and are refused where too many wait. Its three numbers are
fitted to one replica that a few callers keep busy, each with its next request as soon as it has an answer. From these
the simulation says what two replicas behind a balancer do with requests that arrive at random; two real ones are asked
the same requests at the same times.

This machine has two cores: the one replica has one of them, which its callers and its balancer share with it, and the
two have one each, which theirs share.
"""

import asyncio
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import simpy
import typer
from scipy.optimize import nnls

from benchmarks.callers import JSON
from benchmarks.direct import bodies
from benchmarks.record import command_of, record
from benchmarks.rolling import PORT, balancer, replicas

ROWS, QUEUE = 16, 48  # LW_MAX_BATCH, LW_MAX_QUEUE
CALLERS = (1, 2, 4, 8, 16)  # who keep one replica busy; at most ROWS, so that nobody waits for a row
QUESTIONS = 64
LOADS = (0.4, 0.7, 1.5)  # of what two replicas can do
Arrival = tuple[float, int]  # when, in seconds, and how many tokens it wants


@dataclass(frozen=True)
class Steps:
    """A replica, to the simulation.

    Attributes:
        base_seconds: Of a step, whoever is in it.
        row_seconds: More, for each row in it.
        fixed_seconds: Of a request outside all steps: HTTP, reading it, composing its prompt.
        rows: Most that take part in a step.
        queue: Most requests at once; more are refused.
    """

    base_seconds: float
    row_seconds: float = 0.0
    fixed_seconds: float = 0.0
    rows: int = ROWS
    queue: int = QUEUE

    def seconds(self, rows: int) -> float:
        """Of one step."""
        return self.base_seconds + self.row_seconds * rows

    def capacity_per_second(self, tokens: float) -> float:
        """Requests of so many tokens each, where no row is ever empty."""
        return self.rows / (self.seconds(self.rows) * tokens)


@dataclass
class _Request:
    tokens_left: int
    done: simpy.Event


@dataclass
class _Replica:
    """The queue and the running batch of one."""

    env: simpy.Environment
    steps: Steps
    waiting: list[_Request] = field(default_factory=list)
    running: list[_Request] = field(default_factory=list)
    present: int = 0

    def __post_init__(self) -> None:
        self.wake = self.env.event()
        self.env.process(self.run())

    def run(self) -> Iterator[simpy.Event]:
        """Step after step, while there is anybody."""
        while True:
            while self.waiting and len(self.running) < self.steps.rows:
                self.running.append(self.waiting.pop(0))
            if not self.running:
                self.wake = self.env.event()
                yield self.wake
                continue
            yield self.env.timeout(self.steps.seconds(len(self.running)))
            for request in self.running:
                request.tokens_left -= 1
                if not request.tokens_left:
                    request.done.succeed()
            self.running = [request for request in self.running if request.tokens_left]

    def take(self, tokens: int) -> Iterator[simpy.Event]:
        """A request from its arrival to its answer."""
        self.present += 1
        yield self.env.timeout(self.steps.fixed_seconds)
        request = _Request(tokens, self.env.event())
        self.waiting.append(request)
        if not self.wake.triggered:
            self.wake.succeed()
        yield request.done
        self.present -= 1


@dataclass
class Outcome:
    """What callers met.

    Attributes:
        seconds: How long each answer took.
        refused: Requests that were not admitted.
        span_seconds: From the first arrival to the last answer.
    """

    seconds: list[float]
    refused: int
    span_seconds: float

    def figures(self) -> dict[str, float]:
        """For people."""
        return {
            "answers_per_second": len(self.seconds) / self.span_seconds,
            "p50_ms": float(np.quantile(self.seconds, 0.5)) * 1000,
            "p95_ms": float(np.quantile(self.seconds, 0.95)) * 1000,
            "refused_share": self.refused / (self.refused + len(self.seconds)),
        }


def simulate(steps: Steps, count: int, arrivals: Sequence[Arrival]) -> Outcome:
    """Requests (when each arrives, in seconds, and how many tokens it wants) at so many replicas, each going to the one
    with the fewest.
    """
    env = simpy.Environment()
    made = [_Replica(env, steps) for _ in range(count)]
    outcome = Outcome([], 0, 0.0)

    def asked(tokens: int) -> Iterator[simpy.Event]:
        replica, started = min(made, key=lambda each: each.present), env.now
        if replica.present >= steps.queue:
            outcome.refused += 1
            return
        yield from replica.take(tokens)
        outcome.seconds.append(env.now - started)

    def arrive() -> Iterator[simpy.Event]:
        for at, tokens in arrivals:
            yield env.timeout(at - env.now)
            env.process(asked(tokens))

    env.process(arrive())
    env.run()
    outcome.span_seconds = env.now - arrivals[0][0]
    return outcome


def poisson(per_second: float, seconds: float) -> list[float]:
    """When requests arrive at random, so many per second on average; the same times whenever it is asked."""
    rng, now, found = random.Random(1), 0.0, list[float]()
    while (now := now + rng.expovariate(per_second)) < seconds:
        found.append(now)
    return found


@dataclass(frozen=True)
class Answer:
    """What one caller met.

    Attributes:
        number: Of the question.
        tokens: Of the answer; None where it was refused.
        callers: How many asked at once, where that was fixed.
    """

    number: int
    seconds: float
    tokens: int | None
    callers: int = 0


async def asked(session: aiohttp.ClientSession, content: bytes, number: int, callers: int = 0) -> Answer:
    """One request (AssertionError where it is neither answered nor refused for want of room)."""
    started = time.perf_counter()
    async with session.post("/generate", data=content, headers=JSON) as response:
        body = await response.read()
        assert response.status in (200, 429), body
    tokens = json.loads(body)["usage"]["generated_tokens"] if response.status == 200 else None
    return Answer(number, time.perf_counter() - started, tokens, callers)


def session(port: int) -> aiohttp.ClientSession:
    """With as many connections as it takes."""
    return aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=aiohttp.TCPConnector(limit=0))


async def closed(port: int, questions: Sequence[bytes], callers: int, seconds: float) -> list[Answer]:
    """So many callers, each with its next request as soon as it has an answer."""
    found, until, numbers = list[Answer](), time.perf_counter() + seconds, itertools.cycle(range(len(questions)))
    async with session(port) as opened:

        async def caller() -> None:
            while time.perf_counter() < until:
                number = next(numbers)
                found.append(await asked(opened, questions[number], number, callers))

        await asyncio.gather(*(caller() for _ in range(callers)))
    return found


async def opened(port: int, questions: Sequence[bytes], times: Sequence[float]) -> Outcome:
    """Each request at its time, whoever still waits."""
    started, found = time.perf_counter(), list[asyncio.Task[Answer]]()
    async with session(port) as opened:
        for number, at in enumerate(times):
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            place = number % len(questions)
            found.append(asyncio.create_task(asked(opened, questions[place], place)))
        answers = await asyncio.gather(*found)
    took = [answer.seconds for answer in answers if answer.tokens is not None]
    return Outcome(took, len(answers) - len(took), time.perf_counter() - started - times[0])


def fitted(answers: Sequence[Answer]) -> Steps:
    """The replica whose ``answers`` these are: the least squares of what each took, none of its numbers below zero."""
    took = [answer.seconds for answer in answers]
    made_of = [(1, tokens, tokens * answer.callers) for answer in answers if (tokens := answer.tokens) is not None]
    (fixed, base, each), _ = nnls(np.array(made_of, float), np.array(took))
    return Steps(float(base), float(each), float(fixed))


def one_replica(port: int, questions: Sequence[bytes], seconds: float) -> tuple[Steps, list[int], dict[str, Any]]:
    """What it is to the simulation, how many tokens each question's answer has, and figures for people."""
    met = {callers: asyncio.run(closed(port, questions, callers, seconds)) for callers in CALLERS}
    answers = [answer for found in met.values() for answer in found]
    steps, of_number = fitted(answers), {answer.number: answer.tokens for answer in answers}
    tokens = [of_number[number] or 1 for number in range(len(questions))]  # KeyError: more seconds are needed
    return (
        steps,
        tokens,
        {
            "fitted": asdict(steps),
            "answers_per_second": {callers: len(found) / seconds for callers, found in met.items()},
            "tokens_of_an_answer": statistics.mean(tokens),
        },
    )


def two_replicas(
    port: int, questions: Sequence[bytes], steps: Steps, tokens: Sequence[int], seconds: float
) -> Iterator[dict[str, Any]]:
    """At each load: measured, beside what the simulation says of the same requests at the same times."""
    capacity = 2 * steps.capacity_per_second(statistics.mean(tokens))
    for load in LOADS:
        times = poisson(load * capacity, seconds)
        yield {
            "load": load,
            "requests": len(times),
            "measured": asyncio.run(opened(port, questions, times)).figures(),
            "simulated": simulate(steps, 2, list(zip(times, itertools.cycle(tokens)))).figures(),
        }


def main(seconds: float = 10.0, rounds: int = 3) -> None:
    """Measure one replica, SECONDS for each number of callers, simulate two and measure two; ROUNDS times."""
    questions = [json.dumps(body).encode() for body in bodies(QUESTIONS)]
    ports, cores, found = [PORT + 1, PORT + 2], sorted(os.sched_getaffinity(0))[:2], list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "both").mkdir()
        variables = {"LW_MAX_BATCH": str(ROWS), "LW_MAX_QUEUE": str(QUEUE)}
        stack.enter_context(replicas(ports, folder, [{core} for core in cores], **variables))
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:1])
        stack.enter_context(balancer("haproxy", PORT, ports[:1] * 2, folder))  # before the first alone
        os.sched_setaffinity(0, cores)
        both = psutil.Process(stack.enter_context(balancer("haproxy", PORT + 3, ports, folder / "both")))
        for _ in range(rounds):
            os.sched_setaffinity(0, cores[:1])
            steps, tokens, one = one_replica(PORT, questions, seconds)
            os.sched_setaffinity(0, cores)
            used = sum(both.cpu_times()[:2])
            two = list(two_replicas(PORT + 3, questions, steps, tokens, 2 * seconds))
            busy = (sum(both.cpu_times()[:2]) - used) / sum(each["requests"] for each in two)
            found.append({"one_replica": one, "two_replicas": two, "balancer_seconds_of_a_request": busy})
            print(json.dumps(found[-1], indent=2), flush=True)
    figures = {"rows": ROWS, "queue": QUEUE, "rounds": found}
    record("capacity", command_of("capacity", seconds=seconds, rounds=rounds), figures)


if __name__ == "__main__":
    typer.run(main)
