//! Matrix products: `out[t][n] (+)= Σ_k weight[n][k] · x[t][k] + bias[n]` with the weights as stored.
//!
//! Every output element has one order of additions, whatever the number of tokens, rows and threads; `plain`,
//! `pairs` and `quantised` say which. Activations are rearranged first; then tasks take some rows of a matrix and a block of
//! tokens each (`panels`).
#![allow(unsafe_code)]

use std::ops::Range;

use tangram_checkpoint::DType;

use super::buffer::{Buffer, Disjoint};
use super::panels::{Layout, MOST_ROWS, Task};
use super::plain::PlainSums;
use super::quantised::QuantisedSums;
use super::simd::LANES;
use super::{Isa, blocks, pairs, plain, quantised};
use crate::pool::Pool;

/// Weights that make a task worth handing to another thread.
const TASK_WEIGHTS: usize = 1 << 15;

/// Tokens from which on tasks are made smaller: their weights are then the lesser part of their work.
const MANY_TOKENS: usize = 32;

/// One product over the tokens of a [`matmul`].
pub struct Linear<'a> {
    /// The stored bytes of the `[rows, columns]` matrix.
    pub weight: &'a [u8],
    /// Their element type.
    pub dtype: DType,
    /// Rows of the matrix: features of the output.
    pub rows: usize,
    /// `[rows]`.
    pub bias: Option<&'a [f32]>,
    /// `[tokens, rows]`.
    pub out: &'a mut [f32],
    /// Whether the product is added to `out` (a residual) instead of replacing it.
    pub accumulate: bool,
}

/// A [`Linear`] as the tasks see it.
struct Product<'a> {
    weight: &'a [u8],
    dtype: DType,
    rows: usize,
    row_bytes: usize,
    bias: Option<&'a [f32]>,
    out: Disjoint<'a>,
    accumulate: bool,
    rows_per_task: usize,
    row_tasks: usize,
    /// How its activations are rearranged, and where they are.
    form: Form,
    layout: Layout,
}

/// Multiplies `tokens` rows of `x` (`[tokens, columns]`) with several matrices. `packed` is memory for a rearranged copy
/// of `x`. Panics if a slice does not have the length that the shapes demand.
pub fn matmul<const N: usize>(
    isa: Isa,
    pool: &Pool,
    packed: &mut Buffer,
    x: &[f32],
    columns: usize,
    tokens: usize,
    linears: [Linear<'_>; N],
) {
    assert!(columns > 0 && x.len() == tokens * columns);
    if tokens == 0 {
        return;
    }
    let packing = Packing::new(isa, linears.each_ref().map(|linear| linear.dtype), columns, tokens);
    let products = linears.map(|linear| {
        let bytes = linear.dtype.tensor_bytes(&[linear.rows as u64, columns as u64]);
        assert_eq!(bytes, Some(linear.weight.len() as u64), "bytes of a {} matrix", linear.dtype);
        assert_eq!(linear.out.len(), tokens * linear.rows);
        assert!(linear.bias.is_none_or(|bias| bias.len() == linear.rows));
        let rows_per_task = rows_per_task(linear.rows, columns, tokens, pool.threads());
        Product {
            weight: linear.weight,
            dtype: linear.dtype,
            rows: linear.rows,
            row_bytes: linear.weight.len() / linear.rows.max(1),
            bias: linear.bias,
            out: Disjoint::new(linear.out),
            accumulate: linear.accumulate,
            rows_per_task,
            row_tasks: linear.rows.div_ceil(rows_per_task),
            form: Form::of(isa, linear.dtype),
            layout: Form::of(isa, linear.dtype).layout(columns, tokens),
        }
    });

    let elements = |layout: &Option<Layout>| layout.as_ref().map_or(0, Layout::elements);
    let packed = packed.get_mut(packing.elements());
    let (pairs, packed) = packed.split_at_mut(elements(&packing.pairs));
    let (records, packed) = packed.split_at_mut(elements(&packing.quantised));
    if let (Some(layout), Some(proof)) = (packing.pairs, isa.pairs()) {
        pairs::pack(proof, pool, layout, x, columns, pairs);
    }
    if let Some(layout) = packing.quantised {
        quantised::pack(isa, pool, layout, x, columns, records);
    }
    if let Some(layout) = packing.plain {
        plain::pack(pool, layout, x, columns, packed);
    }
    let (pairs, records) = (&*pairs, &*records);
    let packed = if packing.plain.is_some() { &*packed } else { x };

    let tasks = products.iter().map(|product| product.row_tasks * product.layout.blocks).sum();
    let scratch = |product: &Product<'_>| product.form.scratch(&product.layout, product.row_bytes, columns);
    let scratch = products.iter().map(scratch).max().unwrap_or(0);
    let work = products.iter().map(|product| product.rows * columns * tokens / LANES).sum();
    pool.run(tasks, scratch, work, &|mut task, scratch| {
        for product in &products {
            let product_tasks = product.row_tasks * product.layout.blocks;
            if task < product_tasks {
                let first = task % product.row_tasks * product.rows_per_task;
                let rows = first..product.rows.min(first + product.rows_per_task);
                let x = match product.form {
                    Form::Plain => packed,
                    Form::Pairs => pairs,
                    Form::Records => records,
                };
                // SAFETY: tasks take disjoint rows or disjoint tokens.
                unsafe { product.run(isa, rows, task / product.row_tasks, x, scratch) };
                return;
            }
            task -= product_tasks;
        }
    });
}

/// How the activations are rearranged that weights of a type are multiplied with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// As they are: `plain`.
    Plain,
    /// Rounded to sixteen bits: `pairs`.
    Pairs,
    /// Rounded to twice eight bits: `quantised`.
    Records,
}

impl Form {
    fn of(isa: Isa, dtype: DType) -> Form {
        if dtype.is_quantised() {
            Form::Records
        } else if dtype == DType::BF16 && isa.pairs().is_some() {
            Form::Pairs
        } else {
            Form::Plain
        }
    }

    /// How the tokens of a product are divided.
    fn layout(self, columns: usize, tokens: usize) -> Layout {
        match self {
            Form::Plain => Layout::new(plain::token_elements(columns), tokens),
            Form::Pairs => pairs::layout(columns, tokens),
            Form::Records => Layout::new(quantised::token_elements(columns), tokens),
        }
    }

    /// Scratch elements of a task.
    fn scratch(self, layout: &Layout, row_bytes: usize, columns: usize) -> usize {
        match self {
            Form::Pairs => pairs::scratch(layout, columns),
            Form::Plain | Form::Records => layout.scratch(row_bytes),
        }
    }
}

/// How activations are rearranged for a [`matmul`]: once for all its matrices that want the same form.
pub(crate) struct Packing {
    plain: Option<Layout>,
    pairs: Option<Layout>,
    quantised: Option<Layout>,
}

impl Packing {
    /// For matrices of these types that share their input of `tokens` rows of `columns`.
    pub(crate) fn new(
        isa: Isa,
        dtypes: impl IntoIterator<Item = DType>,
        columns: usize,
        tokens: usize,
    ) -> Packing {
        let mut packing = Packing { plain: None, pairs: None, quantised: None };
        for dtype in dtypes {
            let form = Form::of(isa, dtype);
            let layout = form.layout(columns, tokens);
            match form {
                Form::Pairs => packing.pairs = Some(layout),
                Form::Records => packing.quantised = Some(layout),
                Form::Plain if tokens > 1 || layout.elements() > columns => packing.plain = Some(layout),
                // Plain weights read the only token as it is: nothing is to be filled up.
                Form::Plain => {}
            }
        }
        packing
    }

    fn layouts(&self) -> impl Iterator<Item = &Layout> {
        self.pairs.iter().chain(&self.quantised).chain(&self.plain)
    }

    /// Elements of the rearranged activations; never fewer for more tokens.
    pub(crate) fn elements(&self) -> usize {
        self.layouts().map(Layout::elements).sum()
    }

    /// Times that the threads are called together for it; a single token is rearranged by the caller alone.
    pub(crate) fn phases(&self) -> usize {
        self.layouts().filter(|layout| layout.tokens > 1).map(|layout| layout.blocks).sum()
    }
}

/// Blocks into which tokens are divided; every weight of this type is read and unpacked once for each.
pub(crate) fn token_blocks(isa: Isa, dtype: DType, columns: usize, tokens: usize) -> usize {
    Form::of(isa, dtype).layout(columns, tokens).blocks
}

/// Scratch elements of each thread in a [`matmul`] with a matrix of this type whose rows have `row_bytes`; never fewer
/// for more tokens.
pub(crate) fn scratch_elements(
    isa: Isa,
    dtype: DType,
    row_bytes: usize,
    columns: usize,
    tokens: usize,
) -> usize {
    let form = Form::of(isa, dtype);
    form.scratch(&form.layout(columns, tokens), row_bytes, columns)
}

/// Rows of a task: whole panels, enough work to be worth it, and some tasks per thread to level out.
fn rows_per_task(rows: usize, columns: usize, tokens: usize, threads: usize) -> usize {
    let worth = TASK_WEIGHTS.div_ceil(columns.max(1) * tokens);
    let level = rows.div_ceil(threads * if tokens < MANY_TOKENS { 4 } else { 16 });
    let most = (TASK_WEIGHTS * 8).div_ceil(columns.max(1));
    level.clamp(worth, most).max(1).next_multiple_of(MOST_ROWS)
}

impl Product<'_> {
    /// Multiplies some rows with a block of tokens.
    ///
    /// # Safety
    /// No other thread touches these rows of these tokens in `out`.
    unsafe fn run(&self, isa: Isa, rows: Range<usize>, block: usize, x: &[f32], scratch: &mut [f32]) {
        let task = Task {
            weight: &self.weight[rows.start * self.row_bytes..rows.end * self.row_bytes],
            row_bytes: self.row_bytes,
            rows,
            all_rows: self.rows,
            tokens: self.layout.tokens(block),
            x: &x[self.layout.place(block)],
            out: &self.out,
            bias: self.bias,
            accumulate: self.accumulate,
            scratch,
        };
        // SAFETY: the contract is the same.
        unsafe {
            if let (Form::Pairs, Some(proof)) = (self.form, isa.pairs()) {
                return task.run_pairs(proof);
            }
            match self.dtype {
                DType::F32 => task.run::<PlainSums<plain::F32>>(isa),
                DType::F16 => task.run::<PlainSums<plain::F16>>(isa),
                DType::BF16 => task.run::<PlainSums<plain::Bf16>>(isa),
                DType::Q8_0 => task.run::<QuantisedSums<blocks::Q8_0>>(isa),
                DType::Q4_0 => task.run::<QuantisedSums<blocks::Q4_0>>(isa),
                DType::Q4_1 => task.run::<QuantisedSums<blocks::Q4_1>>(isa),
                DType::Q5_0 => task.run::<QuantisedSums<blocks::Q5_0>>(isa),
                DType::Q5_1 => task.run::<QuantisedSums<blocks::Q5_1>>(isa),
                DType::Q2K => task.run::<QuantisedSums<blocks::Q2K>>(isa),
                DType::Q3K => task.run::<QuantisedSums<blocks::Q3K>>(isa),
                DType::Q4K => task.run::<QuantisedSums<blocks::Q4K>>(isa),
                DType::Q5K => task.run::<QuantisedSums<blocks::Q5K>>(isa),
                DType::Q6K => task.run::<QuantisedSums<blocks::Q6K>>(isa),
                DType::Iq4Nl => task.run::<QuantisedSums<blocks::Iq4Nl>>(isa),
            }
        }
    }
}
