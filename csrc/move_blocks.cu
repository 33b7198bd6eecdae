/* Gather from pages, or scatter to them. Compiled by NVRTC for the device that it runs on; embedded in the extension.
 *
 * Block i of the launch is in pages[i] of the tensors, and at far + index * far_stride on the other side: a staging
 * buffer (index i) or registered host memory (index slots[i]). A work item is a piece of one chunk of one block.
 * Thread blocks take items in turn, so items that are adjacent in memory run at the same time. */

#define MAX_BLOCKS 480            /* as FLEXKV_MOVE_BLOCKS: pages and slots fit into 4 KiB of parameters */

struct Region {                   /* as flexkv_region */
    unsigned long long base;
    long long page_stride;
    unsigned long long chunk_bytes;
    unsigned long long slot_offset;
};

struct Blocks {
    int pages[MAX_BLOCKS];
    int slots[MAX_BLOCKS];
};

template <typename T>
__device__ __forceinline__ void copy(char *to, const char *from, unsigned long long bytes)
{
    const unsigned long long count = bytes / sizeof(T), step = blockDim.x;
    const T *src = (const T *)from;
    T *dst = (T *)to;
    unsigned long long i = threadIdx.x;

    for (; i + 3 * step < count; i += 4 * step) {
        T a = src[i], b = src[i + step], c = src[i + 2 * step], d = src[i + 3 * step];
        dst[i] = a;
        dst[i + step] = b;
        dst[i + 2 * step] = c;
        dst[i + 3 * step] = d;
    }
    for (; i < count; i += step)
        dst[i] = src[i];
}

extern "C" __global__ void __launch_bounds__(1024)
flexkv_move_blocks(const Region *__restrict__ regions, unsigned num_regions, unsigned count, unsigned pieces,
                   unsigned long long piece_bytes, char *far, unsigned long long far_stride, int use_slots, int gather,
                   const __grid_constant__ Blocks blocks)
{
    const unsigned long long items = (unsigned long long)count * num_regions * pieces;

    for (unsigned long long item = blockIdx.x; item < items; item += gridDim.x) {
        const unsigned piece = item % pieces, block = item / pieces / num_regions;
        const Region region = regions[item / pieces % num_regions];
        const unsigned long long start = piece * piece_bytes;
        unsigned long long bytes, mixed;
        char *page, *other;

        if (start >= region.chunk_bytes)
            continue;
        bytes = region.chunk_bytes - start < piece_bytes ? region.chunk_bytes - start : piece_bytes;
        page = (char *)(region.base + (long long)blocks.pages[block] * region.page_stride) + start;
        other = far + (unsigned long long)(use_slots ? blocks.slots[block] : block) * far_stride + region.slot_offset +
                start;
        mixed = (unsigned long long)page | (unsigned long long)other | bytes;
        char *to = gather ? other : page;
        const char *from = gather ? page : other;
        if (mixed % 16 == 0)
            copy<uint4>(to, from, bytes);
        else if (mixed % 4 == 0)
            copy<unsigned>(to, from, bytes);
        else
            copy<char>(to, from, bytes);
    }
}
