// Bindings of the Monarch products: checks, allocation, launch.
#include "kernels/monarch/launch.h"

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <utility>

#include "binding.h"

namespace warpform {
namespace {

// ---- checks ----

// x and the tensors beside it: dtypes and devices. What a call left out is null.
void check_tensors(const char* op, const Tensor& x,
                   std::initializer_list<std::pair<const char*, const Tensor*>> others) {
  check_floating(op, "x", x);
  for (const auto& [name, t] : others) {
    if (t == nullptr) continue;
    check_dtype_of(op, name, *t, "x", x);
    check_same_device(op, name, *t, "x", x);
  }
}

const Tensor* given(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

void check_blocks(const char* op, const char* name, const Tensor& w) {
  check(w.dim() == 3 && w.size(0) > 0, op, ": ", name, " must be of shape [nblocks, out / nblocks, in / nblocks], got ",
        Shape{w});
  check(w.size(0) <= INT32_MAX && w.size(1) <= INT32_MAX && w.size(2) <= INT32_MAX, op, ": ", name,
        " must have sizes that 32 bits count, got ", Shape{w});
}

void check_rows(const char* op, const char* name, const Tensor& t, int64_t width, const char* of) {
  check(t.dim() >= 1 && t.size(-1) == width, op, ": ", name, " must be of shape [..., ", width, "] as ", of,
        " has it, got ", Shape{t});
}

void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t width) {
  if (!bias) return;
  check(bias->dim() == 1 && bias->size(0) == width, op, ": bias must be of shape [", width, "], got ", Shape{*bias});
}

// The shape of x with another number of columns.
std::vector<int64_t> with_columns(const Tensor& x, int64_t columns) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = columns;
  return sizes;
}

// Streams the sizes of with_columns().
struct ShapeWithColumns {
  const Tensor& x;
  int64_t columns;
  friend std::ostream& operator<<(std::ostream& os, const ShapeWithColumns& s) {
    os << "[";
    for (const int64_t size : s.x.sizes().first(s.x.sizes().size() - 1)) os << size << ", ";
    return os << s.columns << "]";
  }
};

// x has been checked: it has columns.
void check_gradient(const char* op, const Tensor& dout, const Tensor& x, int64_t width) {
  const auto got = dout.sizes(), sizes = x.sizes();
  check(got.size() == sizes.size() && std::equal(got.begin(), got.end() - 1, sizes.begin()) && got.back() == width, op,
        ": dout must be of shape ", ShapeWithColumns{x, width}, ", got ", Shape{dout});
  check_dtype_of(op, "dout", dout, "x", x);
  check_same_device(op, "dout", dout, "x", x);
}

// ---- what kernels read ----

// Elements between the rows of [..., columns], or nothing where the leading dimensions have no one stride.
std::optional<int64_t> one_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (!last_dimension_is_contiguous(t)) return std::nullopt;
  std::optional<int64_t> stride;
  int64_t next = 0;  // what the dimension before must have
  for (int64_t i = last - 1; i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (!stride) {
      stride = next = t.stride(i);
    } else if (t.stride(i) != next) {
      return std::nullopt;
    }
    next *= t.size(i);
  }
  return stride.value_or(0);
}

// The same where rows are 16-byte aligned, else nothing.
std::optional<int64_t> row_stride(const Tensor& t) {
  if (!is_aligned(t, 16)) return std::nullopt;
  const auto stride = one_stride(t);
  if (!stride || *stride % kMonarchAlignment != 0 || *stride < 0) return std::nullopt;
  return stride;
}

// Activations as rows. Layouts kernels cannot read are copied: transposed leading dimensions, expanded gradients.
struct Matrix {
  Tensor t;
  int64_t rows, cols, stride;

  explicit Matrix(const Tensor& from) : t(from), rows(1), cols(from.size(from.dim() - 1)), stride(0) {
    for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
    const auto given = row_stride(t);
    if (!given || (*given == 0 && rows > 1)) t = dense_copy(t);
    stride = given && (*given != 0 || rows <= 1) ? *given : cols;
  }
};

// Blocks of a weight.
struct Blocks {
  int count, rows, cols;
  explicit Blocks(const Tensor& w)
      : count(static_cast<int>(w.size(0))), rows(static_cast<int>(w.size(1))), cols(static_cast<int>(w.size(2))) {}
  int64_t in() const { return int64_t{count} * cols; }
  int64_t out() const { return int64_t{count} * rows; }
};

// Why no kernel serves blocks of these sizes, or null.
const char* no_kernel(const Launch& launch, const Tensor& x, std::initializer_list<int> block_sizes) {
  if (const char* reason = launch.unusable()) return reason;
  if (const char* reason = kHalfTypes.why_not(dtype_name(x.scalar_type()))) return reason;
  for (const int size : block_sizes) {
    if (const char* reason = kMonarchBlockSize.why_not(size)) return reason;
    if (size > 1 << 14) return "a block has more than 16384 rows or columns";
  }
  return nullptr;
}

// ---- on a CPU ----

// Why no CPU kernel takes x, or null. From `large` elements on, products of float32 blocks by themselves are torch's at
// least as fast.
const char* no_cpu_kernel(const Launch& launch, const Tensor& x, std::initializer_list<Blocks> factors = {},
                          int64_t large = INT64_MAX) {
  if (const char* reason = launch.unusable_anywhere()) return reason;
  if (const char* reason = kFloatTypes.why_not(dtype_name(x.scalar_type()))) return reason;
  if (x.scalar_type() != ScalarType::Float) return nullptr;
  for (const Blocks& blocks : factors) {
    if (int64_t{blocks.rows} * blocks.cols >= large) return "torch multiplies such large blocks at least as fast";
  }
  return nullptr;
}
constexpr int64_t kLargeBlock = 256 * 256, kLargeMonarchBlock = 512 * 512;

// One op's call of a CPU kernel. It keeps the tensors that the parameters point into.
class CpuCall {
 public:
  CpuCall(const char* op, const Launch& launch, const Tensor& x) : op_(op), launch_(launch), like_(x) {
    x_ = as_rows(x, params.x_stride);
    params.x = launch_.in(x_);
    params.rows = 1;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) params.rows *= x.size(i);
    params.dtype = element_type(x);
  }

  void weights(const Tensor& first, const std::optional<Tensor>& second = std::nullopt) {
    params.first = factor(first_ = contiguous(first));
    if (second) params.second = factor(*(second_ = contiguous(*second)));
  }
  void bias(const std::optional<Tensor>& bias) {
    bias_ = contiguous(bias);
    params.bias = launch_.in_or_null(bias_);
  }
  Tensor out(int64_t width) {
    Tensor out = make(with_columns(like_, width));
    params.out = launch_.out(out);
    return out;
  }
  // dx, and the gradients of the weights that were given.
  Tensor gradients(const Tensor& dout, std::initializer_list<Tensor*> weights) {
    dout_ = as_rows(dout, params.dout_stride);
    params.dout = launch_.in(dout_);
    cpu::BlockFactor* factors[] = {&params.first, &params.second};
    for (size_t i = 0; i < weights.size(); ++i) {
      Tensor& dw = *weights.begin()[i];
      dw = make({factors[i]->count, factors[i]->rows, factors[i]->cols});
      factors[i]->dw = launch_.out(dw);
    }
    Tensor dx = make(sizes_of(like_));
    params.dx = launch_.out(dx);
    return dx;
  }
  Tensor bias_gradient(bool has_bias, int64_t width) {
    Tensor dbias = make({has_bias ? width : 0});
    params.dbias = has_bias ? launch_.out(dbias) : nullptr;
    return dbias;
  }

  cpu::BlockProductParams params{};

 private:
  // Leading dimensions that no one stride leads through are copied.
  static Tensor as_rows(const Tensor& t, int64_t& stride) {
    const auto found = one_stride(t);
    stride = found ? *found : t.size(-1);
    return found ? t : contiguous(t);
  }
  cpu::BlockFactor factor(const Tensor& w) const {
    return {.w = launch_.in(w), .dw = nullptr, .count = w.size(0), .rows = w.size(1), .cols = w.size(2)};
  }
  Tensor make(const std::vector<int64_t>& sizes) const { return empty(op_, sizes, like_.scalar_type(), like_); }

  const char* op_;
  const Launch& launch_;
  const Tensor& like_;
  Tensor x_, dout_, first_;
  std::optional<Tensor> second_, bias_;
};

// ---- launches that several ops make ----

// One op's call: its launch, and tensors of the dtype of x.
struct Call {
  const char* op;
  const Tensor& x;
  const Launch& launch;

  Tensor make(const std::vector<int64_t>& sizes) const { return empty(op, sizes, x.scalar_type(), x); }
  Tensor make_float(const std::vector<int64_t>& sizes) const { return empty(op, sizes, ScalarType::Float, x); }

  // out = a times the block-diagonal w, or its transpose, + bias.
  void multiply(const Matrix& a, const Tensor& w, bool transposed, const std::optional<Tensor>& bias,
                const Tensor& out) const {
    const Blocks blocks(w);
    const BlockGemmParams params{.a = launch.in(a.t),
                                 .b = launch.in(w),
                                 .bias = bias ? launch.in(*bias) : nullptr,
                                 .c = launch.out(out),
                                 .rows = a.rows,
                                 .a_stride = a.stride,
                                 .groups = blocks.count,
                                 .cols = transposed ? blocks.cols : blocks.rows,
                                 .depth = transposed ? blocks.rows : blocks.cols,
                                 .b_transposed = transposed,
                                 .dtype = element_type(x)};
    launch_block_gemm(op, params, launch.stream());
  }

  // dw [groups, m, n] and, where it is not empty, dbias [groups * m] of out = x times the block-diagonal w + bias.
  void weight_gradient(const Matrix& dout, const Matrix& in, const Tensor& dw,
                       const std::optional<Tensor>& dbias) const {
    const Blocks blocks(dw);
    WeightGradientParams params{.a = launch.in(dout.t),
                                .b = launch.in(in.t),
                                .dw = launch.out(dw),
                                .dbias = dbias ? launch.out(*dbias) : nullptr,
                                .dw_partials = nullptr,
                                .dbias_partials = nullptr,
                                .rows = dout.rows,
                                .a_stride = dout.stride,
                                .b_stride = in.stride,
                                .groups = blocks.count,
                                .m = blocks.rows,
                                .n = blocks.cols,
                                .splits = 1,
                                .dtype = element_type(x)};
    params.splits = weight_gradient_splits(params);
    const int64_t splits = params.splits > 1 ? params.splits : 0;
    const Tensor dw_partials = make_float({splits, dw.numel()});
    const Tensor dbias_partials = make_float({dbias ? splits : 0, blocks.out()});
    params.dw_partials = launch.out<float>(dw_partials);
    params.dbias_partials = launch.out<float>(dbias_partials);
    launch_weight_gradient(op, params, launch.stream());
  }

  // Each row of `in`, a matrix [outer, inner], transposed.
  void transpose(const Matrix& in, int outer, int inner, const Tensor& out) const {
    launch_transpose_rows(op,
                          {.in = launch.in(in.t),
                           .out = launch.out(out),
                           .rows = in.rows,
                           .in_stride = in.stride,
                           .outer = outer,
                           .inner = inner},
                          launch.stream());
  }

  void gate(const Tensor& z, const std::optional<Tensor>& da, const Tensor& a, const std::optional<Tensor>& dz) const {
    launch_gate(op,
                {.z = launch.in(z),
                 .da = da ? launch.in(*da) : nullptr,
                 .a = launch.out(a),
                 .dz = dz ? launch.out(*dz) : nullptr,
                 .rows = a.size(0),
                 .cols = a.size(1),
                 .dtype = element_type(x)},
                launch.stream());
  }
};

// ---- blockdiag_multiply ----

void check_blockdiag(const char* op, const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  check_tensors(op, x, {{"w", &w}, {"bias", given(bias)}});
  check_blocks(op, "w", w);
  check_rows(op, "x", x, Blocks(w).in(), "w");
  check_bias(op, bias, Blocks(w).out());
}

Tensor blockdiag_multiply(Tensor x, Tensor w, std::optional<Tensor> bias) {
  constexpr const char* kOp = "blockdiag_multiply";
  check_blockdiag(kOp, x, w, bias);
  const Blocks blocks(w);
  const Launch launch(kOp, x);
  if (launch.on_cpu()) {
    if (const char* reason = no_cpu_kernel(launch, x, {blocks}, kLargeBlock)) return UseReference(reason);
    CpuCall call(kOp, launch, x);
    call.weights(w);
    call.bias(bias);
    Tensor out = call.out(blocks.out());
    launch.run_on_cpu<&cpu::Kernels::blockdiag_multiply>(call.params);
    return out;
  }
  if constexpr (!kHasKernels) return UseReference(without_kernels(x));
  if (const char* reason = no_kernel(launch, x, {blocks.rows, blocks.cols})) {
    return UseReference(reason);
  }
  const Matrix rows(x);
  w = dense(w);
  bias = dense(bias);
  const Call call{kOp, x, launch};
  Tensor out = call.make(with_columns(x, blocks.out()));
  call.multiply(rows, w, false, bias, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> blockdiag_multiply_backward(Tensor dout, Tensor x, Tensor w, bool has_bias) {
  constexpr const char* kOp = "blockdiag_multiply_backward";
  check_blockdiag(kOp, x, w, std::nullopt);
  const Blocks blocks(w);
  check_gradient(kOp, dout, x, blocks.out());
  const Launch launch(kOp, x);
  if (launch.on_cpu()) {
    if (const char* reason = no_cpu_kernel(launch, x, {blocks}, kLargeBlock)) return UseReference(reason);
    CpuCall call(kOp, launch, x);
    call.weights(w);
    Tensor dw, dx = call.gradients(dout, {&dw}), dbias = call.bias_gradient(has_bias, blocks.out());
    launch.run_on_cpu<&cpu::Kernels::blockdiag_multiply_backward>(call.params);
    return {dx, dw, dbias};
  }
  if constexpr (!kHasKernels) return UseReference(without_kernels(x));
  if (const char* reason = no_kernel(launch, x, {blocks.rows, blocks.cols})) {
    return UseReference(reason);
  }
  const Matrix drows(dout), rows(x);
  w = dense(w);
  const Call call{kOp, x, launch};
  Tensor dx = call.make(sizes_of(x)), dw = call.make(sizes_of(w));
  Tensor dbias = call.make({has_bias ? blocks.out() : 0});
  call.multiply(drows, w, true, std::nullopt, dx);
  call.weight_gradient(drows, rows, dw, has_bias ? std::optional<Tensor>(dbias) : std::nullopt);
  return {dx, dw, dbias};
}

// ---- monarch_multiply ----

void check_monarch(const char* op, const Tensor& x, const Tensor& w1, const Tensor& w2) {
  check_tensors(op, x, {{"w1", &w1}, {"w2", &w2}});
  check_blocks(op, "w1", w1);
  check_blocks(op, "w2", w2);
  const Blocks first(w1), second(w2);
  check_rows(op, "x", x, first.in(), "w1");
  check(first.out() == second.in(), op, ": w2 must take the ", first.out(), " rows that w1 ", Shape{w1}, " gives, got ",
        Shape{w2}, ", which takes ", second.in());
}

Tensor monarch_multiply(Tensor x, Tensor w1, Tensor w2) {
  constexpr const char* kOp = "monarch_multiply";
  check_monarch(kOp, x, w1, w2);
  const Blocks first(w1), second(w2);
  const Launch launch(kOp, x);
  if (launch.on_cpu()) {
    if (const char* reason = no_cpu_kernel(launch, x, {first, second}, kLargeMonarchBlock)) return UseReference(reason);
    CpuCall call(kOp, launch, x);
    call.weights(w1, w2);
    Tensor y = call.out(second.out());
    launch.run_on_cpu<&cpu::Kernels::monarch_multiply>(call.params);
    return y;
  }
  if constexpr (!kHasKernels) return UseReference(without_kernels(x));
  if (const char* reason = launch.unusable()) return UseReference(reason);
  const Matrix rows(x);
  MonarchParams params{.x = nullptr,
                       .w1 = nullptr,
                       .w2 = nullptr,
                       .y = nullptr,
                       .rows = rows.rows,
                       .x_stride = rows.stride,
                       .blocks1 = first.count,
                       .rows1 = first.rows,
                       .cols1 = first.cols,
                       .blocks2 = second.count,
                       .rows2 = second.rows,
                       .cols2 = second.cols,
                       .dtype = element_type(x)};
  // In one pass, or where the intermediate is too large for shared memory as two products with a transposition of rows
  // behind each: 2 (k p + l s) bytes a row, or that and 8 k q + 4 l s more, of which L2 saves some.
  const bool fused = second.out() % kMonarchAlignment == 0 && monarch_fits(params);
  const char* reason = fused ? no_kernel(launch, x, {first.cols, second.cols})
                             : no_kernel(launch, x, {first.rows, first.cols, second.rows, second.cols});
  if (reason != nullptr) return UseReference(reason);
  w1 = dense(w1);
  w2 = dense(w2);
  const Call call{kOp, x, launch};
  Tensor y = call.make(with_columns(x, second.out()));
  if (y.numel() == 0) return y;
  if (second.in() == 0) return zero_(y);
  if (fused) {
    params.x = launch.in(rows.t);
    params.w1 = launch.in(w1);
    params.w2 = launch.in(w2);
    params.y = launch.out(y);
    launch_monarch(params, launch.stream());
    return y;
  }
  const Tensor h = call.make({rows.rows, first.out()}), h_by_lambda = call.make({rows.rows, first.out()});
  call.multiply(rows, w1, false, std::nullopt, h);
  call.transpose(Matrix(h), second.cols, second.count, h_by_lambda);
  const Tensor y_by_lambda = call.make({rows.rows, second.out()});
  call.multiply(Matrix(h_by_lambda), w2, false, std::nullopt, y_by_lambda);
  call.transpose(Matrix(y_by_lambda), second.count, second.rows, y);
  return y;
}

// The products of the backward pass are block_gemm and weight_gradient, which want the columns of a block beside each
// other: dout, h and dh are transposed on the way, row by row. Bytes a row: 8 l s for dout, 18 k q for h and dh, 6 k p
// for x and dx; at 768 -> 3072 with 4 blocks 10 ns on an H200, beside 6.6 ns of products. Gathering columns l apart
// instead would read 32 bytes for each 2 of them.
std::tuple<Tensor, Tensor, Tensor> monarch_multiply_backward(Tensor dout, Tensor x, Tensor w1, Tensor w2) {
  constexpr const char* kOp = "monarch_multiply_backward";
  check_monarch(kOp, x, w1, w2);
  const Blocks first(w1), second(w2);
  check_gradient(kOp, dout, x, second.out());
  const Launch launch(kOp, x);
  if (launch.on_cpu()) {
    if (const char* reason = no_cpu_kernel(launch, x, {first, second}, kLargeMonarchBlock)) return UseReference(reason);
    CpuCall call(kOp, launch, x);
    call.weights(w1, w2);
    Tensor dw1, dw2, dx = call.gradients(dout, {&dw1, &dw2});
    launch.run_on_cpu<&cpu::Kernels::monarch_multiply_backward>(call.params);
    return {dx, dw1, dw2};
  }
  if constexpr (!kHasKernels) return UseReference(without_kernels(x));
  if (const char* reason = no_kernel(launch, x, {first.rows, first.cols, second.rows, second.cols})) {
    return UseReference(reason);
  }
  const Matrix drows(dout), rows(x);
  w1 = dense(w1);
  w2 = dense(w2);
  const Call call{kOp, x, launch};
  Tensor dx = call.make(sizes_of(x)), dw1 = call.make(sizes_of(w1)), dw2 = call.make(sizes_of(w2));
  const Tensor dout_by_lambda = call.make({rows.rows, second.out()});
  call.transpose(drows, second.rows, second.count, dout_by_lambda);
  // Two workspaces take turns: h and dh in the order of the first factor, and in that of the second.
  const Tensor plain = call.make({rows.rows, first.out()}), by_lambda = call.make({rows.rows, first.out()});
  call.multiply(rows, w1, false, std::nullopt, plain);
  call.transpose(Matrix(plain), second.cols, second.count, by_lambda);
  call.weight_gradient(Matrix(dout_by_lambda), Matrix(by_lambda), dw2, std::nullopt);
  call.multiply(Matrix(dout_by_lambda), w2, true, std::nullopt, by_lambda);
  call.transpose(Matrix(by_lambda), second.count, second.cols, plain);
  call.multiply(Matrix(plain), w1, true, std::nullopt, dx);
  call.weight_gradient(Matrix(plain), rows, dw1, std::nullopt);
  return {dx, dw1, dw2};
}

// ---- blockdiag_glu ----

void check_glu(const char* op, const Tensor& x, const Tensor& w_up, const Tensor& w_down,
               const std::optional<Tensor>& bias) {
  check_tensors(op, x, {{"w_up", &w_up}, {"w_down", &w_down}, {"bias", given(bias)}});
  check_blocks(op, "w_up", w_up);
  check_blocks(op, "w_down", w_down);
  const Blocks up(w_up), down(w_down);
  check_rows(op, "x", x, up.in(), "w_up");
  check(up.out() == 2 * down.in(), op, ": w_up must give twice the ", down.in(), " columns that w_down ", Shape{w_down},
        " takes, got ", Shape{w_up}, ", which gives ", up.out());
  check_bias(op, bias, down.out());
}

// By their sizes; the pointers come later.
GluParams glu_params(const Matrix& x, const Blocks& up, const Blocks& down) {
  GluParams params{};
  params.rows = x.rows;
  params.x_stride = x.stride;
  params.blocks = up.count;
  params.in = up.cols;
  params.inner = down.cols;
  params.out = down.rows;
  params.dtype = element_type(x.t);
  return params;
}

Tensor blockdiag_glu(Tensor x, Tensor w_up, Tensor w_down, std::optional<Tensor> bias) {
  constexpr const char* kOp = "blockdiag_glu";
  check_glu(kOp, x, w_up, w_down, bias);
  const Blocks up(w_up), down(w_down);
  const Launch launch(kOp, x);
  if (launch.on_cpu()) {
    if (const char* reason = no_cpu_kernel(launch, x)) return UseReference(reason);
    CpuCall call(kOp, launch, x);
    call.weights(w_up, w_down);
    call.bias(bias);
    Tensor out = call.out(down.out());
    launch.run_on_cpu<&cpu::Kernels::blockdiag_glu>(call.params);
    return out;
  }
  if constexpr (!kHasKernels) return UseReference(without_kernels(x));
  if (const char* reason = no_kernel(launch, x, {up.rows, up.cols, down.rows, down.cols})) {
    return UseReference(reason);
  }
  const Matrix rows(x);
  w_up = dense(w_up);
  w_down = dense(w_down);
  bias = dense(bias);
  const Call call{kOp, x, launch};
  Tensor out = call.make(with_columns(x, down.out()));
  GluParams params = glu_params(rows, up, down);
  params.bias = bias ? launch.in(*bias) : nullptr;
  params.y = launch.out(out);
  if (up.count == down.count && glu_fits(params)) {
    params.x = launch.in(rows.t);
    params.w_up = launch.in(w_up);
    params.w_down = launch.in(w_down);
    launch_glu(params, launch.stream());
    return out;
  }
  // Blocks that are too large, or of two counts: the wide activations go through memory.
  const Tensor z = call.make({rows.rows, up.out()}), a = call.make({rows.rows, down.in()});
  call.multiply(rows, w_up, false, std::nullopt, z);
  call.gate(z, std::nullopt, a, std::nullopt);
  call.multiply(Matrix(a), w_down, false, bias, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> blockdiag_glu_backward(Tensor dout, Tensor x, Tensor w_up, Tensor w_down,
                                                                  bool has_bias) {
  constexpr const char* kOp = "blockdiag_glu_backward";
  check_glu(kOp, x, w_up, w_down, std::nullopt);
  const Blocks up(w_up), down(w_down);
  check_gradient(kOp, dout, x, down.out());
  const Launch launch(kOp, x);
  if (launch.on_cpu()) {
    if (const char* reason = no_cpu_kernel(launch, x)) return UseReference(reason);
    CpuCall call(kOp, launch, x);
    call.weights(w_up, w_down);
    Tensor dw_up, dw_down, dx = call.gradients(dout, {&dw_up, &dw_down});
    Tensor dbias = call.bias_gradient(has_bias, down.out());
    launch.run_on_cpu<&cpu::Kernels::blockdiag_glu_backward>(call.params);
    return {dx, dw_up, dw_down, dbias};
  }
  if constexpr (!kHasKernels) return UseReference(without_kernels(x));
  if (const char* reason = no_kernel(launch, x, {up.rows, up.cols, down.rows, down.cols})) {
    return UseReference(reason);
  }
  const Matrix drows(dout), rows(x);
  w_up = dense(w_up);
  w_down = dense(w_down);
  const Call call{kOp, x, launch};
  Tensor dx = call.make(sizes_of(x)), dw_up = call.make(sizes_of(w_up)), dw_down = call.make(sizes_of(w_down));
  Tensor dbias = call.make({has_bias ? down.out() : 0});
  const Tensor a = call.make({rows.rows, down.in()}), dz = call.make({rows.rows, up.out()});
  GluParams params = glu_params(rows, up, down);
  if (up.count == down.count && glu_gradient_fits(params)) {
    params.x = launch.in(rows.t);
    params.dout = launch.in(drows.t);
    params.dout_stride = drows.stride;
    params.w_up = launch.in(w_up);
    params.w_down = launch.in(w_down);
    params.a = launch.out(a);
    params.dz = launch.out(dz);
    launch_glu_gradient(params, launch.stream());
  } else {
    const Tensor z = call.make({rows.rows, up.out()}), da = call.make({rows.rows, down.in()});
    call.multiply(rows, w_up, false, std::nullopt, z);
    call.multiply(drows, w_down, true, std::nullopt, da);
    call.gate(z, da, a, dz);
  }
  call.weight_gradient(drows, Matrix(a), dw_down, has_bias ? std::optional<Tensor>(dbias) : std::nullopt);
  call.multiply(Matrix(dz), w_up, true, std::nullopt, dx);
  call.weight_gradient(Matrix(dz), rows, dw_up, std::nullopt);
  return {dx, dw_up, dw_down, dbias};
}

}  // namespace

std::span<const Body> monarch_ops() {
  static constexpr Body kOps[] = {body<"blockdiag_multiply", &blockdiag_multiply>(),
                                  body<"blockdiag_multiply_backward", &blockdiag_multiply_backward>(),
                                  body<"monarch_multiply", &monarch_multiply>(),
                                  body<"monarch_multiply_backward", &monarch_multiply_backward>(),
                                  body<"blockdiag_glu", &blockdiag_glu>(),
                                  body<"blockdiag_glu_backward", &blockdiag_glu_backward>()};
  return kOps;
}

}  // namespace warpform
