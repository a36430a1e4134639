#include "attention.h"

#include "attention_pack.h"
#include "attention_softmax.h"
#include "attention_tiles.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

// Rows whose scores are made panel by panel of the keys, so that a panel is read from L1 and not from L2 for each tile.
constexpr int64_t kPassRows = 4 * kTileRows;
// Keys and values of one block take about as many bytes: a part of L2 that leaves room for the rest.
constexpr int64_t kBlockBytes = 256 * 1024;

// Where things lie in the scratch memory of one call.
struct Layout {
  int64_t key_block;      // keys per block
  int64_t score_stride;   // key_block in whole vectors
  int64_t value_stride;   // value_dim in whole vectors
  bool streaming;         // more than one block
  int64_t queries, keys, values, scores, sums, row_state, total;  // offsets in floats
};

Layout LayOut(const AttentionShape& shape, int64_t rows) {
  Layout at;
  at.value_stride = RoundUp(shape.value_dim, kLanes);
  constexpr int64_t kPanelKeys = kTileVectors * kLanes;
  const int64_t fitting = kBlockBytes / 4 / (shape.head_dim + at.value_stride) / kPanelKeys * kPanelKeys;
  const int64_t block = Maximum(fitting, kPanelKeys);
  // A last block that is short costs more than one that is a little long.
  at.streaming = shape.key_len > block + block / 2;
  at.key_block = at.streaming ? block : Maximum(shape.key_len, 1);
  at.score_stride = RoundUp(at.key_block, kLanes);
  constexpr int64_t kCacheLine = 16;
  int64_t next = 0;
  const auto take = [&next](int64_t floats) {
    const int64_t begin = next;
    next += RoundUp(floats, kCacheLine);
    return begin;
  };
  at.queries = take(rows * shape.head_dim);
  at.keys = take(shape.head_dim * at.score_stride);
  at.values = take(at.key_block * at.value_stride);
  at.scores = take(Minimum(kPassRows, rows) * at.score_stride);
  at.sums = take(at.streaming ? rows * at.value_stride : 0);
  at.row_state = take(at.streaming ? 2 * rows : 0);
  at.total = next;
  return at;
}

// One call of AttendHead.
struct Call {
  const AttentionShape& shape;
  const AttentionHead& head;
  const Layout& at;
  float* const scratch;
  const int64_t row_begin;
  const int64_t row_end;
  const FinishRowFn finish_row;

  float* Queries() const { return scratch + at.queries; }
  float* Keys() const { return scratch + at.keys; }
  float* Values() const { return scratch + at.values; }
  float* Scores() const { return scratch + at.scores; }
  float* Sums() const { return scratch + at.sums; }
  float* LargestScores() const { return scratch + at.row_state; }
  float* WeightSums() const { return scratch + at.row_state + (row_end - row_begin); }

  // How many of the keys from `key_begin` up to `key_end` a row sees.
  int64_t Seen(int64_t row, int64_t key_begin, int64_t key_end) const {
    const int64_t end = shape.causal ? Minimum(key_end, row + 1) : key_end;
    return Maximum(end - key_begin, 0);
  }
  float* OutputOf(int64_t row) const {
    if (head.index == nullptr) return head.output + row * head.output_stride;
    return head.index[row] < 0 ? nullptr : head.output + head.index[row] * head.output_stride;
  }
};

// A block of keys, packed.
struct KeyBlock {
  int64_t begin;
  int64_t end;
};

void MakeScores(const Call& call, const KeyBlock& block, int64_t pass_begin, int64_t pass_end, const Parts& tiles) {
  const Parts panels = SplitEvenly((block.end - block.begin + kLanes - 1) / kLanes, kTileVectors);
  const int64_t head_dim = call.shape.head_dim;
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t first = PartBegin(panels, panel) * kLanes;
    const int64_t vectors = PartBegin(panels, panel + 1) - PartBegin(panels, panel);
    if (call.Seen(pass_end - 1, block.begin, block.end) <= first) return;
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t row = pass_begin + PartBegin(tiles, tile);
      const int64_t rows = PartBegin(tiles, tile + 1) - PartBegin(tiles, tile);
      if (call.Seen(row + rows - 1, block.begin, block.end) <= first) continue;
      kQueryKeyTiles[rows - 1][vectors - 1](call.Queries() + (row - call.row_begin) * head_dim,
                                            call.Keys() + first * head_dim, head_dim,
                                            call.Scores() + (row - pass_begin) * call.at.score_stride + first,
                                            call.at.score_stride);
    }
  }
}

// All vectors of value_dim, a tile at a time.
void MultiplyValues(const Call& call, const float* weights, int64_t rows, int64_t keys, ValueTarget to) {
  const Parts chunks = SplitEvenly(call.at.value_stride / kLanes, kTileVectors);
  float* outputs[kTileRows];
  if (to.outputs != nullptr) {
    for (int64_t r = 0; r < rows; ++r) outputs[r] = to.outputs[r];
    to.outputs = outputs;
  }
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t first = PartBegin(chunks, chunk) * kLanes;
    const int64_t vectors = PartBegin(chunks, chunk + 1) - PartBegin(chunks, chunk);
    to.last_lanes = Minimum(call.shape.value_dim - first - (vectors - 1) * kLanes, kLanes);
    kWeightValueTiles[rows - 1][vectors - 1](weights, call.at.score_stride, call.Values() + first,
                                             call.at.value_stride, keys, to);
    if (to.outputs == nullptr) {
      to.sums += vectors * kLanes;
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (outputs[r] != nullptr) outputs[r] += vectors * kLanes;
    }
  }
}

// A tile of rows whose scores against all keys are there: written to the output.
void FinishTile(const Call& call, const KeyBlock& block, int64_t row, int64_t rows, float* scores) {
  float factors[kTileRows];
  float* outputs[kTileRows];
  const int64_t keys = call.Seen(row + rows - 1, block.begin, block.end);
  for (int64_t r = 0; r < rows; ++r) {
    float* const row_scores = scores + r * call.at.score_stride;
    const int64_t seen = call.Seen(row + r, block.begin, block.end);
    const float largest = call.finish_row(TermsOfRow(call.shape, call.head, row + r, block.begin), seen, row_scores);
    const float sum = WeightRow(ShiftFor(largest), seen, keys, row_scores);
    factors[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
    outputs[r] = call.OutputOf(row + r);
  }
  ValueTarget to;
  to.outputs = outputs;
  to.factors = factors;
  MultiplyValues(call, scores, rows, keys, to);
}

// factors[i] = e^differences[i], differences not positive.
void CorrectionFactors(const float (&differences)[16], float (&factors)[16]) {
  for (int i = 0; i < kTileRows; i += kLanes) Store(factors + i, WeightOf(Load(differences + i)));
}

// A tile of rows and one of several blocks of keys: added to what the rows have from the blocks before.
void AccumulateTile(const Call& call, const KeyBlock& block, int64_t row, int64_t rows, float* scores) {
  float differences[16] = {};
  float factors[16];
  const int64_t keys = call.Seen(row + rows - 1, block.begin, block.end);
  const int64_t state = row - call.row_begin;
  float block_sums[kTileRows];
  for (int64_t r = 0; r < rows; ++r) {
    float* const row_scores = scores + r * call.at.score_stride;
    const int64_t seen = call.Seen(row + r, block.begin, block.end);
    const float of_block = call.finish_row(TermsOfRow(call.shape, call.head, row + r, block.begin), seen, row_scores);
    float& largest = call.LargestScores()[state + r];
    const float before = ShiftFor(largest);
    if (of_block > largest) largest = of_block;
    const float shift = ShiftFor(largest);
    differences[r] = before - shift;
    block_sums[r] = WeightRow(shift, seen, keys, row_scores);
  }
  CorrectionFactors(differences, factors);
  for (int64_t r = 0; r < rows; ++r) {
    float& sum = call.WeightSums()[state + r];
    sum = sum * factors[r] + block_sums[r];
  }
  ValueTarget to;
  to.sums = call.Sums() + state * call.at.value_stride;
  to.sums_stride = call.at.value_stride;
  to.factors = factors;
  MultiplyValues(call, scores, rows, keys, to);
}

void StartSums(const Call& call) {
  const int64_t rows = call.row_end - call.row_begin;
  for (int64_t i = 0; i < rows * call.at.value_stride; ++i) call.Sums()[i] = 0.0f;
  for (int64_t i = 0; i < rows; ++i) {
    call.LargestScores()[i] = kMinusInfinity;
    call.WeightSums()[i] = 0.0f;
  }
}

void WriteSums(const Call& call) {
  for (int64_t row = call.row_begin; row < call.row_end; ++row) {
    float* const output = call.OutputOf(row);
    if (output == nullptr) continue;
    const float* sums = call.Sums() + (row - call.row_begin) * call.at.value_stride;
    const float sum = call.WeightSums()[row - call.row_begin];
    const Vec factor = Broadcast(sum == 0.0f ? 0.0f : 1.0f / sum);
    for (int64_t i = 0; i < call.shape.value_dim; i += kLanes) {
      StorePartial(output + i, Load(sums + i) * factor, Minimum(call.shape.value_dim - i, kLanes));
    }
  }
}

void AttendBlock(const Call& call, const KeyBlock& block) {
  PackKeys(call.shape, call.head, block.begin, block.end, call.Keys());
  PackValues(call.shape, call.head, block.begin, block.end, call.Values());
  const Parts passes = SplitEvenly(call.row_end - call.row_begin, kPassRows);
  for (int64_t pass = 0; pass < passes.count; ++pass) {
    const int64_t begin = call.row_begin + PartBegin(passes, pass);
    const int64_t end = call.row_begin + PartBegin(passes, pass + 1);
    if (call.Seen(end - 1, block.begin, block.end) == 0) continue;
    const Parts tiles = SplitEvenly(end - begin, kTileRows);
    MakeScores(call, block, begin, end, tiles);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t row = begin + PartBegin(tiles, tile);
      const int64_t rows = PartBegin(tiles, tile + 1) - PartBegin(tiles, tile);
      float* const scores = call.Scores() + (row - begin) * call.at.score_stride;
      if (call.at.streaming) {
        AccumulateTile(call, block, row, rows, scores);
      } else {
        FinishTile(call, block, row, rows, scores);
      }
    }
  }
}

}  // namespace

int64_t AttentionScratch(const AttentionShape& shape, int64_t rows) { return LayOut(shape, rows).total; }

void AttendHead(const AttentionShape& shape, const AttentionHead& head, int64_t row_begin, int64_t row_end,
                float* scratch) {
  if (row_begin >= row_end) return;
  const Layout at = LayOut(shape, row_end - row_begin);
  const Call call = {shape, head, at, scratch, row_begin, row_end, kFinishRow[FinishRowKind(shape, head)]};
  PackQueries(shape, head, row_begin, row_end, call.Queries());
  if (at.streaming) StartSums(call);
  const int64_t keys = call.Seen(row_end - 1, 0, shape.key_len);
  for (int64_t begin = 0; begin < keys; begin += at.key_block) {
    AttendBlock(call, {begin, Minimum(begin + at.key_block, keys)});
  }
  if (at.streaming) WriteSums(call);
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
