//! Disk images in formats other than raw, a binding of `imago`; and the files in one, `ext4`, `fat`.
//!
//! Who opens, locks and checks the files is Python (`understudy/backends/qcow2.py`); here an image
//! is a chain of open files, the one that is written first, each over the next.  No file is ever
//! opened by a name that stands in an image.
//!
//! Invariants: an access lies inside the image; whatever is wrong with a file is an `OSError`, a
//! panic of the library included.

mod ext4;
mod fat;

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, StorageOpenOptions};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

type Access = FormatAccess<File>;

/// An open chain of images.
#[pyclass(frozen)]
struct Image {
    access: Mutex<Option<Access>>,
    size: u64,
}

#[pymethods]
impl Image {
    /// `files`: (file descriptor, "qcow2" or "raw"), the uppermost first; they are duplicated.
    #[new]
    fn new(py: Python<'_>, files: Vec<(RawFd, String)>, writable: bool) -> PyResult<Self> {
        let access = py.detach(|| guarded(|| open(&files, writable)))?;
        let access = access.ok_or_else(|| PyValueError::new_err("an image of no files"))?;
        let size = access.size();
        Ok(Self {
            access: Mutex::new(Some(access)),
            size,
        })
    }

    /// Bytes that the guest sees.
    #[getter]
    fn size(&self) -> u64 {
        self.size
    }

    /// So many bytes from an offset on.
    fn read<'py>(
        &self,
        py: Python<'py>,
        offset: u64,
        length: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        self.check(offset, length as u64)?;
        let mut data = vec![0; length];
        py.detach(|| self.with(|access| access.read(&mut data, offset)))?;
        Ok(PyBytes::new(py, &data))
    }

    /// All of the data, or an `OSError`.
    fn write(&self, py: Python<'_>, offset: u64, data: PyBuffer<u8>) -> PyResult<()> {
        let data = data.to_vec(py)?;
        self.check(offset, data.len() as u64)?;
        py.detach(|| self.with(|access| access.write(&data, offset)))
    }

    /// Everything that was written is on the computer's disk.
    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| {
            self.with(|access| {
                access.flush()?;
                access.sync()
            })
        })
    }

    /// Zeros from an offset on; `unmap`: the room for them is given back.
    fn zero(&self, py: Python<'_>, offset: u64, length: u64, unmap: bool) -> PyResult<()> {
        self.check(offset, length)?;
        py.detach(|| {
            self.with(|access| {
                if unmap {
                    access.discard_to_zero(offset, length)
                } else {
                    access.write_zeroes(offset, length)
                }
            })
        })
    }

    /// What is there is of no use any more.
    fn discard(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<()> {
        self.check(offset, length)?;
        py.detach(|| {
            self.with(|access| match access.discard_to_any(offset, length) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
                other => other,
            })
        })
    }

    /// Flush, and let the files go.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| {
            let mut guard = self.access.lock().unwrap_or_else(PoisonError::into_inner);
            guarded(|| match guard.take() {
                Some(access) => access.flush(),
                None => Ok(()),
            })
        })
    }
}

impl Image {
    fn check(&self, offset: u64, length: u64) -> PyResult<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size => Ok(()),
            _ => {
                let size = self.size;
                Err(PyValueError::new_err(format!(
                    "{length} bytes at {offset} of a disk of {size}"
                )))
            }
        }
    }

    fn with<T>(&self, action: impl FnOnce(&mut Access) -> io::Result<T>) -> PyResult<T> {
        let mut guard = self.access.lock().unwrap_or_else(PoisonError::into_inner);
        guarded(|| match guard.as_mut() {
            Some(access) => action(access),
            None => Err(io::Error::other("the image is closed")),
        })
    }
}

/// A result of the library, or of its panic.
fn guarded<T>(action: impl FnOnce() -> io::Result<T>) -> PyResult<T> {
    match catch_unwind(AssertUnwindSafe(action)) {
        Ok(result) => Ok(result?),
        Err(_) => Err(io::Error::other("the image is damaged, more than its library bears").into()),
    }
}

/// From the lowest file up.
fn open(files: &[(RawFd, String)], writable: bool) -> io::Result<Option<Access>> {
    let mut below: Option<Access> = None;
    for (number, (fd, format)) in files.iter().enumerate().rev() {
        let writes = writable && number == 0;
        let storage = storage(*fd, writes)?;
        let gate = DenyImplicitOpenGate::default();
        below = Some(if format == "raw" {
            Access::new(Raw::builder(storage).write(writes).open(gate)?)
        } else {
            let image = Qcow2::<File>::builder(storage)
                .write(writes)
                .backing(below)
                .data_file(None);
            Access::new(image.open(gate)?)
        });
    }
    Ok(below)
}

fn storage(fd: RawFd, writes: bool) -> io::Result<File> {
    // Python keeps it open for as long as this takes.
    #[allow(unsafe_code)]
    // SAFETY: the descriptor is that of an open file of the caller, and only duplicated.
    let file = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?;
    File::from_open_file(
        fs::File::from(file),
        StorageOpenOptions::new().write(writes),
    )
}

/// The module `understudy._images`.
#[pymodule]
fn _images(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Image>()?;
    module.add_class::<ext4::Ext4>()?;
    module.add_class::<fat::Fat>()
}
