"""One Debian, run in four ways in turn: it notices nothing; what the hypervisor does differs."""

from understudy import VM

JOB = "for n in 1 2 3 4; do (echo $n); done > /dev/null; uname -s"
WAYS = [("vmx", "ept"), ("vmx", "vtlb"), ("vmx", "lazy"), ("bt", "lazy")]

with VM.linux("cloud-amd64", memory="256M", cpu="understudy,-pmu,-xsaves") as vm:
    vm.wait_for_agent()
    for execution, paging in WAYS:
        vm.paging = paging
        vm.execution = execution
        before = sum(vm.counts()["exits"].values())
        said = vm.run(JOB).check().output.strip()
        exits = sum(vm.counts()["exits"].values()) - before
        print(f"{said} under {execution} and {paging}: {exits:,} exits")
