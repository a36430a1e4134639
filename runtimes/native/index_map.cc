#include "index_map.h"

#include <vector>

namespace attn_deploy::native {

std::string CheckIndexMap(const int64_t* index, int64_t count, int64_t tokens, bool padded, bool* covers_every_token) {
  *covers_every_token = false;
  std::vector<bool> seen(static_cast<size_t>(tokens > 0 ? tokens : 0), false);
  int64_t covered = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = index[i];
    if (padded && token == -1) continue;
    if (token < 0 || token >= tokens) {
      return "index holds " + std::to_string(token) + "; expected " + (padded ? "-1 to " : "0 to ") +
             std::to_string(tokens - 1);
    }
    if (seen[static_cast<size_t>(token)]) {
      return "index holds token " + std::to_string(token) + " twice; expected every token in one window";
    }
    seen[static_cast<size_t>(token)] = true;
    ++covered;
  }
  *covers_every_token = covered == tokens;
  return "";
}

}  // namespace attn_deploy::native
