#include "products.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#include "tiles.h"
#include "vectors.h"

namespace strata {
namespace {

constexpr int kPairRows = 2 * kTile;    // Rows that share one read of a panel.
constexpr int kTileSize = kTile * kStepInputs;
constexpr int kStepLines = kPanelStep * 2 / 64;
// Steps of a panel that stay in the first-level cache, beside rows that go by: more of them where a part more costs more.
constexpr int kNearSteps = 24, kNearStepsOfSums = 12;
constexpr int kGroupRows = 512;  // Rows whose sums are kept between two parts of a panel.

// Fetches what comes next, with every step: if the panel is read once its own next step, else some lines of the next panel.
class Ahead {
 public:
  Ahead(const uint16_t* panel, const uint16_t* next, int num_pairs)
      : at_(num_pairs == 1 ? panel + kPanelStep : next), lines_((kStepLines + num_pairs - 1) / num_pairs) {}

  void advance() {
    for (int i = 0; i < lines_; ++i, at_ += 32) _mm_prefetch(at_, _MM_HINT_T1);
  }

 private:
  const uint16_t* at_;
  const int lines_;
};

// Adds products to tiles 0 .. 3: [row tile][half of the panel]. Vector work of earlier sums goes on `beside` that of the tiles.
template <int kRowTiles, typename Beside>
void accumulate(const uint16_t* in, int64_t stride, const uint16_t* panel, int num_steps, Ahead& ahead, Beside& beside) {
  const int64_t in_bytes = stride * 2;
  for (int step = 0; step < num_steps; ++step, in += kStepInputs, panel += kPanelStep) {
    _tile_loadd(6, panel, 64);
    _tile_loadd(4, in, in_bytes);
    _tile_loadd(7, panel + kTileSize, 64);
    if (kRowTiles == 2) _tile_loadd(5, in + kTile * stride, in_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (kRowTiles == 2) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    ahead.advance();
    beside.advance();
  }
}

template <int kRowTiles>
void store_tiles(float* to, int64_t stride) {
  _tile_stored(0, to, stride * 4);
  _tile_stored(1, to + kTile, stride * 4);
  if (kRowTiles == 2) {
    _tile_stored(2, to + kTile * stride, stride * 4);
    _tile_stored(3, to + kTile * stride + kTile, stride * 4);
  }
}

template <int kRowTiles>
void load_tiles(const float* from, int64_t stride) {
  _tile_loadd(0, from, stride * 4);
  _tile_loadd(1, from + kTile, stride * 4);
  if (kRowTiles == 2) {
    _tile_loadd(2, from + kTile * stride, stride * 4);
    _tile_loadd(3, from + kTile * stride + kTile, stride * 4);
  }
}

void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// How many parts a panel is taken in. Few rows read it once anyway.
int count_parts(int num_steps, int near_steps, int num_rows) {
  return num_rows > kPairRows ? (num_steps + near_steps - 1) / near_steps : 1;
}

// Sums that are whole, of up to 32 rows of a panel, on their way to `take(panel, row, low, high)`.
template <typename Take>
class Finished {
 public:
  Finished(const Weight& weight, int steps_per_part, const Take& take)
      : weight_(weight), rows_per_step_((kPairRows + steps_per_part - 1) / steps_per_part), take_(take) {}

  // Where the sums that come next are to be stored, while those before are taken.
  float* next() { return sums_[turn_ ^ 1]; }

  void begin(int panel, int first_row, int num_rows) {
    flush();
    turn_ ^= 1;
    panel_ = panel;
    row_ = first_row;
    stop_ = first_row + num_rows;
    at_ = sums_[turn_];
    low_ = high_ = _mm512_setzero_ps();
    if (weight_.bias == nullptr) return;
    low_ = _mm512_loadu_ps(weight_.bias + panel * kPanelColumns);
    high_ = _mm512_loadu_ps(weight_.bias + panel * kPanelColumns + kTile);
  }

  void advance() {
    for (int i = 0; i < rows_per_step_ && row_ < stop_; ++i) take_row();
  }

  void flush() {
    while (row_ < stop_) take_row();
  }

 private:
  void take_row() {
    take_(panel_, row_++, _mm512_add_ps(_mm512_load_ps(at_), low_), _mm512_add_ps(_mm512_load_ps(at_ + kTile), high_));
    at_ += kPanelColumns;
  }

  const Weight& weight_;
  const int rows_per_step_;
  const Take& take_;
  int turn_ = 0, panel_ = 0, row_ = 0, stop_ = 0;
  const float* at_ = nullptr;
  __m512 low_ = _mm512_setzero_ps(), high_ = _mm512_setzero_ps();
  alignas(64) float sums_[2][kPairRows * kPanelColumns];
};

struct Nothing {
  void advance() {}
};

// Calls `take(panel, row, low, high)` with the sums of each row of each panel.
template <typename Take>
void for_outputs(const Weight& weight, const Inputs& in, const Panels& panels, const Take& take) {
  const int num_steps = weight.num_steps(), num_pairs = (in.num_rows + kPairRows - 1) / kPairRows;
  const int num_parts = count_parts(num_steps, kNearSteps, in.num_rows);
  alignas(64) float partial[kGroupRows * kPanelColumns];
  Finished<Take> finished(weight, num_steps / num_parts, take);
  for (int index = panels.first; index < panels.stop; ++index) {
    const uint16_t* const next = index + 1 < panels.stop ? weight.panel(index + 1) : panels.then;
    Ahead ahead(weight.panel(index), next, num_pairs);
    for (int part = 0; part < num_parts; ++part) {
      const int first = num_steps * part / num_parts, count = num_steps * (part + 1) / num_parts - first;
      const uint16_t* const panel = weight.panel(index) + int64_t(first) * kPanelStep;
      for (int row = 0; row < in.num_rows; row += kPairRows) {
        const uint16_t* const rows = in.data + row * in.stride + first * kStepInputs;
        float* const between = partial + row * kPanelColumns;
        const bool is_whole = part + 1 == num_parts, has_second = in.num_rows - row > kTile;
        if (part == 0) {
          zero_tiles();
        } else {
          load_tiles<2>(between, kPanelColumns);
        }
        if (has_second) {
          accumulate<2>(rows, in.stride, panel, count, ahead, finished);
        } else {
          accumulate<1>(rows, in.stride, panel, count, ahead, finished);
        }
        store_tiles<2>(is_whole ? finished.next() : between, kPanelColumns);
        if (is_whole) finished.begin(index, row, std::min(kPairRows, in.num_rows - row));
      }
    }
  }
  finished.flush();
}

// Calls `work(in, first row)` for groups of rows.
template <typename Work>
void for_groups(const Inputs& in, Work work) {
  for (int row = 0; row < in.num_rows; row += kGroupRows) {
    work(Inputs{in.data + row * in.stride, in.stride, std::min(kGroupRows, in.num_rows - row)}, row);
  }
}

void add_bias(const Weight& weight, int num_rows, const Panels& panels, float* sums, int64_t stride) {
  for (int row = 0; row < num_rows; ++row, sums += stride) {
    for (int at = panels.first * kPanelColumns; at < panels.stop * kPanelColumns; at += kTile) {
      _mm512_storeu_ps(sums + at, _mm512_add_ps(_mm512_loadu_ps(sums + at), _mm512_loadu_ps(weight.bias + at)));
    }
  }
}

}  // namespace

void pack_weight(const uint16_t* rows, int num_outputs, int num_inputs, PanelOrder order, uint16_t* packed) {
  for (int panel = 0; panel < num_outputs / kPanelColumns; ++panel) {
    for (int at = 0; at < num_inputs; at += kStepInputs) {
      for (int half = 0; half < 2; ++half, packed += kTileSize) {
        const int first = output_at(panel * kPanelColumns + half * kTile, num_outputs, order);
        __m512i columns[kTile];
        for (int i = 0; i < kTile; ++i) columns[i] = _mm512_loadu_si512(rows + int64_t(first + i) * num_inputs + at);
        transpose(columns);
        for (int i = 0; i < kTile; ++i) _mm512_store_si512(packed + i * kStepInputs, columns[i]);
      }
    }
  }
}

void multiply(const Weight& weight, const Inputs& in, const Panels& panels, uint16_t* out, int64_t stride) {
  for_groups(in, [&](const Inputs& group, int first) {
    for_outputs(weight, group, panels, [=](int panel, int row, __m512 low, __m512 high) {
      _mm512_storeu_si512(out + (first + row) * stride + panel * kPanelColumns, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    });
  });
}

void multiply_gated(const Weight& weight, const Inputs& in, const Panels& panels, uint16_t* out, int64_t stride) {
  for_groups(in, [&](const Inputs& group, int first) {
    for_outputs(weight, group, panels, [=](int panel, int row, __m512 gate, __m512 up) {
      const __m512 gated = _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), up);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (first + row) * stride + panel * kTile),
                          (__m256i)_mm512_cvtneps_pbh(gated));
    });
  });
}

void multiply_add(const Weight& weight, const Inputs& in, const Panels& panels, float* sums, int64_t stride) {
  if (weight.bias != nullptr) add_bias(weight, in.num_rows, panels, sums, stride);
  const int num_steps = weight.num_steps(), num_pairs = (in.num_rows + kPairRows - 1) / kPairRows;
  const int num_parts = count_parts(num_steps, kNearStepsOfSums, in.num_rows);
  Nothing nothing;
  for (int index = panels.first; index < panels.stop; ++index) {
    const uint16_t* const next = index + 1 < panels.stop ? weight.panel(index + 1) : panels.then;
    Ahead ahead(weight.panel(index), next, num_pairs);
    for (int part = 0; part < num_parts; ++part) {
      const int first = num_steps * part / num_parts, count = num_steps * (part + 1) / num_parts - first;
      const uint16_t* const panel = weight.panel(index) + int64_t(first) * kPanelStep;
      for (int row = 0; row < in.num_rows; row += kPairRows) {
        const uint16_t* const rows = in.data + row * in.stride + first * kStepInputs;
        float* const to = sums + row * stride + index * kPanelColumns;
        if (in.num_rows - row > kTile) {
          load_tiles<2>(to, stride);
          accumulate<2>(rows, in.stride, panel, count, ahead, nothing);
          store_tiles<2>(to, stride);
        } else {
          load_tiles<1>(to, stride);
          accumulate<1>(rows, in.stride, panel, count, ahead, nothing);
          store_tiles<1>(to, stride);
        }
      }
    }
  }
}

}  // namespace strata

#pragma GCC pop_options
#endif
