"""`understudy fetch`."""


def fetch() -> None:
    """Fetch.

    Example:  understudy fetch
    """
