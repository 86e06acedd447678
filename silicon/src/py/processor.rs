//! `Processor`: a processor, moved between threads as its users like; one of them runs it.

use std::sync::Arc;

use pyo3::exceptions::{PyIndexError, PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use super::apic::LocalApic;
use super::exit::Exit;
use super::failure::vm_fail;
use super::memory::Memory;
use super::registers;
use super::shared::{Refusal, Shared};
use crate::addr::{FRAME_BYTES, PAGE_OFFSET};
use crate::arch::bits::cr0;
use crate::arch::exit;
use crate::bus::news;
use crate::cpu::fxstate::{MXCSR_MASK, normalize};
use crate::cpu::msr;
use crate::cpu::pointers::Pointers;
use crate::cpu::ring0::{Ring0, Sensitive};
use crate::cpu::state::{Clock, Core, Fx};
use crate::cpu::system;
use crate::dbt::promotion::Windows;
use crate::dbt::signals;
use crate::mmu::caches;
use crate::mmu::walk::{Access, Intent, Space, Walker};
use crate::processor::{EngineKind, Processor as Machine};
use crate::snapshot;
use crate::vmx::instructions::{self as vmx, VmFail};
use crate::vmx::space::{self, Given};

/// Ticks of the computer's TSC between two looks at Python's signals: ten milliseconds or less.
const SIGNAL_TICKS: u64 = 10_000_000;

/// Most bytes of one `fetch`.
const FETCH_BYTES: usize = 64;

/// VMLAUNCH or VMRESUME.
type Entry = fn(&mut Core) -> Result<Option<exit::Exit>, VmFail>;

/// How a run ended.
enum End {
    Exit(exit::Exit),
    Failed(u32, &'static str),
    Refused(Refusal),
}

/// One x86-64 processor with VMX, at reset, on a `Memory`.
///
/// Time: the TSC runs at 1 GHz.  clock="virtual": one tick for each instruction retired, plus
/// what `advance` adds.  clock="wall": the computer's monotonic clock.
///
/// Between exits the guest's general registers, x87/SSE state, CR2, DR0-3 and DR6 stay in the
/// processor (as on real hardware); all else of the guest is in the VMCS.
#[pyclass(frozen, module = "understudy._silicon")]
pub struct Processor {
    shared: Arc<Shared>,
}

impl Processor {
    fn go(&self, py: Python<'_>, enter: Option<Entry>, budget: u64) -> PyResult<Exit> {
        let mut raised = None;
        let end = py.detach(|| {
            let mut machine = match self.shared.lock() {
                Ok(machine) => machine,
                Err(why) => return End::Refused(why),
            };
            let present = machine.core.agent.clone().arrive();
            if let Some(enter) = enter {
                match enter(&mut machine.core) {
                    Ok(None) => {}
                    Ok(Some(exit)) => return End::Exit(exit),
                    Err(VmFail(n)) => {
                        let rule = if matches!(n, 7 | 8) { machine.core.vmx.complaint } else { "" };
                        return End::Failed(n, rule);
                    }
                }
            }
            let mut looked = signals::ticks();
            let mut poll = || {
                let now = signals::ticks();
                if now.wrapping_sub(looked) < SIGNAL_TICKS {
                    return false;
                }
                looked = now;
                // (The interpreter may be busy, with something that waits for this processor.)
                raised = present.aside(|| Python::attach(|py| py.check_signals().err()));
                raised.is_some()
            };
            End::Exit(machine.run_present(budget, &mut poll))
        });
        match (raised, end) {
            (Some(error), _) => Err(error),
            (None, End::Exit(exit)) => Ok(exit.into()),
            (None, End::Failed(number, rule)) => Err(vm_fail(py, number, rule)),
            (None, End::Refused(why)) => Err(why.into()),
        }
    }

    fn vmx<T>(&self, py: Python<'_>, act: impl FnOnce(&mut Core) -> Result<T, VmFail>) -> PyResult<T> {
        act(&mut self.shared.lock()?.core).map_err(|VmFail(number)| vm_fail(py, number, ""))
    }
}

fn bad_register(n: usize) -> PyErr {
    PyIndexError::new_err(format!("general register {n}: expected 0 to 15"))
}

#[pymethods]
impl Processor {
    #[new]
    #[pyo3(signature = (memory, engine="dbt", clock="virtual", apic_id=0))]
    fn new(memory: &Bound<'_, Memory>, engine: &str, clock: &str, apic_id: u32) -> PyResult<Self> {
        let kind = match engine {
            "dbt" => EngineKind::Dbt,
            "reference" => EngineKind::Reference,
            _ => {
                let words = format!("engine={engine:?}: expected \"dbt\" or \"reference\"");
                return Err(PyValueError::new_err(words));
            }
        };
        let clock = match clock {
            "virtual" => Clock::Virtual,
            "wall" => Clock::Wall,
            _ => {
                let words = format!("clock={clock:?}: expected \"virtual\" or \"wall\"");
                return Err(PyValueError::new_err(words));
            }
        };
        let memory = memory.get();
        let shared = Arc::new(Shared::new(Machine::new(memory.inner()?, kind, clock, apic_id)?));
        memory.owns(&shared)?;
        Ok(Self { shared })
    }

    /// Give back at once everything that the processor has, whoever still refers to it.
    ///
    /// Any later use raises RuntimeError, but to `kick` it or to close it again does nothing.
    /// RuntimeError if it is running in another thread.
    fn close(&self) -> PyResult<()> {
        if let Some(machine) = self.shared.lock_if_open()? {
            machine.close("this processor is closed");
        }
        Ok(())
    }

    /// Execute, in whatever mode the processor is, at most `budget` instructions (0: no limit).
    ///
    /// Releases the GIL; polls Python's signals a hundred times a second.
    #[pyo3(signature = (budget=0))]
    fn run(&self, py: Python<'_>, budget: u64) -> PyResult<Exit> {
        self.go(py, None, budget)
    }

    /// VMLAUNCH, then run.  Raises VmFail; a failed entry check on guest state is an Exit.
    #[pyo3(signature = (budget=0))]
    fn vmlaunch(&self, py: Python<'_>, budget: u64) -> PyResult<Exit> {
        self.go(py, Some(vmx::vmlaunch), budget)
    }

    /// VMRESUME, then run.
    #[pyo3(signature = (budget=0))]
    fn vmresume(&self, py: Python<'_>, budget: u64) -> PyResult<Exit> {
        self.go(py, Some(vmx::vmresume), budget)
    }

    /// Make `run` return soon; callable from any thread.
    ///
    /// Within about a millisecond; within one block of code once two processors of the memory have
    /// run at the same time.
    ///
    /// In VMX non-root operation with external-interrupt exiting: exit reason 1, valid bit of
    /// intr_info clear.  Otherwise a KICK stop.
    fn kick(&self) {
        if let Some(agent) = self.shared.agent() {
            agent.ring(news::KICK);
        }
    }

    /// Whether the processor is in VMX non-root operation (after a BUDGET or KICK stop).
    #[getter]
    fn in_guest(&self) -> PyResult<bool> {
        Ok(self.shared.lock()?.core.vmx.non_root)
    }

    // --- VMX instructions ---

    /// VMXON with the region at `hpa`.
    fn vmxon(&self, py: Python<'_>, hpa: u64) -> PyResult<()> {
        self.vmx(py, |c| vmx::vmxon(c, hpa))
    }

    /// VMXOFF.
    fn vmxoff(&self, py: Python<'_>) -> PyResult<()> {
        self.vmx(py, vmx::vmxoff)
    }

    /// VMCLEAR.
    fn vmclear(&self, py: Python<'_>, hpa: u64) -> PyResult<()> {
        self.vmx(py, |c| vmx::vmclear(c, hpa))
    }

    /// VMPTRLD.
    fn vmptrld(&self, py: Python<'_>, hpa: u64) -> PyResult<()> {
        self.vmx(py, |c| vmx::vmptrld(c, hpa))
    }

    /// VMPTRST.
    fn vmptrst(&self, py: Python<'_>) -> PyResult<u64> {
        self.vmx(py, |c| vmx::vmptrst(c))
    }

    /// VMREAD.
    fn vmread(&self, py: Python<'_>, field: u32) -> PyResult<u64> {
        self.vmx(py, |c| vmx::vmread(c, field))
    }

    /// VMWRITE.
    fn vmwrite(&self, py: Python<'_>, field: u32, value: u64) -> PyResult<()> {
        self.vmx(py, |c| vmx::vmwrite(c, field, value))
    }

    /// INVEPT.
    #[pyo3(signature = (r#type, eptp))]
    fn invept(&self, py: Python<'_>, r#type: u64, eptp: u64) -> PyResult<()> {
        self.vmx(py, |c| vmx::invept(c, r#type, eptp))
    }

    /// INVVPID.
    #[pyo3(signature = (r#type, vpid, gva=0))]
    fn invvpid(&self, py: Python<'_>, r#type: u64, vpid: u64, gva: u64) -> PyResult<()> {
        self.vmx(py, |c| vmx::invvpid(c, r#type, vpid, gva))
    }

    // --- registers ---

    /// 0 RAX 1 RCX 2 RDX 3 RBX 4 RSP 5 RBP 6 RSI 7 RDI 8..15 R8..R15.
    ///
    /// After a VM exit RSP here is the host's: the guest's is VMCS field 0x681C.
    fn gpr(&self, n: usize) -> PyResult<u64> {
        self.shared.lock()?.core.gpr.get(n).copied().ok_or_else(|| bad_register(n))
    }

    /// Set one.
    fn set_gpr(&self, n: usize, value: u64) -> PyResult<()> {
        let core = &mut self.shared.lock()?.core;
        *core.gpr.get_mut(n).ok_or_else(|| bad_register(n))? = value;
        Ok(())
    }

    /// All sixteen.
    fn gprs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, pyo3::types::PyTuple>> {
        let gpr = self.shared.lock()?.core.gpr;
        pyo3::types::PyTuple::new(py, gpr)
    }

    /// Set all sixteen.
    fn set_gprs(&self, values: Vec<u64>) -> PyResult<()> {
        let n = values.len();
        self.shared.lock()?.core.gpr = values
            .try_into()
            .map_err(|_| PyValueError::new_err(format!("{n} values: expected 16, RAX to R15")))?;
        Ok(())
    }

    /// 512 bytes, FXSAVE64 format.
    fn fxsave<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let machine = self.shared.lock()?;
        let mut fx = machine.core.fx;
        machine.core.pointers.to_image(&mut fx, true);
        Ok(PyBytes::new(py, &fx.0))
    }

    /// The reverse.
    fn fxrstor(&self, image: &[u8]) -> PyResult<()> {
        let image = <&[u8; 512]>::try_from(image).map_err(|_| {
            PyValueError::new_err(format!("{} bytes: expected the 512 of FXSAVE64", image.len()))
        })?;
        let mut fx = Fx(*image);
        if fx.mxcsr() & !MXCSR_MASK != 0 {
            let words = format!("MXCSR={:#x}: expected bits 31:16 clear", fx.mxcsr());
            return Err(PyValueError::new_err(words));
        }
        let pointers = Pointers::of_image(&fx, true);
        normalize(&mut fx);
        let mut machine = self.shared.lock()?;
        (machine.core.fx, machine.core.pointers) = (fx, pointers);
        Ok(())
    }

    /// A YMM register: 32 bytes.
    fn ymm<'py>(&self, py: Python<'py>, number: usize) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.shared.lock()?.core.ymm(registers::ymm(number)?)))
    }

    /// Set one.
    fn set_ymm(&self, number: usize, value: [u8; 32]) -> PyResult<()> {
        self.shared.lock()?.core.set_ymm(registers::ymm(number)?, &value);
        Ok(())
    }

    /// PKRU and IA32_PKRS.
    fn protection_keys(&self) -> PyResult<(u32, u64)> {
        let core = &self.shared.lock()?.core;
        Ok((core.pkru, core.msr.pkrs))
    }

    /// What VM exits leave of a guest in the processor: all of it that no VMCS holds.
    fn save_live<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &snapshot::save_live(&mut self.shared.lock()?.core)))
    }

    /// The reverse.  ValueError if that is none.
    fn load_live(&self, state: &[u8]) -> PyResult<()> {
        let core = &mut self.shared.lock()?.core;
        snapshot::load_live(core, state).map_err(|e| PyValueError::new_err(e.to_string()))
    }

    /// Stir 32 bytes into what the numbers of RDRAND and RDSEED follow from.
    fn stir(&self, bytes: [u8; 32]) -> PyResult<()> {
        let (words, _) = bytes.as_chunks::<8>();
        let seed = std::array::from_fn(|n| u64::from_le_bytes(words[n]));
        self.shared.lock()?.core.random.stir(seed);
        Ok(())
    }

    /// Everything live in the processor now, by SDM names in lower case.
    fn registers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        registers::all(py, &mut self.shared.lock()?.core)
    }

    /// Set some of them (bare mode).  Raises KeyError for a name that is none.
    fn set_registers(&self, values: &Bound<'_, PyDict>) -> PyResult<()> {
        registers::set_some(&mut self.shared.lock()?.core, values)
    }

    /// The processor's own MSR, as RDMSR in root mode would.  KeyError if there is none.
    fn rdmsr(&self, index: u32) -> PyResult<u64> {
        msr::read(&mut self.shared.lock()?.core, index)
            .ok_or_else(|| PyKeyError::new_err(format!("#GP(0): there is no MSR {index:#x}")))
    }

    /// As WRMSR in root mode.  KeyError if there is none or it does not take the value.
    fn wrmsr(&self, index: u32, value: u64) -> PyResult<()> {
        msr::write(&mut self.shared.lock()?.core, index, value).map_err(|_| {
            PyKeyError::new_err(format!("#GP(0): WRMSR of {value:#x} to {index:#x} (no such MSR, or bits)"))
        })
    }

    /// What CPUID shows in root mode (in a guest it always exits).
    fn set_cpuid(&self, leaf: u32, subleaf: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> PyResult<()> {
        self.shared.lock()?.core.cpuid.insert((leaf, subleaf), [eax, ebx, ecx, edx]);
        Ok(())
    }

    // --- address translation ---

    /// The host-physical address behind a linear address, now; no side effects, not counted.
    fn translate(&self, gva: u64) -> PyResult<Option<u64>> {
        Ok(self.shared.lock()?.core.peek(gva))
    }

    /// Memory at a linear address, through the live tables.  ValueError if unmapped.
    fn read_linear<'py>(&self, py: Python<'py>, gva: u64, length: usize) -> PyResult<Bound<'py, PyBytes>> {
        let machine = self.shared.lock()?;
        let core = &machine.core;
        PyBytes::new_with(py, length, |out| {
            let mut done = 0;
            while done < out.len() {
                let at = core.linear_add(gva, done as u64);
                let part = ((FRAME_BYTES - (at & PAGE_OFFSET)) as usize).min(out.len() - done);
                let piece = &mut out[done..done + part];
                if !core.peek(at).is_some_and(|hpa| core.mem.read_bytes(hpa, piece)) {
                    return Err(PyValueError::new_err(format!(
                        "linear address {at:#x} is not mapped to memory (reading {length} bytes at {gva:#x})"
                    )));
                }
                done += part;
            }
            Ok(())
        })
    }

    /// Every reference of a page walk in order: (dimension "guest"|"host", level, hpa, entry).
    ///
    /// No side effects, not counted.  eptp 0: one dimension.
    #[pyo3(signature = (gva, cr3, cr4, efer, eptp=0))]
    fn walk(
        &self,
        gva: u64,
        cr3: u64,
        cr4: u64,
        efer: u64,
        eptp: u64,
    ) -> PyResult<Vec<(&'static str, u8, u64, u64)>> {
        let mem = self.shared.lock()?.core.mem.clone();
        let cr0 = cr0::PG | cr0::PE | cr0::WP;
        let space =
            space::with_pdptes(&mem, Space { cr0, cr3, cr4, efer, pdpte: [0; 4], eptp, by_mode: false });
        let mut log = Vec::new();
        let intent = Intent { access: Access::Read, user: false, smap: false };
        // Where the walk ends early, what it saw so far is the answer.
        let mut walker = Walker { log: Some(&mut log), ..Walker::observer(&mem) };
        let _ = walker.walk(&space, gva, intent);
        let name = |is_host| if is_host { "host" } else { "guest" };
        Ok(log.into_iter().map(|(host, level, hpa, entry)| (name(host), level, hpa, entry)).collect())
    }

    /// The bytes of code at a linear address, as the guest of the current VMCS translates it: as
    /// many of `length` as are mapped.  Right after a VM exit, too; what is given replaces the
    /// guest's own register, and with a CR3 the PDPTEs are read there.  No side effects, not counted.
    #[pyo3(signature = (gva, length, cr0=None, cr3=None, cr4=None, efer=None, eptp=None))]
    #[allow(clippy::too_many_arguments)] // the registers of a regime
    fn fetch<'py>(
        &self,
        py: Python<'py>,
        gva: u64,
        length: usize,
        cr0: Option<u64>,
        cr3: Option<u64>,
        cr4: Option<u64>,
        efer: Option<u64>,
        eptp: Option<u64>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let mut out = [0; FETCH_BYTES];
        let Some(out) = out.get_mut(..length) else {
            return Err(PyValueError::new_err(format!("{length} bytes: expected at most {FETCH_BYTES}")));
        };
        let machine = self.shared.lock()?;
        let given = Given { cr0, cr3, cr4, efer, eptp };
        let space = space::guest_space(&machine.core, given).map_err(|VmFail(n)| vm_fail(py, n, ""))?;
        let n = space::fetch(&machine.core.mem, &space, gva, out);
        Ok(PyBytes::new(py, &out[..n]))
    }

    /// Drop all cached translations (of memory and of code).  For host-side changes.
    fn flush(&self) -> PyResult<()> {
        self.shared.lock()?.flush();
        Ok(())
    }

    /// Which 32-bit programs access memory through windows of the computer's own page tables: "auto",
    /// "always" or "never".  Only how fast they run depends on it.
    fn use_windows(&self, which: &str) -> PyResult<()> {
        let windows = match which {
            "auto" => Windows::Auto,
            "always" => Windows::Always,
            "never" => Windows::Never,
            _ => {
                let words = format!("windows={which:?}: expected \"auto\", \"always\" or \"never\"");
                return Err(PyValueError::new_err(words));
            }
        };
        self.shared.lock()?.use_windows(windows);
        Ok(())
    }

    /// Give the walker paging-structure caches and a nested TLB of so many entries; 0: off.
    fn set_walk_caches(&self, structures: u64, nested: u64) -> PyResult<()> {
        for (name, entries) in [("structures", structures), ("nested", nested)] {
            if entries > caches::MOST {
                let words = format!("{name}={entries}: expected 0 to {} entries", caches::MOST);
                return Err(PyValueError::new_err(words));
            }
        }
        self.shared.lock()?.core.tlb.caches.resize(structures, nested);
        Ok(())
    }

    /// Who is at CPL 0: "code", or "host", software outside.  And what becomes of sensitive instructions
    /// at a higher CPL: "silent", "trap" or "stop".
    fn set_ring0(&self, who: &str, sensitive: &str) -> PyResult<()> {
        let is_outside = match who {
            "code" => false,
            "host" => true,
            _ => return Err(PyValueError::new_err(format!("ring 0 {who:?}: expected \"code\" or \"host\""))),
        };
        let sensitive = match sensitive {
            "silent" => Sensitive::Silent,
            "trap" => Sensitive::Trap,
            "stop" => Sensitive::Stop,
            _ => {
                let words = format!("sensitive={sensitive:?}: expected \"silent\", \"trap\" or \"stop\"");
                return Err(PyValueError::new_err(words));
            }
        };
        let core = &mut self.shared.lock()?.core;
        core.ring0 = Ring0 { is_outside, sensitive };
        core.attention = 1;
        Ok(())
    }

    /// What `set_ring0` was told last.
    #[getter]
    fn ring0(&self) -> PyResult<(&'static str, &'static str)> {
        let Ring0 { is_outside, sensitive } = self.shared.lock()?.core.ring0;
        let sensitive = match sensitive {
            Sensitive::Silent => "silent",
            Sensitive::Trap => "trap",
            Sensitive::Stop => "stop",
        };
        Ok((if is_outside { "host" } else { "code" }, sensitive))
    }

    /// INVLPG, as software at CPL 0 executes it.
    fn invlpg(&self, gva: u64) -> PyResult<()> {
        system::invalidate(&mut self.shared.lock()?.core, gva);
        Ok(())
    }

    // --- time and interrupts ---

    /// The processor's TSC (without any VMCS offset), in ns.
    #[getter]
    fn tsc(&self) -> PyResult<u64> {
        Ok(self.shared.lock()?.core.tsc())
    }

    /// Virtual clock only: idle time passes.  Returns the TSC then.
    fn advance(&self, ticks: u64) -> PyResult<u64> {
        let core = &mut self.shared.lock()?.core;
        if core.clock != Clock::Virtual {
            return Err(PyValueError::new_err("advance: expected clock=\"virtual\"; this one is \"wall\""));
        }
        core.tsc_skew = core.tsc_skew.wrapping_add(ticks);
        Ok(core.tsc())
    }

    /// Instructions retired since reset.
    #[getter]
    fn retired(&self) -> PyResult<u64> {
        Ok(self.shared.lock()?.core.retired())
    }

    /// The processor's own local APIC (bare mode).
    #[getter]
    fn apic(&self) -> LocalApic {
        LocalApic::of(self.shared.clone())
    }

    // --- counting, saving ---

    /// Everything counted; all but "engine" are the same for every engine.
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let machine = self.shared.lock()?;
        let (core, c) = (&machine.core, &machine.core.counts);
        let nonzero = |numbers: &[u64]| {
            let dict = PyDict::new(py);
            for (i, n) in numbers.iter().enumerate().filter(|(_, n)| **n != 0) {
                dict.set_item(i, n)?;
            }
            PyResult::Ok(dict)
        };
        let (out, walk, engine) = (PyDict::new(py), PyDict::new(py), PyDict::new(py));
        out.set_item("instructions", core.retired())?;
        out.set_item("exits", nonzero(&c.exits)?)?;
        out.set_item("entries", c.entries)?;
        out.set_item("tlb_misses", c.tlb_misses)?;
        out.set_item("itlb_misses", c.itlb_misses)?;
        walk.set_item("guest", nonzero(&c.walk_guest)?)?;
        walk.set_item("host", nonzero(&c.walk_host)?)?;
        out.set_item("walk", walk)?;
        let (caches, structures, nested) = (PyDict::new(py), PyDict::new(py), PyDict::new(py));
        structures.set_item("hits", nonzero(&c.structure_hits)?)?;
        structures.set_item("misses", c.structure_misses)?;
        nested.set_item("hits", c.nested_hits)?;
        nested.set_item("misses", c.nested_misses)?;
        caches.set_item("structures", structures)?;
        caches.set_item("nested", nested)?;
        out.set_item("walk_caches", caches)?;
        out.set_item("injected", nonzero(&c.injected)?)?;
        for (name, value) in machine.statistics() {
            engine.set_item(name, value)?;
        }
        out.set_item("engine", engine)?;
        Ok(out)
    }

    /// The whole processor, between two `run`s (memory not included).
    fn save<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &snapshot::save(&mut self.shared.lock()?.core)))
    }

    /// Become what was saved.  ValueError if that is no saved processor.
    fn load(&self, state: &[u8]) -> PyResult<()> {
        let mut machine = self.shared.lock()?;
        snapshot::load(&mut machine.core, state).map_err(|e| PyValueError::new_err(e.to_string()))?;
        machine.flush();
        Ok(())
    }

    /// A 64-bit hash of registers, x87/SSE state, system state and counters.
    fn state_hash(&self) -> PyResult<u64> {
        Ok(snapshot::state_hash(&mut self.shared.lock()?.core))
    }
}
