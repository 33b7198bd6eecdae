/* The inner loop of hashing: narrow the tokens of a block to 32 bits, hash them after the key before, go on. */
#ifndef FLEXKV_KEY_CHAIN_H
#define FLEXKV_KEY_CHAIN_H

#define XXH_INLINE_ALL
#include <stdint.h>
#include <string.h>
#include <xxhash.h>

#define FLEXKV_KEY_BYTES 16

/* Copy `count` tokens as 32-bit numbers; 1 if one of them is not in 0 to 2**32 - 1. */
static inline int flexkv_narrow(const void *tokens, int token_bytes, int is_signed, long count, uint32_t *out)
{
    const int64_t *wide = tokens;
    const int32_t *narrow = tokens;
    uint64_t high = 0;
    int32_t sign = 0;

    if (token_bytes == 8) {
        for (long i = 0; i < count; i++) {
            high |= (uint64_t)wide[i];
            out[i] = (uint32_t)wide[i];
        }
        return high >> 32 != 0;
    }
    memcpy(out, narrow, 4 * (size_t)count);
    for (long i = 0; i < count; i++)
        sign |= narrow[i];
    return is_signed && sign < 0;
}

/* Keys of `num_blocks` blocks: key = H(key before | H(tokens | extras)), H being XXH3-128. The inner hash does not wait
 * for the key before, so the processor overlaps it with the chain; only 32 bytes are hashed in sequence.
 *
 * `extras[i]`, where there is one, is mixed in as 16 bytes more. `scratch` holds a block and a digest. Returns the
 * first block with a token that is none, or -1. */
static inline __attribute__((always_inline)) long
flexkv_key_chain_of(const void *tokens, int token_bytes, int is_signed, long num_blocks, long tokens_per_block,
                    const void *seed, const uint8_t *const *extras, const void *secret, size_t secret_bytes,
                    uint64_t *keys, uint8_t *scratch)
{
    const size_t length = 4 * (size_t)tokens_per_block;
    XXH128_hash_t link[2];        /* the key before, and the digest of the block */

    memcpy(&link[0], seed, FLEXKV_KEY_BYTES);
    for (long i = 0; i < num_blocks; i++) {
        size_t size = length;

        if (flexkv_narrow((const char *)tokens + i * tokens_per_block * token_bytes, token_bytes, is_signed,
                          tokens_per_block, (uint32_t *)scratch))
            return i;
        if (extras && extras[i]) {
            memcpy(scratch + length, extras[i], FLEXKV_KEY_BYTES);
            size += FLEXKV_KEY_BYTES;
        }
        if (secret) {
            link[1] = XXH3_128bits_withSecret(scratch, size, secret, secret_bytes);
            link[0] = XXH3_128bits_withSecret(link, sizeof(link), secret, secret_bytes);
        } else {
            link[1] = XXH3_128bits(scratch, size);
            link[0] = XXH3_128bits(link, sizeof(link));
        }
        keys[2 * i] = link[0].low64;
        keys[2 * i + 1] = link[0].high64;
    }
    return -1;
}

/* As above; XXH3 is a third faster when the compiler knows the length, and 16 tokens a block is the usual one. */
static __attribute__((noinline)) long flexkv_key_chain(const void *tokens, int token_bytes, int is_signed, long num_blocks,
                                    long tokens_per_block, const void *seed, const uint8_t *const *extras,
                                    const void *secret, size_t secret_bytes, uint64_t *keys, uint8_t *scratch)
{
    if (tokens_per_block == 16 && token_bytes == 8 && !extras && !secret)
        return flexkv_key_chain_of(tokens, 8, 1, num_blocks, 16, seed, NULL, NULL, 0, keys, scratch);
    return flexkv_key_chain_of(tokens, token_bytes, is_signed, num_blocks, tokens_per_block, seed, extras, secret,
                               secret_bytes, keys, scratch);
}

#endif
