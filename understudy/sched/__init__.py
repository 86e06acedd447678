"""Scheduling: which vCPU of a host runs on which of its processors.  One policy a file.

A policy (`policy`) answers events; the schedule (`schedule`) carries its decisions out and counts.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
