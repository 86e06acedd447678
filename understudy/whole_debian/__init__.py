"""A whole Debian on a disk, made from its packages without root.

    release (guests/)   which packages
    archive             packages, and files of ours, as one disk that a VM can read
    making              an empty file system, and the stages by which it becomes a Debian in a VM
    second-stage        what that VM does
    own_disk            the disk of whoever runs it, over the image that all share

Source: Debian Policy, "Package maintainer scripts and installation procedure"; dpkg(1).
"""
