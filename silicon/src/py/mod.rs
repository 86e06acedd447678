//! The pins: bindings only.
use pyo3::prelude::*;

/// The compiled module.
#[pymodule]
fn _silicon(_m: &Bound<'_, PyModule>) -> PyResult<()> {
    Ok(())
}
