"""What a fork costs under EPT: exits by reason, with and without a command."""

from understudy import VM

with VM.linux("cloud-amd64", memory="256M") as vm:
    vm.wait_for_prompt()
    before = vm.counts()["exits"]
    vm.run("for i in 1 2 3 4 5 6 7 8; do /bin/true; done").check()
    after = vm.counts()["exits"]
    for reason in sorted(after):
        print(f"{reason:24} {after[reason] - before.get(reason, 0):8}")
