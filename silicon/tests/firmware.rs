//! An unmodified PC firmware as a guest of the bare machine: 16-bit and 32-bit code, mode switches
//! there and back, far transfers, software interrupts, ports.
//!
//! Uses SeaBIOS where the computer's QEMU or Bochs has put it; says so and passes where there is
//! none.
#![allow(missing_docs)]

use std::collections::VecDeque;

use silicon::arch::exit::{Exit, reason};
use silicon::cpu::state::Clock;
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};

const IMAGES: [&str; 2] = ["/usr/share/seabios/bios.bin", "/usr/share/qemu/bios.bin"];
const DEBUG_PORT: u16 = 0x402;
const INSTRUCTIONS: u64 = 20_000_000;

/// Just enough of a PC: CMOS memory, a keyboard controller, a debug port.
struct Board {
    cmos: [u8; 128],
    cmos_index: usize,
    keyboard: VecDeque<u8>,
    refresh: u64,
    text: String,
}

impl Board {
    fn read(&mut self, port: u16) -> u64 {
        match port {
            0x71 => u64::from(self.cmos[self.cmos_index]),
            0x61 => {
                // Memory refresh toggles bit 4; the speaker's timer runs out in bit 5.
                self.refresh = (self.refresh + 0x10) & 0x30;
                self.refresh
            }
            0x64 => 0x1C | u64::from(!self.keyboard.is_empty()),
            0x60 => u64::from(self.keyboard.pop_front().unwrap_or(0)),
            DEBUG_PORT => 0xE9,
            _ => u64::MAX,
        }
    }

    fn write(&mut self, port: u16, value: u8) {
        match port {
            0x70 => self.cmos_index = usize::from(value & 0x7F),
            0x71 => self.cmos[self.cmos_index] = value,
            0x64 if value == 0xAA => self.keyboard.push_back(0x55),
            0x64 if value == 0xAB => self.keyboard.push_back(0),
            0x60 if value == 0xFF => self.keyboard.extend([0xFA, 0xAA]),
            0x60 => self.keyboard.push_back(0xFA),
            DEBUG_PORT => self.text.push(char::from(value)),
            _ => {}
        }
    }

    /// Complete an access as the notes of `cpu::io` say.
    fn serve(&mut self, p: &mut Processor, stop: &Exit) {
        let port = (stop.qualification >> 16) as u16;
        let mask = u64::MAX >> (56 - 8 * (stop.qualification & 7));
        assert_eq!(0, stop.qualification & 0x10, "no string instruction is expected");
        if stop.qualification & 8 == 0 {
            self.write(port, stop.gla as u8);
        } else {
            let keep = if mask == 0xFFFF_FFFF { 0 } else { p.core.gpr[0] & !mask };
            p.core.gpr[0] = keep | (self.read(port) & mask);
        }
        p.core.rip += u64::from(stop.length);
    }
}

#[test]
fn seabios_comes_to_its_boot_menu() {
    let Some(image) = IMAGES.iter().find_map(|path| std::fs::read(path).ok()) else {
        eprintln!("skipped: no SeaBIOS in {IMAGES:?}");
        return;
    };
    let mem = Memory::new(1 << 32).unwrap();
    let size = image.len() as u64;
    assert!(mem.write_bytes((1 << 32) - size, &image));
    assert!(mem.write_bytes((1 << 20) - size, &image));
    let mut p = Processor::new(mem, EngineKind::Reference, Clock::Virtual, 0).unwrap();
    p.core.cpuid.insert((0, 0), [1, 0x756E_6547, 0x6C65_746E, 0x4965_6E69]);
    p.core.cpuid.insert((1, 0), [0x600, 0, 0, 0x10]); // it has a TSC
    let mut cmos = [0; 128];
    cmos[0x35] = 6; // 64-KByte pieces of memory above 16 MBytes, high byte
    let mut board = Board { cmos, cmos_index: 0, keyboard: VecDeque::new(), refresh: 0, text: String::new() };
    while p.core.retired() < INSTRUCTIONS && !board.text.contains("boot menu") {
        let stop = p.run(INSTRUCTIONS - p.core.retired(), &mut || false);
        match stop.reason {
            reason::PIO => board.serve(&mut p, &stop),
            _ => break,
        }
    }
    assert!(board.text.contains("Press ESC for boot menu"), "it said:\n{}", board.text);
    assert!(p.core.counts.injected[0x10] > 0, "it called INT 10H");
}
