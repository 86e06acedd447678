//! Each test is a sentence of the manual.
use proptest::prelude::*;

use super::{LocalApic, base};

const SVR: u32 = 0xF0;
const EOI: u32 = 0xB0;
const TPR: u32 = 0x80;
const ESR: u32 = 0x280;
const ICR: u32 = 0x300;
const LVT_TIMER: u32 = 0x320;
const LVT_LINT0: u32 = 0x350;
const LVT_LINT1: u32 = 0x360;
const LVT_ERROR: u32 = 0x370;
const INITIAL: u32 = 0x380;
const CURRENT: u32 = 0x390;
const DIVIDE: u32 = 0x3E0;
const BASE: u32 = 0x1B;
const DEADLINE: u32 = 0x6E0;
/// Divide by 1.
const BY_1: u32 = 0xB;
const MODES: u64 = base::ENABLE | base::X2APIC;

fn enabled() -> LocalApic {
    let mut a = LocalApic::new(3, true);
    a.write(SVR, 0x1FF, 0);
    a
}

fn x2apic() -> LocalApic {
    let mut a = enabled();
    assert_eq!(Some(None), a.wrmsr(BASE, base::RESET | MODES, 0));
    a
}

#[test]
fn after_reset_the_apic_is_enabled_in_the_base_register_but_not_in_svr() {
    let mut a = LocalApic::new(0, true);
    assert_eq!(Some(0xFEE0_0900), a.rdmsr(BASE, 0));
    assert_eq!((0xFF, 0x5_0014, 0x1_0000), (a.read(SVR, 0), a.read(0x30, 0), a.read(LVT_TIMER, 0)));
    a.raise_vector(0x40, false);
    assert_eq!(None, a.pending());
    assert_eq!(base::RESET | base::ENABLE, LocalApic::new(1, false).base());
}

#[test]
fn an_interrupt_goes_from_irr_to_isr_and_ends_with_eoi() {
    let mut a = enabled();
    a.raise_vector(0x41, false);
    assert_eq!(2, a.read(0x220, 0));
    assert_eq!((Some(0x41), Some(0x41)), (a.pending(), a.accept()));
    assert_eq!((0, 2), (a.read(0x220, 0), a.read(0x120, 0)));
    a.write(EOI, 0, 0);
    assert_eq!(0, a.read(0x120, 0));
}

#[test]
fn only_a_higher_priority_class_interrupts_what_is_in_service() {
    let mut a = enabled();
    a.raise_vector(0x45, false);
    a.accept();
    a.raise_vector(0x4F, false);
    assert_eq!((None, 0x40), (a.pending(), a.ppr()));
    a.raise_vector(0x50, false);
    assert_eq!(Some(0x50), a.accept());
    a.write(EOI, 0, 0);
    a.write(EOI, 0, 0);
    assert_eq!(Some(0x4F), a.pending());
}

#[test]
fn the_task_priority_blocks_its_own_class_and_those_below() {
    let mut a = enabled();
    a.raise_vector(0x50, false);
    a.write(TPR, 0x5F, 0);
    assert_eq!((None, 0x5F), (a.pending(), a.read(0xA0, 0)));
    a.set_tpr(0x4F);
    assert_eq!((Some(0x50), 0x4F), (a.pending(), a.tpr()));
}

#[test]
fn only_the_end_of_a_level_triggered_interrupt_is_broadcast() {
    let mut a = enabled();
    a.raise_vector(0x61, true);
    a.raise_vector(0x52, false);
    for _ in 0..2 {
        a.accept();
    }
    assert_eq!((2, Vec::<u8>::new()), (a.read(0x1B0, 0), a.take_eois()));
    a.write(EOI, 0, 0);
    a.accept();
    a.write(EOI, 0, 0);
    assert_eq!((vec![0x61], vec![]), (a.take_eois(), a.take_eois()));
}

#[test]
fn an_end_is_quiet_if_no_other_waits_and_no_io_apic_is_told() {
    let mut a = enabled();
    assert!(!a.ends_quietly());
    a.raise_vector(0x52, false);
    assert!(!a.ends_quietly());
    a.accept();
    assert!(a.ends_quietly());
    a.raise_vector(0x31, false); // of a lower class
    assert!(!a.ends_quietly());
    a.write(EOI, 0, 0);
    a.accept();
    assert!(a.ends_quietly());
    a.raise_vector(0x61, true);
    a.accept();
    assert!(!a.ends_quietly());
}

#[test]
fn a_vector_below_16_is_an_error_and_no_interrupt() {
    let mut a = enabled();
    a.write(LVT_ERROR, 0xFE, 0);
    a.raise_vector(15, false);
    assert_eq!((0, Some(0xFE)), (a.read(ESR, 0), a.pending()));
    a.write(ESR, 0, 0);
    assert_eq!(1 << 6, a.read(ESR, 0));
    a.write(ICR, 0x4000F, 0); // self, vector 15
    a.read(0x10, 0); // a reserved register
    a.write(ESR, 0, 0);
    assert_eq!(1 << 5 | 1 << 7, a.read(ESR, 0));
    a.write(ESR, 0, 0);
    assert_eq!(0, a.read(ESR, 0));
}

#[test]
fn software_disabling_masks_every_local_vector_and_keeps_it_so() {
    let mut a = enabled();
    a.write(LVT_TIMER, 0x40, 0);
    a.write(SVR, 0xFF, 0);
    assert_eq!(0x1_0040, a.read(LVT_TIMER, 0));
    a.write(LVT_TIMER, 0x40, 0);
    assert_eq!(0x1_0040, a.read(LVT_TIMER, 0));
}

#[test]
fn a_one_shot_timer_counts_down_by_its_divider_and_stops() {
    let mut a = enabled();
    a.write(LVT_TIMER, 0x40, 100);
    a.write(DIVIDE, 0x3, 100); // by 16
    a.write(INITIAL, 10, 100);
    assert_eq!((260, 10, 5), (a.deadline(), a.read(CURRENT, 100), a.read(CURRENT, 180)));
    a.tick(259);
    assert_eq!(None, a.pending());
    a.tick(260);
    assert_eq!((Some(0x40), u64::MAX, 0), (a.accept(), a.deadline(), a.read(CURRENT, 300)));
}

#[test]
fn a_periodic_timer_reloads_and_missed_periods_are_one_interrupt() {
    let mut a = enabled();
    a.write(LVT_TIMER, 0x2_0040, 0);
    a.write(DIVIDE, BY_1, 0);
    a.write(INITIAL, 1000, 0);
    a.tick(5500);
    assert_eq!((Some(0x40), None, 6000), (a.accept(), a.pending(), a.deadline()));
    assert_eq!(400, a.read(CURRENT, 5600));
    a.write(INITIAL, 0, 5600);
    assert_eq!(u64::MAX, a.deadline());
}

#[test]
fn a_shorter_period_than_anyone_can_look_costs_no_time() {
    let mut a = enabled();
    a.write(LVT_TIMER, 0x2_0040, 0);
    a.write(DIVIDE, BY_1, 0);
    a.write(INITIAL, 1, 0);
    a.tick(1 << 62);
    assert_eq!((Some(0x40), (1 << 62) + 1), (a.pending(), a.deadline()));
}

#[test]
fn changing_the_divider_keeps_the_counts_left() {
    let mut a = enabled();
    a.write(LVT_TIMER, 0x40, 0);
    a.write(DIVIDE, BY_1, 0);
    a.write(INITIAL, 100, 0);
    a.write(DIVIDE, 0, 40); // by 2
    assert_eq!((60, 160), (a.read(CURRENT, 40), a.deadline()));
}

#[test]
fn the_tsc_deadline_disarms_itself_and_is_deaf_in_other_modes() {
    let mut a = enabled();
    assert_eq!(Some(None), a.wrmsr(DEADLINE, 500, 0));
    assert_eq!((Some(0), u64::MAX), (a.rdmsr(DEADLINE, 0), a.deadline()));
    a.write(LVT_TIMER, 0x4_0040, 0);
    a.wrmsr(DEADLINE, 500, 0);
    a.write(INITIAL, 7, 0);
    assert_eq!((Some(500), 500, 0), (a.rdmsr(DEADLINE, 1), a.deadline(), a.read(INITIAL, 1)));
    a.tick(500);
    assert_eq!((Some(0x40), Some(0)), (a.accept(), a.rdmsr(DEADLINE, 500)));
    a.write(EOI, 0, 500);
    a.wrmsr(DEADLINE, 400, 500); // already past
    assert_eq!(Some(0x40), a.pending());
}

#[test]
fn leaving_tsc_deadline_mode_disarms_the_timer() {
    let mut a = enabled();
    a.write(LVT_TIMER, 0x4_0040, 0);
    a.wrmsr(DEADLINE, 500, 0);
    a.write(LVT_TIMER, 0x40, 0);
    assert_eq!(u64::MAX, a.deadline());
}

#[test]
fn a_masked_timer_runs_silently() {
    let mut a = enabled();
    a.write(LVT_TIMER, 0x1_0040, 0);
    a.write(DIVIDE, BY_1, 0);
    a.write(INITIAL, 100, 0);
    assert_eq!((u64::MAX, 40), (a.deadline(), a.read(CURRENT, 60)));
    a.write(LVT_TIMER, 0x40, 150);
    assert_eq!((None, u64::MAX), (a.pending(), a.deadline()));
}

#[test]
fn a_self_ipi_arrives_inside_and_others_leave() {
    let mut a = enabled();
    assert_eq!(None, a.write(ICR, 0x4_0041, 0));
    assert_eq!(Some(0x41), a.accept());
    a.write(0x310, 5 << 24, 0);
    assert_eq!(Some(5 << 56 | 0x4051), a.write(ICR, 0x4051, 0));
    assert_eq!(None, a.pending());
    a.write(0x310, 3 << 24, 0);
    assert_eq!((None, Some(0x52)), (a.write(ICR, 0x4052, 0), a.accept()));
    // All including self: the own share is done, the rest is the caller's.
    assert_eq!((true, Some(0x63)), (a.write(ICR, 0x8_4063, 0).is_some(), a.accept()));
    assert_eq!((true, None), (a.write(ICR, 0xC_4073, 0).is_some(), a.pending()));
}

#[test]
fn init_and_start_up_leave_and_a_deassert_does_nothing() {
    let mut a = enabled();
    assert_eq!(Some(0xC_4500), a.write(ICR, 0xC_4500, 0));
    assert_eq!(Some(0xC_4609), a.write(ICR, 0xC_4609, 0));
    assert_eq!(None, a.write(ICR, 0xC_8500, 0));
}

#[test]
fn logical_destinations_match_flat_and_cluster_ids() {
    let mut a = enabled();
    a.write(0xD0, 0x21 << 24, 0);
    let mut to = |dfr: u32, destination: u32| {
        a.write(0xE0, dfr, 0);
        a.write(0x310, destination << 24, 0);
        a.write(ICR, 0x4841, 0);
        let arrived = a.accept().is_some();
        a.write(EOI, 0, 0);
        arrived
    };
    assert_eq!([true, false], [to(u32::MAX, 0x20), to(u32::MAX, 0x12)]);
    assert_eq!([true, false, false], [to(0, 0x23), to(0, 0x31), to(0, 0x22)]);
}

#[test]
fn illegal_transitions_of_the_base_register_fault() {
    let mut a = LocalApic::new(0, true);
    let r = base::RESET;
    assert_eq!(None, a.wrmsr(BASE, r | base::X2APIC, 0));
    assert_eq!(None, a.wrmsr(BASE, r | base::ENABLE | 1, 0));
    assert_eq!(None, a.wrmsr(BASE, 1 << 60 | base::ENABLE, 0));
    assert_eq!(Some(None), a.wrmsr(BASE, r | MODES, 0));
    assert_eq!(None, a.wrmsr(BASE, r | base::ENABLE, 0));
    assert_eq!(Some(None), a.wrmsr(BASE, r, 0));
    assert_eq!(None, a.wrmsr(BASE, r | MODES, 0));
    assert_eq!(Some(None), a.wrmsr(BASE, r | base::ENABLE, 0));
}

#[test]
fn a_disabled_apic_forgets_its_state_and_lets_extint_through() {
    let mut a = enabled();
    a.raise_vector(0x40, false);
    assert!(!a.is_extint_open());
    a.wrmsr(BASE, base::RESET, 0);
    assert_eq!((true, None, u32::MAX), (a.is_extint_open(), a.pending(), a.read(SVR, 0)));
    a.wrmsr(BASE, base::RESET | base::ENABLE, 0);
    assert_eq!(0xFF, a.read(SVR, 0));
}

#[test]
fn x2apic_registers_are_msrs_with_checked_reserved_bits() {
    let mut a = enabled();
    assert_eq!(None, a.rdmsr(0x808, 0));
    a = x2apic();
    assert_eq!((None, u32::MAX), (a.page(), a.read(SVR, 0)));
    assert_eq!((Some(3), Some(8)), (a.rdmsr(0x802, 0), a.rdmsr(0x80D, 0)));
    for (index, value) in [(0x80B, 1), (0x808, 0x100), (0x828, 1), (0x802, 0), (0x82F, 0), (0x832, 1 << 20)] {
        assert_eq!(None, a.wrmsr(index, value, 0), "{index:#x}");
    }
    for index in [0x809, 0x80B, 0x80E, 0x831, 0x83F, 0x82F, 0x8FF] {
        assert_eq!(None, a.rdmsr(index, 0), "{index:#x}");
    }
    assert_eq!(Some(Some(7 << 32 | 0x41)), a.wrmsr(0x830, 7 << 32 | 0x41, 0));
    assert_eq!((Some(None), Some(0x42)), (a.wrmsr(0x83F, 0x42, 0), a.accept()));
    assert_eq!(Some(None), a.wrmsr(0x80B, 0, 0));
    assert_eq!(Some(0), a.rdmsr(0x812, 0));
}

#[test]
fn lint0_as_extint_opens_the_way_for_the_8259() {
    let mut a = enabled();
    assert!(!a.is_extint_open());
    a.write(LVT_LINT0, 0x700, 0);
    assert!(a.is_extint_open());
    a.write(SVR, 0xFF, 0);
    assert!(!a.is_extint_open());
}

#[test]
fn lint1_as_nmi_tells_the_processor_once_an_edge() {
    let mut a = enabled();
    a.write(LVT_LINT1, 0x400, 0);
    a.lint(1, true);
    assert!(a.take_nmi() && !a.take_nmi());
    a.lint(1, true);
    assert!(!a.take_nmi());
}

#[test]
fn a_level_on_lint0_comes_again_until_it_is_gone() {
    let mut a = enabled();
    a.write(LVT_LINT0, 0x8041, 0);
    a.lint(0, true);
    assert_eq!((Some(0x41), 0xC041), (a.accept(), a.read(LVT_LINT0, 0)));
    a.write(EOI, 0, 0);
    assert_eq!(Some(0x41), a.accept());
    a.lint(0, false);
    a.write(EOI, 0, 0);
    assert_eq!((None, 0x8041), (a.pending(), a.read(LVT_LINT0, 0)));
}

#[derive(Clone, Debug)]
enum Act {
    Read(u32),
    Write(u32, u32),
    Rdmsr(u32),
    Wrmsr(u32, u64),
    Raise(u8, bool),
    Lint(usize, bool),
    Accept,
    Tick,
}

fn act() -> impl Strategy<Value = Act> {
    let offset = prop_oneof![(0_u32..0x40).prop_map(|n| n * 16), any::<u32>()];
    let index = prop_oneof![Just(BASE), Just(DEADLINE), 0x800_u32..0x840, any::<u32>()];
    let value = prop_oneof![0_u64..0x1000, any::<u64>(), Just(base::RESET | MODES), Just(base::RESET)];
    prop_oneof![
        offset.clone().prop_map(Act::Read),
        (offset, any::<u32>()).prop_map(|(o, v)| Act::Write(o, v)),
        index.clone().prop_map(Act::Rdmsr),
        (index, value).prop_map(|(i, v)| Act::Wrmsr(i, v)),
        (any::<u8>(), any::<bool>()).prop_map(|(v, l)| Act::Raise(v, l)),
        (0_usize..3, any::<bool>()).prop_map(|(p, a)| Act::Lint(p, a)),
        Just(Act::Accept),
        Just(Act::Tick),
    ]
}

proptest! {
    #[test]
    fn whatever_software_does_the_invariants_hold(
        acts in prop::collection::vec((act(), 0_u64..u64::MAX / 64), 0..64)
    ) {
        let (mut a, mut now) = (enabled(), 0_u64);
        for (act, time) in acts {
            now += time;
            match act {
                Act::Read(o) => { a.read(o, now); }
                Act::Write(o, v) => { a.write(o, v, now); }
                Act::Rdmsr(i) => { a.rdmsr(i, now); }
                Act::Wrmsr(i, v) => { a.wrmsr(i, v, now); }
                Act::Raise(v, l) => a.raise_vector(v, l),
                Act::Lint(p, on) => a.lint(p, on),
                Act::Accept => {
                    let (pending, ppr) = (a.pending(), a.ppr());
                    let v = a.accept();
                    prop_assert_eq!(pending, v);
                    prop_assert!(v.is_none_or(|v| v > 15 && v >> 4 > ppr >> 4));
                }
                Act::Tick => {
                    a.tick(now);
                    prop_assert!(a.deadline() > now);
                }
            }
            prop_assert!(a.is_software_enabled() || a.lvt.iter().all(|e| e & super::lvt::MASKED != 0));
            prop_assert_eq!(Some(a.clone()), LocalApic::from_words(&a.to_words()));
        }
    }
}
