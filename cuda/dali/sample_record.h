// A sample as batches need it, read from its range of a file: pictures still encoded, the chosen
// caption. pipelines/torch_backend.py does the same in Python, and tests compare the two.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dali/crc32c.h"
#include "dali/open_files.h"
#include "dali/picture_header.h"
#include "dali/tar_members.h"

namespace m3i {

// Columns of a sample's row in a batch, int64 each, as m3i_fast/pipelines/batch_rows.py writes
// them.
struct SampleRow {
  int64_t position;   // of the sample in the run
  int64_t sample_id;  // for messages
  int64_t offset, size;
  int64_t crc32c;     // of these bytes; -1: not known
  int64_t caption;    // of C captions number (caption * C) >> 32 is taken
  int64_t alternate;  // likewise of the other pictures of the sample
};
constexpr int kRowColumns = sizeof(SampleRow) / sizeof(int64_t);

struct ReadOptions {
  int64_t context_length, vocab_size, max_pixels;
  std::string caption_member;  // "tok", or the member with the text that a tokenizer is to read
  bool alternates;
};

struct SampleRecord {
  std::unique_ptr<uint8_t[]> bytes;  // of all members, which the rest points into
  std::pair<const uint8_t*, size_t> picture{nullptr, 0};
  std::pair<const uint8_t*, size_t> alternate{nullptr, 0};
  std::vector<int32_t> token_ids;
  std::pair<const uint8_t*, size_t> text{nullptr, 0};
  std::vector<TarMember> members;
};

namespace record_detail {

inline size_t chosen(int64_t draw, size_t count) {
  return static_cast<size_t>((static_cast<uint64_t>(draw) * count) >> 32);
}

inline const TarMember* find(const std::vector<TarMember>& members, const std::string& extension) {
  const TarMember* found = nullptr;
  for (const TarMember& member : members) {
    if (member.extension != extension) continue;
    if (found) throw std::runtime_error("expected each member once, got two of " + extension);
    found = &member;
  }
  return found;
}

inline const TarMember* find_picture(const std::vector<TarMember>& members) {
  const TarMember* found = nullptr;
  for (const char* extension : {"jpg", "jpeg", "png", "webp"}) {
    const TarMember* member = find(members, extension);
    if (member && found) {
      throw std::runtime_error("expected one picture, got " + found->extension + " and " +
                               member->extension);
    }
    if (member) found = member;
  }
  if (!found) throw std::runtime_error("expected a picture (jpg, jpeg, png or webp), got none");
  return found;
}

inline std::vector<int32_t> integers(const TarMember& member) {
  if (member.size % 4 != 0) {
    throw std::runtime_error(member.extension + ": expected int32 values, got " +
                             std::to_string(member.size) + " bytes");
  }
  std::vector<int32_t> values(member.size / 4);
  std::memcpy(values.data(), member.data, member.size);
  return values;
}

// Start and size of one of the parts that a member holds joined.
inline std::pair<size_t, size_t> part(const std::vector<int32_t>& sizes, size_t total, size_t index,
                                      const std::string& name) {
  size_t sum = 0, start = 0;
  if (sizes.empty()) throw std::runtime_error(name + ": expected sizes, got none");
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] < 1) {
      throw std::runtime_error(name + ": expected sizes of at least 1, got " +
                               std::to_string(sizes[i]));
    }
    if (i == index) start = sum;
    sum += static_cast<size_t>(sizes[i]);
  }
  if (sum != total) {
    throw std::runtime_error(name + ": expected sizes that add up to " + std::to_string(total) +
                             ", got " + std::to_string(sum));
  }
  return {start, static_cast<size_t>(sizes[index])};
}

// Every caption is checked, so that a sample is refused whichever is chosen.
inline std::vector<int32_t> chosen_caption(const std::vector<TarMember>& members, int64_t draw,
                                           const ReadOptions& options) {
  const TarMember *tokens = find(members, "tok"), *lengths = find(members, "len");
  if (!tokens && !lengths) return {};
  const std::vector<int32_t> ids = tokens ? integers(*tokens) : std::vector<int32_t>();
  const std::vector<int32_t> of_each =
      lengths ? integers(*lengths) : std::vector<int32_t>{static_cast<int32_t>(ids.size())};
  for (const int32_t length : of_each) {
    if (length < 1 || length > options.context_length) {
      throw std::runtime_error("tok: expected 1 to " + std::to_string(options.context_length) +
                               " token ids, got " + std::to_string(length));
    }
  }
  for (const int32_t id : ids) {
    if (id < 0 || id >= options.vocab_size) {
      throw std::runtime_error("tok: expected token ids from 0 to " +
                               std::to_string(options.vocab_size - 1) + ", got " +
                               std::to_string(id));
    }
  }
  const auto [start, count] = part(of_each, ids.size(), chosen(draw, of_each.size()), "len");
  const auto first = ids.begin() + static_cast<int64_t>(start);
  return std::vector<int32_t>(first, first + static_cast<int64_t>(count));
}

}  // namespace record_detail

// Throws std::runtime_error, what was expected and got.
inline SampleRecord read_sample(OpenFiles& files, const std::string& path, const SampleRow& row,
                                const ReadOptions& options) {
  using namespace record_detail;
  SampleRecord record;
  const auto size = static_cast<size_t>(row.size);
  record.bytes.reset(new uint8_t[size]);  // no zeros, which make_unique writes
  files.get(path)->read(row.offset, record.bytes.get(), size);
  if (row.crc32c >= 0) {
    const uint32_t found = crc32c(record.bytes.get(), size);
    if (found != static_cast<uint32_t>(row.crc32c)) {
      throw std::runtime_error("expected bytes of CRC-32C " + std::to_string(row.crc32c) +
                               ", got " + std::to_string(found));
    }
  }
  record.members = tar_members(record.bytes.get(), size);
  const TarMember* picture = find_picture(record.members);
  record.picture = {picture->data, check_picture(picture->data, picture->size, options.max_pixels)};
  if (options.caption_member == "tok") {
    record.token_ids = chosen_caption(record.members, row.caption, options);
  } else if (const TarMember* text = find(record.members, options.caption_member)) {
    record.text = {text->data, text->size};
  }
  if (options.alternates) {
    const TarMember *pictures = find(record.members, "alt"), *sizes = find(record.members, "aln");
    if (!pictures || !sizes) throw std::runtime_error("expected alt and aln, got one or none");
    const std::vector<int32_t> of_each = integers(*sizes);
    const auto [start, length] =
        part(of_each, pictures->size, chosen(row.alternate, of_each.size()), "aln");
    const uint8_t* other = pictures->data + start;
    record.alternate = {other, check_picture(other, length, options.max_pixels)};
  }
  return record;
}

}  // namespace m3i
