// A file that is read in place and may be cut short meanwhile, or whose disk may fail.
//
// The kernel answers a read of bytes that it can't get with the signal SIGBUS, which ends a
// process. Here a handler puts zeros in place of the mapping and remembers it, so that the reader
// goes on and then finds that what it read counts for nothing.  Any other SIGBUS goes to the
// handler before.
#pragma once

#include <cstdint>
#include <string>

#include "bytes.h"

namespace logit_codec {

class MappedFile {
 public:
  // Throws std::system_error where the file can't be opened or mapped.  No descriptor stays open.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  Bytes bytes() const;

  // Call before reading: another library may have taken the signal over in a forked process.
  static void guard();
  // Ask after reading: whether bytes could not be read since the file was mapped.
  bool is_lost() const;

  struct Mapping;

 private:
  Mapping* mapping_;
};

}  // namespace logit_codec
