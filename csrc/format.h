// The element types that the operators take, as backends without torch headers see them.
#pragma once

namespace tfb {

enum class Format { kFloat32, kBFloat16, kFloat16 };

}  // namespace tfb
