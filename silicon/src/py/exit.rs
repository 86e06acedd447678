//! `Exit`: why `run` came back.

use pyo3::prelude::*;

use crate::arch::exit;

/// Why `run` came back.  The VM-exit information fields of the VMCS, read once.
#[pyclass(frozen, get_all, module = "understudy._silicon")]
pub struct Exit {
    reason: u32,
    entry_failure: bool,
    qualification: u64,
    length: u32,
    gla: u64,
    gpa: u64,
    intr_info: u32,
    intr_error: u32,
    idt_info: u32,
    idt_error: u32,
    instr_info: u32,
}

impl From<exit::Exit> for Exit {
    fn from(e: exit::Exit) -> Self {
        Self {
            reason: e.reason,
            entry_failure: e.entry_failure,
            qualification: e.qualification,
            length: e.length,
            gla: e.gla,
            gpa: e.gpa,
            intr_info: e.intr_info,
            intr_error: e.intr_error,
            idt_info: e.idt_info,
            idt_error: e.idt_error,
            instr_info: e.instr_info,
        }
    }
}

#[pymethods]
impl Exit {
    fn __repr__(&self) -> String {
        format!(
            "Exit(reason={:#x}{}, qualification={:#x}, length={}, gla={:#x}, gpa={:#x}, \
             intr_info={:#x}, intr_error={:#x}, idt_info={:#x}, idt_error={:#x}, instr_info={:#x})",
            self.reason,
            if self.entry_failure { ", entry_failure=True" } else { "" },
            self.qualification,
            self.length,
            self.gla,
            self.gpa,
            self.intr_info,
            self.intr_error,
            self.idt_info,
            self.idt_error,
            self.instr_info,
        )
    }
}
