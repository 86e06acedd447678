# Debian's C++ compiler proper: a preprocessed program full of templates, to optimised assembly.
size=$1 i=0
compiler=$(echo usr/lib/gcc/x86_64-linux-gnu/*/cc1plus)
echo S
while [ "$i" -lt "$size" ]; do
    "$compiler" -quiet -w -O1 -fpreprocessed bench/compiler.ii -o tmp/compiler.s || exit 1
    i=$((i + 1))
done
echo "E $(md5sum <tmp/compiler.s | cut -c 1-8)"
