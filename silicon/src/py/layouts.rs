//! `LAYOUTS`: the bit layouts of this half, for the test that both halves agree.

use crate::arch::bits::{cr0, cr4, efer, pte, rflags};
use crate::arch::exception::pf;
use crate::arch::segment::attr;

/// EPT entries, with the large-page bit called as in other tables.
mod ept {
    pub use crate::arch::bits::ept::{A, D, LARGE as PS, R, W, X};
}

/// A field: name, high bit, low bit.
pub type Field = (&'static str, u32, u32);

fn field(name: &'static str, mask: u64) -> Field {
    (name, mask.ilog2(), mask.trailing_zeros())
}

/// All layouts by name, each from its highest field to its lowest.
pub fn layouts() -> Vec<(&'static str, Vec<Field>)> {
    macro_rules! table {
        ($($name:literal: $module:ident [$($bit:ident)*]),* $(,)?) => {
            vec![$(($name, vec![$(field(stringify!($bit), u64::from($module::$bit))),*])),*]
        };
    }
    table![
        "CR0": cr0 [PG CD NW AM WP NE ET TS EM MP PE],
        "CR4": cr4 [SMAP SMEP OSXSAVE PCIDE FSGSBASE VMXE UMIP OSXMMEXCPT OSFXSR PCE PGE MCE PAE
                    PSE DE TSD PVI VME],
        "EFER": efer [NXE LMA LME SCE],
        "RFLAGS": rflags [ID VIP VIF AC VM RF NT IOPL OF DF IF TF SF ZF AF PF CF],
        "PTE": pte [XD G PS D A US RW P],
        "EPT": ept [D A PS X W R],
        "PF": pf [I RSVD U W P],
        "ACCESS_RIGHTS": attr [UNUSABLE G DB L AVL P S TYPE],
    ]
}
