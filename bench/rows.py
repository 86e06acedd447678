"""What is measured: one `Row` for each program, with its size and what it takes to build it.

Sizes are chosen so that a row takes 0.1 to 0.4 s natively and a few seconds at most under TCG.
A row's command is relative to the root directory, which is the guests' `/` and natively a folder.

Invariant: names are unique, and every source named here exists under `bench/programs`.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

SOURCES = Path(__file__).parent / "programs"
NO_DISPATCH = (1 << 33) | (1 << 43) | (1 << 44) | (1 << 54) | (1 << 57) | (1 << 59) | (1 << 60)
ENVIRONMENT = {
    "PATH": "bin",
    "LC_ALL": "C",
    # Libraries choose code by CPUID.  All three places must run the same code, so what one of them
    # may not offer (AVX and what comes with it, AES-NI) is masked in all of them.
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-FMA,-FMA4,-BMI2,-MOVBE",
    "OPENSSL_ia32cap": f"~{NO_DISPATCH | 1 << 30 | 1 << 62:#x}:0",
}


class Group(StrEnum):
    """The rows that share a geometric mean, in the order of the report."""

    LOOPS = "loops"
    LOOPS32 = "loops32"
    PROGRAMS = "programs"
    PROGRAMS32 = "programs32"
    BIG = "big"
    OS = "os"
    EXITS = "exits"
    BOOT = "boot"


@dataclass(frozen=True)
class Row:
    """One program: what it is called, how big it is, and how it is built and started."""

    name: str
    group: Group
    size: int
    source: str = ""  # below bench/programs; "" for the row that only boots
    libraries: tuple[str, ...] = ()  # static ones, without lib and .a
    package: str = ""  # the Debian package that has them
    flags: tuple[str, ...] = ()
    # Operations for one unit of size, where one of them is worth a time of its own.
    each: int = 0
    guests_only: bool = False
    # The command, if an interpreter runs `source`; {size} is filled in.
    script: tuple[str, ...] = ()
    # Programs as packages installed them, by their paths below / (the last one that matches).
    installed: tuple[str, ...] = ()
    data: tuple[str, ...] = ()  # more files below bench/programs that the script reads

    def scaled(self, scale: float) -> int:
        """The size of a run."""
        return max(1, round(self.size * scale))

    def command(self, scale: float = 1.0) -> list[str]:
        """The words that start the program, relative to the root directory."""
        size = self.scaled(scale)
        if self.script:
            return [word.format(size=size) for word in self.script]
        return [f"bench/{self.name}", str(size)]


PLAIN = ("-fno-tree-vectorize", "-fno-tree-loop-distribute-patterns")
LOOPS = {
    "sieve": 1000,
    "chase": 4000,
    "hash8": 12000,
    "fnv1": 3500,
    "crc": 1500,
    "copy": 60000,
    "copy1": 5000,
    "fib": 800,
    "calls": 30000,
    "fpdiv": 30000,
    "matmul": 1200,
    "nbody": 2000,
    "qsort": 100,
    "interp": 15000,
    "bignum": 3000,
    "chacha": 2000,
    "rand32m": 8000,
    "tree": 1500,
    "lz": 120,
}
LOOPS32 = {"sieve": 800, "fib": 400, "qsort": 80, "interp": 5000, "nbody": 500, "lz": 80}


def loop(name: str, size: int) -> Row:
    """A compute loop of 64-bit code; -lm only for the square root's error path."""
    return Row(name, Group.LOOPS, size, f"loops/{name}.c", ("m",), "libc6-dev", PLAIN)


def loop32(name: str, size: int) -> Row:
    """The same loop as 32-bit code, its floating point on the x87 unit."""
    flags = ("-m32", "-march=i686", *PLAIN)
    return Row(f"{name}-32", Group.LOOPS32, size, f"loops/{name}.c", ("m",), "gcc-multilib", flags)


def program(name: str, size: int, libraries: str = "", package: str = "", *flags: str) -> Row:
    """A real program, mostly a Debian library at work."""
    return Row(
        name, Group.PROGRAMS, size, f"real/{name}.c", tuple(libraries.split()), package, flags
    )


def program32(name: str, size: int, *libraries: str) -> Row:
    """A program of our own as 32-bit code."""
    source = f"real/{name}.{'cpp' if name == 'containers' else 'c'}"
    flags = ("-m32", "-march=i686")
    return Row(f"{name}-32", Group.PROGRAMS32, size, source, libraries, "g++-multilib", flags)


def big(name: str, size: int, source: str, package: str, *words: str, data: str = "") -> Row:
    """A program with megabytes of code, unmodified from its package; `words` start it."""
    script = (*words, f"bench/{source}", "{size}")
    paths = {
        "compiler": "usr/lib/gcc/x86_64-linux-gnu/*/cc1plus",
        "git": "usr/bin/git",
        "sql": "usr/bin/sqlite3",
    }
    installed = (paths.get(name, words[0]),)
    more = (f"big/{data}",) if data else ()
    return Row(
        name,
        Group.BIG,
        size,
        f"big/{source}",
        package=package,
        script=script,
        installed=installed,
        data=more,
    )


def os_row(name: str, size: int, each: int = 1) -> Row:
    """A row about the guest's kernel: system calls, processes, page faults, switches."""
    return Row(name, Group.OS, size, f"os/{name}.c", each=each)


PROGRAMS = (
    program("zlib", 5, "z", "zlib1g-dev"),
    program("bzip2", 4, "bz2", "libbz2-dev"),
    program("xz", 3, "lzma", "liblzma-dev"),
    program("zstd", 10, "zstd", "libzstd-dev"),
    program("brotli", 8, "brotlienc brotlidec brotlicommon m", "libbrotli-dev"),
    program("lua", 30, "lua5.4 m", "liblua5.4-dev", "-I/usr/include/lua5.4"),
    program("sqlite", 20, "sqlite3 m", "libsqlite3-dev"),
    program("ciphers", 500, "crypto", "libssl-dev"),
    program("hashes", 1200, "crypto", "libssl-dev"),
    program("gcrypt", 250, "gcrypt gpg-error", "libgcrypt20-dev"),
    program("gmp", 50, "gmp", "libgmp-dev"),
    Row("containers", Group.PROGRAMS, 40, "real/containers.cpp", (), "g++"),
    program("fft", 1000, "m"),
    program("x87", 700, "m"),
    program("render", 2500, "m"),
    program("tcc", 100, "tcc m", "libtcc-dev"),
    program("pcre2", 60, "pcre2-8", "libpcre2-dev"),
    Row(
        "script",
        Group.PROGRAMS,
        50,
        "real/script.sh",
        package="busybox-static",
        script=("bin/sh", "bench/script.sh", "{size}"),
    ),
    Row(
        "awk",
        Group.PROGRAMS,
        5000,
        "real/words.awk",
        package="busybox-static",
        script=("bin/awk", "-v", "size={size}", "-f", "bench/words.awk"),
    ),
)
PROGRAMS32 = (
    program32("containers", 40),
    program32("fft", 1000, "m"),
    program32("x87", 2800, "m"),
    program32("render", 1200, "m"),
)
BIG = (
    big("compiler", 1, "compiler.sh", "g++", "bin/sh", data="compiler.cpp"),
    big("python", 60, "objects.py", "python3-minimal", "usr/bin/python3.11", "-IS"),
    big("perl", 2000, "words.pl", "perl-base", "usr/bin/perl"),
    big("javascript", 30, "shapes.js", "nodejs", "usr/bin/node"),
    big("sql", 60, "sql.sh", "sqlite3", "bin/sh", data="sql.sql"),
    big("git", 80, "git.sh", "git", "bin/sh"),
)
OS = (
    os_row("syscall", 2000, 1000),
    os_row("signals", 500, 100),
    os_row("fork", 2000),
    os_row("fork64m", 60),
    os_row("exec", 400),
    os_row("pagefault", 300, 256),
    os_row("pipe", 30000),
    os_row("switch", 5000, 8),
    os_row("threads", 30000, 2),
)
# An exit to the hypervisor's bus and back; of TCG it is not more than a call.
PORTIO = Row("portio", Group.EXITS, 100000, "os/portio.c", each=1, guests_only=True)
BOOT = Row("boot", Group.BOOT, 1, guests_only=True)

ROWS = (
    *(loop(name, size) for name, size in LOOPS.items()),
    *(loop32(name, size) for name, size in LOOPS32.items()),
    *PROGRAMS,
    *PROGRAMS32,
    *BIG,
    *OS,
    PORTIO,
    BOOT,
)


def select(only: str) -> list[Row]:
    """The rows of a comma-separated list of row and group names; all of them if it is empty."""
    wanted = [word.strip() for word in only.split(",") if word.strip()]
    known = {row.name for row in ROWS} | {str(group) for group in Group}
    for word in wanted:
        if word not in known:
            groups = ", ".join(Group)
            raise ValueError(
                f"no row or group is called {word!r}; groups: {groups}; `--list` shows the rows"
            )
    return [row for row in ROWS if not wanted or row.name in wanted or row.group in wanted]
