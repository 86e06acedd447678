"""How many descriptors what a guest asks for may take.

A process has so many (RLIMIT_NOFILE); half of them are for what its user wants of it, whatever its
guests open and connect to.

Source: getrlimit(2), open(2): "the lowest-numbered file descriptor not currently open".
"""

import os
import resource


def are_scarce() -> bool:
    """Whether half of them are in use: a guest is to be told ENFILE."""
    try:
        fd = os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return True
    os.close(fd)
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most != resource.RLIM_INFINITY and fd >= most // 2
