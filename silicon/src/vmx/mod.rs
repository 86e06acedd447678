//! VMX operation (SDM 3C).

/// The state of VMX operation.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Vmx {
    /// VMXON was executed.
    pub is_on: bool,
    /// In VMX non-root operation.
    pub non_root: bool,
    /// VM exits go to the caller of `run` (the host software is outside), not to code at the
    /// host RIP.
    pub is_host_outside: bool,
    /// The VPID in use: 0 in root operation and without "enable VPID".
    pub vpid: u16,
    /// The EPT pointer in use; 0 when EPT is off.
    pub eptp: u64,
}

pub mod events;
pub mod exit;
pub mod instructions;
pub mod intercept;
