//! Tests of the TLB.

use super::*;
use crate::cpu::testbed::real;

#[test]
fn an_empty_first_level_matches_no_address() {
    for (i, tag) in (0..L1_ENTRIES).map(|i| (i, empty(i).read)) {
        for high in [0u64, 1, 0xFFF, u64::MAX >> 20] {
            let gva = high << 20 | (i as u64) << 12;
            assert!(gva.wrapping_add(tag) > 4095);
            assert!((gva | 4095).wrapping_add(tag) > 4095);
        }
    }
}

#[test]
fn a_page_has_one_translation_in_a_space_and_a_set_has_room_for_others() {
    let mut core = real();
    let t = &mut core.tlb;
    let (far, ways) = ((ENTRIES / WAYS) as u64, WAYS as u64);
    t.select(0, 0, 1);
    t.insert(5, 0x1000, 0, 12);
    t.insert(5, 0x2000, 0, 12);
    assert_eq!((Some(0x2000), 0), (t.lookup(5).map(|e| e.hpa), t.displaced));
    t.select(0, 0, 2);
    assert!(t.lookup(5).is_none());
    t.insert(5, 0x3000, 0, 12);
    t.select(0, 0, 1);
    assert_eq!(Some(0x2000), t.lookup(5).map(|e| e.hpa));
    t.insert(5, 0x4000, perm::GLOBAL, 12); // nobody else's is left
    t.select(0, 0, 2);
    assert_eq!(Some(0x4000), t.lookup(5).map(|e| e.hpa));
    for n in 1..ways {
        assert!(!t.displaces(5 + n * far));
        t.insert(5 + n * far, 0x5000, 0, 12);
    }
    assert!(t.displaces(5 + ways * far) && !t.displaces(5));
    t.insert(5 + ways * far, 0x6000, 0, 12);
    assert_eq!(
        (ways as usize, 1),
        ((0..=ways).filter(|n| t.lookup(5 + n * far).is_some()).count(), t.displaced)
    );
    t.invalidate((5 + ways * far) << 12);
    assert!(t.lookup(5 + ways * far).is_none() && !t.displaces(5));
}

#[test]
fn the_first_level_keeps_global_pages_when_the_space_changes() {
    let mut core = real();
    let t = &mut core.tlb;
    let used = |t: &Tlb, vpn: usize| t.l1[1][vpn].read != empty(vpn).read;
    let fill = |t: &mut Tlb| {
        t.own_l1(0);
        for (vpn, perm) in [(5, 0), (6, perm::GLOBAL)] {
            t.insert(vpn, 0x1000, perm, 12);
            let entry = *t.lookup(vpn).unwrap();
            t.l1_fill(1, &entry, 0x1000, true);
        }
    };
    let change = |t: &mut Tlb, n: usize| match n {
        0 => t.select(0, 0, 1),
        1 => t.drop_spaces(|_, _, _| true, |_, _| false),
        2 => t.drop_spaces(|_, _, _| true, |_, _| true),
        3 => t.select(1, 0, 0),
        4 => t.own_l1(1),
        _ => t.invalidate(6 << 12),
    };
    for (n, keeps) in [true, true, false, false, false].into_iter().enumerate() {
        t.flush_all();
        t.select(0, 0, 0);
        fill(t);
        assert!(used(t, 5) && used(t, 6));
        change(t, n);
        if n < 4 {
            t.own_l1(0);
        }
        assert_eq!((false, keeps), (used(t, 5), used(t, 6)), "{n}");
    }
    t.select(0, 0, 0);
    fill(t);
    change(t, 5);
    assert_eq!((true, false), (used(t, 5), used(t, 6)));
}

#[test]
fn a_flushed_space_is_empty_and_globals_outlive_it() {
    let mut core = real();
    let t = &mut core.tlb;
    t.select(0, 0, 0);
    t.insert(5, 0x1000, 0, 12);
    t.insert(6, 0x2000, perm::GLOBAL, 12);
    t.drop_spaces(|_, _, _| true, |_, _| false);
    t.select(0, 0, 0);
    assert_eq!((None, true), (t.lookup(5).copied(), t.lookup(6).is_some()));
}

#[test]
fn invalidating_a_piece_of_a_large_page_drops_all_pieces() {
    for shift in [21, 22, 30] {
        let pages = 1 << (shift - 12);
        for at in [0, 1, pages - 1] {
            let mut core = real();
            let t = &mut core.tlb;
            t.select(0, 0, 0);
            let piece = |n: u64| 5 * pages + n;
            for n in [0, 7, pages / 2 + 1, pages - 2] {
                t.insert(piece(n), n << 12, 0, shift);
                t.insert_fetch(piece(n), n << 12, 0, shift);
            }
            t.insert(6 * pages + 3, 0, 0, shift);
            t.insert_fetch(6 * pages + 3, 0, 0, shift);
            t.invalidate(piece(at) << 12);
            for n in [0, 7, pages / 2 + 1, pages - 2] {
                assert_eq!((None, None), (t.lookup(piece(n)), t.lookup_fetch(piece(n))), "{shift} {n}");
            }
            assert!(t.lookup(6 * pages + 3).is_some() && t.lookup_fetch(6 * pages + 3).is_some());
        }
    }
}

#[test]
fn an_address_is_invalidated_under_every_ept_root_of_its_vpid() {
    let mut core = real();
    let t = &mut core.tlb;
    t.select(1, 0x1000, 0);
    t.insert(5, 0x1000, perm::GLOBAL, 12);
    t.insert(6, 0x1000, 0, 12);
    t.select(1, 0x2000, 0);
    t.invalidate(5 << 12);
    t.invalidate(6 << 12);
    t.select(1, 0x1000, 0);
    assert_eq!((None, None), (t.lookup(5), t.lookup(6)));
}

#[test]
fn what_a_guest_makes_us_remember_is_bounded() {
    let mut core = real();
    let t = &mut core.tlb;
    for n in 0..MEMORY_LIMIT as u64 * 3 {
        t.select(1, n << 12, 0);
        t.insert(n << 9, 0, 0, 21);
        assert!(t.lookup(n << 9).is_some());
    }
    assert!(t.large.len() <= MEMORY_LIMIT + 1 && t.numbers.len() <= MEMORY_LIMIT + 1);
}

#[test]
fn running_out_of_space_numbers_forgets_everything() {
    let mut core = real();
    let t = &mut core.tlb;
    t.select(1, 0, 0);
    t.insert(5, 0x1000, 0, 12);
    t.last = u32::MAX;
    t.select(2, 0, 0);
    assert_eq!(None, t.lookup(5));
    t.select(1, 0, 0);
    assert_eq!(None, t.lookup(5));
}
