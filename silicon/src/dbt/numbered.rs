//! Lists whose elements generated code and other lists name by number.
//!
//! A list has a part for each region of the code cache ([`super::cache`]): what belongs to code in
//! a region is forgotten with it, and the other numbers stay.

use std::ops::{Index, IndexMut};

use super::cache::REGIONS;

/// Bits of a number that tell the element in its part.  (An element stands for a byte of code at
/// least, so that a region has no more of them.)
const BITS: u32 = 28;

/// The region that a number's element belongs to.
#[must_use]
pub fn region_of(number: u32) -> usize {
    (number >> BITS) as usize
}

/// A list in parts.
#[derive(Debug)]
pub struct Numbered<T> {
    parts: [Vec<T>; REGIONS],
    now: usize,
}

impl<T> Default for Numbered<T> {
    /// Nothing yet.
    fn default() -> Self {
        Self { parts: [const { Vec::new() }; REGIONS], now: 0 }
    }
}

impl<T> Numbered<T> {
    /// Forget what belongs to a region, and go on there.
    pub fn begin(&mut self, region: usize) {
        self.parts[region].clear();
        self.now = region;
    }

    /// The number of the next element.
    #[must_use]
    pub fn next(&self) -> u32 {
        (self.now as u32) << BITS | self.parts[self.now].len() as u32
    }

    /// Append an element; its number.
    pub fn push(&mut self, element: T) -> u32 {
        let number = self.next();
        self.parts[self.now].push(element);
        number
    }

    /// An element, if there is one with that number.
    #[must_use]
    pub fn get(&self, number: u32) -> Option<&T> {
        self.parts.get(region_of(number))?.get(number as usize & ((1 << BITS) - 1))
    }

    /// The same, to change it.
    pub fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        self.parts.get_mut(region_of(number))?.get_mut(number as usize & ((1 << BITS) - 1))
    }

    /// What belongs to a region.
    #[must_use]
    pub fn part(&self, region: usize) -> &[T] {
        &self.parts[region]
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.parts.iter().map(Vec::len).sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of what belongs to a region.
    #[must_use]
    pub fn bytes(&self, region: usize) -> usize {
        self.parts[region].len() * size_of::<T>()
    }
}

impl<T> Index<u32> for Numbered<T> {
    type Output = T;
    fn index(&self, number: u32) -> &T {
        &self.parts[region_of(number)][number as usize & ((1 << BITS) - 1)]
    }
}

impl<T> IndexMut<u32> for Numbered<T> {
    fn index_mut(&mut self, number: u32) -> &mut T {
        &mut self.parts[region_of(number)][number as usize & ((1 << BITS) - 1)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_forgotten_and_the_other_numbers_stay() {
        let mut list = Numbered::default();
        let a = list.push('a');
        list.begin(1);
        let b = list.push('b');
        assert_eq!((0, 1, 2), (region_of(a), region_of(b), list.len()));
        assert_eq!(('a', 'b', list.next()), (list[a], list[b], b + 1));
        list.begin(0);
        assert_eq!((None, Some(&'b'), a), (list.get(a), list.get(b), list.next()));
        assert_eq!((None, &[][..]), (list.get(u32::MAX), list.part(0)));
    }
}
