//! `Memory`: host-physical memory.

use std::ffi::c_int;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyIndexError, PyMemoryError, PyOverflowError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};

use crate::addr::FRAME_BYTES;
use crate::mem;
use crate::snapshot::Hasher;

/// Bytes that `hash` looks at in one go.
const CHUNK: usize = 256 << 10;

/// Host-physical memory: one sparse memfd.  An unused or discarded frame costs nothing.
///
/// Supports the buffer protocol (`memoryview(memory)`): for looking, and for writing before
/// the processor runs.  While processors run, write with `write`, which tells them about code.
#[pyclass(frozen, module = "understudy._silicon")]
pub struct Memory {
    inner: Arc<mem::Memory>,
}

impl Memory {
    /// The memory itself.
    pub fn inner(&self) -> &Arc<mem::Memory> {
        &self.inner
    }

    fn check(&self, hpa: u64, length: u64) -> PyResult<()> {
        if self.inner.contains(hpa, length) {
            return Ok(());
        }
        Err(PyIndexError::new_err(format!(
            "{length} bytes at {hpa:#x}: expected a range inside the memory's {:#x} bytes",
            self.inner.size()
        )))
    }

    fn load(&self, hpa: u64, size: usize) -> PyResult<u64> {
        self.check(hpa, size as u64)?;
        Ok(self.inner.load(hpa, size))
    }

    fn store(&self, hpa: u64, size: usize, value: u64) -> PyResult<()> {
        self.check(hpa, size as u64)?;
        self.inner.touch(hpa, size as u64);
        self.inner.store(hpa, size, value);
        Ok(())
    }
}

fn no_memory(size: u64, why: &std::io::Error) -> PyErr {
    PyMemoryError::new_err(format!("cannot make a memory of {size:#x} bytes: {why}"))
}

#[pymethods]
impl Memory {
    #[new]
    fn new(size: u64) -> PyResult<Self> {
        if size == 0 || size > 1 << crate::addr::MAXPHYADDR {
            let (got, most) = (size, 1_u64 << crate::addr::MAXPHYADDR);
            let words = format!("a memory of {got:#x} bytes: expected 1 to {most:#x}");
            return Err(PyValueError::new_err(words));
        }
        let inner = mem::Memory::new(size).map_err(|e| no_memory(size, &e))?;
        Ok(Self { inner })
    }

    /// The interpreter's request for a view of all of the memory.
    unsafe fn __getbuffer__(slf: &Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let mapping = &slf.get().inner;
        let length = isize::try_from(mapping.size())
            .map_err(|_| PyOverflowError::new_err("the memory is larger than a view can be"))?;
        let base = mapping.base().cast();
        // SAFETY: the interpreter hands in a `view` to fill; the mapping is `length` bytes from
        // `base` and lives as long as the Memory object, of which the view keeps a reference.
        let result = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), base, length, 0, flags) };
        if result == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }

    fn __repr__(&self) -> String {
        format!("Memory({:#x})", self.inner.size())
    }

    /// Bytes, a multiple of 4096.
    #[getter]
    fn size(&self) -> u64 {
        self.inner.size()
    }

    /// The memfd, to hand to another process.
    #[getter]
    fn fd(&self) -> i32 {
        self.inner.fd()
    }

    /// Raises IndexError if [hpa, hpa+length) is not all inside the memory.
    fn read<'py>(&self, py: Python<'py>, hpa: u64, length: u64) -> PyResult<Bound<'py, PyBytes>> {
        self.check(hpa, length)?;
        PyBytes::new_with(py, length as usize, |out| {
            self.inner.read_bytes(hpa, out);
            Ok(())
        })
    }

    /// Write bytes; engines that hold code from there learn of it.
    fn write(&self, hpa: u64, data: &Bound<'_, PyAny>) -> PyResult<()> {
        if let Ok(bytes) = data.cast::<PyBytes>() {
            let bytes = bytes.as_bytes();
            self.check(hpa, bytes.len() as u64)?;
            self.inner.write_bytes(hpa, bytes);
            return Ok(());
        }
        let bytes = match PyBuffer::<u8>::get(data) {
            Ok(buffer) => buffer.to_vec(data.py())?,
            Err(_) => {
                let view = PyMemoryView::from(data)?.call_method1("cast", ("B",))?;
                PyBuffer::<u8>::get(&view)?.to_vec(data.py())?
            }
        };
        self.check(hpa, bytes.len() as u64)?;
        self.inner.write_bytes(hpa, &bytes);
        Ok(())
    }

    /// Eight bytes, little-endian.
    fn read_u64(&self, hpa: u64) -> PyResult<u64> {
        self.load(hpa, 8)
    }

    /// Write eight bytes, little-endian.
    fn write_u64(&self, hpa: u64, value: u64) -> PyResult<()> {
        self.store(hpa, 8, value)
    }

    /// Four bytes, little-endian.
    fn read_u32(&self, hpa: u64) -> PyResult<u64> {
        self.load(hpa, 4)
    }

    /// Write four bytes, little-endian.
    fn write_u32(&self, hpa: u64, value: u32) -> PyResult<()> {
        self.store(hpa, 4, u64::from(value))
    }

    /// Set `length` bytes to `byte`.
    #[pyo3(signature = (hpa, length, byte=0))]
    fn fill(&self, hpa: u64, length: u64, byte: u8) -> PyResult<()> {
        self.check(hpa, length)?;
        self.inner.fill(hpa, length, byte);
        Ok(())
    }

    /// Give whole 4-KByte frames back to the computer; they read as zero.
    fn discard(&self, hpa: u64, length: u64) -> PyResult<()> {
        self.check(hpa, length)?;
        if !(hpa | length).is_multiple_of(FRAME_BYTES) {
            let words = format!("discard({hpa:#x}, {length:#x}): expected multiples of 4096");
            return Err(PyValueError::new_err(words));
        }
        Ok(self.inner.discard(hpa, length)?)
    }

    /// What the computer really spends on this memory.
    fn resident_bytes(&self) -> u64 {
        self.inner.resident_bytes()
    }

    /// One byte a frame: 1 if a processor or `write` changed it since last cleared.
    ///
    /// After clearing, processors must be told to drop translations (`Processor.flush`).
    #[pyo3(signature = (pfn, count, clear=true))]
    fn dirty<'py>(
        &self,
        py: Python<'py>,
        pfn: u64,
        count: u64,
        clear: bool,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let frames = self.inner.size() / FRAME_BYTES;
        if pfn.checked_add(count).is_none_or(|end| end > frames) {
            let words = format!("{count} frames from {pfn:#x}: expected a range inside {frames:#x} frames");
            return Err(PyIndexError::new_err(words));
        }
        PyBytes::new_with(py, count as usize, |out| {
            for (mark, frame) in out.iter_mut().zip(pfn..) {
                *mark = u8::from(self.inner.take_dirty(frame, clear));
            }
            Ok(())
        })
    }

    /// A 64-bit hash of the bytes (for comparing machines).
    fn hash(&self, py: Python<'_>, hpa: u64, length: u64) -> PyResult<u64> {
        self.check(hpa, length)?;
        // Through the descriptor, not the mapping: reading a hole there gives it no frame.
        let file = File::open(format!("/proc/self/fd/{}", self.inner.fd()))?;
        py.detach(|| {
            let (mut hasher, mut chunk) = (Hasher::default(), vec![0; CHUNK]);
            let mut at = hpa;
            while at < hpa + length {
                let part = &mut chunk[..CHUNK.min((hpa + length - at) as usize)];
                file.read_exact_at(part, at)?;
                hasher.bytes(part);
                at += part.len() as u64;
            }
            Ok(hasher.finish())
        })
    }
}
