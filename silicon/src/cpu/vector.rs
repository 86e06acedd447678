//! x87, MMX, SSE and AVX instructions (SDM 1, "Programming with the x87 FPU", "… MMX Technology",
//! "… Streaming SIMD Extensions", "… AVX, FMA, and Intel AVX2").
//!
//! Their arithmetic is the computer's own: an instruction is copied with its memory operand and
//! its general-purpose register replaced, and runs natively on the guest's state
//! ([`crate::dbt::native`]).  What belongs to the machine is done here: which exceptions come
//! first, segmentation, paging and alignment of the operand.  An instruction that the guest's
//! processor does not have (AVX-512, SSE4A, 3DNow!), or that the computer lacks, is #UD.

use std::collections::HashMap;

use iced_x86::{
    Code, CpuidFeature, Encoder, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register,
};

use crate::arch::bits::{cr0, cr4, rflags};
use crate::arch::exception::{Exception, vector};
use crate::cpu::state::{Core, Fx, Mode};
use crate::cpu::trap::{Exec, Trap, gp, ud};
use crate::cpu::{avx, fxstate, operand, xsave};
use crate::dbt::native::{Frame, Reach, Thunks};
use crate::mmu::access::Who;
use crate::mmu::walk::Access;

/// The conditions under which an instruction is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Class {
    /// x87, waiting: reports pending exceptions.
    X87,
    /// x87, not waiting (the FN… forms).
    X87Quiet,
    /// MMX registers only.
    Mmx,
    /// XMM registers.
    Sse,
    /// XMM and MMX registers.
    SseMmx,
    /// Encoded with VEX.
    Avx,
}

/// What is known of one instruction (its code, registers and immediate).
#[derive(Clone, Copy, Debug)]
struct Plan {
    class: Class,
    /// Place in the thunks; `None`: only the empty instruction was made.
    thunk: usize,
    /// The general-purpose register that RBX stands for.
    register: Option<u8>,
    /// Bytes of the memory operand, 0: none.
    size: u8,
    reads: bool,
    writes: bool,
    /// The memory operand's address has to be a multiple of this.
    alignment: u8,
}

/// Instructions copied so far.
#[derive(Default)]
pub struct Vectors {
    thunks: Option<Thunks>,
    plans: HashMap<u64, Option<Plan>>,
    /// What a copied instruction starts from and leaves.
    pub frame: Frame,
    /// The empty instruction.
    nothing: Option<usize>,
    /// How often the computer's x87 registers were used, and lost.
    pub runs: u64,
}

impl Vectors {
    fn thunks(&mut self) -> Exec<&mut Thunks> {
        if self.thunks.is_none() {
            self.thunks = Some(Thunks::new().map_err(|_| ud())?);
        }
        self.thunks.as_mut().ok_or_else(ud)
    }

    /// Copy an instruction; when there is no more room, start afresh.
    fn add(&mut self, reach: Reach, bytes: &[u8]) -> Exec<usize> {
        if let Some(at) = self.thunks()?.add(reach, bytes) {
            return Ok(at);
        }
        self.plans.clear();
        self.nothing = None;
        self.thunks()?.clear();
        self.thunks()?.add(reach, bytes).ok_or_else(ud)
    }
}

/// Execute an instruction of this group.
///
/// # Errors
/// What the instruction raises.
pub fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    match insn.mnemonic() {
        Mnemonic::Wait => {
            if core.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
                return Err(nm());
            }
            return no_pending(core);
        }
        Mnemonic::Fxsave | Mnemonic::Fxsave64 | Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => {
            return fxstate::execute(core, insn);
        }
        Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr => {
            may(core, Class::Sse)?;
            return fxstate::execute(core, insn);
        }
        Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr => {
            may(core, Class::Avx)?;
            return fxstate::execute(core, insn);
        }
        Mnemonic::Maskmovq => return masked_store(core, insn, Class::Mmx),
        Mnemonic::Maskmovdqu => return masked_store(core, insn, Class::Sse),
        Mnemonic::Vmaskmovdqu => return masked_store(core, insn, Class::Avx),
        _ => {}
    }
    if avx::is_special(insn) {
        if !is_known(insn) {
            return Err(ud());
        }
        may(core, Class::Avx)?;
        return avx::execute(core, insn);
    }
    let plan = plan_of(core, insn)?;
    may(core, plan.class)?;
    run(core, insn, plan)
}

fn nm() -> Trap {
    Exception::plain(vector::NM).into()
}

fn no_pending(core: &Core) -> Exec<()> {
    if core.fx.pending() != 0 { Err(Exception::plain(vector::MF).into()) } else { Ok(()) }
}

/// #UD, #NM and #MF, in the order of the manual's tables ("Exception Conditions of Legacy SIMD
/// Instructions Operating on MMX Registers" and the instructions' own pages).
#[inline]
fn may(core: &Core, class: Class) -> Exec<()> {
    let c = core.cr0 & (cr0::EM | cr0::TS);
    if class == Class::Avx {
        if !is_avx_enabled(core) {
            return Err(ud());
        }
        if c & cr0::TS != 0 {
            return Err(nm());
        }
    } else if matches!(class, Class::X87 | Class::X87Quiet) {
        if c != 0 {
            return Err(nm());
        }
    } else {
        let needs_os = class != Class::Mmx;
        if c & cr0::EM != 0 || needs_os && core.cr4 & cr4::OSFXSR == 0 {
            return Err(ud());
        }
        if c != 0 {
            return Err(nm());
        }
    }
    if matches!(class, Class::X87 | Class::Mmx | Class::SseMmx) { no_pending(core) } else { Ok(()) }
}

/// Whether the system has AVX enabled, and the mode knows VEX (SDM 2A, "Exceptions and VEX Instruction
/// Encodings").
#[must_use]
pub fn is_avx_enabled(core: &Core) -> bool {
    const NEEDED: u64 = xsave::SSE | xsave::AVX;
    core.cr4 & cr4::OSXSAVE != 0
        && core.xcr0 & NEEDED == NEEDED
        && !matches!(core.mode, Mode::Real | Mode::V86)
}

/// What tells one copied instruction from another.
#[inline]
fn key_of(insn: &Instruction) -> u64 {
    let immediate = if insn.op_count() > 1 && insn.op_kind(insn.op_count() - 1) == OpKind::Immediate8 {
        u64::from(insn.immediate8())
    } else {
        0
    };
    let register = |i: u32| {
        if insn.op_kind(i) == OpKind::Register { insn.op_register(i) as u64 } else { 0xFF }
    };
    insn.code() as u64
        | register(0) << 16
        | register(1) << 24
        | register(2) << 32
        | immediate << 40
        | register(3) << 48
}

#[inline]
fn plan_of(core: &mut Core, insn: &Instruction) -> Exec<Plan> {
    let key = key_of(insn);
    if let Some(known) = core.vectors.plans.get(&key) {
        return known.ok_or_else(ud);
    }
    let plan = make_plan(&mut core.vectors, insn)?;
    core.vectors.plans.insert(key, plan);
    plan.ok_or_else(ud)
}

/// Whether the machine and the computer have the instruction, which is one of the x87's, MMX's or a later extension's.
#[must_use]
pub fn is_known(insn: &Instruction) -> bool {
    use CpuidFeature::*;
    matches!(insn.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        && insn.cpuid_features().iter().all(|f| match f {
            FPU | FPU287 | FPU287XL_ONLY | FPU387 | FPU387SL_ONLY | MMX | SSE | SSE2 | CMOV | FXSR
            | INTEL8086 | INTEL186 | INTEL286 | INTEL386 | INTEL486 | X64 => true,
            SSE3 => is_x86_feature_detected!("sse3"),
            SSSE3 => is_x86_feature_detected!("ssse3"),
            SSE4_1 => is_x86_feature_detected!("sse4.1"),
            SSE4_2 => is_x86_feature_detected!("sse4.2"),
            AES => is_x86_feature_detected!("aes"),
            PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
            SHA => is_x86_feature_detected!("sha"),
            AVX => is_x86_feature_detected!("avx"),
            AVX2 => is_x86_feature_detected!("avx2"),
            FMA => is_x86_feature_detected!("fma"),
            F16C => is_x86_feature_detected!("f16c"),
            _ => false,
        })
}

fn class_of(insn: &Instruction) -> Class {
    let has = |test: fn(Register) -> bool| {
        (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && test(insn.op_register(i)))
    };
    if insn.encoding() == EncodingKind::VEX {
        return Class::Avx;
    }
    let is_x87 = insn.cpuid_features().iter().any(|f| {
        use CpuidFeature::*;
        matches!(f, FPU | FPU287 | FPU287XL_ONLY | FPU387 | FPU387SL_ONLY)
    });
    if is_x87 || insn.mnemonic() == Mnemonic::Fisttp {
        use Mnemonic::*;
        let is_quiet = matches!(
            insn.mnemonic(),
            Fninit | Fnclex | Fnstcw | Fnstsw | Fnstenv | Fnsave | Fneni | Fndisi | Fnsetpm
        );
        return if is_quiet { Class::X87Quiet } else { Class::X87 };
    }
    match (has(Register::is_mm) || insn.mnemonic() == Mnemonic::Emms, has(Register::is_xmm)) {
        (true, true) => Class::SseMmx,
        (true, false) if converts(insn.mnemonic()) => Class::SseMmx,
        (true, false) => Class::Mmx,
        _ => Class::Sse,
    }
}

/// Conversions between packed integers in MMX registers and memory of floating-point format.
fn converts(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(m, Cvtps2pi | Cvttps2pi | Cvtpd2pi | Cvttpd2pi | Cvtpi2ps | Cvtpi2pd)
}

/// Instructions encoded with VEX whose operand may not lie anywhere.
fn is_strict(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(m, Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa)
}

/// Instructions with a 16-byte operand that may lie anywhere.
fn is_lenient(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Movups
            | Movupd
            | Movdqu
            | Lddqu
            | Pcmpestri
            | Pcmpestrm
            | Pcmpistri
            | Pcmpistrm
            | Pcmpestri64
            | Pcmpestrm64
    )
}

fn make_plan(vectors: &mut Vectors, insn: &Instruction) -> Exec<Option<Plan>> {
    if !is_known(insn) {
        return Ok(None);
    }
    let class = class_of(insn);
    let mut copy = *insn;
    let (mut register, mut size) = (None, 0);
    for i in 0..insn.op_count() {
        match insn.op_kind(i) {
            OpKind::Register => {
                let r = insn.op_register(i);
                let stand_in = match operand::size_of_reg(r) {
                    _ if !r.is_gpr() || insn.code() == Code::Fnstsw_AX => continue,
                    4 => Register::EBX,
                    8 => Register::RBX,
                    _ => return Ok(None),
                };
                register = Some(r.full_register().number() as u8);
                copy.set_op_register(i, stand_in);
            }
            OpKind::Memory => size = insn.memory_size().size(),
            _ => {}
        }
    }
    let (mut reads, mut writes) = (false, false);
    if size != 0 {
        copy.set_memory_base(Register::RDI);
        copy.set_memory_index(Register::None);
        copy.set_memory_index_scale(1);
        copy.set_memory_displacement64(0);
        copy.set_memory_displ_size(0);
        copy.set_segment_prefix(Register::None);
        let mut factory = InstructionInfoFactory::new();
        for m in factory.info(insn).used_memory() {
            use OpAccess::*;
            reads |= matches!(m.access(), Read | CondRead | ReadWrite | ReadCondWrite);
            writes |= matches!(m.access(), Write | CondWrite | ReadWrite | ReadCondWrite);
        }
    }
    let mut encoder = Encoder::new(64);
    if encoder.encode(&copy, 0).is_err() {
        return Ok(None);
    }
    let reach = match class {
        Class::Sse => Reach::Sse,
        Class::Avx => Reach::Avx,
        _ => Reach::All,
    };
    let thunk = vectors.add(reach, &encoder.take_buffer())?;
    let is_strict = match class {
        Class::Avx => is_strict(insn.mnemonic()),
        _ => size == 16 && !is_lenient(insn.mnemonic()),
    };
    let alignment = if is_strict { size as u8 } else { 1 };
    Ok(Some(Plan { class, thunk, register, size: size as u8, reads, writes, alignment }))
}

fn run(core: &mut Core, insn: &Instruction, plan: Plan) -> Exec<()> {
    let size = usize::from(plan.size);
    let mut gva = 0;
    if size != 0 {
        let access = if plan.writes { Access::Write } else { Access::Read };
        if plan.alignment > 1 && operand::is_no_multiple(core, insn, plan.alignment.into()) {
            return Err(gp(0));
        }
        gva = operand::mem_linear(core, insn, size, access)?;
        if plan.writes {
            core.probe_write(gva, size, Who::Program)?;
        }
        if plan.reads {
            let mut memory = [0; 128];
            fxstate::fetch(core, gva, &mut memory[..size])?;
            core.vectors.frame.memory[..size].copy_from_slice(&memory[..size]);
        }
    }
    let before = plan.writes.then_some(core.fx);
    call(core, plan)?;
    let is_x87 = matches!(plan.class, Class::X87 | Class::X87Quiet);
    let pointers = if is_x87 { core.pointers_after(insn, gva) } else { core.pointers };
    if let Some(before) = before
        && !(plan.class == Class::X87 && is_store_withheld(&core.fx))
    {
        let memory = core.vectors.frame.memory;
        fxstate::store(core, gva, &memory[..size]).inspect_err(|_| core.fx = before)?;
    }
    core.pointers = pointers;
    Ok(())
}

/// Run the copied instruction.
fn call(core: &mut Core, plan: Plan) -> Exec<()> {
    let v = &mut core.vectors;
    let Some(thunks) = &v.thunks else { return Err(ud()) };
    let f = &mut v.frame;
    f.gpr = [core.gpr[0], core.gpr[1], core.gpr[2], plan.register.map_or(0, |n| core.gpr[n as usize])];
    f.flags = core.rflags & rflags::ARITH | rflags::FIXED1;
    v.runs += 1;
    thunks.call(plan.thunk, f, &mut core.fx, &mut core.upper);
    if !matches!(plan.class, Class::Sse | Class::Avx) {
        fxstate::normalize(&mut core.fx);
    }
    match f.fault {
        0 => {}
        n if n == u64::from(vector::XM) + 1 && core.cr4 & cr4::OSXMMEXCPT != 0 => {
            return Err(Exception::plain(vector::XM).into());
        }
        n if n == u64::from(vector::MF) + 1 => return Err(Exception::plain(vector::MF).into()),
        _ => return Err(ud()),
    }
    core.gpr[..3].copy_from_slice(&f.gpr[..3]);
    if let Some(n) = plan.register {
        core.gpr[n as usize] = f.gpr[3];
    }
    let flags = f.flags;
    core.set_arith(flags);
    Ok(())
}

/// Whether an x87 store raised an exception, not masked, that comes before the store.
fn is_store_withheld(fx: &Fx) -> bool {
    const IE: u8 = 1;
    const OE: u8 = 1 << 3;
    const UE: u8 = 1 << 4;
    fx.pending() & (IE | OE | UE) != 0
}

/// Let the computer bring a loaded state into its proper form (exception summary, tags).
pub fn settle(core: &mut Core) {
    let known = core.vectors.nothing;
    let Ok(thunk) = known.map_or_else(|| core.vectors.add(Reach::All, &[]), Ok) else { return };
    core.vectors.nothing = Some(thunk);
    let v = &mut core.vectors;
    if let Some(thunks) = &v.thunks {
        v.frame.flags = rflags::FIXED1;
        v.runs += 1;
        thunks.call(thunk, &mut v.frame, &mut core.fx, &mut core.upper);
        fxstate::normalize(&mut core.fx);
    }
}

/// MASKMOVQ, MASKMOVDQU and VMASKMOVDQU: the bytes of the first register whose mask byte is negative go to
/// DS:rDI.  The whole operand must be writable, as on AMD's processors (the manual leaves it open).
fn masked_store(core: &mut Core, insn: &Instruction, class: Class) -> Exec<()> {
    may(core, class)?;
    let number = |i: u32| insn.op_register(i).number();
    let (data, mask) = if class == Class::Mmx {
        let wide = |v: [u8; 8]| {
            let mut w = [0; 16];
            w[..8].copy_from_slice(&v);
            w
        };
        (wide(core.fx.mm(number(1))), wide(core.fx.mm(number(2))))
    } else {
        (core.fx.xmm(number(1)), core.fx.xmm(number(2)))
    };
    let size = if class == Class::Mmx { 8 } else { 16 };
    let offset = match insn.op0_kind() {
        OpKind::MemorySegRDI => core.gpr[7],
        OpKind::MemorySegEDI => core.gpr[7] & 0xFFFF_FFFF,
        _ => core.gpr[7] & 0xFFFF,
    };
    let segment = operand::segment_of(insn);
    if size == 16 {
        // #AC as for two halves
        operand::linear_at(core, segment, offset.wrapping_add(8), 8, Access::Write)?;
    }
    let gva = operand::linear_at(core, segment, offset, 8, Access::Write)?;
    let chosen = || (0..size).filter(|&i| mask[i] & 0x80 != 0);
    core.probe_write(gva, size, Who::Program)?;
    for i in chosen() {
        core.write_lin(core.linear_add(gva, i as u64), 1, u64::from(data[i]), Who::Program)?;
    }
    if class == Class::Mmx {
        enter_mmx(core);
    }
    Ok(())
}

/// An MMX instruction makes every x87 register valid and TOP 0.
fn enter_mmx(core: &mut Core) {
    let top = usize::from(core.fx.0[3] >> 3 & 7);
    core.fx.0[3] &= !0x38;
    core.fx.0[4] = 0xFF;
    // ST(i) of the image is physical register (TOP + i) mod 8.
    core.fx.0[32..160].rotate_right(16 * top);
}
