// SPDX-License-Identifier: Apache-2.0
// What the CPU ops share outside their kernels: tensors as rows, tasks for torch's thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "../check.h"
#include "isa.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace lean_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Memory a thread keeps from call to call, since fresh pages cost more than small calls. A task
// that runs on its caller's thread needs a slot of its own beside its caller's.
template <int slot = 0>
void* thread_scratch(size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  [[maybe_unused]] const size_t asked = bytes;
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = 0;
    bytes = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, bytes);
    if (!buffer.data) throw std::bad_alloc();
    buffer.size = bytes;
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(buffer.data, asked);
  ASAN_POISON_MEMORY_REGION(static_cast<char*>(buffer.data) + asked, buffer.size - asked);
#endif
  return buffer.data;
}

// Runs work(each) on every thread that shares [0, count); each(task) runs task(i) for its part of
// them: the first ones on the same threads in every call, so that what they touch is still in their
// caches, and the others on whichever thread is free.
template <class F>
void run_workers(int64_t count, int64_t threads, const F& work) {
  const int64_t workers = std::min(count, threads);
  std::atomic<int64_t> next{workers};
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      work([&](const auto& task) {
        for (int64_t i = worker; i < count; i = next.fetch_add(1)) task(i);
      });
  };
  if (workers <= 1) return run(0, workers);
  torch::stable::parallel_for(0, workers, 1, run);
}

template <class F>
void run_tasks(int64_t count, int64_t threads, const F& task) {
  run_workers(count, threads, [&](const auto& each) { each(task); });
}

inline Dtype dtype_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    case ScalarType::Double: return kFloat64;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": dtype must be float32, bfloat16, float16 or float64");
  return kDtypes;
}

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// weight or bias [features] of a normalisation of rows of `dtype`, in the accumulator's dtype.
inline Tensor norm_parameter(const Tensor& t, int64_t features, ScalarType dtype, const char* op) {
  const ScalarType wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == features &&
                      (t.scalar_type() == dtype || t.scalar_type() == wide),
                  op, ": weight and bias must be [", features,
                  "] in the rows' dtype, or float32 where they have a half precision");
  return as_contiguous(t.scalar_type() == wide ? t : torch::stable::to(t, wide));
}

// A [..., cols] tensor as rows of unit stride.
struct Rows {
  Tensor tensor;
  int64_t count, cols, stride;

  Rows(const Tensor& t, const char* op) : tensor(t) {
    STD_TORCH_CHECK(t.dim() >= 1, op, ": inputs must have at least one dimension");
    cols = t.size(t.dim() - 1);
    count = 1;
    for (int64_t d = 0; d + 1 < t.dim(); ++d) count *= t.size(d);
    if (t.dim() == 2 && t.stride(1) == 1) {
      stride = t.stride(0);
    } else {
      tensor = as_contiguous(t);
      stride = cols;
    }
  }
};

}  // namespace lean_kernels
