// File descriptors that many threads read from, opened once.
#pragma once

#include <fcntl.h>
#include <sys/types.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

namespace m3i {

// A file that cannot be read, whatever is in it.
struct ReadError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class OpenFile {
 public:
  explicit OpenFile(const std::string& path) : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) throw ReadError(std::string("cannot be opened: ") + strerror(errno));
  }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;
  ~OpenFile() { ::close(fd_); }

  void read(int64_t offset, uint8_t* into, size_t size) const {
    for (size_t done = 0; done < size;) {
      const ssize_t got = ::pread(fd_, into + done, size - done,
                                  static_cast<off_t>(offset) + static_cast<off_t>(done));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) throw ReadError(std::string("cannot be read: ") + strerror(errno));
      if (got == 0) {
        throw ReadError("expected " + std::to_string(size) + " bytes at " + std::to_string(offset) +
                        ", got " + std::to_string(done) + ", where the file ends");
      }
      done += static_cast<size_t>(got);
    }
  }

 private:
  int fd_;
};

// Keeps the files that were read last; one that is being read stays open until that is done. They
// are opened outside of the lock: on a network's file system that takes a while.
class OpenFiles {
 public:
  explicit OpenFiles(size_t limit) : limit_(limit) {}

  std::shared_ptr<const OpenFile> get(const std::string& path) {
    if (auto file = find(path)) return file;
    return keep(path, std::make_shared<const OpenFile>(path));
  }

 private:
  using File = std::shared_ptr<const OpenFile>;
  using Entry = std::pair<std::string, File>;

  File find(const std::string& path) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = by_path_.find(path);
    if (found == by_path_.end()) return nullptr;
    newest_first_.splice(newest_first_.begin(), newest_first_, found->second);
    return found->second->second;
  }

  // Returns the one that another thread has opened meanwhile, if there is one.
  File keep(const std::string& path, File file) {
    File oldest;  // closed after the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto [place, is_new] = by_path_.try_emplace(path);
    if (!is_new) return place->second->second;
    newest_first_.emplace_front(path, file);
    place->second = newest_first_.begin();
    if (newest_first_.size() > limit_) {
      oldest = std::move(newest_first_.back().second);
      by_path_.erase(newest_first_.back().first);
      newest_first_.pop_back();
    }
    return file;
  }

  size_t limit_;
  std::mutex mutex_;
  std::list<Entry> newest_first_;
  std::unordered_map<std::string, std::list<Entry>::iterator> by_path_;
};

}  // namespace m3i
