//! The paging formats as data (SDM 3A, "Paging"; SDM 3C, "The Extended Page Table Mechanism").

/// One level of a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// The number counted and shown: 1 is the table whose entries map 4-KByte pages.
    pub number: u8,
    /// Lowest address bit that this level's index uses.
    pub shift: u8,
    /// How many bits the index has.
    pub bits: u8,
    /// Whether an entry here may map a page itself (PS, or EPT bit 7).
    pub may_map: bool,
}

/// A paging format.
#[derive(Debug, PartialEq, Eq)]
pub struct Format {
    /// As the SDM calls it.
    pub name: &'static str,
    /// From the root down.
    pub levels: &'static [Level],
    /// Bytes of an entry: 4 or 8.
    pub entry_bytes: u8,
    /// Whether entries carry permissions at this format's top levels (PAE PDPTEs do not).
    pub is_pae: bool,
}

const fn level(number: u8, shift: u8, bits: u8, may_map: bool) -> Level {
    Level { number, shift, bits, may_map }
}

/// "32-Bit Paging": 4-KByte and (CR4.PSE) 4-MByte pages.
pub static IA32: Format = Format {
    name: "32-bit paging",
    levels: &[level(2, 22, 10, true), level(1, 12, 10, false)],
    entry_bytes: 4,
    is_pae: false,
};

/// "PAE Paging": the four PDPTEs are registers; the walk in memory begins at the directory.
pub static PAE: Format = Format {
    name: "PAE paging",
    levels: &[level(2, 21, 9, true), level(1, 12, 9, false)],
    entry_bytes: 8,
    is_pae: true,
};

/// "4-Level Paging": 4-KByte, 2-MByte and 1-GByte pages.
pub static LEVEL4: Format = Format {
    name: "4-level paging",
    levels: &[level(4, 39, 9, false), level(3, 30, 9, true), level(2, 21, 9, true), level(1, 12, 9, false)],
    entry_bytes: 8,
    is_pae: false,
};

/// "5-Level Paging".
pub static LEVEL5: Format = Format {
    name: "5-level paging",
    levels: &[
        level(5, 48, 9, false),
        level(4, 39, 9, false),
        level(3, 30, 9, true),
        level(2, 21, 9, true),
        level(1, 12, 9, false),
    ],
    entry_bytes: 8,
    is_pae: false,
};

/// EPT with a page-walk length of 4.
pub static EPT: Format = Format { name: "EPT", ..LEVEL4 };

/// EPT with a page-walk length of 5.
pub static EPT5: Format = Format { name: "EPT, 5 levels", ..LEVEL5 };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_bits_of_every_format_tile_its_address() {
        for (f, top) in [(&IA32, 32), (&PAE, 30), (&LEVEL4, 48), (&LEVEL5, 57), (&EPT, 48), (&EPT5, 57)] {
            let mut below = top;
            for l in f.levels {
                assert_eq!(below, l.shift + l.bits, "{} level {}", f.name, l.number);
                below = l.shift;
            }
            assert_eq!(12, below);
        }
    }
}
