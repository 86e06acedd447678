"""Guests: what may run in a VM, where it comes from, and how it is put into memory and started.

`loader.load` takes any kernel file; `debian.fetch` obtains the named ones; `initramfs` builds the
user land for them and `agent` runs commands in it.  `hello` is built in.
"""

from understudy.guests.entry import Entry, GuestError, GuestMemory
from understudy.guests.loader import load

__all__ = ["Entry", "GuestError", "GuestMemory", "load"]
