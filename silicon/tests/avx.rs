//! YMM registers in generated code: their upper halves last across first-level misses, interpreted instructions,
//! windows and ways out, and are gone after VZEROUPPER; as under the reference engine, to the last count.

mod arena_bed;

use arena_bed::*;
use silicon::dbt::promotion::Windows;
use silicon::processor::EngineKind;
use silicon::snapshot::state_hash;

/// Adds 32 bytes that may cross a page to YMM0, stores it, has XGETBV interpreted; for ever.
const PROGRAM: &[u8] = &[
    0xC5, 0xFD, 0xFC, 0x44, 0x0E, 0x01, // again: vpaddb ymm0, ymm0, [rsi + rcx + 1]
    0xC5, 0xFE, 0x7F, 0x04, 0x0E, // vmovdqu [rsi + rcx], ymm0
    0x66, 0x0F, 0xFC, 0xC8, // paddb xmm1, xmm0: its upper half stays
    0xC4, 0xE3, 0x7D, 0x39, 0xC2, 0x01, // vextracti128 xmm2, ymm0, 1
    0x51, // push rcx
    0x31, 0xC9, // xor ecx, ecx
    0x0F, 0x01, 0xD0, // xgetbv
    0x59, // pop rcx
    0xC5, 0xF5, 0x76, 0xD8, // vpcmpeqd ymm3, ymm1, ymm0
    0xC5, 0xFD, 0xD7, 0xC3, // vpmovmskb eax, ymm3
    0x83, 0xC1, 0x11, // add ecx, 17
    0x81, 0xE1, 0xFF, 0x7F, 0x00, 0x00, // and ecx, 7FFFh
    0xF6, 0xC1, 0x70, // test cl, 70h
    0x75, 0xCA, // jnz again
    0xC5, 0xF8, 0x77, // vzeroupper
    0xEB, 0xC5, // jmp again
];

fn states(engine: EngineKind, windows: Windows, at: u64) -> Vec<u64> {
    let mut p = machine(engine, windows, at, PROGRAM);
    p.core.cr4 |= 1 << 18 | 0x600; // OSXSAVE, OSFXSR, OSXMMEXCPT
    p.core.xcr0 = 7;
    p.core.gpr[6] = LIBRARY + 0x10_0000;
    for i in 0..16 {
        p.core.set_ymm(i, &[i as u8 + 1; 32]);
    }
    (1..40)
        .map(|n| {
            p.run(97 * n, &mut || false);
            state_hash(&mut p.core)
        })
        .collect()
}

#[test]
fn the_engines_agree_at_every_stop() {
    if !is_x86_feature_detected!("avx2") {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for at in [LOW, PIE] {
        let expected = states(EngineKind::Reference, Windows::Never, at);
        assert!(expected.windows(2).all(|pair| pair[0] != pair[1]));
        for windows in [Windows::Never, Windows::Always] {
            assert!(expected == states(EngineKind::Dbt, windows, at), "{windows:?} {at:x}");
        }
    }
}
