// The interpolation points of F(4×4, 3×3): 0, ±a, ±b and infinity. Chosen for small errors in
// float32 (half those of the usual 0, ±1, ±2; see docs/numerics.md), with exact products.
#pragma once

namespace resfast {

constexpr float kPointA = 0.625f;
constexpr float kPointB = 1.5f;

// 1 / Π (p − q) over the finite points q ≠ p of p
constexpr double kSquareA = double{kPointA} * kPointA, kSquareB = double{kPointB} * kPointB;
constexpr double kWeightAtZero = 1 / (kSquareA * kSquareB);
constexpr double kWeightAtA = 1 / (2 * kSquareA * (kSquareA - kSquareB));
constexpr double kWeightAtB = 1 / (2 * kSquareB * (kSquareB - kSquareA));

}  // namespace resfast
