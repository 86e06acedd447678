//! The VMX instructions as code in the machine executes them (SDM 3D, "VMX Instruction
//! Reference"): operands from registers and memory, outcome in RFLAGS; in non-root operation they
//! exit with the instruction information ("VM-Exit Instruction Information").

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::arch::bits::{cr0, cr4, rflags};
use crate::arch::exit::{Exit, reason};
use crate::arch::segment::{attr, seg};
use crate::cpu::operand::{
    address_mask, get_reg, mem_linear, read_mem, read_op, segment_of, size_of_op, write_op,
};
use crate::cpu::state::Core;
use crate::cpu::trap::{Exec, gp, ud, vm_exit};
use crate::mmu::access::Who;
use crate::mmu::walk::Access;
use crate::vmx::controls::secondary;
use crate::vmx::instructions::{self as vmx, VmFail, error};
use crate::vmx::{capabilities as cap, entry};

/// IA32_FEATURE_CONTROL: locked, VMX outside SMX.
const FEATURE_CONTROL: u64 = 5;

fn basic_reason(m: Mnemonic) -> Option<u32> {
    Some(match m {
        Mnemonic::Vmcall => reason::VMCALL,
        Mnemonic::Vmclear => reason::VMCLEAR,
        Mnemonic::Vmlaunch => reason::VMLAUNCH,
        Mnemonic::Vmptrld => reason::VMPTRLD,
        Mnemonic::Vmptrst => reason::VMPTRST,
        Mnemonic::Vmread => reason::VMREAD,
        Mnemonic::Vmresume => reason::VMRESUME,
        Mnemonic::Vmwrite => reason::VMWRITE,
        Mnemonic::Vmxoff => reason::VMXOFF,
        Mnemonic::Vmxon => reason::VMXON,
        Mnemonic::Invept => reason::INVEPT,
        Mnemonic::Invvpid => reason::INVVPID,
        _ => return None,
    })
}

/// Execute a VMX instruction.
///
/// # Errors
/// #UD, #GP(0), what its memory operand raises, and in non-root operation the VM exit.
pub fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let mnemonic = insn.mnemonic();
    // VMFUNC is not offered.
    let Some(why) = basic_reason(mnemonic) else { return Err(ud()) };
    let is_vmxon = mnemonic == Mnemonic::Vmxon;
    let bad_mode =
        core.flag(rflags::VM) || core.cr0 & cr0::PE == 0 || core.is_long() && !core.seg[seg::CS].has(attr::L);
    let is_enabled = if is_vmxon { core.cr4 & cr4::VMXE != 0 } else { core.vmx.is_on };
    // VMCALL leaves a guest in any mode.
    let leaves = core.vmx.non_root && mnemonic == Mnemonic::Vmcall;
    if !is_enabled || bad_mode && !leaves {
        return Err(ud());
    }
    if core.vmx.non_root && !is_shadowed(core, insn) {
        return Err(vm_exit(exit_of(insn, why)));
    }
    if core.cpl > 0 {
        return Err(gp(0));
    }
    if is_vmxon && !core.vmx.is_on {
        let fixed = |v: u64, f0: u64, f1: u64| v & f0 == f0 && v & !f1 == 0;
        let fits = fixed(core.cr0, cap::CR0_FIXED0, cap::CR0_FIXED1)
            && fixed(core.cr4, cap::CR4_FIXED0, cap::CR4_FIXED1)
            && core.msr.feature_control & FEATURE_CONTROL == FEATURE_CONTROL;
        if !fits {
            return Err(gp(0));
        }
    }
    let outcome = perform(core, insn)?;
    if matches!(mnemonic, Mnemonic::Vmlaunch | Mnemonic::Vmresume) && outcome.is_ok() {
        return Ok(()); // RFLAGS are the guest's, or the host's after a failed entry
    }
    core.set_arith(match outcome {
        Ok(()) => 0,
        Err(VmFail(0)) => rflags::CF,
        Err(VmFail(_)) => rflags::ZF,
    });
    Ok(())
}

/// Whether "VMCS shadowing" lets an instruction of a guest go on: VMREAD or VMWRITE of a field whose
/// bit in its bitmap is 0.
fn is_shadowed(core: &Core, insn: &Instruction) -> bool {
    let c = &core.vmx.controls;
    let (bitmap, register) = match insn.mnemonic() {
        Mnemonic::Vmread => (c.vmread_bitmap, insn.op1_register()),
        Mnemonic::Vmwrite => (c.vmwrite_bitmap, insn.op0_register()),
        _ => return false,
    };
    let field = get_reg(core, register);
    let is_clear = || core.mem.load(bitmap.wrapping_add(field >> 3), 1) >> (field & 7) & 1 == 0;
    c.secondary(secondary::VMCS_SHADOWING) && field >> 15 == 0 && is_clear()
}

/// The instruction itself: the inner result is its outcome.
fn perform(core: &mut Core, insn: &Instruction) -> Exec<Result<(), VmFail>> {
    Ok(match insn.mnemonic() {
        Mnemonic::Vmcall => Err(core.vm_fail(error::VMCALL_IN_ROOT)),
        Mnemonic::Vmlaunch => entry::enter(core, true, false).map(|_| ()),
        Mnemonic::Vmresume => entry::enter(core, false, false).map(|_| ()),
        Mnemonic::Vmxoff => vmx::vmxoff(core),
        Mnemonic::Vmxon => {
            let region = read_mem(core, insn, 8)?;
            vmx::vmxon(core, region)
        }
        Mnemonic::Vmclear => {
            let region = read_mem(core, insn, 8)?;
            vmx::vmclear(core, region)
        }
        Mnemonic::Vmptrld => {
            let region = read_mem(core, insn, 8)?;
            vmx::vmptrld(core, region)
        }
        Mnemonic::Vmptrst => {
            let gva = mem_linear(core, insn, 8, Access::Write)?;
            let current = core.vmx.current;
            core.write_lin(gva, 8, current, Who::Program)?;
            Ok(())
        }
        Mnemonic::Vmread => {
            let field = get_reg(core, insn.op1_register());
            match field_number(core, field).and_then(|f| vmx::read_field(core, f)) {
                Ok(value) => {
                    let wide = if core.is_64() { value } else { value & 0xFFFF_FFFF };
                    write_op(core, insn, 0, wide)?;
                    Ok(())
                }
                Err(e) => Err(e),
            }
        }
        Mnemonic::Vmwrite => {
            let field = get_reg(core, insn.op0_register());
            let value = read_op(core, insn, 1)?;
            field_number(core, field).and_then(|f| vmx::write_field(core, f, value))
        }
        Mnemonic::Invept => {
            let ([eptp, _], kind) = descriptor(core, insn)?;
            vmx::invept(core, kind, eptp)
        }
        Mnemonic::Invvpid => {
            let ([vpid, gva], kind) = descriptor(core, insn)?;
            vmx::invvpid(core, kind, vpid, gva)
        }
        _ => return Err(ud()),
    })
}

/// A field encoding out of a register; bits 63:32 must be 0.
fn field_number(core: &mut Core, value: u64) -> Result<u32, VmFail> {
    u32::try_from(value).map_err(|_| core.vm_fail(error::UNSUPPORTED_FIELD))
}

/// The 128-bit memory operand and the register of INVEPT and INVVPID.
fn descriptor(core: &mut Core, insn: &Instruction) -> Exec<([u64; 2], u64)> {
    let kind = get_reg(core, insn.op0_register());
    let gva = mem_linear(core, insn, 16, Access::Read)?;
    let low = core.read_lin(gva, 8, Who::Program)?;
    let second = core.linear_add(gva, 8);
    let high = core.read_lin(second, 8, Who::Program)?;
    Ok(([low, high], kind))
}

fn exit_of(insn: &Instruction, why: u32) -> Exit {
    let length = insn.len() as u32;
    let has_info = !matches!(
        insn.mnemonic(),
        Mnemonic::Vmcall | Mnemonic::Vmlaunch | Mnemonic::Vmresume | Mnemonic::Vmxoff
    );
    let (q, instr_info) = if has_info { (displacement(insn), information(insn)) } else { (0, 0) };
    Exit { length, instr_info, ..Exit::new(why, q) }
}

/// The exit qualification of an instruction with a memory operand: its displacement, with the
/// address of the next instruction added if it is relative to RIP; 0 without memory operand.
#[must_use]
pub fn displacement(insn: &Instruction) -> u64 {
    if insn.op_count() == 0 || !(0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory) {
        return 0;
    }
    let d = insn.memory_displacement64();
    match insn.memory_displ_size() {
        // iced sign-extends to the address size only.
        1 | 2 | 4 if address_mask(insn) == 0xFFFF => i64::from(d as i16).cast_unsigned(),
        1 | 2 | 4 if address_mask(insn) == 0xFFFF_FFFF => i64::from(d as i32).cast_unsigned(),
        _ => d,
    }
}

/// The VM-exit instruction information of VMX, descriptor-table and INVPCID instructions: the
/// parts of the address, and the register operands where there are any.
#[must_use]
pub fn information(insn: &Instruction) -> u32 {
    let number = |r: Register| r.number() as u32;
    let operands = || 0..insn.op_count();
    let memory = operands().find(|&i| insn.op_kind(i) == OpKind::Memory);
    let mut registers = operands().filter(|&i| insn.op_kind(i) == OpKind::Register);
    let mut info = 0;
    match memory {
        Some(_) => {
            let (base, index) = (insn.memory_base(), insn.memory_index());
            let size = match address_mask(insn) {
                0xFFFF => 0,
                0xFFFF_FFFF => 1,
                _ => 2,
            };
            info |= size << 7 | (segment_of(insn) as u32) << 15;
            if index == Register::None {
                info |= 1 << 22;
            } else {
                info |= insn.memory_index_scale().trailing_zeros() | number(index) << 18;
            }
            info |= if matches!(base, Register::None | Register::RIP | Register::EIP) {
                1 << 27
            } else {
                number(base) << 23
            };
            if let Some(i) = registers.next() {
                info |= number(insn.op_register(i)) << 28;
            }
        }
        None => {
            // Register form: Reg1 is the r/m operand, Reg2 the other one.
            let (rm, reg) = if insn.mnemonic() == Mnemonic::Vmwrite { (1, 0) } else { (0, 1) };
            info |= 1 << 10 | number(insn.op_register(rm)) << 3;
            if insn.op_count() > 1 {
                info |= number(insn.op_register(reg)) << 28;
            }
        }
    }
    let is_descriptor_table = matches!(
        insn.mnemonic(),
        Mnemonic::Lgdt
            | Mnemonic::Lidt
            | Mnemonic::Sgdt
            | Mnemonic::Sidt
            | Mnemonic::Lldt
            | Mnemonic::Ltr
            | Mnemonic::Sldt
            | Mnemonic::Str
    );
    if is_descriptor_table { info | identity(insn) } else { info }
}

/// Which of LGDT … STR it is (bits 29:28), and the operand size of the first four (bit 11).
fn identity(insn: &Instruction) -> u32 {
    let which = match insn.mnemonic() {
        Mnemonic::Sgdt | Mnemonic::Sldt => 0,
        Mnemonic::Sidt | Mnemonic::Str => 1,
        Mnemonic::Lgdt | Mnemonic::Lldt => 2,
        _ => 3,
    };
    let is_wide = insn.op_kind(0) == OpKind::Memory && size_of_op(insn, 0) >= 6;
    which << 28 | u32::from(is_wide) << 11
}
