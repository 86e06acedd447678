"""Boot Debian's cloud kernel and ask it for its name."""

from understudy import VM

with VM.linux("cloud-amd64", memory="256M") as vm:
    vm.wait_for_prompt()
    result = vm.run("uname -sr", timeout_guest_s=10)
    print(result.output, end="")
