/* Prototypes of the CUDA driver functions that are used, so that no part of CUDA is needed to build. The table of
 * functions is filled by cuGetProcAddress, so one build runs on CUDA 12.8 and later, and against a fake in tests. */
#ifndef FLEXKV_CUDA_API_H
#define FLEXKV_CUDA_API_H

#include <stddef.h>
#include <stdint.h>

typedef int cu_result;            /* 0: success */
typedef int cu_device;
typedef uint64_t cu_ptr;
typedef struct cu_context_s *cu_context;
typedef struct cu_stream_s *cu_stream;
typedef struct cu_event_s *cu_event;
typedef struct cu_module_s *cu_module;
typedef struct cu_function_s *cu_function;
typedef uint64_t cu_allocation;   /* CUmemGenericAllocationHandle */

enum { CU_SUCCESS = 0, CU_ERROR_INVALID_VALUE = 1, CU_ERROR_NOT_READY = 600 };
enum { CU_STREAM_NON_BLOCKING = 1, CU_EVENT_DISABLE_TIMING = 2 };
enum { CU_MEMHOSTREGISTER_PORTABLE = 1, CU_MEMHOSTREGISTER_DEVICEMAP = 2 };
enum { CU_MEMORYTYPE_DEVICE = 2, CU_MEMORYTYPE_UNIFIED = 4 };
enum { CU_MEMCPY_SRC_ACCESS_ORDER_STREAM = 1 };
enum { CU_POINTER_MEMORY_TYPE = 2, CU_POINTER_DEVICE_ORDINAL = 9, CU_POINTER_IPC_CAPABLE = 10 };
enum { CU_IPC_LAZY_PEER_ACCESS = 1 };
enum { CU_P2P_ACCESS_SUPPORTED = 2, CU_P2P_NATIVE_ATOMIC_SUPPORTED = 3 };
enum { CU_HANDLE_FILE_DESCRIPTOR = 1, CU_LOCATION_DEVICE = 1, CU_ACCESS_READ_WRITE = 3 };

struct cu_memcpy2d {              /* CUDA_MEMCPY2D_v2 */
    size_t src_x, src_y;
    unsigned int src_type;
    const void *src_host;
    cu_ptr src_device;
    void *src_array;
    size_t src_pitch;
    size_t dst_x, dst_y;
    unsigned int dst_type;
    void *dst_host;
    cu_ptr dst_device;
    void *dst_array;
    size_t dst_pitch;
    size_t width, height;
};

struct cu_memcpy_attributes {     /* CUmemcpyAttributes */
    unsigned int src_access_order;
    unsigned int src_location[2], dst_location[2];
    unsigned int flags;
};

struct cu_uuid { unsigned char bytes[16]; };
struct cu_ipc_handle { char bytes[64]; };
struct cu_location { unsigned int type; int id; };

struct cu_allocation_properties { /* CUmemAllocationProp */
    unsigned int type, handle_types;
    struct cu_location location;
    void *win32;
    unsigned char compression, rdma;
    unsigned short usage;
    unsigned char reserved[4];
};

struct cu_access {                /* CUmemAccessDesc */
    struct cu_location location;
    unsigned int flags;
};

_Static_assert(sizeof(struct cu_allocation_properties) == 32 && sizeof(struct cu_access) == 12, "as in cuda.h");

/* name of the member, prototype; those in the second list may be missing */
#define FLEXKV_CUDA_FUNCTIONS(X) \
    X(cuGetErrorName, (cu_result error, const char **name)) \
    X(cuGetErrorString, (cu_result error, const char **text)) \
    X(cuDriverGetVersion, (int *version)) \
    X(cuDeviceGet, (cu_device *device, int ordinal)) \
    X(cuDeviceGetCount, (int *count)) \
    X(cuDeviceGetUuid, (struct cu_uuid *uuid, cu_device device)) \
    X(cuDeviceGetAttribute, (int *value, int attribute, cu_device device)) \
    X(cuDeviceGetP2PAttribute, (int *value, int attribute, cu_device from, cu_device to)) \
    X(cuDevicePrimaryCtxRetain, (cu_context *context, cu_device device)) \
    X(cuCtxPushCurrent, (cu_context context)) \
    X(cuCtxPopCurrent, (cu_context *context)) \
    X(cuCtxGetStreamPriorityRange, (int *least, int *greatest)) \
    X(cuModuleLoadData, (cu_module *module, const void *image)) \
    X(cuModuleGetFunction, (cu_function *function, cu_module module, const char *name)) \
    X(cuMemAlloc, (cu_ptr *ptr, size_t bytes)) \
    X(cuMemFree, (cu_ptr ptr)) \
    X(cuMemGetAddressRange, (cu_ptr *base, size_t *bytes, cu_ptr ptr)) \
    X(cuPointerGetAttribute, (void *value, int attribute, cu_ptr ptr)) \
    X(cuIpcGetMemHandle, (struct cu_ipc_handle *handle, cu_ptr ptr)) \
    X(cuIpcOpenMemHandle, (cu_ptr *ptr, struct cu_ipc_handle handle, unsigned int flags)) \
    X(cuIpcCloseMemHandle, (cu_ptr ptr)) \
    X(cuMemRetainAllocationHandle, (cu_allocation *allocation, void *ptr)) \
    X(cuMemGetAllocationPropertiesFromHandle, (struct cu_allocation_properties *properties, cu_allocation allocation)) \
    X(cuMemExportToShareableHandle, (void *handle, cu_allocation allocation, int type, unsigned long long flags)) \
    X(cuMemImportFromShareableHandle, (cu_allocation *allocation, void *handle, int type)) \
    X(cuMemRelease, (cu_allocation allocation)) \
    X(cuMemAddressReserve, (cu_ptr *ptr, size_t bytes, size_t alignment, cu_ptr wish, unsigned long long flags)) \
    X(cuMemAddressFree, (cu_ptr ptr, size_t bytes)) \
    X(cuMemMap, (cu_ptr ptr, size_t bytes, size_t offset, cu_allocation allocation, unsigned long long flags)) \
    X(cuMemUnmap, (cu_ptr ptr, size_t bytes)) \
    X(cuMemSetAccess, (cu_ptr ptr, size_t bytes, const struct cu_access *access, size_t count)) \
    X(cuMemHostRegister, (void *ptr, size_t bytes, unsigned int flags)) \
    X(cuMemHostUnregister, (void *ptr)) \
    X(cuStreamCreateWithPriority, (cu_stream *stream, unsigned int flags, int priority)) \
    X(cuStreamDestroy, (cu_stream stream)) \
    X(cuStreamSynchronize, (cu_stream stream)) \
    X(cuStreamWaitEvent, (cu_stream stream, cu_event event, unsigned int flags)) \
    X(cuEventCreate, (cu_event *event, unsigned int flags)) \
    X(cuEventDestroy, (cu_event event)) \
    X(cuEventRecord, (cu_event event, cu_stream stream)) \
    X(cuEventQuery, (cu_event event)) \
    X(cuMemcpyAsync, (cu_ptr dst, cu_ptr src, size_t bytes, cu_stream stream)) \
    X(cuMemcpy2DAsync, (const struct cu_memcpy2d *copy, cu_stream stream)) \
    X(cuLaunchKernel, (cu_function function, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx, \
                       unsigned int by, unsigned int bz, unsigned int shared_bytes, cu_stream stream, \
                       void **parameters, void **extra))

#define FLEXKV_CUDA_OPTIONAL(X) \
    X(cuMemcpyBatchAsync, (cu_ptr *dsts, cu_ptr *srcs, size_t *sizes, size_t count, \
                           struct cu_memcpy_attributes *attributes, size_t *attribute_of, size_t num_attributes, \
                           size_t *failed, cu_stream stream))

struct flexkv_cuda {
#define FLEXKV_CUDA_MEMBER(name, arguments) cu_result (*name) arguments;
    FLEXKV_CUDA_FUNCTIONS(FLEXKV_CUDA_MEMBER)
    FLEXKV_CUDA_OPTIONAL(FLEXKV_CUDA_MEMBER)
#undef FLEXKV_CUDA_MEMBER
};

#endif
