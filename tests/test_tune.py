"""The tuner: what it tries, what it believes, what it never chooses, and what is left when it is killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import optuna
import pytest

from lagen import data
from lagen.ir.tunable import Config, Tunable, Tunables
from lagen.runtime.choice import processor
from lagen.spec.read import read
from lagen.tune.job import Job, job
from lagen.tune.measure import Measure
from lagen.tune.modelled import Model, unfit
from lagen.tune.outcome import Failed, Outcome, Reason, Timed
from lagen.tune.report import draw
from lagen.tune.run import _choose, run, study_of
from lagen.tune.search import Budget, search, state_of
from lagen.tune.space import space_of
from lagen.tune.studies import BadStorage, Busy, journal_of, mend, opened
from tests.tuner.tuner import QUICK, quick_job

HERE = Path(__file__).parent
QUICK_STUDY = study_of(quick_job(), space_of(quick_job()))
SPACE = Tunables((Tunable("forward a", (1, 2, 4, 8), 2, "a"), Tunable("forward b", (1, 2, 3), 1, "b")))


@pytest.fixture(autouse=True)
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gives each test an empty cache folder."""
    monkeypatch.setenv("LAGEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@dataclass
class Told:
    """A judge that knows what each config is worth, and remembers what it was asked."""

    worth: dict[tuple[int, int], Outcome] = field(default_factory=dict)
    asked: list[tuple[int, int]] = field(default_factory=list)

    def judge(self, config: Config, incumbent: Config, known: object) -> Outcome:
        a, b = config.table["forward a"], config.table["forward b"]
        self.asked.append((a, b))
        return self.worth.get((a, b), timed(1.0))


def timed(ratio: float, noise: float = 0.02) -> Timed:
    return Timed(ratio, ratio, noise, 100 * ratio, 100.0)


def searched(judge: Told, trials: int = 100, space: Tunables = SPACE):
    with opened("s", seed=0) as study:
        return search(study, space, judge, Budget(trials), seed=0)


# ---- what it tries ----------------------------------------------------------------------------------------------------------------


def test_the_default_and_its_neighbours_come_first_and_no_point_twice() -> None:
    judge = Told()
    searched(judge, 4)
    assert judge.asked == [(2, 1), (1, 1), (4, 1), (2, 2)]
    searched(judge)  # goes on
    assert len(judge.asked) == 12 and set(judge.asked) == {(a, b) for a in (1, 2, 4, 8) for b in (1, 2, 3)}
    searched(judge)  # nothing is left
    assert len(judge.asked) == 12


def test_what_cannot_run_costs_one_trial_and_is_counted_by_its_reason() -> None:
    failures = {
        (1, 1): Failed(Reason.COMPILE),
        (4, 1): Failed(Reason.SPILLS, "k 8 bytes", 8.0),
        (2, 2): Failed(Reason.CRASH),
        (8, 3): Failed(Reason.HANG),
    }
    state = searched(Told(dict(failures)))
    assert state.failures == Counter(f.reason for f in failures.values()) and len(state.done) == 12
    with opened("s") as study:
        states = Counter(t.state.name for t in study.get_trials() if t.user_attrs)
        assert states == {"COMPLETE": 8, "PRUNED": 2, "FAIL": 2}


def test_nothing_replaces_the_default_unless_it_wins_by_more_than_the_noise() -> None:
    near = searched(Told({(4, 1): timed(0.985), (8, 1): timed(0.99, 0.3), (1, 2): timed(0.75, 0.3)}))
    assert near.best is not None and near.best.config == SPACE.default
    shutil.rmtree(journal_of("s").parent)
    clear = searched(Told({(4, 1): timed(0.9), (8, 1): timed(0.985)}))
    assert clear.best is not None and clear.best.config == Config.of({"forward a": 4, "forward b": 1})


def test_a_default_whose_trial_was_lost_is_judged_before_anything_replaces_it() -> None:
    slower = {(1, 1): timed(1.2), (4, 1): timed(1.1)}
    state = searched(Told(slower), 3)
    state = replace(state, done=tuple(d for d in state.done if d.config != SPACE.default))
    assert len(state.done) == 2
    judge = Told(slower)
    assert _choose(judge, SPACE, state)[0] == Config() and judge.asked[0] == (2, 1)
    unfit_default = Told(slower | {(2, 1): Failed(Reason.SPILLS, "k 8 bytes", 8.0)})
    assert _choose(unfit_default, SPACE, state)[0] == Config.of({"forward a": 4})


def test_where_all_spill_the_least_is_chosen_of_those_whose_numbers_are_right() -> None:
    class Doubting(Model):
        def confirm(self, config: Config) -> Failed | None:
            return Failed(Reason.WRONG) if config.table["forward a"] == 8 else None

    spills = {(a, b): Failed(Reason.SPILLS, "k", 100.0 / a + b) for a in (1, 2, 4, 8) for b in (1, 2, 3)}
    state = searched(Told(dict(spills)))
    assert state.best is None
    chosen, proof = _choose(Doubting(quick_job()), SPACE, state)
    assert chosen == Config.of({"forward a": 4}) and proof == spills[4, 1]


def test_code_that_spills_or_does_not_fit_is_refused_before_it_is_timed() -> None:
    from lagen.runtime.launches import Gathered
    from lagen.targets.compile import Report
    from lagen.targets.launch import describe
    from lagen.targets.target import find

    launch = describe("m", "k", {}, {}, 4, 2, find("cuda:86"))

    def reason(**needs: object) -> Reason | None:
        found = unfit([(Gathered("v", "forward", launch, 1), Report("k", "cuda:86", **needs))])  # type: ignore[arg-type]
        return found.reason if found else None

    assert reason() is None and reason(shared_bytes=101_376) is None
    assert reason(shared_bytes=101_377) == Reason.SHARED and reason(spill_bytes=8) == Reason.SPILLS
    assert reason(failure="CompilationError") == Reason.COMPILE and reason(failure="took longer than 9 s") == Reason.HANG


# ---- what it never chooses --------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_a_wrong_config_and_a_racy_one_are_never_selected() -> None:
    j = job(read(data.spec("simple_gla")), processor(), True, ("forward",), "fp32", {"K": 16, "V": 16}, 1, 256, 2)
    measure = Measure(j, 200.0, 5, (sys.executable, "-m", "tests.tuner.planted_trial"))
    default = space_of(j).default
    outcomes = {tile: measure.judge(Config.of(default.table | {"forward tile": tile}), default, ()) for tile in (8, 16, 32)}
    assert isinstance(outcomes[16], Timed), outcomes[16]
    assert isinstance(outcomes[8], Failed) and outcomes[8].reason == Reason.WRONG, outcomes[8]
    assert isinstance(outcomes[32], Failed) and outcomes[32].reason in (Reason.RACE, Reason.WRONG), outcomes[32]


def test_a_trial_that_hangs_or_crashes_costs_one_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    space = space_of(quick_job())
    monkeypatch.setenv("QUICK_SECONDS", "60")
    start = time.monotonic()
    hung = Measure(quick_job(), 1.0, 3, QUICK).judge(space.default, space.default, ())
    assert isinstance(hung, Failed) and hung.reason == Reason.HANG and time.monotonic() - start < 20
    monkeypatch.setenv("QUICK_SECONDS", "0")
    crashing = Config.of(space.default.table | {"forward tile": 64, "forward wide": 4})
    crashed = Measure(quick_job(), 20.0, 3, QUICK).judge(crashing, space.default, ())
    assert isinstance(crashed, Failed) and crashed.reason == Reason.CRASH


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_tuned_config_is_used_and_agrees_in_a_fresh_process(cold: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lagen",
        "tune",
        "simple_gla",
        "--trials",
        "3",
        "--T",
        "256",
        "--pass",
        "forward",
        "--write",
        "--rounds",
        "5",
    ]
    first, second = (subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=500) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "3 of" in first.stdout and "6 of" in second.stdout  # the second run went on
    code = (
        "import torch, sys; from lagen import load; op = load('simple_gla')\n"
        "q, v, g = torch.randn(1, 256, 8, 64), torch.randn(1, 256, 8, 64), -torch.rand(1, 256, 8)\n"
        "o, p = op(q, q, v, g), op(q, q, v, g, backend='oracle'); assert (o - p).norm() / p.norm() < 2e-5\n"
        "assert 'optuna' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


# ---- what is left -----------------------------------------------------------------------------------------------------------------


def test_a_torn_journal_is_mended_and_what_was_finished_stays(cold: Path) -> None:
    judge = Told()
    searched(judge, 5)
    path = journal_of("s")
    whole = path.read_bytes()
    for cut in (1, 7, 40):
        path.write_bytes(whole + whole.splitlines(keepends=True)[-1][:-cut])
        with opened("s") as study:
            assert len(state_of(study, SPACE).done) == 5
    path.write_bytes(whole + b"\x00\xff{not json\n")
    assert mend(path) == 12 and path.read_bytes() == whole


def test_a_trial_in_flight_goes_back_to_the_queue() -> None:
    judge = Told()
    searched(judge, 2)
    with opened("s") as study:
        lost = study.ask(
            {
                "forward a": optuna.distributions.CategoricalDistribution((1, 2, 4, 8)),
                "forward b": optuna.distributions.CategoricalDistribution((1, 2, 3)),
            }
        )
        point = lost.params["forward a"], lost.params["forward b"]
    searched(judge, 3)
    assert point in judge.asked[2:] and len(set(judge.asked)) == len(judge.asked) == 5


def test_one_tuner_a_journal_and_bad_storages_are_told() -> None:
    with opened("s"), pytest.raises(Busy, match="another tuner keeps"), opened("s"):
        pass
    for url in ("nonsense", "grpc://nowhere", "postgresql://localhost:1/none", "sqlite:///studies.db"):
        with pytest.raises(BadStorage, match=url.split(":")[0]), opened("s", url):
            pass


def tuners() -> list[int]:
    """Lists the processes of this test's tuners and trials."""
    marks = (str(HERE / "tuner" / "tuner.py"), QUICK[1])
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if any(m in text for m in marks):
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tuner_killed_twenty_times_loses_no_finished_trial_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICK_SECONDS", "0.05")
    dice = random.Random(0)
    command = [sys.executable, str(HERE / "tuner" / "tuner.py"), "", "1000"]
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    seen: dict[int, object] = {}
    path = journal_of(QUICK_STUDY)
    for _ in range(20):
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        size = path.stat().st_size if path.exists() else 0
        until = time.monotonic() + 60
        while (not path.exists() or path.stat().st_size == size) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)  # until it writes
        time.sleep(dice.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        with opened(QUICK_STUDY) as study:
            now = {d.number: d for d in state_of(study, space_of(quick_job())).done}
        assert all(now.get(n) == d for n, d in seen.items())
        seen = now
    assert len(seen) > 5
    until = time.monotonic() + 10
    while tuners() and time.monotonic() < until:
        time.sleep(0.1)
    assert not tuners()
    points = [tuple(d.config.values) for d in seen.values()]  # type: ignore[attr-defined]
    assert len(set(points)) == len(points)


def postgres(name: str) -> str:
    """Finds one of PostgreSQL's programs, in Debian's place too."""
    return shutil.which(name) or next((str(p) for p in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), "")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[str]:
    """Starts a PostgreSQL of this test's own on a socket in a folder of its own."""
    if not postgres("initdb") or not postgres("pg_ctl"):
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed (pip install 'lagen[postgres]')")
    folder = Path("/tmp") / f"lagen-pg-{os.getpid()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []

    def call(*words: str) -> None:
        done = subprocess.run([*prefix, *words], capture_output=True, text=True, timeout=120, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        call(postgres("initdb"), "-D", str(folder / "data"), "-U", "lagen", "--auth=trust", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off -c port=54329"
        call(postgres("pg_ctl"), "-D", str(folder / "data"), "-o", options, "-l", str(folder / "log"), "-w", "start")
        yield f"postgresql://lagen@/postgres?host={folder}&port=54329"
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            call(postgres("pg_ctl"), "-D", str(folder / "data"), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


PROXY = """
import sys
from optuna.storages import RDBStorage, run_grpc_proxy_server

run_grpc_proxy_server(RDBStorage(sys.argv[1]), host="localhost", port=int(sys.argv[2]))
"""


@pytest.fixture
def proxy(database: str) -> Iterator[str]:
    """Starts Optuna's gRPC proxy before a PostgreSQL of this test's own."""
    pytest.importorskip("grpc", reason="grpcio is not installed (pip install 'lagen[grpc]')")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    url = database.replace("postgresql:", "postgresql+psycopg:")
    server = subprocess.Popen([sys.executable, "-c", PROXY, url, str(port)], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while socket.socket().connect_ex(("localhost", port)) and server.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        assert server.poll() is None, "the proxy ended"
        yield f"grpc://localhost:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_workers_on_one_postgresql_study_run_no_point_twice(database: str, tmp_path: Path) -> None:
    share(database, tmp_path / "trials")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_workers_behind_one_grpc_proxy_run_no_point_twice(proxy: str, tmp_path: Path) -> None:
    share(proxy, tmp_path / "trials")


def share(database: str, log: Path) -> None:
    """Lets four workers search one study to its end, and asserts that every point was run once."""
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "QUICK_LOG": str(log), "QUICK_SECONDS": "0.1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "tuner" / "tuner.py"), database, "1000"]
    workers = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    ends = [w.communicate(timeout=600) for w in workers]
    assert [w.returncode for w in workers] == [0] * 4, ends
    space = space_of(quick_job())
    every = {json.dumps(c.table, sort_keys=True) for c in space.all()}
    begun = Counter(log.read_text().splitlines())
    # each worker times its winner once more at the end; beside those four every point was run once
    assert set(begun) == every and sum(begun.values()) <= len(every) + 4
    with opened(QUICK_STUDY, database) as study:
        points = [tuple(d.config.values) for d in state_of(study, space).done]
    assert len(points) == len(set(points)) and len(points) >= len(every)


def test_a_job_is_text_and_back() -> None:
    assert Job.from_json(quick_job().to_json()) == quick_job()


def test_run_writes_entries_that_say_how_they_were_found(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = run(quick_job(), Budget(30), judge=Measure(quick_job(), 20.0, 3, QUICK))
    draw(found, tmp_path / "search.png")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(found.proof, Timed) and found.chosen.table.get("forward tile", 16) == 32
    (entry,) = found.entries
    assert entry.how == "measured" and entry.config.table["tile"] == 32 and entry.trials == 30 and entry.time < entry.default
