"""A guest's agent in Python, with as much of a kernel as a command needs: for tests without one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from understudy.agent.calls import CALLS_GVA, HEADER, RECORD, Call
from understudy.devices.agent import DATA, HELLO, Agent
from understudy.guests.agent_program import REQUEST_GVA, SCRATCH_BYTES, SCRATCH_GVA

PID, ALL, SIGKILL, ECHILD = 100, 0xFFFF_FFFF, 9, 10
PROCESS, FIRST = 50, 60  # file descriptors: the pidfd, and the first of pipes


@dataclass
class Program:
    """What a command writes, and how it ends: a status, or None if it does not."""

    output: bytes = b""
    status: int | None = 0
    error: bytes = b""


class FakeAgent:
    """Answers at an agent's port, at once; a poll only when there is something to tell."""

    def __init__(self, port: Agent, programs: list[Program]) -> None:
        self.port, self.programs = port, programs
        self.commands = list[bytes]()
        self.calls = list[Call]()
        self.open_files = set[int]()
        self.memory = bytearray(SCRATCH_GVA + SCRATCH_BYTES - REQUEST_GVA)
        self.running: Program | None = None
        self.killed = 0
        self.is_deaf_to_reboot = False
        self.is_stubborn = False  # programs end by SIGKILL alone
        self._ends: list[tuple[int, int]] = []  # of pipes: reading, writing
        self._pending: Callable[[], None] | None = None
        port.ring = self._rung

    def start(self) -> None:
        """The guest's user land is up."""
        self.port.write(0, HELLO, 0, 4)

    # --- the protocol ---

    def _rung(self) -> None:
        if self._pending is not None:  # the poll ends, since the channel has something
            pending, self._pending = self._pending, None
            pending()
        size = int.from_bytes(self.port.read_string(0, DATA, 4), "little")
        self._put(REQUEST_GVA, self.port.read_string(0, DATA, size))
        self._go_on(0)

    def _go_on(self, at: int) -> None:
        count, head, spans, _ = HEADER.unpack(self._get(REQUEST_GVA, HEADER.size))
        while at < count:
            gva = CALLS_GVA + RECORD.size * at
            number, mask, *arguments = RECORD.unpack(self._get(gva, RECORD.size))
            for n in range(6):
                if mask >> n & 1:
                    arguments[n] = self._word(arguments[n])
            self.calls.append(Call(number))
            if number == Call.POLL and self._blocks(arguments):
                self._pending = partial(self._after_poll, gva, at)
                return
            result = getattr(self, "_" + Call(number).name.lower(), lambda *_: 0)(*arguments)
            if number == Call.FORK:
                self._exec(at + 1)
                at += arguments[0]
            self._put(gva, result.to_bytes(4, "little", signed=True))
            at += 1
        if self.is_deaf_to_reboot and self.calls[-1] == Call.REBOOT:
            return
        answer = self._get(CALLS_GVA, head)
        for number in range(spans):
            base = CALLS_GVA + RECORD.size * count + 8 * number
            length = self._word(self._word(base + 4))
            answer += self._get(self._word(base), length if length < 1 << 31 else 0)
        self.port.write_string(0, DATA, answer)

    def _after_poll(self, gva: int, at: int) -> None:
        self._put(gva, bytes(4))
        self._go_on(at + 1)

    def _put(self, gva: int, data: bytes) -> None:
        self.memory[gva - REQUEST_GVA : gva - REQUEST_GVA + len(data)] = data

    def _get(self, gva: int, size: int) -> bytes:
        return bytes(self.memory[gva - REQUEST_GVA : gva - REQUEST_GVA + size])

    def _word(self, gva: int) -> int:
        return int.from_bytes(self._get(gva, 4), "little")

    def _string(self, gva: int) -> bytes:
        at = gva - REQUEST_GVA
        return bytes(self.memory[at : self.memory.index(0, at)])

    # --- the kernel ---

    def _open(self, *_: int) -> int:
        return self._opened()

    def _opened(self) -> int:
        file = next(n for n in range(FIRST, 1 << 10) if n not in self.open_files)
        self.open_files.add(file)
        return file

    def _close(self, file: int, *_: int) -> int:
        self.open_files.discard(file)
        return 0

    def _pipe2(self, gva: int, *_: int) -> int:
        ends = self._opened(), self._opened()
        self._ends.append(ends)
        self._put(gva, b"".join(end.to_bytes(4, "little") for end in ends))
        return 0

    def _fork(self, *_: int) -> int:
        return PID

    def _exec(self, at: int) -> None:
        """What the child would do: only its program is of interest."""
        while True:
            number, _, *arguments = RECORD.unpack(
                self._get(CALLS_GVA + RECORD.size * at, RECORD.size)
            )
            if number == Call.EXECVE:
                break
            at += 1
        table = arguments[1]
        if self._string(self._word(table)) == b"sh":
            self.commands.append(self._string(self._word(table + 8)))
            self.running = self.programs.pop(0)

    def _pidfd_open(self, *_: int) -> int:
        self.open_files.add(PROCESS)
        return PROCESS

    def _blocks(self, arguments: list[int]) -> bool:
        """Whether a poll waits: if it has a process that has not ended, and no output."""
        gva, count, _timeout = arguments[:3]
        program = self.running
        if program is None:
            return False
        for n in range(count):
            file = self._word(gva + 8 * n)
            is_ready = file == PROCESS and program.status is not None and not self._unread(program)
            self._put(gva + 8 * n + 6, bytes([is_ready, 0]))
            if is_ready or (file != 0xFFFF_FFFF and self._has(program, file)):
                return False
        return count > 3

    @staticmethod
    def _unread(program: Program) -> bool:
        return bool(program.output or program.error)

    def _has(self, program: Program, file: int) -> bool:
        reads = [ends[0] for ends in self._ends[-2:]]
        return (file == reads[0] and bool(program.output)) or (
            file == reads[1] and bool(program.error)
        )

    def _read(self, file: int, gva: int, size: int, *_: int) -> int:
        program = self.running
        if program is None or not self._ends:
            return 0
        if file == self._ends[-2][0]:
            data, program.output = program.output[:size], program.output[size:]
        elif file == self._ends[-1][0]:
            data, program.error = program.error[:size], program.error[size:]
        else:
            return 0
        self._put(gva, data)
        return len(data) or -11

    def _kill(self, _pid: int, signal: int, *_: int) -> int:
        self.killed += 1
        if self.running is not None and (signal == SIGKILL or not self.is_stubborn):
            self.running.status = 128 + signal
        return 0

    def _wait4(self, pid: int, status: int, *_: int) -> int:
        program = self.running
        if pid == ALL:
            if program is None:
                return -ECHILD
            if program.status is None:
                return 0
            self.running = None
        if status and program is not None and program.status is not None:
            code = program.status - 128 if program.status > 128 else program.status << 8
            self._put(status, code.to_bytes(4, "little"))
        return PID
