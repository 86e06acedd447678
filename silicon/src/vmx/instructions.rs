//! The VMX instructions (SDM 3D, "VMX Instruction Reference"), called by the bindings with
//! host-physical operands, and by the interpreter for guest code in root operation.

/// Why a VMX instruction failed: the VM-instruction error number, 0 for VMfailInvalid.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VmFail(pub u32);
