//! The engine's own counters, for tests that guard what translated code costs.

use silicon::processor::Processor;

/// One of them.
pub fn counter(processor: &Processor, name: &str) -> u64 {
    processor.statistics().into_iter().find(|s| s.0 == name).unwrap().1
}
