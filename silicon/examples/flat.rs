//! Run a flat binary on the bare processor: `flat FILE LOAD ENTRY RDI RSI [engine [chunk]]`; with
//! `BITS=32` in the environment it is 32-bit code, with a chunk both engines run in lockstep.
use silicon::arch::segment::{Segment, seg};
use silicon::cpu::state::Clock;
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};
use std::time::Instant;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let num = |s: &str| {
        u64::from_str_radix(s.trim_start_matches("0x"), if s.starts_with("0x") { 16 } else { 10 }).unwrap()
    };
    let image = std::fs::read(&args[1]).unwrap();
    let engines: Vec<&str> =
        args.get(6).filter(|e| *e != "both").map_or(vec!["reference", "dbt"], |e| vec![e.as_str()]);
    let mut made = Vec::new();
    let is_32 = std::env::var("BITS").is_ok_and(|b| b == "32");
    for e in engines {
        let kind = if e == "dbt" { EngineKind::Dbt } else { EngineKind::Reference };
        let mem = Memory::new(64 << 20).unwrap();
        mem.write_bytes(num(&args[2]), &image);
        mem.store(0x1000, 8, 0x2003);
        mem.store(0x2000, 8, 0x3003);
        for i in 0..32 {
            mem.store(0x3000 + 8 * i, 8, i << 21 | 0x83);
        }
        let mut p = Processor::new(mem, kind, Clock::Virtual, 0).unwrap();
        let c = &mut *p.core;
        c.cr0 = 0x8001_0033;
        c.cr3 = 0x1000;
        c.cr4 = 0x6A0;
        c.efer = 0xD01;
        for s in &mut c.seg {
            *s = Segment { base: 0, limit: u32::MAX, attr: 0xC093, selector: 0x10 };
        }
        c.seg[seg::CS] = Segment { base: 0, limit: u32::MAX, attr: 0xA09B, selector: 8 };
        if is_32 {
            // Pages of 4 MBytes, one table.
            for i in 0..16 {
                c.mem.store(0x1000 + 4 * i, 4, i << 22 | 0x83);
            }
            (c.cr4, c.efer) = (0x690, 0);
            c.seg[seg::CS].attr = 0xC09B;
        }
        c.rip = num(&args[3]);
        c.gpr[4] = 0x3F0_0000 - 8;
        c.gpr[7] = num(&args[4]);
        c.gpr[6] = num(&args[5]);
        c.refresh();
        if let Some(n) = args.get(7) {
            made.push(p);
            if made.len() == 2 {
                lockstep(&mut made, num(n));
            }
            continue;
        }
        let t = Instant::now();
        let exit = p.run(0, &mut || false);
        let dt = t.elapsed().as_secs_f64();
        println!(
            "{e:10} reason {:#x} rax {:#x} rip {:#x} retired {} misses {} {:.3} s {:.1} MIPS {:?}",
            exit.reason,
            p.core.gpr[0],
            p.core.rip,
            p.core.retired(),
            p.core.counts.tlb_misses,
            dt,
            p.core.retired() as f64 / dt / 1e6,
            p.statistics()
        );
    }
}

fn lockstep(m: &mut [Processor], chunk: u64) {
    for i in 0.. {
        let rips = [m[0].core.rip, m[1].core.rip];
        let a = m[0].run(chunk, &mut || false);
        let b = m[1].run(chunk, &mut || false);
        let (x, y) = (&m[0].core, &m[1].core);
        if a != b || x.gpr != y.gpr || x.rip != y.rip || x.rflags != y.rflags || x.fx != y.fx {
            println!("differ in chunk {i} from {rips:x?}: {a:x?} {b:x?}");
            println!("{:x?}\n{:x?}", x.gpr, y.gpr);
            println!(
                "rip {:x} {:x} flags {:x} {:x} retired {} {}",
                x.rip,
                y.rip,
                x.rflags,
                y.rflags,
                x.retired(),
                y.retired()
            );
            for k in 0..32 {
                if x.fx.0[16 * k..16 * k + 16] != y.fx.0[16 * k..16 * k + 16] {
                    println!(
                        "fx {k}: {:x?} {:x?}",
                        &x.fx.0[16 * k..16 * k + 16],
                        &y.fx.0[16 * k..16 * k + 16]
                    );
                }
            }
            return;
        }
        if a.reason != 0x10000 {
            println!("same until {a:x?}");
            return;
        }
    }
}
