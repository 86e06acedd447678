"""Serial lines between a guest and whoever listens and types."""

from collections.abc import Callable


class Console:
    """A serial line to the guest."""

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self.on_output: list[Callable[[bytes], None]] = []
        self.receive: Callable[[bytes], None] = lambda data: None
        self._post = post

    def transmit(self, data: bytes) -> None:
        """The guest has sent this."""
        for listener in self.on_output:
            listener(data)

    def send(self, data: bytes) -> None:
        """Type this; from any thread.  The guest gets it when it runs."""
        self._post(lambda: self.receive(data))
