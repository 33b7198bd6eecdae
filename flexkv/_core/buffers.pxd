"""The data pointer of an array of any dtype; faster than a typed memoryview of a view of bytes."""
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer


cdef inline char *data_of(array, bint writable=False) except NULL:
    """Address of a C-contiguous array; good as long as the caller holds the array."""
    cdef Py_buffer buffer
    PyObject_GetBuffer(array, &buffer, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
    cdef char *data = <char *>buffer.buf
    PyBuffer_Release(&buffer)
    return data
