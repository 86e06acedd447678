"""A unit for people: the guest's instructions, and beside each what runs in its stead.

Source: none.
"""

import iced_x86 as iced

from understudy.execution.bt.sequences import Code

COLUMNS = 44


def text(code: Code, own: bytes) -> str:
    """Line by line; `own`: the guest's code."""
    layout, out, rip = code.layout, bytes(code.out), code.starts[0][1]
    formatter = iced.Formatter(iced.FormatterSyntax.NASM)
    formatter.hex_prefix, formatter.hex_suffix = "0x", ""
    guest = iced.Decoder(layout.bits, own, ip=rip)
    starts = {pc for pc, _ in code.starts}
    stubs = {link.stub: link for link in code.links}
    ends = dict(code.ends)
    lines = [f"unit of {rip:#x}, {len(code.starts)} instructions, {len(out)} bytes"]
    for instruction in iced.Decoder(layout.bits, out, ip=code.pc):
        pc, left = instruction.ip, ""
        if pc in starts:
            of_guest = guest.decode()
            left = f"{of_guest.ip:x}  {formatter.format(of_guest)}"
        elif pc in stubs:
            left = f"       to {stubs[pc].target:x}, if not chained"
        elif pc in ends:
            left = f"       on to {ends[pc]:x}"
        right = formatter.format(instruction)
        if pc in code.callouts:
            right += "    ; callout"
        lines.append(f"{left:{COLUMNS}} | {pc:x}  {right}")
    return "\n".join(lines)
