"""Running the points of sweeps: which are new, where they run, what became of them.

Source: none.  Points run in the processes of a Dask cluster: a local one by default, or one that
is named by its scheduler's address.  A worker stores what it finished itself before it answers, if
it shares the store's folder with the lab; the lab stores what it hears of.

Invariants: a finished point is on disk before anything else is told of it; a point that kills its
worker is tried again a few times, then it is broken and the others go on; a worker that has other
code than the lab measures nothing.
"""

import contextlib
import inspect
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from understudy.guests import GuestError, debian
from understudy.lab import version
from understudy.lab.discover import Loaded, load
from understudy.lab.experiment import Skip
from understudy.lab.store import Key, Store
from understudy.lab.table import BROKEN, DONE, SKIPPED, Record, Table

KERNEL = "kernel"  # a parameter of this name is a guest that `understudy fetch` knows
LOST_WORKERS = 3  # so many workers may die of one point


@dataclass(frozen=True)
class Task:
    """One point, as a worker gets it."""

    path: Path  # the experiment that it was planned for
    params: dict[str, Any]
    key: Key
    store: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a task; `status` as in `table`."""

    status: str
    values: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    wall_s: float = 0.0
    is_old: bool = False


@dataclass
class Plan:
    """Which points the experiments want, which of them are known, and which must be run."""

    wanted: list[tuple[Loaded, list[tuple[dict[str, Any], str]]]]  # parameters, digest of the key
    known: dict[str, Outcome]
    tasks: dict[str, Task]

    def table(self, loaded: Loaded) -> Table:
        """What is known about one experiment's points."""
        records = []
        for params, digest in next(points for one, points in self.wanted if one is loaded):
            found = self.known.get(digest, Outcome(BROKEN, reason="not run"))
            values = loaded.experiment.select(found.values) if found.status == DONE else {}
            records.append(
                Record(params, found.status, values, found.reason, found.wall_s, found.is_old)
            )
        return Table(records)


def plan(
    experiments: Sequence[Loaded],
    store: Store,
    *,
    quick: bool = False,
    fresh: bool = False,
    say: Callable[[str, float | None], None] = lambda text, share: None,
) -> Plan:
    """Look up every point in the store; fetch the guests that the others need."""
    made = Plan([], {}, {})
    guests: dict[str, str | Skip] = {}
    for loaded in experiments:
        measure = loaded.experiment.measure
        code = version.of_measure(Path(inspect.getfile(measure)).resolve())
        points = []
        for params in loaded.experiment.points(quick):
            guest = _guest(params, guests, say)
            is_there = not isinstance(guest, Skip)
            name = f"{measure.__module__}.{measure.__qualname__}"
            key = Key.of(name, params, code, guest if not isinstance(guest, Skip) else "")
            points.append((params, key.digest))
            if key.digest in made.known or key.digest in made.tasks:
                continue
            old = None if fresh else store.get(key)
            if not is_there:
                made.known[key.digest] = Outcome(SKIPPED, reason=str(guest))
            elif old is not None:
                made.known[key.digest] = Outcome(
                    DONE, old["values"], wall_s=old["wall_s"], is_old=True
                )
            else:
                made.tasks[key.digest] = Task(loaded.path, params, key, store.folder)
        made.wanted.append((loaded, points))
    return made


def kept(made: Plan, store: Store) -> int:
    """How many points of a plan are finished, with what workers stored but could not report."""
    known = {digest for digest, outcome in made.known.items() if outcome.status == DONE}
    stored = {digest for digest, task in made.tasks.items() if store.get(task.key) is not None}
    return len(known | stored)


def _guest(
    params: dict[str, Any],
    seen: dict[str, str | Skip],
    say: Callable[[str, float | None], None],
) -> str | Skip:
    """The version of the guest that a point names, or why it cannot be had."""
    name = params.get(KERNEL)
    if name is None:
        return ""
    if name not in seen:
        try:
            seen[name] = debian.fetch(name, say).version
        except GuestError as error:
            seen[name] = Skip(f"guest {name}: {error}")
    return seen[name]


def measure(task: Task) -> Outcome:
    """Run one point, here.  What a worker executes."""
    loaded = load(task.path)
    function = loaded.experiment.measure
    own = version.of_measure(Path(inspect.getfile(function)).resolve())
    if own != task.key.version:
        return Outcome(
            BROKEN,
            reason=f"this worker has version {own} of the code, the lab has {task.key.version}: "
            "start it from the same sources",
        )
    begin = time.monotonic()
    try:
        values = dict(function(**task.params))
    except Skip as reason:
        return Outcome(SKIPPED, reason=str(reason))
    except Exception as error:
        where = traceback.format_exc().strip()
        line = f"{type(error).__name__}: {error}".partition("\n")[0]
        return Outcome(BROKEN, {}, f"{line}\n{where}", time.monotonic() - begin)
    done = Outcome(DONE, values, wall_s=time.monotonic() - begin)
    with contextlib.suppress(OSError):  # a worker elsewhere may not have the folder
        if task.store.is_dir():
            Store(task.store).put(task.key, done.values, done.wall_s)
    return done


def run_here(tasks: dict[str, Task]) -> Generator[tuple[str, Outcome], None, None]:
    """One after the other in this process: for debuggers."""
    for digest, task in tasks.items():
        yield digest, measure(task)


def run_on_dask(
    tasks: dict[str, Task], *, scheduler: str | None, workers: int | None
) -> Generator[tuple[str, Outcome], None, None]:
    """In parallel processes; yields each point as it finishes."""
    import dask
    from distributed import Client, LocalCluster, as_completed

    dask.config.set({"distributed.scheduler.allowed-failures": LOST_WORKERS})
    with contextlib.ExitStack() as stack:
        if scheduler is None:
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                memory_limit=0,  # guests' RAM is sparse: what looks used may not be
                dashboard_address=None,
                silence_logs="CRITICAL",
            )
            stack.callback(cluster.close, timeout=5)
            client = stack.enter_context(Client(cluster, set_as_default=False))
        else:
            client = stack.enter_context(Client(scheduler, set_as_default=False, timeout="5s"))
        # What boots a kernel takes longest: begin with it, so that nobody waits for it at the end.
        ordered = sorted(tasks, key=lambda digest: KERNEL not in tasks[digest].params)
        futures = {
            client.submit(
                measure, tasks[digest], key=f"point-{digest}", pure=False, priority=-place
            ): digest
            for place, digest in enumerate(ordered)
        }
        try:
            arriving = as_completed(
                list(futures), loop=client.loop, with_results=True, raise_errors=False
            )
            for future, result in arriving:
                digest = futures[future]
                if future.status == "finished":
                    yield digest, result
                else:
                    yield digest, Outcome(BROKEN, reason=_lost(future))
        except BaseException:
            client.cancel(list(futures), force=True)
            raise


def _lost(future: Any) -> str:
    error = future.exception() if future.status == "error" else None
    if type(error).__name__ == "KilledWorker":
        return f"{LOST_WORKERS + 1} workers died of this point, one after the other"
    return f"{future.status}: {error!r}"


def run(
    made: Plan,
    store: Store,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    on_done: Callable[[Task, Outcome], None] = lambda task, outcome: None,
) -> None:
    """Run what the plan lacks.  `workers`: how many processes; 0 means in this one."""
    if not made.tasks:
        return
    store.folder.mkdir(parents=True, exist_ok=True)
    if workers == 0 and scheduler is None:
        outcomes = run_here(made.tasks)
    else:
        outcomes = run_on_dask(made.tasks, scheduler=scheduler, workers=workers)
    with contextlib.closing(outcomes):
        for digest, outcome in outcomes:
            task = made.tasks[digest]
            if outcome.status == DONE and store.get(task.key) is None:
                store.put(task.key, outcome.values, outcome.wall_s)
            made.known[digest] = outcome
            on_done(task, outcome)
