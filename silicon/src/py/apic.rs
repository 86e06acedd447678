//! `LocalApic`: one of its own, or that of a processor.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::shared::Shared;
use crate::apic;

/// Where the APIC is.
enum Place {
    /// A virtual one.
    Own(Box<Mutex<apic::LocalApic>>),
    /// Inside a processor.
    Of(Arc<Shared>),
}

/// A local APIC (SDM 3A, "Advanced Programmable Interrupt Controller").
///
/// Every Processor has one; a hypervisor may make more as virtual ones.  Times are TSC ticks
/// (ns), passed in: it keeps no clock.
#[pyclass(frozen, module = "understudy._silicon")]
pub struct LocalApic {
    place: Place,
}

impl LocalApic {
    /// The one of a processor.
    pub fn of(shared: Arc<Shared>) -> Self {
        Self { place: Place::Of(shared) }
    }

    fn with<T>(&self, act: impl FnOnce(&mut apic::LocalApic) -> T) -> PyResult<T> {
        match &self.place {
            Place::Own(apic) => Ok(act(&mut apic.lock().unwrap_or_else(PoisonError::into_inner))),
            Place::Of(shared) => {
                let mut machine = shared.lock()?;
                let core = &mut machine.core;
                let page = core.apic.page();
                let result = act(&mut core.apic);
                core.nmi_pending |= core.apic.take_nmi();
                core.attention = 1;
                if page != core.apic.page() {
                    core.tlb.flush_all(); // it holds which pages are plain memory
                    core.refresh();
                }
                Ok(result)
            }
        }
    }
}

fn no_msr(index: u32) -> PyErr {
    PyKeyError::new_err(format!("#GP(0): the APIC in its present mode has no MSR {index:#x}"))
}

#[pymethods]
impl LocalApic {
    #[new]
    #[pyo3(signature = (apic_id=0, bootstrap=true))]
    fn new(apic_id: u32, bootstrap: bool) -> Self {
        Self { place: Place::Own(Box::new(Mutex::new(apic::LocalApic::new(apic_id, bootstrap)))) }
    }

    /// A register by its xAPIC page offset (0x20 ID, 0x30 version, 0x80 TPR, …).
    fn read(&self, offset: u32, now: u64) -> PyResult<u32> {
        self.with(|a| a.read(offset, now))
    }

    /// Returns the ICR (64 bits) if an interrupt command leaves this APIC, else None.
    fn write(&self, offset: u32, value: u32, now: u64) -> PyResult<Option<u64>> {
        self.with(|a| a.write(offset, value, now))
    }

    /// IA32_APIC_BASE, IA32_TSC_DEADLINE, x2APIC 0x800-0x8FF.  KeyError means #GP(0).
    fn rdmsr(&self, index: u32, now: u64) -> PyResult<u64> {
        self.with(|a| a.rdmsr(index, now))?.ok_or_else(|| no_msr(index))
    }

    /// As rdmsr; returns the ICR if an interrupt command leaves this APIC, else None.
    fn wrmsr(&self, index: u32, value: u64, now: u64) -> PyResult<Option<u64>> {
        self.with(|a| a.wrmsr(index, value, now))?.ok_or_else(|| {
            PyKeyError::new_err(format!("#GP(0): WRMSR of {value:#x} to {index:#x} (no such MSR, or bits)"))
        })
    }

    /// An interrupt message arrives (fixed delivery).
    #[pyo3(signature = (vector, level=false))]
    fn raise_vector(&self, vector: u8, level: bool) -> PyResult<()> {
        self.with(|a| a.raise_vector(vector, level))
    }

    /// LINT0 (ExtINT from the 8259s on a PC) or LINT1.
    fn lint(&self, pin: usize, asserted: bool) -> PyResult<()> {
        if pin > 1 {
            return Err(PyValueError::new_err(format!("LINT{pin}: expected pin 0 or 1")));
        }
        self.with(|a| a.lint(pin, asserted))
    }

    /// The performance counters interrupt, as LVT PC says.  True if that is an NMI.
    fn performance_interrupt(&self) -> PyResult<bool> {
        self.with(|a| {
            a.performance_interrupt();
            a.take_nmi()
        })
    }

    /// The vector that would be delivered now, or -1.  (ExtINT: see `extint_open`.)
    fn pending(&self) -> PyResult<i32> {
        self.with(|a| a.pending().map_or(-1, i32::from))
    }

    /// Whether LVT LINT0 (or a disabled APIC) lets the 8259's interrupt through.
    #[getter]
    fn extint_open(&self) -> PyResult<bool> {
        self.with(|a| a.is_extint_open())
    }

    /// Whether the EOI of what is in service brings nothing about but that it has ended.
    #[getter]
    fn ends_quietly(&self) -> PyResult<bool> {
        self.with(|a| a.ends_quietly())
    }

    /// Interrupt acknowledge: moves the pending vector from IRR to ISR and returns it.
    fn accept(&self) -> PyResult<u8> {
        self.with(|a| a.accept().unwrap_or_else(|| a.spurious()))
    }

    /// Let the timer act on the time that has passed.
    fn tick(&self, now: u64) -> PyResult<()> {
        self.with(|a| a.tick(now))
    }

    /// The TSC at which `tick` must next be called; 2**64-1 if never.
    fn deadline(&self) -> PyResult<u64> {
        self.with(|a| a.deadline())
    }

    /// Level-triggered vectors whose EOI is to be broadcast to I/O APICs.
    fn take_eois(&self) -> PyResult<Vec<u16>> {
        self.with(|a| a.take_eois().into_iter().map(u16::from).collect())
    }

    /// The task-priority register.
    #[getter]
    fn tpr(&self) -> PyResult<u8> {
        self.with(|a| a.tpr())
    }

    #[setter]
    fn set_tpr(&self, value: u8) -> PyResult<()> {
        self.with(|a| a.set_tpr(value))
    }

    /// IA32_APIC_BASE.
    #[getter]
    fn base(&self) -> PyResult<u64> {
        self.with(|a| a.base())
    }

    /// All of it.
    fn save<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let words = self.with(|a| a.to_words())?;
        Ok(PyBytes::new(py, &words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>()))
    }

    /// Become what was saved.
    fn load(&self, state: &[u8]) -> PyResult<()> {
        let (chunks, rest) = state.as_chunks::<8>();
        let words: Vec<u64> = chunks.iter().map(|c| u64::from_le_bytes(*c)).collect();
        match apic::LocalApic::from_words(&words).filter(|_| rest.is_empty()) {
            Some(saved) => self.with(|a| *a = saved),
            None => Err(PyValueError::new_err(format!(
                "{} bytes: expected what LocalApic.save() returned",
                state.len()
            ))),
        }
    }
}
