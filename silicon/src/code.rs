//! Who holds translations of the code in a frame, and who wrote over it.
//!
//! One memory has many processors, each with an engine of its own.  An engine that translates code
//! *holds* the frame ([`Holder`]); a frame is marked while anybody does, and nobody can take away a
//! mark but who made it.  Whoever writes to a marked frame reports it with its own number; each
//! holder reads the others' reports from where it stopped reading, which is at first *now*.
//!
//! An engine may have the right to write to a frame without asking (its first level) from before
//! the frame was marked.  Marking is a change on the [`crate::bus`], and it gives such rights up as
//! it catches up.  Parallel processors note the frames that they may write to without asking
//! ([`Marks::grant`]), and who marks one of those waits for them: from then on no write of it goes
//! unnoticed.

use std::collections::VecDeque;
use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::*, fence};
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
    /// By frame: somebody has, or had, the right to write there without asking.
    granted: Zeroed<AtomicU8>,
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
            granted: Zeroed::new(frames)?,
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

    /// Note that a processor is about to have the right to write to a frame without asking; whether
    /// it may.
    #[must_use]
    pub fn grant(&self, pfn: u64) -> bool {
        let Some(granted) = self.granted.get(pfn as usize) else { return false };
        granted.store(1, Relaxed);
        fence(SeqCst); // either this is seen by who marks the frame, or the mark here
        self.holders(pfn) == 0
    }

    /// Whether anybody may have that right, for who has marked the frame.
    #[must_use]
    pub fn is_granted(&self, pfn: u64) -> bool {
        fence(SeqCst);
        self.granted.get(pfn as usize).is_some_and(|g| g.load(Relaxed) != 0)
    }

    /// Nobody has it any more, and nobody gets it while the frame is marked.
    pub fn revoke(&self, pfn: u64) {
        if let Some(granted) = self.granted.get(pfn as usize) {
            granted.store(0, Relaxed);
        }
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
}

impl<T: Default> Holder<T> {
    /// Who holds nothing, and has read all that was reported.
    #[must_use]
    pub fn new(mem: Arc<Memory>) -> Self {
        let marks = mem.code();
        let number = marks.numbers.fetch_add(1, Relaxed) + 1;
        let read = marks.written.load(Acquire);
        Self { number, frames: AddressMap::default(), read, mem }
    }

    /// Its number, which its reports carry.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Hold a frame inside the memory; whether it is a new one, and what is there.
    pub fn hold(&mut self, pfn: u64) -> (bool, &mut T) {
        let mut is_new = false;
        let held = self.frames.entry(pfn).or_insert_with(|| {
            is_new = true;
            self.mem.code().holders[pfn as usize].fetch_add(1, SeqCst);
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

    /// Whether others hold a frame, too.
    #[must_use]
    pub fn is_shared(&self, pfn: u64) -> bool {
        self.mem.code().holders(pfn) > u16::from(self.frames.contains_key(&pfn))
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
        mem.code().report(3, a.number());
        let mut late = holder(&mem);
        late.hold(3);
        assert_eq!(Writes::Frames(vec![3]), a.writes());
        assert_eq!(Writes::Frames(vec![3, 3]), b.writes());
        for all in [&mut a, &mut b, &mut late] {
            assert_eq!(Writes::Frames(vec![]), all.writes());
        }
    }

    #[test]
    fn who_is_alone_with_a_frame_shares_it_with_nobody() {
        let mem = Memory::new(1 << 16).unwrap();
        let (mut a, mut b) = (holder(&mem), holder(&mem));
        a.hold(3);
        b.hold(4);
        assert_eq!((false, true), (a.is_shared(3), a.is_shared(4)));
        a.hold(4);
        assert!(a.is_shared(4) && b.is_shared(4));
    }

    #[test]
    fn a_right_is_not_granted_on_a_marked_frame() {
        let mem = Memory::new(1 << 16).unwrap();
        let mut a = holder(&mem);
        assert!(mem.code().grant(3) && mem.code().is_granted(3) && !mem.code().is_granted(4));
        a.hold(3);
        mem.code().revoke(3);
        assert!(!mem.code().grant(3));
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
}
