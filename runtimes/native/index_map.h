// Index maps of windows: which token stands at each place of each window.
#pragma once

#include <cstdint>
#include <string>

namespace attn_deploy::native {

// What is wrong with an index map of `count` places, or "": every value is a token, or -1 where `padded`; no token
// stands twice. Sets whether every one of the tokens stands in it. Throws std::bad_alloc.
std::string CheckIndexMap(const int64_t* index, int64_t count, int64_t tokens, bool padded, bool* covers_every_token);

}  // namespace attn_deploy::native
