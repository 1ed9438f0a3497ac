// The tensors of a test's program: exactly the memory that they need, for AddressSanitizer, between standard input and
// output.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../csrc/gated_dwconv.h"
#include "shim.h"

namespace cuda_host {

inline std::int64_t bytes_of(mambaout_kernels::DType dtype) {
  return dtype == mambaout_kernels::DType::kFloat32 ? 4 : 2;
}

// bytes_before: of zeros that go before what is read and written: so many that only their first and last pages exist.
class Memory {
 public:
  Memory(std::int64_t bytes, std::int64_t offset, std::int64_t bytes_before = 0)
      : bytes_(bytes), offset_(offset), bytes_before_(bytes_before) {
    if (bytes_before > 0) {
      data_ = mmap(nullptr, bytes + offset, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (data_ == MAP_FAILED) fail("out of addresses");
      return;
    }
    if (posix_memalign(&data_, 16, std::max<std::int64_t>(bytes + offset, 1)) != 0) fail("out of memory");
    std::memset(data_, 0xff, bytes + offset);  // NaN, where nothing is written
  }
  ~Memory() {
    if (bytes_before_ == 0) std::free(data_);
  }
  Memory(const Memory&) = delete;

  char* data() const { return static_cast<char*>(data_) + offset_; }
  std::int64_t bytes() const { return bytes_; }
  void read() const {
    const std::int64_t wanted = bytes_ - bytes_before_;
    if (static_cast<std::int64_t>(std::fread(data() + bytes_before_, 1, wanted, stdin)) != wanted)
      fail("input is too short");
  }
  void write() const { std::fwrite(data() + bytes_before_, 1, bytes_ - bytes_before_, stdout); }

 private:
  std::int64_t bytes_, offset_, bytes_before_;
  void* data_ = nullptr;
};

}  // namespace cuda_host
