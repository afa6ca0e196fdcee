// The pass over one parameter as one loop, called by `compiled.py`: every tensor is read from memory once and written once.
//
// A loop over blocks that stay in the first cache; inside, loops over whole blocks. What differs from pass to pass (rule,
// neighbours, dtypes, messages) is asked once a block, so one function serves all passes. Rules are those of reference.py.
// Built behind `formats.hpp`, without contraction of multiplications and additions.

namespace {

enum Rule : int64_t { MIX, SGD, ADAM };
enum Found : int64_t { NOT_FINITE = 1, LEFT_OUT = 2 };

// As `_Call` in compiled.py.
struct Call {
  int64_t rule, numel, threads, neighbours, contain, states, codes;
  Flat param, gradient, state[3];
  const Flat* inbox;
  // Compressed messages that came, and those that are to be sent.
  const uint8_t* const* inbox_scales;
  char *taken, *given;
  uint8_t *taken_scales, *given_scales;
  float *neighbor_delta, *replica;
  const double *weights, *numbers;
  double strength;
};

// `wire.decode` of elements [at, at + count); zeros behind them.
void decode(const Call& call, const char* codes, const uint8_t* scales, int64_t at, int64_t count, float* values) {
  uint16_t copy[BLOCK];
  if (call.codes == BF16) {
    const uint16_t* there = codes_at<uint16_t>(codes, at, count, copy);
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; ++i) {
      const float value = from_bf16(there[i]);
      values[i] = finite(value) ? value : 0.0f;
    }
    return;
  }
  if (call.codes == INT8) {
    const int8_t* there = codes_at<int8_t>(codes, at, count, reinterpret_cast<int8_t*>(copy));
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; ++i) values[i] = static_cast<float>(there[i]);
  } else {
    const uint8_t* there = codes_at<uint8_t>(codes, at, count, reinterpret_cast<uint8_t*>(copy));
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; ++i) values[i] = from_fp8(there[i]);
  }
  for (int64_t first = 0; first < count; first += GROUP) {
    float power[16];
    for (int i = 0; i < 4; ++i) {
      const int32_t scale = scales[(at + first) / 16 + i];
      power[i] = scale == SPOILT ? 0.0f : float_of(scale << 23);
    }
    for (int i = 4; i < 16; ++i) power[i] = power[i - 4];
    for (int row = 0; row < 4; ++row) {
      float* lanes = values + first + 16 * row;
#pragma omp simd
      for (int i = 0; i < 16; ++i) lanes[i] *= power[i];
    }
  }
}

// `wire.give` of elements [at, at + count) with these values.
int64_t give(const Call& call, const float* values, int64_t at, int64_t count) {
  const Flat home = {reinterpret_cast<char*>(call.replica), FP32};
  float copy[BLOCK], difference[BLOCK];
  uint16_t codes[BLOCK];
  float* replica = load<float>(home, at, count, copy);
#pragma omp simd
  for (int64_t i = 0; i < BLOCK; ++i) difference[i] = values[i] - replica[i];
  for (int64_t i = count; i < BLOCK; ++i) difference[i] = 0.0f;
  bool left_out;
  if (call.codes == BF16) {
    left_out = encode_bf16(difference, codes);
    std::memcpy(call.given + 2 * at, codes, 2 * count);
  } else {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(codes);
    left_out = encode(call.codes == FP8, difference, bytes, call.given_scales + at / 16, count);
    std::memcpy(call.given + at, bytes, count);
  }
#pragma omp simd
  for (int64_t i = 0; i < BLOCK; ++i) replica[i] += difference[i];
  store<float>(home, at, count, replica);
  return left_out ? int64_t{LEFT_OUT} : 0;
}

// `wire.take`, and the mixed values.
const float* take(const Call& call, const float* x, int64_t at, int64_t count, float* mixed) {
  float own[BLOCK], received[BLOCK], copy[BLOCK];
  float* pull = load<float>({reinterpret_cast<char*>(call.neighbor_delta), FP32}, at, count, copy);
  decode(call, call.taken, call.taken_scales, at, count, own);
  for (int64_t k = 0; k < call.neighbours; ++k) {
    const float weight = static_cast<float>(call.weights[k]);
    decode(call, call.inbox[k].data, call.inbox_scales[k], at, count, received);
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; ++i) pull[i] += (received[i] - own[i]) * weight;
  }
  const float strength = static_cast<float>(call.strength);
#pragma omp simd
  for (int64_t i = 0; i < BLOCK; ++i) mixed[i] = pull[i] * strength + x[i];
  store<float>({reinterpret_cast<char*>(call.neighbor_delta), FP32}, at, count, pull);
  return mixed;
}

// mixed = start + weight*(received - x), without differences that are not finite; whether there were some.
template <typename A>
bool add(const A* start, const A* x, const A* received, A weight, bool contain, A* mixed) {
  if (!contain) {
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; ++i) mixed[i] = start[i] + weight * (received[i] - x[i]);
    return false;
  }
  int32_t bad = 0;
#pragma omp simd reduction(| : bad)
  for (int64_t i = 0; i < BLOCK; ++i) {
    const A difference = received[i] - x[i];
    const bool fine = finite(difference);
    bad |= fine ? 0 : 1;
    mixed[i] = start[i] + weight * (fine ? difference : A(0));
  }
  return bad != 0;
}

// x + sum_k weights[k]*(inbox[k] - x), which is x itself without neighbours.
template <typename A>
const A* mix(const Call& call, const A* x, int64_t at, int64_t count, A* mixed, int64_t& found) {
  const A* start = x;
  for (int64_t k = 0; k < call.neighbours; ++k) {
    A copy[BLOCK];
    const A* received = load<A>(call.inbox[k], at, count, copy);
    if (add<A>(start, x, received, static_cast<A>(call.weights[k]), call.contain, mixed)) found |= NOT_FINITE;
    start = mixed;
  }
  return start;
}

// scale*gradient + decay*x. Without decay, an x that is not finite stays out of it, and out of the moments.
template <typename A>
A descent(A gradient, A x, A scale, A decay) {
  return scale * gradient + (decay != 0 ? decay * x : A(0));
}

template <typename A>
void sgd(const Call& call, A* x, const A* g, A* buf, const A* mixed) {
  const double* n = call.numbers;
  const A lr = n[0], carried = n[1], undamped = n[2], direct = n[3], through = n[4], scale = n[5], decay = n[6];
  if (!buf) {
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; ++i) x[i] = mixed[i] - lr * descent(g[i], x[i], scale, decay);
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < BLOCK; ++i) {
    const A d = descent(g[i], x[i], scale, decay);
    const A next = carried * buf[i] + undamped * d;
    buf[i] = next;
    x[i] = mixed[i] - lr * (direct * d + through * next);
  }
}

template <typename A, bool AMSGRAD>
void adam(const Call& call, A* x, const A* g, A* const* states, const A* mixed) {
  const double* n = call.numbers;
  const A size = n[0], rescale = n[1], eps = n[2], drawn = n[3], beta1 = n[4], undecayed1 = n[5], beta2 = n[6],
          undecayed2 = n[7], scale = n[8], decay = n[9];
  A *moment = states[0], *square = states[1], *top = states[2];
#pragma omp simd
  for (int64_t i = 0; i < BLOCK; ++i) {
    const A d = descent(g[i], x[i], scale, decay);
    // With the difference d - m, a large m drowns a small d where beta1 is 0.
    const A m = beta1 * moment[i] + undecayed1 * d, v = beta2 * square[i] + undecayed2 * (d * d);
    moment[i] = m;
    square[i] = v;
    A largest = v;
    if constexpr (AMSGRAD) {
      // Either may be a NaN, which stays.
      largest = top[i] != top[i] || v < top[i] ? top[i] : v;
      top[i] = largest;
    }
    x[i] = mixed[i] - size * (m / (std::sqrt(largest) * rescale + eps)) - drawn * x[i];
  }
}

// A rule's step at x, in the place of x, from the mixed values on.
template <typename A>
void apply(const Call& call, A* x, const A* mixed, int64_t at, int64_t count) {
  A copies[4][BLOCK];
  const A* g = load<A>(call.gradient, at, count, copies[0]);
  A* states[3] = {nullptr, nullptr, nullptr};
  for (int64_t s = 0; s < call.states; ++s) states[s] = load<A>(call.state[s], at, count, copies[1 + s]);
  if (call.rule == SGD) {
    sgd<A>(call, x, g, states[0], mixed);
  } else if (states[2]) {
    adam<A, true>(call, x, g, states, mixed);
  } else {
    adam<A, false>(call, x, g, states, mixed);
  }
  for (int64_t s = 0; s < call.states; ++s) store<A>(call.state[s], at, count, states[s]);
}

template <typename A>
int64_t run_block(const Call& call, int64_t at, int64_t count) {
  A copy[BLOCK], space[BLOCK];
  A* x = load<A>(call.param, at, count, copy);
  const A* mixed = x;
  int64_t found = 0;
  if constexpr (sizeof(A) == 4) {
    if (call.taken) mixed = take(call, x, at, count, space);
  }
  if (!call.taken) mixed = mix<A>(call, x, at, count, space, found);
  if (call.rule != MIX) {
    apply<A>(call, x, mixed, at, count);
  } else if (mixed != x) {
    std::memcpy(x, mixed, sizeof space);
  }
  store<A>(call.param, at, count, x);
  if constexpr (sizeof(A) == 4) {
    if (call.given) found |= give(call, x, at, count);
  }
  return found;
}

}  // namespace

// Returns `Found` bits.
extern "C" int64_t fusedfog_pass(const Call* call) {
  const int64_t blocks = (call->numel + BLOCK - 1) / BLOCK;
  const bool wide = call->param.dtype == FP64;
  int64_t found = 0;
#pragma omp parallel for num_threads(call->threads) schedule(static) reduction(| : found) if (call->threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t at = block * BLOCK, rest = call->numel - at, count = rest < BLOCK ? rest : BLOCK;
    found |= wide ? run_block<double>(*call, at, count) : run_block<float>(*call, at, count);
  }
  return found;
}
