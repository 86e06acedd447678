"""understudy: a hypervisor for x86, written in Python on a machine written in Rust."""
