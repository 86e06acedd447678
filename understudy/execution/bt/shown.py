"""A unit for people: the guest's instructions, and beside each what runs in its stead.

Source: none.
"""

import iced_x86 as iced

from understudy.execution.bt.cache import Unit
from understudy.execution.bt.layout import Layout

COLUMNS = 44


def text(unit: Unit, layout: Layout) -> str:
    """Line by line."""
    code, out = unit.code, bytes(unit.code.out)
    formatter = iced.Formatter(iced.FormatterSyntax.NASM)
    formatter.hex_prefix, formatter.hex_suffix = "0x", ""
    guest = iced.Decoder(layout.bits, unit.guest, ip=unit.rip)
    starts = {pc for pc, _ in code.starts}
    stubs = {link.stub: link for link in code.links}
    ends = dict(code.ends)
    lines = [f"unit of {unit.rip:#x}, {len(code.starts)} instructions, {len(out)} bytes"]
    for instruction in iced.Decoder(layout.bits, out, ip=code.pc):
        pc, left = instruction.ip, ""
        if pc in starts:
            own = guest.decode()
            left = f"{own.ip:x}  {formatter.format(own)}"
        elif pc in stubs:
            left = f"       to {stubs[pc].target:x}, if not chained"
        elif pc in ends:
            left = f"       on to {ends[pc]:x}"
        right = formatter.format(instruction)
        if pc in code.callouts:
            right += "    ; callout"
        lines.append(f"{left:{COLUMNS}} | {pc:x}  {right}")
    return "\n".join(lines)
