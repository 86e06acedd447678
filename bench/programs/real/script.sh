# busybox ash: functions, arithmetic, string operations, loops, pipelines and many short processes.
size=$1
collatz() {
    n=$1 steps=0
    while [ "$n" -ne 1 ]; do
        if [ $((n % 2)) -eq 0 ]; then n=$((n / 2)); else n=$((3 * n + 1)); fi
        steps=$((steps + 1))
    done
}
echo S
sum=0 i=0
while [ "$i" -lt "$size" ]; do
    collatz $((i + 27))
    word=understudy-$steps
    word=${word#under}
    case $word in *-1*) sum=$((sum + ${#word})) ;; *) sum=$((sum + steps)) ;; esac
    lines=$(seq 1 40 | sed -n 's/[13579]$/&x/p' | sort -r | head -n 5 | tr -d '\n')
    sum=$((sum + ${#lines} + $(expr "$i" '*' 3)))
    i=$((i + 1))
done
hash=$(echo "$sum" | md5sum | cut -c 1-8)
echo "E $hash"
