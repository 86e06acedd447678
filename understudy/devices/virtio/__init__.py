"""Virtio devices: one queue, one transport, and a small file for each device.

Source: OASIS, Virtual I/O Device (VIRTIO) Version 1.2.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
