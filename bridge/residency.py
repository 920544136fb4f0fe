"""Models in memory: loaded one at a time, shared, lent, and never more than the budget.

Sequential loading is real: a model that would not fit beside the others is loaded after idle ones were dropped.

The life of a loan: ``try_acquire`` looks whether the model is there → ``acquire`` stands in line → its turn → idle
models leave, longest unused first → the model is loaded → lent → ``release``. Two locks: ``_work`` is held while
models are loaded or dropped, which takes long; ``_changed`` guards the books and is held for moments only.
"""

import logging
import math
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from latentwire.bridge.config import Fingerprint
from latentwire.bridge.devices import default_device, default_dtype, is_out_of_memory
from latentwire.bridge.errors import InsufficientMemory, ModelInUse, first_line
from latentwire.bridge.memory import free_bytes, free_caches, held_bytes, mapped_apart, weights_bytes
from latentwire.bridge.models import FrozenLM, fingerprint_of, load_model, predicted_bytes
from latentwire.bridge.parking import HostCopies

log = logging.getLogger(__name__)

FREE_SHARE = 0.9  # of a device's free memory may be taken for what stays


@dataclass(eq=False)
class Resident:
    """A model in memory.

    Attributes:
        bytes: Of its weights.
        names: Under which it was lent.
        users: Loans not given back yet.
        idle_since: ``time.monotonic()`` at which the last loan ended.
        attached: What lives with it, as a generation engine with its cache: closers, and bytes.
    """

    lm: FrozenLM
    bytes: int
    names: set[str]
    users: int = 0
    idle_since: float = 0.0
    attached: list[tuple[Callable[[], object], int]] = field(default_factory=list)

    @property
    def attached_bytes(self) -> int:
        return sum(size for _, size in self.attached)

    @property
    def all_bytes(self) -> int:
        return self.bytes + self.attached_bytes


@dataclass
class Residency:
    """Holds frozen models within ``budget_bytes`` (None: no limit), each once whatever the names it goes by.

    Into the budget count weights, what is attached to them, and the largest activation noted for a model that stays;
    the last gives way where a model could otherwise not even run alone. ``copies`` keeps weights of models that gave
    way to others. ``history`` keeps the last events, as (event, model, resident bytes after it), ``counts`` all of them
    by event and model, and ``load_seconds`` the time that loading took by model; ``loading`` names the model being read
    right now.
    """

    budget_bytes: int | None = None
    device: torch.device = field(default_factory=default_device)
    dtype: torch.dtype | None = None
    load: Callable[..., FrozenLM] = load_model
    copies: HostCopies | None = None
    history: list[tuple[str, str, int]] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    load_seconds: dict[str, float] = field(default_factory=dict)
    loading: str | None = None
    _models: OrderedDict[str, Resident] = field(default_factory=OrderedDict)
    _activations: dict[str, int] = field(default_factory=dict)
    _keep_alive: dict[str, float] = field(default_factory=dict)
    _pinned: set[str] = field(default_factory=set)
    _work: threading.Lock = field(default_factory=threading.Lock)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _changes: int = 0
    _line: deque[object] = field(default_factory=deque)
    _short: object | None = None  # who, at the head of the line, waits for models in use to become idle

    @property
    def resident_bytes(self) -> int:
        """Bytes of all weights now held."""
        return sum(resident.bytes for resident in list(self._models.values()))

    def resident(self) -> dict[str, int]:
        """Weights in bytes by the name each model was loaded under, least recently used first."""
        return {name: resident.bytes for name, resident in list(self._models.items())}

    def find(self, name: str) -> Resident | None:
        """The model of a name, whichever name it was loaded under; None when it is not in memory."""
        with self._changed:
            return self._find(name)

    @contextmanager
    def use(self, name: str, wait_seconds: float = 0.0) -> Iterator[FrozenLM]:
        """Lend a model while the block runs; see ``acquire``."""
        lm = self.acquire(name, wait_seconds)
        try:
            yield lm
        finally:
            self.release(name)

    def acquire(self, name: str, wait_seconds: float = 0.0) -> FrozenLM:
        """Lend a model, loading it first where needed; it is not dropped before ``release``. Blocks: not for a loop.

        Where models in use stand in the way, waits up to ``wait_seconds`` for them; meanwhile later loans stand
        behind this one, also of models that are there, so that steady use of one cannot keep out another. Whoever
        holds a loan should therefore not wait for a second one. Waiting for another model to be read is not counted.

        Raises:
            InsufficientMemory: It does not fit the budget beside the models in use, or alone.
            ModelUnavailable: As ``load_model``.
        """
        if (lm := self.try_acquire(name)) is not None:
            return lm
        need, identity = self.predict(name), fingerprint_of(name)
        with self._in_line() as ticket:
            deadline: float | None = None
            while True:
                seen = self._changes
                if (lm := self._lend(name, identity, ticket)) is not None:
                    return lm
                if self._line[0] is ticket and (lm := self._bring_in(name, need, ticket)) is not None:
                    return lm
                deadline = self._wait(seen, deadline, wait_seconds, name, need)

    def try_acquire(self, name: str) -> FrozenLM | None:
        """Lend a model that is in memory and that nobody waits before; None otherwise, at once: fit for a loop."""
        return self._lend(name, None, None)

    def release(self, name: str) -> None:
        """Give back what ``acquire`` or ``try_acquire`` lent under this name."""
        with self._changed:
            resident = self._find(name)
            assert resident is not None and resident.users > 0, f"{name!r} is given back but was not lent"
            resident.users -= 1
            resident.idle_since = time.monotonic()
            self._note_change()

    def unload(self, name: str) -> int:
        """Drop a model, pinned or not (ModelInUse while it is lent); bytes that came back, 0 where it was not there."""
        with self._work:
            with self._changed:
                resident = self._find(name)
                if resident is None:
                    return 0
                if resident.users:
                    raise ModelInUse(f"{name!r} has {resident.users} users; expected none")
                self._pinned -= resident.names
                self._take_out(resident)
            return self._drop(resident)

    def pin(self, name: str) -> None:
        """Keep a model, from its next load on or at once, until ``unpin`` or ``unload``, whoever needs its room."""
        with self._changed:
            self._pinned.add(name)

    def is_pinned(self, name: str) -> bool:
        """Whether a model stays once it is in memory, under whatever name it was pinned."""
        with self._changed:
            return not self._pinned.isdisjoint(self._names(name))

    def unpin(self, name: str) -> None:
        """Let a model leave again when others need its room, or its time is over, under whatever name it was pinned."""
        with self._changed:
            self._pinned -= self._names(name)
            self._note_change()

    def keep(self, name: str, seconds: float | None) -> None:
        """Keep an idle model this long (None: for ever); of several wishes for one model the longest holds."""
        with self._changed:
            self._keep_alive[name] = max(self._keep_alive.get(name, 0.0), math.inf if seconds is None else seconds)

    def sweep(self, now: float | None = None) -> list[str]:
        """Drop idle models whose time is over at ``now`` (``time.monotonic()``) or that activations push over the
        budget; their names. None while a model is loaded or dropped."""
        if not self._work.acquire(blocking=False):
            return []
        try:
            with self._changed:
                now = time.monotonic() if now is None else now
                leaving = [r for r in self._idle() if now - r.idle_since >= self._kept_seconds(r)]
                for resident in leaving:
                    self._take_out(resident)
                leaving += self._make_room(0) or []
            names = [resident.lm.name for resident in leaving]
            for resident in leaving:
                self._drop(resident)
            return names
        finally:
            self._work.release()

    def note_activation(self, name: str, size_bytes: int) -> None:
        """What a batch needed beyond the weights; the largest counts in what must fit from now on."""
        with self._changed:
            self._activations[name] = max(self._activations.get(name, 0), size_bytes)

    def attach(self, name: str, closer: Callable[[], object], size_bytes: int) -> None:
        """Let something live with a lent model, as a generation engine with its cache: its bytes count in the budget
        (InsufficientMemory where they do not fit), and ``closer`` is called before the model is dropped."""
        with self._work:
            with self._changed:
                resident = self._find(name)
                assert resident is not None and resident.users > 0, f"{name!r} must be lent to attach to it"
                leaving = self._make_room(size_bytes)
                if leaving is None:
                    raise InsufficientMemory(self._does_not_fit(f"what is attached to {name!r}", size_bytes))
                resident.attached.append((closer, size_bytes))
            for other in leaving:
                self._drop(other, gives_way=True)

    def detach(self, name: str, closer: Callable[[], object]) -> None:
        """Undo ``attach`` on a model that is still lent: there is nothing to close after all."""
        with self._changed:
            if (resident := self._find(name)) is not None:
                resident.attached = [one for one in resident.attached if one[0] is not closer]

    def room(self, name: str) -> int:
        """Bytes that could be attached to a model in memory if all idle ones left: within the budget, and of what the
        device has free a share, so that activations keep the rest."""
        with self._changed:
            own = self._find(name)
            leaving = [resident for resident in self._idle() if resident is not own]
            free = int(FREE_SHARE * (free_bytes(self.device) + sum(resident.all_bytes for resident in leaving)))
            if self.budget_bytes is None:
                return free
            staying = [resident for resident in self._models.values() if resident not in leaving]
            return max(min(self.budget_bytes - self._total(staying), free), 0)

    def predict(self, name: str) -> int:
        """``predicted_bytes`` of a model here, with its errors (InsufficientMemory beyond the whole budget)."""
        need = predicted_bytes(name, self.dtype or default_dtype(self.device))
        if self.budget_bytes is not None and need > self.budget_bytes:
            raise InsufficientMemory(f"{name!r} needs {need} bytes; the memory budget is {self.budget_bytes}")
        return need

    @contextmanager
    def _in_line(self) -> Iterator[object]:
        ticket = object()
        with self._changed:
            self._line.append(ticket)
        try:
            yield ticket
        finally:
            with self._changed:
                self._line.remove(ticket)
                self._short = None if self._short is ticket else self._short
                self._note_change()

    def _wait(self, seen: int, deadline: float | None, wait_seconds: float, name: str, need: int) -> float | None:
        """Until something changes; the deadline, which runs from when models in use are in the way."""
        with self._changed:
            left = None
            if self._short is not None:
                deadline = time.monotonic() + wait_seconds if deadline is None else deadline
                left = deadline - time.monotonic()
                if left <= 0:
                    raise InsufficientMemory(self._does_not_fit(repr(name), need))
            self._changed.wait_for(lambda: self._changes != seen, left)
            return deadline

    def _lend(self, name: str, identity: Fingerprint | None, ticket: object | None) -> FrozenLM | None:
        with self._changed:
            if self._short not in (None, ticket):
                return None
            resident = self._find(name, identity)
            return None if resident is None else self._lent(resident, name)

    def _lent(self, resident: Resident, name: str) -> FrozenLM:
        resident.names.add(name)
        resident.users += 1
        self._models.move_to_end(resident.lm.name)
        return resident.lm if resident.lm.name == name else replace(resident.lm, name=name)

    def _find(self, name: str, identity: Fingerprint | None = None) -> Resident | None:
        return next((r for r in self._models.values() if name in r.names or r.lm.fingerprint == identity), None)

    def _names(self, name: str) -> set[str]:
        resident = self._find(name)
        return {name} if resident is None else {name, *resident.names}

    def _bring_in(self, name: str, need: int, ticket: object) -> FrozenLM | None:
        """Make room and load; None where models in use are in the way."""
        with self._work:
            with self._changed:
                leaving = self._make_room(need, activation=self._activations.get(name, 0), most=0)
                if (leaving is None) != (self._short is ticket):
                    self._short = ticket if leaving is None else None
                    self._note_change()
                if leaving is None:
                    return None
                self.loading = name
            try:
                for resident in leaving:
                    self._drop(resident, gives_way=True)
                started = time.monotonic()
                lm = self._returned(name)
                if lm is None:
                    with mapped_apart():
                        lm = self.load(name, device=self.device, dtype=self.dtype)
                self.load_seconds[name] = self.load_seconds.get(name, 0.0) + time.monotonic() - started
                with self._changed:
                    resident = self._models[lm.name] = Resident(lm, weights_bytes(lm.model), {name})
                    self._note("load", name)
                    return self._lent(resident, name)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise InsufficientMemory(f"{name!r} needs {need} bytes on {self.device}: {first_line(error)}") from None
            finally:
                self.loading = None

    def _make_room(self, need: int, *, activation: int = 0, most: int = 1) -> list[Resident] | None:
        """Take idle models out of the books, longest unused first, until ``need`` more bytes fit; they are to be
        dropped. None, and nothing taken, where that is not enough. Once no more than ``most`` stay, activations give
        way: a model must be able to run alone."""
        staying, leaving, idle = list(self._models.values()), list[Resident](), deque(self._idle())
        while self.budget_bytes is not None and need + self._total(staying, activation) > self.budget_bytes:
            if idle and len(staying) > most:
                staying.remove(idle[0])
                leaving.append(idle.popleft())
                continue
            if len(staying) > most or need + sum(resident.all_bytes for resident in staying) > self.budget_bytes:
                return None
            break
        for resident in leaving:
            self._take_out(resident)
        return leaving

    def _total(self, staying: list[Resident], activation: int = 0) -> int:
        held = sum(resident.all_bytes for resident in staying)
        noted = (self._activations.get(name, 0) for resident in staying for name in resident.names)
        return held + max(activation, *noted, 0)

    def _kept_seconds(self, resident: Resident) -> float:
        return max((self._keep_alive[name] for name in resident.names if name in self._keep_alive), default=math.inf)

    def _idle(self) -> list[Resident]:
        return [r for r in self._models.values() if r.users == 0 and self._pinned.isdisjoint(r.names)]

    def _take_out(self, resident: Resident) -> None:
        del self._models[resident.lm.name]
        self._note_change()

    def _returned(self, name: str) -> FrozenLM | None:
        return None if self.copies is None else self.copies.bring(name, fingerprint_of(name), self.device)

    def _drop(self, resident: Resident, *, gives_way: bool = False) -> int:
        """Close and free a model that is out of the books; bytes that came back. What gives way may leave a copy."""
        name, before = resident.lm.name, held_bytes(self.device)
        for closer, _ in reversed(resident.attached):
            try:
                closer()
            except Exception:
                log.exception("what was attached to %s could not be closed", name)
        resident.attached.clear()
        if self.copies is not None:
            (self.copies.park if gives_way else self.copies.forget)(resident.lm)
        del resident.lm  # the caller still holds the resident
        free_caches()
        freed = before - held_bytes(self.device)
        self._note("drop", name)
        log.info("dropped %s: %d bytes of weights, %d bytes came back", name, resident.bytes, freed)
        return freed

    def _note(self, event: str, name: str) -> None:
        self.counts[event, name] += 1
        self.history.append((event, name, self.resident_bytes))
        del self.history[:-256]

    def _note_change(self) -> None:
        self._changes += 1
        self._changed.notify_all()

    def _does_not_fit(self, what: str, need: int) -> str:
        held = sum(resident.all_bytes for resident in self._models.values() if resident not in self._idle())
        return f"{what} needs {need} bytes; {held} of the {self.budget_bytes} are in use"
