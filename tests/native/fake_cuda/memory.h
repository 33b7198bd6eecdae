/* Device memory of the fake driver, and what other processes are given of it: part of libcuda.c. */

struct memory {                   /* what cuMemAlloc gave, or a mapping */
    struct memory *next;
    cu_ptr ptr;
    size_t bytes;
    struct physical *physical;    /* of a mapping */
    int fd, device, is_foreign;   /* memory of the process, shared with others: memfd; is_foreign: of another one */
};

struct ticket {                   /* a handle of CUDA IPC */
    cu_ptr ptr;
    uint64_t bytes;
    int32_t pid, fd, device;
};

struct physical {
    struct cu_allocation_properties properties;
    size_t bytes;
    int fd, users;
};

static struct memory *memories;

static struct memory *memory_at(cu_ptr ptr)
{
    struct memory *memory;

    pthread_mutex_lock(&lock);
    for (memory = memories; memory; memory = memory->next)
        if (ptr >= memory->ptr && ptr - memory->ptr < memory->bytes)
            break;
    pthread_mutex_unlock(&lock);
    return memory;
}

static struct memory *add_memory(cu_ptr ptr, size_t bytes, struct physical *physical)
{
    struct memory *memory = malloc(sizeof(*memory));

    pthread_mutex_lock(&lock);
    *memory = (struct memory){ memories, ptr, bytes, physical, -1, depth ? current[depth - 1] : 0, 0 };
    memories = memory;
    pthread_mutex_unlock(&lock);
    return memory;
}

static struct physical *remove_memory(cu_ptr ptr)
{
    struct physical *physical = NULL;

    pthread_mutex_lock(&lock);
    for (struct memory **at = &memories; *at; at = &(*at)->next)
        if ((*at)->ptr == ptr) {
            struct memory *memory = *at;

            physical = memory->physical;
            *at = memory->next;
            free(memory);
            break;
        }
    pthread_mutex_unlock(&lock);
    return physical;
}

static cu_result fake_cuMemAlloc(cu_ptr *ptr, size_t bytes)
{
    void *block;
    int fd;

    ENTER;
    NEEDS_CONTEXT;
    if ((fd = memfd_create("fake GPU memory", MFD_CLOEXEC)) < 0)
        return OUT_OF_MEMORY;
    if (ftruncate(fd, (off_t)bytes) ||
        (block = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)) == MAP_FAILED) {
        close(fd);
        return OUT_OF_MEMORY;
    }
    memset(block, 0xa5, bytes);
    *ptr = (cu_ptr)block;
    add_memory(*ptr, bytes, NULL)->fd = fd;
    count(1, (long)bytes);
    return 0;
}

static cu_result fake_cuMemFree(cu_ptr ptr)
{
    struct memory *memory = memory_at(ptr);

    NEEDS_CONTEXT;
    if (!memory || memory->ptr != ptr || memory->physical || memory->is_foreign)
        return INVALID_VALUE;
    count(-1, -(long)memory->bytes);
    munmap((void *)ptr, memory->bytes);
    close(memory->fd);
    remove_memory(ptr);
    return 0;
}

static cu_result fake_cuMemGetAddressRange(cu_ptr *base, size_t *bytes, cu_ptr ptr)
{
    struct memory *memory = memory_at(ptr);

    ENTER;
    NEEDS_CONTEXT;
    if (!memory)
        return NOT_FOUND;
    *base = memory->ptr;
    *bytes = memory->bytes;
    return 0;
}

static cu_result fake_cuPointerGetAttribute(void *value, int attribute, cu_ptr ptr)
{
    struct memory *memory = memory_at(ptr);

    ENTER;
    NEEDS_CONTEXT;
    if (!memory)
        return INVALID_VALUE;
    if (attribute == CU_POINTER_MEMORY_TYPE)
        *(unsigned int *)value = CU_MEMORYTYPE_DEVICE;
    else if (attribute == CU_POINTER_DEVICE_ORDINAL)
        *(int *)value = memory->device;
    else if (attribute == CU_POINTER_IPC_CAPABLE)
        *(unsigned char *)value = !memory->physical && !memory->is_foreign;
    else
        return INVALID_VALUE;
    return 0;
}

static cu_result fake_cuIpcGetMemHandle(struct cu_ipc_handle *handle, cu_ptr ptr)
{
    struct memory *memory = memory_at(ptr);
    struct ticket ticket = { .ptr = ptr, .pid = getpid() };

    ENTER;
    NEEDS_CONTEXT;
    if (!memory || memory->physical || memory->is_foreign || memory->ptr != ptr)
        return INVALID_VALUE;
    ticket.bytes = memory->bytes;
    ticket.fd = memory->fd;
    ticket.device = memory->device;
    memset(handle, 0x5c, sizeof(*handle));
    memcpy(handle->bytes, &ticket, sizeof(ticket));
    return 0;
}

static cu_result fake_cuIpcOpenMemHandle(cu_ptr *ptr, struct cu_ipc_handle handle, unsigned int flags)
{
    struct memory *memory;
    struct ticket ticket;
    char path[64];
    void *block;
    int fd;

    ENTER;
    NEEDS_CONTEXT;
    memcpy(&ticket, handle.bytes, sizeof(ticket));
    if (handle.bytes[63] != 0x5c || flags != CU_IPC_LAZY_PEER_ACCESS)
        return INVALID_VALUE;
    if (ticket.pid == getpid()) {                  /* the real driver refuses it; tests have one process */
        memory = memory_at(ticket.ptr);
        if (!memory || memory->ptr != ticket.ptr)
            return INVALID_VALUE;
    } else {
        if (ticket.device != current[depth - 1] && !has_access)
            return 217;
        snprintf(path, sizeof(path), "/proc/%d/fd/%d", ticket.pid, ticket.fd);
        if ((fd = open(path, O_RDWR | O_CLOEXEC)) < 0)
            return INVALID_VALUE;
        block = mmap(NULL, ticket.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
        if (block == MAP_FAILED)
            return INVALID_VALUE;
        ticket.ptr = (cu_ptr)block;
        memory = add_memory(ticket.ptr, ticket.bytes, NULL);
        memory->is_foreign = 1;
    }
    *ptr = ticket.ptr;
    count(1, 0);
    return 0;
}

static cu_result fake_cuIpcCloseMemHandle(cu_ptr ptr)
{
    struct memory *memory = memory_at(ptr);

    NEEDS_CONTEXT;
    if (!memory)
        return INVALID_VALUE;
    if (memory->is_foreign) {
        munmap((void *)ptr, memory->bytes);
        remove_memory(ptr);
    }
    count(-1, 0);
    ENTER;
    return 0;
}

static struct physical *new_physical(int fd, size_t bytes, const struct cu_allocation_properties *properties)
{
    struct physical *physical = malloc(sizeof(*physical));

    *physical = (struct physical){ *properties, bytes, fd, 1 };
    count(1, 0);
    return physical;
}

static void put_physical(struct physical *physical)
{
    int users;

    pthread_mutex_lock(&lock);
    users = --physical->users;
    pthread_mutex_unlock(&lock);
    if (!users) {
        close(physical->fd);
        free(physical);
        count(-1, 0);
    }
}

static cu_result fake_cuMemCreate(cu_allocation *allocation, size_t bytes,
                                  const struct cu_allocation_properties *properties, unsigned long long flags)
{
    int fd;

    ENTER;
    if (flags || !bytes || bytes % 4096 || properties->type != 1 || properties->location.type != CU_LOCATION_DEVICE ||
        properties->location.id || properties->win32)
        return INVALID_VALUE;
    fd = memfd_create("fake_cuda", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)bytes))
        return OUT_OF_MEMORY;
    *allocation = (cu_allocation)new_physical(fd, bytes, properties);
    return 0;
}

static cu_result fake_cuMemGetAllocationGranularity(size_t *granularity,
                                                    const struct cu_allocation_properties *properties, int option)
{
    (void)properties;
    (void)option;
    *granularity = 4096;
    return 0;
}

static cu_result fake_cuMemRetainAllocationHandle(cu_allocation *allocation, void *ptr)
{
    struct memory *memory = memory_at((cu_ptr)ptr);

    ENTER;
    if (!memory || !memory->physical)
        return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    memory->physical->users++;
    pthread_mutex_unlock(&lock);
    *allocation = (cu_allocation)memory->physical;
    return 0;
}

static cu_result fake_cuMemGetAllocationPropertiesFromHandle(struct cu_allocation_properties *properties,
                                                             cu_allocation allocation)
{
    ENTER;
    *properties = ((struct physical *)allocation)->properties;
    return 0;
}

static cu_result fake_cuMemExportToShareableHandle(void *handle, cu_allocation allocation, int type,
                                                   unsigned long long flags)
{
    const struct physical *physical = (struct physical *)allocation;

    ENTER;
    if (flags || type != CU_HANDLE_FILE_DESCRIPTOR || !(physical->properties.handle_types & (unsigned int)type))
        return INVALID_VALUE;
    *(int *)handle = dup(physical->fd);
    return 0;
}

static cu_result fake_cuMemImportFromShareableHandle(cu_allocation *allocation, void *handle, int type)
{
    struct cu_allocation_properties properties = {
        .type = 1, .handle_types = CU_HANDLE_FILE_DESCRIPTOR, .location = { CU_LOCATION_DEVICE, 0 },
    };
    struct stat stat;
    int fd;

    ENTER;
    if (type != CU_HANDLE_FILE_DESCRIPTOR || (fd = dup((int)(intptr_t)handle)) < 0)
        return INVALID_VALUE;
    fstat(fd, &stat);
    *allocation = (cu_allocation)new_physical(fd, (size_t)stat.st_size, &properties);
    return 0;
}

static cu_result fake_cuMemRelease(cu_allocation allocation)
{
    put_physical((struct physical *)allocation);
    ENTER;
    return 0;
}

static cu_result fake_cuMemAddressReserve(cu_ptr *ptr, size_t bytes, size_t alignment, cu_ptr wish,
                                          unsigned long long flags)
{
    void *address;

    ENTER;
    if (flags || wish || alignment || !bytes || bytes % 4096)
        return INVALID_VALUE;
    address = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED)
        return OUT_OF_MEMORY;
    *ptr = (cu_ptr)address;
    count(1, 0);
    return 0;
}

static cu_result fake_cuMemAddressFree(cu_ptr ptr, size_t bytes)
{
    if (memory_at(ptr))
        return INVALID_VALUE;
    munmap((void *)ptr, bytes);
    count(-1, 0);
    ENTER;
    return 0;
}

static cu_result fake_cuMemMap(cu_ptr ptr, size_t bytes, size_t offset, cu_allocation allocation,
                               unsigned long long flags)
{
    struct physical *physical = (struct physical *)allocation;

    ENTER;
    if (flags || offset || bytes != physical->bytes)
        return INVALID_VALUE;
    if (mmap((void *)ptr, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, physical->fd, 0) == MAP_FAILED)
        return OUT_OF_MEMORY;
    physical->users++;
    add_memory(ptr, bytes, physical);
    count(1, 0);
    return 0;
}

static cu_result fake_cuMemUnmap(cu_ptr ptr, size_t bytes)
{
    struct physical *physical = remove_memory(ptr);

    if (!physical)
        return INVALID_VALUE;
    mmap((void *)ptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    put_physical(physical);
    count(-1, 0);
    ENTER;
    return 0;
}

static cu_result fake_cuMemSetAccess(cu_ptr ptr, size_t bytes, const struct cu_access *access, size_t number)
{
    ENTER;
    if (number != 1 || access->location.type != CU_LOCATION_DEVICE || access->location.id ||
        access->flags != CU_ACCESS_READ_WRITE)
        return INVALID_VALUE;
    return mprotect((void *)ptr, bytes, PROT_READ | PROT_WRITE) ? INVALID_VALUE : 0;
}
