//! Run random instructions on the machine and on this computer's own processor, and compare:
//! `fuzz [--count INSTRUCTIONS] [--seed N] [--first BATCH] [--engine reference|dbt] [--wide PERCENT]
//! [--patience N] [--code-bytes N] [--windows always|never] [--against reference] [--encodings 1]
//! [--vex PERCENT]`.  Against the reference engine, 32-bit programs also have
//! segments with bases, limits and other rights.

mod areas;
mod case;
mod computer;
mod encodings;
mod generate;
mod machine;
mod makers;
mod session;
mod values;
mod vex;

use std::process::ExitCode;
use std::time::Instant;

use silicon::dbt::promotion::Windows;
use silicon::processor::EngineKind;

fn main() -> ExitCode {
    let mut options = session::Options {
        seed: 1,
        instructions: 1_000_000,
        first: 0,
        engine: EngineKind::Reference,
        code_bytes: silicon::dbt::cache::CACHE_BYTES,
        wide: 70,
        with_reference: false,
        vex: 15,
        patience: 1,
        windows: Windows::Auto,
    };
    let mut are_encodings = false;
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let value = args.next().unwrap_or_default();
        let number = value.parse().unwrap_or(u64::MAX);
        match name.as_str() {
            "--count" => options.instructions = number,
            "--seed" => options.seed = number,
            "--first" => options.first = number,
            "--patience" => options.patience = number as usize,
            "--vex" => options.vex = number.min(100),
            "--wide" => options.wide = number,
            "--code-bytes" => options.code_bytes = number as usize,
            "--encodings" => are_encodings = number == 1,
            "--against" if value == "reference" => options.with_reference = true,
            "--windows" if value == "always" => options.windows = Windows::Always,
            "--windows" if value == "never" => options.windows = Windows::Never,
            "--engine" if value == "reference" => options.engine = EngineKind::Reference,
            "--engine" if value == "dbt" => options.engine = EngineKind::Dbt,
            _ => {
                eprintln!(
                    "fuzz: {name} {value}: expected --count, --seed, --first, --wide, --vex, --patience or --code-bytes with a number, --engine reference|dbt, --windows always|never, or --against reference"
                );
                return ExitCode::from(2);
            }
        }
    }
    let begin = Instant::now();
    let sum = if are_encodings { encodings::run(&options) } else { session::run(&options) };
    let sum = match sum {
        Ok(sum) => sum,
        Err(e) => {
            eprintln!("fuzz: no process or memory for the comparison: {e}");
            return ExitCode::from(2);
        }
    };
    for d in &sum.differences {
        println!("{d}");
    }
    let endings: Vec<String> =
        (0..32).filter(|&i| sum.endings[i] != 0).map(|i| format!("{i}: {}", sum.endings[i])).collect();
    println!(
        "{} instructions in {} cases, {} different; cases by the vector that ended them: {}; {:.1} s",
        sum.instructions,
        sum.cases,
        sum.differences.len(),
        endings.join(", "),
        begin.elapsed().as_secs_f64()
    );
    let shown: Vec<String> = sum.statistics.iter().map(|(name, n)| format!("{name} {n}")).collect();
    println!("the engine: {}", shown.join(", "));
    if sum.differences.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
