"""Finding experiments: every file of a folder is one.

Source: STYLE of the house: a file dropped into the folder is all that is needed.
Invariants: an experiment is loaded by its path, under the same module name in every process, so
a worker that gets path and parameters measures what the lab planned.
"""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from understudy.lab.experiment import Experiment, Story

PACKAGE = "experiments"


class LabError(RuntimeError):
    """The lab cannot do what was asked; one line for the user."""


@dataclass(frozen=True)
class Loaded:
    """An experiment with its name, its file and its story."""

    name: str
    path: Path
    story: Story
    experiment: Experiment


def folder() -> Path:
    """Where the experiments are: beside the package, as in the source tree."""
    return Path(__file__).resolve().parents[2] / PACKAGE


def load_module(path: Path) -> ModuleType:
    """The module of one file, executed once in each process."""
    name = f"{PACKAGE}.{path.stem}"
    known = sys.modules.get(name)
    if known is not None and Path(str(known.__file__)).resolve() == path.resolve():
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LabError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load(path: Path) -> Loaded:
    """One experiment; its module must have `EXPERIMENT` and a docstring that states the claim."""
    module = load_module(path)
    experiment = getattr(module, "EXPERIMENT", None)
    if not isinstance(experiment, Experiment):
        raise LabError(f"{path}: expected a module with EXPERIMENT = Experiment(…)")
    try:
        story = Story.read(module.__doc__ or "")
    except ValueError as error:
        raise LabError(f"{path}: {error}") from error
    return Loaded(path.stem, path.resolve(), story, experiment)


def names(where: Path) -> list[str]:
    """What can be run."""
    if not where.is_dir():
        raise LabError(
            f"no experiments: {where} is not there (they are in the source tree; name their "
            "folder with --folder)"
        )
    return sorted(path.stem for path in where.glob("*.py") if not path.stem.startswith("_"))


def find(where: Path, wanted: Sequence[str]) -> list[Loaded]:
    """The experiments with these names; all of them if none is named."""
    known = names(where)
    for name in wanted:
        if name not in known:
            raise LabError(f"no experiment is called {name!r}; there are {', '.join(known)}")
    found = [load(where / f"{name}.py") for name in dict.fromkeys(wanted or known)]
    return sorted(found, key=lambda one: (one.experiment.slide, one.name))
