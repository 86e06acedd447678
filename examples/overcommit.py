"""Three Debians of 96 MBytes on a host of 128: what is alike becomes one, the rest goes to disk."""

from understudy import Host
from understudy.overcommit.accounts import accounts

with Host(ram="128M") as host:
    vms = [host.linux("cloud-amd64", memory="96M", name=name) for name in ("a", "b", "c")]
    for vm in vms:
        vm.wait_for_agent()
    print([vm.run("uname -s").check().output.strip() for vm in vms])
    for one in accounts(host.stock).vms:
        kinds = ", ".join(f"{count} {kind}" for kind, count in one.kinds.items() if count)
        print(f"{one.name}: {one.size} pages ({kinds}), {one.saved} saved")
