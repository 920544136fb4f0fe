"""A run from its first line to its last: prepare, check, step by step, validate, save, stop when asked."""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from latentwire.bridge.checkpoint import CONFIG, read_manifest, save_bridge
from latentwire.bridge.config import Manifest
from latentwire.bridge.drift import save_statistics
from latentwire.bridge.errors import InvalidRequest, TrainingFailed
from latentwire.bridge.evaluation.metrics import METRICS
from latentwire.training.alarms import Alarm, Alarms
from latentwire.training.base import completed
from latentwire.training.config import TrainConfig
from latentwire.training.data import Prefetch
from latentwire.training.duration import Pace
from latentwire.training.machine import graphs, stop_requests
from latentwire.training.monitor import Monitor, StepRecord, open_trackers, records_of, watch
from latentwire.training.prepare import prepare, sampler_of
from latentwire.training.run import Run
from latentwire.training.state import load_state, save_state, states_in
from latentwire.training.step import take_step
from latentwire.training.tokens import Tokens
from latentwire.training.validation import usual, validate

log = logging.getLogger(__name__)

BEST = "best"  # folder of the best checkpoint so far, inside the run's
NUMBERS = ("best", "micro_batch", "out_of_memory_count")  # attributes of a run that its state keeps


def train(
    config: TrainConfig,
    console: Console,
    *,
    resume: bool = False,
    overwrite: bool = False,
    ready: Callable[[], None] = lambda: None,
) -> Manifest:
    """Train, saving checkpoint and state as it goes; return the last checkpoint's manifest.

    ``ready`` is called once nothing is refused any more and the folder is there, in the process that writes.

    Raises:
        InvalidRequest: ``out`` already holds a checkpoint and neither ``resume`` nor ``overwrite`` is given, another
            run writes there, the state to resume is missing or of another configuration, or an example does not fit
            the receiver.
        TrainingFailed: The run cannot go on, or an alarm stopped it; the last saved checkpoint is kept.
        SystemExit: SIGTERM or SIGUSR1 came; the state was saved, and the code is 0 so that a scheduler can requeue.
    """
    _check_folder(config, resume=resume, overwrite=overwrite)
    with stop_requests() as asked, disk_errors(config.out), ExitStack() as stack:
        run = prepare(completed(config), console)
        stack.callback(run.ranks.leave)
        if run.ranks.first:
            stack.enter_context(_only_run(config.out))
            _check_folder(config, resume=resume, overwrite=overwrite)  # again: it took long to get here
        start = _begin(run, ready, resume=resume, overwrite=overwrite)
        console = console if run.ranks.first else Console(quiet=True)
        console.print(headline(run, start), markup=False, soft_wrap=True)
        folder, trackers = (config.out, open_trackers(config)) if run.ranks.first else (None, None)
        if trackers is not None:
            stack.callback(trackers.end_training)
        monitor = stack.enter_context(watch(folder, console, total=config.max_steps, start=start, trackers=trackers))
        alarms = Alarms(rows=run.rows_per_step // run.ranks.count, warm_up_steps=config.warmup_steps)
        alarms.replay(records_of(config.out))
        pace = Pace(run)
        for step, rows, waited in _steps(run, start, stack):
            before = run.out_of_memory_count
            record = take_step(run, step, rows, waited=waited)
            if record.out_of_memory_count > before:
                message = f"out of memory: the same rows again in passes of {record.micro_batch}"
                monitor.event(step + 1, "out_of_memory", message=message, micro_batch=record.micro_batch)
            monitor.log(record)
            if (to_go := pace.after(record)) is not None:
                monitor.say(to_go)
            collapsed = [alarm for alarm in _observe(alarms, record, monitor) if alarm.collapse]
            _after(run, step + 1, monitor)
            stopped = bool(collapsed) and config.on_collapse == "stop"
            if run.ranks.any(stopped or asked.name is not None, run.bridge.encoder.norm.weight.device):
                _save(run, step + 1, monitor)
                if stopped:
                    raise TrainingFailed(f"step {step + 1}: stopped and saved: {collapsed[0].message}")
                monitor.say(f"{asked.name or 'a signal'}: saved after step {step + 1}; --resume goes on from there")
                raise SystemExit(0)
        return _save(run, config.max_steps, monitor)


def _begin(run: Run, ready: Callable[[], None], *, resume: bool, overwrite: bool) -> int:
    """Take possession of the run's folder, and return the steps that were done in it."""
    if run.ranks.first:
        ready()
        if overwrite:  # nothing of the run that is replaced must ever be taken for this one's
            for path in states_in(run.config.out):
                path.unlink()
            shutil.rmtree(run.config.out / BEST, ignore_errors=True)
    start = 0
    if resume:
        start, numbers = load_state(run.config.out, run.identity, run)
        for name in NUMBERS:
            setattr(run, name, numbers.get(name, getattr(run, name)))
    run.ranks.barrier()
    return start


@contextmanager
def _only_run(out: Path) -> Iterator[None]:
    """Hold the run's folder: a second run there would mix its states with this one's (InvalidRequest).

    Runs on several machines do not see each other where the folder is shared by NFS.
    """
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = os.open(out, os.O_RDONLY)
        stack.callback(os.close, folder)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequest(f"{out}: another run is writing there; give another --out", param="out") from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): nothing keeps another run from writing there", out, error.strerror)
        else:
            stack.callback(fcntl.flock, folder, fcntl.LOCK_UN)  # a forked process may live longer than the run
        yield


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """A disk that is full or gone ends a run with one sentence: what was saved whole is still there."""
    try:
        yield
    except OSError as error:
        where = error.filename or out
        raise TrainingFailed(f"{where}: {error.strerror or error}; what was saved in {out} before is kept") from None


def _steps(run: Run, start: int, stack: ExitStack) -> Iterator[tuple[int, list[Tokens], float]]:
    """Each step's number, this process's rows of it, and the seconds spent waiting for them."""
    sampler = sampler_of(run)

    def make(step: int) -> list[Tokens]:
        name = run.receiver_of(step)
        rows = [run.sample(name, i) for i in run.ranks.share(sampler.batch(step))]
        run.states.fetch([row.source for row in rows])
        return rows

    ahead = stack.enter_context(Prefetch(make, start, run.config.max_steps))
    for step in range(start, run.config.max_steps):
        yield step, *ahead.take()


def _after(run: Run, done: int, monitor: Monitor) -> None:
    """What is due after ``done`` steps: a validation, the best checkpoint, a save; the last save is the caller's."""
    config, last = run.config, done == run.config.max_steps
    if config.validate_every and (last or done % config.validate_every == 0):
        _validate(run, done, monitor)
    if done % config.save_every == 0 and not last:
        _save(run, done, monitor)
    if config.compile and done % config.save_every == 0:
        monitor.event(done, "compile", graphs=graphs())


def _observe(alarms: Alarms, record: StepRecord, monitor: Monitor) -> list[Alarm]:
    """Alarms that begin with a step, printed and written."""
    begun = alarms.observe(record)
    for alarm in begun:
        monitor.event(alarm.step, "alarm", name=alarm.name, message=alarm.message)
        monitor.say(f"alarm at step {alarm.step}: {alarm.message}")
    return begun


def _validate(run: Run, done: int, monitor: Monitor) -> None:
    # A sharded receiver answers only with all processes at it.
    metric, value = validate(run, monitor.say) if run.ranks.first or run.config.fsdp else ("loss", 0.0)
    best = run.ranks.first and (run.best is None or METRICS[metric].is_better(value, run.best))
    if run.ranks.first:
        monitor.event(done, "validation", metric=metric, value=value, best=best)
        monitor.say(f"step {done}: validation {metric} {value:.3f}" + (" (best so far)" if best else ""))
    if run.ranks.any(best, run.bridge.encoder.norm.weight.device):
        run.best = value
        _write(run, run.config.out / BEST, finished=True)
    run.ranks.barrier()


def _write(run: Run, folder: Path, *, finished: bool) -> int:
    """Write the checkpoint, and what its latents are like where it is one to serve; its bytes.

    All processes come here, and the first one writes.
    """
    manifest = save_bridge(folder, run.bridge) if run.ranks.first else None
    # A sharded sender reads only with all processes at it.
    statistics = usual(run) if finished and (run.ranks.first or run.config.fsdp) else None
    if manifest is None:
        return 0
    if statistics is not None:
        save_statistics(folder, manifest.bridge_id, statistics)
    return manifest.encoder.bytes + sum(part.bytes for part in manifest.heads.values())


def _check_folder(config: TrainConfig, *, resume: bool, overwrite: bool) -> None:
    done, resumable = (config.out / CONFIG).exists(), any(states_in(config.out))
    if not resume and not overwrite and (done or resumable):
        raise InvalidRequest(f"{config.out} already holds a checkpoint; give --resume, --overwrite or another --out")
    if resume and not overwrite and done and not resumable:
        raise InvalidRequest(f"{config.out} holds a checkpoint but no state to go on from; --overwrite replaces it")


def headline(run: Run, start: int) -> str:
    """What is trained between which models on what, in one line."""
    trained = sum(p.numel() for p in run.parameters)
    return (
        f"{run.bridge.config.sender.name} layer {','.join(map(str, run.bridge.config.layers))} → "
        f"{run.bridge.config.encoder.kind} ({trained:,} trained weights) → {', '.join(run.config.receivers)}, "
        f"task {run.task.name}"
        + (f", {run.ranks.count} processes" if run.ranks.count > 1 else "")
        + (f", resumed after step {start}" if start else "")
    )


def _save(run: Run, step: int, monitor: Monitor) -> Manifest:
    """State first: killed between the two, the run goes on from the state and writes the checkpoint again."""
    if not all(bool(p.isfinite().all()) for p in run.parameters):
        raise TrainingFailed(f"step {step}: a weight is not finite; what was saved before is kept")
    started, state_bytes = time.perf_counter(), 0
    if run.ranks.first:
        numbers = {name: getattr(run, name) for name in NUMBERS}
        state_bytes = save_state(run.config.out, run.identity, step, run, keep=run.config.keep_last, **numbers)
    checkpoint_bytes = _write(run, run.config.out, finished=step == run.config.max_steps)
    if run.ranks.first:
        seconds = time.perf_counter() - started
        monitor.event(step, "save", state_bytes=state_bytes, checkpoint_bytes=checkpoint_bytes, seconds=seconds)
    run.ranks.barrier()
    return read_manifest(run.config.out)
