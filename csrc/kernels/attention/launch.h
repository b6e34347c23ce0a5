// Launch functions of the attention kernels: pointers into device memory, sizes, strides in elements, an opaque stream.
// They launch and return; a launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>

#include "common/divisor.h"
#include "common/dtype.h"
#include "common/supported.h"

namespace warpform {

// More tokens than one packed tensor may have: sums of two token numbers fit 32 bits.
inline constexpr int kMaxTokens = (1 << 30) - 1;

// A tensor [tokens, heads, head_dim] of 16-bit elements, its last dimension contiguous, everything 16-byte aligned.
struct HeadsView {
  const void* data;
  int64_t row_stride;
  int64_t head_stride;
};

// The relative terms of disentangled attention (disentangled.cuh). A column of the tables is one relative embedding.
struct RelativeTerms {
  const void* c2p;           // [heads, tokens, width], elements as q, or null: q . pos_key of every column
  const void* p2c;           // [heads, tokens, width] or null: k . pos_query
  const int64_t* positions;  // [tokens], increasing along a sequence, or null: a token's number in its sequence
  int width;
  int centre;                // the column of distance 0
  int reach;                 // from this distance on, both ways, the column stays the same
  int mid;                   // distances up to it are columns of their own; 0: all are
  float buckets_per_octave;  // past mid, a column for each such part of a factor of 2
  float unit;                // c2p and p2c hold the products over this power of two, so that they fit 16 bits
};

// The arguments that forward and backward share: the sequences, and how much each pair counts.
struct AttentionProblem {
  HeadsView q;                  // [total_q, heads_q, head_dim]
  HeadsView k;                  // [total_k, heads_kv, head_dim]
  HeadsView v;                  // [total_k, heads_kv, head_dim]
  const int32_t* cu_seqlens_q;  // [batch + 1]; values outside [0, total_q] are clamped on the device
  const int32_t* cu_seqlens_k;  // [batch + 1]
  int batch;
  int total_q;
  int total_k;
  int max_seqlen_q;  // tokens of a sequence past it are not attended from (out 0) and not attended to
  int max_seqlen_k;
  int heads_q;
  int heads_kv;
  int head_dim;
  DType dtype;
  float softmax_scale;
  int window_left;  // keys before a query's own position that it sees; negative: all
  int window_right;
  float softcap;              // 0: none
  float softcap_exponent;     // 2 log2(e) / softcap
  const float* alibi_slopes;  // [heads_q] or [batch, heads_q], or null
  int alibi_batch_stride;     // heads_q or 0
  RelativeTerms relative = {};
};

struct AttentionForwardParams {
  AttentionProblem problem;
  void* out;   // [total_q, heads_q, head_dim]
  float* lse;  // [heads_q, total_q]
};
void launch_varlen_attention(const AttentionForwardParams& params, void* stream);
// The same with problem.relative: one set of sequences, as many heads of k as of q, no mask and no other score bias.
void launch_disentangled_attention(const AttentionForwardParams& params, void* stream);

// The way by which the kernel that owns a block of keys hands on its part of dQ.
enum class DqMode : int {
  kDirect,      // every sequence has one block of keys: dQ is complete there and is stored
  kAccumulate,  // float32 atomics into dq_accumulator: fastest, not repeatable bit for bit
  kSeparate,    // it does not: a second kernel, which owns a block of queries, recomputes the scores
};

struct AttentionBackwardParams {
  AttentionProblem problem;
  HeadsView out;          // [total_q, heads_q, head_dim]
  HeadsView dout;         // [total_q, heads_q, head_dim]
  const float* lse;       // [heads_q, total_q]
  const float* dlse;      // [heads_q, total_q] or null
  float* delta;           // [heads_q, total_q], workspace: rowsum(dout * out) - dlse
  float* dq_accumulator;  // [total_q, heads_q, head_dim], workspace; only for kAccumulate
  void* dq;               // [total_q, heads_q, head_dim]
  void* dk;               // [total_k, heads_kv, head_dim]
  void* dv;               // [total_k, heads_kv, head_dim]
  DqMode dq_mode;
  void* dc2p = nullptr;  // shapes of relative's c2p and p2c, zeros, or null: softmax_scale times the sums of dS
  void* dp2c = nullptr;
};
// The mode that a launch must be given: by determinism and by whether one block holds all keys of every sequence.
DqMode attention_backward_dq_mode(const AttentionProblem& problem, bool deterministic);
void launch_varlen_attention_backward(const AttentionBackwardParams& params, void* stream);
// Always DqMode::kSeparate; dq and dk are without their parts through c2p and p2c.
void launch_disentangled_attention_backward(const AttentionBackwardParams& params, void* stream);

// The keys that a query sees by their positions (step.cuh): query i those from (i * q_stride + first_key) / k_stride to
// before (i * q_stride + last_key) / k_stride, key j is seen by the queries likewise; a negative dividend counts as 0.
struct StepPositions {
  int q_stride, k_stride;
  int first_key, last_key;
  int first_query, last_query;
  Divisor by_q_stride, by_k_stride;
};

// The longest way between the positions of two rows of one side that the kernels can count.
inline constexpr int64_t kMaxStepSpan = (int64_t{1} << 29) - 1;

// A tensor [tokens, heads, head_dim] of float32, its last dimension contiguous, everything 8-byte aligned. In a batch
// of equal lengths, row r of sequence b begins at element (b * length + r) * row_stride + b * batch_offset.
struct StateView {
  const float* data;  // null: zeros
  int64_t row_stride;
  int64_t head_stride;
  int64_t batch_offset;
};

// The arguments of a step beside those of a whole attention. Its problem has no score bias; without cu_seqlens, `batch`
// sequences of max_seqlen_q queries and max_seqlen_k keys each; of its window only window_right >= 0 counts, as a hint.
struct StepLayout {
  StepPositions positions;
  Divisor by_q_length, by_k_length;  // of a row's number: its sequence; varlen: by 0, always 0
  int64_t q_batch_offset, k_batch_offset, v_batch_offset, dout_batch_offset;  // as StateView's
  int64_t head_rows;      // rows of lse (and delta) from a head to the next: [batch, heads, length]
  int64_t sequence_rows;  // and beyond its number for each sequence before; varlen: [heads, total], 0
};

struct AttentionStepParams {
  AttentionProblem problem;
  StepLayout step;
  StateView out_before;     // [total_q, heads_q, head_dim]
  const float* lse_before;  // as lse, or null: -inf
  float* out;               // [total_q, heads_q, head_dim]
  float* lse;               // [batch, heads_q, length] or [heads_q, total_q]
};
void launch_attention_step(const AttentionStepParams& params, void* stream);

struct AttentionStepBackwardParams {
  AttentionProblem problem;
  StepLayout step;
  HeadsView dout;    // [total_q, heads_q, head_dim]
  const float* lse;  // as lse above
  const float* delta;
  StateView dq_before;  // [total_q, heads_q, head_dim]; only for kSeparate
  StateView dk_before;  // [total_k, heads_kv, head_dim]
  StateView dv_before;
  float* dq_accumulator;  // [total_q, heads_q, head_dim], dq; for kAccumulate it holds what dq_before would
  float* dk;              // [total_k, heads_kv, head_dim]
  float* dv;
  DqMode dq_mode;  // kAccumulate or kSeparate
};
void launch_attention_step_backward(const AttentionStepBackwardParams& params, void* stream);

// Null if a kernel serves this head_dim on the current device, else why none does.
const char* attention_unsupported(int head_dim, bool backward);
const char* attention_step_unsupported(int head_dim, bool backward);
const char* disentangled_attention_unsupported(int head_dim, int64_t reach, bool backward);

// ---- supported configurations ----

inline constexpr SizeLimit kAttentionHeadDim{
    .name = "head_dim", .multiple_of = 8, .max = 256, .otherwise = "head_dim is not a multiple of 8 up to 256"};
// The limit of a step and of disentangled attention.
inline constexpr SizeLimit kShortHeadDim{
    .name = "head_dim", .multiple_of = 8, .max = 128, .otherwise = "head_dim is not a multiple of 8 up to 128"};

inline constexpr SupportedConfig kAttentionConfigs[] = {
    {.op = "varlen_attention", .dtypes = kHalfTypes, .limits = {kAttentionHeadDim}},
    {.op = "varlen_attention_backward", .dtypes = kHalfTypes, .limits = {kAttentionHeadDim}},
    {.op = "attention_step", .dtypes = kHalfTypes, .limits = {kShortHeadDim}},
    {.op = "attention_step_backward", .dtypes = kHalfTypes, .limits = {kShortHeadDim}},
    {.op = "disentangled_attention", .dtypes = kHalfTypes, .limits = {kShortHeadDim}},
    {.op = "disentangled_attention_backward", .dtypes = kHalfTypes, .limits = {kShortHeadDim}},
};

}  // namespace warpform
