"""What `test_tap.py` has done in a network namespace of its own, where it may make a tap.

unshare --map-root-user --net python -m tests.unit.backends.tap_in_namespace
"""

import socket
import subprocess
import threading
import time
from contextlib import closing

from understudy.backends.cable import MOST_FRAMES, NetworkError
from understudy.backends.frame import Frame
from understudy.backends.tap import Tap

ADDRESS, OTHER, PORT = "10.5.0.1", "10.5.0.2", 5000
EXPERIMENTAL = 0x88B5  # IEEE 802: for whatever one likes
GUEST_MAC = bytes.fromhex("525400000001")
PATIENCE_S = 60


def ip(*words: str) -> None:
    """The command of that name."""
    subprocess.run(["ip", *words], check=True)


def until_up(name: str) -> None:
    """What is sent before an interface has found its carrier is lost."""
    ends = time.monotonic() + PATIENCE_S
    while b"state UP" not in subprocess.check_output(["ip", "link", "show", name]):
        assert time.monotonic() < ends, "no carrier"
        time.sleep(0.01)


def until_waiting(cable: Tap, count: int) -> None:
    """So many frames have come."""
    ends = time.monotonic() + PATIENCE_S
    while cable.inspect()["waiting"] < count:
        assert time.monotonic() < ends, "frames are missing"
        time.sleep(0.001)


def taken(cable: Tap, kind: bytes) -> Frame:
    """The next frame of a kind."""
    ends = time.monotonic() + PATIENCE_S
    while (frame := cable.take()) is None or frame.data[12:14] != kind:
        assert time.monotonic() < ends, "no frame came"
        time.sleep(0.001)
    return frame


def refused(name: str) -> str:
    """Why there is no such cable."""
    try:
        Tap(name).close()
    except NetworkError as error:
        assert "\n" not in str(error)
        return str(error)
    return "it was there"


def datagram(to: bytes, text: bytes) -> Frame:
    """UDP whose checksum is left to the card: of the pseudo header alone, RFC 768."""
    ends = socket.inet_aton(OTHER) + socket.inet_aton(ADDRESS)
    length = 8 + len(text)
    pseudo = ends + b"\0\x11" + length.to_bytes(2, "big")
    total = sum(int.from_bytes(pseudo[n : n + 2], "big") for n in range(0, len(pseudo), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    head = bytearray(
        b"\x45\0" + (20 + length).to_bytes(2, "big") + bytes(4) + b"\x40\x11\0\0" + ends
    )
    words = sum(int.from_bytes(head[n : n + 2], "big") for n in range(0, 20, 2))
    while words >> 16:
        words = (words & 0xFFFF) + (words >> 16)
    head[10:12] = (~words & 0xFFFF).to_bytes(2, "big")
    ports = PORT.to_bytes(2, "big") * 2
    udp = ports + length.to_bytes(2, "big") + total.to_bytes(2, "big") + text
    return Frame(to + GUEST_MAC + b"\x08\0" + bytes(head) + udp, start=34, offset=6)


def main() -> None:
    """All of it; an AssertionError says what is wrong."""
    assert "no such interface" in refused("t0") and "is no tap" in refused("lo")
    ip("tuntap", "add", "t0", "mode", "tap")
    ip("addr", "add", f"{ADDRESS}/24", "dev", "t0")
    ip("link", "set", "t0", "up")
    told = threading.Event()
    kind = EXPERIMENTAL.to_bytes(2, "big")
    with closing(Tap("t0")) as cable:
        assert "in use" in refused("t0")
        until_up("t0")
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
            wire.bind(("t0", EXPERIMENTAL))
            wire.settimeout(PATIENCE_S)
            own = wire.getsockname()[4]
            assert cable.send(Frame(own + GUEST_MAC + kind + b"out"))
            assert wire.recv(2000) == own + GUEST_MAC + kind + b"out"
            wire.send(GUEST_MAC + own + kind + b"in")
            assert taken(cable, kind).data == GUEST_MAC + own + kind + b"in"
            for count in range(1, MOST_FRAMES + 101):  # some wait here, the others in the kernel
                wire.send(GUEST_MAC + own + kind)
                if count % 100 == 0:  # which has room for a few hundred
                    until_waiting(cable, min(count, MOST_FRAMES))
            for _ in range(MOST_FRAMES + 100):
                taken(cable, kind)
            assert cable.lost == 0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind((ADDRESS, PORT))
            server.settimeout(PATIENCE_S)
            assert cable.send(datagram(own, b"a checksum that others make"))
            assert server.recv(2000) == b"a checksum that others make"
            server.sendto(b"and back", (OTHER, PORT))  # the question for the address
            question = taken(cable, b"\x08\x06").data
            answer = own + GUEST_MAC + question[12:20] + b"\0\2" + GUEST_MAC
            answer += socket.inet_aton(OTHER) + question[22:32]
            assert cable.send(Frame(answer))
            back = taken(cable, b"\x08\0")
            assert back.data.endswith(b"and back") and back.is_sound
        cable.notify = told.set
        ip("link", "del", "t0")
        assert told.wait(PATIENCE_S) and cable.is_gone
        assert cable.send(Frame(own + GUEST_MAC + kind)), "it is lost, and nobody waits"
    assert not cable._thread.is_alive()
    print("all is well")


if __name__ == "__main__":
    main()
