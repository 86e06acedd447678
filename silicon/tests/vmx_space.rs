//! Host software reads code and finds addresses as the guest that left translates them.

mod vmx_bed;

use silicon::arch::exit::reason;
use silicon::arch::vmcs as f;
use silicon::vmx::controls::{entry, exit, secondary};
use silicon::vmx::instructions::VmFail;
use silicon::vmx::space::{Given, fetch, guest_space, locate};
use vmx_bed::{Bed, CODE, EPT, GUEST, PML4, SECONDARY, VMCS};

fn code(bed: &mut Bed, gva: u64, length: usize, given: Given) -> Vec<u8> {
    let mut out = vec![0; length];
    let core = bed.core();
    let space = guest_space(core, given).unwrap();
    let n = fetch(&core.mem, &space, gva, &mut out);
    out.truncate(n);
    out
}

const CPUID: [u8; 4] = [0x90, 0x0F, 0xA2, 0xF4];

#[test]
fn right_after_an_exit_through_both_dimensions_without_effects() {
    let mut bed = Bed::new();
    assert_eq!(reason::CPUID, bed.code(&CPUID).launch().reason);
    let counts = bed.core().counts.clone();
    let table = bed.core().mem.load(GUEST + PML4, 8);
    assert_eq!(CPUID[1..], code(&mut bed, CODE + 1, 3, Given::default()));
    let space = guest_space(bed.core(), Given::default()).unwrap();
    let found = locate(&bed.core().mem, &space, 0x8123).unwrap();
    assert_eq!((0x8123, GUEST + 0x8123), (found.gpa, found.hpa));
    assert_eq!(None, locate(&bed.core().mem, &space, 0x20_0000));
    assert_eq!(None, locate(&bed.core().mem, &space, 1 << 47));
    assert_eq!((counts, table), (bed.core().counts.clone(), bed.core().mem.load(GUEST + PML4, 8)));
}

#[test]
fn only_what_is_mapped_comes_and_the_end_may_be_in_another_page() {
    let mut bed = Bed::new();
    bed.code(&CPUID).launch();
    // A page of 4 KBytes at the end of the first 2 MBytes, then nothing.
    bed.core().mem.write_bytes(GUEST + 0x1F_FFFD, &[1, 2, 3]);
    assert_eq!(vec![1, 2, 3], code(&mut bed, 0x1F_FFFD, 15, Given::default()));
    // Another page behind it, elsewhere in memory.
    bed.guest_store(PML4 + 0x2008, (PML4 + 0x3000) | 7);
    bed.guest_store(PML4 + 0x3000, 0x5000 | 7);
    bed.core().mem.write_bytes(GUEST + 0x5000, &[4, 5]);
    assert_eq!(vec![1, 2, 3, 4, 5], code(&mut bed, 0x1F_FFFD, 5, Given::default()));
    // Not executable: the guest's tables say so, or the EPT.
    bed.guest_store(PML4 + 0x3000, 0x5000 | 7 | 1 << 63);
    bed.write(f::GUEST_EFER, 0xD00);
    assert_eq!(vec![1, 2, 3], code(&mut bed, 0x1F_FFFD, 5, Given::default()));
    bed.core().mem.store(EPT + 0x2000, 8, GUEST | 0xB3);
    assert!(code(&mut bed, CODE, 4, Given::default()).is_empty());
}

#[test]
fn inside_the_guest_it_is_the_processors_own_space() {
    let mut bed = Bed::new();
    bed.code(&[0xEB, 0xFE]);
    assert_eq!(reason::BUDGET, bed.launch().reason);
    bed.core().mem.store(VMCS + f::offset(f::GUEST_CR3), 8, 0); // not what runs
    assert_eq!(vec![0xEB, 0xFE], code(&mut bed, CODE, 2, Given::default()));
}

#[test]
fn without_paging_addresses_are_physical_and_wrap_at_4_gbytes() {
    let mut bed = Bed::new();
    bed.code(&CPUID).launch();
    bed.write(f::GUEST_CR0, 0x30).clear(f::ENTRY_CONTROLS, entry::IA32E_MODE_GUEST);
    bed.core().mem.write_bytes(GUEST, &[7]);
    assert_eq!(CPUID[..], code(&mut bed, CODE, 4, Given::default()));
    assert_eq!(vec![7], code(&mut bed, 1 << 32, 1, Given::default()));
}

#[test]
fn pae_takes_the_vmcss_pdptes_unless_it_is_given_a_cr3() {
    let mut bed = Bed::new();
    bed.code(&CPUID).launch();
    bed.write(f::GUEST_CR4, 0x2020).clear(f::ENTRY_CONTROLS, entry::IA32E_MODE_GUEST);
    bed.write(f::GUEST_PDPTE0, (PML4 + 0x2000) | 1).write(f::GUEST_CR3, 0x6000);
    assert_eq!(CPUID[..], code(&mut bed, CODE, 4, Given::default()));
    let given = Given { cr3: Some(0x6000), ..Given::default() };
    assert!(code(&mut bed, CODE, 4, given).is_empty());
    bed.guest_store(0x6000, (PML4 + 0x2000) | 1);
    assert_eq!(CPUID[..], code(&mut bed, CODE, 4, given));
}

#[test]
fn without_ept_the_tables_and_pdptes_are_in_host_memory() {
    let mut bed = Bed::new();
    bed.code(&CPUID).launch();
    bed.clear(SECONDARY, secondary::ENABLE_EPT | secondary::UNRESTRICTED_GUEST);
    let mem = bed.core().mem.clone();
    // IA-32 with a page of 4 MBytes.
    mem.store(0xE000, 4, 0x83);
    bed.clear(f::ENTRY_CONTROLS, entry::IA32E_MODE_GUEST).write(f::GUEST_CR3, 0xE000);
    bed.write(f::GUEST_CR4, 0x2010);
    assert_eq!(CPUID[..], code(&mut bed, GUEST + CODE, 4, Given::default()));
    // The same entry without PSE names a table.
    bed.write(f::GUEST_CR4, 0x2000);
    assert!(code(&mut bed, GUEST + CODE, 4, Given::default()).is_empty());
    // PAE, from memory: what the VMCS has is from before.
    mem.store(0xE000, 8, 0xF001);
    mem.store(0xF008, 8, GUEST | 0x83);
    bed.write(f::GUEST_CR4, 0x2020).write(f::GUEST_PDPTE0, 0);
    assert_eq!(CPUID[..], code(&mut bed, 0x20_0000 + CODE, 4, Given::default()));
}

#[test]
fn five_levels_and_supervisors_without_smep() {
    let mut bed = Bed::new();
    bed.code(&CPUID).launch();
    bed.guest_store(0x6000, PML4 | 7);
    bed.write(f::GUEST_CR3, 0x6000);
    // User pages under SMEP: whoever fetched here could.
    let given = Given { cr4: Some(0x10_3020), ..Given::default() };
    assert_eq!(CPUID[..], code(&mut bed, CODE, 4, given));
    assert!(code(&mut bed, 1 << 56 | CODE, 4, given).is_empty());
}

#[test]
fn an_efer_that_is_not_saved_makes_nothing_fault() {
    let mut bed = Bed::new();
    bed.code(&CPUID).launch();
    bed.guest_store(PML4 + 0x2000, 0x87);
    bed.guest_store(PML4 + 0x2008, 0x87 | 1 << 63);
    bed.clear(f::EXIT_CONTROLS, exit::SAVE_EFER).write(f::GUEST_EFER, 0);
    assert_eq!(CPUID[..], code(&mut bed, CODE, 4, Given::default()));
    let space = guest_space(bed.core(), Given::default()).unwrap();
    assert!(locate(&bed.core().mem, &space, 0x20_0000).is_some());
}

#[test]
fn without_a_vmcs_everything_has_to_be_given() {
    let mut bed = Bed::root();
    let some = Given { cr0: Some(0x31), cr3: Some(0), cr4: Some(0), efer: Some(0), eptp: None };
    assert_eq!(Some(VmFail(0)), guest_space(bed.core(), some).err());
    bed.core().mem.write_bytes(0x5000, &[9]);
    assert_eq!(vec![9], code(&mut bed, 0x5000, 1, Given { eptp: Some(0), ..some }));
}
