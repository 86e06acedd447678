/* PCRE2's matcher over 64 KB of text: alternation, back references, look-behind, lazy repeats. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "bench.h"
#include <pcre2.h>

enum { BYTES = 64 << 10 };
static unsigned char text[BYTES];

void prepare(void) { make_text(text, BYTES, 149); }

uint64_t bench(uint64_t size) {
    static const char *const patterns[] = {
        "\\b(\\w)(\\w)\\w*?\\2\\1?\\b",         "(?<=[aeiou]{2})[^aeiou\\s]+(?=\\s)",
        "(the|and|not|for|in|out)[a-z]* +\\w+", "(?:[a-m]+[n-z]+){3,}\\.",
        "(\\w+) (?:\\w+ ){0,3}\\1\\b"};
    uint64_t sum = 0;
    for (uint64_t i = 0; i < size; i++) {
        int error;
        PCRE2_SIZE where, at = 0;
        pcre2_code *code =
            pcre2_compile((PCRE2_SPTR)patterns[i % 5], PCRE2_ZERO_TERMINATED, 0, &error, &where, NULL);
        if (!code) give_up("pcre2: compile");
        pcre2_match_data *match = pcre2_match_data_create_from_pattern(code, NULL);
        uint64_t found = 0;
        while (pcre2_match(code, text, BYTES, at, 0, match, NULL) > 0) {
            PCRE2_SIZE *ends = pcre2_get_ovector_pointer(match);
            found = found * 31 + ends[0];
            at = ends[1] > ends[0] ? ends[1] : ends[1] + 1;
        }
        sum = fold_word(sum, found);
        pcre2_match_data_free(match);
        pcre2_code_free(code);
    }
    return sum;
}
