/* Names of the functions in struct flexkv_cuda, in its order, and the source of the kernels. Must be included by one
 * extension only. */
#ifndef FLEXKV_CUDA_TABLE_H
#define FLEXKV_CUDA_TABLE_H

#include "cuda_api.h"

#define FLEXKV_CUDA_NAME(name, arguments) #name,
static const char *const FLEXKV_CUDA_NAMES[] = { FLEXKV_CUDA_FUNCTIONS(FLEXKV_CUDA_NAME)
                                                 FLEXKV_CUDA_OPTIONAL(FLEXKV_CUDA_NAME) NULL };
#undef FLEXKV_CUDA_NAME

#define FLEXKV_CUDA_ONE(name, arguments) +1
enum { FLEXKV_CUDA_NUM_REQUIRED = 0 FLEXKV_CUDA_FUNCTIONS(FLEXKV_CUDA_ONE) };
#undef FLEXKV_CUDA_ONE

__asm__(".pushsection .rodata\n"
        "flexkv_kernel_source: .incbin \"csrc/move_blocks.cu\"\n"
        ".incbin \"csrc/checksum_slots.cu\"\n.byte 0\n"
        ".popsection\n");
extern const char flexkv_kernel_source[];

#endif
