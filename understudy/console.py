"""A serial line between a guest and whoever listens to it or types into it.

Source: none.  Invariants: a listener that fails does not disturb the guest, nor the other
listeners; what is typed reaches the guest's port on the VM's own thread.
"""

from collections.abc import Callable


class Console:
    """A serial line to the guest."""

    def __init__(
        self,
        post: Callable[[Callable[[], None]], None],
        fail: Callable[[Exception], None],
    ) -> None:
        self.on_output: list[Callable[[bytes], None]] = []
        self.receive: Callable[[bytes], None] = lambda data: None
        self._post, self._fail = post, fail

    def transmit(self, data: bytes) -> None:
        """The guest has sent this."""
        for listener in self.on_output:
            try:
                listener(data)
            except Exception as problem:  # raised by `go`, when the guest's access is done
                self._fail(problem)

    def close(self) -> None:
        """There is no guest any more, and nothing to listen to."""
        self.on_output.clear()
        self.receive = lambda data: None
        self._post = lambda action: None
        self._fail = lambda problem: None

    def send(self, data: bytes) -> None:
        """Type this; from any thread.  The guest gets it when it runs."""
        self._post(lambda: self.receive(data))
