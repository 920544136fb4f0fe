"""vLLM's connector that writes hidden states to files, for a server on a CPU: ``benchmarks.vllm_sender`` says how.

The one that vLLM 0.32 brings asks for pinned memory, which only an accelerator has: the first request is answered, and
then its engine ends.
"""

import os
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)


class _Copied:
    def query(self) -> bool:
        return True


class HostHiddenStates(ExampleHiddenStatesConnector):  # type: ignore[misc]
    """The same without streams: the states lie in the host's memory already."""

    def _submit_async_write(self, pending: Any) -> None:
        size = self._block_size
        slots = (torch.tensor(pending.block_ids)[:, None] * size + torch.arange(size)).flatten()
        states = extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids)).contiguous()
        save_file({"hidden_states": states, "token_ids": pending.token_ids.clone()}, pending.filename)
        os.close(self._lock_fds.pop(pending.req_id))  # whoever waits for the file may read it
        self._req_copy_events[pending.req_id] = _Copied()
