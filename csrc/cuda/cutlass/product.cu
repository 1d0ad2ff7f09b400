// 1×1 convolutions of stride 1 as plain products: with norm, residual and ReLU, or with statistics.
#include "cuda/cutlass/product.h"

#include "cuda/cutlass/kernels.h"

namespace resfast::cuda {

const char* product_affine(const Launch& launch, const ConvAffine& a) {
  return by_kernel(launch.storage, a.tile, [&](auto element, auto m, auto n) {
    using T = decltype(element);
    using Tile = cute::Shape<decltype(m), decltype(n), cute::_64>;
    const Finish finish{a.relu, a.add_after_act};
    const float *mean = a.affine.mean, *scale = a.affine.scale, *beta = a.affine.beta;
    if (a.residual) {
      using Op = Product<T, T, Tile, AffineTree<T, true, Tile>>;
      return Op::run(a.shape, a.processors, a.x, a.weight, a.residual, a.y,
                     {{}, {mean}, {scale}, {beta}, {}, finish}, launch.stream);
    }
    using Op = Product<T, void, Tile, AffineTree<T, false, Tile>>;
    return Op::run(a.shape, a.processors, a.x, a.weight, nullptr, a.y,
                   {{}, {mean}, {scale}, {beta}, finish}, launch.stream);
  });
}

const char* product_stats(const Launch& launch, const ConvStats& a) {
  return by_kernel(launch.storage, a.tile, [&](auto element, auto m, auto n) {
    using T = decltype(element);
    using Tile = cute::Shape<decltype(m), decltype(n), cute::_64>;
    using Op = Product<T, void, Tile, StatisticsTree<T, kConvStatsRows>>;
    return Op::run(a.shape, a.processors, a.x, a.weight, nullptr, a.z, {{}, {a.mean, a.m2}},
                   launch.stream);
  });
}

}  // namespace resfast::cuda
