//! What the processors of one memory share beside its bytes: who runs, the bus lock, news.
//!
//! Each processor is an [`Agent`] of the bus, and present on it while a thread runs it
//! ([`Agent::arrive`]).  Only once two were present at the same time are they *parallel*, for ever:
//! what is needed then alone costs nothing before.
//!
//! * *Bells.*  A word for each processor that others set ([`Agent::ring`]) and its own dispatcher
//!   answers.  Generated code does not look at it; who rings nudges the thread that runs it
//!   ([`crate::dbt::nudge`]), which interrupts its own countdown.  Whoever stores a countdown, and then
//!   runs generated code, looks at the word in between ([`Core::heed`]).
//! * *The bus lock* ([`Bus::lock`]; SDM 3A, "Bus Locking").  Everybody else stops between two
//!   instructions until it is released.  It is for what no locked instruction of the computer can
//!   do: a locked operand in two pages that are not neighbours.
//! * *Changes* ([`Bus::change`]): something was taken away of which others may have a copy (a dirty
//!   mark, the right to write to a frame without asking).  Who took it waits until every processor
//!   that is present has caught up ([`Core::catch_up`]); one that is not does so when it arrives.
//!
//! Nobody waits without giving way to the bus lock and catching up himself, so no two wait for each
//! other.  A processor catches up only where it holds no pointer that it got before: at the head of
//! its dispatcher's loop, or of a block that is looked up anew.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, Weak};

use crate::cpu::state::Core;
use crate::dbt::home::Bell;
use crate::dbt::nudge::nudge;

/// What a bell is rung for.
pub mod news {
    /// To make the run end.
    pub const KICK: u32 = 1;
    /// To look at the bus.
    pub const ATTEND: u32 = 2;
}

/// What [`Agent::caught_up`] is while the processor is absent.
const ABSENT: u64 = u64::MAX;

/// Looks at a condition before the thread lets others run.
const SPINS: u32 = 256;

/// Between two looks at a condition that another thread brings about.
fn relax(spins: &mut u32) {
    *spins += 1;
    if *spins < SPINS {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

/// What the processors of one memory share.
#[derive(Default)]
pub struct Bus {
    agents: RwLock<Vec<Weak<Agent>>>,
    /// How many are present and do not stand still.
    running: AtomicU32,
    is_locked: AtomicBool,
    is_parallel: AtomicBool,
    /// Everybody knows that they are.
    is_parallel_known: AtomicBool,
    changes: AtomicU64,
    /// Those of them that are marks of code.
    marks: AtomicU64,
}

/// A processor on the bus.
pub struct Agent {
    bus: Arc<Bus>,
    bell: Bell,
    /// The changes that it knows of; [`ABSENT`] while it does not run.
    caught_up: AtomicU64,
}

/// A processor is present until this is dropped.
pub struct Presence(Arc<Agent>);

impl Presence {
    /// Do something that may last, as if absent.
    pub fn aside<T>(&self, act: impl FnOnce() -> T) -> T {
        self.0.depart();
        let result = act();
        self.0.come();
        result
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.0.depart();
    }
}

/// Everybody else stands still until this is dropped.
pub struct Locked<'a>(&'a Bus);

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.0.is_locked.store(false, SeqCst);
    }
}

impl Bus {
    /// Another processor, absent at first.
    pub fn join(self: &Arc<Self>, bell: Bell) -> Arc<Agent> {
        let agent = Arc::new(Agent { bus: self.clone(), bell, caught_up: AtomicU64::new(ABSENT) });
        let mut agents = self.agents.write().unwrap_or_else(PoisonError::into_inner);
        agents.retain(|a| a.strong_count() > 0);
        agents.push(Arc::downgrade(&agent));
        agent
    }

    fn agents(&self) -> RwLockReadGuard<'_, Vec<Weak<Agent>>> {
        self.agents.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether two processors were ever present at the same time.
    #[inline]
    #[must_use]
    pub fn is_parallel(&self) -> bool {
        self.is_parallel.load(Relaxed)
    }

    /// How many changes there were.
    #[inline]
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes.load(SeqCst)
    }

    /// How many frames were marked.
    #[must_use]
    pub fn marks(&self) -> u64 {
        self.marks.load(SeqCst)
    }

    /// Something was taken away; the number of the change.
    pub fn change(&self) -> u64 {
        self.changes.fetch_add(1, SeqCst) + 1
    }

    /// Ring every bell but one's own.
    pub fn ring(&self, but: Option<&Agent>) {
        let me = but.map_or(std::ptr::null(), std::ptr::from_ref);
        for agent in self.agents().iter().filter(|a| a.as_ptr() != me) {
            if let Some(agent) = agent.upgrade() {
                agent.ring(news::ATTEND);
            }
        }
    }

    /// Whether everybody who is present, but one, knows of a change.
    fn knows(&self, change: u64, but: Option<&Agent>) -> bool {
        let me = but.map_or(std::ptr::null(), std::ptr::from_ref);
        let agents = self.agents();
        agents.iter().filter(|a| a.as_ptr() != me).filter_map(Weak::upgrade).all(|a| a.has_seen(change))
    }

    /// Wait until every processor that is present knows of a change.  Not for a processor itself:
    /// it may be the one that is waited for.
    pub fn publish(&self, change: u64) {
        if self.running.load(SeqCst) == 0 {
            return;
        }
        self.ring(None);
        let mut spins = 0;
        while !self.knows(change, None) {
            relax(&mut spins);
        }
    }

    /// Lock the bus, for a processor (present or not).
    pub fn lock<'a>(&'a self, agent: &Agent) -> Locked<'a> {
        let own = u32::from(agent.is_present());
        let mut spins = 0;
        while self.is_locked.compare_exchange(false, true, SeqCst, Relaxed).is_err() {
            if own != 0 { self.give_way() } else { relax(&mut spins) }
        }
        if self.running.load(SeqCst) > own {
            self.ring(Some(agent));
        }
        let mut spins = 0;
        while self.running.load(SeqCst) > own {
            relax(&mut spins);
        }
        Locked(self)
    }

    /// Stand still while somebody else has locked the bus.
    #[inline]
    pub fn give_way(&self) {
        if self.is_locked.load(SeqCst) {
            self.stand_still();
        }
    }

    #[cold]
    fn stand_still(&self) {
        let mut spins = 0;
        while self.is_locked.load(SeqCst) {
            self.running.fetch_sub(1, SeqCst);
            while self.is_locked.load(Relaxed) {
                relax(&mut spins);
            }
            self.running.fetch_add(1, SeqCst);
        }
    }
}

impl Agent {
    /// The bus.
    #[inline]
    #[must_use]
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Have the processor look up soon; from any thread.
    pub fn ring(&self, news: u32) {
        if self.bell.word().fetch_or(news, SeqCst) == 0 {
            nudge(self.bell.thread()); // (else somebody did, or nobody has to)
        }
    }

    /// Whether somebody rang.
    #[inline]
    #[must_use]
    pub fn is_rung(&self) -> bool {
        self.bell.word().load(Relaxed) != 0
    }

    /// What the bell was rung for since the last answer.
    #[inline]
    pub fn answer(&self) -> u32 {
        if self.is_rung() { self.bell.word().swap(0, SeqCst) } else { 0 }
    }

    /// The thread that runs its generated code, or 0.
    #[must_use]
    pub fn thread(&self) -> &AtomicU32 {
        self.bell.thread()
    }

    /// Whether a thread runs it.
    #[must_use]
    pub fn is_present(&self) -> bool {
        self.caught_up.load(Relaxed) != ABSENT
    }

    fn has_seen(&self, change: u64) -> bool {
        self.caught_up.load(SeqCst) >= change
    }

    /// Be present.  The processor catches up before it executes anything.
    #[must_use]
    pub fn arrive(self: Arc<Self>) -> Presence {
        self.come();
        Presence(self)
    }

    fn come(&self) {
        self.caught_up.store(0, SeqCst);
        let others = self.bus.running.fetch_add(1, SeqCst);
        self.bus.give_way();
        if others > 0 && !self.bus.is_parallel_known.load(Acquire) {
            self.begin_parallel();
        }
    }

    fn depart(&self) {
        self.bus.running.fetch_sub(1, SeqCst);
        self.caught_up.store(ABSENT, SeqCst);
    }

    /// Two are present for the first time: nothing is executed here until the others know of it.
    #[cold]
    fn begin_parallel(&self) {
        self.bus.is_parallel.store(true, SeqCst);
        let change = self.bus.change();
        self.wait_for(change, || self.caught_up.store(change, SeqCst));
        self.bus.is_parallel_known.store(true, Release);
    }

    /// Wait until all others that are present know of a change; `meanwhile` catches up with theirs.
    pub fn wait_for(&self, change: u64, mut meanwhile: impl FnMut()) {
        self.bus.ring(Some(self));
        let mut spins = 0;
        while !self.bus.knows(change, Some(self)) {
            self.bus.give_way();
            meanwhile();
            relax(&mut spins);
        }
    }
}

impl Core {
    /// After the countdown was stored and before generated code goes on: whoever rang is heard.
    #[inline]
    pub fn heed(&self) {
        if self.agent.is_rung() {
            self.countdown.interrupt();
        }
    }

    /// Give up what others have taken away.  Nothing may be in use that generated code got from the
    /// first level of the TLB before.
    #[inline]
    pub fn catch_up(&mut self) {
        let now = self.agent.bus.changes();
        if self.caught_up != now {
            self.caught_up = now;
            self.give_up();
        }
        if self.agent.is_present() {
            self.agent.caught_up.store(now, Release);
        }
    }

    #[cold]
    fn give_up(&mut self) {
        let marks = self.agent.bus.marks();
        if self.marks != marks {
            self.marks = marks;
            let (mem, base) = (self.mem.clone(), self.mem.base() as u64);
            self.tlb.l1_protect_where(base, |host| {
                let pfn = host.wrapping_sub(base) >> 12;
                let is_code = mem.is_code(pfn);
                if is_code {
                    mem.report_code(pfn, self.holder, &self.agent);
                }
                is_code
            });
        }
        let now = (self.mem.dirty_epoch(), self.agent.bus.is_parallel());
        if (self.dirty_epoch, self.is_parallel) != now {
            (self.dirty_epoch, self.is_parallel) = now;
            self.tlb.flush_l1();
        }
    }

    /// Tell the bus that this processor has marked a frame; the number of the change.
    pub fn tell_mark(&mut self) -> u64 {
        // (One's own is no news, unless there is other.)
        if self.agent.bus.marks.fetch_add(1, SeqCst) == self.marks {
            self.marks += 1;
        }
        let change = self.agent.bus.change();
        if change == self.caught_up + 1 {
            self.caught_up = change;
        }
        change
    }
}
