//! Files of a FAT file system, read only: a binding of `fatfs`.
//!
//! The file system lies wherever Python reads it from.  Invariants: nothing is written; a file
//! longer than the caller wants is refused before a byte of it is read; a chain of clusters that
//! never ends is given up.

use std::cell::Cell;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use fatfs::{FileSystem, FsOptions};
use pyo3::exceptions::{PyFileNotFoundError, PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// How often the disk is read for one call: a file of a gigabyte in clusters of 512 bytes.
const MOST_READS: u32 = 1 << 22;

/// A file system.
#[pyclass(unsendable)]
pub struct Fat {
    files: FileSystem<Reader>,
    reads: Rc<Cell<u32>>,
}

#[pymethods]
impl Fat {
    /// `read(offset, length)` gives bytes of the file system, which has `size` of them.
    #[new]
    fn new(read: Py<PyAny>, size: u64) -> PyResult<Self> {
        let reads = Rc::new(Cell::new(0));
        let reader = Reader {
            read,
            size,
            at: 0,
            reads: Rc::clone(&reads),
        };
        let files = guarded(|| FileSystem::new(reader, FsOptions::new()))?;
        Ok(Self { files, reads })
    }

    /// What is in a file, of `most` bytes at most.
    fn read<'py>(&self, py: Python<'py>, path: &str, most: u64) -> PyResult<Bound<'py, PyBytes>> {
        self.reads.set(0);
        let mut file = guarded(|| self.files.root_dir().open_file(path))?;
        let length = guarded(|| file.seek(SeekFrom::End(0)))?;
        if length > most {
            return Err(PyValueError::new_err(format!(
                "{path} has {length} bytes, expected {most} at most"
            )));
        }
        let mut data = Vec::new();
        guarded(|| {
            file.seek(SeekFrom::Start(0))?;
            file.read_to_end(&mut data)
        })?;
        if data.len() as u64 != length {
            return Err(PyOSError::new_err("the file is cut off"));
        }
        Ok(PyBytes::new(py, &data))
    }

    /// The names in a folder, sorted.
    fn list(&self, path: &str) -> PyResult<Vec<String>> {
        self.reads.set(0);
        let mut names = guarded(|| {
            let root = self.files.root_dir();
            let folder = match path.trim_matches('/') {
                "" => root,
                inner => root.open_dir(inner)?,
            };
            let names = folder.iter().map(|entry| Ok(entry?.file_name()));
            names.collect::<io::Result<Vec<_>>>()
        })?;
        names.retain(|name| name != "." && name != "..");
        names.sort();
        Ok(names)
    }
}

/// Where the bytes of the file system come from.
struct Reader {
    read: Py<PyAny>,
    size: u64,
    at: u64,
    reads: Rc<Cell<u32>>,
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.size.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let count = buffer.len().min(left);
        if count == 0 {
            return Ok(0);
        }
        if self.reads.replace(self.reads.get() + 1) >= MOST_READS {
            return Err(io::Error::other("its clusters lead in a circle"));
        }
        Python::attach(|py| {
            let found = self.read.call1(py, (self.at, count))?;
            let data = found.extract::<&[u8]>(py).map_err(PyErr::from)?;
            if data.len() != count {
                return Err(io::Error::other("the disk ends before its file system"));
            }
            buffer[..count].copy_from_slice(data);
            Ok(())
        })?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Seek for Reader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.size.checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| io::Error::from(ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}

impl Write for Reader {
    fn write(&mut self, _data: &[u8]) -> io::Result<usize> {
        Err(io::Error::from(ErrorKind::PermissionDenied))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A result of the library, or of its panic.
fn guarded<T>(action: impl FnOnce() -> io::Result<T>) -> PyResult<T> {
    match catch_unwind(AssertUnwindSafe(action)) {
        Ok(Ok(result)) => Ok(result),
        Ok(Err(error)) if error.kind() == ErrorKind::NotFound => {
            Err(PyFileNotFoundError::new_err("no such file"))
        }
        Ok(Err(error)) => Err(PyOSError::new_err(error.to_string())),
        Err(_) => Err(PyOSError::new_err(
            "the file system is damaged, more than its library bears",
        )),
    }
}
