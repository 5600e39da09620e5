// A "cuda" for a CPU build of torch: no memory and no kernels, only the answers that autograd wants of a device.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>

using namespace c10;

static DeviceIndex from_environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return static_cast<DeviceIndex>(text ? std::atoi(text) : otherwise);
}

static const DeviceIndex HERE = from_environment("LOCAL_RANK", 0);
static const DeviceIndex COUNT = from_environment("LOCAL_WORLD_SIZE", 1);

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex current_device() const override { return HERE; }
  DeviceIndex deviceCount() const override { return COUNT; }
  DeviceIndex getCurrentDevice() const override { return HERE; }
  int getNumGPUs() const override { return COUNT; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

namespace {
constexpr DeviceType CUDA = DeviceType::CUDA;

struct PretendGuard final : impl::NoOpDeviceGuardImpl<CUDA> {
  static Stream default_stream() { return Stream(Stream::DEFAULT, Device(CUDA, HERE)); }
  Device exchangeDevice(Device) const override { return Device(CUDA, HERE); }
  Device getDevice() const override { return Device(CUDA, HERE); }
  Stream getStream(Device) const noexcept override { return default_stream(); }
  Stream getNewStream(Device, int) const override { return default_stream(); }
  Stream exchangeStream(Stream) const noexcept override { return default_stream(); }
  DeviceIndex deviceCount() const noexcept override { return COUNT; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};

impl::DeviceGuardImplRegistrar registered(CUDA, new PretendGuard());
}  // namespace
