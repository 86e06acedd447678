//! The fields of the VMCS by their encodings (SDM 3D, "Field Encoding in VMCS"), and where this
//! processor keeps each in the region.
//!
//! An encoding says what a field is: bit 0 access (1: the high half of a 64-bit field), bits 9:1
//! index, bits 11:10 type, bits 14:13 width.  The region's format is the processor's own:
//!
//! | bytes | content |
//! |---|---|
//! | 0-3 | revision identifier (bit 31: shadow VMCS) |
//! | 4-7 | VMX-abort indicator |
//! | 8-11 | launch state: 1 launched, else clear |
//! | 64- | fields, eight bytes each, in sixteen groups (type, then width), by index |
#![allow(missing_docs)]

/// The VMCS revision identifier of this processor.
pub const REVISION: u32 = 0x0055_4454;
/// Beside the revision identifier: the region is a shadow VMCS.
pub const SHADOW: u32 = 1 << 31;
/// Region offset of the VMX-abort indicator.
pub const ABORT_INDICATOR: u64 = 4;
/// Region offset of the launch state.
pub const LAUNCH_STATE: u64 = 8;

macro_rules! fields {
    ($($name:ident = $code:literal,)*) => {
        $(pub const $name: u32 = $code;)*
        /// Every field of this processor: encoding and name.
        pub static FIELDS: &[(u32, &str)] = &[$(($code, stringify!($name)),)*];
    };
}

fields! {
    VPID = 0x0000,
    POSTED_INTERRUPT_NOTIFICATION_VECTOR = 0x0002,
    GUEST_ES = 0x0800,
    GUEST_CS = 0x0802,
    GUEST_SS = 0x0804,
    GUEST_DS = 0x0806,
    GUEST_FS = 0x0808,
    GUEST_GS = 0x080A,
    GUEST_LDTR = 0x080C,
    GUEST_TR = 0x080E,
    GUEST_INTERRUPT_STATUS = 0x0810,
    PML_INDEX = 0x0812,
    HOST_ES = 0x0C00,
    HOST_CS = 0x0C02,
    HOST_SS = 0x0C04,
    HOST_DS = 0x0C06,
    HOST_FS = 0x0C08,
    HOST_GS = 0x0C0A,
    HOST_TR = 0x0C0C,
    IO_BITMAP_A = 0x2000,
    IO_BITMAP_B = 0x2002,
    MSR_BITMAPS = 0x2004,
    EXIT_MSR_STORE_ADDRESS = 0x2006,
    EXIT_MSR_LOAD_ADDRESS = 0x2008,
    ENTRY_MSR_LOAD_ADDRESS = 0x200A,
    EXECUTIVE_VMCS_POINTER = 0x200C,
    PML_ADDRESS = 0x200E,
    TSC_OFFSET = 0x2010,
    VIRTUAL_APIC_ADDRESS = 0x2012,
    APIC_ACCESS_ADDRESS = 0x2014,
    POSTED_INTERRUPT_DESCRIPTOR = 0x2016,
    EPT_POINTER = 0x201A,
    EOI_EXIT_BITMAP_0 = 0x201C,
    EOI_EXIT_BITMAP_1 = 0x201E,
    EOI_EXIT_BITMAP_2 = 0x2020,
    EOI_EXIT_BITMAP_3 = 0x2022,
    VMREAD_BITMAP = 0x2026,
    VMWRITE_BITMAP = 0x2028,
    XSS_EXITING_BITMAP = 0x202C,
    TSC_MULTIPLIER = 0x2032,
    GUEST_PHYSICAL_ADDRESS = 0x2400,
    VMCS_LINK_POINTER = 0x2800,
    GUEST_DEBUGCTL = 0x2802,
    GUEST_PAT = 0x2804,
    GUEST_EFER = 0x2806,
    GUEST_PERF_GLOBAL_CTRL = 0x2808,
    GUEST_PDPTE0 = 0x280A,
    GUEST_PDPTE1 = 0x280C,
    GUEST_PDPTE2 = 0x280E,
    GUEST_PDPTE3 = 0x2810,
    GUEST_PKRS = 0x2818,
    HOST_PAT = 0x2C00,
    HOST_EFER = 0x2C02,
    HOST_PERF_GLOBAL_CTRL = 0x2C04,
    HOST_PKRS = 0x2C06,
    PIN_CONTROLS = 0x4000,
    PRIMARY_CONTROLS = 0x4002,
    EXCEPTION_BITMAP = 0x4004,
    PAGE_FAULT_ERROR_CODE_MASK = 0x4006,
    PAGE_FAULT_ERROR_CODE_MATCH = 0x4008,
    CR3_TARGET_COUNT = 0x400A,
    EXIT_CONTROLS = 0x400C,
    EXIT_MSR_STORE_COUNT = 0x400E,
    EXIT_MSR_LOAD_COUNT = 0x4010,
    ENTRY_CONTROLS = 0x4012,
    ENTRY_MSR_LOAD_COUNT = 0x4014,
    ENTRY_INTERRUPTION_INFORMATION = 0x4016,
    ENTRY_EXCEPTION_ERROR_CODE = 0x4018,
    ENTRY_INSTRUCTION_LENGTH = 0x401A,
    TPR_THRESHOLD = 0x401C,
    SECONDARY_CONTROLS = 0x401E,
    PLE_GAP = 0x4020,
    PLE_WINDOW = 0x4022,
    VM_INSTRUCTION_ERROR = 0x4400,
    EXIT_REASON = 0x4402,
    EXIT_INTERRUPTION_INFORMATION = 0x4404,
    EXIT_INTERRUPTION_ERROR_CODE = 0x4406,
    IDT_VECTORING_INFORMATION = 0x4408,
    IDT_VECTORING_ERROR_CODE = 0x440A,
    EXIT_INSTRUCTION_LENGTH = 0x440C,
    EXIT_INSTRUCTION_INFORMATION = 0x440E,
    GUEST_ES_LIMIT = 0x4800,
    GUEST_CS_LIMIT = 0x4802,
    GUEST_SS_LIMIT = 0x4804,
    GUEST_DS_LIMIT = 0x4806,
    GUEST_FS_LIMIT = 0x4808,
    GUEST_GS_LIMIT = 0x480A,
    GUEST_LDTR_LIMIT = 0x480C,
    GUEST_TR_LIMIT = 0x480E,
    GUEST_GDTR_LIMIT = 0x4810,
    GUEST_IDTR_LIMIT = 0x4812,
    GUEST_ES_ACCESS_RIGHTS = 0x4814,
    GUEST_CS_ACCESS_RIGHTS = 0x4816,
    GUEST_SS_ACCESS_RIGHTS = 0x4818,
    GUEST_DS_ACCESS_RIGHTS = 0x481A,
    GUEST_FS_ACCESS_RIGHTS = 0x481C,
    GUEST_GS_ACCESS_RIGHTS = 0x481E,
    GUEST_LDTR_ACCESS_RIGHTS = 0x4820,
    GUEST_TR_ACCESS_RIGHTS = 0x4822,
    GUEST_INTERRUPTIBILITY_STATE = 0x4824,
    GUEST_ACTIVITY_STATE = 0x4826,
    GUEST_SMBASE = 0x4828,
    GUEST_SYSENTER_CS = 0x482A,
    PREEMPTION_TIMER_VALUE = 0x482E,
    HOST_SYSENTER_CS = 0x4C00,
    CR0_GUEST_HOST_MASK = 0x6000,
    CR4_GUEST_HOST_MASK = 0x6002,
    CR0_READ_SHADOW = 0x6004,
    CR4_READ_SHADOW = 0x6006,
    CR3_TARGET_VALUE_0 = 0x6008,
    CR3_TARGET_VALUE_1 = 0x600A,
    CR3_TARGET_VALUE_2 = 0x600C,
    CR3_TARGET_VALUE_3 = 0x600E,
    EXIT_QUALIFICATION = 0x6400,
    IO_RCX = 0x6402,
    IO_RSI = 0x6404,
    IO_RDI = 0x6406,
    IO_RIP = 0x6408,
    GUEST_LINEAR_ADDRESS = 0x640A,
    GUEST_CR0 = 0x6800,
    GUEST_CR3 = 0x6802,
    GUEST_CR4 = 0x6804,
    GUEST_ES_BASE = 0x6806,
    GUEST_CS_BASE = 0x6808,
    GUEST_SS_BASE = 0x680A,
    GUEST_DS_BASE = 0x680C,
    GUEST_FS_BASE = 0x680E,
    GUEST_GS_BASE = 0x6810,
    GUEST_LDTR_BASE = 0x6812,
    GUEST_TR_BASE = 0x6814,
    GUEST_GDTR_BASE = 0x6816,
    GUEST_IDTR_BASE = 0x6818,
    GUEST_DR7 = 0x681A,
    GUEST_RSP = 0x681C,
    GUEST_RIP = 0x681E,
    GUEST_RFLAGS = 0x6820,
    GUEST_PENDING_DEBUG_EXCEPTIONS = 0x6822,
    GUEST_SYSENTER_ESP = 0x6824,
    GUEST_SYSENTER_EIP = 0x6826,
    HOST_CR0 = 0x6C00,
    HOST_CR3 = 0x6C02,
    HOST_CR4 = 0x6C04,
    HOST_FS_BASE = 0x6C06,
    HOST_GS_BASE = 0x6C08,
    HOST_TR_BASE = 0x6C0A,
    HOST_GDTR_BASE = 0x6C0C,
    HOST_IDTR_BASE = 0x6C0E,
    HOST_SYSENTER_ESP = 0x6C10,
    HOST_SYSENTER_EIP = 0x6C12,
    HOST_RSP = 0x6C14,
    HOST_RIP = 0x6C16,
}

/// Where the fields begin.
const FIRST: usize = 64;
/// Field slots of each group, at index type * 4 + width.
const ROOM: [usize; 16] = [4, 32, 20, 8, 0, 4, 8, 8, 12, 13, 24, 20, 8, 4, 4, 12];
const SLOTS: usize = 181;

const fn starts() -> [usize; 17] {
    let mut out = [0; 17];
    let mut i = 0;
    while i < 16 {
        out[i + 1] = out[i] + ROOM[i];
        i += 1;
    }
    out
}
const START: [usize; 17] = starts();

/// Region offset of the guest-state area.
pub const GUEST_AREA: u64 = (FIRST + START[8] * 8) as u64;
/// Bytes of the guest-state area.
pub const GUEST_BYTES: usize = (START[12] - START[8]) * 8;

/// What sort of field an encoding names (bits 11:10).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Type {
    Control,
    ExitInformation,
    Guest,
    Host,
}

#[must_use]
pub const fn type_of(encoding: u32) -> Type {
    match encoding >> 10 & 3 {
        0 => Type::Control,
        1 => Type::ExitInformation,
        2 => Type::Guest,
        _ => Type::Host,
    }
}

/// The bits that a field holds: 16, 64, 32, or natural width (64).
#[must_use]
pub const fn mask_of(encoding: u32) -> u64 {
    match encoding >> 13 & 3 {
        0 => 0xFFFF,
        2 => 0xFFFF_FFFF,
        _ => u64::MAX,
    }
}

const fn slot(encoding: u32) -> Option<usize> {
    if encoding & !0x6FFF != 0 {
        return None;
    }
    let group = (encoding >> 10 & 3) as usize * 4 + (encoding >> 13 & 3) as usize;
    let index = (encoding >> 1 & 0x1FF) as usize;
    if index < ROOM[group] { Some(START[group] + index) } else { None }
}

/// Region offset of a field that exists.
///
/// # Panics
/// If there is no such field.
#[inline(always)]
#[must_use]
pub const fn offset(encoding: u32) -> u64 {
    match slot(encoding) {
        Some(s) => (FIRST + s * 8) as u64,
        None => panic!("no such VMCS field"),
    }
}

const fn known() -> [bool; SLOTS] {
    let mut out = [false; SLOTS];
    let mut i = 0;
    while i < FIELDS.len() {
        match slot(FIELDS[i].0) {
            Some(s) => out[s] = true,
            None => panic!("a field lies outside its group's room"),
        }
        i += 1;
    }
    out
}
static KNOWN: [bool; SLOTS] = known();

/// Region offset of the field that VMREAD or VMWRITE names, `None` if this processor has none
/// with that encoding (also: the high half of a field that is not 64 bits wide).
#[inline]
#[must_use]
pub fn locate(encoding: u32) -> Option<u64> {
    if encoding & 1 != 0 && encoding >> 13 & 3 != 1 {
        return None;
    }
    let s = slot(encoding)?;
    KNOWN[s].then_some((FIRST + s * 8) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_has_a_place_of_its_own_inside_the_region() {
        let mut places: Vec<u64> = FIELDS.iter().map(|f| locate(f.0).unwrap()).collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(FIELDS.len(), places.len());
        assert!(*places.last().unwrap() + 8 <= 4096 && START[16] == SLOTS);
    }

    #[test]
    fn encodings_that_name_no_field_are_refused() {
        let named = |e: u32| FIELDS.iter().any(|f| f.0 == e & !1 && (e & 1 == 0 || e >> 13 & 3 == 1));
        for e in 0..0x2_0000 {
            assert_eq!(named(e), locate(e).is_some(), "{e:#x}");
        }
    }

    #[test]
    fn the_guest_state_area_holds_the_guest_fields_and_no_others() {
        for &(e, name) in FIELDS {
            let inside = (GUEST_AREA..GUEST_AREA + GUEST_BYTES as u64).contains(&offset(e));
            assert_eq!(type_of(e) == Type::Guest, inside, "{name}");
        }
    }
}
