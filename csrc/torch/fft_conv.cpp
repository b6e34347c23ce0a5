// Bindings of the long convolution: checks, allocation, launch.
#include "kernels/fft_conv/launch.h"

#include <optional>

#include "binding.h"

namespace warpform {
namespace {

// The arguments that forward and backward share, in the schema's order.
struct Arguments {
  Tensor u, spectrum;
  std::optional<Tensor> skip, pregate, postgate;
};

void check_gate(const char* op, const char* name, const std::optional<Tensor>& gate, const Tensor& u) {
  if (!gate) return;
  check(same_sizes(*gate, u), op, ": ", name, " must be of shape ", Shape{u}, ", got ", Got{*gate});
  check_dtype_of(op, name, *gate, "u", u);
  check_same_device(op, name, *gate, "u", u);
}

void check_arguments(const char* op, const Arguments& a) {
  const Tensor& u = a.u;
  check_floating(op, "u", u);
  check(u.dim() == 3, op, ": u must be of shape [batch, channels, seqlen], got ", Got{u});
  const int64_t channels = u.size(1), length = u.size(2);
  if (a.skip) {
    const Tensor& skip = *a.skip;
    check(skip.dim() == 1 && skip.size(0) == channels, op, ": skip must be of shape [", channels, "], got ", Got{skip});
    check_type(skip.scalar_type() == u.scalar_type() || skip.scalar_type() == ScalarType::Float, op, ": skip must be ",
               dtype_name(u.scalar_type()), " as u is, or float32, got ", Got{skip});
    check_same_device(op, "skip", skip, "u", u);
  }
  check_gate(op, "pregate", a.pregate, u);
  check_gate(op, "postgate", a.postgate, u);
  const Tensor& spectrum = a.spectrum;
  check(spectrum.dim() == 3 && spectrum.size(0) == channels && spectrum.size(2) == 2 && spectrum.size(1) >= 2, op,
        ": spectrum must be of shape [", channels, ", n / 2 + 1, 2], n at least 2, got ", Shape{spectrum});
  const int64_t points = 2 * (spectrum.size(1) - 1);
  check(points >= length, op, ": spectrum must be of at least the ", length, " points that u has, got ", points);
  const ScalarType wide = u.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_type(spectrum.scalar_type() == wide, op, ": spectrum must be torch.", dtype_name(wide), " where u is torch.",
             dtype_name(u.scalar_type()), ", got torch.", dtype_name(spectrum.scalar_type()));
  check_same_device(op, "spectrum", spectrum, "u", u);
}

// Why no kernel serves the call, or null.
const char* no_kernel(const Launch& launch, const Arguments& a) {
  if (const char* reason = launch.unusable()) return reason;
  if (const char* reason = kHalfTypes.why_not(dtype_name(a.u.scalar_type()))) return reason;
  if (const char* reason = fft_conv_unsupported(a.u.size(2), a.u.size(0), a.u.size(1))) return reason;
  if (a.spectrum.size(1) != fft_conv_points(static_cast<int>(a.u.size(2))) + 1) {
    return "the spectrum is not of twice the points that the kernels pad sequences to, a power of two from 256 on";
  }
  return nullptr;
}

void make_dense(Arguments& a) {
  a.u = dense(a.u);
  a.spectrum = dense(a.spectrum);
  a.skip = dense(a.skip);
  a.pregate = dense(a.pregate);
  a.postgate = dense(a.postgate);
}

FftConvProblem problem(const Arguments& a) {
  FftConvProblem p{.bfloat16 = a.u.scalar_type() == ScalarType::BFloat16,
                   .batch = static_cast<int>(a.u.size(0)),
                   .channels = static_cast<int>(a.u.size(1)),
                   .length = static_cast<int>(a.u.size(2)),
                   .points = fft_conv_points(static_cast<int>(a.u.size(2))),
                   .shares = 0};
  p.shares = a.u.numel() > 0 ? fft_conv_shares(p) : 0;
  return p;
}

Tensor workspace(const char* op, int64_t elements, ScalarType dtype, const Tensor& like) {
  return empty(op, {elements}, dtype, like);
}

// Shared by the convolutions of one call: the spectrum as the kernels read it.
struct Prepared {
  FftConvProblem problem;
  Tensor bins, factors, tables, half_sums;

  Prepared(const char* op, const Launch& launch, const Arguments& a)
      : problem(warpform::problem(a)),
        bins(workspace(op, int64_t{2} * problem.points * problem.channels, ScalarType::Int, a.u)),
        factors(workspace(op, problem.channels, ScalarType::Float, a.u)),
        tables(workspace(op, fft_plan(problem.points).table_bytes, ScalarType::Byte, a.u)),
        half_sums(workspace(op, fft_conv_half_sum_bytes(problem), ScalarType::Byte, a.u)) {
    launch_fft_conv_spectrum({.spectrum = launch.in<float>(a.spectrum),
                              .bins = launch.out<uint32_t>(bins),
                              .factors = launch.out<float>(factors),
                              .tables = launch.out(tables),
                              .channels = problem.channels,
                              .points = problem.points},
                             launch.stream());
  }

  FftConvParams params(const Launch& launch, const Arguments& a) const {
    FftConvParams p{};
    p.problem = problem;
    p.skip = launch.in_or_null(a.skip);
    p.skip_is_float = a.skip && a.skip->scalar_type() == ScalarType::Float;
    p.bins = launch.in<uint32_t>(bins);
    p.factors = launch.in<float>(factors);
    p.tables = launch.in(tables);
    p.half_sums = launch.out(half_sums);
    return p;
  }
};

Tensor spectral_conv(Tensor u, Tensor spectrum, std::optional<Tensor> skip, std::optional<Tensor> pregate,
                     std::optional<Tensor> postgate) {
  constexpr const char* kOp = "spectral_conv";
  Arguments a{u, spectrum, skip, pregate, postgate};
  check_arguments(kOp, a);
  if constexpr (!kHasKernels) return UseReference(without_kernels(u));
  const Launch launch(kOp, u);
  if (const char* reason = no_kernel(launch, a)) {
    return UseReference(reason);
  }
  const Tensor out = empty(kOp, sizes_of(u), u.scalar_type(), u);
  if (u.numel() == 0) return out;
  make_dense(a);
  const Prepared prepared(kOp, launch, a);
  FftConvParams params = prepared.params(launch, a);
  params.u = launch.in(a.u);
  params.gate = launch.in_or_null(a.pregate);
  params.out_gate = launch.in_or_null(a.postgate);
  params.out = launch.out(out);
  launch_fft_conv(kOp, params, launch.stream());
  return out;
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

BackwardResult spectral_conv_backward(Tensor dout, Tensor u, Tensor spectrum, std::optional<Tensor> skip,
                                      std::optional<Tensor> pregate, std::optional<Tensor> postgate) {
  constexpr const char* kOp = "spectral_conv_backward";
  Arguments a{u, spectrum, skip, pregate, postgate};
  check_arguments(kOp, a);
  check(same_sizes(dout, u), kOp, ": dout must be of shape ", Shape{u}, " as u is, got ", Shape{dout});
  check_dtype_of(kOp, "dout", dout, "u", u);
  check_same_device(kOp, "dout", dout, "u", u);
  if constexpr (!kHasKernels) return UseReference(without_kernels(u));
  const Launch launch(kOp, u);
  if (const char* reason = no_kernel(launch, a)) {
    return UseReference(reason);
  }
  const auto like = [&](const std::optional<Tensor>& t) {
    return t ? empty(kOp, sizes_of(*t), t->scalar_type(), *t) : empty(kOp, {0}, u.scalar_type(), u);
  };
  BackwardResult result{like(u), like(spectrum), like(skip), like(pregate), like(postgate)};
  const auto& [du, dspectrum, dskip, dpregate, dpostgate] = result;
  if (u.numel() == 0) {
    // Sums over nothing.
    for (const Tensor& t : {dspectrum, dskip}) {
      if (t.numel() > 0) zero_(const_cast<Tensor&>(t));
    }
    return result;
  }
  make_dense(a);
  dout = dense(dout);
  const Prepared prepared(kOp, launch, a);
  const FftConvProblem& p = prepared.problem;
  const int64_t ctas = int64_t{p.shares} * p.channels;

  // dv = correlation of d, + skip d; du and dpregate are dv times the other.
  const Tensor dot = workspace(kOp, a.skip ? ctas : 0, ScalarType::Float, u);
  FftConvParams correlation = prepared.params(launch, a);
  correlation.u = launch.in(dout);
  correlation.gate = launch.in_or_null(a.postgate);
  correlation.correlate = true;
  correlation.out_gate = launch.in_or_null(a.pregate);
  correlation.out = launch.out(du);
  if (a.pregate || a.skip) correlation.second_gate = launch.in(a.u);
  if (a.pregate) correlation.second_out = launch.out(dpregate);
  if (a.skip) correlation.dot = launch.out<float>(dot);
  launch_fft_conv(kOp, correlation, launch.stream());
  if (a.skip) {
    const DType dtype = correlation.skip_is_float ? DType::kFloat32 : p.bfloat16 ? DType::kBFloat16 : DType::kFloat16;
    launch_fft_conv_dot_sum(kOp, p, correlation.dot, launch.out(dskip), dtype, launch.stream());
  }

  // dpostgate = dout (conv(v) + skip v): the forward with another gate.
  if (a.postgate) {
    FftConvParams convolution = prepared.params(launch, a);
    convolution.u = launch.in(a.u);
    convolution.gate = launch.in_or_null(a.pregate);
    convolution.out_gate = launch.in(dout);
    convolution.out = launch.out(dpostgate);
    launch_fft_conv(kOp, convolution, launch.stream());
  }

  const Tensor transforms = workspace(kOp, ctas * fft_plan(p.points).slots * 2 * p.points, ScalarType::Int, u);
  const Tensor products = workspace(kOp, ctas * 4 * p.points, ScalarType::Float, u);
  launch_fft_conv_gradient(kOp,
                           {.problem = p,
                            .u = launch.in(a.u),
                            .gate = launch.in_or_null(a.pregate),
                            .dout = launch.in(dout),
                            .dout_gate = launch.in_or_null(a.postgate),
                            .tables = launch.in(prepared.tables),
                            .transforms = launch.out<uint32_t>(transforms),
                            .products = launch.out<float>(products),
                            .dspectrum = launch.out<float>(dspectrum)},
                           launch.stream());
  return result;
}

}  // namespace

std::span<const Body> fft_conv_ops() {
  static constexpr Body kOps[] = {body<"spectral_conv", &spectral_conv>(),
                                  body<"spectral_conv_backward", &spectral_conv_backward>()};
  return kOps;
}

}  // namespace warpform
