"""A guest's faults are the guest's, whoever else has handlers for the signals they arrive as.

Each scene runs in a process of its own: what is wrong ends it.
Source: sigaction(2), "faulthandler" in Python's library reference.
"""

import signal
import subprocess
import sys

import pytest

# A guest divides by zero in its tenth turn; its #DE handler ends the run.
PROLOGUE = """
import dataclasses, faulthandler, os, signal, struct, sys, threading
from understudy import VM
from understudy.guests import hello, loader
def made():
    vm = VM(memory="4M")
    entry = loader.load(vm.memory, hello.image())
    gates = b"".join(
        struct.pack("<HHBBHII", 0x9000, 0x10, 0, 0x8E, 0x10, 0, 0) for _ in range(256)
    )
    vm.memory.write(0x10B000, gates)
    vm.memory.write(0x109000, bytes.fromhex("b0aae6f4f4"))
    vm.memory.write(
        0x100000,
        bytes.fromhex(
            "b96400000031d2b805000000bb01000000e2fe"
            "b96400000031d2b805000000f7f383f914750231dbe2eee6f4"
        ),
    )
    registers = dict(entry.registers, rsp=0x150000, idtr_base=0x10B000, idtr_limit=4095)
    vm.enter(dataclasses.replace(entry, registers=registers))
    return vm
def go(vm):
    print(vm.go(budget=100000).detail, flush=True)
"""
SCENES = {
    "nobody": "go(made())",
    "before": "faulthandler.enable(); go(made())",
    "after": "vm = made(); faulthandler.enable(); go(vm)",
    "enabled, disabled, enabled": """
vm = made(); faulthandler.enable(); faulthandler.disable(); faulthandler.enable(); go(vm)""",
    "another runs first": "first, vm = made(), made(); faulthandler.enable(); go(first); go(vm)",
    "a handler in Python": "vm = made(); signal.signal(signal.SIGFPE, lambda *a: None); go(vm)",
    "ignored": "vm = made(); signal.signal(signal.SIGFPE, signal.SIG_IGN); go(vm)",
    "default": "vm = made(); signal.signal(signal.SIGFPE, signal.SIG_DFL); go(vm)",
    "blocked": "vm = made(); signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGFPE]); go(vm)",
    "blocked in a thread": """
vm = made()
def body():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32)); go(vm)
t = threading.Thread(target=body); t.start(); t.join()""",
}


def run(scene: str) -> subprocess.CompletedProcess[str]:
    """The scene, in a process of its own."""
    command = [sys.executable, "-c", PROLOGUE + scene]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", SCENES)
def test_a_guests_division_by_zero_is_the_guests(name: str) -> None:
    done = run(SCENES[name])
    assert (0, "", {"code 170"}) == (done.returncode, done.stderr, set(done.stdout.splitlines()))


# What is no guest's goes where it would go without a machine: once, and the process ends.
CRASH = "import ctypes; ctypes.string_at(0)"
OTHERS = {
    "before": "faulthandler.enable(); go(made());",
    "after": "vm = made(); faulthandler.enable(); go(vm);",
    "twice": "vm = made(); faulthandler.enable(); go(vm); faulthandler.enable(); go(vm);",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_fault_of_the_process_is_told_once_and_ends_it(name: str) -> None:
    done = run(OTHERS[name] + CRASH)
    assert done.returncode == -signal.SIGSEGV
    assert done.stderr.count("Fatal Python error: Segmentation fault") == 1


def test_a_handler_that_was_disabled_under_ours_hangs_nobody() -> None:
    done = run(f"vm = made(); faulthandler.enable(); go(vm); faulthandler.disable(); {CRASH}")
    assert done.returncode == -signal.SIGSEGV
    assert "Fatal Python error" not in done.stderr


def test_a_handler_in_python_still_hears_signals_that_are_sent() -> None:
    done = run(
        "vm = made(); signal.signal(signal.SIGFPE, lambda *a: print('heard'));"
        "go(vm); os.kill(os.getpid(), signal.SIGFPE); print('on')"
    )
    assert done.stdout.split()[-2:] == ["heard", "on"]
    assert done.returncode == 0
