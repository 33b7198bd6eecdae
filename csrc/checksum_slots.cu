/* XXH3-64 (seed 0) of slots in device memory, each a multiple of 1 KiB. Compiled by NVRTC together with
 * move_blocks.cu.
 *
 * XXH3 processes 1 KiB at a time: it adds sums over the 16 stripes of 64 bytes, in any order, to eight accumulators,
 * and scrambles these before the next KiB. So warps compute the sums of many KiB in parallel, and eight threads then
 * add them in order. */

#define XXH_WARPS 16              /* KiB at a time; the launch has 32 threads for each */

typedef unsigned long long u64;

__constant__ unsigned char xxh_secret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

__constant__ u64 xxh_start[8] = {
    0xC2B2AE3Dull, 0x9E3779B185EBCA87ull, 0xC2B2AE3D27D4EB4Full, 0x165667B19E3779F9ull,
    0x85EBCA77C2B2AE63ull, 0x85EBCA77ull, 0x27D4EB2F165667C5ull, 0x9E3779B1ull,
};

__device__ __forceinline__ u64 xxh_secret_at(unsigned byte)
{
    u64 word = 0;

    for (int i = 7; i >= 0; i--)
        word = word << 8 | xxh_secret[byte + i];
    return word;
}

__device__ __forceinline__ u64 xxh_merge(const u64 *lanes, u64 bytes)
{
    u64 result = bytes * 0x9E3779B185EBCA87ull;

    for (unsigned i = 0; i < 4; i++) {
        u64 a = lanes[2 * i] ^ xxh_secret_at(11 + 16 * i), b = lanes[2 * i + 1] ^ xxh_secret_at(19 + 16 * i);

        result += a * b ^ __umul64hi(a, b);
    }
    result = (result ^ result >> 37) * 0x165667919E3779F9ull;
    return result ^ result >> 32;
}

/* A block of threads for each slot. */
extern "C" __global__ void __launch_bounds__(32 * XXH_WARPS)
flexkv_checksum_slots(const char *__restrict__ slots, u64 slot_bytes, u64 *__restrict__ checksums)
{
    __shared__ u64 sums[XXH_WARPS][8];
    const unsigned lane = threadIdx.x % 8, group = threadIdx.x / 8 % 4, warp = threadIdx.x / 32;
    const u64 *words = (const u64 *)(slots + blockIdx.x * slot_bytes);
    const u64 last = slot_bytes / 1024 - 1, scramble = xxh_secret_at(128 + 8 * lane);
    u64 keys[4], state = xxh_start[lane], last_key;

    for (unsigned k = 0; k < 4; k++)
        keys[k] = xxh_secret_at(8 * (4 * k + group + lane));
    last_key = group == 3 ? xxh_secret_at(121 + 8 * lane) : keys[3];    /* of the very last stripe */

    for (u64 first = 0; first <= last; first += XXH_WARPS) {
        const u64 kib = first + warp;
        u64 sum = 0, plain = 0;

        if (kib <= last) {
            for (unsigned k = 0; k < 4; k++) {
                u64 word = words[128 * kib + 8 * (4 * k + group) + lane];
                u64 keyed = word ^ (k == 3 && kib == last ? last_key : keys[k]);

                plain += word;
                sum += (keyed & 0xffffffff) * (keyed >> 32);
            }
            sum += __shfl_xor_sync(0xffffffff, plain, 1);
            sum += __shfl_xor_sync(0xffffffff, sum, 8);
            sum += __shfl_xor_sync(0xffffffff, sum, 16);
            if (group == 0)
                sums[warp][lane] = sum;
        }
        __syncthreads();
        if (threadIdx.x < 8)
            for (unsigned i = 0; i < XXH_WARPS && first + i <= last; i++) {
                state += sums[i][lane];
                if (first + i < last)
                    state = (state ^ state >> 47 ^ scramble) * 0x9E3779B1u;
            }
        __syncthreads();
    }
    if (threadIdx.x < 8)
        sums[0][lane] = state;
    __syncthreads();
    if (threadIdx.x == 0)
        checksums[blockIdx.x] = xxh_merge(sums[0], slot_bytes);
}
