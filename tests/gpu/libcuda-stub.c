// Stands in for the driver's libcuda where ggml-cuda is linked without a driver, and the toolkit has no stub of it: the names that
// ggml-cuda takes from it. Nothing that is linked with it can run on a card; docs/building.md.

#define STUB(name)                                                                                                                         \
    int name(void) {                                                                                                                       \
        return 34; /* CUDA_ERROR_STUB_LIBRARY */                                                                                           \
    }

STUB(cuDeviceGet)
STUB(cuDeviceGetAttribute)
STUB(cuGetErrorString)
STUB(cuMemAddressFree)
STUB(cuMemAddressReserve)
STUB(cuMemCreate)
STUB(cuMemGetAllocationGranularity)
STUB(cuMemMap)
STUB(cuMemRelease)
STUB(cuMemSetAccess)
STUB(cuMemUnmap)
