//! What this computer's processor offers to the engine.

/// Every feature that the engine can use, by its short name, and whether it is there.
#[must_use]
pub fn host_features() -> Vec<(&'static str, bool)> {
    macro_rules! ask {
        ($($name:literal = $feature:tt),* $(,)?) => {
            vec![$(($name, std::arch::is_x86_feature_detected!($feature))),*]
        };
    }
    ask![
        "sse3" = "sse3",
        "ssse3" = "ssse3",
        "sse41" = "sse4.1",
        "sse42" = "sse4.2",
        "popcnt" = "popcnt",
        "lzcnt" = "lzcnt",
        "bmi1" = "bmi1",
        "bmi2" = "bmi2",
        "adx" = "adx",
        "movbe" = "movbe",
        "cx16" = "cmpxchg16b",
        "aes" = "aes",
        "pclmulqdq" = "pclmulqdq",
        "sha" = "sha",
        "gfni" = "gfni",
        "fxsr" = "fxsr",
        "avx" = "avx",
        "avx2" = "avx2",
        "fma" = "fma",
        "f16c" = "f16c",
        "rdrand" = "rdrand",
        "rdseed" = "rdseed",
    ]
}

/// Whether this computer's processor is one of AMD's, whose ways the machine has where makers differ.
#[must_use]
pub fn is_amd() -> bool {
    std::arch::x86_64::__cpuid(0).ecx == u32::from_le_bytes(*b"cAMD")
}

#[cfg(test)]
mod tests {
    use super::host_features;

    #[test]
    fn every_name_stands_once() {
        let mut names: Vec<_> = host_features().into_iter().map(|(name, _)| name).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(all, names.len());
    }
}
