//! Single instructions in real-address mode, against results recorded from an 80286.
//!
//! The file is not part of the project.  It is found in ../shared/data, or `UNDERSTUDY_VECTORS` names it
//! (JSON lines, gzipped: `f` form, `n` name, `b` bytes, `i` registers and memory before, `o` what
//! changed, `x` exception); without it the test says that it was skipped.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};

use flate2::read::GzDecoder;
use serde_json::Value;
use silicon::arch::bits::rflags::{AF, CF, OF, PF, SF, ZF};
use silicon::arch::segment::{Segment, TableRegister, seg};
use silicon::cpu::event;
use silicon::cpu::state::{Clock, Core};
use silicon::cpu::step::step;
use silicon::cpu::trap::Trap;
use silicon::dbt::home::Home;
use silicon::mem::Memory;

/// Flags that exist in real-address mode on both processors: the 80286 shows IOPL and NT as zero.
const FLAGS: u64 = 0x0FD5;
const BESIDE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data/real-mode-vectors.jsonl.gz");
const GENERAL: [&str; 8] = ["ax", "cx", "dx", "bx", "sp", "bp", "si", "di"];
const SEGMENTS: [(&str, usize); 4] = [("es", seg::ES), ("cs", seg::CS), ("ss", seg::SS), ("ds", seg::DS)];

/// Forms that this test leaves out, and why.
fn left_out(form: &str) -> Option<&'static str> {
    match form {
        "E4" | "E5" | "E6" | "E7" | "EC" | "ED" | "EE" | "EF" | "6C" | "6D" | "6E" | "6F" => {
            Some("ports: there are no devices here")
        }
        "F4" => Some("HLT: how a halted 80286 leaves IP is a matter of the recording"),
        _ => None,
    }
}

/// Recordings that no later processor agrees with, by their bytes and IP: the reason.
fn is_revoked(vector: &Value) -> Option<&'static str> {
    let (bytes, ip) = (vector["b"].as_str().expect("bytes"), number(&vector["i"][0]["ip"]));
    match (bytes, ip, vector["x"].as_u64()) {
        ("cef4", 39984, _) => Some("SS was pushed in the place of CS"),
        ("f63cf4", 64848, _) => Some("a quotient of -260 made no #DE"),
        (_, _, Some(13)) if ["A5", "A7", "AB", "AD", "AF"].iter().any(|f| vector["f"] == **f) => {
            Some("a faulting string instruction leaves its pointers moved on an 80286 only")
        }
        (_, _, Some(6)) if vector["n"].as_str().expect("name").contains("fs") => Some("an 80286 has no FS"),
        _ => None,
    }
}

/// Flags that the manual leaves undefined after the instruction: SDM 2, "Flags Affected".
fn undefined(vector: &Value) -> u64 {
    let (opcode, extension) = {
        let form = vector["f"].as_str().expect("form");
        form.split_once('.').unwrap_or((form, ""))
    };
    let count = match opcode {
        "C0" | "C1" => {
            let bytes = vector["b"].as_str().expect("bytes");
            u64::from_str_radix(&bytes[bytes.len() - 4..bytes.len() - 2], 16).expect("hex") & 31
        }
        "D0" | "D1" => 1,
        "D2" | "D3" => number(&vector["i"][0]["cx"]) & 31,
        "08" | "09" | "0A" | "0B" | "0C" | "0D" | "20" | "21" | "22" | "23" | "24" | "25" => return AF,
        "30" | "31" | "32" | "33" | "34" | "35" | "84" | "85" | "A8" | "A9" => return AF,
        "80" | "81" | "82" | "83" => return if matches!(extension, "1" | "4" | "6") { AF } else { 0 },
        "27" | "2F" => return OF,
        "37" | "3F" => return OF | SF | ZF | PF,
        "D4" | "D5" => return OF | AF | CF,
        "69" | "6B" => return SF | ZF | AF | PF,
        "F6" | "F7" => {
            return match extension {
                "0" | "1" => AF,
                "4" | "5" => SF | ZF | AF | PF,
                "6" | "7" => CF | OF | SF | ZF | AF | PF,
                _ => 0,
            };
        }
        _ => return 0,
    };
    let bits = if opcode.ends_with(['1', '3']) { 16 } else { 8 };
    let (is_shift, is_sar) = (matches!(extension, "4" | "5" | "6" | "7"), extension == "7");
    let mut flags = if count > 1 { OF } else { 0 };
    if is_shift && count > 0 {
        flags |= AF;
    }
    if is_shift && !is_sar && count >= bits {
        flags |= CF;
    }
    flags
}

fn number(v: &Value) -> u64 {
    v.as_u64().expect("a number")
}

fn set_up(core: &mut Core, before: &Value) {
    for (i, name) in GENERAL.iter().enumerate() {
        core.gpr[i] = number(&before[0][name]);
    }
    for (name, i) in SEGMENTS {
        let selector = number(&before[0][name]);
        core.seg[i] = Segment { base: selector << 4, limit: 0xFFFF, attr: 0x93, selector: selector as u16 };
    }
    core.rip = number(&before[0]["ip"]);
    core.rflags = number(&before[0]["flags"]) & FLAGS & !0x100 | 2;
    for pair in before[1].as_array().expect("memory") {
        core.mem.store(number(&pair[0]), 1, number(&pair[1]));
    }
    core.refresh();
}

/// Execute one instruction, and deliver what it raises.
fn execute(core: &mut Core) -> Result<Option<u8>, String> {
    loop {
        match step(core) {
            Ok(()) => return Ok(None),
            Err(Trap::Again) => {}
            Err(Trap::Exception(e)) => {
                return match event::raise(core, e) {
                    Ok(()) => Ok(Some(e.vector)),
                    Err(t) => Err(format!("{t:?}")),
                };
            }
            Err(t) => return Err(format!("{t:?}")),
        }
    }
}

/// What differs from the recording, if anything.
fn compare(core: &Core, vector: &Value) -> Vec<String> {
    let (before, after) = (&vector["i"][0], &vector["o"][0]);
    let shown = FLAGS & !undefined(vector);
    let mut wrong = Vec::new();
    let mut check = |name: &str, got: u64, mask: u64| {
        let expected = number(after.get(name).unwrap_or(&before[name]));
        if (got ^ expected) & mask != 0 {
            wrong.push(format!("{name} expected {expected:#x}, got {got:#x} (mask {mask:#x})"));
        }
    };
    for (i, name) in GENERAL.iter().enumerate() {
        check(name, core.gpr[i], 0xFFFF);
    }
    for (name, i) in SEGMENTS {
        check(name, u64::from(core.seg[i].selector), 0xFFFF);
    }
    // The recording ends with the HLT that follows.
    check("ip", core.rip + 1, 0xFFFF);
    check("flags", core.rflags, shown);
    let pushed = vector["x"].as_u64().map(|_| core.seg[seg::SS].base + ((core.gpr[4] + 4) & 0xFFFF));
    for pair in vector["o"][1].as_array().expect("memory") {
        let (at, expected) = (number(&pair[0]), number(&pair[1]));
        // The pushed flags image: only the defined flags that exist.
        let mask = match pushed {
            Some(p) if at == p => shown & 0xFF,
            Some(p) if at == p + 1 => shown >> 8,
            _ => 0xFF,
        };
        let got = core.mem.load(at, 1);
        if (got ^ expected) & mask != 0 {
            wrong.push(format!("[{at:#x}] expected {expected:#x}, got {got:#x}"));
        }
    }
    wrong
}

#[test]
fn single_instructions_do_what_an_80286_did() {
    let named = std::env::var_os("UNDERSTUDY_VECTORS");
    let path = named.clone().unwrap_or(BESIDE.into());
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(why) => {
            assert!(named.is_none(), "UNDERSTUDY_VECTORS: {}: {why}", path.display());
            eprintln!("skipped, no recording: {}: {why}; UNDERSTUDY_VECTORS names another", path.display());
            return;
        }
    };
    let (mut ran, mut failures) = (0, BTreeMap::<String, Vec<String>>::new());
    for line in BufReader::new(GzDecoder::new(file)).lines() {
        let vector: Value = serde_json::from_str(&line.expect("gzip")).expect("JSON");
        let form = vector["f"].as_str().expect("form").to_owned();
        if left_out(&form).or(is_revoked(&vector)).is_some() {
            continue;
        }
        let mut core = Home::new(Memory::new(0x11_0000).expect("memory"), Clock::Virtual, 0).unwrap();
        core.idtr = TableRegister { base: 0, limit: 0x3FF };
        set_up(&mut core, &vector["i"]);
        let wrong = match execute(&mut core) {
            // A word at SS:FFFF is #GP on an 80286, and #SS ever since.
            Ok(Some(12)) if vector["x"] == 13 => Vec::new(),
            Ok(_) => compare(&core, &vector),
            Err(what) => vec![what],
        };
        ran += 1;
        if !wrong.is_empty() {
            let what = format!("{} {}: {}", vector["n"], vector["b"], wrong.join("; "));
            failures.entry(form).or_default().push(what);
        }
    }
    assert!(ran > 1000, "expected thousands of recorded instructions, found {ran}");
    let shown: Vec<String> =
        failures.iter().map(|(f, w)| format!("{f}: {} wrong, first: {}", w.len(), w[0])).collect();
    assert!(failures.is_empty(), "of {ran}:\n{}", shown.join("\n"));
}
