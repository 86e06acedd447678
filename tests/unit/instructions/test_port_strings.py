"""INS and OUTS."""

from tests.unit.fakes import FakeExit
from tests.unit.fixtures import CODE, Bench, bench
from understudy.arch.exit_reason import Reason
from understudy.arch.vmcs import Vmcs
from understudy.machine.bus import Region, Space

RCX, RSI, RDI = 1, 6, 7
ADDRESS_64 = 2 << 7


class Stream:
    """Gives one byte after the other, and keeps what it is sent."""

    def __init__(self, given: bytes = b"") -> None:
        self.given, self.sent = iter(given), list[int]()

    def read(self, region: int, offset: int, size: int) -> int:
        return next(self.given)

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        self.sent.append(value)


def string(b: Bench, is_in: bool, size: int, gla: int, rep: bool = True) -> None:
    qualification = 0x700 << 16 | rep << 5 | 1 << 4 | is_in << 3 | size - 1
    b.play(FakeExit(Reason.IO_INSTRUCTION, qualification, 2, gla=gla, instr_info=ADDRESS_64))


def test_outs_sends_memory_and_moves_the_registers() -> None:
    with bench() as b:
        device = Stream()
        b.vm.bus.claim(Region(Space.PORT, 0x700, 2, device, width=2))
        b.vm.memory.write(0x5000, b"\x01\x02\x03\x04")
        b.processor.live[RCX], b.processor.live[RSI] = 2, 0x5000
        string(b, False, 2, 0x5000)
        assert device.sent == [0x201, 0x403]
        assert (b.processor.live[RCX], b.processor.live[RSI]) == (0, 0x5004)
        assert b.rip == CODE + 2


def test_ins_fills_memory_backwards_if_df_is_set() -> None:
    with bench({"rflags": 0x602}) as b:
        b.vm.bus.claim(Region(Space.PORT, 0x700, 1, Stream(b"abc"), width=1))
        b.processor.live[RCX], b.processor.live[RDI] = 3, 0x5002
        string(b, True, 1, 0x5002)
        assert b.vm.memory.read(0x5000, 3) == b"cba"
        assert b.processor.live[RDI] == 0x4FFF


def test_without_rep_the_count_is_left_alone() -> None:
    with bench() as b:
        b.processor.live[RCX], b.processor.live[RDI] = 9, 0x5000
        string(b, True, 4, 0x5000, rep=False)
        assert b.processor.live[RCX] == 9
        assert b.vm.memory.read(0x5000, 4) == b"\xff" * 4


def test_nothing_to_do_is_done() -> None:
    with bench() as b:
        string(b, True, 1, 1 << 40)
        assert b.rip == CODE + 2


def test_a_page_fault_keeps_what_was_done() -> None:
    with bench() as b:
        b.processor.live[RCX], b.processor.live[RDI] = 4, 0x3FFF_FFFE
        string(b, True, 1, 0x3FFF_FFFE)  # the bench maps one gigabyte
        assert b.processor.live[RCX] == 2
        assert b.processor.live[RDI] == 0x4000_0000
        assert b.injected == 1 << 31 | 1 << 11 | 3 << 8 | 14
        assert b.field(Vmcs.ENTRY_EXCEPTION_ERROR_CODE) == 2
        assert b.rip == CODE


def test_a_hostile_count_gives_way() -> None:
    with bench() as b:
        b.processor.live[RCX] = (1 << 64) - 1
        string(b, False, 1, 0x5000)
        assert b.processor.live[RCX] == (1 << 64) - 1 - 1024
        assert b.rip == CODE
        assert b.vm.clock.now() >= 1024  # else a deadline in guest time would never come


class Runs(Stream):
    """Gives and takes runs of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[bytes] = []

    def read_string(self, region: int, offset: int, count: int) -> bytes:
        return bytes(count)

    def write_string(self, region: int, offset: int, data: bytes) -> None:
        self.runs.append(data)


def test_bytes_go_in_runs_of_a_page_where_the_device_takes_them() -> None:
    with bench() as b:
        device, data = Runs(), bytes(range(256)) * 0x110
        b.vm.bus.claim(Region(Space.PORT, 0x700, 2, device, width=2))
        b.vm.memory.write(0x5F00, data)
        b.processor.live[RCX], b.processor.live[RSI] = len(data), 0x5F00
        debt = b.vm.vcpus[0].time.debt
        string(b, False, 1, 0x5F00)
        assert b.rip == CODE  # more are left
        string(b, False, 1, 0x5F00 + 0x1_0000)
        assert b.rip == CODE + 2
        assert b"".join(device.runs) == data
        assert max(map(len, device.runs)) == 0x1000
        assert (b.processor.live[RCX], b.processor.live[RSI]) == (0, 0x5F00 + len(data))
        assert b.vm.vcpus[0].time.debt - debt <= len(device.runs) * 1000
        assert len(device.runs) == 19


def test_a_run_ends_at_a_page_that_is_not_there() -> None:
    with bench() as b:
        device = Runs()
        b.vm.bus.claim(Region(Space.PORT, 0x700, 1, device))
        b.vm.memory.write_u64(0x2008, 0x3007)  # 2 MBytes of tables: the second page is not present
        b.vm.memory.write_u64(0x3000, 0x4007)
        b.vm.memory.write_u64(0x4000, 0x5007)
        b.processor.live[RCX], b.processor.live[RSI] = 0x1800, 0x4000_0F00
        string(b, False, 1, 0x4000_0F00)
        assert [len(run) for run in device.runs] == [0x100]
        assert (b.processor.live[RCX], b.processor.live[RSI]) == (0x1700, 0x4000_1000)
        assert b.injected & 0xFF == 14
