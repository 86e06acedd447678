/* GMP: pi to 3,000 digits by Machin's formula, a factorial, a modular power and primality tests. */
#include "bench.h"
#include <gmp.h>

static void arctan_inverse(mpz_t sum, unsigned long x, const mpz_t unit) {
    mpz_t power, term;
    mpz_inits(power, term, NULL);
    mpz_fdiv_q_ui(power, unit, x);
    mpz_set(sum, power);
    for (unsigned long n = 3; mpz_sgn(power) != 0; n += 2) {
        mpz_fdiv_q_ui(power, power, x * x);
        mpz_fdiv_q_ui(term, power, n);
        (n & 2 ? mpz_sub : mpz_add)(sum, sum, term);
    }
    mpz_clears(power, term, NULL);
}

uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    mpz_t unit, a, b, p;
    mpz_inits(unit, a, b, p, NULL);
    for (uint64_t i = 0; i < size; i++) {
        mpz_ui_pow_ui(unit, 10, 3000 + i % 7);
        arctan_inverse(a, 5, unit);
        arctan_inverse(b, 239, unit);
        mpz_mul_ui(a, a, 16);
        mpz_submul_ui(a, b, 4);
        sum = fold_word(sum, mpz_fdiv_ui(a, 4294967291u));
        mpz_fac_ui(b, 5000);
        mpz_mul(b, b, a);
        sum = fold_word(sum, mpz_fdiv_ui(b, 4294967279u));
        mpz_ui_pow_ui(p, 2, 521);
        mpz_sub_ui(p, p, 1);
        mpz_powm(b, b, a, p);
        sum = fold_word(sum, mpz_fdiv_ui(b, 4294967231u));
        sum = fold_word(sum, (uint64_t)mpz_probab_prime_p(p, 4));
    }
    mpz_clears(unit, a, b, p, NULL);
    return sum;
}
