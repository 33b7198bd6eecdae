/* SHA-256 (FIPS 180-4) of padded messages, by the SHA instructions of x86-64 or ARMv8, and in portable C. Both give the
 * same digests. `flexkv_sha256_by_instructions` chooses at run time, so one build runs on every processor. */
#ifndef FLEXKV_SHA256_H
#define FLEXKV_SHA256_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "this processor stores the highest byte of a number first; sha256.h and key_chain.h expect the lowest first"
#endif

#define FLEXKV_SHA256_BLOCK 64
#define FLEXKV_SHA256_BYTES 32

/* Writes the 32-byte digest of a message that fills `num_blocks` blocks of 64 bytes with its padding. `digest` may lie
 * inside `blocks`. */
typedef void flexkv_sha256_fn(const uint8_t *blocks, size_t num_blocks, uint8_t *digest);

static const uint32_t flexkv_sha256_initial[8] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

static const uint32_t flexkv_sha256_rounds[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* Number of 64-byte blocks of a message of `size` bytes with its padding. */
static inline size_t flexkv_sha256_blocks(size_t size) { return (size + 9 + 63) / FLEXKV_SHA256_BLOCK; }

/* Write the padding behind a message of `size` bytes, in a buffer with room for all blocks; returns their number. */
static inline size_t flexkv_sha256_pad(uint8_t *message, size_t size)
{
    const size_t num_blocks = flexkv_sha256_blocks(size), end = num_blocks * FLEXKV_SHA256_BLOCK;

    memset(message + size, 0, end - size);
    message[size] = 0x80;
    for (int i = 0; i < 8; i++)
        message[end - 1 - i] = (uint8_t)((uint64_t)size * 8 >> 8 * i);
    return num_blocks;
}

static inline uint32_t flexkv_rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void flexkv_sha256_portable(const uint8_t *blocks, size_t num_blocks, uint8_t *digest)
{
    uint32_t state[8], w[64];

    memcpy(state, flexkv_sha256_initial, sizeof(state));
    for (size_t block = 0; block < num_blocks; block++) {
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];

        memcpy(w, blocks + FLEXKV_SHA256_BLOCK * block, FLEXKV_SHA256_BLOCK);
        for (int i = 0; i < 16; i++)
            w[i] = __builtin_bswap32(w[i]);
        for (int i = 16; i < 64; i++) {
            uint32_t s0 = flexkv_rotate(w[i - 15], 7) ^ flexkv_rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
            uint32_t s1 = flexkv_rotate(w[i - 2], 17) ^ flexkv_rotate(w[i - 2], 19) ^ w[i - 2] >> 10;

            w[i] = w[i - 16] + s0 + w[i - 7] + s1;
        }
        for (int i = 0; i < 64; i++) {
            uint32_t s1 = flexkv_rotate(e, 6) ^ flexkv_rotate(e, 11) ^ flexkv_rotate(e, 25);
            uint32_t s0 = flexkv_rotate(a, 2) ^ flexkv_rotate(a, 13) ^ flexkv_rotate(a, 22);
            uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + flexkv_sha256_rounds[i] + w[i];
            uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));

            h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
        }
        state[0] += a, state[1] += b, state[2] += c, state[3] += d;
        state[4] += e, state[5] += f, state[6] += g, state[7] += h;
    }
    for (int i = 0; i < 8; i++)
        state[i] = __builtin_bswap32(state[i]);
    memcpy(digest, state, sizeof(state));
}

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

/* The instructions keep the state as two vectors, ABEF and CDGH, and do two rounds each. */
__attribute__((target("sha,sse4.1,ssse3"))) static void
flexkv_sha256_accelerated(const uint8_t *blocks, size_t num_blocks, uint8_t *digest)
{
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    const uint32_t *h = flexkv_sha256_initial;
    __m128i abef = _mm_set_epi32((int)h[0], (int)h[1], (int)h[4], (int)h[5]);
    __m128i cdgh = _mm_set_epi32((int)h[2], (int)h[3], (int)h[6], (int)h[7]);
    __m128i feba, dchg;

    for (size_t block = 0; block < num_blocks; block++) {
        const __m128i *in = (const __m128i *)(blocks + FLEXKV_SHA256_BLOCK * block);
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4];

        for (int i = 0; i < 4; i++)
            w[i] = _mm_shuffle_epi8(_mm_loadu_si128(in + i), swap);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {                 /* rounds 4 i to 4 i + 3 */
            __m128i t = _mm_add_epi32(w[i % 4], _mm_load_si128((const __m128i *)flexkv_sha256_rounds + i));

            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, t);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(t, 0x0e));
            if (i < 12) {                              /* message words 4 i + 16 to 4 i + 19 */
                t = _mm_add_epi32(_mm_sha256msg1_epu32(w[i % 4], w[(i + 1) % 4]),
                                  _mm_alignr_epi8(w[(i + 3) % 4], w[(i + 2) % 4], 4));
                w[i % 4] = _mm_sha256msg2_epu32(t, w[(i + 3) % 4]);
            }
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    feba = _mm_shuffle_epi32(abef, 0x1b);
    dchg = _mm_shuffle_epi32(cdgh, 0xb1);
    _mm_storeu_si128((__m128i *)digest, _mm_shuffle_epi8(_mm_blend_epi16(feba, dchg, 0xf0), swap));
    _mm_storeu_si128((__m128i *)digest + 1, _mm_shuffle_epi8(_mm_alignr_epi8(dchg, feba, 8), swap));
}

/* The function for processors with SHA instructions, or NULL if this one has none. */
static inline flexkv_sha256_fn *flexkv_sha256_by_instructions(void)
{
    unsigned a, b, c, d;

    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSE4_1) || !(c & bit_SSSE3) ||
        !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_SHA))
        return NULL;
    return flexkv_sha256_accelerated;
}

#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#define FLEXKV_HWCAP_SHA2 (1ul << 6)                   /* of <asm/hwcap.h> */

__attribute__((target("+crypto"))) static void
flexkv_sha256_accelerated(const uint8_t *blocks, size_t num_blocks, uint8_t *digest)
{
    uint32x4_t abcd = vld1q_u32(flexkv_sha256_initial), efgh = vld1q_u32(flexkv_sha256_initial + 4);

    for (size_t block = 0; block < num_blocks; block++) {
        const uint8_t *in = blocks + FLEXKV_SHA256_BLOCK * block;
        const uint32x4_t abcd_before = abcd, efgh_before = efgh;
        uint32x4_t w[4];

        for (int i = 0; i < 4; i++)
            w[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(in + 16 * i)));
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {                 /* rounds 4 i to 4 i + 3 */
            const uint32x4_t t = vaddq_u32(w[i % 4], vld1q_u32(flexkv_sha256_rounds + 4 * i)), before = abcd;

            abcd = vsha256hq_u32(abcd, efgh, t);
            efgh = vsha256h2q_u32(efgh, before, t);
            if (i < 12)                                /* message words 4 i + 16 to 4 i + 19 */
                w[i % 4] = vsha256su1q_u32(vsha256su0q_u32(w[i % 4], w[(i + 1) % 4]), w[(i + 2) % 4], w[(i + 3) % 4]);
        }
        abcd = vaddq_u32(abcd, abcd_before);
        efgh = vaddq_u32(efgh, efgh_before);
    }
    vst1q_u8(digest, vrev32q_u8(vreinterpretq_u8_u32(abcd)));
    vst1q_u8(digest + 16, vrev32q_u8(vreinterpretq_u8_u32(efgh)));
}

/* The function for processors with SHA instructions, or NULL if this one has none. */
static inline flexkv_sha256_fn *flexkv_sha256_by_instructions(void)
{
    return getauxval(AT_HWCAP) & FLEXKV_HWCAP_SHA2 ? flexkv_sha256_accelerated : NULL;
}

#else
static inline flexkv_sha256_fn *flexkv_sha256_by_instructions(void) { return NULL; }
#endif
#endif
