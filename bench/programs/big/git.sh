# Debian's git: a history of many small files, packed, looked through and told in differences.
size=$1
git=$PWD/usr/bin/git
export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null HOME=/nonexistent GIT_PAGER=cat
rm -rf tmp/git
"$git" init -q -b main --bare tmp/git && cd tmp/git || exit 1
history() {
    awk -v size="$size" 'BEGIN {
        seed = 1
        for (c = 1; c <= size; c++) {
            print "commit refs/heads/main\ncommitter a <a@b> " 1000000000 + c " +0000\ndata 3\nc " c % 10
            for (f = 0; f < 6; f++) {
                text = ""
                for (l = 0; l < 120; l++) {
                    seed = (seed * 16807) % 2147483647
                    text = text sprintf("%06d %s\n", l, (l * f + int(c / 3)) % 7 ? "as it was" : seed)
                }
                name = "d" int(f / 2) "/f" (c * f) % 40
                print "M 100644 inline " name "\ndata " length(text) "\n" text
            }
        }
    }'
}
history | "$git" fast-import --quiet || exit 1
echo S
"$git" repack -adfq --window=20 --depth=20 --threads=1
# (What checks commit graphs and indices of several packs is a program of its own, which guests lack.)
"$git" -c core.commitGraph=false -c core.multiPackIndex=false fsck --full --no-dangling || exit 1
told=$("$git" log -p --stat -M --no-color main | md5sum)
named=$("$git" blame main -- d1/f0 2>/dev/null | md5sum)
echo "E $(echo "$told$named" | md5sum | cut -c 1-8)"
