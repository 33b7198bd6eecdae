/* The chain of block keys: SHA-256 of each block's tokens and of the chain value before it.
 *
 * The message of a block, all numbers little-endian:
 *
 *     "FlexKV:B" | tokens a block (4 bytes) | 1 if the block has extras, else 0 (4) | tokens (4 each)
 *                | digest of the extras (32, if it has them) | chain value before (32)
 *
 * The first 16 bytes determine the length of each part, so two blocks have the same message only if all parts are
 * equal. The chain value comes last: the leading 64-byte blocks of the next message do not depend on it, and the
 * processor hashes them while it still finishes the message before. docs/design/0017-keys.md has the reasons. */
#ifndef FLEXKV_KEY_CHAIN_H
#define FLEXKV_KEY_CHAIN_H

#include "sha256.h"

#define FLEXKV_KEY_BYTES 16
#define FLEXKV_KEY_HEADER 16

typedef uint32_t __attribute__((may_alias)) flexkv_word;

/* Copy `count` tokens as 32-bit numbers; returns 1 if a token is not in 0 to 2**32 - 1. The compiler must be able to
 * vectorise the loops: the hash loads 16 bytes at a time, and waits for narrower stores to reach the cache. */
static inline int flexkv_narrow(const void *restrict tokens, int token_bytes, int is_signed, long count,
                                flexkv_word *restrict out)
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

/* Bytes of a message with its padding. */
static inline size_t flexkv_key_message_bytes(long tokens_per_block, int has_extra)
{
    size_t parts = 1 + (has_extra != 0);               /* of 32 bytes each, after the tokens */

    return FLEXKV_SHA256_BLOCK *
           flexkv_sha256_blocks(FLEXKV_KEY_HEADER + 4 * (size_t)tokens_per_block + FLEXKV_SHA256_BYTES * parts);
}

/* Write the parts of a message that are the same for all blocks; returns the place of the chain value. */
static inline uint8_t *flexkv_key_message(uint8_t *message, long tokens_per_block, int has_extra)
{
    const uint32_t count = (uint32_t)tokens_per_block, extras = has_extra != 0;
    uint8_t *chain = message + FLEXKV_KEY_HEADER + 4 * (size_t)tokens_per_block + FLEXKV_SHA256_BYTES * extras;

    memcpy(message, "FlexKV:B", 8);
    memcpy(message + 8, &count, 4);
    memcpy(message + 12, &extras, 4);
    flexkv_sha256_pad(message, (size_t)(chain - message) + FLEXKV_SHA256_BYTES);
    return chain;
}

/* Keys of `num_blocks` blocks: the first 16 bytes of each chain value.
 *
 * `value` holds the chain value before the first block, and after success that of the last one. `extras[i]`, where it
 * is not NULL, is the digest of the extras of block i. `scratch` has room for a message without extras and, if `extras`
 * is given, for a message with them behind it. Returns the first block with an invalid token, or -1. */
static inline __attribute__((always_inline)) long
flexkv_key_chain_of(flexkv_sha256_fn *sha256, const void *tokens, int token_bytes, int is_signed, long num_blocks,
                    long tokens_per_block, uint8_t *value, const uint8_t *const *extras, uint64_t *keys,
                    uint8_t *scratch)
{
    const size_t plain_bytes = flexkv_key_message_bytes(tokens_per_block, 0);
    uint8_t *const plain = scratch, *const plain_chain = flexkv_key_message(plain, tokens_per_block, 0);
    uint8_t *const extended = scratch + plain_bytes;
    const size_t extended_bytes = extras ? flexkv_key_message_bytes(tokens_per_block, 1) : 0;
    uint8_t *const extended_chain = extras ? flexkv_key_message(extended, tokens_per_block, 1) : NULL;
    const uint8_t *last = value;

    for (long i = 0; i < num_blocks; i++) {
        const int has_extra = extras && extras[i];
        uint8_t *const message = has_extra ? extended : plain, *const chain = has_extra ? extended_chain : plain_chain;

        if (flexkv_narrow((const char *)tokens + i * tokens_per_block * token_bytes, token_bytes, is_signed,
                          tokens_per_block, (flexkv_word *)(message + FLEXKV_KEY_HEADER)))
            return i;
        if (has_extra)
            memcpy(chain - FLEXKV_SHA256_BYTES, extras[i], FLEXKV_SHA256_BYTES);
        if (last != chain)
            memcpy(chain, last, FLEXKV_SHA256_BYTES);
        sha256(message, (has_extra ? extended_bytes : plain_bytes) / FLEXKV_SHA256_BLOCK, chain);
        memcpy(keys + 2 * i, chain, FLEXKV_KEY_BYTES);
        last = chain;
    }
    if (last != value)
        memcpy(value, last, FLEXKV_SHA256_BYTES);
    return -1;
}

/* As above. The usual case, 16 tokens a block and no extras, is compiled on its own with its lengths as constants. */
static long flexkv_key_chain(flexkv_sha256_fn *sha256, const void *tokens, int token_bytes, int is_signed,
                             long num_blocks, long tokens_per_block, uint8_t *value, const uint8_t *const *extras,
                             uint64_t *keys, uint8_t *scratch)
{
    if (tokens_per_block == 16 && token_bytes == 8 && !extras)
        return flexkv_key_chain_of(sha256, tokens, 8, 1, num_blocks, 16, value, NULL, keys, scratch);
    return flexkv_key_chain_of(sha256, tokens, token_bytes, is_signed, num_blocks, tokens_per_block, value, extras,
                               keys, scratch);
}

#endif
