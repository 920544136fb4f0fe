"""Continuous batching: requests join and leave the running batch at every step.

The steps, the paged key/value cache and its blocks are transformers' ``ContinuousBatchingManager``. Ours are the soft
tokens (``softids``), draws that depend on their request alone (``steps``), attention over the blocks (``attention``),
and what becomes of requests that end early or fail.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import chain
from typing import Any, cast

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState

from latentwire.bridge.devices import is_out_of_memory
from latentwire.bridge.errors import InferenceFailed, InsufficientMemory, NotReady, first_line
from latentwire.bridge.generation import attention
from latentwire.bridge.generation.base import Engine, Running
from latentwire.bridge.generation.room import fitted, keep_attention
from latentwire.bridge.generation.scheduler import Scheduler
from latentwire.bridge.generation.softids import SoftIds
from latentwire.bridge.generation.steps import Choices, Next, Runner, Way
from latentwire.bridge.memory import free_caches
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import TEXT

log = logging.getLogger(__name__)

PAGE_TOKENS = 16  # a latent is a few dozen soft tokens: larger pages would share none of them
SOFT_ROWS = 1.5  # rows for soft tokens to each token of the cache: latents nobody asks right now are kept too
ROOM_SECONDS = 30.0  # for which soft tokens wait for rows
SMALLEST_STEP_TOKENS = 32
POLL_SECONDS = 0.25  # how often a thread that died without a word is looked for
PLAIN = Way()


class ContinuousEngine(Engine):
    """See the module. Greedy output is that of ``generate(inputs_embeds=…)``, token for token.

    Out of memory, it goes on with half as large steps, each request where it was. Other errors in a step leave it dead.
    """

    kind = "continuous"

    def __init__(
        self,
        lm: FrozenLM,
        *,
        max_rows: int = 32,
        kv_tokens: int = 8192,
        step_tokens: int = 512,
        way: Way = PLAIN,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the thread.

        Args:
            lm: The receiver; its embedding understands soft ids until ``close``.
            max_rows: Most requests in one step.
            kv_tokens: Room of the key/value cache, allocated now, in tokens; less where memory is too small for it.
            step_tokens: Most tokens of one step; a longer prompt is read over several.
            way: How steps are made.
            on_death: Called after an error that leaves the engine dead.
        """
        super().__init__(lm, max_rows=max_rows, on_death=on_death)
        self._step_tokens, self._way, self._preempted = step_tokens, way, 0
        self._trouble = threading.Event()
        self._closed = self._recovering = False
        with ExitStack() as stack:  # nobody waits any more, and the model is as it was found
            stack.callback(self._end_threads)
            stack.callback(_exclusive(lm))
            stack.callback(keep_attention(lm))
            if way.kernel is not None:
                attention.use(lm)
            self._kv_tokens, (self._manager, self.soft_ids) = fitted(
                kv_tokens,
                lambda tokens: (
                    self._new_manager(tokens),
                    SoftIds(lm.model.get_input_embeddings(), rows=int(tokens * SOFT_ROWS)),
                ),
            )
            stack.callback(self.soft_ids.close)
            self._start_manager()
            self._leave = stack.pop_all().close
        self._supervisor = threading.Thread(target=self._supervise, daemon=True, name="engine-supervisor")
        self._supervisor.start()

    @property
    def capacity_tokens(self) -> int:
        """Most tokens of one request, its output included."""
        return min(self.lm.max_tokens, self._kv_tokens - PAGE_TOKENS)

    @property
    def waiting(self) -> int:
        scheduler = self._scheduler
        return 0 if scheduler is None else len(scheduler.waiting_requests)

    @property
    def preemptions(self) -> int:
        scheduler = self._scheduler
        return self._preempted if scheduler is None else scheduler.preemptions

    @property
    def blocks_in_use(self) -> int:
        """Blocks of the cache that running requests hold."""
        processor = self._manager.batch_processor
        tables = [] if processor is None else [a.block_table for a in processor.cache.cache_allocators.values()]
        return sum(len(blocks) for table in tables for blocks in list(table.values()))

    @property
    def block_tokens(self) -> int:
        return PAGE_TOKENS

    @property
    def kv_tokens(self) -> int:
        return self._kv_tokens

    @property
    def kv_tokens_used(self) -> int:
        """Of the cache, what the blocks of running requests take; one that several share counts once."""
        processor = self._manager.batch_processor
        if processor is None:
            return 0
        held = processor.cache
        taken = sum(
            len(set(chain.from_iterable(list(allocator.block_table.values())))) * allocator.bytes_per_block
            for allocator in held.cache_allocators.values()
        )
        return round(self._kv_tokens * taken / (held.num_sectors * held.bytes_per_sector))

    def close(self) -> None:
        """End the thread, free the cache, leave the embedding as it was; requests still running fail."""
        with self._lock:
            self._closed = True
        self._trouble.set()
        self._supervisor.join()
        self._stop_manager()
        self._die(NotReady("the service is stopping"))
        self._leave()

    def _new_manager(self, kv_tokens: int) -> ContinuousBatchingManager:
        """A manager with its cache, not started: what has no room is found here, where it can be made smaller."""
        manager = cast(Any, self.lm.model).init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=list(self.lm.end_ids) or -1),  # type: ignore[no-untyped-call]
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=-(-kv_tokens // PAGE_TOKENS),
                max_batch_tokens=max(self._step_tokens, self.max_rows),
                max_requests_per_batch=self.max_rows,
                scheduler_type=Scheduler.NAME,
                use_cuda_graph=(False, self._way.graphs),  # a prompt has a shape of its own, seen once
                q_padding_interval_size=1,  # and is not padded beside graphs of other steps
                kv_padding_interval_size=1,
                use_async_batching=self._way.overlapped,
                auto_switch_to_flash=False,  # would fetch kernels from the network
            ),
        )
        if self._way.kernel is not None:  # the library gives tables to kernels that it knows
            most = min(self.lm.max_tokens, kv_tokens)
            manager.continuous_batching_config.max_blocks_per_request = -(-most // PAGE_TOKENS)
        device, rows = self.lm.device, (self.max_rows, self.lm.rows)
        self._choices = Choices(
            self._next, torch.empty(rows, dtype=torch.float32, device=device) if self._way.graphs else None
        )
        manager.logit_processor = self._choices
        manager.output_router = _Router(self)
        with torch.accelerator.device_index(device.index):  # whose memory the library measures
            manager.batch_processor = manager._create_batch_processor()
            manager.batch_processor.scheduler.preemptions = self._preempted
            Runner.take_over(manager.batch_processor, self._way.kernel)
            manager.warmup()  # makes the graphs, where there are any
        return cast(ContinuousBatchingManager, manager)

    def _start_manager(self) -> None:
        # A thread is a daemon where the one that starts it is: a program that fails must not hang on this one.
        starter = threading.Thread(target=self._manager.start, daemon=True)
        starter.start()
        starter.join()

    def _stop_manager(self) -> None:
        if self._manager.is_running() or self._manager.batch_processor is not None:
            self._manager.stop(hard_stop=True)

    def _prepare(self, running: Running) -> None:
        if running.soft is None:
            return
        key, make, wanted = running.soft.key, cache(running.soft.make), running.soft.wanted
        until = time.monotonic() + ROOM_SECONDS

        def waits() -> bool:
            self._check_alive()
            return wanted() and time.monotonic() < until and not self._callbacks.is_current

        if not self.soft_ids.hold(key, make, waits):
            log.info("soft ids are used up: beginning again with an empty cache")
            self._trouble.set()
            while not self.soft_ids.hold(key, make, waits):
                self._check_alive()
                time.sleep(POLL_SECONDS / 10)

    def _discard(self, running: Running) -> None:
        if running.soft is not None:
            self.soft_ids.release(running.soft.key)

    def _begin(self, running: Running) -> None:
        if self._recovering:  # it begins with those before it
            return
        ids = running.row.ids
        if running.soft is not None:
            soft = self.soft_ids.ids(running.soft.key)
            ids = [i if slot == TEXT else soft[slot] for i, slot in zip(ids, running.row.slots, strict=True)]
        generated = running.tokens.ids
        self._manager.add_request(
            ids + generated,  # the cache that held them was lost
            request_id=running.name,
            max_new_tokens=running.tokens.params.max_tokens - len(generated),
            streaming=True,
            eos_token_id=sorted(running.tokens.end_ids) or -1,
        )

    def _stop(self, running: Running) -> None:
        self._manager.cancel_request(running.name)

    @property
    def _scheduler(self) -> Scheduler | None:
        processor = self._manager.batch_processor
        return None if processor is None else cast(Scheduler, processor.scheduler)

    @property
    def _takes_requests(self) -> bool:
        """Whether the library's thread is well."""
        return self._manager.background_thread_status.can_accept_new_requests() is None

    def _next(self, states: Sequence[RequestState]) -> list[Next | None]:
        """How the next tokens of requests are chosen, for the step that is prepared; None for one that takes no more.

        Which token it is says what the library will have read by then: the one before may not be known yet.
        """
        self.last_step = time.monotonic()
        rows = [(self._running.get(state.request_id), state.position_offset) for state in states]
        return [
            (running.tokens.params, read - len(running.row)) if self._is_live(running) else None
            for running, read in rows
        ]

    def _take(self, output: GenerationOutput) -> None:
        """A token, or the failure of one request, from the library's thread."""
        running = self._running.get(output.request_id)
        if not self._is_live(running):
            if not output.is_finished():  # over between two looks of the library: it has not heard
                self._manager.cancel_request(output.request_id)
        elif output.error is None:
            token, place = output.generated_tokens[-1], len(running.tokens.ids)
            if running.first_token_at is None:
                running.waited_seconds = output.lifespan[0] - output.created_time
            try:
                found = self._choices.found(output.request_id, place, token)
                if running.tokens.add(token, *found) and not output.is_finished():
                    self._stop(running)
                self._advance(running)
            except Exception as error:  # of one request: no reason to end the others
                log.exception("a request failed at one of its tokens")
                self._stop(running)
                self._end(running, InferenceFailed.of(error))
        elif self._takes_requests:  # its own failure, not the thread's
            self._end(running, InferenceFailed(f"the engine refused the request: {output.error}"))

    def _supervise(self) -> None:
        """Wait for the library's thread to die, and bring the requests to a new one or to an end."""
        try:
            while not self._closed:
                self._trouble.wait(POLL_SECONDS)
                if not self._closed and (self._trouble.is_set() or not self._manager.is_running()):
                    self._recover()
        except Exception as error:
            log.error("the generation engine died: %s", first_line(error), exc_info=error)
            self._die(InferenceFailed.of(error))
            self.on_death()

    def _recover(self) -> None:
        """Begin again with an empty cache; raises what no smaller step would mend.

        Whoever submits or cancels meanwhile waits for none of it: making graphs takes long.
        """
        with self._lock:
            self._recovering = True
        self._preempted = self.preemptions
        self._stop_manager()
        self._trouble.clear()
        status = self._manager.background_thread_status
        if (error := status.fatal_error) is not None:
            if not self._make_smaller(error):
                raise error
            status.fatal_error = error = None  # its frames hold the old cache, where the new one should go
            free_caches()
        self._kv_tokens, self._manager = fitted(self._kv_tokens, self._new_manager)
        with self._lock:
            self._recovering = False
            self.soft_ids.renumber()
            self._start_manager()
            for running in filter(self._is_live, list(self._running.values())):
                if len(running.row) + running.tokens.params.max_tokens > self.capacity_tokens:
                    message = f"the key/value cache has become too small for it: {self._kv_tokens} tokens"
                    self._end(running, InsufficientMemory(message))
                else:
                    self._begin(running)

    def _make_smaller(self, error: Exception) -> bool:
        """Whether trying again makes sense: steps are half as large, or the one request that cannot fit is refused."""
        if not is_out_of_memory(error):
            return False
        self.out_of_memory += 1
        with self._lock:
            first = next(filter(self._is_live, self._running.values()), None)
        if self.max_rows > 1 or self._step_tokens > SMALLEST_STEP_TOKENS:
            self.max_rows = max(1, self.max_rows // 2)
            self._step_tokens = max(SMALLEST_STEP_TOKENS, self._step_tokens // 2)
            log.warning("out of memory: on with steps of %d rows, %d tokens", self.max_rows, self._step_tokens)
        elif first is not None:
            self._end(first, InsufficientMemory(f"the request does not fit in memory ({first_line(error)})"))
        return True


def token_bytes(lm: FrozenLM) -> int:
    """Bytes that an engine allocates for each token of its cache: keys and values, and rows for soft tokens."""
    return lm.kv_bytes(1) + int(SOFT_ROWS * lm.width * lm.model.dtype.itemsize)


def _exclusive(lm: FrozenLM) -> Callable[[], None]:
    """Passes of the model, whoever makes them, one after the other until the function given back is called.

    During a step the library writes ``is_causal = False`` into the configuration; another pass would read or keep it.
    """
    turn, mine, over = threading.RLock(), threading.local(), threading.Event()

    def begin(*_: object) -> None:
        turn.acquire()
        if over.is_set():  # while this pass waited: nobody will end its turn
            turn.release()
            return
        mine.passes = getattr(mine, "passes", 0) + 1

    def end(*_: object) -> None:
        if getattr(mine, "passes", 0):  # not one that had begun before the engine came
            mine.passes -= 1
            turn.release()

    base = lm.model.base_model
    hooks = base.register_forward_pre_hook(begin), base.register_forward_hook(end, always_call=True)

    def let_go() -> None:
        with turn:  # after the pass under way: its end is one of the hooks
            over.set()
            for hook in hooks:
                hook.remove()

    return let_go


class _Router(OutputRouter):
    """Takes what the library's thread delivers, on that thread."""

    def __init__(self, engine: ContinuousEngine) -> None:
        super().__init__()
        self._engine = engine

    def deliver(self, output: GenerationOutput) -> None:
        self._engine._take(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self._engine._take(output)
        if (scheduler := self._engine._scheduler) is not None:
            self._engine.on_step(len(outputs), *scheduler.made(int(self._engine._way.overlapped)))

    def fail_and_deliver(self, state: RequestState, error: Exception) -> None:
        super().fail_and_deliver(state, error)
        if not self._engine._takes_requests:
            self._engine._trouble.set()
