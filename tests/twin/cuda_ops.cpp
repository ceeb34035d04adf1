// The CUDA library's ops on CPU tensors: its schemas and bindings, with the kernels on the twin. Of sm_80's
// attention head size 64 and fp16 only.
#include <map>

#include "../../csrc/cuda/attention_bwd_sums.cu"  // NOLINT(bugprone-suspicious-include)
#include "../../csrc/cuda/ops.cpp"                // NOLINT(bugprone-suspicious-include)
#include "../../csrc/cuda/ops_attention.cpp"      // NOLINT(bugprone-suspicious-include)
#include "../../csrc/cuda/ops_attention_bwd.cpp"  // NOLINT(bugprone-suspicious-include)
#include "../../csrc/cuda/ops_rows.cpp"           // NOLINT(bugprone-suspicious-include)
#include "cuda/attention_bwd_bias.cuh"
#include "cuda/attention_sm80.cuh"
#include "cuda/norm.cuh"
#include "cuda/norm_backward.cuh"
#include "cuda/softmax.cuh"
#include "cuda/softmax_backward.cuh"
#include "twin/binding.h"

namespace fastattn::cuda {
namespace {

using Names = std::map<const void*, std::string>;

template <class Kernel>
void add(Names& names, Kernel* kernel, const char* name) {
  names[reinterpret_cast<const void*>(kernel)] = name;
}

template <class X, class Out>
void add_softmax(Names& names) {
  add(names, softmax_rows<X, Out, 8>, "softmax lanes"), add(names, softmax_rows<X, Out, 32>, "softmax warp");
  add(names, softmax_rows<X, Out, 0>, "softmax block"), add(names, softmax_looped<X, Out>, "softmax looped");
  add(names, softmax_columns<X, Out>, "softmax columns");
  // Of the backward Out is y's type.
  add(names, softmax_backward_rows<Out, X, 8>, "softmax_backward lanes");
  add(names, softmax_backward_rows<Out, X, 32>, "softmax_backward warp");
  add(names, softmax_backward_rows<Out, X, 0>, "softmax_backward block");
  add(names, softmax_backward_looped<Out, X>, "softmax_backward looped");
  add(names, softmax_backward_columns<Out, X>, "softmax_backward columns");
  add(names, softmax_backward_bias<Out>, "softmax_backward bias");
}

template <class X>
void add_norm(Names& names) {
  add(names, norm_rows<X, 8>, "norm lanes"), add(names, norm_rows<X, 32>, "norm warp");
  add(names, norm_rows<X, 0>, "norm block"), add(names, norm_looped<X>, "norm looped");
  add(names, norm_backward_rows<X, 8>, "norm_backward lanes");
  add(names, norm_backward_rows<X, 32>, "norm_backward warp");
  add(names, norm_backward_rows<X, 0>, "norm_backward block");
  add(names, norm_backward_looped<X>, "norm_backward looped");
  add(names, norm_backward_columns<X>, "norm_backward columns");
}

template <MaskForm kForm>
void add_attention(Names& names, const std::string& form) {
  const auto add_one = [&](auto* kernel, const char* name) { add(names, kernel, (name + form).c_str()); };
  add_one(attention_forward_sm80<fp16, 64, kForm>, "attention ");
  add_one(attention_bwd_rows<fp16, kForm>, "attention_bwd rows ");
  add_one(attention_bwd_queries<fp16, 64, kForm>, "attention_bwd queries ");
  add_one(attention_bwd_keys<fp16, 64, kForm>, "attention_bwd keys ");
  add_one(attention_bwd_terms<fp16, 64, kForm>, "attention_bwd terms ");
}

Names all_names() {
  Names names;
  add_softmax<float, float>(names), add_softmax<bf16, bf16>(names), add_softmax<bf16, float>(names);
  add_softmax<fp16, fp16>(names), add_softmax<fp16, float>(names);
  add_norm<float>(names), add_norm<bf16>(names), add_norm<fp16>(names);
  add(names, column_sums, "column_sums");
  add_attention<MaskForm::None>(names, "none");
  add_attention<MaskForm::Ranges>(names, "ranges");
  add_attention<MaskForm::Bits>(names, "bits");
  add(names, attention_bwd_sinks, "attention_bwd sinks");
  return names;
}

}  // namespace

const char* error_text(int) { return "a launch on the twin does not fail"; }
int driver_version() { return 0; }

constexpr const char* kNotHere = "the twin's library has fp16 and head sizes up to 64";

template <class T, int kHead>
const char* start_attention_sm80(const AttentionArgs& a, void* stream) {
  if constexpr (kHead == 64 && std::is_same_v<T, fp16>) {
    with_mask_form(a, [&](auto form) { return launch_attention_forward_sm80<T, kHead, form()>(a, stream); });
    return nullptr;
  } else {
    return kNotHere;
  }
}

template <class T, int kHead>
const char* start_attention_bwd_sm80(const AttentionBwdArgs& a, void* stream) {
  if constexpr (kHead == 64 && std::is_same_v<T, fp16>) {
    with_mask_form(a, [&](auto form) { return launch_attention_backward_sm80<T, kHead, form()>(a, stream); });
    return nullptr;
  } else {
    return kNotHere;
  }
}

}  // namespace fastattn::cuda

// The schedule of the launches from here on; forgets which kernels ran.
TWIN_EXPORT void set_seed(uint64_t seed) {
  twin::options.seed = seed;
  twin::options.stack_bytes = 24 << 10;
  twin::launched.clear();
}

// The kernels that ran since, a line each.
TWIN_EXPORT const char* launched() {
  static const auto names = fastattn::cuda::all_names();
  static std::string text;
  text.clear();
  for (const void* kernel : twin::launched) text += names.at(kernel) + "\n";
  return text.c_str();
}
