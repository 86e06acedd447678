"""`make bench-guest`: a whole Debian under understudy and under QEMU TCG, row by row in turns.

rows        what is run, and how much of it
machine     a guest whose console is spoken with; under QEMU, and under understudy
place       the guests that a row needs, put together: disks, networks, a neighbor
mirror      a package source on this computer's loopback
measure     the rows in all places in turns
"""
