"""How a guest's processors are grouped: packages, cores in each, threads in each core.

Source: SDM 3A, "Programming Considerations for Hardware Multi-Threading Capable Processors": an
APIC ID is made of three fields, each as wide as its number needs.

Invariants: APIC IDs rise with the processor's number; the first is 0; 255 (broadcast) is none.
"""

from dataclasses import dataclass
from typing import Self

MOST_CPUS = 64
EXPECTED = (
    f"expected 1 to {MOST_CPUS}, and sockets=, cores= or threads= whose product it is, "
    "like 4,cores=2,threads=2"
)


@dataclass(frozen=True)
class Topology:
    """So many packages, cores in each, and threads in each of those."""

    sockets: int = 1
    cores: int = 1
    threads: int = 1

    @classmethod
    def of(cls, given: int | str) -> Self:
        """From `4`, or text like `4,cores=2,threads=2`.  ValueError says what was expected.

        What is not named is 1, but for cores, or else sockets, of which there are as many as it
        takes.
        """
        problem = ValueError(f"cpus {given!r}: {EXPECTED}")
        first, *rest = str(given).split(",")
        try:
            count = int(first)
            named = {name: int(text) for name, text in (one.split("=") for one in rest)}
        except ValueError:
            raise problem from None
        unknown = named.keys() - {"sockets", "cores", "threads"}
        if unknown or len(named) != len(rest) or min(count, *named.values(), 1) < 1:
            raise problem
        free = "sockets" if "cores" in named else "cores"
        product = 1
        for name, number in named.items():
            product *= number if name != free or free in named else 1
        if free not in named:
            named[free] = count // product
            product *= named[free]
        if product != count or count > MOST_CPUS:
            raise problem
        return cls(**named)

    @property
    def count(self) -> int:
        """All of them."""
        return self.sockets * self.cores * self.threads

    @property
    def thread_bits(self) -> int:
        """Bits of an APIC ID that number the threads of a core."""
        return (self.threads - 1).bit_length()

    @property
    def package_bits(self) -> int:
        """Bits of an APIC ID that number the threads of a package."""
        return self.thread_bits + (self.cores - 1).bit_length()

    def apic_id(self, number: int) -> int:
        """The APIC ID of a processor by its number."""
        core, thread = divmod(number, self.threads)
        socket, core = divmod(core, self.cores)
        return socket << self.package_bits | core << self.thread_bits | thread

    @property
    def apic_ids(self) -> tuple[int, ...]:
        """Those of all."""
        return tuple(self.apic_id(number) for number in range(self.count))
