"""`make bench`: the same static programs natively, under QEMU TCG and under understudy."""
