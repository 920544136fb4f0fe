"""Attention over the blocks of the key/value cache, each request over its own keys alone: on a GPU by ``varlen_attn``.

With ``sdpa`` a step multiplies the tokens of all its rows with the keys of all its rows, under a mask that leaves each
its own: 256 rows of 1,000 tokens compute 256 times what they need. The library lets an attention do without the mask
whose name contains ``flash``, and for steps that read one token a row it then hands over a table of blocks.

Kernels that read such a table are Flash Attention 3 on Hopper and 4 on Blackwell, packages beside torch. Torch's own
one, Flash Attention 2, refuses it (torch 2.13): there the device makes of the table the indices to gather keys by,
which the host would otherwise make one by one in Python. On a CPU ``rows.py`` attends.

Dimensions used in this file:
    T tokens of a step    N rows of a step, padding included    P blocks of a row    D width of a head
    B batch and S keys of another pass: 1 and T in a step
"""

from functools import cache as once
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache, group_layers_by_attn_type
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from latentwire.bridge.generation.rows import Rows
from latentwire.bridge.models import FrozenLM

Kernel = Literal["by rows", "gathering", "reading tables"]

NAME = "latentwire_flash"
UNKNOWN = ("softcap", "s_aux", "sliding_window", "position_bias")  # what some models ask of attention, and this is not
NEWER = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute")}  # by compute capability
MASK = torch.zeros(1, 1, 1, 1)  # looks like one that was made already, so that the model makes none


def kernel_for(lm: FrozenLM) -> Kernel | None:
    """What there is for a model where it is; None where that is nothing."""
    if lm.model.config._attn_implementation not in ("sdpa", NAME):
        return None
    if set(group_layers_by_attn_type(lm.model.config.get_text_config())) != {"full_attention"}:
        return None
    if lm.device.type == "cpu":
        return "by rows"
    if lm.device.type != "cuda" or lm.model.dtype not in (torch.float16, torch.bfloat16):
        return None
    return "reading tables" if _has_newer(torch.cuda.get_device_capability(lm.device)[0]) else "gathering"


@once
def _has_newer(capability: int) -> bool:
    """Whether the kernel of a GPU that reads tables is there; torch then uses it for all attention."""
    name, module = NEWER.get(capability, ("", ""))
    if not name or find_spec(module.partition(".")[0]) is None:
        return False
    try:
        if current_flash_attention_impl() != name:
            activate_flash_attention_impl(name)
    except Exception:  # whatever another package of that name trips over, or one for another torch
        return False
    return True


def use(lm: FrozenLM) -> None:
    """Let a model compute attention here: passes without a paged cache go through ``sdpa`` as before."""
    lm.model.config._attn_implementation = NAME


def attention(
    module: nn.Module,
    query: Float[Tensor, "B _ T D"],
    key: Float[Tensor, "B _ S D"],
    value: Float[Tensor, "B _ S D"],
    attention_mask: Tensor | None,
    cache: PagedAttentionCache | None = None,
    rows: Rows | None = None,
    **asked: Any,
) -> tuple[Float[Tensor, "B T _ D"], None]:
    """Attention as the library calls it in every layer (ValueError for what it does not know)."""
    if cache is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **asked)
    if unknown := [name for name in UNKNOWN if asked.get(name) is not None]:
        raise ValueError(f"attention with {unknown[0]} is not computed over blocks")
    layer: Any = module.layer_idx
    if rows is not None:
        stored: Any = cache.layer_to_allocator[layer]
        key_cache, value_cache = (blocks.flatten(0, 1) for blocks in stored.get_cache_for_block_table(layer))
        queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
        return rows.attend(queries, keys, values, (key_cache, value_cache), asked.get("scaling"))[None], None
    key, value = cache.update(key, value, layer, asked)  # all keys that were gathered, or the new ones and where to put
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    made: Any
    lengths, attend = asked["cu_seq_lens_k"], partial(varlen_attn, scale=asked.get("scaling"), enable_gqa=True)
    if asked.get("block_table") is None:
        most = asked["max_length_q"], asked["max_length_k"]
        made = attend(queries, keys, values, asked["cu_seq_lens_q"], lengths, *most, window_size=(-1, 0))
    else:
        key_blocks, value_blocks, table = asked["k_cache"], asked["v_cache"], asked["block_table"]
        nobodys: Any = cache.layer_to_allocator[layer]
        used = _stored(keys, values, key_blocks, value_blocks, table, lengths.diff(), nobodys.write_trash_index)
        each = torch.arange(len(used) + 1, dtype=torch.int32, device=used.device)
        most = 1, table.shape[1] * key_blocks.shape[1]
        table = table.clamp(min=0)  # of padding, of which nothing is read
        made = attend(queries, key_blocks, value_blocks, each, None, *most, seqused_k=used, block_table=table)
    return made[None], None


def _stored(
    keys: Float[Tensor, "N _ D"],
    values: Float[Tensor, "N _ D"],
    key_blocks: Float[Tensor, "_ _ _ D"],
    value_blocks: Float[Tensor, "_ _ _ D"],
    table: Int[Tensor, "N P"],
    lengths: Int[Tensor, " N"],
    nobodys: int,
) -> Int[Tensor, " N"]:
    """Put each row's newest key and value behind those before, and the padding's where nobody reads; the lengths."""
    size = key_blocks.shape[1]
    last = (lengths - 1).clamp(min=0).long()
    block = table.gather(1, (last // size)[:, None])[:, 0].long()
    block = torch.where(lengths > 0, block, nobodys // size)
    key_blocks[block, last % size], value_blocks[block, last % size] = keys, values
    return lengths


def gathered(step: dict[str, Any], total: int, longest: int, size: int) -> dict[str, Any]:
    """What a step that was to read a table of blocks is for a kernel that cannot.

    Args:
        step: The library's inputs, one token a row, no padding.
        total: Tokens of all rows.
        longest: Tokens of the longest row.
        size: Tokens of a block.

    Returns:
        The inputs that are others: where all keys stand in the cache, and where the new ones go.
    """
    (kind, ends), table = next(iter(step["cu_seq_lens_k"].items())), step["block_table"][0]
    rows = torch.repeat_interleave(ends.diff(), output_size=total)
    place = torch.arange(total, device=table.device) - ends[rows]
    stands = table[rows, place // size].long() * size + place % size
    return {
        "block_table": None,
        "read_index": [stands],
        "write_index": [stands[ends[1:].long() - 1]],
        "max_length_k": {kind: longest},
    }


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
