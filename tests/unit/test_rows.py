"""Attention on a CPU, row by row, against attention over each row's own keys and values in a loop."""

import math

import pytest
import torch
from torch import Tensor

from latentwire.bridge.generation.rows import SHORT, Rows

SIZE, HEADS, KV_HEADS, WIDTH = 16, 4, 2, 8
STEPS = {
    "one row that reads one token": [(1, 40)],
    "rows of like length": [(1, 3), (1, 17), (1, 16)],
    "a prompt": [(20, 20)],
    "the end of a prompt": [(5, 30)],
    "short rows, long ones and prompts": [(1, 9), (33, 33), (1, SHORT + 200), (7, 50), (1, 70), (1, 2000)],
    "prompts, the first with its own keys alone": [(12, 12), (18, 18)],
}


def step(rows: list[tuple[int, int]], *, table: bool) -> tuple[dict[str, object], list[Tensor]]:
    """The library's inputs for rows that read (tokens, of keys), and where the keys of each stand."""
    blocks = [-(-keys // SIZE) for _, keys in rows]
    order = torch.randperm(sum(blocks))  # of one row they stand anywhere
    tables = list(order.split(blocks))
    stands = [
        (its[:, None] * SIZE + torch.arange(SIZE)).flatten()[:keys] for its, (_, keys) in zip(tables, rows, strict=True)
    ]
    ends = [torch.tensor([0, *(row[at] for row in rows)]).cumsum(0).to(torch.int32) for at in (0, 1)]
    padded = torch.full((1, len(rows), max(blocks) + 3), -1, dtype=torch.int32)
    for row, its in enumerate(tables):
        padded[0, row, : len(its)] = its
    new = torch.cat([at[-tokens:] for at, (tokens, _) in zip(stands, rows, strict=True)])
    nothing_before = all(tokens == keys for tokens, keys in rows)
    read = torch.empty(0, dtype=torch.long) if nothing_before else torch.cat(stands)
    made = {
        "cu_seq_lens_q": ends[0], "cu_seq_lens_k": {"full_attention": ends[1]},
        "block_table": padded if table else None, "read_index": [read], "write_index": [new],
    }  # fmt: skip
    return made, stands


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_each_token_attends_to_the_keys_of_its_row_up_to_its_own(name: str, scale: float | None) -> None:
    torch.manual_seed(0)
    rows = STEPS[name]
    is_decode = all(tokens == 1 for tokens, _ in rows)
    for table in (False, True)[: 1 + is_decode]:
        inputs, stands = step(rows, table=table)
        made = Rows.of(inputs, SIZE)
        count = sum(tokens for tokens, _ in rows)
        caches = (
            torch.full((400 * SIZE, KV_HEADS, WIDTH), math.nan),
            torch.full((400 * SIZE, KV_HEADS, WIDTH), math.nan),
        )
        for cache in caches:  # what others left is of no weight, whatever it is
            cache[torch.cat(stands)] = torch.randn(sum(keys for _, keys in rows), KV_HEADS, WIDTH)
        queries = torch.randn(count, HEADS, WIDTH)
        keys, values = torch.randn(2, count, KV_HEADS, WIDTH)
        before = [cache.clone() for cache in caches]
        found = made.attend(queries, keys, values, caches, scale)
        at = 0
        for own, (tokens, length) in zip(stands, rows, strict=True):
            for cache, old, new in zip(caches, before, (keys, values), strict=True):
                old[own[-tokens:]] = new[at : at + tokens]
                assert torch.equal(cache[own], old[own])
            for token in range(tokens):
                seen = own[: length - tokens + token + 1]
                k, v = (cache[seen].repeat_interleave(HEADS // KV_HEADS, dim=1) for cache in caches)
                weights = torch.einsum("hd,shd->hs", queries[at], k) * (scale or 1 / math.sqrt(WIDTH))
                wanted = torch.einsum("hs,shd->hd", weights.softmax(dim=1), v)
                assert torch.allclose(found[at], wanted, atol=1e-5), (table, own, token)
                at += 1
        assert all(torch.equal(cache.nan_to_num(), old.nan_to_num()) for cache, old in zip(caches, before, strict=True))


def test_rows_of_like_length_are_read_together_and_short_ones_all() -> None:
    inputs, _ = step(STEPS["short rows, long ones and prompts"], table=False)
    groups = Rows.of(inputs, SIZE).groups
    read = [[] if group.tokens is None else group.tokens[:, 0].tolist() for group in groups]
    assert sorted(read) == [[0, 42], [1], [34], [35], [43]]
