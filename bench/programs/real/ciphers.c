/* OpenSSL's ciphers over 64 KB: AES-128-CBC, AES-256-CTR, ChaCha20 and Camellia. */
#include "bench.h"
#include <openssl/evp.h>

enum { BYTES = 64 << 10 };
static unsigned char text[BYTES], secret[BYTES + 64];

void prepare(void) { make_text(text, BYTES, 127); }

uint64_t bench(uint64_t size) {
    static const unsigned char key[32] = "a key of two and thirty bytes...", iv[16] = "sixteen bytes...";
    const EVP_CIPHER *ciphers[] = {EVP_aes_128_cbc(), EVP_aes_256_ctr(), EVP_chacha20(),
                                   EVP_camellia_128_cbc()};
    uint64_t sum = 0;
    for (uint64_t i = 0; i < size; i++) {
        EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
        int bytes = 0, rest = 0;
        if (!EVP_EncryptInit_ex(context, ciphers[i % 4], NULL, key, iv) ||
            !EVP_EncryptUpdate(context, secret, &bytes, text, BYTES) ||
            !EVP_EncryptFinal_ex(context, secret + bytes, &rest))
            give_up("openssl: encrypt");
        sum = fold_word(sum, fold(0, secret, 4096) + (uint64_t)(bytes + rest));
        EVP_CIPHER_CTX_free(context);
    }
    return sum;
}
