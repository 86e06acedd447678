//! `Memory`: host-physical memory.

use std::ffi::c_int;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, Weak};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{
    PyBufferError, PyIndexError, PyMemoryError, PyOverflowError, PyRuntimeError, PyValueError,
};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};

use super::shared::{ELSEWHERE, Shared};
use crate::addr::FRAME_BYTES;
use crate::mem;
use crate::snapshot::Hasher;

/// Bytes that `hash` looks at in one go.
const CHUNK: usize = 256 << 10;
const FRAME: usize = FRAME_BYTES as usize;
/// Frames that `alike` reads at once: few enough to stay in a cache.
const ROW: usize = 16;

/// Host-physical memory: one sparse memfd.  An unused or discarded frame costs nothing.
///
/// Supports the buffer protocol (`memoryview(memory)`): for looking, and for writing before
/// the processor runs.  While processors run, write with `write`, which tells them about code.
#[pyclass(frozen, module = "understudy._silicon")]
pub struct Memory {
    open: RwLock<Option<Open>>,
    /// Buffers that were handed out and not given back yet.
    views: AtomicUsize,
}

/// What a memory has until it is closed.
struct Open {
    inner: Arc<mem::Memory>,
    /// The processors made on it, which end with it.
    processors: Vec<Weak<Shared>>,
}

fn closed() -> PyErr {
    PyRuntimeError::new_err("this memory is closed")
}

/// What there is of a memory, if it may be used.
fn usable(open: Option<&Open>) -> PyResult<&Open> {
    let open = open.ok_or_else(closed)?;
    if open.inner.is_here() { Ok(open) } else { Err(PyRuntimeError::new_err(ELSEWHERE)) }
}

fn check(memory: &mem::Memory, hpa: u64, length: u64) -> PyResult<()> {
    if memory.contains(hpa, length) {
        return Ok(());
    }
    Err(PyIndexError::new_err(format!(
        "{length} bytes at {hpa:#x}: expected a range inside the memory's {:#x} bytes",
        memory.size()
    )))
}

impl Memory {
    fn open(&self) -> RwLockReadGuard<'_, Option<Open>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory itself: who holds it keeps it, even if it is closed meanwhile.
    pub fn inner(&self) -> PyResult<Arc<mem::Memory>> {
        Ok(usable(self.open().as_ref())?.inner.clone())
    }

    /// The memory itself, with a range inside it.
    fn range(&self, hpa: u64, length: u64) -> PyResult<Arc<mem::Memory>> {
        let memory = self.inner()?;
        check(&memory, hpa, length)?;
        Ok(memory)
    }

    /// The memory itself, with runs inside it, and how many bytes they are.
    fn runs(&self, runs: &[(u64, u64)]) -> PyResult<(Arc<mem::Memory>, usize)> {
        let (memory, mut total) = (self.inner()?, 0_usize);
        for &(hpa, length) in runs {
            check(&memory, hpa, length)?;
            total = total
                .checked_add(length as usize)
                .ok_or_else(|| PyOverflowError::new_err("runs of more bytes than there can be"))?;
        }
        Ok((memory, total))
    }

    /// Note that a processor was made on it.
    pub fn owns(&self, processor: &Arc<Shared>) -> PyResult<()> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        let processors = &mut open.as_mut().ok_or_else(closed)?.processors;
        if processors.len() == processors.capacity() {
            processors.retain(|p| p.strong_count() > 0);
        }
        processors.push(Arc::downgrade(processor));
        Ok(())
    }

    fn load(&self, hpa: u64, size: usize) -> PyResult<u64> {
        let open = self.open();
        let memory = &usable(open.as_ref())?.inner;
        check(memory, hpa, size as u64)?;
        Ok(memory.load(hpa, size))
    }

    fn store(&self, hpa: u64, size: usize, value: u64) -> PyResult<()> {
        let open = self.open();
        let memory = &usable(open.as_ref())?.inner;
        check(memory, hpa, size as u64)?;
        memory.store(hpa, size, value);
        memory.wrote(hpa, size as u64);
        Ok(())
    }
}

/// How many pairs go on in a row: the first of each, and the second, too (1) or are the same (0).
fn row(pairs: &[(u64, u64)]) -> (usize, usize) {
    let (one, other) = pairs[0];
    let step = u64::from(pairs.get(1).is_none_or(|pair| pair.1 != other));
    let goes_on = |&(n, pair): &(u64, &(u64, u64))| *pair == (one + n, other + n * step);
    let count = (0..).zip(pairs).take_while(goes_on).count();
    (count, step as usize)
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
        let open = Open { inner, processors: Vec::new() };
        Ok(Self { open: RwLock::new(Some(open)), views: AtomicUsize::new(0) })
    }

    /// The interpreter's request for a view of all of the memory.
    unsafe fn __getbuffer__(slf: &Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let memory = slf.get();
        let open = memory.open();
        let mapping = &usable(open.as_ref())?.inner;
        let length = isize::try_from(mapping.size())
            .map_err(|_| PyOverflowError::new_err("the memory is larger than a view can be"))?;
        let base = mapping.base().cast();
        // SAFETY: the interpreter hands in a `view` to fill; the mapping is `length` bytes from
        // `base` and lives as long as the Memory object, of which the view keeps a reference, is not
        // closed; and while a view is counted, `close` refuses.
        let result = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), base, length, 0, flags) };
        if result != 0 {
            return Err(PyErr::fetch(slf.py()));
        }
        memory.views.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The interpreter gives a view back.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.views.fetch_sub(1, Ordering::Relaxed);
    }

    fn __repr__(&self) -> String {
        match &*self.open() {
            Some(open) => format!("Memory({:#x})", open.inner.size()),
            None => "Memory(closed)".to_owned(),
        }
    }

    /// Give the memory, its mapping and its descriptor back at once, whoever still refers to it,
    /// and close the processors made on it.
    ///
    /// Any later use raises RuntimeError; closing again does nothing.  BufferError while a
    /// memoryview of it is alive, RuntimeError while one of its processors runs: then all stays.
    fn close(&self) -> PyResult<()> {
        let mut place = self.open.write().unwrap_or_else(PoisonError::into_inner);
        let Some(open) = &*place else { return Ok(()) };
        match self.views.load(Ordering::Relaxed) {
            0 => {}
            views => {
                let words = format!("{views} view(s) of this memory are alive: release them, then close it");
                return Err(PyBufferError::new_err(words));
            }
        }
        let processors: Vec<_> = open.processors.iter().filter_map(Weak::upgrade).collect();
        // (All are in hand before the first is closed.)
        let held = processors.iter().map(|p| p.lock_if_open()).collect::<Result<Vec<_>, _>>()?;
        for machine in held.into_iter().flatten() {
            machine.close("this processor is closed, with its memory");
        }
        *place = None;
        Ok(())
    }

    /// Whether it was made in this process, and not in one that this was forked from.
    #[getter]
    fn is_here(&self) -> PyResult<bool> {
        Ok(self.open().as_ref().ok_or_else(closed)?.inner.is_here())
    }

    /// Bytes, a multiple of 4096.
    #[getter]
    fn size(&self) -> PyResult<u64> {
        Ok(self.inner()?.size())
    }

    /// The memfd, to hand to another process.
    #[getter]
    fn fd(&self) -> PyResult<i32> {
        Ok(self.inner()?.fd())
    }

    /// Raises IndexError if [hpa, hpa+length) is not all inside the memory.
    fn read<'py>(&self, py: Python<'py>, hpa: u64, length: u64) -> PyResult<Bound<'py, PyBytes>> {
        let memory = self.range(hpa, length)?;
        PyBytes::new_with(py, length as usize, |out| {
            memory.read_bytes(hpa, out);
            Ok(())
        })
    }

    /// Write bytes; engines that hold code from there learn of it.
    fn write(&self, hpa: u64, data: &Bound<'_, PyAny>) -> PyResult<()> {
        if let Ok(bytes) = data.cast::<PyBytes>() {
            let bytes = bytes.as_bytes();
            self.range(hpa, bytes.len() as u64)?.write_bytes(hpa, bytes);
            return Ok(());
        }
        let bytes = match PyBuffer::<u8>::get(data) {
            Ok(buffer) => buffer.to_vec(data.py())?,
            Err(_) => {
                let view = PyMemoryView::from(data)?.call_method1("cast", ("B",))?;
                PyBuffer::<u8>::get(&view)?.to_vec(data.py())?
            }
        };
        self.range(hpa, bytes.len() as u64)?.write_bytes(hpa, &bytes);
        Ok(())
    }

    /// The bytes of several runs (hpa, length), one after the other.
    fn gather<'py>(&self, py: Python<'py>, runs: Vec<(u64, u64)>) -> PyResult<Bound<'py, PyBytes>> {
        let (memory, total) = self.runs(&runs)?;
        PyBytes::new_with(py, total, |out| {
            let mut rest = out;
            for (hpa, length) in runs {
                let (part, after) = rest.split_at_mut(length as usize);
                memory.read_bytes(hpa, part);
                rest = after;
            }
            Ok(())
        })
    }

    /// Write bytes to several runs (hpa, length), one after the other, which they fill.
    fn scatter(&self, runs: Vec<(u64, u64)>, data: &[u8]) -> PyResult<()> {
        let (memory, total) = self.runs(&runs)?;
        if total != data.len() {
            let words = format!("{} bytes for runs of {total}: expected as many", data.len());
            return Err(PyValueError::new_err(words));
        }
        let mut rest = data;
        for (hpa, length) in runs {
            let (part, after) = rest.split_at(length as usize);
            memory.write_bytes(hpa, part);
            rest = after;
        }
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

    /// Put a byte, and return the one before, in one step for processors that run.
    fn exchange(&self, hpa: u64, byte: u8) -> PyResult<u8> {
        let open = self.open();
        let memory = &usable(open.as_ref())?.inner;
        check(memory, hpa, 1)?;
        let old = memory.update(hpa, 1, |_| byte.into());
        memory.wrote(hpa, 1);
        Ok(old as u8)
    }

    /// Set `length` bytes to `byte`.
    #[pyo3(signature = (hpa, length, byte=0))]
    fn fill(&self, hpa: u64, length: u64, byte: u8) -> PyResult<()> {
        self.range(hpa, length)?.fill(hpa, length, byte);
        Ok(())
    }

    /// Give whole 4-KByte frames back to the computer; they read as zero.
    fn discard(&self, hpa: u64, length: u64) -> PyResult<()> {
        let memory = self.range(hpa, length)?;
        if !(hpa | length).is_multiple_of(FRAME_BYTES) {
            let words = format!("discard({hpa:#x}, {length:#x}): expected multiples of 4096");
            return Err(PyValueError::new_err(words));
        }
        Ok(memory.discard(hpa, length)?)
    }

    /// One byte for each pair of frames: 1 if both have the same contents.  Holes stay holes.
    fn alike<'py>(&self, py: Python<'py>, pairs: Vec<(u64, u64)>) -> PyResult<Bound<'py, PyBytes>> {
        let memory = self.inner()?;
        for &(one, other) in &pairs {
            check(&memory, one.max(other).saturating_mul(FRAME_BYTES), FRAME_BYTES)?;
        }
        PyBytes::new_with(py, pairs.len(), |out| {
            let mut buffers = [(); 2].map(|()| vec![0; ROW * FRAME]);
            let mut at = 0;
            while at < pairs.len() {
                let (one, other) = pairs[at];
                let (count, step) = row(&pairs[at..pairs.len().min(at + ROW)]);
                let [ones, others] = buffers.each_mut();
                memory.read_file(one * FRAME_BYTES, &mut ones[..count * FRAME])?;
                memory.read_file(other * FRAME_BYTES, &mut others[..(1 + (count - 1) * step) * FRAME])?;
                for n in 0..count {
                    out[at + n] = u8::from(ones[n * FRAME..][..FRAME] == others[n * step * FRAME..][..FRAME]);
                }
                at += count;
            }
            Ok(())
        })
    }

    /// What the computer really spends on this memory.
    fn resident_bytes(&self) -> PyResult<u64> {
        Ok(self.inner()?.resident_bytes())
    }

    /// One byte a frame: 1 if a processor or `write` changed it since last cleared.
    ///
    /// What processors write from now on, those that run in other threads too, is marked again.
    #[pyo3(signature = (pfn, count, clear=true))]
    fn dirty<'py>(
        &self,
        py: Python<'py>,
        pfn: u64,
        count: u64,
        clear: bool,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let memory = self.inner()?;
        let frames = memory.size() / FRAME_BYTES;
        if pfn.checked_add(count).is_none_or(|end| end > frames) {
            let words = format!("{count} frames from {pfn:#x}: expected a range inside {frames:#x} frames");
            return Err(PyIndexError::new_err(words));
        }
        let marks = PyBytes::new_with(py, count as usize, |out| {
            for (mark, frame) in out.iter_mut().zip(pfn..) {
                *mark = u8::from(memory.take_dirty(frame, clear));
            }
            Ok(())
        })?;
        if clear {
            py.detach(|| memory.bus().publish(memory.bus().changes()));
        }
        Ok(marks)
    }

    /// A 64-bit hash of the bytes (for comparing machines).
    fn hash(&self, py: Python<'_>, hpa: u64, length: u64) -> PyResult<u64> {
        let memory = self.range(hpa, length)?;
        py.detach(|| {
            let (mut hasher, mut chunk) = (Hasher::default(), vec![0; CHUNK]);
            let mut at = hpa;
            while at < hpa + length {
                let part = &mut chunk[..CHUNK.min((hpa + length - at) as usize)];
                memory.read_file(at, part)?;
                hasher.bytes(part);
                at += part.len() as u64;
            }
            Ok(hasher.finish())
        })
    }
}
