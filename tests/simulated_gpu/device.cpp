// A CUDA device whose kernels are the CPU's.
//
// Tensors have storages of their own that say "cuda:0"; an operator runs as the CPU's on the same bytes, and refuses
// tensors of both devices where CUDA's would. What streams do is done at once, and order.h is told of it.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <iterator>

#include "memory.h"
#include "order.h"

namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::IValue;

using memory::allocator, memory::is_pinned, memory::on_gpu, memory::CPU, memory::GPU;
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &allocator)

// --- what torch asks of a device -------------------------------------------------------------------------------------

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  c10::Device getDevice() const override { return GPU; }
  // Autograd's own: backward passes run on the stream of their forward pass, which here is the default one.
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

namespace at {
struct CUDAHooks final : CUDAHooksInterface {  // looked up by this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  Allocator* getPinnedMemoryAllocator() const override { return &memory::pinned_allocator; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

namespace {

// --- operators ----------------------------------------------------------------------------------------------------

Tensor with_storage(c10::Storage storage, DispatchKey key, const Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

Tensor view_of(const Tensor& base, const Tensor& like) {  // an inference tensor where its base is one, as views are
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()),
                                                       base.key_set(), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

c10::DataPtr nothing() { return {nullptr, CPU}; }

template <class Change>
IValue each_tensor(const IValue& value, Change change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> changed;
    for (const Tensor& t : value.toTensorVector()) changed.push_back(change(t));
    return changed;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> changed;
    for (const auto& t : value.toOptionalTensorVector()) changed.push_back(t ? std::optional(change(*t)) : t);
    return changed;
  }
  return value;
}

// One call: its tensors as the CPU's, and what came of it as the GPU's.
class Call {
 public:
  std::vector<Tensor> of_cpu;
  bool is_for_gpu = false;

  Tensor to_cpu(const Tensor& t) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      of_cpu.push_back(t);
      return t;
    }
    is_for_gpu = true;
    auto* storage = t.storage().unsafeGetStorageImpl();
    auto found = storages_.find(storage);
    if (found == storages_.end()) {
      c10::Storage same(c10::Storage::use_byte_size_t(), storage->nbytes(), {storage->mutable_data(), CPU},
                        c10::GetCPUAllocator(), true);
      found = storages_.emplace(storage, same).first;
    }
    pairs_.push_back({t, with_storage(found->second, DispatchKey::CPU, t)});
    return pairs_.back().second;
  }

  void settle() {  // the operator may have resized what it was given
    for (auto& [mine, its] : pairs_) {
      auto *to = mine.storage().unsafeGetStorageImpl(), *from = its.storage().unsafeGetStorageImpl();
      if (from->data() != to->data() || from->nbytes() != to->nbytes()) {
        int64_t size = from->nbytes();
        to->set_data_ptr_noswap(on_gpu(from->set_data_ptr(nothing()), size));
        to->set_nbytes(size);
        from->set_data_ptr_noswap({to->mutable_data(), CPU});
      }
      mine.unsafeGetTensorImpl()->set_sizes_and_strides(its.sizes(), its.strides(), its.storage_offset());
    }
  }

  Tensor from_cpu(const Tensor& t) {
    if (!t.defined() || !is_for_gpu) return t;
    for (auto& given : of_cpu)
      if (given.is_same(t)) return t;
    for (auto& [mine, its] : pairs_)
      if (its.is_same(t)) return mine;
    auto* storage = t.storage().unsafeGetStorageImpl();
    for (auto& [mine, its] : pairs_)
      if (its.storage().unsafeGetStorageImpl() == storage) return view_of(mine, t);
    int64_t size = storage->nbytes();
    c10::Storage made(c10::Storage::use_byte_size_t(), size, on_gpu(storage->set_data_ptr(nothing()), size), &allocator,
                      true);
    pairs_.push_back({with_storage(made, DispatchKey::CUDA, t), t});
    return pairs_.back().first;
  }

 private:
  std::vector<std::pair<Tensor, Tensor>> pairs_;
  std::map<c10::StorageImpl*, c10::Storage> storages_;
};

// Those that take tensors of both devices on a real card: all of them, or the places where to look.
const std::set<std::string> COPIES = {"aten::copy_", "aten::_foreach_copy_"};
const std::set<std::string> LOOK_UPS = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};
// Those after which the host knows a result.
const std::set<std::string> SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::equal",
                                     "aten::masked_select"};
// Those that only look at the sizes.
const std::set<std::string> VIEWS = {
    "aten::view",     "aten::as_strided", "aten::_reshape_alias", "aten::slice",     "aten::select",
    "aten::t",        "aten::transpose",  "aten::permute",        "aten::expand",    "aten::unsqueeze",
    "aten::squeeze",  "aten::detach",     "aten::alias",          "aten::unbind",    "aten::_unsafe_view",
    "aten::split",    "aten::unfold",     "aten::diagonal",       "aten::new_empty", "aten::split_with_sizes",
    "aten::new_empty_strided", "aten::empty_like", "aten::resize_"};

struct Access {
  const void* bytes;
  bool write, is_pinned, is_pageable;
};

void note(const c10::FunctionSchema& schema, const std::vector<Access>& accesses, bool non_blocking) {
  if (VIEWS.count(schema.name())) return;
  std::lock_guard<std::recursive_mutex> guard(order::lock);
  order::tick(order::stream);
  bool waits = SYNCS.count(schema.name()) > 0;
  for (auto& a : accesses) {
    order::touch(a.bytes, order::stream, a.write, schema.name());
    waits |= (a.is_pageable && (a.write || !non_blocking)) || (a.is_pinned && !non_blocking);
  }
  if (waits && !order::in_kernel) order::merge(order::clocks[order::HOST], order::clocks[order::stream]);
}

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  std::vector<Access> accesses;
  bool non_blocking = false;
  auto add = [&](const Tensor& t, bool write) {
    bool is_number = !t.is_cuda() && t.dim() == 0 && !COPIES.count(schema.name());
    if (!t.has_storage() || t.numel() == 0 || is_number) return;
    const void* bytes = t.storage().data();
    bool pinned = !t.is_cuda() && is_pinned(bytes);
    accesses.push_back({bytes, write, pinned, !t.is_cuda() && !pinned});
  };
  auto seen = [&](const Tensor& t) {
    return std::any_of(accesses.begin(), accesses.end(), [&](auto& a) { return a.bytes == t.storage().data(); });
  };
  Call call;
  bool is_mixed = false;
  auto begin = stack->size() - schema.arguments().size();
  for (size_t i = begin; i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    const auto& argument = schema.arguments()[i - begin];
    bool write = argument.alias_info() && argument.alias_info()->isWrite();
    if (argument.name() == "non_blocking" && value.isBool()) non_blocking = value.toBool();
    if (value.isDevice() && value.toDevice().is_cuda()) {
      call.is_for_gpu = true;
      value = CPU;
    }
    value = each_tensor(value, [&](const Tensor& t) {
      if (order::watching && t.defined()) add(t, write);
      bool may_be_of_cpu = COPIES.count(schema.name()) || (t.defined() && t.dim() == 0 && !write) ||
                           (LOOK_UPS.count(schema.name()) && argument.name() == "indices");
      is_mixed |= t.defined() && !t.is_cuda() && !may_be_of_cpu;
      return call.to_cpu(t);
    });
  }
  TORCH_CHECK(!is_mixed, "Expected all tensors to be on the same device, but found at least two devices, ",
              "cuda:0 and cpu! (", schema.name(), ")");
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  call.settle();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    (*stack)[i] = each_tensor((*stack)[i], [&](const Tensor& t) {
      auto made = call.from_cpu(t);
      if (order::watching && made.defined() && made.is_cuda() && !seen(made)) add(made, true);
      return made;
    });
  if (order::watching) note(schema, accesses, non_blocking);
}

// --- CUDA graphs: what was computed while one was captured, again, on the same addresses -----------------------------

struct Captured {
  c10::OperatorHandle op;
  std::vector<IValue> given, made;
};

std::vector<std::optional<Captured>> captured;
thread_local bool capturing = false;

IValue in_place(const IValue& value) {  // tensors as they are now, wherever their owners move them
  return each_tensor(value, [](const Tensor& t) { return t.defined() && t.has_storage() ? view_of(t, t) : t; });
}

void as_the_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  bool is_view = std::any_of(schema.returns().begin(), schema.returns().end(),
                             [](auto& made) { return made.alias_info() && !made.alias_info()->isWrite(); });
  if (!capturing || is_view) return compute(op, stack);
  TORCH_CHECK(!SYNCS.count(schema.name()), "operation not permitted when stream is capturing: ", schema.name());
  Captured call{op, {}, {}};
  auto given = stack->end() - schema.arguments().size();
  std::transform(given, stack->end(), std::back_inserter(call.given), in_place);
  compute(op, stack);
  auto made = stack->end() - schema.returns().size();
  std::transform(made, stack->end(), std::back_inserter(call.made), in_place);
  captured.push_back(std::move(call));
}

void replay(int64_t begin, int64_t end) {
  c10::InferenceMode guard;
  for (int64_t i = begin; i < end; ++i) {
    const Captured& call = captured[i].value();
    torch::jit::Stack stack;
    std::transform(call.given.begin(), call.given.end(), std::back_inserter(stack), in_place);
    compute(call.op, &stack);
    for (size_t k = 0; k < call.made.size(); ++k) {
      if (call.made[k].isNone()) continue;
      TORCH_CHECK(call.made[k].isTensor(), "not simulated in a graph: ", call.op.schema().name());
      auto into = call.made[k].toTensor(), made = stack[k].toTensor();
      if (into.defined() && into.numel() && into.storage().data() != made.storage().data()) into.copy_(made);
    }
  }
}

void forget(int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) captured[i].reset();
}

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

Tensor& set_storage_at(Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size,
                       c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source) {
  int64_t size = source.nbytes() / self.dtype().itemsize();
  return set_storage_at(self, std::move(source), 0, {size}, {1});
}

auto as_boxed() { return torch::CppFunction::makeFromBoxedFunction<&as_the_cpu>(); }

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(as_boxed()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage_at);
  m.impl("copy_", as_boxed());          // otherwise a kernel that looks for CUDA's
  m.impl("silu_backward", as_boxed());  // otherwise put together from others, which take more memory
}

// --- for Python ---------------------------------------------------------------------------------------------------

Tensor as_gpu(const Tensor& cpu) {  // the same bytes, which are not counted
  auto* kept = new Tensor(cpu);
  c10::DataPtr bytes(cpu.storage().unsafeGetStorageImpl()->mutable_data(), kept,
                     [](void* context) { delete static_cast<Tensor*>(context); }, GPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), cpu.storage().nbytes(), std::move(bytes), &allocator, false);
  return with_storage(storage, DispatchKey::CUDA, cpu);
}

void host_uses(const Tensor& cpu, bool write) {
  if (!order::watching || !cpu.has_storage() || !is_pinned(cpu.storage().data())) return;
  std::lock_guard<std::recursive_mutex> guard(order::lock);
  ++order::clocks[order::HOST][order::HOST];
  order::touch(cpu.storage().data(), order::HOST, write, "an operator");
}

order::Clock& clock_of(int64_t agent) {  // of the host, or of a stream, for which the host has now asked something
  auto& clock = order::clocks[agent];
  order::merge(clock, order::clocks[order::HOST]);
  return clock;
}

TORCH_LIBRARY(simulated, m) {
  m.def("memory() -> int", +[]() { return memory::in_use.load(); });
  m.def("peak() -> int", +[]() { return memory::peak.load(); });
  m.def("reset_peak() -> ()", +[]() { memory::peak = memory::in_use.load(); });
  m.def("pin(int address, int size) -> ()", &memory::pin);
  m.def("capture(bool on) -> int", +[](bool on) {  // returns how many calls are captured by now
    capturing = on;
    return static_cast<int64_t>(captured.size());
  });
  m.def("replay(int begin, int end) -> ()", &replay);
  m.def("forget(int begin, int end) -> ()", &forget);
  m.def("use_pool(str name) -> ()", +[](std::string name) { memory::pool = name; });
  m.def("set_asleep(str pool, bool sleeps) -> int",
        +[](std::string pool, bool sleeps) { return memory::set_asleep(pool, sleeps); });
  m.def("asleep() -> int", +[]() { return memory::asleep.load(); });
  m.def("pooled() -> int", &memory::pooled);
  m.def("as_gpu(Tensor cpu) -> Tensor");
  m.def("watch(bool on) -> ()", +[](bool on) {
    std::lock_guard<std::recursive_mutex> guard(order::lock);
    order::blocks.clear();
    order::watching = on;
  });
  m.def("in_kernel(bool on) -> ()", +[](bool on) { order::in_kernel = on; });
  m.def("use_stream(int stream) -> ()", +[](int64_t stream) { order::stream = stream; });
  m.def("record(int event, int stream) -> ()", +[](int64_t event, int64_t stream) {
    std::lock_guard<std::recursive_mutex> guard(order::lock);
    order::events[event] = clock_of(stream);
  });
  m.def("wait_event(int agent, int event) -> ()", +[](int64_t agent, int64_t event) {
    std::lock_guard<std::recursive_mutex> guard(order::lock);
    order::merge(clock_of(agent), order::events[event]);
  });
  m.def("wait_stream(int agent, int stream) -> ()", +[](int64_t agent, int64_t stream) {
    std::lock_guard<std::recursive_mutex> guard(order::lock);
    order::merge(clock_of(agent), order::clocks[stream]);
  });
  m.def("host_uses(Tensor cpu, bool write) -> ()");
  m.def("take_faults() -> str[]", +[]() {
    std::lock_guard<std::recursive_mutex> guard(order::lock);
    std::vector<std::string> taken(order::faults.begin(), order::faults.end());
    order::faults.clear();
    return taken;
  });
}

TORCH_LIBRARY_IMPL(simulated, CPU, m) {
  m.impl("as_gpu", &as_gpu);
  m.impl("host_uses", &host_uses);
}

}  // namespace
