"""Disks and cards that come and go: what a VM says of them, and what a snapshot has of it."""

from pathlib import Path

import pytest

from understudy.backends.folder import ShareError
from understudy.backends.opening import ImageError
from understudy.config import Config
from understudy.devices.pc import HOTPLUG_PORT
from understudy.devices.virtio.blk import Blk
from understudy.devices.virtio.net import Net
from understudy.devices.virtio.vsock import Vsock
from understudy.disk import Disk
from understudy.image_file import SnapshotError
from understudy.nic import Nic
from understudy.vm import VM

EJECT = HOTPLUG_PORT + 8


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 16))
    return path


def agree(vm: VM) -> None:
    """The guest gives up all that it is asked for."""
    vm.bus.port_write(EJECT, 4, 0xFFFF_FFFF)


def test_what_comes_and_goes(image: Path) -> None:
    with VM("16M", hotplug=True, disks=[f"{image},ro"], devices=[("virtio_rng", {})]) as vm:
        assert vm.pc.slots == {"virtio_rng": 1, "virtio_agent": 2, "disk0": 3}
        assert vm.plug(f"disk={image},ro") == "disk1" and vm.plug("net=none") == "net0"
        assert vm.plugged == ["disk0", "disk1", "net0"]
        vm.unplug("disk0")
        assert "disk0" in vm.plugged, "the guest has not agreed"
        agree(vm)
        assert vm.plugged == ["disk1", "net0"] and "disk0" not in vm.pc.parts
        assert vm.plug(Disk(str(image), is_read_only=True)) == "disk0", "a name that is free"
        assert vm.pc.slots["disk0"] == 3, "and a slot"
        assert vm.config.disks == (
            Disk(str(image), is_read_only=True, name="disk1", slot=4),
            Disk(str(image), is_read_only=True, name="disk0", slot=3),
        )
        assert [one.name for one in vm.config.net] == ["net0"]


def test_a_snapshot_is_of_what_is_plugged_in(image: Path) -> None:
    with VM("16M", hotplug=True, disks=[f"{image},ro"], net="none") as vm:
        vm.plug(Disk(str(image), is_read_only=True, name="data"))
        vm.unplug("disk0")
        agree(vm)
        vm.unplug("data")
        slots, data = dict(vm.pc.slots), vm.save()
        with vm.snapshot().fork()[0] as clone:
            assert clone.pc.slots == slots and clone.plugged == ["data", "net0"]
    with pytest.raises(SnapshotError, match="disks"):
        VM.restore(data)
    with VM.restore(data, disks=[f"{image},ro"]) as again:
        assert again.pc.slots == slots and again.plugged == ["data", "net0"]
        agree(again)
        assert again.plugged == ["net0"], "what it was asked for, it can still agree to"


def test_a_reset_keeps_what_is_plugged_in_and_asks_for_nothing(image: Path) -> None:
    with VM("16M", hotplug=True) as vm:
        vm.plug(f"disk={image}")
        vm.unplug("disk0")
        vm.pc.reset()
        agree(vm)
        assert vm.plugged == ["disk0"]


def test_a_slot_that_nobody_can_give_up_stays(image: Path) -> None:
    """As a snapshot from somebody else may ask."""
    with VM("16M", hotplug=True) as vm:
        agent, empty = vm.pc.slots["virtio_agent"], 17
        vm.pc.part("pci_hotplug", type(vm._hotplug())).state.asked = 1 << agent | 1 << empty
        agree(vm)
        assert "virtio_agent" in vm.pc.parts


def test_what_is_unplugged_is_let_go_of(image: Path) -> None:
    """Its image may be used by others, frames for it reach nobody, and its timers do not go off."""
    with VM("16M", hotplug=True) as vm, VM("16M", net="lan=unplugged") as other:
        vm.plug(f"disk={image}")
        vm.plug("net=lan=unplugged")
        with pytest.raises(ImageError):
            VM("16M", disks=[str(image)])
        disk, card = vm.pc.part("disk0", Blk), vm.pc.part("net0", Net)
        disk.postpone(0, 1)
        notify = card.cable.notify
        assert vm.config.is_linked
        vm.unplug("disk0")
        vm.unplug("net0")
        notify()  # a frame has come, and is heard of too late
        agree(vm)
        while vm.posts:
            vm.posts.popleft()()
        assert not vm.config.is_linked and not vm.vcpus[0].time.is_linked
        vm.plug("net=lan=unplugged")
        assert vm.vcpus[0].time.is_linked
        assert other.pc.inspect()["net0"]["cable"]["ports"] == 2
        VM("16M", disks=[str(image)]).close()


def test_what_cannot_be(image: Path) -> None:
    with VM("16M") as fixed, pytest.raises(RuntimeError, match="was made without hot plug"):
        fixed.plug("net=none")
    with VM("16M", hotplug=True, disks=[f"{image},name=data"]) as vm:
        before = vm.config, vm.pc.slots.copy()
        for what, words in (
            ("floppy=a", "expected disk=FILE"),
            ("disk=/a,rw", "not 'rw'"),
            ("disk=/none", "/none"),
            (f"disk={image}", "in use|another|lock"),
            ("net=none,name=data", "'data' is plugged in already"),
            ("net=none,name=pci", "'pci' is plugged in already"),
            ("net=none,name=Data", "small letters"),
        ):
            with pytest.raises((ValueError, ImageError), match=words):
                vm.plug(what)
        with pytest.raises(ValueError, match="no disk, network card or folder 'pci': data"):
            vm.unplug("pci")
        for _ in range(4):
            vm.plug(Nic("none"))
        with pytest.raises(ValueError, match="expected 4 at most"):
            vm.plug(Nic("none"))
        assert (vm.config.disks[0].file, vm.plugged[0]) == (str(image), "data")
        assert before[0].disks == (Disk(str(image), name="data"),)


@pytest.mark.parametrize(("name", "slot"), [("x" * 21, 0), ("-a", 0), ("ok", 32), ("ok", True)])
def test_a_name_and_a_slot_are_checked(name: str, slot: int) -> None:
    with pytest.raises(ValueError, match=r"name=|slot"):
        Disk("/a", name=name, slot=slot)
    with pytest.raises(ValueError, match=r"name=|slot"):
        Nic("none", name=name, slot=slot)


def test_the_command_line_names_them() -> None:
    assert Disk.parse("/a,name=data").name == Nic.parse("none,name=data").name == "data"
    config = Config(disks=("/a,name=x",), net=("none,name=y",))  # type: ignore[arg-type]
    assert (config.disks[0].name, config.net[0].name) == ("x", "y")


@pytest.mark.parametrize("hotplug", [False, True])
def test_a_card_of_the_board_is_none_of_those_that_are_plugged_in(hotplug: bool) -> None:
    with VM("16M", hotplug=hotplug, net="none", devices=[("virtio_net", {})]) as vm:
        cards = [vm.pc.part(name, Net) for name in ("virtio_net", "net0")]
        assert [card.state.is_up for card in cards] == [True, False]


def test_two_cards_of_one_description_keep_their_names_and_slots() -> None:
    nic = Nic("none")
    with VM("16M", hotplug=True, net=(nic, nic)) as vm:
        before = dict(vm.pc.slots)
        vm.plug("net=none")
        kept = {one.name: one.slot for one in vm.config.net}
        assert list(kept) == ["net0", "net1", "net2"]
        assert [kept["net0"], kept["net1"]] == [before["net0"], before["net1"]]


def test_a_folder_and_a_socket_are_plugged_in_and_a_snapshot_has_them(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    with VM("16M", hotplug=True) as vm:
        assert vm.plug(f"share={shared},rw") == "share0"
        assert vm.plug(f"vsock={tmp_path}/v,cid=9") == "vsock0"
        assert vm.plugged == ["share0", "vsock0"]
        saved = vm.save()
        with pytest.raises(ValueError, match="vsock: 2 of them, expected 1 at most"):
            vm.plug(f"vsock={tmp_path}/w")
        with pytest.raises(ShareError, match="no such folder"):
            vm.plug(f"share={tmp_path}/none")
        assert vm.plugged == ["share0", "vsock0"]
    with VM.restore(saved, folders=f"{shared},rw", vsock=f"{tmp_path}/w") as again:
        assert again.plugged == ["share0", "vsock0"]
        assert [one.cid for one in again.config.vsock] == [9]


def test_what_cannot_be_connected_is_not_plugged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with VM("16M", hotplug=True) as vm:
        with monkeypatch.context() as patch:
            patch.setattr(Vsock, "listen", failing)
            with pytest.raises(OSError, match="no descriptor"):
                vm.plug(f"vsock={tmp_path}/v")
        assert vm.plugged == [] and "vsock0" not in vm.pc.parts
        assert not (tmp_path / "v").exists()
        assert vm.plug(f"vsock={tmp_path}/v") == "vsock0"


def failing(*_args: object) -> None:
    raise OSError("no descriptor is left")
