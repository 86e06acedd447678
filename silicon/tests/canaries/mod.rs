//! Pages of this process at every place to which an access might lead that leaves a guest's windows.

use std::collections::BTreeSet;

const PAGE: u64 = 4096;
/// What is at an address, but for the address itself.
const CANARY: u64 = 0xCA4A_12E5_5EED_B12D;

/// The pages; each word of them differs from every other.
pub struct Canaries(Vec<u64>);

impl Canaries {
    /// At these addresses, where nothing is yet.
    pub fn at(addresses: impl IntoIterator<Item = u64>) -> Self {
        let wanted: BTreeSet<u64> = addresses.into_iter().map(|a| a & !(PAGE - 1)).collect();
        let pages = wanted.into_iter().filter(|page| (1 << 16..1 << 47).contains(page));
        Self(pages.filter(|&page| place(page)).collect())
    }

    /// How many pages there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The words that are not as they were.
    pub fn disturbed(&self) -> Vec<u64> {
        // SAFETY: these pages are ours, and hold words.
        let is_other = |&at: &u64| unsafe { std::ptr::read_volatile(at as *const u64) } != at ^ CANARY;
        self.words().filter(is_other).collect()
    }

    fn words(&self) -> impl Iterator<Item = u64> {
        self.0.iter().flat_map(|page| (0..PAGE / 8).map(move |i| page + 8 * i))
    }
}

/// Map a page there and fill it, if nothing is there.
fn place(page: u64) -> bool {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let flags = flags | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: over nobody's addresses.
    let at = unsafe { libc::mmap(page as *mut libc::c_void, PAGE as usize, prot, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return false;
    }
    assert_eq!(page, at as u64, "this kernel takes an address for a wish");
    for word in (0..PAGE / 8).map(|i| page + 8 * i) {
        // SAFETY: in the page that was mapped just now.
        unsafe { std::ptr::write_volatile(word as *mut u64, word ^ CANARY) };
    }
    true
}

impl Drop for Canaries {
    fn drop(&mut self) {
        for &page in &self.0 {
            // SAFETY: mapped in `at`.
            unsafe { libc::munmap(page as *mut libc::c_void, PAGE as usize) };
        }
    }
}
