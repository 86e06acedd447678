"""`understudy lab` as it is used: failures reported, finished results kept, whatever is killed.

Why: a lab that hides a failed claim, or forgets a night's work, is worse than none.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tree import ROOT

# Experiments for these tests.  Each measured point leaves a line in $LAB_LOG.
EXPERIMENT = '''"""Squares grow.

Claim: the square of n is n times n.

Source: this test.
"""

import os, signal, time
from pathlib import Path
from understudy.lab import Experiment, Skip, every


def measure(n):
    log = Path(os.environ["LAB_LOG"])
    with log.open("a") as file:
        file.write(f"{{n}}\\n")
    {extra}
    return {{"square": n * n}}


def check(table):
    return [every("squares", table.rows, lambda r: r["square"], lambda r: {expected},
                  name=lambda r: str(r["n"]))]


EXPERIMENT = Experiment(measure=measure, guest="none", sweep={{"n": list(range({points}))}},
                        check=check)
'''


class Lab:
    """A folder with one experiment, and how to run it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output, self.log = folder / "own", folder / "out", folder / "log"
        self.folder.mkdir()

    def write(self, extra: str = "pass", expected: str = "r['n'] ** 2", points: int = 6) -> None:
        text = EXPERIMENT.format(extra=extra, expected=expected, points=points)
        (self.folder / "squares.py").write_text(text)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "understudy", "lab", "squares", "--workers", "2"]
        places = ["--folder", str(self.folder), "--output", str(self.output)]
        return subprocess.Popen(
            [*command, *places, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "LAB_LOG": str(self.log)},
        )  # fmt: skip

    def run(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def results(self) -> dict[int, int]:
        """Every file in the store must be whole."""
        files = list(self.output.rglob("results/*/*.json"))
        read = [json.loads(path.read_text()) for path in files]
        return {one["params"]["n"]: one["values"]["square"] for one in read}

    def measured(self) -> list[int]:
        return sorted(map(int, self.log.read_text().split())) if self.log.exists() else []

    def wait_for_results(self, count: int) -> None:
        ends = time.monotonic() + 60
        while len(self.results()) < count:
            assert time.monotonic() < ends, "no results"
            time.sleep(0.02)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_a_claim_that_holds_ends_with_0_and_is_measured_once(lab: Lab) -> None:
    lab.write()
    status, out, err = lab.run()
    assert (status, lab.measured()) == (0, [0, 1, 2, 3, 4, 5]), err
    assert "PASSED" in out
    assert "6 points to measure" in err
    status, out, err = lab.run()
    assert (status, lab.measured()) == (0, [0, 1, 2, 3, 4, 5]), err
    page = (lab.output / "report.html").read_text()
    assert "6 of 6 measured" in page
    assert "(6 kept from earlier calls)" in page
    assert lab.run("--fresh", "--workers", "0")[0] == 0
    assert len(lab.measured()) == 12


def test_a_claim_that_fails_is_shown_and_ends_with_1(lab: Lab) -> None:
    lab.write(expected="r['n'] ** 2 + (r['n'] == 3)")
    status, out, _ = lab.run("--workers", "0")
    assert status == 1
    assert "FAILED" in out
    assert "1 of 6 differ: 3: 9, expected 10" in out
    page = (lab.output / "report.html").read_text()
    assert "1 failed" in page
    assert 'class="chip failed"' in page
    assert "does not hold" in page


def test_a_point_that_raises_is_broken_and_the_others_count(lab: Lab) -> None:
    lab.write(extra="assert n != 2, 'two is odd'")
    status, out, err = lab.run()
    assert status == 1
    assert "squares 2: AssertionError: two is odd" in err
    assert "broken: AssertionError: two is odd" in out
    assert sorted(lab.results()) == [0, 1, 3, 4, 5]
    assert "broken: AssertionError" in (lab.output / "report.html").read_text()


def test_a_skipped_point_is_no_pass(lab: Lab) -> None:
    lab.write(extra="\n    if n > 3: raise Skip('no such number here')")
    status, out, _ = lab.run("--workers", "0")
    assert status == 0
    assert "PASSED IN PART" in out
    assert "2 points skipped: no such number here" in out
    lab.write(extra="raise Skip('nothing here')")
    status, out, _ = lab.run("--workers", "0")
    assert re.search(r"^SKIPPED", out, re.MULTILINE)
    assert "PASSED" not in out


def test_killing_the_lab_loses_no_finished_result(lab: Lab) -> None:
    """kill -9 in the middle: what is there is whole, the next call measures the rest only."""
    lab.write(extra="time.sleep(0.0 if n < 3 else 20.0 * (not os.environ.get('LAB_FAST')))")
    process = lab.start()
    lab.wait_for_results(3)
    process.kill()
    process.communicate(timeout=30)
    kept = lab.results()
    assert sorted(kept) == [0, 1, 2]
    lab.log.unlink()
    os.environ["LAB_FAST"] = "1"
    try:
        status, _, err = lab.run("--workers", "0")
    finally:
        del os.environ["LAB_FAST"]
    assert (status, lab.measured()) == (0, [3, 4, 5]), err
    assert "3 points to measure (3 are known)" in err
    assert lab.results() == {n: n * n for n in range(6)}


def test_killing_a_worker_loses_no_finished_result(lab: Lab) -> None:
    """The first worker that gets to 3 dies; the point is run again by another."""
    lab.write(
        extra="mark = Path(os.environ['LAB_LOG'] + '.died')\n"
        "    if n == 3 and not mark.exists():\n"
        "        mark.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)"
    )
    status, _, err = lab.run()
    assert status == 0, err
    assert lab.results() == {n: n * n for n in range(6)}
    assert lab.measured().count(3) == 2


def test_a_point_that_kills_every_worker_is_broken(lab: Lab) -> None:
    lab.write(extra="n == 1 and os.kill(os.getpid(), signal.SIGKILL)", points=3)
    status, out, err = lab.run()
    assert status == 1, err
    assert "workers died of this point" in out
    assert {0, 2} <= set(lab.results())


def test_an_interrupted_lab_says_what_is_kept(lab: Lab) -> None:
    lab.write(extra="time.sleep(0.0 if n < 2 else 20.0)")
    process = lab.start()
    lab.wait_for_results(2)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "2 finished points are kept; the same command goes on from there" in err
    assert "Traceback" not in err
    assert time.monotonic() - begin < 15
    assert sorted(lab.results()) == [0, 1]


CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


def test_points_run_on_a_cluster_that_is_named(lab: Lab) -> None:
    """A scheduler that somebody else started; it lives on when the lab has ended."""
    lab.write()
    script = lab.folder / "_cluster.py"
    script.write_text(CLUSTER)
    cluster = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "LAB_LOG": str(lab.log)},
    )  # fmt: skip
    try:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        status, out, err = lab.run("--scheduler", address)
        assert status == 0, out + err
        assert lab.results() == {n: n * n for n in range(6)}
        assert cluster.poll() is None
    finally:
        cluster.communicate(input="", timeout=30)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cubes"], "no experiment is called 'cubes'; there are squares"),
        (["squares", "--all"], "not both"),
        (["squares", "--scheduler", "tcp://127.0.0.1:9"], "no scheduler answers at"),
    ],
)
def test_wrong_use_is_one_line(lab: Lab, arguments: list[str], words: str) -> None:
    lab.write()
    done = subprocess.run(
        [sys.executable, "-m", "understudy", "lab", "--folder", str(lab.folder),
         "--output", str(lab.output), *arguments],
        capture_output=True, text=True, check=False, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT), "LAB_LOG": str(lab.log)},
    )  # fmt: skip
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_without_names_the_lab_lists_its_experiments() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "understudy", "lab"],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == sorted(p.stem for p in (ROOT / "experiments").glob("*.py") if p.stem[0] != "_")
