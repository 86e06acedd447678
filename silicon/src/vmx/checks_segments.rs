//! Checks on guest segment registers (SDM 3C, "Checks on Guest Segment Registers"), in the
//! manual's order.

use crate::arch::segment::{Segment, attr, seg};
use crate::vmx::checks::{Broken, is_canonical, rule};

/// What the rules depend on beside the registers themselves.
pub(crate) struct Circumstances {
    /// The guest will be in virtual-8086 mode.
    pub v86: bool,
    /// "Unrestricted guest".
    pub unrestricted: bool,
    /// "IA-32e mode guest".
    pub long: bool,
    /// CR0.PE.
    pub protected: bool,
}

const RESERVED: u32 = 0xFFFE_0F00;

fn granularity_fits(s: &Segment) -> bool {
    let g = s.has(attr::G);
    !(g && s.limit & 0xFFF != 0xFFF) && (g || s.limit & 0xFFF0_0000 == 0)
}

/// Check ES CS SS DS FS GS, LDTR and TR.
pub(crate) fn check(
    segs: &[Segment; 6],
    ldtr: &Segment,
    tr: &Segment,
    c: &Circumstances,
) -> Result<(), Broken> {
    let (cs, ss) = (&segs[seg::CS], &segs[seg::SS]);
    let has_ldt = !ldtr.is_unusable();
    rule(tr.selector & 4 == 0, "guest TR: TI must be 0")?;
    rule(!has_ldt || ldtr.selector & 4 == 0, "guest LDTR: TI must be 0")?;
    if !c.v86 && !c.unrestricted {
        rule(ss.rpl() == cs.rpl(), "guest SS.RPL must equal CS.RPL")?;
    }
    if c.v86 {
        let shifted = segs.iter().all(|s| s.base == u64::from(s.selector) << 4);
        rule(shifted, "guest segment bases must be selector * 16 in virtual-8086 mode")?;
    }
    let canonical = [tr.base, segs[seg::FS].base, segs[seg::GS].base].iter().all(|&b| is_canonical(b));
    rule(canonical, "guest TR, FS and GS bases must be canonical")?;
    rule(!has_ldt || is_canonical(ldtr.base), "guest LDTR base must be canonical")?;
    rule(cs.base >> 32 == 0, "bits 63:32 of the guest CS base must be 0")?;
    let low = [seg::SS, seg::DS, seg::ES].iter().all(|&i| segs[i].is_unusable() || segs[i].base >> 32 == 0);
    rule(low, "bits 63:32 of the guest SS, DS and ES bases must be 0")?;
    if c.v86 {
        rule(
            segs.iter().all(|s| s.limit == 0xFFFF),
            "guest segment limits must be FFFFH in virtual-8086 mode",
        )?;
        rule(segs.iter().all(|s| s.attr == 0xF3), "guest access rights must be F3H in virtual-8086 mode")?;
    } else {
        code(cs, ss, c)?;
        stack(cs, ss, c)?;
        for i in [seg::DS, seg::ES, seg::FS, seg::GS] {
            data(&segs[i], c)?;
        }
    }
    task(tr, c)?;
    if has_ldt { local(ldtr) } else { Ok(()) }
}

fn code(cs: &Segment, ss: &Segment, c: &Circumstances) -> Result<(), Broken> {
    let kind = cs.attr & attr::TYPE;
    let fits = matches!(kind, 9 | 11 | 13 | 15) || kind == 3 && c.unrestricted;
    rule(fits, "guest CS: the type must be accessed code (or 3 for an unrestricted guest)")?;
    rule(cs.has(attr::S), "guest CS: S must be 1")?;
    let dpl = match kind {
        3 => cs.dpl() == 0,
        9 | 11 => cs.dpl() == ss.dpl(),
        _ => cs.dpl() <= ss.dpl(),
    };
    rule(dpl, "guest CS: DPL must fit SS.DPL")?;
    rule(cs.has(attr::P), "guest CS: P must be 1")?;
    rule(cs.attr & RESERVED == 0, "guest CS: reserved access rights must be 0")?;
    rule(!(c.long && cs.has(attr::L) && cs.has(attr::DB)), "guest CS: D must be 0 in 64-bit mode")?;
    rule(granularity_fits(cs), "guest CS: G must fit the limit")
}

fn stack(cs: &Segment, ss: &Segment, c: &Circumstances) -> Result<(), Broken> {
    let usable = !ss.is_unusable();
    rule(!usable || matches!(ss.attr & attr::TYPE, 3 | 7), "guest SS: the type must be 3 or 7")?;
    rule(!usable || ss.has(attr::S), "guest SS: S must be 1")?;
    rule(c.unrestricted || ss.dpl() == ss.rpl(), "guest SS: DPL must equal RPL")?;
    let real = cs.attr & attr::TYPE == 3 || !c.protected;
    rule(!real || ss.dpl() == 0, "guest SS: DPL must be 0 in real-address mode")?;
    rule(!usable || ss.has(attr::P), "guest SS: P must be 1")?;
    rule(!usable || ss.attr & RESERVED == 0, "guest SS: reserved access rights must be 0")?;
    rule(!usable || granularity_fits(ss), "guest SS: G must fit the limit")
}

fn data(s: &Segment, c: &Circumstances) -> Result<(), Broken> {
    if s.is_unusable() {
        return Ok(());
    }
    let kind = s.attr & attr::TYPE;
    rule(kind & 1 != 0, "guest data segment: the type must be accessed")?;
    rule(kind & 8 == 0 || kind & 2 != 0, "guest data segment: code must be readable")?;
    rule(s.has(attr::S), "guest data segment: S must be 1")?;
    if !c.unrestricted && kind <= 11 {
        rule(s.dpl() >= s.rpl(), "guest data segment: DPL must not be below RPL")?;
    }
    rule(s.has(attr::P), "guest data segment: P must be 1")?;
    rule(s.attr & RESERVED == 0, "guest data segment: reserved access rights must be 0")?;
    rule(granularity_fits(s), "guest data segment: G must fit the limit")
}

fn task(tr: &Segment, c: &Circumstances) -> Result<(), Broken> {
    let kind = tr.attr & attr::TYPE;
    rule(kind == 11 || kind == 3 && !c.long, "guest TR: the type must be a busy TSS")?;
    rule(!tr.has(attr::S), "guest TR: S must be 0")?;
    rule(tr.has(attr::P), "guest TR: P must be 1")?;
    rule(tr.attr & RESERVED == 0, "guest TR: reserved access rights must be 0")?;
    rule(granularity_fits(tr), "guest TR: G must fit the limit")?;
    rule(!tr.is_unusable(), "guest TR: must be usable")
}

fn local(ldtr: &Segment) -> Result<(), Broken> {
    rule(ldtr.attr & attr::TYPE == 2, "guest LDTR: the type must be 2")?;
    rule(!ldtr.has(attr::S), "guest LDTR: S must be 0")?;
    rule(ldtr.has(attr::P), "guest LDTR: P must be 1")?;
    rule(ldtr.attr & RESERVED == 0, "guest LDTR: reserved access rights must be 0")?;
    rule(granularity_fits(ldtr), "guest LDTR: G must fit the limit")
}
