//! Registers by name: `Processor.registers` and `set_registers`.

use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arch::bits::{cr0, cr4, efer, rflags};
use crate::arch::segment::{Segment, TableRegister, seg};
use crate::cpu::debug;
use crate::cpu::state::Core;
use crate::cpu::xsave;

const GPRS: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
const SEGMENTS: [&str; 8] = ["es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"];
const DEBUG: [&str; 6] = ["dr0", "dr1", "dr2", "dr3", "dr6", "dr7"];
const MSRS: [&str; 17] = [
    "star",
    "lstar",
    "cstar",
    "fmask",
    "kernel_gs_base",
    "sysenter_cs",
    "sysenter_esp",
    "sysenter_eip",
    "tsc_aux",
    "tsc_adjust",
    "pat",
    "misc_enable",
    "debugctl",
    "spec_ctrl",
    "feature_control",
    "mtrr_def_type",
    "pkrs",
];

fn segment<'a>(core: &'a mut Core, name: &str) -> Option<&'a mut Segment> {
    match SEGMENTS.iter().position(|&s| s == name)? {
        6 => Some(&mut core.ldtr),
        7 => Some(&mut core.tr),
        n => Some(&mut core.seg[n]),
    }
}

fn msr<'a>(core: &'a mut Core, name: &str) -> Option<&'a mut u64> {
    let m = &mut core.msr;
    Some(match name {
        "star" => &mut m.star,
        "lstar" => &mut m.lstar,
        "cstar" => &mut m.cstar,
        "fmask" => &mut m.fmask,
        "kernel_gs_base" => &mut m.kernel_gs_base,
        "sysenter_cs" => &mut m.sysenter_cs,
        "sysenter_esp" => &mut m.sysenter_esp,
        "sysenter_eip" => &mut m.sysenter_eip,
        "tsc_aux" => &mut m.tsc_aux,
        "tsc_adjust" => &mut m.tsc_adjust,
        "pat" => &mut m.pat,
        "misc_enable" => &mut m.misc_enable,
        "debugctl" => &mut m.debugctl,
        "spec_ctrl" => &mut m.spec_ctrl,
        "feature_control" => &mut m.feature_control,
        "mtrr_def_type" => &mut m.mtrr_def_type,
        "pkrs" => &mut m.pkrs,
        _ => return None,
    })
}

fn number(name: &str) -> usize {
    usize::from(name.as_bytes()[name.len() - 1] - b'0')
}

/// All of them.
pub fn all<'py>(py: Python<'py>, core: &mut Core) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    for (name, value) in GPRS.iter().zip(core.gpr) {
        out.set_item(name, value)?;
    }
    out.set_item("rip", core.rip)?;
    out.set_item("rflags", core.rflags)?;
    for (name, value) in
        [("cr0", core.cr0), ("cr2", core.cr2), ("cr3", core.cr3), ("cr4", core.cr4), ("efer", core.efer)]
    {
        out.set_item(name, value)?;
    }
    out.set_item("xcr0", core.xcr0)?;
    out.set_item("pkru", core.pkru)?;
    out.set_item("cr8", core.apic.tpr() >> 4)?;
    out.set_item("apic_base", core.apic.base())?;
    for name in DEBUG {
        out.set_item(name, core.dr[number(name)])?;
    }
    for name in SEGMENTS {
        if let Some(s) = segment(core, name) {
            out.set_item(name, s.selector)?;
            out.set_item(format!("{name}_base"), s.base)?;
            out.set_item(format!("{name}_limit"), s.limit)?;
            out.set_item(format!("{name}_attr"), s.attr)?;
        }
    }
    for (name, t) in [("gdtr", core.gdtr), ("idtr", core.idtr)] {
        out.set_item(format!("{name}_base"), t.base)?;
        out.set_item(format!("{name}_limit"), t.limit)?;
    }
    for name in MSRS {
        if let Some(value) = msr(core, name) {
            out.set_item(name, *value)?;
        }
    }
    Ok(out)
}

fn narrow<T: TryFrom<u64>>(name: &str, value: u64) -> PyResult<T> {
    T::try_from(value).map_err(|_| {
        PyValueError::new_err(format!("{name}={value:#x}: expected at most {} bits", 8 * size_of::<T>()))
    })
}

fn known(name: &str, value: u64, bits: u64) -> PyResult<u64> {
    if value & !bits == 0 {
        return Ok(value);
    }
    let strange = value & !bits;
    Err(PyValueError::new_err(format!("{name}={value:#x}: this processor has no bits {strange:#x} there")))
}

fn set_table(t: &mut TableRegister, part: &str, name: &str, value: u64) -> PyResult<bool> {
    match part {
        "base" => t.base = value,
        "limit" => t.limit = narrow(name, value)?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// What else follows from a register that was set.
#[derive(Default)]
pub struct After {
    /// Privilege level and mode.
    mode: bool,
    /// Cached translations.
    translations: bool,
}

/// Set one.  False: there is none of that name.
fn set(core: &mut Core, name: &str, value: u64, after: &mut After) -> PyResult<bool> {
    if let Some(n) = GPRS.iter().position(|&g| g == name) {
        core.gpr[n] = value;
        return Ok(true);
    }
    if let Some(place) = msr(core, name) {
        *place = value;
        return Ok(true);
    }
    if DEBUG.contains(&name) {
        debug::write(core, number(name), value);
        return Ok(true);
    }
    match name {
        "rip" => core.rip = value,
        "cr2" => core.cr2 = value,
        "xcr0" => {
            let known = known(name, value, xsave::xcr0_known())?;
            xsave::set_xcr0(core, known)
                .map_err(|_| PyValueError::new_err("xcr0: expected bit 0 set, and bit 1 with bit 2"))?;
        }
        "pkru" => core.set_pkru(narrow(name, value)?),
        "cr8" => core.apic.set_tpr(narrow::<u8>(name, known(name, value, 0xF)?)? << 4),
        "rflags" => {
            core.rflags = known(name, value, rflags::KNOWN | rflags::FIXED1)? | rflags::FIXED1;
            after.mode = true;
        }
        "cr0" | "cr3" | "cr4" | "efer" => {
            match name {
                "cr0" => core.cr0 = narrow::<u32>(name, value).map(u64::from)? | cr0::ET,
                "cr3" => core.cr3 = value,
                "cr4" => core.cr4 = known(name, value, cr4::KNOWN)?,
                _ => core.efer = known(name, value, efer::KNOWN)?,
            }
            (after.mode, after.translations) = (true, true);
        }
        _ => return set_descriptor(core, name, value, after),
    }
    Ok(true)
}

fn set_descriptor(core: &mut Core, name: &str, value: u64, after: &mut After) -> PyResult<bool> {
    let (register, part) = name.split_once('_').unwrap_or((name, ""));
    match register {
        "gdtr" => return set_table(&mut core.gdtr, part, name, value),
        "idtr" => return set_table(&mut core.idtr, part, name, value),
        _ => {}
    }
    let Some(s) = segment(core, register) else { return Ok(false) };
    match part {
        "" => s.selector = narrow(name, value)?,
        "base" => s.base = value,
        "limit" => s.limit = narrow(name, value)?,
        "attr" => s.attr = narrow(name, value)?,
        _ => return Ok(false),
    }
    after.mode = true;
    Ok(true)
}

/// Set some of them.  All names are looked at before anything changes.
pub fn set_some(core: &mut Core, values: &Bound<'_, PyDict>) -> PyResult<()> {
    let names: Vec<(String, u64)> =
        values.iter().map(|(k, v)| Ok((k.extract()?, v.extract()?))).collect::<PyResult<_>>()?;
    let mut after = After::default();
    for (name, value) in &names {
        if !set(core, name, *value, &mut after)? {
            return Err(PyKeyError::new_err(format!("no such register: {name}")));
        }
    }
    if after.mode {
        core.cpl = if !core.is_protected() {
            0
        } else if core.flag(rflags::VM) {
            3
        } else {
            (core.seg[seg::SS].attr >> 5 & 3) as u8
        };
    }
    if after.translations {
        load_pdptes(core);
        core.flush_guest();
    }
    if after.mode {
        core.refresh();
    }
    core.attention = 1;
    Ok(())
}

/// PAE paging keeps its four top entries in registers, loaded with CR3.
fn load_pdptes(core: &mut Core) {
    if core.is_paging() && core.cr4 & cr4::PAE != 0 && !core.is_long() {
        for i in 0..4 {
            core.pdpte[i] = core.mem.load((core.cr3 & 0xFFFF_FFE0) + 8 * i as u64, 8);
        }
    }
}

/// The number of a YMM register.
pub fn ymm(number: usize) -> PyResult<usize> {
    if number < 16 {
        Ok(number)
    } else {
        Err(PyValueError::new_err(format!("YMM{number}: expected 0 to 15")))
    }
}
