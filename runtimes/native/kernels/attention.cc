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
  bool one_behind;        // the last key, alone behind whole vectors, goes its own way
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
  at.one_behind = !at.streaming && !shape.causal && shape.softcap == 0.0f && shape.key_len > kLanes &&
                  shape.key_len % kLanes == 1;
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
  const FinishScoresFn finish_scores;

  float* Queries() const { return scratch + at.queries; }
  float* Keys() const { return scratch + at.keys; }
  // Values are read in place where whole vectors lie side by side, else packed.
  bool PacksValues() const { return head.index != nullptr || shape.value_dim % kLanes != 0; }
  const float* Values(int64_t key) const {
    return PacksValues() ? scratch + at.values : head.value + key * head.value_stride;
  }
  int64_t ValueStride() const { return PacksValues() ? at.value_stride : head.value_stride; }
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
void MultiplyValues(const Call& call, const ScoreTile& tile, ValueTarget to) {
  const Parts chunks = SplitEvenly(call.at.value_stride / kLanes, kTileVectors);
  float* outputs[kTileRows];
  if (to.outputs != nullptr) {
    for (int64_t r = 0; r < tile.rows; ++r) outputs[r] = to.outputs[r];
    to.outputs = outputs;
  }
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t first = PartBegin(chunks, chunk) * kLanes;
    const int64_t vectors = PartBegin(chunks, chunk + 1) - PartBegin(chunks, chunk);
    to.last_lanes = Minimum(call.shape.value_dim - first - (vectors - 1) * kLanes, kLanes);
    kWeightValueTiles[tile.rows - 1][vectors - 1](tile.scores, tile.stride, call.Values(tile.first_key) + first,
                                                  call.ValueStride(), tile.keys + call.at.one_behind, to);
    if (to.outputs == nullptr) {
      to.sums += vectors * kLanes;
      continue;
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      if (outputs[r] != nullptr) outputs[r] += vectors * kLanes;
    }
  }
}

// A tile of rows whose scores against all keys are there: written to the output.
void FinishTile(const Call& call, const ScoreTile& tile) {
  RowNumbers largest = call.finish_scores(call.shape, call.head, tile);
  RowNumbers last;
  if (call.at.one_behind) {
    const float* const queries = call.Queries() + (tile.row - call.row_begin) * call.shape.head_dim;
    last = LastScores(call.shape, call.head, tile, queries, call.Keys() + tile.keys * call.shape.head_dim);
    largest = Larger(last, largest);
  }
  RowNumbers sums = MakeWeights(tile, largest);
  if (call.at.one_behind) {
    const RowNumbers weights = WeightsOf(last, largest);
    RowFloats of_rows;
    StoreNumbers(weights, of_rows);
    for (int64_t r = 0; r < tile.rows; ++r) tile.scores[r * tile.stride + tile.keys] = of_rows[r];
    for (int i = 0; i < kNumberVectors; ++i) sums.v[i] = sums.v[i] + weights.v[i];
  }
  for (Vec& sum : sums.v) sum = InverseOfSum(sum);
  RowFloats factors;
  StoreNumbers(sums, factors);
  float* outputs[kTileRows];
  for (int64_t r = 0; r < tile.rows; ++r) outputs[r] = call.OutputOf(tile.row + r);
  ValueTarget to;
  to.outputs = outputs;
  to.factors = factors;
  MultiplyValues(call, tile, to);
}

// A tile of rows and one of several blocks of keys: added to what the rows have from the blocks before.
void AccumulateTile(const Call& call, const ScoreTile& tile) {
  const int64_t first = tile.row - call.row_begin;
  float* const largest_so_far = call.LargestScores() + first;
  float* const sums_so_far = call.WeightSums() + first;
  RowNumbers largest = call.finish_scores(call.shape, call.head, tile);
  RowNumbers before;
  for (int64_t r = 0, i = 0; r < tile.rows; r += kLanes, ++i) {
    const int64_t lanes = Minimum(tile.rows - r, kLanes);
    before.v[i] = LoadPartial(largest_so_far + r, lanes);
    largest.v[i] = Max(before.v[i], largest.v[i]);
    StorePartial(largest_so_far + r, largest.v[i], lanes);
  }
  const RowNumbers sums = MakeWeights(tile, largest);
  const RowNumbers corrections = WeightsOf(before, largest);
  for (int64_t r = 0, i = 0; r < tile.rows; r += kLanes, ++i) {
    const int64_t lanes = Minimum(tile.rows - r, kLanes);
    StorePartial(sums_so_far + r, Fma(LoadPartial(sums_so_far + r, lanes), corrections.v[i], sums.v[i]), lanes);
  }
  RowFloats factors;
  StoreNumbers(corrections, factors);
  ValueTarget to;
  to.sums = call.Sums() + first * call.at.value_stride;
  to.sums_stride = call.at.value_stride;
  to.factors = factors;
  MultiplyValues(call, tile, to);
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
    const Vec factor = InverseOfSum(Broadcast(sum));
    for (int64_t i = 0; i < call.shape.value_dim; i += kLanes) {
      StorePartial(output + i, Load(sums + i) * factor, Minimum(call.shape.value_dim - i, kLanes));
    }
  }
}

void AttendBlock(const Call& call, KeyBlock block) {
  if (call.PacksValues()) {
    PackValues(call.shape, call.head, block.begin, block.end, call.scratch + call.at.values);
  }
  if (call.at.one_behind) {
    --block.end;
    PackOneKey(call.shape, call.head, block.end, call.Keys() + block.end * call.shape.head_dim);
  }
  PackKeys(call.shape, call.head, block.begin, block.end, call.Keys());
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
      const ScoreTile scores = {call.Scores() + (row - begin) * call.at.score_stride, call.at.score_stride, rows, row,
                                block.begin, call.Seen(row + rows - 1, block.begin, block.end), call.shape.causal};
      if (call.at.streaming) {
        AccumulateTile(call, scores);
      } else {
        FinishTile(call, scores);
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
  const Call call = {shape, head, at, scratch, row_begin, row_end, ChooseFinishScores(shape, head)};
  PackQueries(shape, head, row_begin, row_end, call.Queries());
  if (at.streaming) StartSums(call);
  const int64_t keys = call.Seen(row_end - 1, 0, shape.key_len);
  for (int64_t begin = 0; begin < keys; begin += at.key_block) {
    AttendBlock(call, {begin, Minimum(begin + at.key_block, keys)});
  }
  if (at.streaming) WriteSums(call);
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
