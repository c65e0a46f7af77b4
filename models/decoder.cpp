// The decoder's part of the library's interface.

#include "decoder.h"

namespace quorum {

static const bool described = add_struct("Layer", sizeof(Layer), Layer::describe()) &&
                              add_struct("Experts", sizeof(Experts), Experts::describe()) &&
                              add_struct("Decoder", sizeof(Decoder), Decoder::describe()) &&
                              add_function("decode_f32", decode<float, float>) &&
                              add_function("decode_bf16", decode<bf16, bf16>);
#ifdef QUORUM_DOTS
static const bool fast = has_dots() && add_function("decode_bf16_dots", decode<bf16, bf16_pair>);
#endif

}  // namespace quorum
