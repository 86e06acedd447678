"""What boot loaders' configurations say, as distributions write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.guests.boot_entries import BootEntry, extlinux, grub, specified

EXTLINUX = """\
# a comment
DEFAULT linux
TIMEOUT 50
APPEND console=ttyS0
LABEL old
  KERNEL /old
LABEL linux
  MENU LABEL Linux
  LINUX ../vmlinuz
  INITRD /initrd.img,more.img
  APPEND root=/dev/vda ro  quiet
"""
GRUB = r"""
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
else
   set default="1"
fi
set rootuuid='abc'
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'simple' {
	load_video
	if [ x$grub_platform = xxen ]; then insmod xzio; fi
	set root='hd0,gpt1'
	echo	'Loading Linux ...'
	linux	/boot/vmlinuz-6.1.0-18 root=UUID=1234 ro console=tty0 console=ttyS0,115200
	initrd	/boot/initrd.img-6.1.0-18
}
submenu 'Advanced options' {
	menuentry 'Debian GNU/Linux, with Linux 6.1.0-17' --id 'older' {
		linux	/boot/vmlinuz-6.1.0-17 root=UUID=${rootuuid} ro $unknown
		initrd	/boot/ucode.img /boot/initrd.img-6.1.0-17
	}
}
menuentry 'UEFI Firmware Settings' { fwsetup }
"""


def test_extlinux() -> None:
    assert extlinux(EXTLINUX, "/boot/extlinux") == BootEntry(
        "/boot/extlinux/../vmlinuz", ("/initrd.img", "/boot/extlinux/more.img"),
        "root=/dev/vda ro quiet",
    )  # fmt: skip
    assert extlinux(EXTLINUX.replace("DEFAULT linux", ""), "/x") == BootEntry(
        "/old", (), "console=ttyS0"
    )
    inside = "label a\nkernel k\nappend initrd=i ro\n"
    assert extlinux(inside, "/") == BootEntry("/k", ("/i",), "ro")


@pytest.mark.parametrize(
    "text", ["", "default x\n", "label x\n", "menu title\nlabel x\ninitrd i\n"]
)
def test_extlinux_that_starts_nothing(text: str) -> None:
    assert extlinux(text, "/") is None


def test_the_newest_entry_of_the_specification_or_the_chosen_one() -> None:
    def entry(version: str) -> str:
        return (
            f"title Linux\nlinux /vmlinuz-{version}\ninitrd /i1\ninitrd /i2\noptions a=b\noptions c"
        )

    files = {f"fedora-{v}.conf": entry(v) for v in ("6.9.0", "6.10.0", "5.1.0")}
    newest = BootEntry("/vmlinuz-6.10.0", ("/i1", "/i2"), "a=b c")
    assert specified(files) == newest
    assert specified(files, "timeout 3\ndefault gone.conf\n") == newest
    chosen = specified(files, "default fedora-5.1.0\n")
    assert chosen is not None and chosen.kernel == "/vmlinuz-5.1.0"
    chosen = specified(files, "default fedora-6.*\n")
    assert chosen == newest
    assert specified({"rescue.conf": "efi /tool.efi"}) is None
    assert specified({}) is None


def test_grubs_default_by_number_and_by_name() -> None:
    second = BootEntry(
        "/boot/vmlinuz-6.1.0-17", ("/boot/ucode.img", "/boot/initrd.img-6.1.0-17"),
        "root=UUID=abc ro",
    )  # fmt: skip
    first = BootEntry(
        "/boot/vmlinuz-6.1.0-18", ("/boot/initrd.img-6.1.0-18",),
        "root=UUID=1234 ro console=tty0 console=ttyS0,115200",
    )  # fmt: skip
    assert grub(GRUB) == second
    assert grub(GRUB.replace('"1"', '"simple"')) == first
    assert grub(GRUB.replace('"1"', '"Advanced options>older"')) == second
    assert grub(GRUB.replace('"1"', '"saved"')) == first
    assert grub("set timeout=5\nblscfg\n") is None


@given(st.text("abc $\"'{}\n=#\\;/", max_size=200))
def test_no_text_does_harm(text: str) -> None:
    for found in (extlinux(text, "/"), grub(f"menuentry x {{\nlinux {text}\n}}"), grub(text)):
        assert found is None or found.kernel
    specified({"a.conf": f"linux {text}"})
