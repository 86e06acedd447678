//! `VmFail`: a VMX instruction failed.

use pyo3::create_exception;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

create_exception!(
    understudy._silicon,
    VmFail,
    PyException,
    "A VMX instruction failed (SDM 3C, \"Conventions\").\n\n`number` is the VM-instruction error; 0 \
     stands for VMfailInvalid (no current VMCS)."
);

/// SDM 3D, "VM Instruction Error Numbers", in our words.
fn words(number: u32) -> &'static str {
    match number {
        0 => "VMfailInvalid: no current VMCS, not in VMX root operation, or a bad VMXON region",
        1 => "VMCALL in VMX root operation",
        2 => "VMCLEAR: the address is not a page of physical memory",
        3 => "VMCLEAR: the address is the VMXON region",
        4 => "VMLAUNCH: the VMCS is launched already; use VMRESUME",
        5 => "VMRESUME: the VMCS is not launched; use VMLAUNCH",
        6 => "VMRESUME after VMXOFF and VMXON without VMCLEAR",
        7 => "VM entry: the control fields are not valid",
        8 => "VM entry: the host-state fields are not valid",
        9 => "VMPTRLD: the address is not a page of physical memory",
        10 => "VMPTRLD: the address is the VMXON region",
        11 => "VMPTRLD: the region does not begin with this processor's VMCS revision identifier",
        12 => "VMREAD or VMWRITE: there is no such VMCS field",
        13 => "VMWRITE: the field is read-only",
        15 => "VMXON in VMX root operation",
        16 => "VM entry: the executive-VMCS pointer is not valid",
        17 => "VM entry: the executive VMCS is not launched",
        18 => "VM entry: the executive-VMCS pointer is not the VMXON pointer",
        19 => "VMCALL: the VMCS is not clear",
        20 => "VMCALL: the VM-exit control fields are not valid",
        22 => "VMCALL: the MSEG revision identifier is not this processor's",
        23 => "VMXOFF under dual-monitor treatment of SMIs",
        24 => "VMCALL: the SMM-monitor features are not valid",
        25 => "VM entry: the VM-execution control fields of the executive VMCS are not valid",
        26 => "VM entry while MOV SS blocks events",
        28 => "INVEPT or INVVPID: the operand is not valid",
        _ => "a number that the manual does not list",
    }
}

/// The exception for a VM-instruction error; `detail` (if not empty) is the rule that was broken.
pub fn vm_fail(py: Python<'_>, number: u32, detail: &str) -> PyErr {
    let more = if detail.is_empty() { String::new() } else { format!(": {detail}") };
    let error = VmFail::new_err(format!("VM-instruction error {number}: {}{more}", words(number)));
    match error.value(py).setattr("number", number) {
        Ok(()) => error,
        Err(other) => other,
    }
}
