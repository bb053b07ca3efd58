// Tiles of AMX; for translation units that are compiled for it.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace strata {

constexpr int kTile = 16;  // Rows of a tile, and fp32 numbers or pairs of bf16 in each.

struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};

// All tiles 16 × 64 bytes during its life; the caller's own shapes afterwards.
class Tiles {
 public:
  Tiles() {
    // The intrinsics name a part of what they read and write only; so the compiler is told of all of it.
    asm volatile("" : : "r"(before_), "r"(&shapes_) : "memory");
    _tile_storeconfig(before_);
    _tile_loadconfig(&shapes_);
  }
  ~Tiles() {
    if (before_[0] != 0) {
      _tile_loadconfig(before_);
    } else {
      _tile_release();
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  alignas(64) uint8_t before_[64];
  alignas(64) TileShapes shapes_;
};

}  // namespace strata
