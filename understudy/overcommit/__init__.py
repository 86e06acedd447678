"""More memory than there is: what lets a host have more guest memory than frames.

One idea a file.
"""
