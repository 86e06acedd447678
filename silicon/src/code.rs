//! Who holds translations of the code in a frame, and who wrote over it.
//!
//! One memory has many processors, each with an engine of its own.  An engine that translates code
//! *holds* the frame ([`Holder`]); a frame is marked while anybody does, and nobody can take away a
//! mark but who made it.  Whoever writes to a marked frame reports it with its own number; each
//! holder reads the others' reports from where it stopped reading, which is at first *now*.
//!
//! An engine may have the right to write to a frame without asking (its first level) from before
//! the frame was marked.  [`Holder::others_marked`] tells when to look for such rights.  So between
//! processors that take turns no write goes unnoticed; one that runs beside the holder in another
//! thread is noticed when its present slice ends.

use std::collections::VecDeque;
use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering::*};
use std::sync::{Arc, Mutex, PoisonError};

use crate::addr::AddressMap;
use crate::dbt::zeroed::Zeroed;
use crate::mem::Memory;

/// Writes that are remembered; who reads more seldom has to drop all code.
const REMEMBERED: usize = 4096;

/// The number of a writer that holds no translations.
pub const NOBODY: u32 = 0;

/// What was written of frames that hold code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Writes {
    /// These frames.
    Frames(Vec<u64>),
    /// More frames than are remembered: any.
    TooMany,
}

/// A memory's marks and reports.
pub struct Marks {
    /// By frame: how many hold translations of it.  (There are fewer engines than fit.)
    holders: Zeroed<AtomicU16>,
    /// How many holders there were.
    numbers: AtomicU32,
    /// How often a holder marked a frame.
    marked: AtomicU64,
    /// Reports: the frame, and the writer's number.
    writes: Mutex<VecDeque<(u64, u32)>>,
    /// How many reports there were.
    written: AtomicU64,
}

impl Marks {
    /// None, for so many frames.
    ///
    /// # Errors
    /// If the computer gives no addresses.
    pub fn new(frames: usize) -> io::Result<Self> {
        Ok(Self {
            holders: Zeroed::new(frames)?,
            numbers: AtomicU32::new(NOBODY),
            marked: AtomicU64::new(0),
            writes: Mutex::new(VecDeque::new()),
            written: AtomicU64::new(0),
        })
    }

    /// How many hold translations of code in this frame.
    #[inline]
    #[must_use]
    pub fn holders(&self, pfn: u64) -> u16 {
        self.holders.get(pfn as usize).map_or(0, |n| n.load(Relaxed))
    }

    /// Say that a marked frame was written by a holder, or by [`NOBODY`].
    #[cold]
    pub fn report(&self, pfn: u64, writer: u32) {
        let mut writes = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        if writes.len() == REMEMBERED {
            writes.pop_front();
        }
        writes.push_back((pfn, writer));
        self.written.fetch_add(1, Release);
    }

    /// The frames that others than `reader` reported since position `from`, and the new position.
    #[cold]
    fn read(&self, from: u64, reader: u32) -> (Writes, u64) {
        let writes = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.written.load(Acquire);
        let news = now.wrapping_sub(from) as usize;
        let Some(old) = writes.len().checked_sub(news) else { return (Writes::TooMany, now) };
        let others = writes.iter().skip(old).filter(|(_, writer)| *writer != reader);
        (Writes::Frames(others.map(|(pfn, _)| *pfn).collect()), now)
    }
}

/// The frames that one engine holds translations of, each with what it has there.  Dropping it
/// takes its marks away.
pub struct Holder<T> {
    mem: Arc<Memory>,
    number: u32,
    frames: AddressMap<u64, T>,
    /// How far the reports were read.
    read: u64,
    /// How many marks were looked at.
    seen: u64,
}

impl<T: Default> Holder<T> {
    /// Who holds nothing, and has read all that was reported.
    #[must_use]
    pub fn new(mem: Arc<Memory>) -> Self {
        let marks = mem.code();
        let number = marks.numbers.fetch_add(1, Relaxed) + 1;
        let (read, seen) = (marks.written.load(Acquire), marks.marked.load(Acquire));
        Self { number, frames: AddressMap::default(), read, seen, mem }
    }

    /// Hold a frame inside the memory; whether it is a new one, and what is there.
    pub fn hold(&mut self, pfn: u64) -> (bool, &mut T) {
        let mut is_new = false;
        let held = self.frames.entry(pfn).or_insert_with(|| {
            is_new = true;
            let marks = self.mem.code();
            marks.holders[pfn as usize].fetch_add(1, SeqCst);
            if marks.marked.fetch_add(1, SeqCst) == self.seen {
                self.seen += 1;
            }
            T::default()
        });
        (is_new, held)
    }

    /// What is held there.
    pub fn get_mut(&mut self, pfn: u64) -> Option<&mut T> {
        self.frames.get_mut(&pfn)
    }

    /// Hold a frame no longer.
    pub fn release(&mut self, pfn: u64) {
        if self.frames.remove(&pfn).is_some() {
            self.mem.code().holders[pfn as usize].fetch_sub(1, SeqCst);
        }
    }

    /// Hold nothing.
    pub fn release_all(&mut self) {
        let_go(&self.mem, self.frames.drain().map(|(pfn, _)| pfn));
    }

    /// This engine wrote to a marked frame: tell the others, if there are any.
    pub fn wrote(&self, pfn: u64) {
        let marks = self.mem.code();
        if marks.holders(pfn) > u16::from(self.frames.contains_key(&pfn)) {
            marks.report(pfn, self.number);
        }
    }

    /// What others wrote since the last time.
    #[inline]
    pub fn writes(&mut self) -> Writes {
        let marks = self.mem.code();
        if marks.written.load(Acquire) == self.read {
            return Writes::Frames(Vec::new());
        }
        let (writes, now) = marks.read(self.read, self.number);
        self.read = now;
        writes
    }

    /// Whether others have marked frames since the last time.
    #[inline]
    pub fn others_marked(&mut self) -> bool {
        let now = self.mem.code().marked.load(Acquire);
        std::mem::replace(&mut self.seen, now) != now
    }
}

impl<T> Deref for Holder<T> {
    type Target = AddressMap<u64, T>;
    fn deref(&self) -> &AddressMap<u64, T> {
        &self.frames
    }
}

impl<T> Drop for Holder<T> {
    fn drop(&mut self) {
        let_go(&self.mem, self.frames.keys().copied());
    }
}

fn let_go(mem: &Memory, frames: impl Iterator<Item = u64>) {
    for pfn in frames {
        mem.code().holders[pfn as usize].fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(mem: &Arc<Memory>) -> Holder<()> {
        Holder::new(mem.clone())
    }

    #[test]
    fn a_mark_stays_until_its_last_holder_lets_go() {
        let mem = Memory::new(1 << 16).unwrap();
        let (mut a, mut b) = (holder(&mem), holder(&mem));
        assert!(a.hold(3).0 && !a.hold(3).0 && b.hold(3).0);
        a.release(3);
        a.release(3);
        assert!(mem.is_code(3));
        a.hold(3);
        drop(b);
        assert!(mem.is_code(3));
        a.release_all();
        assert!(!mem.is_code(3));
    }

    #[test]
    fn each_holder_reads_what_others_wrote_once_and_nothing_of_before() {
        let mem = Memory::new(1 << 16).unwrap();
        let (mut a, mut b) = (holder(&mem), holder(&mem));
        a.hold(3);
        b.hold(3);
        mem.write_bytes(0x3004, &[1]);
        a.wrote(3);
        let mut late = holder(&mem);
        late.hold(3);
        assert_eq!(Writes::Frames(vec![3]), a.writes());
        assert_eq!(Writes::Frames(vec![3, 3]), b.writes());
        for all in [&mut a, &mut b, &mut late] {
            assert_eq!(Writes::Frames(vec![]), all.writes());
        }
    }

    #[test]
    fn who_is_alone_with_a_frame_tells_nobody() {
        let mem = Memory::new(1 << 16).unwrap();
        let mut a = holder(&mem);
        a.hold(3);
        a.wrote(3);
        assert_eq!(0, mem.code().written.load(Relaxed));
        let mut b = holder(&mem);
        b.hold(4);
        a.wrote(4);
        assert_eq!(Writes::Frames(vec![4]), b.writes());
    }

    #[test]
    fn who_reads_too_seldom_is_told_so() {
        let mem = Memory::new(1 << 16).unwrap();
        let mut a = holder(&mem);
        a.hold(3);
        for n in 0..=REMEMBERED {
            mem.fill(0x3000, 1, n as u8);
        }
        assert_eq!(Writes::TooMany, a.writes());
        assert_eq!(Writes::Frames(vec![]), a.writes());
    }

    #[test]
    fn marks_of_ones_own_are_no_news() {
        let mem = Memory::new(1 << 16).unwrap();
        let (mut a, mut b) = (holder(&mem), holder(&mem));
        a.hold(3);
        a.hold(4);
        assert!(!a.others_marked() && b.others_marked() && !b.others_marked());
        b.hold(4);
        a.hold(5);
        assert!(a.others_marked() && !a.others_marked());
    }
}
