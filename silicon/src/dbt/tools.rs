//! What translations are made with, and what they leave behind.

use iced_x86::{Encoder, Instruction, InstructionInfoFactory};

use super::block::{Indirect, Link, Site};
use super::glue::Glue;
use super::guess::Places;
use super::moved::{Move, Origin};
use super::numbered::Numbered;
use super::x87::Report;
use crate::cpu::decode::Execute;

/// What translations are made with, and what they leave behind.
pub struct Tools {
    /// The fixed pieces.
    pub glue: Glue,
    /// Re-encodes guest instructions.
    pub encoder: Encoder,
    /// Tells what instructions read and write.
    pub info: InstructionInfoFactory,
    /// The computer has RORX.
    pub has_bmi2: bool,
    /// Places to interpret from.
    pub sites: Numbered<Site>,
    /// Instructions that are always interpreted, and their executors.
    pub prepared: Numbered<(Instruction, Execute)>,
    /// Instructions that may fault when executed: host address (in a region ascending) and site.
    pub faults: Numbered<(u64, u32)>,
    /// Direct transfers.
    pub links: Numbered<Link>,
    /// Indirect transfers.
    pub indirects: Numbered<Indirect>,
    /// What there is to say of x87 instructions.
    pub x87: Numbered<Report>,
    /// What is needed to move blocks.
    pub origins: Numbered<Origin>,
    /// Places in their code.
    pub moves: Numbered<Move>,
    /// Where operands are that were guessed to be elsewhere.
    pub places: Places,
}

impl Tools {
    /// Tools that were not used yet.
    #[must_use]
    pub fn new(glue: Glue) -> Self {
        Self {
            glue,
            encoder: Encoder::new(64),
            info: InstructionInfoFactory::new(),
            has_bmi2: std::arch::is_x86_feature_detected!("bmi2"),
            sites: Numbered::default(),
            prepared: Numbered::default(),
            faults: Numbered::default(),
            links: Numbered::default(),
            indirects: Numbered::default(),
            x87: Numbered::default(),
            origins: Numbered::default(),
            moves: Numbered::default(),
            places: Places::default(),
        }
    }

    /// Forget what translations in a region of the cache left behind, and go on there.
    pub fn begin(&mut self, region: usize) {
        self.sites.begin(region);
        self.prepared.begin(region);
        self.faults.begin(region);
        self.links.begin(region);
        self.indirects.begin(region);
        self.x87.begin(region);
        self.origins.begin(region);
        self.moves.begin(region);
    }

    /// Bytes of what was left behind in a region.
    #[must_use]
    pub fn bytes(&self, region: usize) -> usize {
        self.sites.bytes(region)
            + self.prepared.bytes(region)
            + self.faults.bytes(region)
            + self.links.bytes(region)
            + self.indirects.bytes(region)
            + self.x87.bytes(region)
            + self.origins.bytes(region)
            + self.moves.bytes(region)
    }
}
