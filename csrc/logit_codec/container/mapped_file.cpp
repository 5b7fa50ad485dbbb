#include "container/mapped_file.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <system_error>

namespace logit_codec {

// What the handler looks at.  Never freed: those of files that are no longer mapped are used again.
// Without locks, which a process forked at the wrong moment would wait for without end.
struct MappedFile::Mapping {
  std::atomic<bool> used{true};
  std::atomic<uintptr_t> begin{0};  // 0: nothing is mapped
  std::atomic<size_t> size{0};
  std::atomic<bool> lost{false};
  Mapping* next = nullptr;
};

namespace {

std::atomic<MappedFile::Mapping*> mappings{nullptr};
std::atomic<pid_t> watching{0};  // the process that the handler was installed in
struct sigaction before;

void on_bus_error(int signal, siginfo_t* info, void* context) {
  const bool is_fault = info->si_code > 0;  // and not kill()
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  for (auto* mapping = mappings.load(); is_fault && mapping; mapping = mapping->next) {
    const uintptr_t begin = mapping->begin.load();
    const size_t size = mapping->size.load();
    if (begin == 0 || address < begin || address - begin >= size) continue;
    mapping->lost.store(true);
    const int kept = errno;
    const void* zeros = mmap(reinterpret_cast<void*>(begin), size, PROT_READ,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    errno = kept;
    if (zeros != MAP_FAILED) return;
  }
  if (before.sa_flags & SA_SIGINFO) {
    before.sa_sigaction(signal, info, context);
  } else if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
    sigaction(signal, &before, nullptr);  // a fault comes again when the handler returns
    if (!is_fault) raise(signal);
  } else {
    before.sa_handler(signal);
  }
}

MappedFile::Mapping* unused_mapping() {
  for (auto* mapping = mappings.load(); mapping; mapping = mapping->next)
    if (!mapping->used.exchange(true)) return mapping;
  auto* made = new MappedFile::Mapping;
  made->next = mappings.load();
  while (!mappings.compare_exchange_weak(made->next, made)) {
  }
  return made;
}

class Descriptor {
 public:
  explicit Descriptor(const std::string& path) : number_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (number_ < 0) throw std::system_error(errno, std::generic_category(), path);
  }
  ~Descriptor() { close(number_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int number() const { return number_; }

 private:
  int number_;
};

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  const Descriptor file(path);
  struct stat status;
  if (fstat(file.number(), &status) != 0)
    throw std::system_error(errno, std::generic_category(), path);
  const auto size = size_t(status.st_size);
  void* begin = mmap(nullptr, size, PROT_READ, MAP_SHARED, file.number(), 0);
  if (begin == MAP_FAILED) throw std::system_error(errno, std::generic_category(), path);
  mapping_ = unused_mapping();
  mapping_->size.store(size);
  mapping_->lost.store(false);
  mapping_->begin.store(reinterpret_cast<uintptr_t>(begin));
}

MappedFile::~MappedFile() {
  void* begin = reinterpret_cast<void*>(mapping_->begin.exchange(0));
  munmap(begin, mapping_->size.load());
  mapping_->used.store(false);
}

Bytes MappedFile::bytes() const {
  return {reinterpret_cast<const uint8_t*>(mapping_->begin.load()), mapping_->size.load()};
}

void MappedFile::guard() {
  if (watching.load(std::memory_order_relaxed) == getpid()) return;
  struct sigaction now;
  sigaction(SIGBUS, nullptr, &now);
  if (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_bus_error) {
    before = now;
    struct sigaction own{};
    own.sa_sigaction = on_bus_error;
    own.sa_flags = SA_SIGINFO;
    sigaction(SIGBUS, &own, nullptr);
  }
  watching.store(getpid());
}

bool MappedFile::is_lost() const { return mapping_->lost.load(); }

}  // namespace logit_codec
