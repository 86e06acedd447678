"""Two virtual machines on two threads: neither notices the other."""

from concurrent.futures import ThreadPoolExecutor

from understudy import VM


def sum_up_to(n: int) -> int:
    """Let a guest of its own do the sum."""
    with VM.linux("cloud-amd64", memory="256M") as vm:
        return int(vm.run(f"echo $(( {n} * ({n} + 1) / 2 ))").check().output)


with ThreadPoolExecutor(2) as pool:
    print(list(pool.map(sum_up_to, [100, 1000])))
