//! Instructions of AVX that are not copied: what they access follows from a mask or from several
//! addresses, or they change more registers than the mode has (SDM 2, "VMASKMOV", "VPMASKMOV",
//! "VPGATHERDD/VPGATHERQD" and its kin, "VZEROALL", "VZEROUPPER").
//!
//! A masked move accesses the chosen elements alone, and makes no #AC; a store writes all of them or none.
//! A gather goes from the lowest element up, and keeps what it has done when it faults; the rest of its
//! registers is as before then, as on this computer's processor (the manual's pseudocode has the rest of the mask
//! widened to all of an element).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::cpu::flags::sign_extend;
use crate::cpu::operand::{address_mask, ea, get_reg, segment_of, watch};
use crate::cpu::segment;
use crate::cpu::state::Core;
use crate::cpu::trap::Exec;
use crate::mmu::access::Who;
use crate::mmu::walk::Access;

/// Registers that code has which is not 64-bit.
const FEWER: usize = 8;

/// Whether it is one of these.
#[must_use]
pub fn is_special(insn: &Instruction) -> bool {
    is_masked(insn.mnemonic()) || insn.is_vsib() || is_zeroing(insn.mnemonic())
}

fn is_masked(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(m, Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq)
}

fn is_zeroing(m: Mnemonic) -> bool {
    matches!(m, Mnemonic::Vzeroall | Mnemonic::Vzeroupper)
}

/// Execute an instruction of this group.
///
/// # Errors
/// What the instruction raises.
pub fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    match insn.mnemonic() {
        m if is_zeroing(m) => zero(core, m == Mnemonic::Vzeroall),
        m if !is_masked(m) => return gather(core, insn),
        _ if insn.op0_kind() == OpKind::Memory => return store(core, insn),
        _ => return load(core, insn),
    }
    Ok(())
}

fn zero(core: &mut Core, is_all: bool) {
    let count = if core.is_64() { 16 } else { FEWER };
    core.upper.change(|halves| halves[..count].fill([0; 16]));
    if is_all {
        (0..count).for_each(|i| core.fx.set_xmm(i, [0; 16]));
    }
}

/// Where an element is.
fn linear(core: &mut Core, segment: usize, offset: u64, size: usize, access: Access) -> Exec<u64> {
    let gva = segment::linear_unaligned(core, segment, offset, size, access == Access::Write, false)?;
    watch(core, gva, size, access == Access::Write);
    Ok(gva)
}

/// The elements that a mask chooses: their first bytes' numbers in a register.
fn chosen(mask: [u8; 32], size: usize, bytes: usize) -> impl Iterator<Item = usize> {
    (0..bytes).step_by(size).filter(move |at| mask[at + size - 1] & 0x80 != 0)
}

/// Bytes of an element of a masked move.
fn element(insn: &Instruction) -> usize {
    if matches!(insn.mnemonic(), Mnemonic::Vmaskmovps | Mnemonic::Vpmaskmovd) { 4 } else { 8 }
}

fn load(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let (size, bytes) = (element(insn), insn.memory_size().size());
    let mut value = [0; 32];
    for at in chosen(core.ymm(insn.op1_register().number()), size, bytes) {
        let offset = ea(core, insn).wrapping_add(at as u64) & address_mask(insn);
        let gva = linear(core, segment_of(insn), offset, size, Access::Read)?;
        let word = core.read_lin(gva, size, Who::Program)?.to_le_bytes();
        value[at..at + size].copy_from_slice(&word[..size]);
    }
    core.set_ymm(insn.op0_register().number(), &value);
    Ok(())
}

fn store(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let (size, bytes) = (element(insn), insn.memory_size().size());
    let mask = core.ymm(insn.op1_register().number());
    let value = core.ymm(insn.op2_register().number());
    let mut places = [0; 8];
    for at in chosen(mask, size, bytes) {
        let offset = ea(core, insn).wrapping_add(at as u64) & address_mask(insn);
        let gva = linear(core, segment_of(insn), offset, size, Access::Write)?;
        core.probe_write(gva, size, Who::Program)?;
        places[at / 4] = gva;
    }
    for at in chosen(mask, size, bytes) {
        let mut word = [0; 8];
        word[..size].copy_from_slice(&value[at..at + size]);
        core.write_lin(places[at / 4], size, u64::from_le_bytes(word), Who::Program)?;
    }
    Ok(())
}

/// What the operands of a gather are made of.
struct Gather {
    /// Bytes of an element, and of an index.
    size: usize,
    index_size: usize,
    /// How many there are.
    count: usize,
}

fn shape(insn: &Instruction) -> Gather {
    use Mnemonic::*;
    let size = match insn.mnemonic() {
        Vgatherdps | Vgatherqps | Vpgatherdd | Vpgatherqd => 4,
        _ => 8,
    };
    let index_size = if insn.is_vsib64() { 8 } else { 4 };
    let indices = insn.memory_index().size() / index_size;
    Gather { size, index_size, count: indices.min(insn.op0_register().size() / size) }
}

fn gather(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let Gather { size, index_size, count } = shape(insn);
    let (to, by) = (insn.op0_register().number(), insn.op2_register().number());
    let indices = core.ymm(insn.memory_index().number());
    let (mut value, mut mask) = (core.ymm(to), core.ymm(by));
    let (base, mask_of_address) = match insn.memory_base() {
        Register::None => (0, if insn.memory_displ_size() == 8 { u64::MAX } else { 0xFFFF_FFFF }),
        base => (get_reg(core, base), address_mask(insn)),
    };
    let base = base.wrapping_add(insn.memory_displacement64());
    for i in 0..count {
        let at = size * i;
        if mask[at + size - 1] & 0x80 == 0 {
            mask[at..at + size].fill(0);
            continue;
        }
        let mut index = [0; 8];
        index[..index_size].copy_from_slice(&indices[index_size * i..][..index_size]);
        let index = sign_extend(index_size, u64::from_le_bytes(index));
        let offset = base.wrapping_add(index.wrapping_mul(insn.memory_index_scale().into()));
        let word = linear(core, segment_of(insn), offset & mask_of_address, size, Access::Read)
            .and_then(|gva| core.read_lin(gva, size, Who::Program))
            .inspect_err(|_| {
                core.set_ymm(to, &value);
                core.set_ymm(by, &mask);
            })?;
        value[at..at + size].copy_from_slice(&word.to_le_bytes()[..size]);
        mask[at..at + size].fill(0);
    }
    value[size * count..].fill(0);
    core.set_ymm(to, &value);
    core.set_ymm(by, &[0; 32]);
    Ok(())
}
