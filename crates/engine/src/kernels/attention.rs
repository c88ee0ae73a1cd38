//! Grouped-query attention over cached or freshly computed keys and values.
//!
//! For every query row the order of operations is fixed: scores by dot products with one chain per lane, softmax with
//! the sum in eight lanes by position, and the weighted sum of values in the order of positions. Tiles, tasks and
//! the other rows of a task do not change it.
#![allow(unsafe_code)]

use tangram_checkpoint::Attention;

use super::buffer::Disjoint;
use super::elementwise::{NormWeights, prepare_heads};
use super::kv::{BLOCK_TOKENS, KvView, widen_rows_f32};
use super::simd::{LANES, Simd, cap_softly, exp, load_partial, store_partial};
use super::{Isa, Kernel};
use crate::pool::Pool;

/// Tokens that share a pass over the keys and values.
const MAX_TOKENS: usize = 16;
/// The scores of a task should take no more than this many bytes of the second-level cache.
const SCORE_BYTES: usize = 192 << 10;

/// Consecutive tokens of one sequence of a batch: what a task works on.
#[derive(Clone, Copy)]
struct Span {
    /// Which sequence of the batch.
    chunk: usize,
    /// The first token's row in the batch.
    row: usize,
    tokens: usize,
    /// The first token's position in its sequence.
    position: usize,
    /// Positions that the first token looks at, itself included.
    visible: usize,
    /// By how much that grows with each further token: 1 in causal attention, 0 in bidirectional.
    growth: usize,
}

impl Span {
    fn limit(&self, token: usize) -> usize {
        self.visible + token * self.growth
    }

    fn last_limit(&self) -> usize {
        self.limit(self.tokens - 1)
    }

    /// The first position that a token looks at.
    fn first(&self, token: usize, window: Option<usize>) -> usize {
        window.map_or(0, |window| self.limit(token).saturating_sub(window))
    }

    /// The start of the first tile that the span looks at.
    fn base(&self, window: Option<usize>) -> usize {
        self.first(0, window) / BLOCK_TOKENS * BLOCK_TOKENS
    }
}

/// The sequences of a batch, cut into the pieces that tasks work on. No two pieces share a row of the batch or a
/// position of a sequence.
#[derive(Default)]
pub struct Spans {
    list: Vec<Span>,
    chunks: usize,
    rows: usize,
}

impl Spans {
    /// Forgets all sequences.
    pub fn clear(&mut self) {
        self.list.clear();
        (self.chunks, self.rows) = (0, 0);
    }

    /// Appends a sequence's next `tokens` tokens, the first at `position`. `group` is how many query heads share a
    /// key/value head.
    pub fn push(&mut self, tokens: usize, position: usize, attention: Attention, group: usize) {
        let (visible, growth) = match attention {
            Attention::Causal => (position + 1, 1),
            Attention::Bidirectional => (position + tokens, 0),
        };
        let whole = Span { chunk: self.chunks, row: self.rows, tokens, position, visible, growth };
        let per_piece = (SCORE_BYTES / (4 * group * (position + tokens).max(1))).clamp(1, MAX_TOKENS);
        // The last piece sees most and takes longest: first.
        self.list.extend((0..tokens).step_by(per_piece).rev().map(|first| Span {
            row: whole.row + first,
            tokens: per_piece.min(tokens - first),
            position: position + first,
            visible: whole.limit(first),
            ..whole
        }));
        self.chunks += 1;
        self.rows += tokens;
    }
}

/// The sizes of attention heads.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
}

/// How dot products of queries with keys become scores.
#[derive(Clone, Copy, Debug)]
pub struct Scoring {
    /// What they are multiplied with.
    pub scale: f32,
    /// A score `s` becomes `cap · tanh(s / cap)`.
    pub cap: Option<f32>,
    /// How many positions a token looks at, itself included; at least 1. Only for causal attention.
    pub window: Option<usize>,
}

/// Where keys and values are.
#[derive(Clone, Copy)]
pub enum Keys<'a> {
    /// In the blocks of the sequences, in this layer.
    Cached(&'a KvView<'a>, usize),
    /// In the rows of this batch: keys and values, `[rows, kv_heads · head_dim]`, every sequence whole.
    Fresh(&'a [f32], &'a [f32]),
}

/// What happens to the projected heads before attention.
#[derive(Clone, Copy)]
pub struct Preparation<'a> {
    /// RMS norm of each query head.
    pub query_norm: Option<NormWeights<'a>>,
    /// RMS norm of each key head.
    pub key_norm: Option<NormWeights<'a>>,
    /// Per row: cosines, then sines of the rotation angles (`half` each).
    pub angles: &'a [f32],
    /// Rotated pairs per head; 0 without rotation.
    pub half: usize,
}

/// Normalises and rotates query and key heads in place, then stores keys and values of every row in the blocks.
#[expect(clippy::too_many_arguments, reason = "a kernel's operands")]
pub fn prepare(
    isa: Isa,
    pool: &Pool,
    shape: Heads,
    preparation: Preparation<'_>,
    spans: &Spans,
    keys: Option<(&mut KvView<'_>, usize)>,
    queries: &mut [f32],
    key_rows: &mut [f32],
    value_rows: &[f32],
) {
    let (query_width, key_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let rows = spans.rows;
    // Borrowed exclusively above, shared among the tasks here.
    let keys = keys.map(|(view, layer)| (&*view, layer));
    assert!(queries.len() == rows * query_width && key_rows.len() == rows * key_width);
    assert!(value_rows.len() == rows * key_width && preparation.angles.len() == rows * preparation.half * 2);
    let work = rows * (query_width + 3 * key_width) / 2;
    let (queries, key_rows) = (Disjoint::new(queries), Disjoint::new(key_rows));
    pool.run(spans.list.len(), 0, work, &|task, _| {
        let span = spans.list[task];
        for token in 0..span.tokens {
            let row = span.row + token;
            let angles = &preparation.angles[row * preparation.half * 2..(row + 1) * preparation.half * 2];
            let (cos, sin) = angles.split_at(preparation.half);
            // SAFETY: no two spans share a row.
            let (query, key) = unsafe {
                (queries.part(row * query_width, query_width), key_rows.part(row * key_width, key_width))
            };
            prepare_heads(isa, query, shape.head_dim, preparation.query_norm, cos, sin);
            prepare_heads(isa, key, shape.head_dim, preparation.key_norm, cos, sin);
            if let Some((view, layer)) = keys {
                let value = &value_rows[row * key_width..(row + 1) * key_width];
                // SAFETY: no two spans share a position of a sequence, and the view is borrowed exclusively.
                unsafe {
                    view.store(isa, span.chunk, span.position + token, layer, false, key);
                    view.store(isa, span.chunk, span.position + token, layer, true, value);
                }
            }
        }
    });
}

/// Attends: `out` and `queries` are `[rows, heads · head_dim]`, the spans together cover all rows.
#[expect(clippy::too_many_arguments, reason = "a kernel's operands")]
pub fn attend(
    isa: Isa,
    pool: &Pool,
    shape: Heads,
    scoring: Scoring,
    spans: &Spans,
    keys: Keys<'_>,
    queries: &[f32],
    out: &mut [f32],
) {
    let width = shape.heads * shape.head_dim;
    let group = shape.heads / shape.kv_heads;
    let rows = spans.rows;
    let spans = &spans.list;
    assert!(queries.len() == rows * width && out.len() == rows * width);
    if let Keys::Fresh(keys, values) = keys {
        assert!(keys.len() == rows * shape.kv_heads * shape.head_dim && values.len() == keys.len());
        assert!(spans.iter().all(|span| span.row >= span.position), "every sequence is whole");
    }
    let stride = shape.head_dim.next_multiple_of(LANES);
    let seen = |span: &Span| span.last_limit() - span.base(scoring.window);
    let memory = |span: &Span| Memory::new(span.tokens * group, stride, seen(span));
    let scratch = spans.iter().map(|span| memory(span).total()).max().unwrap_or(0);
    let work = spans.iter().map(|span| span.tokens * seen(span) * group * stride / 2).sum();
    let out = Disjoint::new(out);
    pool.run(spans.len() * shape.kv_heads, scratch, work, &|task, scratch| {
        let span = spans[task / shape.kv_heads];
        let memory = memory(&span);
        let head = task % shape.kv_heads;
        isa.dispatch(Attend { shape, scoring, span, head, keys, queries, out: &out, memory, scratch });
    });
}

/// The pieces that take most scratch memory among those of sequences of up to `longest` tokens: how many tokens they
/// have and how many positions the last of them looks at.
pub(crate) fn pieces(group: usize, longest: usize) -> impl Iterator<Item = (usize, usize)> {
    // A piece has one token whatever the length; more than that as long as their scores are not too many.
    let ends = (2..=MAX_TOKENS).map(move |tokens| (tokens, longest.min(SCORE_BYTES / (4 * group * tokens))));
    std::iter::once((1, longest)).chain(ends)
}

/// Elements of scratch memory for a task of `rows` query rows (tokens × heads of a group) that look at `positions`.
pub(crate) fn piece_scratch(rows: usize, head_dim: usize, positions: usize) -> usize {
    Memory::new(rows, head_dim.next_multiple_of(LANES), positions).total()
}

/// How a task divides its scratch memory.
#[derive(Clone, Copy)]
struct Memory {
    /// Query rows (tokens × heads of the group), elements each.
    rows: usize,
    stride: usize,
    /// Positions, rounded up to whole tiles.
    positions: usize,
}

impl Memory {
    fn new(rows: usize, stride: usize, positions: usize) -> Memory {
        Memory { rows, stride, positions: positions.next_multiple_of(BLOCK_TOKENS) }
    }

    fn total(&self) -> usize {
        self.rows * self.stride * 2 + BLOCK_TOKENS * self.stride + self.rows * self.positions
    }
}

/// One key/value head of one span.
struct Attend<'a> {
    shape: Heads,
    scoring: Scoring,
    span: Span,
    head: usize,
    keys: Keys<'a>,
    queries: &'a [f32],
    out: &'a Disjoint<'a>,
    memory: Memory,
    scratch: &'a mut [f32],
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Attend {
            shape: Heads { heads, kv_heads, head_dim },
            scoring: Scoring { scale, cap, window },
            span,
            head,
            keys,
            queries,
            out,
            memory,
            scratch,
        } = self;
        let group = heads / kv_heads;
        let Memory { rows, stride, positions } = memory;
        let base = span.base(window);
        let (limit, first) =
            (|row: usize| span.limit(row / group), |row: usize| span.first(row / group, window));
        let sees = |row: usize, tile: usize| tile < limit(row) && first(row) < tile + BLOCK_TOKENS;
        let place = |row: usize| ((span.row + row / group) * heads + head * group + row % group) * head_dim;
        let scale = s.splat(scale);

        let (query, scratch) = scratch.split_at_mut(rows * stride);
        let (sums, scratch) = scratch.split_at_mut(rows * stride);
        let (tile, scratch) = scratch.split_at_mut(BLOCK_TOKENS * stride);
        let scores = &mut scratch[..rows * positions];
        sums.fill(0.0);
        tile.fill(0.0);
        for row in 0..rows {
            let from = &queries[place(row)..place(row) + head_dim];
            query[row * stride..row * stride + head_dim].copy_from_slice(from);
            query[row * stride + head_dim..(row + 1) * stride].fill(0.0);
        }

        for start in (base..span.last_limit()).step_by(BLOCK_TOKENS) {
            load_tile(s, keys, span, start, false, head, kv_heads, head_dim, tile);
            let mut sees = (0..rows).filter(|&row| sees(row, start));
            while let Some(row) = sees.next() {
                // Two queries together, so that keys are loaded once for both.
                let pair = [row, sees.next().unwrap_or(row)];
                let query = pair.map(|row| &query[row * stride..(row + 1) * stride]);
                for half in 0..BLOCK_TOKENS / LANES {
                    let dots = dots(s, query, &tile[half * LANES * stride..(half + 1) * LANES * stride]);
                    for (row, dots) in pair.into_iter().zip(dots) {
                        let mut score = s.mul(dots, scale);
                        if let Some(cap) = cap {
                            score = cap_softly(s, score, cap);
                        }
                        let from = row * positions + start - base + half * LANES;
                        // SAFETY: a tile of scores has two vectors.
                        unsafe { s.store(scores[from..from + LANES].as_mut_ptr(), score) };
                    }
                }
            }
        }
        for row in 0..rows {
            let scores = &mut scores[row * positions..(row + 1) * positions];
            let scores = &mut scores[first(row) - base..limit(row) - base];
            // The weights stay unnormalised; their sum is divided out of the result at the end.
            query[row * stride] = softmax(s, scores);
        }
        for start in (base..span.last_limit()).step_by(BLOCK_TOKENS) {
            load_tile(s, keys, span, start, true, head, kv_heads, head_dim, tile);
            // What a row sees of the tile.
            let seen = |row: usize| start.max(first(row))..limit(row).min(start + BLOCK_TOKENS);
            let mut row = 0;
            while row < rows {
                if !sees(row, start) {
                    row += 1;
                    continue;
                }
                // Two rows together, which are heads of a token, so that values are loaded once for both.
                let seen_here = seen(row);
                let pair = row + 1 < rows && sees(row + 1, start) && seen(row + 1) == seen_here;
                let weights = |row: usize| {
                    let from = row * positions;
                    &scores[from + seen_here.start - base..from + seen_here.end - base]
                };
                let values = &tile[(seen_here.start - start) * stride..];
                let (sums, next) = sums[row * stride..].split_at_mut(stride);
                if pair {
                    add_values(s, [weights(row), weights(row + 1)], values, [sums, &mut next[..stride]]);
                } else {
                    add_values(s, [weights(row)], values, [sums]);
                }
                row += if pair { 2 } else { 1 };
            }
        }
        for row in 0..rows {
            // SAFETY: a task alone writes the heads of its group in the rows of its span.
            let out = unsafe { out.part(place(row), head_dim) };
            let total = s.splat(query[row * stride]);
            let sums = sums[row * stride..(row + 1) * stride].as_ptr();
            let (whole, tail) = (head_dim / LANES, head_dim % LANES);
            // SAFETY: `sums` is `out` padded to whole vectors.
            unsafe {
                for i in (0..whole).map(|i| i * LANES) {
                    s.store(out.as_mut_ptr().add(i), s.div(s.load(sums.add(i)), total));
                }
                if tail > 0 {
                    let value = s.div(load_partial(s, sums.add(whole * LANES), tail), total);
                    store_partial(s, out.as_mut_ptr().add(whole * LANES), value, tail);
                }
            }
        }
    }
}

/// Brings the keys or values of positions `start..start + 16` (as far as they are visible) into `tile`.
#[expect(clippy::too_many_arguments, reason = "the address of a tile has many parts")]
#[inline(always)]
fn load_tile<S: Simd>(
    s: S,
    keys: Keys<'_>,
    span: Span,
    start: usize,
    value: bool,
    head: usize,
    kv_heads: usize,
    head_dim: usize,
    tile: &mut [f32],
) {
    let count = BLOCK_TOKENS.min(span.last_limit() - start);
    match keys {
        // SAFETY: keys and values are written by `prepare` only, which borrows the view exclusively.
        Keys::Cached(view, layer) => unsafe {
            view.load_tile(s, span.chunk, start, layer, value, head, count, tile);
        },
        Keys::Fresh(keys, values) => {
            let rows = if value { values } else { keys };
            // The sequence starts `position` rows before the span.
            let first = (span.row - span.position + start) * kv_heads * head_dim + head * head_dim;
            assert!(first + (count - 1) * kv_heads * head_dim + head_dim <= rows.len());
            // SAFETY: the last row ends inside the slice (asserted).
            unsafe {
                widen_rows_f32(s, rows.as_ptr().add(first), kv_heads * head_dim, head_dim, count, tile)
            };
        }
    }
}

/// The dot products of two queries with eight keys.
#[inline(always)]
fn dots<S: Simd>(s: S, queries: [&[f32]; 2], keys: &[f32]) -> [S::V; 2] {
    let stride = queries[0].len();
    assert!(queries[1].len() == stride && keys.len() == stride * LANES && stride.is_multiple_of(LANES));
    // SAFETY: all rows have `stride` elements, a multiple of the lanes.
    let [first, second] = unsafe { s.products(queries.map(<[f32]>::as_ptr), keys.as_ptr(), stride) };
    [s.sums(first), s.sums(second)]
}

/// Replaces scores by `e^(score − max)` and gives their sum.
#[inline(always)]
fn softmax<S: Simd>(s: S, scores: &mut [f32]) -> f32 {
    let (whole, tail) = (scores.len() / LANES, scores.len() % LANES);
    let p = scores.as_mut_ptr();
    let mut max = s.splat(f32::NEG_INFINITY);
    let mut sum = s.splat(0.0);
    // SAFETY: all offsets are below the length.
    unsafe {
        for i in (0..whole).map(|i| i * LANES) {
            max = s.max(max, s.load(p.add(i)));
        }
        let mut lanes = [0.0f32; LANES];
        s.store(lanes.as_mut_ptr(), max);
        // A NaN is lost here but not below, where its weight makes the sum NaN.
        let highest = lanes.iter().chain(&scores[whole * LANES..]).copied().fold(f32::NEG_INFINITY, f32::max);
        let highest = s.splat(highest);
        let p = scores.as_mut_ptr();
        for i in (0..whole).map(|i| i * LANES) {
            let weight = exp(s, s.sub(s.load(p.add(i)), highest));
            s.store(p.add(i), weight);
            sum = s.add(sum, weight);
        }
        if tail > 0 {
            let rest = p.add(whole * LANES);
            let weight = exp(s, s.sub(load_partial(s, rest, tail), highest));
            store_partial(s, rest, weight, tail);
            // The padding lanes are not part of the sum.
            sum = s.add(sum, load_partial(s, rest, tail));
        }
    }
    s.sum(sum)
}

/// `sums += Σ weight[p] · values[p]`, position by position, for `R` rows with weights of their own.
#[inline(always)]
fn add_values<S: Simd, const R: usize>(s: S, weights: [&[f32]; R], values: &[f32], sums: [&mut [f32]; R]) {
    let (count, stride) = (weights[0].len(), sums[0].len());
    assert!(weights.iter().all(|weights| weights.len() == count) && values.len() >= count * stride);
    assert!(sums.iter().all(|sums| sums.len() == stride) && stride.is_multiple_of(LANES));
    let (weights, sums) = (weights.map(<[f32]>::as_ptr), sums.map(<[f32]>::as_mut_ptr));
    let mut i = 0;
    while i < stride {
        let (values, sums) = (values.as_ptr().wrapping_add(i), sums.map(|sums| sums.wrapping_add(i)));
        // SAFETY: `stride` is a multiple of the lanes; row `p` of `values` and every sum have `stride` elements.
        i += LANES
            * unsafe {
                match (stride - i) / LANES {
                    8.. => s.add_rows::<8, R>(weights, count, values, stride, sums),
                    4.. => s.add_rows::<4, R>(weights, count, values, stride, sums),
                    2.. => s.add_rows::<2, R>(weights, count, values, stride, sums),
                    _ => s.add_rows::<1, R>(weights, count, values, stride, sums),
                }
            };
    }
}
