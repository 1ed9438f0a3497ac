// The tensors of a test's program, between standard input and output. Under AddressSanitizer they have exactly the
// memory that they need; otherwise pages that cannot be touched are around them, and what is between must stay as it
// was.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

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
    const std::int64_t size = bytes + offset;
    if (bytes_before > 0) {
      data_ = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (data_ == MAP_FAILED) fail("out of addresses");
      return;
    }
#if defined(__SANITIZE_ADDRESS__)
    if (posix_memalign(&data_, 16, std::max<std::int64_t>(size, 1)) != 0) fail("out of memory");
    pages_ = {static_cast<char*>(data_), size};
#else
    const std::int64_t page = sysconf(_SC_PAGESIZE), inner = (size + page - 1) / page * page;
    void* base = mmap(nullptr, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) fail("out of memory");
    pages_ = {static_cast<char*>(base) + page, inner};
    if (inner > 0 && mprotect(pages_.begin, inner, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
    data_ = pages_.begin + inner - (size + 15) / 16 * 16;
#endif
    std::memset(pages_.begin, 0xff, pages_.bytes);  // NaN, where nothing is written
  }
  ~Memory() {
#if defined(__SANITIZE_ADDRESS__)
    if (bytes_before_ == 0) std::free(data_);
#else
    for (const char* at = pages_.begin; at < pages_.begin + pages_.bytes; ++at) {
      const bool beside = at < data() || at >= data() + bytes_;
      if (beside && *at != '\xff') fail("written beside a tensor");
    }
#endif
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
  struct {
    char* begin;
    std::int64_t bytes;
  } pages_{};  // that can be touched
};

}  // namespace cuda_host
