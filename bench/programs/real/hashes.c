/* OpenSSL's hashes over 64 KB: SHA-1, SHA-256, SHA-512, SHA3-256, BLAKE2b and MD5. */
#include "bench.h"
#include <openssl/evp.h>

enum { BYTES = 64 << 10 };
static unsigned char text[BYTES];

void prepare(void) { make_text(text, BYTES, 131); }

uint64_t bench(uint64_t size) {
    const EVP_MD *hashes[] = {EVP_sha1(),     EVP_sha256(),     EVP_sha512(),
                              EVP_sha3_256(), EVP_blake2b512(), EVP_md5()};
    uint64_t sum = 0;
    for (uint64_t i = 0; i < size; i++) {
        unsigned char digest[EVP_MAX_MD_SIZE];
        unsigned bytes = 0;
        if (!EVP_Digest(text, BYTES, digest, &bytes, hashes[i % 6], NULL)) give_up("openssl: hash");
        sum = fold(sum, digest, bytes);
        text[i % BYTES] ^= digest[0];
    }
    return sum;
}
