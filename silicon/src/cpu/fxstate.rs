//! The x87/SSE state as a whole: saving, loading, MXCSR
//! (SDM 1, "Programming with the x87 FPU" and "Programming with Intel Streaming SIMD Extensions").
//!
//! *Last-instruction pointers* are in [`crate::cpu::pointers`]; in [`Fx`] they are zero.  Both engines
//! call [`normalize`] after they saved the computer's registers.

use iced_x86::{Instruction, Mnemonic};

use crate::arch::bits::cr0;
use crate::arch::exception::{Exception, vector};
use crate::cpu::operand;
use crate::cpu::state::{Core, Fx};
use crate::cpu::trap::{Exec, gp};
use crate::mmu::access::Who;
use crate::mmu::walk::Access;

/// The bits of MXCSR that this processor has.
pub const MXCSR_MASK: u32 = 0xFFFF;
const FXSAVE_BYTES: usize = 512;
const MXCSR: usize = 24;
const XMM: usize = 160;
/// Up to so many bytes an operand is read and written word by word.
const FEW: usize = 16;

/// Give the fields that are kept elsewhere, or differ between processors, their values.
pub fn normalize(fx: &mut Fx) {
    fx.0[5..MXCSR].fill(0); // reserved, FOP, FIP, FCS, FDP, FDS
    fx.0[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
}

impl Fx {
    /// MXCSR.
    #[must_use]
    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes([self.0[24], self.0[25], self.0[26], self.0[27]])
    }

    /// Set MXCSR; bits that it does not have are dropped.
    pub fn set_mxcsr(&mut self, v: u32) {
        self.0[MXCSR..MXCSR + 4].copy_from_slice(&(v & MXCSR_MASK).to_le_bytes());
    }

    /// XMM register `i`.
    #[must_use]
    pub fn xmm(&self, i: usize) -> [u8; 16] {
        let mut v = [0; 16];
        v.copy_from_slice(&self.0[XMM + 16 * i..][..16]);
        v
    }

    /// Set XMM register `i`.
    pub fn set_xmm(&mut self, i: usize, value: [u8; 16]) {
        self.0[XMM + 16 * i..][..16].copy_from_slice(&value);
    }

    /// MMX register `i` (the mantissa of the physical x87 register).
    #[must_use]
    pub fn mm(&self, i: usize) -> [u8; 8] {
        // The image has ST(0) first; MM registers are numbered without TOP.
        let top = usize::from(self.0[3] >> 3 & 7);
        let st = (i + 8 - top) & 7;
        let mut v = [0; 8];
        v.copy_from_slice(&self.0[32 + 16 * st..][..8]);
        v
    }

    /// The x87 exceptions that are raised and not masked.
    #[must_use]
    pub fn pending(&self) -> u8 {
        self.0[2] & !self.0[0] & 0x3F
    }
}

/// FXSAVE, FXSAVE64, FXRSTOR, FXRSTOR64, LDMXCSR, STMXCSR, VLDMXCSR, VSTMXCSR.
///
/// # Errors
/// #NM, #GP(0) for a misaligned image or reserved bits of MXCSR, what the memory access raises.
pub fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    match insn.mnemonic() {
        Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr => {
            operand::write_op(core, insn, 0, u64::from(core.fx.mxcsr()))
        }
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => {
            let v = operand::read_op(core, insn, 0)? as u32;
            if v & !MXCSR_MASK != 0 {
                return Err(gp(0));
            }
            core.fx.set_mxcsr(v);
            Ok(())
        }
        Mnemonic::Fxsave | Mnemonic::Fxsave64 => save(core, insn),
        _ => load(core, insn),
    }
}

/// How many bytes of an image are meant: XMM8 and up exist in 64-bit mode only.
fn extent(core: &Core) -> usize {
    if core.is_64() { XMM + 256 } else { XMM + 128 }
}

fn image(core: &mut Core, insn: &Instruction, access: Access) -> Exec<u64> {
    if core.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(Exception::plain(vector::NM).into());
    }
    let gva = operand::mem_linear(core, insn, FXSAVE_BYTES, access)?;
    if gva & 15 != 0 { Err(gp(0)) } else { Ok(gva) }
}

fn save(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let gva = image(core, insn, Access::Write)?;
    core.probe_write(gva, FXSAVE_BYTES, Who::Program)?;
    let mut fx = core.fx;
    core.pointers.save(&mut fx, insn.mnemonic() == Mnemonic::Fxsave64);
    store(core, gva, &fx.0[..extent(core)])
}

fn load(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let gva = image(core, insn, Access::Read)?;
    let mut new = [0; FXSAVE_BYTES];
    fetch(core, gva, &mut new)?;
    let n = extent(core);
    let mut fx = core.fx;
    fx.0[..n].copy_from_slice(&new[..n]);
    let mxcsr = u32::from_le_bytes([new[24], new[25], new[26], new[27]]);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(gp(0));
    }
    core.pointers.restore(&fx, insn.mnemonic() == Mnemonic::Fxrstor64);
    normalize(&mut fx);
    // What was in force before is what the computer makes of it.
    let is_settled = fx.0[..XMM] == core.fx.0[..XMM];
    core.fx = fx;
    if !is_settled {
        crate::cpu::vector::settle(core);
    }
    Ok(())
}

/// Read an operand of any length.
///
/// # Errors
/// What the accesses raise.
pub fn fetch(core: &mut Core, gva: u64, out: &mut [u8]) -> Exec<()> {
    if out.len() > FEW
        && let Some(hpa) = core.plain_range(gva, out.len(), Access::Read)?
        && core.mem.read_bytes(hpa, out)
    {
        return Ok(());
    }
    for (i, chunk) in out.chunks_mut(8).enumerate() {
        let at = core.linear_add(gva, 8 * i as u64);
        match chunk.len() {
            n @ (1 | 2 | 4 | 8) => {
                let v = core.read_lin(at, n, Who::Program)?;
                chunk.copy_from_slice(&v.to_le_bytes()[..n]);
            }
            _ => core.read_lin_bytes(at, chunk, Who::Program)?,
        }
    }
    Ok(())
}

/// Write an operand of any length whose pages were probed.
///
/// # Errors
/// What the accesses raise.
pub fn store(core: &mut Core, gva: u64, data: &[u8]) -> Exec<()> {
    if data.len() > FEW
        && let Some(hpa) = core.plain_range(gva, data.len(), Access::Write)?
        && !core.mem.is_code(hpa >> 12)
        && core.mem.write_bytes(hpa, data)
    {
        return Ok(());
    }
    for (i, chunk) in data.chunks(8).enumerate() {
        let at = core.linear_add(gva, 8 * i as u64);
        match chunk.len() {
            n @ (1 | 2 | 4 | 8) => {
                let mut v = [0; 8];
                v[..n].copy_from_slice(chunk);
                core.write_lin(at, n, u64::from_le_bytes(v), Who::Program)?;
            }
            _ => core.write_lin_bytes(at, chunk, Who::Program)?,
        }
    }
    Ok(())
}
