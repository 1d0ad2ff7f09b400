// The interpolation points of F(4×4, 3×3): 0, ±a, ±b and infinity. Chosen for small errors in
// float32 (half those of the usual 0, ±1, ±2; see docs/numerics.md), with exact products.
#pragma once

namespace resfast {

constexpr float kPointA = 0.625f;
constexpr float kPointB = 1.5f;

}  // namespace resfast
