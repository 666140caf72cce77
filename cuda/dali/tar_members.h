// The members of one sample, found in the bytes of its range of a tar.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace m3i {

struct TarMember {
  std::string extension;  // what follows the first dot of the name's last part, in lower case
  const uint8_t* data;
  size_t size;
};

namespace tar_detail {

constexpr size_t kBlock = 512;

inline std::string_view text_field(const uint8_t* header, size_t offset, size_t width) {
  std::string_view field(reinterpret_cast<const char*>(header) + offset, width);
  return field.substr(0, field.find('\0'));
}

// Octal digits, or base 256 where the first bit is set (GNU, sizes of 8 GiB and more).
inline size_t number_field(const uint8_t* header, size_t offset, size_t width) {
  size_t value = 0;
  if (header[offset] & 0x80) {
    for (size_t i = 1; i < width; ++i) value = value << 8 | header[offset + i];
    return value;
  }
  for (size_t i = 0; i < width; ++i) {
    const uint8_t digit = header[offset + i];
    if (digit >= '0' && digit <= '7') {
      value = value << 3 | static_cast<size_t>(digit - '0');
    } else if (digit != ' ' && digit != '\0') {
      throw std::runtime_error("expected a tar header with an octal size, got another");
    }
  }
  return value;
}

inline void check_header(const uint8_t* header) {
  size_t sum = 0;
  for (size_t i = 0; i < kBlock; ++i) sum += i >= 148 && i < 156 ? ' ' : header[i];
  if (sum != number_field(header, 148, 8)) {
    throw std::runtime_error("expected a tar header with its checksum, got other bytes");
  }
}

// Reads `path` and `size` of an extended header: lines of "LENGTH KEY=VALUE\n" (POSIX pax).
inline void read_extended(std::string_view records, std::string& path, std::string& size) {
  while (!records.empty() && records.front() >= '0' && records.front() <= '9') {
    const size_t space = records.find(' '), equals = records.find('=');
    if (space == std::string_view::npos || equals == std::string_view::npos || space > 9) break;
    const size_t length = std::stoul(std::string(records.substr(0, space)));
    if (length > records.size() || length < equals + 2) break;
    const std::string_view key = records.substr(space + 1, equals - space - 1);
    const std::string value(records.substr(equals + 1, length - equals - 2));
    if (key == "path") path = value;
    if (key == "size") size = value;
    records.remove_prefix(length);
  }
}

// Splits "folder/key.extension" at the first dot of its last part.
inline size_t extension_start(std::string_view name) {
  const size_t slash = name.rfind('/');
  return name.find('.', slash == std::string_view::npos ? 0 : slash + 1);
}

}  // namespace tar_detail

// Throws std::runtime_error, what was expected and got, where the bytes are not whole members of
// one sample.
inline std::vector<TarMember> tar_members(const uint8_t* bytes, size_t size) {
  using namespace tar_detail;
  std::vector<TarMember> members;
  std::string key, long_name, long_size;
  bool has_key = false;
  for (size_t place = 0; place < size;) {
    const uint8_t* header = bytes + place;
    if (size - place < kBlock) throw std::runtime_error("expected whole tar blocks, got a part");
    if (header[0] == 0) {  // blocks of zeros end a tar, and may pad it
      place += kBlock;
      continue;
    }
    check_header(header);
    size_t content = number_field(header, 124, 12);
    const char kind = static_cast<char>(header[156]);
    const bool is_file = kind == '0' || kind == '\0' || kind == '7';
    if (is_file && !long_size.empty()) content = std::stoull(long_size);
    place += kBlock;
    if (content > size - place) {
      throw std::runtime_error("expected a member within the sample's " + std::to_string(size) +
                               " bytes, got one of " + std::to_string(content));
    }
    const std::string_view text(reinterpret_cast<const char*>(bytes + place), content);
    if (kind == 'x') {
      read_extended(text, long_name, long_size);
    } else if (kind == 'L') {
      long_name = std::string(text.substr(0, text.find('\0')));
    } else if (is_file) {
      std::string name = long_name;
      if (name.empty()) {
        const std::string_view prefix = text_field(header, 257, 5) == "ustar" && header[262] == 0
                                            ? text_field(header, 345, 155)
                                            : std::string_view();
        name = (prefix.empty() ? "" : std::string(prefix) + "/") +
               std::string(text_field(header, 0, 100));
      }
      const size_t dot = extension_start(name);
      const std::string own_key = name.substr(0, dot);
      if (has_key && own_key != key) {
        throw std::runtime_error("expected members of one sample, " + key + ", got " + name);
      }
      key = own_key;
      has_key = true;
      std::string extension = dot == std::string::npos ? "" : name.substr(dot + 1);
      for (char& c : extension) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
      members.push_back({std::move(extension), bytes + place, content});
      long_name.clear();
      long_size.clear();
    }
    place += (content + kBlock - 1) / kBlock * kBlock;
  }
  return members;
}

}  // namespace m3i
