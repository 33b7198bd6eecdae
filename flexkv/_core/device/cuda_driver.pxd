from flexkv._core.csrc.cuda_api cimport cu_context, flexkv_cuda


cdef class Driver:
    cdef flexkv_cuda table
    cdef readonly int version
    cdef dict devices
    cdef bytes uuid_of(self, int ordinal)


cdef class Device:
    cdef readonly Driver driver
    cdef readonly int ordinal
    cdef readonly str architecture
    cdef readonly bytes uuid
    cdef cu_context context
    cdef int enter(self) except -1
    cdef void leave(self) noexcept
