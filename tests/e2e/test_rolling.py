"""Replicas that share a Redis behind a real balancer, as ``deploy/proxy`` configures it: what callers lose."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.rolling import Balancer, Replica, balancer, replicas, restarts, under_load
from tests.ports import free_port

REQUESTS = 200
CALLERS = 6
DELAY_SECONDS = "2"  # HAProxy has looked twice by then


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Replica]]:
    ports = [free_port(), free_port()]
    with replicas(ports, tmp_path_factory.mktemp("replicas"), LW_DRAIN_DELAY=DELAY_SECONDS) as made:
        yield made


@pytest.mark.parametrize("kind, how", [("haproxy", "sigterm"), ("nginx", "kill")])
def test_replicas_that_are_restarted_or_killed_under_load_lose_no_request(
    services: list[Replica], tmp_path: Path, kind: Balancer, how: str
) -> None:
    try:
        with balancer(kind, port := free_port(), [replica.port for replica in services], tmp_path):
            ended = services if how == "sigterm" else services[:1]
            met = asyncio.run(under_load(port, REQUESTS, CALLERS, restarts(ended, how)))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert (met.requests >= REQUESTS, met.lost) == (True, {})
    assert met.crossed > 0  # a latent that one replica made, and another answered from
    assert how == "kill" or met.cut == 0
