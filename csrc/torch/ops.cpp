// Every op of warpform, one sentence each: the index of the API. Shapes, dtypes and formulas are in the docstrings of
// python/warpform/ops. Each op has a reference in PyTorch (python/warpform/ops/reference), registered from Python;
// where a call has no kernel, NAME_reference runs, whose first argument says why.
#include <torch/csrc/stable/library.h>

#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "binding.h"
#include "build_info.h"
#include "plan.h"
#include "wgmma_product.h"

namespace warpform {
namespace {

struct Schema {
  std::string name;
  std::string arguments;
  std::string results;

  std::string text(const char* suffix = "", const char* first = "") const {
    return name + suffix + "(" + first + arguments + ") -> " + results;
  }
};

// Everything that says which key a query may see; the same in attention forward and backward.
const std::string kAttentionSequences =
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, *, float? softmax_scale=None, "
    "bool causal=False, SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0.0, "
    "Tensor? alibi_slopes=None, bool deterministic=False";

// The rule of relative positions of two tokens, and of a score of three terms; the same in forward and backward.
const std::string kDisentangledSequences =
    "Tensor cu_seqlens, SymInt max_seqlen, *, Tensor? positions=None, float? softmax_scale=None, "
    "SymInt position_buckets=0, SymInt max_relative_positions=512";

// Everything that says which pairs of tokens meet, and with which bias; the same in window attention forward and
// backward.
const std::string kWindows = "SymInt[] window_size, SymInt[] shift_size, *, float? scale=None, float mask_value=-100.0";

// A routing plan: which groups of hidden dimensions each token uses, and the order that sorts tokens by them.
const std::string kRouting =
    "Tensor group_mask, Tensor perm, Tensor inverse, Tensor tile_mask, Tensor tile_class, Tensor? out_mask, SymInt "
    "num_groups, SymInt num_classes";

// Positions of a block of queries and of a block of keys in the whole sequence, and the mask by positions; the same in a
// step of attention forward and backward.
const std::string kPositions =
    "*, float? softmax_scale=None, bool causal=False, SymInt window_size_left=-1, SymInt window_size_right=-1, "
    "SymInt q_offset=0, SymInt k_offset=0, SymInt q_stride=1, SymInt k_stride=1, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None";

std::vector<Schema> schemas() {
  return {
      // ---- padding-free encoder ----

      // Places of the tokens of a [batch, seqlen] mask when padding is dropped: offsets, positions and their inverse.
      {"packing_plan", "Tensor mask, SymInt capacity",
       "(Tensor cu_seqlens, Tensor lengths, Tensor indices, Tensor position_ids, Tensor ranks, Tensor summary)"},
      // Gathers the rows of tokens, [batch, seqlen, ...] -> [total, ...].
      {"pack", "Tensor x, Tensor indices, Tensor ranks", "Tensor"},
      // Puts packed rows back, [total, ...] -> [batch, seqlen, ...], zeros where masked.
      {"unpack", "Tensor t, Tensor indices, Tensor ranks", "Tensor"},

      // Softmax attention over sequences of any lengths laid end to end; returns the output and the log-sum-exp of each
      // row.
      {"varlen_attention", "Tensor q, Tensor k, Tensor v, " + kAttentionSequences, "(Tensor out, Tensor lse)"},
      // Gradients of q, k and v, from those of out and (optionally) lse.
      {"varlen_attention_backward",
       "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, " + kAttentionSequences,
       "(Tensor dq, Tensor dk, Tensor dv)"},

      // Self-attention over packed sequences whose scores add content-to-position and position-to-content terms (DeBERTa);
      // returns the output and the log-sum-exp of each row.
      {"disentangled_attention",
       "Tensor q, Tensor k, Tensor v, Tensor? pos_key, Tensor? pos_query, " + kDisentangledSequences,
       "(Tensor out, Tensor lse)"},
      // dpos_key and dpos_query are empty where the projection is None.
      {"disentangled_attention_backward",
       "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? pos_key, Tensor? pos_query, Tensor out, Tensor lse, " +
           kDisentangledSequences,
       "(Tensor dq, Tensor dk, Tensor dv, Tensor dpos_key, Tensor dpos_query)"},

      // LayerNorm(x + bias + residual); also the sum (empty unless return_sum), mean and 1/std of each row.
      {"add_bias_residual_layer_norm",
       "Tensor x, Tensor? bias, Tensor? residual, Tensor weight, Tensor ln_bias, float eps=1e-5, *, bool "
       "return_sum=False",
       "(Tensor out, Tensor sum, Tensor mean, Tensor rstd)"},
      // dx is the gradient of x and of residual; dbias, dweight and dln_bias are sums over rows in a fixed order.
      {"add_bias_residual_layer_norm_backward",
       "Tensor dout, Tensor? dsum, Tensor sum, Tensor weight, Tensor mean, Tensor rstd",
       "(Tensor dx, Tensor dbias, Tensor dweight, Tensor dln_bias)"},

      // RMSNorm(x + residual); also the sum (empty unless return_sum) and 1/sqrt(mean square) of each row.
      {"add_residual_rms_norm", "Tensor x, Tensor? residual, Tensor weight, float eps=1e-6, *, bool return_sum=False",
       "(Tensor out, Tensor sum, Tensor rstd)"},
      // dx is the gradient of x and of residual; dweight is a sum over rows in a fixed order.
      {"add_residual_rms_norm_backward", "Tensor dout, Tensor? dsum, Tensor sum, Tensor weight, Tensor rstd",
       "(Tensor dx, Tensor dweight)"},

      // GELU of rows brought to the length `scale` (None: the root of the width), approximate "none" (erf) or "tanh".
      {"rms_norm_gelu", "Tensor x, float? scale=None, float eps=0.0, str approximate=\"none\"", "Tensor"},
      // Makes the lengths of the rows again.
      {"rms_norm_gelu_backward", "Tensor dout, Tensor x, float? scale=None, float eps=0.0, str approximate=\"none\"",
       "Tensor"},

      // GELU(x + bias), approximate "none" (erf) or "tanh".
      {"bias_gelu", "Tensor x, Tensor? bias, str approximate=\"none\"", "Tensor"},
      // dbias is empty without a bias.
      {"bias_gelu_backward", "Tensor dout, Tensor x, Tensor? bias, str approximate=\"none\"",
       "(Tensor dx, Tensor dbias)"},

      // ---- window attention ----

      // Attention inside the (shifted) windows of a grid of tokens, straight from qkv [batch, (depth,) height, width, 3,
      // heads, head_dim]; with logit_scale, cosine attention. Returns the output and, for windows of more than 64 tokens,
      // the log-sum-exp of each row.
      {"window_attention",
       "Tensor qkv, Tensor? relative_position_bias_table, Tensor? logit_scale, Tensor? qkv_bias, " + kWindows,
       "(Tensor out, Tensor lse)"},
      // Gradients of the four tensors; empty for those that are None. Those of the table, the logit scale and the bias are
      // sums over windows in a fixed order.
      {"window_attention_backward",
       "Tensor dout, Tensor qkv, Tensor? relative_position_bias_table, Tensor? logit_scale, Tensor? qkv_bias, "
       "Tensor out, Tensor lse, " +
           kWindows,
       "(Tensor dqkv, Tensor dtable, Tensor dlogit_scale, Tensor dqkv_bias)"},

      // ---- Monarch ----

      // Product with a block-diagonal matrix, w [nblocks, out / nblocks, in / nblocks]; x may be strided in its leading
      // dimensions.
      {"blockdiag_multiply", "Tensor x, Tensor w, Tensor? bias=None", "Tensor"},
      // dbias is empty without a bias.
      {"blockdiag_multiply_backward", "Tensor dout, Tensor x, Tensor w, bool has_bias",
       "(Tensor dx, Tensor dw, Tensor dbias)"},
      // Product with a Monarch matrix: two block-diagonal factors with a permutation before and after the second.
      {"monarch_multiply", "Tensor x, Tensor w1, Tensor w2", "Tensor"},
      // Recomputes what lies between the factors.
      {"monarch_multiply_backward", "Tensor dout, Tensor x, Tensor w1, Tensor w2",
       "(Tensor dx, Tensor dw1, Tensor dw2)"},
      // Monarch Mixer's MLP: block-diagonal to twice the width, GELU of one half times the other, block-diagonal back.
      {"blockdiag_glu", "Tensor x, Tensor w_up, Tensor w_down, Tensor? bias=None", "Tensor"},
      // Recomputes the wide activations; dbias is empty without a bias.
      {"blockdiag_glu_backward", "Tensor dout, Tensor x, Tensor w_up, Tensor w_down, bool has_bias",
       "(Tensor dx, Tensor dw_up, Tensor dw_down, Tensor dbias)"},

      // ---- long convolutions ----

      // postgate * (conv(pregate * u) + skip * pregate * u), the filter given by its spectrum, float32 [channels, n / 2 +
      // 1, 2], the real FFT of n points. `fft_conv`, which takes taps, is made of it.
      {"spectral_conv", "Tensor u, Tensor spectrum, Tensor? skip=None, Tensor? pregate=None, Tensor? postgate=None",
       "Tensor"},
      // Empty for those that are None.
      {"spectral_conv_backward",
       "Tensor dout, Tensor u, Tensor spectrum, Tensor? skip, Tensor? pregate, Tensor? postgate",
       "(Tensor du, Tensor dspectrum, Tensor dskip, Tensor dpregate, Tensor dpostgate)"},
      // A projection [batch, seqlen, 3 channels] becomes the convolution's operands [batch, channels, seqlen]: a short
      // causal depthwise convolution, then the third part gated by the first, and the second.
      {"short_conv_gate", "Tensor x, Tensor weight, Tensor? bias=None", "(Tensor gated, Tensor gate)"},
      // dbias is empty without a bias.
      {"short_conv_gate_backward", "Tensor dgated, Tensor dgate, Tensor x, Tensor weight, Tensor? bias",
       "(Tensor dx, Tensor dweight, Tensor dbias)"},

      // ---- stencils on grids of tokens, channels last ----

      // x + scale (P n - n) with n = GroupNorm(1 group)(x) and P the mean over the neighbours of a square of pool_size that
      // exist, x [batch, height, width, channels]; also mean and 1/std of each sample.
      {"pool_mixer", "Tensor x, Tensor weight, Tensor? scale=None, *, SymInt pool_size=3, float eps=1e-5",
       "(Tensor out, Tensor mean, Tensor rstd)"},
      // dweight and dscale are sums over positions in a fixed order; dscale is empty without a scale.
      {"pool_mixer_backward",
       "Tensor dout, Tensor x, Tensor weight, Tensor? scale, Tensor mean, Tensor rstd, *, SymInt pool_size=3",
       "(Tensor dx, Tensor dweight, Tensor dscale)"},
      // Depthwise convolution of x [batch, height, width, channels] with weight [channels, k, k], zero padding and stride 1,
      // then the activation: "linear", "gelu" (erf) or "relu".
      {"depthwise_conv2d", "Tensor x, Tensor weight, Tensor? bias=None, *, str activation=\"linear\"", "Tensor"},
      // Makes the convolution again; dweight and dbias are sums over positions in a fixed order, dbias is empty without a
      // bias.
      {"depthwise_conv2d_backward",
       "Tensor dout, Tensor x, Tensor weight, Tensor? bias, *, str activation=\"linear\"",
       "(Tensor dx, Tensor dweight, Tensor dbias)"},

      // ---- hidden routing ----

      // The groups that each token uses, as bits of an int64: the first num_shared, and those that idx [tokens, k] names.
      {"routing_mask", "Tensor idx, SymInt num_groups, SymInt num_shared", "Tensor"},
      // Tokens sorted by class and group mask, cut into tiles of one class; of each tile the union of its masks.
      {"routing_plan", "Tensor group_mask, Tensor? token_class, SymInt num_groups, SymInt num_classes, SymInt tile",
       "(Tensor perm, Tensor inverse, Tensor tile_mask, Tensor tile_class)"},
      // The sum over a token's groups of gate times weight times its part of x, plus bias.
      {"hidden_gather_linear", "Tensor x, Tensor w, Tensor? gates, Tensor? bias, " + kRouting, "Tensor"},
      // dgates is empty without gates.
      {"hidden_gather_linear_backward", "Tensor dout, Tensor x, Tensor w, Tensor? gates, " + kRouting,
       "(Tensor dx, Tensor dgates)"},
      // A token's groups of the output alone, gate times (weight times x plus bias), 0 elsewhere; with keep_ungated also
      // without the gates, for their gradient, else that is empty.
      {"hidden_scatter_linear", "Tensor x, Tensor w, Tensor? gates, Tensor? bias, bool keep_ungated, " + kRouting,
       "(Tensor out, Tensor ungated)"},
      // dgates is empty where ungated is None.
      {"hidden_scatter_linear_backward", "Tensor dout, Tensor? ungated, Tensor w, Tensor? gates, " + kRouting,
       "(Tensor dx, Tensor dgates)"},
      // Gradient of the weight of either, float32, summed over tokens in a fixed order; routed_out is of the second.
      {"hidden_weight_grad", "Tensor x, Tensor dy, Tensor? gates, bool routed_out, " + kRouting, "Tensor"},

      // ---- ring attention ----

      // A block of queries against a block of keys; the softmax over the blocks before comes in as (out, lse), float32, and
      // leaves with this one added.
      {"attention_step", "Tensor q, Tensor k, Tensor v, Tensor? out=None, Tensor? lse=None, " + kPositions,
       "(Tensor out, Tensor lse)"},
      // Adds the gradients that pass through this block, from lse and delta = rowsum(dout * out) of the whole sequence, to
      // float32 dq, dk and dv.
      {"attention_step_backward",
       "Tensor dout, Tensor delta, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor? dq=None, Tensor? dk=None, "
       "Tensor? dv=None, " +
           kPositions + ", bool deterministic=False",
       "(Tensor dq, Tensor dk, Tensor dv)"},
  };
}

// ---- the ops with their schemas ----

struct Op {
  Schema schema;
  Body body;
};

// They live as long as the process: torch and the table keep pointers into them.
const std::vector<Op>& ops() {
  static const std::vector<Op>* all = [] {
    std::map<std::string, Body> bodies;
    for (const auto& family :
         {attention_ops(), attention_step_ops(), disentangled_attention_ops(), packing_ops(), norm_ops(),
          activation_ops(), window_ops(), monarch_ops(), fft_conv_ops(), short_conv_ops(), spatial_ops(), routing_ops()}) {
      for (const Body& body : family) bodies.emplace(body.name, body);
    }
    auto* made = new std::vector<Op>;
    for (Schema& schema : schemas()) {
      const Body body = bodies.at(schema.name);
      made->push_back({std::move(schema), body});
    }
    return made;
  }();
  return *all;
}

void keep_error(std::string type, std::string text) {
  const api::Status status = type == "TypeError"    ? api::kTypeError
                             : type == "ValueError" ? api::kValueError
                                                    : api::kRuntimeError;
  kept_error() = {status, std::move(text)};
}

// The kind and the text of what was wrong with the last call in this thread, with a space between: torch has one
// exception for all kinds. Empty where nothing was.
std::string last_error() {
  const Outcome& outcome = last_outcome();
  switch (outcome.status) {
    case api::kTypeError: return "TypeError " + outcome.message;
    case api::kValueError: return "ValueError " + outcome.message;
    case api::kRuntimeError: return "RuntimeError " + outcome.message;
    default: return "";
  }
}

std::string cpu_kernels_missing() {
  if constexpr (kHasCpuKernels) {
    const char* reason = cpu::kernels_missing();
    return reason ? reason : "";
  } else {
    return "the emulator's library has no CPU kernels";
  }
}
std::string cpu_isa() {
  if constexpr (kHasCpuKernels) {
    const cpu::Kernels* kernels = cpu::kernels();
    return kernels ? kernels->isa : "";
  } else {
    return "";
  }
}

#ifdef WARPFORM_SIMT
constexpr uint32_t kDevicesOfKernels = 1u << api::TensorView::kCpu;
constexpr bool kHasPlans = false;
#else
constexpr uint32_t kDevicesOfKernels = 1u << api::TensorView::kCpu | 1u << api::TensorView::kCuda;
constexpr bool kHasPlans = true;
#endif

const api::Table& table() {
  static const api::Table* made = [] {
    static std::vector<api::Op> rows;
    for (const Op& op : ops()) {
      rows.push_back({op.schema.name.c_str(), op.schema.arguments.c_str(), op.body.results, op.body.call});
    }
    static const std::string facts = build_info(), kernels = kernel_table(), cpu_kernels = cpu_kernel_table();
    return new api::Table{
        .version = api::kVersion,
        .device_types = kDevicesOfKernels,
        .op_count = static_cast<int32_t>(rows.size()),
        .ops = rows.data(),
        .free_result =
            [](void* handle) {
              static_cast<void>(aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(handle)));
            },
        .message = [] { return last_outcome().message.c_str(); },
        .build_info = [] { return facts.c_str(); },
        .kernel_table = [] { return kernels.c_str(); },
        .cpu_kernel_table = [] { return cpu_kernels.c_str(); },
        .supported = supported,
        .begin_plan = kHasPlans ? begin_plan : nullptr,
        .end_plan = kHasPlans ? end_plan : nullptr};
  }();
  return *made;
}

}  // namespace
}  // namespace warpform

STABLE_TORCH_LIBRARY(WARPFORM_NAMESPACE, m) {
  for (const warpform::Op& op : warpform::ops()) {
    m.def(op.schema.text().c_str());
#ifndef WARPFORM_SIMT
    m.def(op.schema.text("_reference", "str reason, ").c_str());
#endif
  }
  // The versions and architectures that this binary was built with, as JSON.
  m.def("_build_info() -> str");
  // Every configuration that has a CUDA kernel, as a JSON list.
  m.def("_kernel_table() -> str");
  // The same of the kernels for the CPU of this process.
  m.def("_cpu_kernel_table() -> str");
  // Why CPU kernels do not run in this process, or nothing; and the instruction set of those that do, or nothing.
  m.def("_cpu_kernels_missing() -> str");
  m.def("_cpu_isa() -> str");
  // Why calls on a GPU take none of the kernels for compute capability 9.0, or nothing; of the current one if negative.
  m.def("_hopper_kernels_missing(int device) -> str");
  // Keeps the type and the text of an exception for the binding that called the reference (binding.h).
  m.def("_keep_error(str type, str text) -> ()");
  // What was wrong with the last call in this thread: the name of Python's exception, a space and the text, or nothing.
  m.def("_last_error() -> str");
  // float32 [64, 64], the product of two 16-bit tiles by wgmma, in the layout of operands that has this name: a test of
  // the hardware of compute capability 9.0, without a reference.
  m.def("_wgmma_product(Tensor a, Tensor b, str layout) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(WARPFORM_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("_build_info", TORCH_BOX(&warpform::build_info));
  m.impl("_kernel_table", TORCH_BOX(&warpform::kernel_table));
  m.impl("_cpu_kernel_table", TORCH_BOX(&warpform::cpu_kernel_table));
  m.impl("_cpu_kernels_missing", TORCH_BOX(&warpform::cpu_kernels_missing));
  m.impl("_cpu_isa", TORCH_BOX(&warpform::cpu_isa));
  m.impl("_hopper_kernels_missing", TORCH_BOX(&warpform::hopper_kernels_missing));
  m.impl("_keep_error", TORCH_BOX(&warpform::keep_error));
  m.impl("_last_error", TORCH_BOX(&warpform::last_error));
  m.impl("_wgmma_product", TORCH_BOX(&warpform::wgmma_product));
}

// On a CPU the same functions check the arguments, and then run a CPU kernel or the reference; in the emulator, the CUDA
// kernels.
STABLE_TORCH_LIBRARY_IMPL(WARPFORM_NAMESPACE, CPU, m) {
  for (const warpform::Op& op : warpform::ops()) m.impl(op.schema.name.c_str(), op.body.boxed);
}

#ifndef WARPFORM_SIMT
STABLE_TORCH_LIBRARY_IMPL(WARPFORM_NAMESPACE, CUDA, m) {
  for (const warpform::Op& op : warpform::ops()) m.impl(op.schema.name.c_str(), op.body.boxed);
}
#endif

extern "C" __attribute__((visibility("default"))) const warpform::api::Table* warpform_api_v3() {
  return &warpform::table();
}
