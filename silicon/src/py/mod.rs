//! The pins: bindings only.  `understudy/_silicon.pyi` is their data sheet.

mod apic;
mod exit;
mod failure;
mod layouts;
mod memory;
mod processor;
mod registers;
mod shared;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::dbt::undefined::{OPEN, Open, as_the_computer};

/// The machine under understudy: memory, processors, local APICs.
#[pymodule(gil_used = false)]
fn _silicon(m: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = m.py();
    m.add("VmFail", py.get_type::<failure::VmFail>())?;
    m.add_class::<memory::Memory>()?;
    m.add_class::<exit::Exit>()?;
    m.add_class::<processor::Processor>()?;
    m.add_class::<apic::LocalApic>()?;
    m.add_class::<Native>()?;
    let layouts = PyDict::new(py);
    for (name, fields) in layouts::layouts() {
        layouts.set_item(name, fields)?;
    }
    m.add("LAYOUTS", layouts)?;
    m.add_function(wrap_pyfunction!(host_features, m)?)?;
    m.add_function(wrap_pyfunction!(hold_signals, m)?)?;
    m.add_function(wrap_pyfunction!(wall_tsc, m)?)?;
    // Made by the calls above; the data sheet has no such list.
    m.delattr("__all__")
}

/// See to it that this thread's SIGSEGV, SIGBUS, SIGFPE and SIGILL come to the machine first.
#[pyfunction]
fn hold_signals() {
    crate::dbt::signals::look();
}

/// The TSC of every processor with clock="wall", now.
#[pyfunction]
fn wall_tsc() -> u64 {
    crate::cpu::state::monotonic_ns()
}

/// An instruction of which the manual leaves something open, as this computer executes it.
#[pyclass(frozen, module = "understudy.silicon")]
struct Native {
    op: Open,
    size: usize,
}

#[pymethods]
impl Native {
    #[new]
    fn new(name: &str, size: usize) -> PyResult<Self> {
        let found = OPEN.iter().find(|row| row.0 == name);
        match found {
            Some(&(_, op)) if matches!(size, 1 | 2 | 4 | 8) => Ok(Self { op, size }),
            _ => Err(PyValueError::new_err(format!(
                "{name} of {size} bytes: expected one with something open"
            ))),
        }
    }

    fn __call__(&self, a: u64, b: u64, c: u64, before: u64) -> PyResult<(u64, u64)> {
        as_the_computer(self.op, self.size, [a, b, c], before)
            .ok_or_else(|| PyValueError::new_err("this computer has no such instruction, or it would fault"))
    }
}

/// What this computer's processor offers to the engine (sse42, avx, bmi1, bmi2, …).
#[pyfunction]
fn host_features(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let features = PyDict::new(py);
    for (name, is_there) in crate::features::host_features() {
        features.set_item(name, is_there)?;
    }
    Ok(features)
}
