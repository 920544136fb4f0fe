"""Replicas that share a Redis behind a real balancer, as ``deploy/proxy`` configures it: what callers lose."""

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from benchmarks.rolling import KINDS, Balancer, End, Met, Replica, balancer, replicas, restarts, under_load
from tests.ports import free_port

REQUESTS = 200
CALLERS = 6
ENDED: dict[End, int] = {"sigterm": 2, "kill": 1}
DELAY_SECONDS = "3"  # HAProxy has looked three times by then


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Replica]]:
    ports = [free_port(), free_port()]
    with replicas(ports, tmp_path_factory.mktemp("replicas"), LW_DRAIN_DELAY=DELAY_SECONDS) as made:
        yield made


def ended(services: list[Replica], kind: Balancer, how: End, folder: Path, kinds: Mapping[str, int] = KINDS) -> Met:
    """What callers met while these replicas, of two, were ended and started again."""
    try:
        with balancer(kind, port := free_port(), [replica.port for replica in services], folder):
            return asyncio.run(under_load(port, REQUESTS, CALLERS, restarts(services[: ENDED[how]], how), kinds))
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_replicas_that_are_restarted_in_turn_under_load_lose_no_request(
    services: list[Replica], tmp_path: Path
) -> None:
    met = ended(services, "haproxy", "sigterm", tmp_path)
    assert (met.requests >= REQUESTS, met.lost, met.cut) == (True, {}, 0)
    assert met.crossed > 0  # a latent that one replica made, and another answered from


def test_what_a_replica_was_asked_that_is_killed_another_answers(services: list[Replica], tmp_path: Path) -> None:
    """Without what Redis is needed for: where a busy machine makes that late, nginx tries the replica that is away."""
    met = ended(services, "nginx", "kill", tmp_path, {"generate": 1, "stream": 1})
    assert (met.requests >= REQUESTS, met.lost) == (True, {})
