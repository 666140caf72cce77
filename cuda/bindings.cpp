// Every op's schema, once. Kernels are registered in <op>/cpu/op_cpu.cpp and <op>/op_cuda.cpp.
#include "m3i/host/python_module.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(m3i, library) {
  // sum: [0] without a branch; the norm is in `dtype`. A gradient that is needed by nobody, or is
  // that of x, is [0].
  library.def(
      "add_layer_norm(Tensor x, Tensor? branch, Tensor weight, Tensor bias, float eps, "
      "ScalarType dtype)"
      " -> (Tensor sum, Tensor normed, Tensor mean, Tensor rstd)");
  library.def(
      "add_layer_norm_bwd(Tensor grad_normed, Tensor? grad_sum, Tensor sum, Tensor weight, "
      "Tensor mean, Tensor rstd, bool needs_branch, bool needs_affine)"
      " -> (Tensor grad_x, Tensor grad_branch, Tensor grad_weight, Tensor grad_bias)");
  // covariance: of the targets, [0] where decorrelation_weight is 0; mean and rstd are [0] unless
  // normalise.
  library.def(
      "gaussian(Tensor z_hat, Tensor z, float sigma, bool normalise, float eps, "
      "float decorrelation_weight)"
      " -> (Tensor value, Tensor mean, Tensor rstd, Tensor covariance)");
  library.def(
      "gaussian_bwd(Tensor grad_out, Tensor z_hat, Tensor z, Tensor mean, Tensor rstd, "
      "Tensor covariance, float sigma, bool normalise, float eps, float decorrelation_weight)"
      " -> Tensor grad");
  library.def(
      "mask_mix(Tensor views, Tensor choice, Tensor members, float[] mean, float[] std, "
      "ScalarType dtype)"
      " -> Tensor");
  library.def(
      "dcnv3(Tensor x, Tensor offset, Tensor mask, int[2] kernel_size, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups, float offset_scale, bool remove_center, "
      "bool softmax)"
      " -> Tensor");
  // needs_grad: of x, offset and mask; the gradient of one that needs none is empty. deterministic:
  // the same bits at every run, which a CPU gives always.
  library.def(
      "dcnv3_bwd(Tensor grad_out, Tensor x, Tensor offset, Tensor mask, int[2] kernel_size, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, float offset_scale, "
      "bool remove_center, bool softmax, bool[3] needs_grad, bool deterministic=False)"
      " -> (Tensor grad_x, Tensor grad_offset, Tensor grad_mask)");
  // Softmax and sigmoid losses over all pairs of a row and a column; what each returns stands in
  // boltzmann/params.h. run: where it holds false, nothing is done and the results mean nothing.
  library.def(
      "boltzmann_maxima(Tensor z_hat, Tensor z, Tensor scale, Tensor bias, Tensor row_ids, "
      "Tensor? run)"
      " -> (Tensor row_max, Tensor col_max)");
  library.def(
      "boltzmann_sums(Tensor z_hat, Tensor z, Tensor scale, Tensor bias, Tensor row_ids, "
      "Tensor? col_ids, Tensor row_shift, Tensor col_shift, bool exact, bool symmetric, "
      "bool sigmoid, Tensor? run)"
      " -> (Tensor rows, Tensor cols)");
  // needs_grad: of z_hat, z and bias; the gradient of one that needs none is empty, and so are the
  // values of the softmax.
  library.def(
      "boltzmann_grads(Tensor z_hat, Tensor z, Tensor scale, Tensor bias, Tensor row_ids, "
      "Tensor? col_ids, Tensor row_shift, Tensor col_shift, Tensor exact, Tensor row_weights, "
      "Tensor col_weights, bool sigmoid, bool[3] needs_grad)"
      " -> (Tensor grad_z_hat, Tensor grad_z, Tensor grad_scale, Tensor grad_bias, "
      "Tensor values)");
  // Vectors of N and M before, between and after these: boltzmann/vectors/params.h has what each
  // takes and returns. The features' gradients of boltzmann_scale have the dtype that is given.
  library.def(
      "boltzmann_prepare(Tensor z_hat, Tensor z, Tensor? bias, Tensor? row_ids, Tensor? col_ids, "
      "int first_column, int? num_columns)"
      " -> (Tensor row_ids, Tensor col_ids, Tensor bias, Tensor extremes)");
  library.def(
      "boltzmann_shift(Tensor extremes, Tensor scale, Tensor row_ids, Tensor bias)"
      " -> (Tensor row_shift, Tensor col_shift, Tensor bound, Tensor run)");
  library.def("boltzmann_exact(Tensor rows, Tensor cols, Tensor run) -> Tensor exact");
  library.def(
      "boltzmann_exact_shift(Tensor row_max, Tensor col_max, Tensor row_shift, Tensor col_shift, "
      "Tensor exact)"
      " -> (Tensor row_shift, Tensor col_shift)");
  library.def(
      "boltzmann_totals(Tensor rows, Tensor cols, Tensor? rows_again, Tensor? cols_again, "
      "Tensor row_shift, Tensor col_shift, Tensor exact)"
      " -> Tensor totals");
  library.def(
      "boltzmann_loss(Tensor rows, Tensor cols, Tensor? rows_again, Tensor? cols_again, "
      "Tensor row_shift, Tensor col_shift, Tensor exact, Tensor totals, Tensor bound, "
      "bool symmetric, bool mean, int ranks)"
      " -> (Tensor value, Tensor share, Tensor num_rows, Tensor row_weights, Tensor col_weights)");
  library.def(
      "boltzmann_sigmoid_loss(Tensor values, Tensor extremes, Tensor bound, bool mean, int ranks)"
      " -> (Tensor value, Tensor share)");
  library.def(
      "boltzmann_scale(Tensor grad_out, Tensor? share, Tensor? scale, Tensor grad_z_hat, "
      "Tensor grad_z, Tensor grad_scale, Tensor grad_bias, ScalarType dtype)"
      " -> (Tensor factor, Tensor grad_z_hat, Tensor grad_z, Tensor grad_scale, "
      "Tensor grad_bias)");
  // The softmax over columns alone, of blocks of rows; the gradients are those of the sum of nll,
  // and come from the forward pass. needs_grad: of z_hat, z, scale and bias; a gradient that nobody
  // needs is empty. Implemented in m3i_fast/ops/boltzmann_rows.py, around torch's GEMM.
  library.def(
      "boltzmann_rows(Tensor z_hat, Tensor z, Tensor scale, Tensor? bias, Tensor? row_ids, "
      "Tensor? target_z_hat, Tensor? target_z, Tensor? target_scale, Tensor? target_bias, "
      "Tensor? row_weights, bool[4] needs_grad)"
      " -> (Tensor nll, Tensor grad_z_hat, Tensor grad_z, Tensor grad_scale, Tensor grad_bias)");
  // One block of it, in place since the block is the largest array there is (rows/params.h).
  library.def(
      "boltzmann_rows_pass(Tensor(a!) products, Tensor(b!)? target_products, int columns, "
      "Tensor scale, Tensor? bias, Tensor? target_scale, Tensor? target_bias, Tensor? row_ids, "
      "Tensor? row_weights, Tensor(c!) nll, Tensor(d!)? scale_grads, Tensor(e!)? rounded, "
      "bool writes_products)"
      " -> ()");
  // distribution: 15 numbers a view, in the order of ViewDistribution; geometry: height,
  // width, blur_kernel_size and 1 for bicubic of each view (views/params.h). The bytes of view 0's
  // [B, 3, H, W] come first, then view 1's.
  library.def(
      "draw_views(Tensor image_size, Tensor position, int seed, float[] distribution)"
      " -> Tensor params");
  library.def(
      "make_views(Tensor pixels, Tensor offset, Tensor image_size, Tensor params, int[] geometry, "
      "int num_threads)"
      " -> Tensor");
  // grids: rows and columns of patches of each view, and the patches of the same view of samples
  // before (ViewGrid); filters: blur_kernel_size and 1 for bicubic of each view; lengths: patches
  // of each view of all samples. Those of view 0 come first, then view 1's.
  library.def(
      "make_patches(Tensor pixels, Tensor offset, Tensor image_size, Tensor params, Tensor grids, "
      "int[] filters, int patch_size, int[] lengths, int num_threads)"
      " -> Tensor patches");
}

M3I_PYTHON_MODULE(_C, nullptr)
