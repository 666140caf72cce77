// dcnv3 on the CPU: the softmax over the points of each pixel, and its gradient.
#pragma once

#include "m3i/cpu/exp.h"

#include <cmath>

namespace m3i {
namespace {

inline void exp_all(int64_t count, float* values) {
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    store(values + i, exp_of<kLanes<float>>(load<kLanes<float>>(values + i)));
  }
}

inline void exp_all(int64_t count, double* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = std::exp(values[i]);
}

// Logits to weights. The array has room up to a whole vector.
template <class A>
void softmax(int64_t num_pixels, int64_t num_points, A* values) {
  for (int64_t pixel = 0; pixel < num_pixels; ++pixel) {
    A* logits = values + pixel * num_points;
    A largest = logits[0];
    for (int64_t k = 1; k < num_points; ++k) largest = logits[k] > largest ? logits[k] : largest;
    for (int64_t k = 0; k < num_points; ++k) logits[k] -= largest;
  }
  exp_all(num_pixels * num_points, values);
  for (int64_t pixel = 0; pixel < num_pixels; ++pixel) {
    A* weights = values + pixel * num_points;
    A sum = 0;
    for (int64_t k = 0; k < num_points; ++k) sum += weights[k];
    for (int64_t k = 0; k < num_points; ++k) weights[k] /= sum;
  }
}

// Gradients by weights to gradients by logits.
template <class A>
void softmax_bwd(int64_t num_pixels, int64_t num_points, const A* weights, A* grads) {
  for (int64_t pixel = 0; pixel < num_pixels; ++pixel) {
    const A* weight = weights + pixel * num_points;
    A* grad = grads + pixel * num_points;
    A mean = 0;
    for (int64_t k = 0; k < num_points; ++k) mean += weight[k] * grad[k];
    for (int64_t k = 0; k < num_points; ++k) grad[k] = weight[k] * (grad[k] - mean);
  }
}

}  // namespace
}  // namespace m3i
