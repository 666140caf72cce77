// views: how the parameters of a view are drawn, on the host.
//
// The numbers are Philox words of (seed; position, view, block), each at a place of its own: a
// view's parameters depend on nothing else. Distributions are those of torchvision's
// RandomResizedCrop, RandomHorizontalFlip, ColorJitter, RandomGrayscale, GaussianBlur and
// RandomSolarize. Compiled with -ffp-contract=off, as arithmetic.h says, every machine draws the
// same.
#pragma once

#include "views/arithmetic.h"
#include "views/philox.h"

#include <algorithm>
#include <cmath>

namespace m3i {
namespace views {

// ln x for x > 0, to an ulp or two, from products, quotients and sums alone.
inline double log_of(double x) {
  int exponent;
  double part = std::frexp(x, &exponent);  // in [0.5, 1)
  if (part < 0.7071067811865476) {
    part *= 2;
    --exponent;
  }
  const double ratio = (part - 1) / (part + 1), square = ratio * ratio;
  double sum = 0;
  for (int k = 25; k > 0; k -= 2) sum = sum * square + 1.0 / k;
  return 2 * ratio * sum + exponent * 0.6931471805599453;
}

// The words of one view.
class ViewDraws {
 public:
  ViewDraws(uint64_t seed, uint64_t position, uint32_t view)
      : seed_(seed), position_(position), view_(view) {}

  PhiloxWords block(uint32_t number) const {
    return philox(
        {{static_cast<uint32_t>(position_), static_cast<uint32_t>(position_ >> 32), view_, number}},
        static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32));
  }

 private:
  uint64_t seed_, position_;
  uint32_t view_;
};

// Blocks of four words each; the attempts at a crop are the last ones.
enum ViewBlock : uint32_t { kCoins, kFactors, kOrder, kAttempts };
inline constexpr uint32_t kCropAttempts = 10;

inline double between(uint32_t word, double low, double high) {
  return low + (high - low) * static_cast<double>(uniform_of(word));
}

inline bool crop_attempt(const ViewDistribution& of, int64_t height, int64_t width,
                         const PhiloxWords& words, ViewParams& params) {
  const double area =
      static_cast<double>(height * width) * between(words.word[0], of.scale[0], of.scale[1]);
  const double ratio = exp_of(between(words.word[1], log_of(of.ratio[0]), log_of(of.ratio[1])));
  const double w = std::nearbyint(std::sqrt(area * ratio));
  const double h = std::nearbyint(std::sqrt(area / ratio));
  if (!(w > 0 && w <= static_cast<double>(width) && h > 0 && h <= static_cast<double>(height))) {
    return false;
  }
  params.height = static_cast<float>(h);
  params.width = static_cast<float>(w);
  params.y = static_cast<float>(below(words.word[2], height - static_cast<int64_t>(h) + 1));
  params.x = static_cast<float>(below(words.word[3], width - static_cast<int64_t>(w) + 1));
  return true;
}

// The largest crop about the centre whose ratio is in range.
inline void centre_crop(const ViewDistribution& of, int64_t height, int64_t width,
                        ViewParams& params) {
  const double in = static_cast<double>(width) / static_cast<double>(height);
  int64_t h = height, w = width;
  if (in < of.ratio[0]) {
    h = static_cast<int64_t>(std::nearbyint(static_cast<double>(w) / of.ratio[0]));
  } else if (in > of.ratio[1]) {
    w = static_cast<int64_t>(std::nearbyint(static_cast<double>(h) * of.ratio[1]));
  }
  h = std::min(std::max<int64_t>(h, 1), height);
  w = std::min(std::max<int64_t>(w, 1), width);
  params.height = static_cast<float>(h);
  params.width = static_cast<float>(w);
  params.y = static_cast<float>((height - h) / 2);
  params.x = static_cast<float>((width - w) / 2);
}

// The parameters of one view of a picture of height x width pixels.
inline ViewParams draw_view(const ViewDistribution& of, int64_t height, int64_t width,
                            uint64_t seed, uint64_t position, uint32_t view) {
  ViewParams params = {0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0};
  const ViewDraws draws(seed, position, view);
  bool is_cropped = false;
  for (uint32_t k = 0; k < kCropAttempts && !is_cropped; ++k) {
    is_cropped = crop_attempt(of, height, width, draws.block(kAttempts + k), params);
  }
  if (!is_cropped) centre_crop(of, height, width, params);

  const auto coin = [](uint32_t word, double probability) {
    return static_cast<double>(uniform_of(word)) < probability;
  };
  const PhiloxWords coins = draws.block(kCoins), factors = draws.block(kFactors),
                    order = draws.block(kOrder);
  params.flip = coin(coins.word[0], of.flip);
  if (coin(coins.word[1], of.jitter)) {
    const auto about = [](double centre, double half, uint32_t word) {
      return static_cast<float>(between(word, centre - half, centre + half));
    };
    params.brightness = about(1, of.brightness, factors.word[0]);
    params.contrast = about(1, of.contrast, factors.word[1]);
    params.saturation = about(1, of.saturation, factors.word[2]);
    params.hue = about(0, of.hue, factors.word[3]);
    params.order = static_cast<float>(below(order.word[0], kViewOrders));
  }
  params.gray = coin(coins.word[2], of.gray);
  if (coin(coins.word[3], of.blur)) {
    params.sigma = static_cast<float>(between(order.word[1], of.sigma[0], of.sigma[1]));
  }
  params.solarize = coin(order.word[2], of.solarize);
  return params;
}

}  // namespace views
}  // namespace m3i
