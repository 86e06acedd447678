# busybox awk: builds a text, counts its words, sorts them by an insertion sort of its own.
BEGIN {
    print "S"; fflush()
    seed = 1
    for (i = 0; i < size; i++) {
        line = ""
        for (k = 0; k < 12; k++) {
            seed = (seed * 16807) % 2147483647
            line = line " w" int(seed / 1000) % 97
        }
        n = split(line, part, " ")
        for (k = 1; k <= n; k++) count[part[k]]++
        if (line ~ /w1[0-9] w2/) hits++
        gsub(/w9/, "ninety-", line)
        bytes += length(toupper(line))
    }
    for (word in count) list[++total] = sprintf("%06d %s", count[word], word)
    for (i = 2; i <= total; i++)
        for (k = i; k > 1 && list[k] < list[k - 1]; k--) {
            keep = list[k]; list[k] = list[k - 1]; list[k - 1] = keep
        }
    for (i = 1; i <= total; i++) sum = (sum * 31 + length(list[i]) + substr(list[i], 1, 6)) % 1000003
    printf "E %08x\n", sum + bytes + hits
}
