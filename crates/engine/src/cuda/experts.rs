//! Feed-forward blocks with experts on a GPU: the choice, the rows of each expert together, and the sum of their results.
//!
//! How many rows an expert gets is known only on the GPU; tables there say which rows a block of threads has.

use tangram_checkpoint::{DType, Experts};

use super::executor::ExecuteError;
use super::forward::{Input, Needs, Step, launch_product, numbers, product_arguments};
use super::plan::Tables;
use super::working::Memory;
use super::{
    CombineArguments, GroupArguments, ProductArguments, ProductKind, RouteArguments, constants, launch,
};
use crate::model::{FeedForward, Layer, LinearTensors, MlpTensors};

/// How the rows of experts lie: see [`GroupArguments`].
#[derive(Clone, Copy)]
struct Grouped {
    kind: ProductKind,
    tiles: u64,
    tile_count: usize,
}

/// The matrices of an expert, in the order of their products.
const MATRICES: [fn(&FeedForward) -> Option<&LinearTensors>; 3] =
    [|expert| expert.gate.as_ref(), |expert| Some(&expert.up), |expert| Some(&expert.down)];

/// The types of these weights, each once.
fn dtypes<'b>(linears: impl Iterator<Item = &'b LinearTensors>) -> Vec<DType> {
    let mut dtypes: Vec<DType> = Vec::new();
    for linear in linears {
        if !dtypes.contains(&linear.weight.dtype) {
            dtypes.push(linear.weight.dtype);
        }
    }
    dtypes
}

/// Bytes of a table of `experts` addresses.
fn table_bytes(experts: usize) -> usize {
    (experts * 8).next_multiple_of(constants::ALIGNMENT)
}

/// Bytes of all tables of a layer.
pub(super) fn tables_bytes(layer: &Layer) -> usize {
    let MlpTensors::Sparse { experts, .. } = &layer.mlp else { return 0 };
    let tables =
        |matrix: &fn(&FeedForward) -> Option<&LinearTensors>| dtypes(experts.iter().filter_map(matrix)).len();
    MATRICES.iter().map(tables).sum::<usize>() * table_bytes(experts.len())
}

impl Step<'_> {
    /// A feed-forward block with experts.
    pub(super) fn sparse(
        &mut self,
        layer: &Layer,
        router: &LinearTensors,
        experts: &[FeedForward],
    ) -> Result<(), ExecuteError> {
        let Some(settings) = &self.model.spec.experts else { return Ok(()) };
        let (rows, hidden) = (self.rows(), self.model.spec.hidden);
        let gates = || experts.iter().filter_map(|expert| expert.gate.as_ref());
        let ups = || experts.iter().map(|expert| &expert.up);
        let needs = Needs::of(gates().chain(ups()).chain([router]));
        let input = self.block_input(&layer.mlp_norm, needs)?;
        let scores = numbers(&mut self.memory().scores, rows * experts.len())?;
        self.product(input, router, scores, false)?;
        let (grouped, gather) = self.group(settings, scores)?;

        let routes = rows * settings.per_token;
        let width = settings.intermediate;
        let needs = Needs::of(experts.iter().map(|expert| &expert.down));
        let out = self.memory().gate.reserve(routes, width, needs)?;
        let up = numbers(&mut self.memory().up, routes * width)?;
        self.expert_products(input, gates(), grouped, gather, out.plain)?;
        self.expert_products(input, ups(), grouped, gather, up)?;
        self.activate_inner(routes, width, up, out)?;
        let inner = Input { rows: out, columns: width, tokens: routes };
        let results = numbers(&mut self.memory().expert_output, routes * hidden)?;
        self.expert_products(inner, experts.iter().map(|expert| &expert.down), grouped, 0, results)?;

        let (out, accumulate) = self.block_output(self.apart())?;
        let Memory { route_places, route_weights, .. } = &self.pass.memory;
        let arguments = CombineArguments {
            results,
            places: route_places.address(),
            weights: route_weights.address(),
            out,
            width: hidden as u32,
            per_token: settings.per_token as u32,
            accumulate: u32::from(accumulate),
            unused: 0,
        };
        // SAFETY: results have a row for each route, and places are below their number.
        unsafe { self.kernels.combine(launch::rows(rows, 256), &arguments) }?;
        Ok(())
    }

    /// Chooses experts by their scores and puts the rows of each together. Gives how they lie, and which row of the
    /// batch each of them is.
    fn group(&mut self, settings: &Experts, scores: u64) -> Result<(Grouped, u64), ExecuteError> {
        let rows = self.rows();
        let &Experts { count, per_token, normalise, .. } = settings;
        let routes = rows * per_token;
        let kind = ProductKind::for_tokens(routes.div_ceil(count.min(routes)));
        // The kernel for weights in f32 has the smallest tiles.
        let kind = if self.has_plain_experts() { ProductKind::Few8 } else { kind };
        let tile_count = launch::most_tiles(routes, count, kind.tile_tokens());
        let Memory { chosen, route_weights, gather, route_places, tiles, .. } = &mut self.pass.memory;
        let chosen = numbers(chosen, routes)?;
        let weights = numbers(route_weights, routes)?;
        let gather = numbers(gather, routes)?;
        let places = numbers(route_places, routes)?;
        let tiles = numbers(tiles, tile_count * 3)?;
        let route = RouteArguments {
            scores,
            chosen,
            weights,
            rows: rows as u32,
            experts: count as u32,
            per_token: per_token as u32,
            normalise: u32::from(normalise),
        };
        let group = GroupArguments {
            chosen,
            gather,
            places,
            tiles,
            routes: routes as u32,
            per_token: per_token as u32,
            experts: count as u32,
            tile_rows: kind.tile_tokens() as u32,
            most_tiles: tile_count as u32,
            unused: 0,
        };
        // SAFETY: scores are `[rows, experts]`; the others have an element per route, and tiles enough for all.
        unsafe {
            self.kernels.route(launch::route(rows), &route)?;
            self.kernels.group_routes(launch::group_routes(count), &group)?;
        }
        Ok((Grouped { kind, tiles, tile_count }, gather))
    }

    fn has_plain_experts(&self) -> bool {
        let layers = self.model.layers.iter();
        layers
            .filter_map(|layer| match &layer.mlp {
                MlpTensors::Sparse { experts, .. } => Some(experts),
                MlpTensors::Dense(_) => None,
            })
            .flatten()
            .flat_map(|expert| expert.gate.iter().chain([&expert.up, &expert.down]))
            .any(|linear| linear.weight.dtype == DType::F32)
    }

    /// Brings the tables of a layer's products to the GPU (the addresses of the experts' matrices, one table for each type
    /// of weights), to `start` among the constants. Gives where they end.
    pub(super) fn put_expert_tables(
        &mut self,
        experts: &[FeedForward],
        mut start: usize,
    ) -> Result<usize, ExecuteError> {
        self.pass.expert_tables.clear();
        for matrix in MATRICES {
            let linears = || experts.iter().filter_map(matrix);
            for dtype in dtypes(linears()) {
                let addresses = linears().map(|linear| match linear.weight.dtype == dtype {
                    true => self.address(&linear.weight),
                    false => Ok(0),
                });
                let mut tables = Tables::default();
                tables.push(addresses.collect::<Result<Vec<u64>, _>>()?);
                let address = self.memory().constants.put(start, tables.bytes())?;
                self.pass.expert_tables.push_back(address);
                start += table_bytes(experts.len());
            }
        }
        Ok(start)
    }

    /// The same product for all experts, each with its rows. Takes the tables in the order in which they were put.
    fn expert_products<'b>(
        &mut self,
        input: Input,
        linears: impl Iterator<Item = &'b LinearTensors> + Clone,
        grouped: Grouped,
        gather: u64,
        out: u64,
    ) -> Result<(), ExecuteError> {
        for dtype in dtypes(linears.clone()) {
            let Some(table) = self.pass.expert_tables.pop_front() else { return Ok(()) };
            let Some(linear) = linears.clone().find(|linear| linear.weight.dtype == dtype) else { continue };
            let arguments = ProductArguments {
                weight: table,
                tiles: grouped.tiles,
                gather,
                ..product_arguments(input, &linear.weight, out)
            };
            // SAFETY: as for `product`; tiles are of rows of the output, `gather` of rows of the input.
            unsafe { launch_product(self.kernels, grouped.kind, dtype, grouped.tile_count, &arguments) }?;
        }
        Ok(())
    }
}
