from libc.stdint cimport uint64_t


cdef extern from "cuda_api.h" nogil:
    struct cu_context_s:
        pass
    struct cu_stream_s:
        pass
    struct cu_event_s:
        pass
    struct cu_module_s:
        pass
    struct cu_function_s:
        pass
    ctypedef cu_context_s *cu_context
    ctypedef cu_stream_s *cu_stream
    ctypedef cu_event_s *cu_event
    ctypedef cu_module_s *cu_module
    ctypedef cu_function_s *cu_function

    enum:
        CU_STREAM_NON_BLOCKING
        CU_EVENT_DISABLE_TIMING
        CU_ERROR_INVALID_VALUE
        CU_MEMORYTYPE_DEVICE
        CU_POINTER_MEMORY_TYPE
        CU_POINTER_DEVICE_ORDINAL
        CU_POINTER_IPC_CAPABLE
        CU_IPC_LAZY_PEER_ACCESS
        CU_P2P_ACCESS_SUPPORTED
        CU_P2P_NATIVE_ATOMIC_SUPPORTED
        CU_HANDLE_FILE_DESCRIPTOR
        CU_LOCATION_DEVICE
        CU_ACCESS_READ_WRITE

    struct cu_uuid:
        unsigned char bytes[16]
    struct cu_ipc_handle:
        char bytes[64]
    struct cu_location:
        unsigned int type
        int id
    struct cu_allocation_properties:
        unsigned int handle_types
        cu_location location
    struct cu_access:
        cu_location location
        unsigned int flags

    struct flexkv_cuda:
        int (*cuGetErrorName)(int error, const char **name)
        int (*cuGetErrorString)(int error, const char **text)
        int (*cuDriverGetVersion)(int *version)
        int (*cuDeviceGet)(int *device, int ordinal)
        int (*cuDeviceGetCount)(int *count)
        int (*cuDeviceGetUuid)(cu_uuid *uuid, int device)
        int (*cuDeviceGetAttribute)(int *value, int attribute, int device)
        int (*cuDeviceGetP2PAttribute)(int *value, int attribute, int source, int target)
        int (*cuDevicePrimaryCtxRetain)(cu_context *context, int device)
        int (*cuCtxPushCurrent)(cu_context context)
        int (*cuCtxPopCurrent)(cu_context *context)
        int (*cuModuleLoadData)(cu_module *module, const void *image)
        int (*cuModuleGetFunction)(cu_function *function, cu_module module, const char *name)
        int (*cuMemGetAddressRange)(uint64_t *base, size_t *num_bytes, uint64_t ptr)
        int (*cuPointerGetAttribute)(void *value, int attribute, uint64_t ptr)
        int (*cuIpcGetMemHandle)(cu_ipc_handle *handle, uint64_t ptr)
        int (*cuIpcOpenMemHandle)(uint64_t *ptr, cu_ipc_handle handle, unsigned int flags)
        int (*cuIpcCloseMemHandle)(uint64_t ptr)
        int (*cuMemRetainAllocationHandle)(uint64_t *allocation, void *ptr)
        int (*cuMemGetAllocationPropertiesFromHandle)(cu_allocation_properties *properties, uint64_t allocation)
        int (*cuMemExportToShareableHandle)(void *handle, uint64_t allocation, int type, unsigned long long flags)
        int (*cuMemImportFromShareableHandle)(uint64_t *allocation, void *handle, int type)
        int (*cuMemRelease)(uint64_t allocation)
        int (*cuMemAddressReserve)(uint64_t *ptr, size_t num_bytes, size_t alignment, uint64_t wish,
                                   unsigned long long flags)
        int (*cuMemAddressFree)(uint64_t ptr, size_t num_bytes)
        int (*cuMemMap)(uint64_t ptr, size_t num_bytes, size_t offset, uint64_t allocation, unsigned long long flags)
        int (*cuMemUnmap)(uint64_t ptr, size_t num_bytes)
        int (*cuMemSetAccess)(uint64_t ptr, size_t num_bytes, const cu_access *access, size_t count)
        int (*cuMemAlloc)(uint64_t *ptr, size_t num_bytes)
        int (*cuMemFree)(uint64_t ptr)
        int (*cuCtxGetStreamPriorityRange)(int *least, int *greatest)
        int (*cuStreamCreateWithPriority)(cu_stream *stream, unsigned int flags, int priority)
        int (*cuStreamDestroy)(cu_stream stream)
        int (*cuStreamSynchronize)(cu_stream stream) noexcept nogil
        int (*cuStreamWaitEvent)(cu_stream stream, cu_event event, unsigned int flags)
        int (*cuEventCreate)(cu_event *event, unsigned int flags)
        int (*cuEventDestroy)(cu_event event)
        int (*cuEventRecord)(cu_event event, cu_stream stream)
        int (*cuMemcpyAsync)(uint64_t dst, uint64_t src, size_t num_bytes, cu_stream stream) noexcept nogil
        int (*cuLaunchKernel)(cu_function function, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx,
                              unsigned int by, unsigned int bz, unsigned int shared_bytes, cu_stream stream,
                              void **parameters, void **extra) noexcept nogil
        void *cuMemcpyBatchAsync
