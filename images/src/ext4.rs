//! Files of an ext2, ext3 or ext4 file system, read only: a binding of `ext4-view`.
//!
//! The file system lies wherever Python reads it from; a journal that was not played back is read
//! as if it had been.  Invariants: nothing is written; a file longer than the caller wants is
//! refused before a byte of it is read.

use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};

use ext4_view::{Ext4Error, Ext4Read};
use pyo3::exceptions::{PyFileNotFoundError, PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// A file system.
#[pyclass(unsendable)]
pub struct Ext4(ext4_view::Ext4);

#[pymethods]
impl Ext4 {
    /// `read(offset, length)` gives bytes of the file system.
    #[new]
    fn new(read: Py<PyAny>) -> PyResult<Self> {
        guarded(|| ext4_view::Ext4::load(Box::new(Reader(read)))).map(Self)
    }

    /// The UUID, as text.
    #[getter]
    fn uuid(&self) -> String {
        self.0.uuid().to_string()
    }

    /// The label; what is no text in it is left out.
    #[getter]
    fn label(&self) -> String {
        self.0.label().to_str().unwrap_or_default().to_owned()
    }

    /// What is in a file, of `most` bytes at most; symbolic links are followed.
    fn read<'py>(&self, py: Python<'py>, path: &str, most: u64) -> PyResult<Bound<'py, PyBytes>> {
        let length = guarded(|| self.0.metadata(path))?.len();
        if length > most {
            return Err(PyValueError::new_err(format!(
                "{path} has {length} bytes, expected {most} at most"
            )));
        }
        Ok(PyBytes::new(py, &guarded(|| self.0.read(path))?))
    }

    /// The names in a folder, sorted; those that are no text are left out.
    fn list(&self, path: &str) -> PyResult<Vec<String>> {
        let mut names = guarded(|| {
            let mut names = Vec::new();
            for entry in self.0.read_dir(path)? {
                if let Ok(name) = entry?.file_name().as_str() {
                    names.push(name.to_owned());
                }
            }
            Ok(names)
        })?;
        names.sort();
        Ok(names)
    }
}

/// Where the bytes of the file system come from.
struct Reader(Py<PyAny>);

impl Ext4Read for Reader {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        Python::attach(|py| {
            let read = self.0.call1(py, (start_byte, dst.len()))?;
            let data = read.extract::<&[u8]>(py).map_err(PyErr::from)?;
            if data.len() != dst.len() {
                return Err("the disk ends before its file system".into());
            }
            dst.copy_from_slice(data);
            Ok(())
        })
    }
}

/// A result of the library, or of its panic.
fn guarded<T>(action: impl FnOnce() -> Result<T, Ext4Error>) -> PyResult<T> {
    match catch_unwind(AssertUnwindSafe(action)) {
        Ok(Ok(result)) => Ok(result),
        Ok(Err(Ext4Error::NotFound | Ext4Error::NotADirectory)) => {
            Err(PyFileNotFoundError::new_err("no such file"))
        }
        Ok(Err(error)) => Err(PyOSError::new_err(error.to_string())),
        Err(_) => Err(PyOSError::new_err(
            "the file system is damaged, more than its library bears",
        )),
    }
}
