// Bindings of hidden routing: checks, allocation, launch.
#include "kernels/routing/launch.h"

#include <optional>
#include <string>

#include "binding.h"

namespace warpform {
namespace {

constexpr int kAlignment = 8;  // elements in 16 bytes

// ---- the plan ----

void check_groups(const char* op, int64_t num_groups) {
  check(num_groups >= 1 && num_groups <= kMaxGroups, op, ": num_groups must be within 1 to ", kMaxGroups, ", got ",
        num_groups);
}

void check_classes(const char* op, int64_t num_classes) {
  check(num_classes >= 1, op, ": num_classes must be at least 1, got ", num_classes);
}

bool is_integer(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long: return true;
    default: return false;
  }
}

void check_integers(const char* op, const char* name, const Tensor& t) {
  check_type(is_integer(t), op, ": ", name, " must be integers, got ", Got{t});
}

// A part of the plan, of one dimension and where x is.
void check_vector(const char* op, const char* name, const Tensor& t, ScalarType dtype, const char* shape,
                  const Tensor& x) {
  check_type(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype), " of shape ", shape, ", got ",
             Got{t});
  check(t.dim() == 1, op, ": ", name, " must be ", dtype_name(dtype), " of shape ", shape, ", got ", Got{t});
  check_same_device(op, name, t, "x", x);
}

void check_length(const char* op, const char* name, const Tensor& t, int64_t size) {
  check(t.size(0) == size, op, ": ", name, " must be of shape [", size, "], got ", Got{t});
}

Tensor routing_mask(Tensor idx, int64_t num_groups, int64_t num_shared) {
  constexpr const char* kOp = "routing_mask";
  check_groups(kOp, num_groups);
  check(num_shared >= 0 && num_shared <= num_groups, kOp, ": num_shared must be within 0 to num_groups, ", num_groups,
        ", got ", num_shared);
  check_integers(kOp, "idx", idx);
  check(idx.dim() == 2, kOp, ": idx must be of shape [tokens, k], got ", Got{idx});
  check(idx.size(0) <= INT32_MAX && idx.size(1) <= INT32_MAX, kOp, ": idx has too many elements, got ", Got{idx});
  const Launch launch(kOp, idx);
  if (const char* reason = launch.unusable_anywhere()) {
    return UseReference(reason);
  }
  const bool wide = idx.scalar_type() == ScalarType::Long;
  if (!wide && idx.scalar_type() != ScalarType::Int) return UseReference("idx is neither int64 nor int32");
  idx = contiguous(idx);
  Tensor out = empty(kOp, {idx.size(0)}, ScalarType::Long, idx);
  launch.run<&launch_routing_mask, &cpu::Kernels::routing_mask>(
      RoutingMaskParams{.idx = launch.in(idx),
                        .group_mask = launch.out<int64_t>(out),
                        .tokens = idx.size(0),
                        .choices = static_cast<int>(idx.size(1)),
                        .num_groups = static_cast<int>(num_groups),
                        .num_shared = static_cast<int>(num_shared),
                        .wide = wide});
  return out;
}

using PlanTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

PlanTensors routing_plan(Tensor group_mask, std::optional<Tensor> token_class, int64_t num_groups, int64_t num_classes,
                         int64_t tile) {
  constexpr const char* kOp = "routing_plan";
  check_groups(kOp, num_groups);
  check(tile >= 1, kOp, ": tile must be at least 1, got ", tile);
  check_classes(kOp, num_classes);
  check_vector(kOp, "group_mask", group_mask, ScalarType::Long, "[tokens]", group_mask);
  const int64_t tokens = group_mask.size(0);
  if (token_class) {
    check_integers(kOp, "token_class", *token_class);
    check(token_class->dim() == 1 && token_class->size(0) == tokens, kOp, ": token_class must be of shape [", tokens,
          "], got ", Got{*token_class});
    check_same_device(kOp, "token_class", *token_class, "group_mask", group_mask);
  }
  const auto reference = [&](const char* reason) { return UseReference(reason); };
  const Launch launch(kOp, group_mask);
  if (const char* reason = launch.unusable_anywhere()) return reference(reason);
  if (const char* reason = kRoutingClasses.why_not(num_classes)) return reference(reason);
  if (token_class && token_class->scalar_type() != ScalarType::Long) return reference("token_class is not int64");
  const int64_t tiles = (tokens + tile - 1) / tile + num_classes;
  if (tiles > INT32_MAX / tile) return reference("more places than 32 bits count");

  group_mask = contiguous(group_mask);
  if (token_class) token_class = contiguous(*token_class);
  Tensor perm = empty(kOp, {tiles * tile}, ScalarType::Int, group_mask);
  Tensor inverse = empty(kOp, {tokens}, ScalarType::Int, group_mask);
  Tensor tile_mask = empty(kOp, {tiles}, ScalarType::Long, group_mask);
  Tensor tile_class = empty(kOp, {tiles}, ScalarType::Int, group_mask);
  Tensor workspace = empty(kOp, {launch.ask<&routing_plan_workspace>(tokens)}, ScalarType::Int, group_mask);
  launch.run<&launch_routing_plan, &cpu::Kernels::routing_plan>(
      RoutingPlanParams{.group_mask = launch.in<int64_t>(group_mask),
                        .token_class = token_class ? launch.in<int64_t>(*token_class) : nullptr,
                        .perm = launch.out<int32_t>(perm),
                        .inverse = launch.out<int32_t>(inverse),
                        .tile_mask = launch.out<int64_t>(tile_mask),
                        .tile_class = launch.out<int32_t>(tile_class),
                        .workspace = launch.out<int32_t>(workspace),
                        .tokens = static_cast<int>(tokens),
                        .tiles = static_cast<int>(tiles),
                        .tile = static_cast<int>(tile),
                        .num_groups = static_cast<int>(num_groups),
                        .num_classes = static_cast<int>(num_classes)});
  return {perm, inverse, tile_mask, tile_class};
}

// ---- shared by the products ----

// The plan's arguments, in the schema's order.
struct Plan {
  Tensor group_mask, perm, inverse, tile_mask, tile_class;
  std::optional<Tensor> out_mask;
  int64_t num_groups, num_classes;

  int64_t num_out() const { return out_mask ? out_mask->size(0) : 1; }
  int64_t tiles() const { return tile_mask.size(0); }

  // What kernels read as it lies.
  void make_contiguous() {
    for (Tensor* t : {&group_mask, &perm, &inverse, &tile_mask, &tile_class}) *t = contiguous(*t);
    out_mask = contiguous(out_mask);
  }

  // The plan for a weight whose routed and whose dense dimension are `routed` and `dense` wide, all groups and parts.
  Routes routes(const Launch& launch, int64_t routed, int64_t dense) const {
    return {.group_mask = launch.in<int64_t>(group_mask),
            .perm = launch.in<int32_t>(perm),
            .tile_mask = launch.in<int64_t>(tile_mask),
            .tile_class = launch.in<int32_t>(tile_class),
            .out_mask = out_mask ? launch.in<int64_t>(*out_mask) : nullptr,
            .tokens = static_cast<int>(group_mask.size(0)),
            .tiles = static_cast<int>(tiles()),
            .num_groups = static_cast<int>(num_groups),
            .num_classes = static_cast<int>(num_classes),
            .width = static_cast<int>(routed / num_groups),
            .num_out = static_cast<int>(num_out()),
            .dense_width = static_cast<int>(dense / num_out())};
  }
};

// [tokens, width].
void check_tokens(const char* op, const char* name, const Tensor& t) {
  check_floating(op, name, t);
  check(t.dim() == 2, op, ": ", name, " must be of shape [tokens, width], got ", Got{t});
}

// Another tensor of the same tokens.
void check_tokens_as(const char* op, const char* name, const Tensor& t, const char* as_name, const Tensor& as) {
  check_tokens(op, name, t);
  check_dtype_of(op, name, t, as_name, as);
  check_same_device(op, name, t, as_name, as);
  check(t.size(0) == as.size(0), op, ": ", name, " must have ", as.size(0), " rows as ", as_name, " has, got ", Got{t});
}

// A side of a product that comes in parts: what an error calls it, and how wide it is.
struct Side {
  const char* name;
  int64_t width;
};

// x is the tensor of tokens that the plan is for, of whatever name.
void check_plan(const char* op, const Plan& plan, const char* x_name, const Tensor& x, Side routed, Side dense) {
  check_groups(op, plan.num_groups);
  check_classes(op, plan.num_classes);
  check_same_device(op, "plan", plan.group_mask, x_name, x);
  check_vector(op, "group_mask", plan.group_mask, ScalarType::Long, "[tokens]", x);
  const int64_t tokens = x.size(0);
  check(plan.group_mask.size(0) == tokens, op, ": plan must be of ", tokens, " tokens as ", x_name, " is, got one of ",
        plan.group_mask.size(0));
  check(routed.width % plan.num_groups == 0, op, ": ", routed.name, " must come in ", plan.num_groups,
        " groups of equal width, got ", routed.width);
  if (plan.out_mask) {
    check_vector(op, "out_mask", *plan.out_mask, ScalarType::Long, "[num_out]", x);
    check(plan.num_out() > 0, op, ": out_mask must not be empty");
    check(dense.width % plan.num_out() == 0, op, ": ", dense.name, " must come in ", plan.num_out(),
          " parts of equal width, got ", dense.width);
  }
  check_vector(op, "inverse", plan.inverse, ScalarType::Int, "[tokens]", x);
  check_length(op, "inverse", plan.inverse, tokens);
  check_vector(op, "perm", plan.perm, ScalarType::Int, "[places]", x);
  check_vector(op, "tile_mask", plan.tile_mask, ScalarType::Long, "[tiles]", x);
  check_vector(op, "tile_class", plan.tile_class, ScalarType::Int, "[tiles]", x);
  check_length(op, "tile_class", plan.tile_class, plan.tiles());
  check(plan.tiles() > 0 ? plan.perm.size(0) % plan.tiles() == 0 : plan.perm.size(0) == 0, op,
        ": perm must have the same number of places for each of the ", plan.tiles(), " tiles, got ", Got{plan.perm});
}

// [outputs, inputs], behind the classes where there are some. -1: as many as there are.
void check_weight(const char* op, const Tensor& w, int64_t outputs, int64_t inputs, const Plan& plan,
                  const char* x_name, const Tensor& x) {
  const bool classes = w.dim() == 3 || plan.num_classes > 1;
  const auto fits = [](int64_t size, int64_t wanted) { return wanted < 0 || size == wanted; };
  if (w.dim() == (classes ? 3 : 2) && fits(w.size(-2), outputs) && fits(w.size(-1), inputs) &&
      (!classes || w.size(0) == plan.num_classes)) [[likely]] {
    check_dtype_of(op, "w", w, x_name, x);
    check_same_device(op, "w", w, x_name, x);
    return;
  }
  const auto size = [](int64_t wanted, const char* name) { return wanted < 0 ? name : std::to_string(wanted); };
  check(false, op, ": w must be of shape [", classes ? std::to_string(plan.num_classes) + ", " : "",
        size(outputs, "outputs"), ", ", size(inputs, "inputs"), "] for this ", x_name, " and plan, got ", Got{w});
}

void check_gates(const char* op, const std::optional<Tensor>& gates, const Plan& plan, const char* x_name,
                 const Tensor& x) {
  if (!gates) return;
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_type(gates->scalar_type() == dtype, op, ": gates must be ", dtype_name(dtype), " for this ", x_name, ", got ",
             Got{*gates});
  check(gates->dim() == 2 && gates->size(0) == x.size(0) && gates->size(1) == plan.num_groups, op,
        ": gates must be of shape [", x.size(0), ", ", plan.num_groups, "], got ", Got{*gates});
  check_same_device(op, "gates", *gates, x_name, x);
}

void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t outputs, const Plan& plan, const Tensor& x) {
  if (!bias) return;
  const bool fits = (bias->dim() == 1 && bias->size(0) == outputs) ||
                    (bias->dim() == 2 && bias->size(0) == plan.num_classes && bias->size(1) == outputs);
  check(fits, op, ": bias must be of shape [", outputs, "] or [", plan.num_classes, ", ", outputs, "], got ",
        Got{*bias});
  check_dtype_of(op, "bias", *bias, "x", x);
  check_same_device(op, "bias", *bias, "x", x);
}

// Why no kernel serves these widths of the routed and of the dense dimension, or null.
const char* no_kernel(const Launch& launch, const Plan& plan, const Tensor& x, int64_t routed, int64_t dense) {
  if (const char* reason = launch.unusable()) return reason;
  if (const char* reason = kHalfTypes.why_not(dtype_name(x.scalar_type()))) return reason;
  const int64_t width = routed / plan.num_groups, dense_width = dense / plan.num_out();
  if (width == 0 || !kGroupWidth.allows(width)) return kGroupWidth.otherwise;
  if (dense_width == 0 || !kDenseWidth.allows(dense_width)) return kDenseWidth.otherwise;
  if (routed > INT32_MAX / 2 || dense > INT32_MAX / 2) return "more columns than 32 bits count";
  if (plan.tiles() == 0 || plan.perm.size(0) / plan.tiles() != kHiddenTile) return kRoutingTile.otherwise;
  return nullptr;
}

int64_t row_stride(const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : t.size(1); }

// A weight [outputs, inputs], or its transpose where `swapped`. It is read without a copy if one of the two dimensions
// is contiguous.
struct WeightView {
  Tensor t;
  bool swapped;

  WeightView(const Tensor& w, bool swapped_) : t(w), swapped(swapped_) {
    if (!is_readable()) t = dense(w);
  }
  int64_t outputs() const { return t.size(swapped ? -1 : -2); }
  bool is_readable() const {
    const int64_t d = t.dim();
    const bool inner = t.stride(d - 1) == 1 && t.stride(d - 2) % kAlignment == 0 && t.stride(d - 2) > 0;
    const bool outer = t.stride(d - 2) == 1 && t.stride(d - 1) % kAlignment == 0 && t.stride(d - 1) > 0;
    return is_aligned(t, 16) && (inner || outer) && (d == 2 || t.stride(0) % kAlignment == 0);
  }
  RoutedWeight weight(const Launch& launch) const {
    const int64_t d = t.dim();
    const bool inner = t.stride(d - 1) == 1 && t.stride(d - 2) % kAlignment == 0;  // the last dimension is contiguous
    return {.data = launch.in(t),
            .stride = inner ? t.stride(d - 2) : t.stride(d - 1),
            .class_stride = d == 3 ? t.stride(0) : 0,
            .transposed = inner == swapped};
  }
};

// Why this GPU has no room for the products of x's groups with these gates, or null.
const char* no_room(const Launch& launch, const Plan& plan, const Tensor& x, const WeightView& view,
                    const std::optional<Tensor>& gates) {
  if (x.size(0) == 0 || view.outputs() == 0) return nullptr;
  return hidden_gather_unsupported(plan.routes(launch, x.size(1), view.outputs()), view.weight(launch),
                                   gates.has_value());
}

int64_t bias_stride(const std::optional<Tensor>& bias) { return bias && bias->dim() == 2 ? bias->size(1) : 0; }

// ---- the products ----

// x times w, or w transposed, from the groups of x.
Tensor gather(const char* op, const Launch& launch, const Tensor& x, const WeightView& view,
              const std::optional<Tensor>& gates_, const std::optional<Tensor>& bias_, const Plan& plan) {
  const int64_t outputs = view.outputs();
  Tensor out = empty(op, {x.size(0), outputs}, x.scalar_type(), x);
  if (out.numel() == 0) return out;
  const Tensor rows = with_aligned_rows(x);
  const auto gates = contiguous(gates_), bias = dense(bias_);
  launch_hidden_gather(op,
                       {.routes = plan.routes(launch, x.size(1), outputs),
                        .w = view.weight(launch),
                        .x = launch.in(rows),
                        .gates = launch.in_or_null<float>(gates),
                        .bias = bias ? launch.in(*bias) : nullptr,
                        .out = launch.out(out),
                        .x_stride = row_stride(rows),
                        .bias_stride = bias_stride(bias),
                        .dtype = element_type(x)},
                       launch.stream());
  return out;
}

struct Scattered {
  Tensor out, ungated, dots;
};

// ---- on a CPU ----

// Why no CPU kernel serves these widths of the routed and of the dense dimension, or null.
const char* no_cpu_kernel(const Launch& launch, const Plan& plan, const Tensor& x, int64_t routed, int64_t dense) {
  if (const char* reason = launch.unusable_anywhere()) return reason;
  if (const char* reason = kFloatTypes.why_not(dtype_name(x.scalar_type()))) return reason;
  if (routed == 0 || dense == 0) return "there is nothing to multiply";
  if (plan.perm.size(0) == 0) return "the plan has no tiles";
  return nullptr;
}

// One op's call of a CPU kernel. It keeps the tensors that the parameters point into.
class CpuCall {
 public:
  CpuCall(const char* op, const Launch& launch, const Tensor& x, const std::optional<Tensor>& gates, Plan plan,
          int64_t routed, int64_t dense)
      : op_(op), launch_(launch), like_(x), plan_(std::move(plan)), gates_(contiguous(gates)) {
    plan_.make_contiguous();
    params.group_mask = launch_.in<int64_t>(plan_.group_mask);
    params.perm = launch_.in<int32_t>(plan_.perm);
    params.tile_class = launch_.in<int32_t>(plan_.tile_class);
    params.out_mask = plan_.out_mask ? launch_.in<int64_t>(*plan_.out_mask) : nullptr;
    params.tokens = x.size(0);
    params.tiles = plan_.tiles();
    params.tile = plan_.perm.size(0) / plan_.tiles();
    params.num_groups = plan_.num_groups;
    params.num_classes = plan_.num_classes;
    params.width = routed / plan_.num_groups;
    params.num_out = plan_.num_out();
    params.dense_width = dense / plan_.num_out();
    params.gates = launch_.in_or_null<float>(gates_);
    params.dtype = element_type(x);
  }

  void input(const Tensor& x) {
    x_ = with_rows(x);
    params.x = launch_.in(x_);
    params.x_stride = row_stride(x_);
  }
  // [outputs, inputs], or the transpose of that.
  void weight(const Tensor& w, bool swapped) {
    const int64_t d = w.dim();
    w_ = w.stride(d - 1) == 1 || w.stride(d - 2) == 1 ? w : contiguous(w);
    params.w = launch_.in(w_);
    params.out_stride = w_.stride(swapped ? d - 1 : d - 2);
    params.in_stride = w_.stride(swapped ? d - 2 : d - 1);
    params.class_stride = d == 3 ? w_.stride(0) : 0;
  }
  void bias(const std::optional<Tensor>& bias) {
    bias_ = contiguous(bias);
    params.bias = launch_.in_or_null(bias_);
    params.bias_stride = bias_stride(bias_);
  }
  void other(const Tensor& t) {
    other_ = with_rows(t);
    params.dot_with = launch_.in(other_);
    params.dot_stride = row_stride(other_);
  }
  Tensor out(const std::vector<int64_t>& sizes, bool wide = false) {
    Tensor out = empty(op_, sizes, wide ? ScalarType::Float : like_.scalar_type(), like_);
    params.out = launch_.out(out);
    return out;
  }
  Tensor ungated(bool kept, const Tensor& out) {
    Tensor ungated = empty(op_, kept ? sizes_of(out) : std::vector<int64_t>{0}, like_.scalar_type(), like_);
    params.ungated = kept ? launch_.out(ungated) : nullptr;
    return ungated;
  }
  Tensor dots(bool wanted) {
    Tensor dots = empty(op_, wanted ? std::vector<int64_t>{params.tokens, params.num_groups} : std::vector<int64_t>{0},
                        ScalarType::Float, like_);
    params.dots = wanted ? launch_.out<float>(dots) : nullptr;
    return dots;
  }

  cpu::RoutedProductParams params{};

 private:
  static Tensor with_rows(const Tensor& t) { return last_dimension_is_contiguous(t) ? t : contiguous(t); }

  const char* op_;
  const Launch& launch_;
  const Tensor& like_;
  Plan plan_;
  std::optional<Tensor> gates_, bias_;
  Tensor x_, w_, other_;
};

Scattered scatter(const char* op, const Launch& launch, const Tensor& x, const Tensor& w, bool swapped,
                  const std::optional<Tensor>& gates_, const std::optional<Tensor>& bias_,
                  const std::optional<Tensor>& dot_with_, bool keep_ungated, const Plan& plan) {
  const int64_t tokens = x.size(0), outputs = w.size(swapped ? -1 : -2);
  const std::vector<int64_t> none = {0}, sizes = {tokens, outputs};
  const int64_t blocks = (outputs / plan.num_groups + kHiddenBlock - 1) / kHiddenBlock;
  Scattered s{empty(op, sizes, x.scalar_type(), x), empty(op, keep_ungated ? sizes : none, x.scalar_type(), x),
              empty(op, dot_with_ ? std::vector<int64_t>{tokens, plan.num_groups} : none, ScalarType::Float, x)};
  if (s.out.numel() == 0) return s;
  const Tensor partials = empty(
      op, dot_with_ && blocks > 1 ? std::vector<int64_t>{blocks, tokens, plan.num_groups} : none, ScalarType::Float, x);
  const Tensor rows = with_aligned_rows(x);
  const WeightView view(w, swapped);
  const auto gates = contiguous(gates_), bias = dense(bias_);
  const auto dot_with = dot_with_ ? std::optional<Tensor>(with_aligned_rows(*dot_with_)) : std::nullopt;
  launch_hidden_scatter(op,
                        {.routes = plan.routes(launch, outputs, x.size(1)),
                         .w = view.weight(launch),
                         .x = launch.in(rows),
                         .gates = launch.in_or_null<float>(gates),
                         .bias = bias ? launch.in(*bias) : nullptr,
                         .dot_with = dot_with ? launch.in(*dot_with) : nullptr,
                         .out = launch.out(s.out),
                         .ungated = keep_ungated ? launch.out(s.ungated) : nullptr,
                         .dots = dot_with ? launch.out<float>(s.dots) : nullptr,
                         .dot_partials = partials.numel() > 0 ? launch.out<float>(partials) : nullptr,
                         .x_stride = row_stride(rows),
                         .dot_stride = dot_with ? row_stride(*dot_with) : 0,
                         .bias_stride = bias_stride(bias),
                         .dtype = element_type(x)},
                        launch.stream());
  return s;
}

Tensor hidden_gather_linear(Tensor x, Tensor w, std::optional<Tensor> gates, std::optional<Tensor> bias,
                            Tensor group_mask, Tensor perm, Tensor inverse, Tensor tile_mask, Tensor tile_class,
                            std::optional<Tensor> out_mask, int64_t num_groups, int64_t num_classes) {
  constexpr const char* kOp = "hidden_gather_linear";
  Plan plan{group_mask, perm, inverse, tile_mask, tile_class, out_mask, num_groups, num_classes};
  check_tokens(kOp, "x", x);
  check_weight(kOp, w, -1, x.size(1), plan, "x", x);
  const int64_t outputs = w.size(-2);
  check_plan(kOp, plan, "x", x, {"x", x.size(1)}, {"w's outputs", outputs});
  check_gates(kOp, gates, plan, "x", x);
  check_bias(kOp, bias, outputs, plan, x);
  const Launch launch(kOp, x);
  if (launch.on_cpu()) {
    if (const char* reason = no_cpu_kernel(launch, plan, x, x.size(1), outputs)) return UseReference(reason);
    CpuCall call(kOp, launch, x, gates, std::move(plan), x.size(1), outputs);
    call.input(x);
    call.weight(w, /*swapped=*/false);
    call.bias(bias);
    Tensor out = call.out({x.size(0), outputs});
    launch.run_on_cpu<&cpu::Kernels::hidden_gather>(call.params);
    return out;
  }
  if constexpr (!kHasKernels) return UseReference(without_kernels(x));
  if (const char* reason = no_kernel(launch, plan, x, x.size(1), outputs)) {
    return UseReference(reason);
  }
  plan.make_contiguous();
  const WeightView view(w, /*swapped=*/false);
  if (const char* reason = no_room(launch, plan, x, view, gates)) return UseReference(reason);
  return gather(kOp, launch, x, view, gates, bias, plan);
}

std::tuple<Tensor, Tensor> hidden_gather_linear_backward(Tensor dout, Tensor x, Tensor w, std::optional<Tensor> gates,
                                                         Tensor group_mask, Tensor perm, Tensor inverse,
                                                         Tensor tile_mask, Tensor tile_class,
                                                         std::optional<Tensor> out_mask, int64_t num_groups,
                                                         int64_t num_classes) {
  constexpr const char* kOp = "hidden_gather_linear_backward";
  Plan plan{group_mask, perm, inverse, tile_mask, tile_class, out_mask, num_groups, num_classes};
  check_tokens(kOp, "x", x);
  check_tokens_as(kOp, "dout", dout, "x", x);
  check_weight(kOp, w, dout.size(1), x.size(1), plan, "x", x);
  check_plan(kOp, plan, "x", x, {"x", x.size(1)}, {"dout", dout.size(1)});
  check_gates(kOp, gates, plan, "x", x);
  const Launch launch(kOp, x);
  if (launch.on_cpu()) {
    if (const char* reason = no_cpu_kernel(launch, plan, x, x.size(1), dout.size(1))) return UseReference(reason);
    CpuCall call(kOp, launch, x, gates, std::move(plan), x.size(1), dout.size(1));
    call.input(dout);
    call.weight(w, /*swapped=*/true);
    call.other(x);
    Tensor dx = call.out(sizes_of(x)), dgates = call.dots(gates.has_value());
    if (!gates) call.params.dot_with = nullptr;
    launch.run_on_cpu<&cpu::Kernels::hidden_scatter>(call.params);
    return {dx, dgates};
  }
  if constexpr (!kHasKernels) return UseReference(without_kernels(x));
  if (const char* reason = no_kernel(launch, plan, x, x.size(1), dout.size(1))) {
    return UseReference(reason);
  }
  plan.make_contiguous();
  const auto dot_with = gates ? std::optional<Tensor>(x) : std::nullopt;
  const Scattered s = scatter(kOp, launch, dout, w, /*swapped=*/true, gates, std::nullopt, dot_with, false, plan);
  return {s.out, s.dots};
}

std::tuple<Tensor, Tensor> hidden_scatter_linear(Tensor x, Tensor w, std::optional<Tensor> gates,
                                                 std::optional<Tensor> bias, bool keep_ungated, Tensor group_mask,
                                                 Tensor perm, Tensor inverse, Tensor tile_mask, Tensor tile_class,
                                                 std::optional<Tensor> out_mask, int64_t num_groups,
                                                 int64_t num_classes) {
  constexpr const char* kOp = "hidden_scatter_linear";
  Plan plan{group_mask, perm, inverse, tile_mask, tile_class, out_mask, num_groups, num_classes};
  check_tokens(kOp, "x", x);
  check_weight(kOp, w, -1, x.size(1), plan, "x", x);
  const int64_t outputs = w.size(-2);
  check_plan(kOp, plan, "x", x, {"w's outputs", outputs}, {"x", x.size(1)});
  check_gates(kOp, gates, plan, "x", x);
  check_bias(kOp, bias, outputs, plan, x);
  const Launch launch(kOp, x);
  if (launch.on_cpu()) {
    if (const char* reason = no_cpu_kernel(launch, plan, x, outputs, x.size(1))) return UseReference(reason);
    CpuCall call(kOp, launch, x, gates, std::move(plan), outputs, x.size(1));
    call.input(x);
    call.weight(w, /*swapped=*/false);
    call.bias(bias);
    Tensor out = call.out({x.size(0), outputs}), ungated = call.ungated(keep_ungated, out);
    launch.run_on_cpu<&cpu::Kernels::hidden_scatter>(call.params);
    return {out, ungated};
  }
  if constexpr (!kHasKernels) return UseReference(without_kernels(x));
  if (const char* reason = no_kernel(launch, plan, x, outputs, x.size(1))) {
    return UseReference(reason);
  }
  plan.make_contiguous();
  const Scattered s = scatter(kOp, launch, x, w, /*swapped=*/false, gates, bias, std::nullopt, keep_ungated, plan);
  return {s.out, s.ungated};
}

std::tuple<Tensor, Tensor> hidden_scatter_linear_backward(Tensor dout, std::optional<Tensor> ungated, Tensor w,
                                                          std::optional<Tensor> gates, Tensor group_mask, Tensor perm,
                                                          Tensor inverse, Tensor tile_mask, Tensor tile_class,
                                                          std::optional<Tensor> out_mask, int64_t num_groups,
                                                          int64_t num_classes) {
  constexpr const char* kOp = "hidden_scatter_linear_backward";
  Plan plan{group_mask, perm, inverse, tile_mask, tile_class, out_mask, num_groups, num_classes};
  check_tokens(kOp, "dout", dout);
  check_weight(kOp, w, dout.size(1), -1, plan, "dout", dout);
  const int64_t inputs = w.size(-1);
  check_plan(kOp, plan, "dout", dout, {"dout", dout.size(1)}, {"w's inputs", inputs});
  check_gates(kOp, gates, plan, "dout", dout);
  if (ungated) {
    check_tokens_as(kOp, "ungated", *ungated, "dout", dout);
    check(ungated->size(1) == dout.size(1), kOp, ": ungated must be of shape ", Shape{dout}, " as dout is, got ",
          Got{*ungated});
  }
  const Launch launch(kOp, dout);
  if (launch.on_cpu()) {
    if (const char* reason = no_cpu_kernel(launch, plan, dout, dout.size(1), inputs)) return UseReference(reason);
    CpuCall call(kOp, launch, dout, gates, std::move(plan), dout.size(1), inputs);
    call.input(dout);
    call.weight(w, /*swapped=*/true);
    if (ungated) call.other(*ungated);
    Tensor dx = call.out({dout.size(0), inputs}), dgates = call.dots(ungated.has_value());
    launch.run_on_cpu<&cpu::Kernels::hidden_gather>(call.params);
    return {dx, dgates};
  }
  if constexpr (!kHasKernels) return UseReference(without_kernels(dout));
  if (const char* reason = no_kernel(launch, plan, dout, dout.size(1), inputs)) {
    return UseReference(reason);
  }
  plan.make_contiguous();
  const WeightView view(w, /*swapped=*/true);
  if (const char* reason = no_room(launch, plan, dout, view, gates)) return UseReference(reason);
  Tensor dx = gather(kOp, launch, dout, view, gates, std::nullopt, plan);
  const int64_t tokens = dout.size(0);
  Tensor dgates =
      empty(kOp, ungated ? std::vector<int64_t>{tokens, num_groups} : std::vector<int64_t>{0}, ScalarType::Float, dout);
  if (dgates.numel() > 0) {
    const Tensor a = dense(dout), b = dense(*ungated);
    launch_group_dots(kOp,
                      {.a = launch.in(a),
                       .b = launch.in(b),
                       .group_mask = launch.in<int64_t>(plan.group_mask),
                       .dots = launch.out<float>(dgates),
                       .tokens = tokens,
                       .num_groups = static_cast<int>(num_groups),
                       .width = static_cast<int>(dout.size(1) / num_groups),
                       .dtype = element_type(dout)},
                      launch.stream());
  }
  return {dx, dgates};
}

Tensor hidden_weight_grad(Tensor x, Tensor dy, std::optional<Tensor> gates, bool routed_out, Tensor group_mask,
                          Tensor perm, Tensor inverse, Tensor tile_mask, Tensor tile_class,
                          std::optional<Tensor> out_mask, int64_t num_groups, int64_t num_classes) {
  constexpr const char* kOp = "hidden_weight_grad";
  Plan plan{group_mask, perm, inverse, tile_mask, tile_class, out_mask, num_groups, num_classes};
  check_tokens(kOp, "x", x);
  check_tokens_as(kOp, "dy", dy, "x", x);
  const Tensor& routed_side = routed_out ? dy : x;
  const Tensor& dense_side = routed_out ? x : dy;
  check_plan(kOp, plan, "x", x, {routed_out ? "dy" : "x", routed_side.size(1)},
             {routed_out ? "x" : "dy", dense_side.size(1)});
  check_gates(kOp, gates, plan, "x", x);
  const Launch launch(kOp, x);
  if (launch.on_cpu()) {
    if (const char* reason = no_cpu_kernel(launch, plan, x, routed_side.size(1), dense_side.size(1)))
      return UseReference(reason);
    CpuCall call(kOp, launch, x, gates, std::move(plan), routed_side.size(1), dense_side.size(1));
    call.input(dense_side);
    call.other(routed_side);
    call.params.routed_out = routed_out;
    Tensor dw = call.out({num_classes, dy.size(1), x.size(1)}, /*wide=*/true);
    launch.run_on_cpu<&cpu::Kernels::hidden_weight_grad>(call.params);
    return dw;
  }
  if constexpr (!kHasKernels) return UseReference(without_kernels(x));
  if (const char* reason = no_kernel(launch, plan, x, routed_side.size(1), dense_side.size(1))) {
    return UseReference(reason);
  }
  if (const char* reason = hidden_weight_grad_unsupported()) return UseReference(reason);
  plan.make_contiguous();
  Tensor dw = empty(kOp, {num_classes, dy.size(1), x.size(1)}, ScalarType::Float, x);
  const Tensor dense = with_aligned_rows(dense_side), routed = with_aligned_rows(routed_side);
  const auto factors = contiguous(gates);
  HiddenWeightGradParams params{.routes = plan.routes(launch, routed.size(1), dense.size(1)),
                                .dense = launch.in(dense),
                                .routed = launch.in(routed),
                                .gates = launch.in_or_null<float>(factors),
                                .dw = launch.out<float>(dw),
                                .partials = nullptr,
                                .dense_stride = row_stride(dense),
                                .routed_stride = row_stride(routed),
                                .splits = 1,
                                .routed_out = routed_out,
                                .dtype = element_type(x)};
  params.splits = hidden_weight_grad_splits(params.routes);
  Tensor partials = empty(kOp, {params.splits > 1 ? params.splits * dw.numel() : 0}, ScalarType::Float, x);
  if (params.splits > 1) params.partials = launch.out<float>(partials);
  launch_hidden_weight_grad(params, launch.stream());
  return dw;
}

}  // namespace

std::span<const Body> routing_ops() {
  static constexpr Body kOps[] = {body<"routing_mask", &routing_mask>(),
                                  body<"routing_plan", &routing_plan>(),
                                  body<"hidden_gather_linear", &hidden_gather_linear>(),
                                  body<"hidden_gather_linear_backward", &hidden_gather_linear_backward>(),
                                  body<"hidden_scatter_linear", &hidden_scatter_linear>(),
                                  body<"hidden_scatter_linear_backward", &hidden_scatter_linear_backward>(),
                                  body<"hidden_weight_grad", &hidden_weight_grad>()};
  return kOps;
}

}  // namespace warpform
