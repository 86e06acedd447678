//! State components that are as they were at first: "It is possible for XINUSE[i] to be 1 even when state
//! component i is in its initial configuration" (SDM 1, "Processor Tracking of XSAVE-Managed State").  AMD's
//! processors look at what XRSTOR loads, Intel's do not, and both call one in use that was written to.

use silicon::processor::Processor;

/// The x87 state.
const X87: u64 = 1;
/// The XMM registers.
const SSE: u64 = 2;
/// The upper halves of the YMM registers.
const AVX: u64 = 4;
const XMM: std::ops::Range<usize> = 20..52;
const HEADER: usize = 64;
const UPPER: usize = 72;

/// The components, of bits 2:0, that are as they were at first.
pub fn untouched(p: &Processor) -> u64 {
    let fx = &p.core.fx.0;
    let is_x87 = fx[..8] == [0x7F, 3, 0, 0, 0, 0, 0, 0] && fx[32..160].iter().all(|&b| b == 0);
    let all = |part: std::ops::Range<usize>| (0..16).all(|i| p.core.ymm(i)[part.clone()] == [0; 16]);
    [(X87, is_x87), (SSE, all(0..16)), (AVX, all(16..32))]
        .iter()
        .map(|&(bit, is)| if is { bit } else { 0 })
        .sum()
}

/// Have `ours`, an area as it was saved, tell of these components as of such that are in use.
pub fn call_in_use(ours: &mut [u64], components: u64, is_compacted: bool) {
    ours[HEADER] |= components;
    if components & X87 != 0 {
        ours[0] = 0x37F;
        ours[1..3].fill(0);
        ours[4..XMM.start].fill(0);
    }
    if components & SSE != 0 {
        ours[XMM].fill(0);
        if is_compacted {
            ours[3] = ours[3] & !0xFFFF_FFFF | 0x1F80;
        }
    }
    if components & AVX != 0 {
        ours[UPPER..].fill(0);
    }
}
