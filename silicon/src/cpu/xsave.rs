//! The XSAVE feature set (SDM 1, "Managing State Using the XSAVE Feature Set"; SDM 2, the
//! instructions' own pages): XCR0, and saving and restoring state by components.
//!
//! The components are x87, SSE, AVX (on a computer that has it) and PKRU.  None is a supervisor's, so IA32_XSS takes no bit.  Which
//! are in use is found by looking: a component in its initial configuration never is.  The modified
//! optimization, which the manual leaves to the processor, is not made.

use iced_x86::{Instruction, Mnemonic};

use crate::arch::bits::{cr0, cr4};
use crate::arch::exception::{Exception, vector};
use crate::cpu::fxstate::{MXCSR_MASK, fetch, normalize, store};
use crate::cpu::operand::{address_mask, ea, is_no_multiple, linear_at, segment_of};
use crate::cpu::pointers::Pointers;
use crate::cpu::state::{Core, Fx};
use crate::cpu::system::require_level_0;
use crate::cpu::trap::{Exec, gp, ud};
use crate::mmu::access::Who;
use crate::mmu::walk::Access;
use crate::vmx::execute::{displacement, information};
use crate::vmx::intercept::Sensitive;

/// State components (SDM 1, "XSAVE-Supported Features and State-Component Bitmaps").
const X87: u64 = 1 << 0;
pub(crate) const SSE: u64 = 1 << 1;
pub(crate) const AVX: u64 = 1 << 2;
const PKRU: u64 = 1 << 9;

/// The components that XCR0 may enable.
#[must_use]
pub fn xcr0_known() -> u64 {
    X87 | SSE | PKRU | if is_x86_feature_detected!("avx") { AVX } else { 0 }
}

/// Whether XCR0 may be so.
#[must_use]
pub fn is_xcr0(value: u64) -> bool {
    value & !xcr0_known() == 0 && value & X87 != 0 && (value & AVX == 0 || value & SSE != 0)
}

const AT_RESET: Fx = Fx::at_reset();
const MXCSR: usize = 24;
const MXCSR_AT_RESET: u32 = 0x1F80;
const ST: usize = 32;
const XMM: usize = 160;
const HEADER: usize = 512;
/// The legacy region and the header.
const LEAST_BYTES: usize = 576;
/// Where the upper halves are in both formats, and how long their component is.
const AVX_AT: usize = LEAST_BYTES;
const AVX_BYTES: usize = 256;
/// Where PKRU is in the standard format, as on Intel's processors, and how long its component is.
const PKRU_AT: usize = 2688;
const PKRU_BYTES: usize = 8;
/// XCOMP_BV: the area is in compacted format.
const COMPACTED: u64 = 1 << 63;

/// Where PKRU is in the compacted format with these components.
fn pkru_compacted(components: u64) -> usize {
    LEAST_BYTES + if components & AVX == 0 { 0 } else { AVX_BYTES }
}

/// The bytes of an area in standard format with these components.
#[must_use]
pub fn standard_bytes(components: u64) -> u32 {
    let bytes = if components & PKRU == 0 { pkru_compacted(components) } else { PKRU_AT + PKRU_BYTES };
    bytes as u32
}

/// The bytes of an area in compacted format with these components.
#[must_use]
pub fn compacted_bytes(components: u64) -> u32 {
    (pkru_compacted(components) + if components & PKRU == 0 { 0 } else { PKRU_BYTES }) as u32
}

/// XGETBV, XSETBV.
///
/// # Errors
/// #UD without CR4.OSXSAVE, #GP(0) for what no register takes, and the VM exit.
pub(crate) fn registers(core: &mut Core, insn: &Instruction) -> Exec<()> {
    require_enabled(core)?;
    let index = core.gpr[1] as u32;
    if insn.mnemonic() == Mnemonic::Xsetbv {
        require_level_0(core)?;
        core.intercept(Sensitive::Xsetbv, insn.len() as u32)?;
        if index != 0 {
            return Err(gp(0));
        }
        return set_xcr0(core, operands(core));
    }
    let value = match index {
        0 => core.xcr0,
        1 => core.xcr0 & in_use(core, true),
        _ => return Err(gp(0)),
    };
    core.gpr[0] = value & 0xFFFF_FFFF;
    core.gpr[2] = value >> 32;
    Ok(())
}

/// Write XCR0.
///
/// # Errors
/// #GP(0) for components that there are not, without x87, and for AVX without SSE.
pub fn set_xcr0(core: &mut Core, value: u64) -> Exec<()> {
    if !is_xcr0(value) {
        return Err(gp(0));
    }
    core.xcr0 = value;
    Ok(())
}

/// XSAVE, XSAVEOPT, XSAVEC, XSAVES, XRSTOR, XRSTORS, and their 64-bit forms.
///
/// # Errors
/// What the instruction raises.
pub(crate) fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    use Mnemonic as M;
    require_enabled(core)?;
    let supervisor = matches!(insn.mnemonic(), M::Xsaves | M::Xsaves64 | M::Xrstors | M::Xrstors64);
    let mut wanted = operands(core);
    if supervisor {
        if !core.vmx.has_xsaves() {
            return Err(ud());
        }
        require_level_0(core)?;
        let (displacement, info) = (displacement(insn), information(insn));
        let what = match insn.mnemonic() {
            M::Xsaves | M::Xsaves64 => Sensitive::Xsaves { components: wanted, displacement, info },
            _ => Sensitive::Xrstors { components: wanted, displacement, info },
        };
        core.intercept(what, insn.len() as u32)?;
        wanted &= core.xcr0 | core.msr.xss;
    } else {
        wanted &= core.xcr0;
    }
    if core.cr0 & cr0::TS != 0 {
        return Err(Exception::plain(vector::NM).into());
    }
    match insn.mnemonic() {
        M::Xsave | M::Xsave64 => save(core, insn, wanted, Form { is_lean: false, is_compacted: false }),
        M::Xsaveopt | M::Xsaveopt64 => save(core, insn, wanted, Form { is_lean: true, is_compacted: false }),
        M::Xsavec | M::Xsavec64 | M::Xsaves | M::Xsaves64 => {
            save(core, insn, wanted, Form { is_lean: true, is_compacted: true })
        }
        _ => restore(core, insn, wanted, supervisor),
    }
}

/// How an instruction saves.
#[derive(Clone, Copy)]
struct Form {
    /// What is in its initial configuration is not written.
    is_lean: bool,
    is_compacted: bool,
}

fn require_enabled(core: &Core) -> Exec<()> {
    if core.cr4 & cr4::OSXSAVE == 0 { Err(ud()) } else { Ok(()) }
}

/// EDX:EAX.
fn operands(core: &Core) -> u64 {
    core.gpr[0] & 0xFFFF_FFFF | core.gpr[2] << 32
}

/// XINUSE.  MXCSR does not belong to SSE's configuration, but some instructions count it in; XMM8 to XMM15
/// do in every mode, as on this computer ("It is possible for XINUSE\[i\] to be 1 even when state component
/// i is in its initial configuration").
fn in_use(core: &Core, with_mxcsr: bool) -> u64 {
    let fx = &core.fx.0;
    let initial = &AT_RESET;
    let has_x87 = fx[..MXCSR] != initial.0[..MXCSR]
        || fx[ST..XMM] != initial.0[ST..XMM]
        || core.pointers != Pointers::default();
    let has_sse = fx[XMM..XMM + 256] != [0; 256] || with_mxcsr && core.fx.mxcsr() != MXCSR_AT_RESET;
    let has_avx = core.upper.all() != [[0; 16]; 16];
    let bit = |on: bool, bit: u64| if on { bit } else { 0 };
    bit(has_x87, X87) | bit(has_sse, SSE) | bit(has_avx, AVX) | bit(core.pkru != 0, PKRU)
}

/// The area's address, and that of each of its parts that begin so far from it.
struct Area {
    segment: usize,
    offset: u64,
    mask: u64,
    /// Where its legacy region and header lie, if in one page of plain memory that has no code.
    hpa: Option<u64>,
}

impl Area {
    /// Its first page is tried whatever is saved or restored, as this computer does.
    ///
    /// # Errors
    /// #GP(0) if it is not aligned, or what its segment says; a page fault.
    fn of(core: &mut Core, insn: &Instruction, access: Access) -> Exec<Self> {
        if is_no_multiple(core, insn, 64) {
            return Err(gp(0));
        }
        let (segment, offset, mask) = (segment_of(insn), ea(core, insn), address_mask(insn));
        let gva = linear_at(core, segment, offset, LEAST_BYTES, access)?;
        let wraps = offset.checked_add(LEAST_BYTES as u64).is_none_or(|end| end > mask);
        let hpa = if wraps { None } else { core.plain_range(gva, LEAST_BYTES, access)? };
        let hpa = hpa.filter(|hpa| access == Access::Read || !core.mem.is_code(hpa >> 12));
        match access {
            _ if hpa.is_some() => {}
            Access::Write => core.probe_write(gva, 1, Who::Program)?,
            _ => drop(core.read_lin(gva, 1, Who::Program)?),
        }
        Ok(Self { segment, offset, mask, hpa })
    }

    fn part(&self, core: &mut Core, at: usize, size: usize, access: Access) -> Exec<u64> {
        let offset = self.offset.wrapping_add(at as u64) & self.mask;
        linear_at(core, self.segment, offset, size, access)
    }

    /// Where a part lies, if that needs no further look.
    fn known(&self, at: usize, size: usize) -> Option<u64> {
        self.hpa.filter(|_| at + size <= LEAST_BYTES).map(|hpa| hpa + at as u64)
    }

    /// The linear address of a part that can be written.
    fn writable(&self, core: &mut Core, at: usize, size: usize) -> Exec<u64> {
        let gva = self.part(core, at, size, Access::Write)?;
        core.probe_write(gva, size, Who::Program)?;
        Ok(gva)
    }

    fn read(&self, core: &mut Core, at: usize, out: &mut [u8]) -> Exec<()> {
        if let Some(hpa) = self.known(at, out.len()) {
            core.mem.read_bytes(hpa, out);
            return Ok(());
        }
        let gva = self.part(core, at, out.len(), Access::Read)?;
        fetch(core, gva, out)
    }
}

/// Where a part is to be written.
#[derive(Clone, Copy)]
enum Place {
    /// In plain memory.
    Known(u64),
    /// At a linear address.
    Linear(u64),
}

impl Place {
    fn of(core: &mut Core, area: &Area, at: usize, size: usize) -> Exec<Self> {
        match area.known(at, size) {
            Some(hpa) => Ok(Self::Known(hpa)),
            None => area.writable(core, at, size).map(Self::Linear),
        }
    }

    fn write(self, core: &mut Core, bytes: &[u8]) -> Exec<()> {
        match self {
            Self::Known(hpa) => {
                core.mem.write_bytes(hpa, bytes);
                Ok(())
            }
            Self::Linear(gva) => store(core, gva, bytes),
        }
    }
}

fn is_wide(insn: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(insn.mnemonic(), Xsave64 | Xsaveopt64 | Xsavec64 | Xsaves64 | Xrstor64 | Xrstors64)
}

/// The vector registers of the mode.
fn registers_of(core: &Core) -> usize {
    if core.is_64() { 16 } else { 8 }
}

fn save(core: &mut Core, insn: &Instruction, wanted: u64, form: Form) -> Exec<()> {
    let area = Area::of(core, insn, Access::Write)?;
    let used = wanted & in_use(core, form.is_compacted);
    let saved = if form.is_lean { used } else { wanted };
    let mut fx = core.fx;
    core.pointers.save(&mut fx, is_wide(insn));
    let pkru = u64::from(core.pkru).to_le_bytes();
    // In the standard format MXCSR goes with AVX, too.
    let has_mxcsr = if form.is_compacted { saved & SSE } else { wanted & (SSE | AVX) } != 0;
    let registers = registers_of(core);
    let end = XMM + 16 * registers;
    let upper = core.upper.all();
    let pkru_at = if form.is_compacted { pkru_compacted(wanted) } else { PKRU_AT };
    // (whether it is saved, its place in the area, its bytes)
    let parts = [
        (saved & X87 != 0, 0, &fx.0[..MXCSR]),
        (has_mxcsr, MXCSR, &fx.0[MXCSR..ST]),
        (saved & X87 != 0, ST, &fx.0[ST..XMM]),
        (saved & SSE != 0, XMM, &fx.0[XMM..end]),
        (saved & AVX != 0, AVX_AT, upper[..registers].as_flattened()),
        (saved & PKRU != 0, pkru_at, &pkru[..]),
    ];
    let header = Place::of(core, &area, HEADER, 16)?;
    let mut places = [None; 6];
    for (place, (is_saved, at, bytes)) in places.iter_mut().zip(parts) {
        if is_saved {
            *place = Some(Place::of(core, &area, at, bytes.len())?);
        }
    }
    let before = match header {
        _ if form.is_compacted => 0,
        Place::Known(hpa) => core.mem.load(hpa, 8),
        Place::Linear(gva) => core.read_lin(gva, 8, Who::Program)?,
    };
    for (place, (.., bytes)) in places.into_iter().zip(parts) {
        place.map_or(Ok(()), |place| place.write(core, bytes))?;
    }
    let xstate = if form.is_compacted { used } else { before & !wanted | used };
    let words = [xstate, wanted | COMPACTED].map(u64::to_le_bytes);
    header.write(core, &words.as_flattened()[..if form.is_compacted { 16 } else { 8 }])
}

/// XSTATE_BV, and XCOMP_BV if the area is compacted, if the header is one to restore from.
fn header(core: &Core, words: &[u64; 8], supervisor: bool) -> Exec<(u64, Option<u64>)> {
    let (xstate, xcomp) = (words[0], words[1]);
    let enabled = core.xcr0 | if supervisor { core.msr.xss } else { 0 };
    let is_compacted = xcomp & COMPACTED != 0;
    let is_bad = if is_compacted {
        xcomp & !COMPACTED & !enabled != 0
            || xstate & !(xcomp & !COMPACTED) != 0
            || words[2..].iter().any(|w| *w != 0)
    } else {
        supervisor || xstate & !enabled != 0 || xcomp != 0 || words[2] != 0
    };
    if is_bad { Err(gp(0)) } else { Ok((xstate, is_compacted.then_some(xcomp))) }
}

fn restore(core: &mut Core, insn: &Instruction, wanted: u64, supervisor: bool) -> Exec<()> {
    let area = Area::of(core, insn, Access::Read)?;
    let mut bytes = [0; 64];
    area.read(core, HEADER, &mut bytes)?;
    let (chunks, _) = bytes.as_chunks::<8>();
    let words = std::array::from_fn(|n| u64::from_le_bytes(chunks[n]));
    let (xstate, compacted) = header(core, &words, supervisor)?;
    let loaded = wanted & xstate;
    let mut fx = core.fx;
    let mut pointers = core.pointers;
    if wanted & X87 != 0 {
        let mut image = AT_RESET;
        if loaded & X87 != 0 {
            area.read(core, 0, &mut image.0[..MXCSR])?;
            area.read(core, ST, &mut image.0[ST..XMM])?;
        }
        fx.0[..MXCSR].copy_from_slice(&image.0[..MXCSR]);
        fx.0[ST..XMM].copy_from_slice(&image.0[ST..XMM]);
        if loaded & X87 == 0 {
            pointers = Pointers::default();
        } else {
            pointers.restore(&fx, is_wide(insn));
        }
    }
    // The standard format has MXCSR whether the registers are there or not.
    let has_mxcsr = if compacted.is_none() { wanted & (SSE | AVX) } else { loaded & SSE } != 0;
    if has_mxcsr || wanted & SSE != 0 {
        let mut mxcsr = MXCSR_AT_RESET.to_le_bytes();
        if has_mxcsr {
            area.read(core, MXCSR, &mut mxcsr)?;
            if u32::from_le_bytes(mxcsr) & !MXCSR_MASK != 0 {
                return Err(gp(0));
            }
        }
        fx.0[MXCSR..MXCSR + 4].copy_from_slice(&mxcsr);
    }
    let registers = registers_of(core);
    if wanted & SSE != 0 {
        let xmm = &mut fx.0[XMM..XMM + 16 * registers];
        xmm.fill(0);
        if loaded & SSE != 0 {
            area.read(core, XMM, xmm)?;
        }
    }
    let mut upper = [[0; 16]; 16];
    if loaded & AVX != 0 {
        area.read(core, AVX_AT, upper[..registers].as_flattened_mut())?;
    }
    let mut pkru = [0; PKRU_BYTES];
    if loaded & PKRU != 0 {
        area.read(core, compacted.map_or(PKRU_AT, pkru_compacted), &mut pkru)?;
    }
    normalize(&mut fx);
    let is_settled = fx.0[..XMM] == core.fx.0[..XMM];
    (core.fx, core.pointers) = (fx, pointers);
    if !is_settled {
        crate::cpu::vector::settle(core);
    }
    if wanted & AVX != 0 {
        core.upper.change(|halves| halves[..registers].copy_from_slice(&upper[..registers]));
    }
    if wanted & PKRU != 0 {
        core.set_pkru(u64::from_le_bytes(pkru) as u32);
    }
    Ok(())
}
