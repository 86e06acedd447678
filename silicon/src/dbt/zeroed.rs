//! Large tables that cost nothing until they are written, and large structs built where they are.
//!
//! A processor's tables are a few megabytes, most of which a processor that does little never
//! touches.  [`Zeroed`] takes a table's pages from the operating system as they are, all zeros, so
//! that only written ones exist; what is empty must therefore be all zeros ([`Zeros`]).  [`Vacant`]
//! is the same for a struct with such tables inside: it is filled field by field by [`build`],
//! because passing it by value would need a stack of its size, and write every page.

use std::io;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, AtomicU16};

use super::Recent;
use crate::cpu::decode::Slot;
use crate::mmu::tlb::{Entry, Place};

/// Types of which all-zero bytes are a value.
///
/// # Safety
/// They must be.
pub unsafe trait Zeros {}
// SAFETY: integers, and structs of nothing else.
unsafe impl Zeros for u32 {}
// SAFETY: as above.
unsafe impl Zeros for u64 {}
// SAFETY: as above; an atomic has the representation of its integer.
unsafe impl Zeros for AtomicU8 {}
// SAFETY: as above.
unsafe impl Zeros for AtomicU16 {}
// SAFETY: as above.
unsafe impl Zeros for Entry {}
// SAFETY: as above.
unsafe impl Zeros for Place {}
// SAFETY: as above.
unsafe impl Zeros for Recent {}
// SAFETY: integers, an optional function pointer, and an `Instruction`, whose default is all zeros
// (there is a test).
unsafe impl Zeros for Slot {}
// SAFETY: as its elements.
unsafe impl<T: Zeros, const N: usize> Zeros for [T; N] {}

/// A slice of zeros in pages that exist once they are written.
pub struct Zeroed<T> {
    base: NonNull<T>,
    len: usize,
    _owns: PhantomData<T>,
}

// SAFETY: it owns its elements, as a boxed slice does.
unsafe impl<T: Send> Send for Zeroed<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Zeroed<T> {}

impl<T: Zeros> Zeroed<T> {
    /// So many elements, all zeros.
    ///
    /// # Errors
    /// If the computer gives no addresses.
    pub fn new(len: usize) -> io::Result<Self> {
        const { assert!(!std::mem::needs_drop::<T>() && align_of::<T>() <= 4096 && size_of::<T>() > 0) };
        let bytes = len.checked_mul(size_of::<T>()).filter(|&b| b > 0);
        let base = map(bytes.ok_or(io::ErrorKind::InvalidInput)?)?.cast();
        Ok(Self { base, len, _owns: PhantomData })
    }

    /// Make all elements zeros again, and give their pages back.
    pub fn clear(&mut self) {
        let bytes = self.len * size_of::<T>();
        // SAFETY: our own private mapping, borrowed exclusively; zeros are values of T.
        unsafe {
            if libc::madvise(self.base.as_ptr().cast(), bytes, libc::MADV_DONTNEED) != 0 {
                ptr::write_bytes(self.base.as_ptr(), 0, self.len); // the pages are locked
            }
        }
    }
}

impl<T> Deref for Zeroed<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements, zeros at first, which are values.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Zeroed<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above; borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }
}

impl<T> Drop for Zeroed<T> {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; the elements need no dropping.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len * size_of::<T>()) };
    }
}

/// Fresh private memory: zeros.
pub(super) fn map(bytes: usize) -> io::Result<NonNull<u8>> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping.
    let map = unsafe { libc::mmap(ptr::null_mut(), bytes, prot, flags, -1, 0) };
    if map == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(map.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// A place of zeros that is to become a `T`.
pub struct Vacant<'a, T>(*mut T, PhantomData<&'a mut T>);

impl<T> Vacant<'_, T> {
    /// A place.
    ///
    /// # Safety
    /// `place` is aligned, all zeros, and nobody else's for the lifetime.
    pub unsafe fn new(place: *mut T) -> Self {
        Self(place, PhantomData)
    }

    /// Where it is.
    #[must_use]
    pub fn pointer(&self) -> *mut T {
        self.0
    }
}

/// A field that stays zeros.
pub fn stays_zeros<T: Zeros>(_field: *const T) {}

/// Make a struct in a [`Vacant`] place, field by field: from values; by functions that build a
/// field in its own place; and such as stay zeros.  Every field has to be named, as in a literal.
macro_rules! build {
    ($place:expr, $type:ident {
        $($field:ident: $value:expr,)*
        ; in place $($wide:ident: $build:expr,)*
        ; zeros $($zero:ident,)*
    }) => {{
        let _ = |$type { $($field: _,)* $($wide: _,)* $($zero: _,)* }: $type| ();
        let at = $crate::dbt::zeroed::Vacant::<'_, $type>::pointer(&$place);
        match ($($value,)*) {
            // SAFETY: the place is aligned, zeros and ours; every field is written, built or is one
            // of which zeros are a value.
            ($($field,)*) => unsafe {
                $((&raw mut (*at).$field).write($field);)*
                $(let _ = $build($crate::dbt::zeroed::Vacant::new(&raw mut (*at).$wide));)*
                $($crate::dbt::zeroed::stays_zeros(&raw const (*at).$zero);)*
                &mut *at
            },
        }
    }};
}
pub(crate) use build;

#[cfg(test)]
mod tests {
    use super::*;

    fn resident(table: &[u64]) -> usize {
        let mut pages = vec![0_u8; table.len() / 512];
        let base = table.as_ptr().cast_mut().cast();
        // SAFETY: a query about a mapping of that length.
        assert_eq!(0, unsafe { libc::mincore(base, table.len() * 8, pages.as_mut_ptr()) });
        pages.iter().filter(|p| **p & 1 != 0).count()
    }

    #[test]
    fn a_table_costs_what_is_written_and_is_given_back() {
        let mut table = Zeroed::<u64>::new(512 * 64).unwrap();
        assert!(table.iter().all(|w| *w == 0));
        table.clear();
        assert_eq!(0, resident(&table));
        (table[5], table[512 * 63]) = (7, 8);
        assert_eq!(2, resident(&table));
        table.clear();
        assert_eq!((0, 0, 0), (resident(&table), table[5], table[512 * 63]));
    }

    #[test]
    fn the_default_instruction_is_all_zeros() {
        let insn = iced_x86::Instruction::default();
        let len = size_of::<iced_x86::Instruction>();
        // SAFETY: a live value of that size, of which the decoder initialises every byte.
        let bytes = unsafe { std::slice::from_raw_parts((&raw const insn).cast::<u8>(), len) };
        assert!(bytes.iter().all(|b| *b == 0));
    }

    #[test]
    fn a_struct_is_built_where_it_is() {
        struct Big {
            name: String,
            table: [u64; 4096],
        }
        let mut room = Zeroed::<u64>::new(size_of::<Big>().div_ceil(8)).unwrap();
        // SAFETY: aligned zeros, ours.
        let vacant = unsafe { Vacant::new(room.as_mut_ptr().cast::<Big>()) };
        let big = build!(vacant, Big { name: "big".to_owned(), ; in place ; zeros table, });
        assert_eq!(("big", 0), (big.name.as_str(), big.table[4095]));
        // SAFETY: built above, dropped once.
        unsafe { ptr::drop_in_place(big) };
    }
}
