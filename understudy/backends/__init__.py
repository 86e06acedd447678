"""The host's side of devices: what stands behind a disk.

Source: ours.  A device model knows registers and guest memory, a backend knows files.
"""
