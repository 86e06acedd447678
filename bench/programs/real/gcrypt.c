/* libgcrypt's portable code: Serpent, Twofish and Blowfish, Whirlpool and Tiger. */
#include "bench.h"
#include <gcrypt.h>

enum { BYTES = 32 << 10 };
static unsigned char text[BYTES], secret[BYTES];

void prepare(void) {
    static const char *const features[] = {"intel-avx",  "intel-avx2", "intel-avx512", "intel-aesni",
                                           "intel-bmi2", "intel-ssse3", "intel-shaext", "intel-pclmul",
                                           "intel-sse4.1", "intel-vaes-vpclmul"};
    for (size_t i = 0; i < sizeof features / sizeof *features; i++)
        gcry_control(GCRYCTL_DISABLE_HWF, features[i], NULL);
    if (!gcry_check_version(NULL)) give_up("gcrypt: version");
    gcry_control(GCRYCTL_DISABLE_SECMEM, 0);
    gcry_control(GCRYCTL_INITIALIZATION_FINISHED, 0);
    make_text(text, BYTES, 137);
}

uint64_t bench(uint64_t size) {
    static const int ciphers[] = {GCRY_CIPHER_SERPENT128, GCRY_CIPHER_TWOFISH128, GCRY_CIPHER_BLOWFISH};
    static const int hashes[] = {GCRY_MD_WHIRLPOOL, GCRY_MD_TIGER1};
    uint64_t sum = 0;
    for (uint64_t i = 0; i < size; i++) {
        gcry_cipher_hd_t cipher;
        unsigned char digest[64];
        if (gcry_cipher_open(&cipher, ciphers[i % 3], GCRY_CIPHER_MODE_ECB, 0)) give_up("gcrypt: open");
        gcry_cipher_setkey(cipher, "sixteen bytes...", 16);
        if (gcry_cipher_encrypt(cipher, secret, BYTES, text, BYTES)) give_up("gcrypt: encrypt");
        gcry_cipher_close(cipher);
        gcry_md_hash_buffer(hashes[i % 2], digest, secret, BYTES);
        sum = fold(sum, digest, gcry_md_get_algo_dlen(hashes[i % 2]));
    }
    return sum;
}
