"""Studies: where a search is kept, and how it is opened again after anything may have happened to whoever kept it.

On one machine a study is a journal file, with one tuner at a time: a lock says so. What a killed tuner left half written at the end is cut
off, and its trial in flight goes back to the queue. Many machines share a study in an RDB, or through Optuna's gRPC proxy: there every
worker sends heartbeats, and a trial whose worker fell silent goes back to the queue.
"""

from __future__ import annotations

import json
import os
import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lagen import data

HEARTBEAT, GRACE = 10, 60
"""Seconds between heartbeats, and of silence after which a trial counts as lost."""

STARTS = 8
"""How often a database is asked, while others make its tables."""

OUTCOME = "outcome"
"""The attribute that a trial has once it is finished; a failed trial without one was lost."""


LET_GO = 5.0
"""Seconds that a killed tuner's lock may live on: in a child that was forked and has not begun its own program."""


class Busy(Exception):
    """Says that another tuner keeps the journal."""


class BadStorage(Exception):
    """Says why a storage cannot be opened."""


class _Held(BaseJournalFileLock):  # type: ignore[misc]
    """The lock inside the journal: held already, by the lock around it."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def journal_of(study: str) -> Path:
    """Returns the journal file of a study."""
    return data.cache() / "studies" / f"{study}.journal"


def mend(path: Path) -> int:
    """Cuts off what is torn at the end of a journal and returns how many bytes that were: the last line, or all from a damaged one on."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return 0
    good = 0
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n") or not _is_json(line):
            break
        good += len(line)
    if good < len(content):
        os.truncate(path, good)
    return len(content) - good


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


@contextmanager
def opened(name: str, storage: str = "", seed: int | None = None) -> Iterator[Study]:
    """Opens a study, made where there is none, and puts lost trials back in its queue. ``storage``: "" for the journal, or an URL.

    Raises Busy where another tuner keeps the journal, BadStorage where the URL leads nowhere.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if storage:
        yield _study(name, _shared(storage), seed)
        return
    path = journal_of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".tuner"))
    try:
        with lock.acquire(timeout=LET_GO):
            mend(path)
            study = _study(name, JournalStorage(JournalFileBackend(str(path), _Held())), seed)
            for lost in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                study.tell(lost.number, state=TrialState.FAIL)
                requeue(study, lost)
            yield study
    except Timeout as error:
        raise Busy(f"another tuner keeps {path}; give a --storage URL to tune one study from several processes") from error


def _shared(url: str) -> BaseStorage:
    """Opens the storage of an URL: grpc://host:port, or whatever SQLAlchemy knows."""
    import sqlalchemy.exc

    if url.startswith("grpc://"):
        host, _, port = url.removeprefix("grpc://").partition(":")
        if not host or not port.isdigit():
            raise BadStorage(f"{url!r}: write grpc://HOST:PORT")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.storages.GrpcStorageProxy(host=host, port=int(port))
        except ImportError as missing:
            raise BadStorage(f"{url}: {missing}; pip install 'lagen[grpc]'") from missing
    if url.startswith("sqlite:"):
        raise BadStorage(f"{url}: SQLite lets two workers take one trial; give a PostgreSQL or MySQL URL, or none for a journal file")
    if url.startswith("postgresql://"):
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        retry = RetryHeartbeatStaleTrialCallback(max_retry=3)
    for left in reversed(range(STARTS)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return RDBStorage(url, heartbeat_interval=HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=retry)
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError, sqlalchemy.exc.InternalError) as error:
            # workers that start at once make the same tables: all but one fail, and find them made
            if not left:
                raise BadStorage(f"{url}: {str(error).splitlines()[0]}") from error
            time.sleep(random.uniform(0.2, 1.0))
        except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError) as error:
            raise BadStorage(f"{url}: {str(error).splitlines()[0]}") from error
    raise AssertionError(url)


def _study(name: str, storage: BaseStorage, seed: int | None) -> Study:
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=8)
    return optuna.create_study(study_name=name, storage=storage, sampler=sampler, load_if_exists=True, direction="minimize")


def requeue(study: Study, lost: FrozenTrial) -> None:
    """Puts the point of a lost trial back in the queue."""
    if lost.params:
        study.enqueue_trial(lost.params, skip_if_exists=False)


def recover(study: Study) -> None:
    """Puts back in the queue what workers that fell silent were at, where the storage keeps heartbeats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)


@contextmanager
def beating(study: Study, trial_id: int) -> Iterator[None]:
    """Sends heartbeats for a trial, where the storage keeps them."""
    with get_heartbeat_thread(trial_id, study._storage):
        yield
