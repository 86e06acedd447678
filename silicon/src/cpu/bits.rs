//! Bit tests, scans and counts, CRC32, and the BMI1, BMI2 and ADX groups.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind};

use crate::arch::bits::rflags::{CF, OF, ZF};
use crate::cpu::flags::{mask, of_result, sign_extend};
use crate::cpu::operand::{
    address_mask, ea, get_reg, linear_at, modify_mem, read_op, segment_of, set_reg, size_of_op,
};
use crate::cpu::state::{Core, Mode};
use crate::cpu::trap::{Exec, ud};
use crate::dbt::undefined::{Open, as_the_computer};
use crate::mmu::access::Who;
use crate::mmu::walk::Access;

const RDX: usize = 2;

/// Execute an instruction of this group.
///
/// # Errors
/// What the instruction raises.
pub fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    use Mnemonic as M;
    if insn.encoding() == EncodingKind::VEX && matches!(core.mode, Mode::Real | Mode::V86) {
        return Err(ud());
    }
    let mnemonic = insn.mnemonic();
    match mnemonic {
        M::Bt | M::Bts | M::Btr | M::Btc => test(core, insn),
        M::Bsf | M::Bsr => scan(core, insn),
        M::Tzcnt | M::Lzcnt | M::Popcnt => count(core, insn),
        M::Crc32 => crc32(core, insn),
        M::Adcx => add_with(core, insn, CF),
        M::Adox => add_with(core, insn, OF),
        M::Mulx | M::Pdep | M::Pext | M::Rorx | M::Sarx | M::Shlx | M::Shrx => without_flags(core, insn),
        _ => fields(core, insn),
    }
}

/// BT, BTS, BTR, BTC.  Only CF changes.
fn test(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let size = size_of_op(insn, 0);
    let offset = read_op(core, insn, 1)?;
    let bit = 1 << (offset & (8 * size as u64 - 1));
    let mnemonic = insn.mnemonic();
    let change = |v: u64| match mnemonic {
        Mnemonic::Bts => v | bit,
        Mnemonic::Btr => v & !bit,
        Mnemonic::Btc => v ^ bit,
        _ => v,
    };
    let old = if insn.op0_kind() == OpKind::Register {
        let r = insn.op0_register();
        let v = get_reg(core, r);
        if mnemonic != Mnemonic::Bt {
            set_reg(core, r, change(v));
        }
        v
    } else {
        // An offset in a register reaches beyond the operand, in both directions.
        let words = match insn.op1_kind() {
            OpKind::Register => sign_extend(size, offset).cast_signed() >> (3 + size.ilog2()),
            _ => 0,
        };
        let at = ea(core, insn).wrapping_add((words * size as i64).cast_unsigned()) & address_mask(insn);
        if mnemonic == Mnemonic::Bt {
            let gva = linear_at(core, segment_of(insn), at, size, Access::Read)?;
            core.read_lin(gva, size, Who::Program)?
        } else {
            let gva = linear_at(core, segment_of(insn), at, size, Access::Write)?;
            modify_mem(core, insn, gva, size, |v| (change(v), v))?
        }
    };
    core.set_flags(CF, if old & bit != 0 { CF } else { 0 });
    Ok(())
}

/// BSF and BSR.  What the destination is after a scan of zero, the computer says.
fn scan(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let size = size_of_op(insn, 0);
    let v = read_op(core, insn, 1)? & mask(size);
    let whole = insn.op0_register().full_register();
    let (op, n) = match insn.mnemonic() {
        Mnemonic::Bsf => (Open::Bsf, v.trailing_zeros()),
        _ => (Open::Bsr, v.checked_ilog2().unwrap_or(0)),
    };
    let found = as_the_computer(op, size, [get_reg(core, whole), v, 0], core.rflags);
    let (kept, flags) = found.expect("every processor has it");
    if v == 0 {
        set_reg(core, whole, kept);
    } else {
        set_reg(core, insn.op0_register(), u64::from(n));
    }
    core.set_arith(flags);
    Ok(())
}

fn count(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let size = size_of_op(insn, 0);
    let width = 8 * size as u32;
    let v = read_op(core, insn, 1)? & mask(size);
    let (op, n) = match insn.mnemonic() {
        Mnemonic::Popcnt => (None, v.count_ones()),
        Mnemonic::Tzcnt => (Some(Open::Tzcnt), v.trailing_zeros().min(width)),
        _ => (Some(Open::Lzcnt), v.leading_zeros() - (64 - width)),
    };
    set_reg(core, insn.op0_register(), u64::from(n));
    core.set_arith(match op {
        None => {
            if v == 0 {
                ZF
            } else {
                0
            }
        }
        Some(op) => as_the_computer(op, size, [0, v, 0], core.rflags).map_or_else(
            || core.rflags & OF | if v == 0 { CF } else { 0 } | if n == 0 { ZF } else { 0 },
            |(_, flags)| flags,
        ),
    });
    Ok(())
}

/// CRC32: the polynomial 11EDC6F41H, reflected.
fn crc32(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let size = size_of_op(insn, 1);
    let v = read_op(core, insn, 1)?;
    let r = insn.op0_register();
    let mut crc = get_reg(core, r) as u32;
    for byte in &v.to_le_bytes()[..size] {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82F6_3B78 } else { 0 };
        }
    }
    set_reg(core, r, u64::from(crc));
    Ok(())
}

/// ADCX and ADOX: add with the carry in `flag`, and nothing else changes.
fn add_with(core: &mut Core, insn: &Instruction, flag: u64) -> Exec<()> {
    let size = size_of_op(insn, 0);
    let b = read_op(core, insn, 1)?;
    let r = insn.op0_register();
    let sum = u128::from(get_reg(core, r)) + u128::from(b) + u128::from(core.flag(flag));
    set_reg(core, r, sum as u64);
    core.set_flags(flag, if sum >> (8 * size) != 0 { flag } else { 0 });
    Ok(())
}

fn without_flags(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let size = size_of_op(insn, 0);
    let n = 8 * size as u32;
    let dst = insn.op0_register();
    let r = match insn.mnemonic() {
        Mnemonic::Mulx => {
            let v = read_op(core, insn, 2)?;
            let p = u128::from(v) * u128::from(core.gpr[RDX] & mask(size));
            set_reg(core, insn.op1_register(), p as u64); // the high half wins if both are one
            (p >> n) as u64
        }
        Mnemonic::Pdep => {
            let (v, which) = (get_reg(core, insn.op1_register()), read_op(core, insn, 2)?);
            deposit(v, which)
        }
        Mnemonic::Pext => {
            let (v, which) = (get_reg(core, insn.op1_register()), read_op(core, insn, 2)?);
            extract(v, which)
        }
        Mnemonic::Rorx => {
            let v = read_op(core, insn, 1)?;
            let by = insn.immediate(2) as u32;
            if size == 8 { v.rotate_right(by) } else { u64::from((v as u32).rotate_right(by)) }
        }
        shift => {
            let v = read_op(core, insn, 1)?;
            let by = read_op(core, insn, 2)? as u32 & (n - 1);
            match shift {
                Mnemonic::Shlx => v << by,
                Mnemonic::Shrx => v >> by,
                _ => (sign_extend(size, v).cast_signed() >> by).cast_unsigned(),
            }
        }
    };
    set_reg(core, dst, r);
    Ok(())
}

fn deposit(mut v: u64, mut which: u64) -> u64 {
    let mut r = 0;
    while which != 0 {
        let lowest = which & which.wrapping_neg();
        r |= if v & 1 != 0 { lowest } else { 0 };
        v >>= 1;
        which ^= lowest;
    }
    r
}

fn extract(v: u64, mut which: u64) -> u64 {
    let (mut r, mut n) = (0, 0);
    while which != 0 {
        let lowest = which & which.wrapping_neg();
        r |= u64::from(v & lowest != 0) << n;
        n += 1;
        which ^= lowest;
    }
    r
}

/// ANDN, BEXTR, BLSI, BLSMSK, BLSR, BZHI.
fn fields(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let size = size_of_op(insn, 0);
    let n = 8 * size as u64;
    let (a, b) = match insn.mnemonic() {
        Mnemonic::Andn => (get_reg(core, insn.op1_register()), read_op(core, insn, 2)?),
        Mnemonic::Bextr | Mnemonic::Bzhi => (read_op(core, insn, 1)?, get_reg(core, insn.op2_register())),
        _ => (read_op(core, insn, 1)?, 0),
    };
    let minus = a.wrapping_sub(1);
    let (op, r, carry) = match insn.mnemonic() {
        Mnemonic::Andn => (Open::Andn, !a & b, 0),
        Mnemonic::Bextr => {
            let (start, length) = (b & 0xFF, b >> 8 & 0xFF);
            let v = if start < n { a >> start } else { 0 };
            (Open::Bextr, if length < n { v & !(u64::MAX << length) } else { v }, 0)
        }
        Mnemonic::Bzhi => {
            let keep = b & 0xFF;
            let (r, carry) = if keep < n { (a & !(u64::MAX << keep), 0) } else { (a, CF) };
            (Open::Bzhi, r, carry)
        }
        Mnemonic::Blsi => (Open::Blsi, a & a.wrapping_neg(), if a == 0 { 0 } else { CF }),
        Mnemonic::Blsmsk => (Open::Blsmsk, a ^ minus, if a == 0 { CF } else { 0 }),
        _ => (Open::Blsr, a & minus, if a == 0 { CF } else { 0 }),
    };
    set_reg(core, insn.op0_register(), r);
    let found = as_the_computer(op, size, [0, a, b], core.rflags);
    core.set_arith(found.map_or_else(|| of_result(size, r) | carry, |(_, flags)| flags));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::step::step;
    use crate::cpu::testbed::{long, protected};

    #[test]
    fn deposit_and_extract_are_inverse_on_the_mask() {
        for (v, which) in [(0b1011, 0x8421u64), (u64::MAX, 0x55), (0x1234, 0xFF00_00FF)] {
            let n = which.count_ones();
            assert_eq!(v & ((1 << n) - 1), extract(deposit(v, which), which));
        }
    }

    #[test]
    fn a_bit_offset_in_a_register_reaches_beyond_the_operand() {
        let mut core = protected(0);
        (core.gpr[0], core.gpr[3]) = (u64::from(-1i32 as u32), 0x2004);
        core.mem.write_bytes(0x1000, &[0x0F, 0xAB, 3]); // bts [ebx],eax
        step(&mut core).unwrap();
        assert_eq!((0x8000_0000, 0), (core.mem.load(0x2000, 4), core.rflags & CF));
    }

    #[test]
    fn counts_and_scans_of_nothing() {
        let mut core = long(3);
        (core.gpr[0], core.gpr[1]) = (0x1122_3344_5566_7788, 0);
        // bsf eax,ecx; tzcnt dx,cx; lzcnt rsi,rcx; popcnt edi,ecx
        let code = [
            0x0F, 0xBC, 0xC1, 0x66, 0xF3, 0x0F, 0xBC, 0xD1, 0xF3, 0x48, 0x0F, 0xBD, 0xF1, 0xF3, 0x0F, 0xB8,
            0xF9,
        ];
        core.mem.write_bytes(0x1000, &code);
        for _ in 0..4 {
            step(&mut core).unwrap();
        }
        assert_eq!((0x1122_3344_5566_7788, 16), (core.gpr[0], core.gpr[2]));
        assert_eq!((64, 0, ZF), (core.gpr[6], core.gpr[7], core.rflags & (ZF | CF)));
    }

    #[test]
    fn crc32_of_the_check_string() {
        // RFC 3720 gives the CRC of 32 zero bytes: AA 36 91 8A (with ones before and after).
        let mut core = long(3);
        core.gpr[0] = 0xFFFF_FFFF;
        core.mem.write_bytes(0x1000, &[0xF2, 0x48, 0x0F, 0x38, 0xF1, 0xC1]); // crc32 rax,rcx
        for _ in 0..4 {
            core.rip = 0x1000;
            step(&mut core).unwrap();
        }
        assert_eq!(0x8A91_36AA, !core.gpr[0] as u32);
    }
}
