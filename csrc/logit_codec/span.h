// std::span for C++17: as much of it as is used here.
#pragma once

#include <cstddef>
#include <type_traits>
#include <vector>

namespace logit_codec {

template <class T>
class Span {
 public:
  Span() = default;
  Span(T* data, size_t size) : data_(data), size_(size) {}
  Span(std::vector<std::remove_const_t<T>>& items) : Span(items.data(), items.size()) {}
  template <class U = T, class = std::enable_if_t<std::is_const_v<U>>>
  Span(const std::vector<std::remove_const_t<T>>& items) : Span(items.data(), items.size()) {}
  template <class U = T, class = std::enable_if_t<std::is_const_v<U>>>
  Span(Span<std::remove_const_t<T>> other) : Span(other.data(), other.size()) {}

  T* data() const { return data_; }
  T* begin() const { return data_; }
  T* end() const { return data_ + size_; }
  size_t size() const { return size_; }
  size_t size_bytes() const { return size_ * sizeof(T); }
  bool empty() const { return size_ == 0; }
  T& operator[](size_t i) const { return data_[i]; }
  Span subspan(size_t first) const { return {data_ + first, size_ - first}; }
  Span subspan(size_t first, size_t size) const { return {data_ + first, size}; }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace logit_codec
