// Format and size of an encoded picture, from its header, before anything decodes it: a small file
// of a huge picture takes a decoder gigabytes and minutes. Also what Pillow refuses of a damaged
// picture and DALI's decoders pass over, so that both loaders leave out the same samples.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "views/params.h"

namespace m3i {

struct PictureHeader {
  const char* format;     // "JPEG", "PNG" or "WEBP"
  int64_t height, width;  // as stored, before EXIF's orientation
};

namespace header_detail {

inline int64_t big_endian(const uint8_t* bytes, int count) {
  int64_t value = 0;
  for (int i = 0; i < count; ++i) value = value << 8 | bytes[i];
  return value;
}

inline int64_t little_endian(const uint8_t* bytes, int count) {
  int64_t value = 0;
  for (int i = count - 1; i >= 0; --i) value = value << 8 | bytes[i];
  return value;
}

// The frame header stands before the first scan; every segment up to there has to be whole.
inline PictureHeader jpeg_header(const uint8_t* bytes, size_t size) {
  std::optional<PictureHeader> found;
  for (size_t place = 2; place + 9 <= size;) {
    const uint8_t* segment = bytes + place;
    const int marker = segment[1];
    if (segment[0] == 0xff && marker == 0xda && found) return *found;
    if (segment[0] != 0xff || marker < 0xc0 || (marker >= 0xd0 && marker <= 0xda)) break;
    if (marker <= 0xcf && marker != 0xc4 && marker != 0xc8 && marker != 0xcc) {
      if (found) break;
      found = PictureHeader{"JPEG", big_endian(segment + 5, 2), big_endian(segment + 7, 2)};
    }
    place += marker == 0xff ? 1 : 2 + static_cast<size_t>(big_endian(segment + 2, 2));
  }
  throw std::runtime_error(
      "expected JPEG segments with one frame header before the pixels, got others");
}

// Walks all segments, as libjpeg does after the last row of pixels: a decoder that returns then
// does not see a marker that is none, nor a scan too many. An end (EOI) that is missing is no
// fault.
inline void expect_segments_of_jpeg(const uint8_t* bytes, size_t size) {
  size_t place = 2;
  bool is_one_scan = false;  // of all components, after which there is no other
  int num_components = 0;
  bool is_progressive = false, is_in_scan = false;
  while (place + 2 <= size) {
    const int marker = bytes[place + 1];
    if (marker == 0xff) {
      ++place;
      continue;
    }
    if (marker == 0xd9) return;
    const bool is_frame =
        marker >= 0xc0 && marker <= 0xcf && marker != 0xc4 && marker != 0xc8 && marker != 0xcc;
    const bool is_alone = marker == 0x01 || (marker >= 0xd0 && marker <= 0xd7);
    const bool is_known = is_alone || is_frame || marker == 0xc4 || marker == 0xcc ||
                          (marker >= 0xda && marker <= 0xdd) ||
                          (marker >= 0xe0 && marker <= 0xef) || marker == 0xfe;
    const bool is_late = is_in_scan && (is_frame || (marker == 0xda && is_one_scan));
    if (!is_known || is_late) {
      throw std::runtime_error("expected segments of a JPEG up to its end, got " +
                               std::string(is_late ? "one too many" : "a marker that is none"));
    }
    if (!is_alone && place + 10 > size) return;
    if (is_frame) {
      num_components = bytes[place + 9];
      is_progressive = (marker & 3) == 2;
    } else if (marker == 0xda) {
      is_one_scan = !is_progressive && bytes[place + 4] == num_components;
      is_in_scan = true;
    }
    place += is_alone ? 2 : 2 + static_cast<size_t>(big_endian(bytes + place + 2, 2));
    for (;; place += 2) {  // to the next marker: 0xff 0 is a byte of pixels
      const void* found = place < size ? std::memchr(bytes + place, 0xff, size - place) : nullptr;
      place = found ? static_cast<size_t>(static_cast<const uint8_t*>(found) - bytes) : size;
      if (place + 1 >= size || bytes[place + 1] != 0) break;
    }
  }
}

inline PictureHeader webp_header(const uint8_t* bytes) {
  if (std::memcmp(bytes + 12, "VP8X", 4) == 0) {
    return {"WEBP", 1 + little_endian(bytes + 27, 3), 1 + little_endian(bytes + 24, 3)};
  }
  if (std::memcmp(bytes + 12, "VP8L", 4) == 0) {
    const int64_t bits = little_endian(bytes + 21, 4);
    return {"WEBP", 1 + (bits >> 14 & 0x3fff), 1 + (bits & 0x3fff)};
  }
  return {"WEBP", little_endian(bytes + 28, 2) & 0x3fff, little_endian(bytes + 26, 2) & 0x3fff};
}

}  // namespace header_detail

// Throws std::runtime_error, what was expected and got.
inline PictureHeader picture_header(const uint8_t* bytes, size_t size) {
  using namespace header_detail;
  static const uint8_t kPng[] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n',
                                 0,    0,   0,   13,  'I',  'H',  'D',  'R'};
  if (size >= 24 && std::memcmp(bytes, kPng, sizeof(kPng)) == 0) {
    return {"PNG", big_endian(bytes + 20, 4), big_endian(bytes + 16, 4)};
  }
  if (size >= 2 && bytes[0] == 0xff && bytes[1] == 0xd8) return jpeg_header(bytes, size);
  if (size >= 30 && std::memcmp(bytes, "RIFF", 4) == 0 && std::memcmp(bytes + 8, "WEBP", 4) == 0) {
    return webp_header(bytes);
  }
  throw std::runtime_error("expected JPEG, PNG or WebP data, got " + std::to_string(size) +
                           " other bytes");
}

// Refuses a picture without pixels, with more than max_pixels, or with a longer side than views are
// cut of, and a JPEG of strange segments. Returns how many of the bytes are the picture's: a WebP
// says it, and libwebp reads on where pixels are damaged.
inline size_t check_picture(const uint8_t* bytes, size_t size, int64_t max_pixels) {
  const PictureHeader header = picture_header(bytes, size);
  const std::string found = std::to_string(header.height) + " x " + std::to_string(header.width);
  if (header.height == 0 || header.width == 0) {
    throw std::runtime_error("expected a picture with pixels, got " + found);
  }
  if (header.height > kViewMaxPicture || header.width > kViewMaxPicture) {
    throw std::runtime_error("expected sides of at most " + std::to_string(kViewMaxPicture) +
                             " pixels, got " + found);
  }
  if (header.height > max_pixels / header.width) {
    throw std::runtime_error("expected at most " + std::to_string(max_pixels) + " pixels, got " +
                             found + "; raise max_pixels where pictures are meant to be so large");
  }
  if (std::strcmp(header.format, "JPEG") == 0) header_detail::expect_segments_of_jpeg(bytes, size);
  if (std::strcmp(header.format, "WEBP") != 0) return size;
  const size_t said = 8 + static_cast<size_t>(header_detail::little_endian(bytes + 4, 4));
  return said < size ? said : size;
}

}  // namespace m3i
