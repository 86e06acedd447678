//! The pins: bindings only.  `understudy/_silicon.pyi` is their data sheet.

mod apic;
mod exit;
mod failure;
mod layouts;
mod memory;
mod processor;
mod registers;
mod shared;

use pyo3::prelude::*;
use pyo3::types::PyDict;

/// The machine under understudy: memory, processors, local APICs.
#[pymodule(gil_used = false)]
fn _silicon(m: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = m.py();
    m.add("VmFail", py.get_type::<failure::VmFail>())?;
    m.add_class::<memory::Memory>()?;
    m.add_class::<exit::Exit>()?;
    m.add_class::<processor::Processor>()?;
    m.add_class::<apic::LocalApic>()?;
    let layouts = PyDict::new(py);
    for (name, fields) in layouts::layouts() {
        layouts.set_item(name, fields)?;
    }
    m.add("LAYOUTS", layouts)?;
    m.add_function(wrap_pyfunction!(host_features, m)?)?;
    m.add_function(wrap_pyfunction!(hold_signals, m)?)?;
    m.add_function(wrap_pyfunction!(scans_keep_flags, m)?)?;
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

/// Whether BSF and BSR change no status flag but ZF on this computer, and so in the machine.
#[pyfunction]
fn scans_keep_flags() -> bool {
    crate::dbt::undefined::scans_keep_flags()
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
